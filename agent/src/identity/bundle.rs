//! The roots that peers' certificates must chain to.
//!
//! Enters: root certificates, from the `--root-cert` file and from the ends of the chains that the controller answers. Leaves: one
//! immutable [`TrustBundle`]. Several roots can be trusted at once, so that a root can be rotated.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::RootCertStore;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, TrustAnchor, UnixTime};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::provider::sha256_hex;

/// A set of trusted roots. Cheap to copy.
#[derive(Clone, Debug)]
pub struct TrustBundle {
    /// The roots, valid or not at this moment.
    pub roots: Arc<RootCertStore>,
    /// The SHA-256 digest, in hexadecimal, of the roots in a fixed order: equal for equal bundles.
    pub fingerprint: Arc<str>,
    validity: Arc<[(SystemTime, SystemTime)]>,
}

/// Why a certificate cannot be a root.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BundleError {
    /// The text holds no certificate.
    #[error("there is no certificate in it: a PEM block `CERTIFICATE` was expected")]
    Empty,
    /// The PEM text is broken.
    #[error("it is not PEM: {0}")]
    Pem(String),
    /// A certificate does not parse.
    #[error("certificate {index} in it does not parse: {reason}")]
    Certificate {
        /// Its place, from 1.
        index: usize,
        /// What the parser says.
        reason: String,
    },
    /// A certificate is not an authority's.
    #[error("certificate {index} in it (`{subject}`) is no authority's: its basic constraints do not say CA")]
    NotAuthority {
        /// Its place, from 1.
        index: usize,
        /// The certificate's subject.
        subject: String,
    },
}

impl TrustBundle {
    /// A bundle that trusts nobody.
    #[must_use]
    pub fn empty() -> Self {
        Self { roots: Arc::new(RootCertStore::empty()), fingerprint: sha256_hex(b"").into(), validity: Arc::default() }
    }

    /// The bundle of these roots; doubles count once and the order does not matter.
    ///
    /// # Errors
    /// A [`BundleError`] with the place of the first certificate that cannot be a root.
    pub fn new(roots: impl IntoIterator<Item = CertificateDer<'static>>) -> Result<Self, BundleError> {
        let mut ders: Vec<_> = roots.into_iter().collect();
        ders.sort_by(|one, other| one.as_ref().cmp(other.as_ref()));
        ders.dedup();
        let mut store = RootCertStore::empty();
        let mut validity = Vec::with_capacity(ders.len());
        for (place, der) in ders.iter().enumerate() {
            let index = place + 1;
            let reject = |reason: String| BundleError::Certificate { index, reason };
            let (_, certificate) = X509Certificate::from_der(der).map_err(|error| reject(error.to_string()))?;
            if !certificate.is_ca() {
                return Err(BundleError::NotAuthority { index, subject: certificate.subject().to_string() });
            }
            store.add(der.clone()).map_err(|error| reject(error.to_string()))?;
            validity.push(validity_of(&certificate));
        }
        let fingerprint = sha256_hex(&ders.iter().flat_map(|der| der.iter().copied()).collect::<Vec<_>>()).into();
        Ok(Self { roots: Arc::new(store), fingerprint, validity: validity.into() })
    }

    /// The roots that are valid at `now`. Borrowed, unless one of them is not.
    #[must_use]
    pub fn anchors_at(&self, now: UnixTime) -> Cow<'_, [TrustAnchor<'static>]> {
        let now = UNIX_EPOCH + Duration::from_secs(now.as_secs());
        let valid = |(begin, end): &(SystemTime, SystemTime)| *begin <= now && now <= *end;
        if self.validity.iter().all(valid) {
            return Cow::Borrowed(&self.roots.roots);
        }
        let roots = self.roots.roots.iter().zip(self.validity.iter());
        Cow::Owned(roots.filter(|(_, validity)| valid(validity)).map(|(root, _)| root.clone()).collect())
    }

    /// Whether it trusts nobody.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.roots.is_empty()
    }
}

/// The certificates of a PEM text.
///
/// # Errors
/// [`BundleError::Empty`] and [`BundleError::Pem`].
pub fn certificates_in(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, BundleError> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match certificates {
        Ok(certificates) if certificates.is_empty() => Err(BundleError::Empty),
        Ok(certificates) => Ok(certificates),
        Err(error) => Err(BundleError::Pem(error.to_string())),
    }
}

/// The first and the last moment at which the certificate is valid.
pub(crate) fn validity_of(certificate: &X509Certificate<'_>) -> (SystemTime, SystemTime) {
    let moment = |seconds: i64| match u64::try_from(seconds) {
        Ok(seconds) => UNIX_EPOCH.checked_add(Duration::from_secs(seconds)).unwrap_or(UNIX_EPOCH),
        Err(_) => UNIX_EPOCH,
    };
    let validity = certificate.validity();
    (moment(validity.not_before.timestamp()), moment(validity.not_after.timestamp()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::test_authority::{TestAuthority, now, seconds};

    #[test]
    fn bundles_of_the_same_roots_have_the_same_fingerprint() {
        let (one, other) = (TestAuthority::new("one"), TestAuthority::new("other"));
        let bundle = |roots: &[&TestAuthority]| TrustBundle::new(roots.iter().map(|root| root.root())).expect("legal roots");
        assert_eq!(bundle(&[&one, &other, &one]).fingerprint, bundle(&[&other, &one]).fingerprint);
        assert_ne!(bundle(&[&one]).fingerprint, bundle(&[&other]).fingerprint);
        assert_eq!(bundle(&[&one, &other, &one]).roots.len(), 2);
    }

    #[test]
    fn an_expired_root_is_not_trusted() {
        let old = TestAuthority::valid("old", now() - seconds(20), now() - seconds(10));
        let new = TestAuthority::new("new");
        let bundle = TrustBundle::new([old.root(), new.root()]).expect("legal roots");
        assert_eq!(bundle.anchors_at(UnixTime::now()).len(), 1);
    }

    #[test]
    fn a_leaf_and_a_broken_file_are_no_roots() {
        let authority = TestAuthority::new("root");
        let leaf = authority.leaf("spiffe://td/ns/a/sa/b").issue();
        assert!(matches!(TrustBundle::new([leaf.chain[0].clone()]), Err(BundleError::NotAuthority { index: 1, .. })));
        assert_eq!(certificates_in(b"nothing"), Err(BundleError::Empty));
        assert!(matches!(
            certificates_in(b"-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n"),
            Err(BundleError::Pem(_))
        ));
    }
}
