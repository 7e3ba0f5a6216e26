//! One workload's certificate, checked, with its key.
//!
//! Enters: the PEM chain that the controller answered and the key that was made for it. Leaves: an [`Svid`] that peers will take:
//! it names the wanted identity and no other, the key fits, it is valid now, and it chains to a root that the answer or the
//! operator named. Nothing else becomes an [`Svid`].

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::TrustBundle;
use super::bundle::{BundleError, certificates_in, validity_of};
use super::clock::readable;
use super::provider::provider;
use crate::model::SpiffeId;
use crate::model::spiffe_id::SpiffeIdError;

/// The most certificates that an answer may hold.
const CHAIN_LIMIT: usize = 16;

/// An X.509 SVID with its key (SPIFFE X.509-SVID, section 2).
#[derive(Debug)]
pub struct Svid {
    /// Who it is for.
    pub id: SpiffeId,
    /// The leaf and its intermediates, without the root, and the key.
    pub certified_key: Arc<CertifiedKey>,
    /// The first moment at which it is valid.
    pub not_before: SystemTime,
    /// The last moment at which it is valid.
    pub not_after: SystemTime,
    /// The serial number, in hexadecimal.
    pub serial: String,
    /// Grows by one with each SVID that the store takes; larger is newer.
    pub generation: u64,
    /// When it was received.
    pub obtained: SystemTime,
    /// The root at the end of the answered chain, if the answer had more than the leaf.
    pub(super) root: Option<CertificateDer<'static>>,
}

/// Why what the controller answered is no SVID.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SvidFault {
    /// The answer is not a chain of certificates.
    #[error("the answer is no certificate chain: {0}")]
    Chain(#[from] BundleError),
    /// The answer holds too many certificates.
    #[error("the answer holds {0} certificates, of at most {CHAIN_LIMIT}")]
    TooLong(usize),
    /// The leaf does not parse.
    #[error("the certificate does not parse: {0}")]
    Leaf(String),
    /// The leaf does not name one workload.
    #[error("the certificate {0}")]
    Name(#[from] NameFault),
    /// The leaf names another workload.
    #[error("the certificate is for `{is}`, but `{wanted}` was asked for")]
    OtherWorkload {
        /// What it says.
        is: Box<SpiffeId>,
        /// What was asked for.
        wanted: Box<SpiffeId>,
    },
    /// The key is not the leaf's.
    #[error("the certificate is not for the key of the request: {0}")]
    Key(rustls::Error),
    /// The leaf is not valid now.
    #[error(
        "the certificate is valid from {not_before} to {not_after}, and not at {now}: are the clocks of node and controller right?"
    )]
    Validity {
        /// Its first moment.
        not_before: String,
        /// Its last moment.
        not_after: String,
        /// The present, by this node's clock.
        now: String,
    },
    /// The chain leads to none of the roots.
    #[error("the certificate does not chain to the root that came with it: {0}")]
    Root(webpki::Error),
}

/// Why a certificate does not name one workload.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameFault {
    /// The alternative names do not parse.
    #[error("has alternative names that do not parse: {0}")]
    Malformed(String),
    /// There is no URI, or more than one (SPIFFE X.509-SVID, section 2).
    #[error("has {0} URI names, where a workload's has exactly one")]
    Count(usize),
    /// The URI is no workload's identity.
    #[error("names no workload: {0}")]
    Spiffe(#[from] SpiffeIdError),
}

impl Svid {
    /// Checks the answer `chain` (PEM, the leaf first, the root last) to a request for `id` that was made with `key`. Roots are
    /// the answer's own last and those in `trusted`.
    ///
    /// # Errors
    /// A [`SvidFault`] that says what does not hold.
    pub fn check(
        id: &SpiffeId,
        chain: &[String],
        key: PrivateKeyDer<'static>,
        trusted: &TrustBundle,
        now: SystemTime,
    ) -> Result<Self, SvidFault> {
        let mut chain = certificates_in(chain.join("\n").as_bytes())?;
        if chain.len() > CHAIN_LIMIT {
            return Err(SvidFault::TooLong(chain.len()));
        }
        let root = if chain.len() > 1 { chain.pop() } else { None };
        let leaf = chain[0].clone();
        let (_, parsed) = X509Certificate::from_der(&leaf).map_err(|error| SvidFault::Leaf(error.to_string()))?;
        let named = named_workload(&parsed)?;
        if named != *id {
            return Err(SvidFault::OtherWorkload { is: Box::new(named), wanted: Box::new(id.clone()) });
        }
        let (not_before, not_after) = validity_of(&parsed);
        if now < not_before || now >= not_after {
            let (not_before, not_after, now) = (readable(not_before), readable(not_after), readable(now));
            return Err(SvidFault::Validity { not_before, not_after, now });
        }
        verify_chain(&chain, root.as_ref(), trusted, now)?;
        let certified_key = CertifiedKey::from_der(chain, key, &provider()).map_err(SvidFault::Key)?;
        Ok(Self {
            id: id.clone(),
            certified_key: Arc::new(certified_key),
            not_before,
            not_after,
            serial: parsed.raw_serial().iter().map(|byte| format!("{byte:02x}")).collect(),
            generation: 0,
            obtained: now,
            root,
        })
    }

    /// Whether it is past its last moment.
    #[must_use]
    pub fn expired(&self, now: SystemTime) -> bool {
        now >= self.not_after
    }

    /// How long it lived, or will have lived, from its receipt to its end.
    #[must_use]
    pub fn life(&self) -> Duration {
        self.not_after.duration_since(self.obtained).unwrap_or_default()
    }
}

/// The workload that a certificate names, not verified.
///
/// # Errors
/// A [`NameFault`] when it does not name exactly one.
pub fn named_workload(certificate: &X509Certificate<'_>) -> Result<SpiffeId, NameFault> {
    let names = certificate.subject_alternative_name().map_err(|error| NameFault::Malformed(error.to_string()))?;
    let names = names.map(|extension| extension.value.general_names.as_slice()).unwrap_or_default();
    let mut uris = Vec::new();
    for name in names {
        match name {
            GeneralName::URI(uri) => uris.push(*uri),
            GeneralName::Invalid(tag, _) => return Err(NameFault::Malformed(format!("the one of kind {} is illegal", tag.0))),
            GeneralName::OtherName(..)
            | GeneralName::RFC822Name(_)
            | GeneralName::DNSName(_)
            | GeneralName::X400Address(_)
            | GeneralName::DirectoryName(_)
            | GeneralName::EDIPartyName(_)
            | GeneralName::IPAddress(_)
            | GeneralName::RegisteredID(_) => {}
        }
    }
    match uris[..] {
        [uri] => Ok(uri.parse()?),
        _ => Err(NameFault::Count(uris.len())),
    }
}

fn verify_chain(
    chain: &[CertificateDer<'static>],
    root: Option<&CertificateDer<'static>>,
    trusted: &TrustBundle,
    now: SystemTime,
) -> Result<(), SvidFault> {
    let answered = TrustBundle::new(root.cloned())?;
    let now = UnixTime::since_unix_epoch(now.duration_since(UNIX_EPOCH).unwrap_or_default());
    let anchors = [answered.anchors_at(now), trusted.anchors_at(now)].concat();
    let leaf = webpki::EndEntityCert::try_from(&chain[0]).map_err(SvidFault::Root)?;
    let algorithms = provider().signature_verification_algorithms.all;
    let usage = webpki::KeyUsage::client_auth();
    leaf.verify_for_usage(algorithms, &anchors, &chain[1..], now, usage, None, None).map_err(SvidFault::Root)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::test_authority::{Issued, TestAuthority, now, seconds};

    const ID: &str = "spiffe://cluster.local/ns/shop/sa/cart";

    fn check(issued: &Issued, wanted: &str, root: &TestAuthority) -> Result<Svid, SvidFault> {
        let id = wanted.parse().expect("a legal id");
        Svid::check(&id, &issued.answer(root), issued.key.clone_key(), &TrustBundle::empty(), now())
    }

    #[test]
    fn a_right_answer_becomes_an_svid_without_its_root() {
        let authority = TestAuthority::new("root");
        let svid = check(&authority.leaf(ID).issue(), ID, &authority).expect("a right answer");
        assert_eq!(svid.id.to_string(), ID);
        assert_eq!(svid.certified_key.cert.len(), 1);
        assert!(svid.root.is_some() && !svid.serial.is_empty() && !svid.expired(now()));
    }

    #[test]
    fn an_answer_for_another_workload_or_another_key_is_refused() {
        let authority = TestAuthority::new("root");
        let mut issued = authority.leaf(ID).issue();
        let other = "spiffe://cluster.local/ns/shop/sa/other";
        assert!(matches!(check(&issued, other, &authority), Err(SvidFault::OtherWorkload { .. })));
        issued.key = authority.leaf(ID).issue().key;
        assert!(matches!(check(&issued, ID, &authority), Err(SvidFault::Key(_))));
    }

    #[test]
    fn an_answer_that_is_not_valid_now_is_refused() {
        let authority = TestAuthority::new("root");
        let expired = authority.leaf(ID).valid(now() - seconds(20), now() - seconds(10)).issue();
        let early = authority.leaf(ID).valid(now() + seconds(10), now() + seconds(20)).issue();
        assert!(matches!(check(&expired, ID, &authority), Err(SvidFault::Validity { .. })));
        assert!(matches!(check(&early, ID, &authority), Err(SvidFault::Validity { .. })));
    }

    #[test]
    fn an_answer_with_the_wrong_root_or_no_certificate_is_refused() {
        let (authority, other) = (TestAuthority::new("root"), TestAuthority::new("other"));
        let issued = authority.leaf(ID).issue();
        assert!(matches!(check(&issued, ID, &other), Err(SvidFault::Root(webpki::Error::UnknownIssuer))));
        let id = ID.parse().expect("a legal id");
        for chain in [vec![], vec![String::new()], vec!["nonsense".to_owned()]] {
            let result = Svid::check(&id, &chain, issued.key.clone_key(), &TrustBundle::empty(), now());
            assert!(matches!(result, Err(SvidFault::Chain(BundleError::Empty))));
        }
    }
}
