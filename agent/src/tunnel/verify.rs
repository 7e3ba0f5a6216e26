//! Who the other end of a tunnel is: the checks on a peer's certificate, for either side.
//!
//! Enters: the certificate chain that a peer presented. Leaves: acceptance, or a [`VerifyError`] that says in words what does not
//! hold and for whom. A chain passes only if it leads to a root of the trust bundle at this moment, was issued for this use, and
//! its leaf names exactly one workload: on the client's side one of those meant (secure naming), on the server's side one of
//! the mesh's own trust domain.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, PeerMisbehaved, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use webpki::KeyUsage;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::identity::TrustBundle;
use crate::identity::bundle::validity_of;
use crate::identity::clock::readable;
use crate::identity::svid::{NameFault, named_workload};
use crate::model::{SpiffeId, TrustDomain};

/// `id-kp-serverAuth` and `id-kp-clientAuth` (RFC 5280, section 4.2.1.12), DER content octets.
const SERVER_AUTH: &[u8] = &[0x2b, 6, 1, 5, 5, 7, 3, 1];
const CLIENT_AUTH: &[u8] = &[0x2b, 6, 1, 5, 5, 7, 3, 2];

/// No configuration offers TLS 1.2.
const TLS12_REFUSED: rustls::Error = rustls::Error::PeerMisbehaved(PeerMisbehaved::SelectedUnofferedCipherSuite);

/// Why a peer's certificate is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifyError {
    /// Whose certificate it is.
    pub peer: Peer,
    /// Whom it names, where it names one workload. Not verified.
    pub claimed: Option<SpiffeId>,
    /// Who would have passed, in words.
    pub wanted: String,
    /// What does not hold.
    pub fault: PeerFault,
}

/// The side of a handshake whose certificate is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// The one that opened the connection.
    Client,
    /// The one that accepted it.
    Server,
}

/// What does not hold of a peer's certificate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerFault {
    /// It does not parse.
    #[error("it does not parse: {0}")]
    Malformed(String),
    /// Its last moment has passed.
    #[error("it is expired since {not_after} (it is {now} here)")]
    Expired {
        /// The last moment, RFC 3339.
        not_after: String,
        /// The present, RFC 3339.
        now: String,
    },
    /// Its first moment has not come.
    #[error("it is not valid before {not_before} (it is {now} here: are both nodes' clocks right?)")]
    NotYetValid {
        /// The first moment, RFC 3339.
        not_before: String,
        /// The present, RFC 3339.
        now: String,
    },
    /// It chains to no trusted root.
    #[error("unknown issuer `{issuer}`: it chains to none of the trusted roots")]
    UnknownIssuer {
        /// The leaf's issuer.
        issuer: String,
    },
    /// It is an authority's own.
    #[error("it is an authority's certificate, which no workload may present")]
    AuthorityAsLeaf,
    /// It was not issued for this use.
    #[error("it was not issued for use by a {0}")]
    Purpose(Peer),
    /// It does not name one workload.
    #[error("it {0}")]
    Name(NameFault),
    /// It names a workload that was not meant.
    #[error("it names another workload")]
    OtherWorkload,
    /// It names a workload of another trust domain.
    #[error("wrong trust domain `{is}`")]
    OtherTrustDomain {
        /// The trust domain it names.
        is: TrustDomain,
    },
    /// The chain does not verify for another reason.
    #[error("its chain does not verify: {0}")]
    Chain(webpki::Error),
}

/// The workload that a chain's leaf names. Only for chains that a handshake has verified.
///
/// # Errors
/// A [`PeerFault`] when there is no leaf, or it does not name exactly one workload. A verified chain's always does.
pub fn peer_identity(chain: &[CertificateDer<'_>]) -> Result<SpiffeId, PeerFault> {
    let leaf = chain.first().ok_or_else(|| PeerFault::Malformed("there is no certificate".to_owned()))?;
    named_workload(&parse(leaf)?).map_err(PeerFault::Name)
}

/// When a chain's leaf ends: what it proves, it proves until then. Only for chains that a handshake has verified.
///
/// # Errors
/// A [`PeerFault`] when there is no leaf, or it does not parse. A verified chain's always does.
pub fn peer_expiry(chain: &[CertificateDer<'_>]) -> Result<SystemTime, PeerFault> {
    let leaf = chain.first().ok_or_else(|| PeerFault::Malformed("there is no certificate".to_owned()))?;
    let (_not_before, not_after) = validity_of(&parse(leaf)?);
    Ok(not_after)
}

/// Checks servers' certificates on the client's side of a tunnel.
#[derive(Debug)]
pub(super) struct ServerVerifier {
    pub(super) bundle: TrustBundle,
    /// Any of these may answer.
    pub(super) expected: Vec<SpiffeId>,
    pub(super) provider: Arc<CryptoProvider>,
}

/// Checks clients' certificates on the server's side of a tunnel.
#[derive(Debug)]
pub(super) struct ClientVerifier {
    pub(super) bundle: TrustBundle,
    /// The clients' trust domain.
    pub(super) trust_domain: TrustDomain,
    pub(super) provider: Arc<CryptoProvider>,
}

impl ServerVerifier {
    fn check(&self, leaf: &CertificateDer<'_>, intermediates: &[CertificateDer<'_>], now: UnixTime) -> Result<(), rustls::Error> {
        let chain = Chain { leaf, intermediates, bundle: &self.bundle, algorithms: self.algorithms(), now };
        let meant = |id| if self.expected.contains(&id) { Ok(()) } else { Err(PeerFault::OtherWorkload) };
        chain.verify(Peer::Server).and_then(meant).map_err(|fault| {
            let wanted: Vec<_> = self.expected.iter().map(|id| format!("`{id}`")).collect();
            chain.refusal(Peer::Server, wanted.join(" or "), fault)
        })
    }

    fn algorithms(&self) -> &WebPkiSupportedAlgorithms {
        &self.provider.signature_verification_algorithms
    }
}

impl ClientVerifier {
    fn check(&self, leaf: &CertificateDer<'_>, intermediates: &[CertificateDer<'_>], now: UnixTime) -> Result<(), rustls::Error> {
        let chain = Chain { leaf, intermediates, bundle: &self.bundle, algorithms: self.algorithms(), now };
        let own_domain = |id: SpiffeId| match id.trust_domain() {
            domain if *domain == self.trust_domain => Ok(()),
            other => Err(PeerFault::OtherTrustDomain { is: other.clone() }),
        };
        chain.verify(Peer::Client).and_then(own_domain).map_err(|fault| {
            let wanted = format!("a workload of trust domain `{}`", self.trust_domain);
            chain.refusal(Peer::Client, wanted, fault)
        })
    }

    fn algorithms(&self) -> &WebPkiSupportedAlgorithms {
        &self.provider.signature_verification_algorithms
    }
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check(end_entity, intermediates, now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(TLS12_REFUSED)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, self.algorithms())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms().supported_schemes()
    }
}

impl ClientCertVerifier for ClientVerifier {
    /// None: the roots' names are nobody's business before the peer is known, and agents have one certificate to choose from.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.check(end_entity, intermediates, now)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(TLS12_REFUSED)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, self.algorithms())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms().supported_schemes()
    }
}

/// A presented chain and what it is held against.
struct Chain<'a> {
    leaf: &'a CertificateDer<'a>,
    intermediates: &'a [CertificateDer<'a>],
    bundle: &'a TrustBundle,
    algorithms: &'a WebPkiSupportedAlgorithms,
    now: UnixTime,
}

impl Chain<'_> {
    /// The identity that the chain proves. The name is looked at last: nothing of an unverified certificate decides.
    fn verify(&self, peer: Peer) -> Result<SpiffeId, PeerFault> {
        let usage = match peer {
            Peer::Client => KeyUsage::required(CLIENT_AUTH),
            Peer::Server => KeyUsage::required(SERVER_AUTH),
        };
        let anchors = self.bundle.anchors_at(self.now);
        webpki::EndEntityCert::try_from(self.leaf)
            .and_then(|leaf| {
                leaf.verify_for_usage(self.algorithms.all, &anchors, self.intermediates, self.now, usage, None, None).map(drop)
            })
            .map_err(|error| self.fault(peer, error))?;
        named_workload(&parse(self.leaf)?).map_err(PeerFault::Name)
    }

    fn refusal(&self, peer: Peer, wanted: String, fault: PeerFault) -> rustls::Error {
        let claimed = parse(self.leaf).ok().and_then(|leaf| named_workload(&leaf).ok());
        VerifyError { peer, claimed, wanted, fault }.into()
    }

    #[expect(clippy::wildcard_enum_match_arm, reason = "the library's enum grows; the rest keeps the library's words")]
    fn fault(&self, peer: Peer, error: webpki::Error) -> PeerFault {
        match error {
            webpki::Error::CertExpired { time, not_after } => {
                PeerFault::Expired { not_after: text_of(not_after), now: text_of(time) }
            }
            webpki::Error::CertNotValidYet { time, not_before } => {
                PeerFault::NotYetValid { not_before: text_of(not_before), now: text_of(time) }
            }
            webpki::Error::UnknownIssuer => match parse(self.leaf) {
                Ok(leaf) => PeerFault::UnknownIssuer { issuer: leaf.issuer().to_string() },
                Err(fault) => fault,
            },
            webpki::Error::CaUsedAsEndEntity => PeerFault::AuthorityAsLeaf,
            webpki::Error::RequiredEkuNotFoundContext(_) => PeerFault::Purpose(peer),
            other => PeerFault::Chain(other),
        }
    }
}

impl fmt::Display for VerifyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the {}'s certificate", self.peer)?;
        if let Some(claimed) = &self.claimed {
            write!(f, " for `{claimed}`")?;
        }
        write!(f, " was refused: {}; {} was meant", self.fault, self.wanted)
    }
}

impl std::error::Error for VerifyError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.fault)
    }
}

impl From<VerifyError> for rustls::Error {
    fn from(error: VerifyError) -> Self {
        Self::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(error))))
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Client => "client",
            Self::Server => "server",
        })
    }
}

fn parse<'a>(certificate: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, PeerFault> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|error| PeerFault::Malformed(error.to_string()))?;
    Ok(parsed)
}

fn text_of(time: UnixTime) -> String {
    // A certificate can name moments that this machine's clock type cannot hold.
    let moment = UNIX_EPOCH.checked_add(Duration::from_secs(time.as_secs()));
    moment.map_or_else(|| format!("second {} of 1970", time.as_secs()), readable)
}
