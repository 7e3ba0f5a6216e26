//! The only TLS configurations of tunnels: TLS 1.3, both sides with an SVID, no resumption, no server name.
//!
//! Enters: an SVID, the trust bundle, and whom to accept. Leaves: rustls configurations. Each tunnel's client configuration is a
//! cheap copy of one template: what differs is the certificate, the check and the protocols, and all else is shared. A
//! server configuration serves any number of connections until its SVID or bundle changes.

use std::io;
use std::sync::{Arc, LazyLock};

use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::CryptoProvider;
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{AlertDescription, CertificateError, CipherSuite, ClientConfig, ServerConfig, SignatureScheme};
use rustls_pki_types::{IpAddr, Ipv4Addr, ServerName};

use super::verify::{ClientVerifier, ServerVerifier, VerifyError};
use crate::identity::{Svid, TrustBundle};
use crate::model::{SpiffeId, TrustDomain};

/// The cryptography of tunnels: the program's own, of which the suites are those that [`record`](super::record) seals with.
fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
        let of_program = crate::identity::provider::provider();
        let gcm = [CipherSuite::TLS13_AES_256_GCM_SHA384, CipherSuite::TLS13_AES_128_GCM_SHA256];
        let mut provider = CryptoProvider::clone(&of_program);
        provider.cipher_suites.retain(|suite| gcm.contains(&suite.suite()));
        Arc::new(provider)
    });
    Arc::clone(&PROVIDER)
}

/// Why there is no TLS configuration.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum TlsError {
    /// No identity was named that the server may have: nobody could pass.
    #[error("no identity is expected of the server: the destination is no known workload")]
    NobodyExpected,
    /// There is no root: nobody could pass.
    #[error("no root is trusted yet: the root certificate file is missing and the controller has answered none")]
    NoRoots,
    /// The TLS library refuses the parameters.
    #[error("the TLS library refuses the configuration: {0}")]
    Library(#[from] rustls::Error),
}

/// What a handshake's failure says of the two sides.
#[derive(Debug)]
pub enum HandshakeFault<'a> {
    /// This side refused the peer's certificate.
    Refused(&'a VerifyError),
    /// The peer refused this side's certificate, or this side has none that it takes.
    RefusedByPeer(AlertDescription),
    /// The peer presented no certificate.
    NoCertificate,
    /// The two could not agree, or the peer does not speak TLS.
    Protocol(&'a rustls::Error),
    /// The connection broke.
    Connection,
}

/// The configuration for tunnels from `svid`'s workload to a server that is one of `expected`.
///
/// # Errors
/// [`TlsError::NobodyExpected`], [`TlsError::NoRoots`].
pub fn client_config(
    svid: &Svid,
    bundle: &TrustBundle,
    expected: Vec<SpiffeId>,
    alpn: &[&[u8]],
) -> Result<Arc<ClientConfig>, TlsError> {
    static TEMPLATE: LazyLock<Result<ClientConfig, rustls::Error>> = LazyLock::new(client_template);
    if expected.is_empty() {
        return Err(TlsError::NobodyExpected);
    }
    if bundle.is_empty() {
        return Err(TlsError::NoRoots);
    }
    let mut config = TEMPLATE.clone()?;
    let verifier = ServerVerifier { bundle: bundle.clone(), expected, provider: provider() };
    config.dangerous().set_certificate_verifier(Arc::new(verifier));
    config.client_auth_cert_resolver = Arc::new(Presented(Some(Arc::clone(&svid.certified_key))));
    config.alpn_protocols = protocols(alpn);
    Ok(Arc::new(config))
}

/// The configuration for tunnels to `svid`'s workload, from clients of `trust_domain` only.
///
/// # Errors
/// [`TlsError::NoRoots`], and [`TlsError::Library`] when the provider lacks TLS 1.3.
pub fn server_config(
    svid: &Svid,
    bundle: &TrustBundle,
    trust_domain: &TrustDomain,
    alpn: &[&[u8]],
) -> Result<Arc<ServerConfig>, TlsError> {
    if bundle.is_empty() {
        return Err(TlsError::NoRoots);
    }
    let verifier = ClientVerifier { bundle: bundle.clone(), trust_domain: trust_domain.clone(), provider: provider() };
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(Presented(Some(Arc::clone(&svid.certified_key)))));
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.enable_secret_extraction = true;
    config.alpn_protocols = protocols(alpn);
    Ok(Arc::new(config))
}

/// The name to give to rustls where it wants one. It is neither sent nor checked: who the server must be is in the configuration.
#[must_use]
pub fn server_name() -> ServerName<'static> {
    ServerName::IpAddress(IpAddr::V4(Ipv4Addr::from([0, 0, 0, 0])))
}

/// What a failed handshake, or the first read after it, says: a server's refusal of the client's certificate reaches the client
/// only after its own handshake is complete (RFC 8446, section 4.4.2.4).
#[expect(clippy::wildcard_enum_match_arm, reason = "the library's enum grows; the rest keeps the library's words")]
#[must_use]
pub fn handshake_fault(error: &io::Error) -> HandshakeFault<'_> {
    let Some(error) = error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>()) else {
        return HandshakeFault::Connection;
    };
    match error {
        rustls::Error::InvalidCertificate(CertificateError::Other(other)) => match other.0.downcast_ref() {
            Some(error) => HandshakeFault::Refused(error),
            None => HandshakeFault::Protocol(error),
        },
        rustls::Error::NoCertificatesPresented => HandshakeFault::NoCertificate,
        rustls::Error::AlertReceived(alert) if about_certificate(*alert) => HandshakeFault::RefusedByPeer(*alert),
        other => HandshakeFault::Protocol(other),
    }
}

/// What a failed handshake says, for people.
#[must_use]
pub fn in_words(error: &io::Error) -> String {
    match handshake_fault(error) {
        HandshakeFault::Refused(refusal) => refusal.to_string(),
        HandshakeFault::RefusedByPeer(alert) => format!("the peer refuses this side's certificate ({alert:?})"),
        HandshakeFault::NoCertificate => "the peer presented no certificate".to_owned(),
        HandshakeFault::Protocol(fault) => fault.to_string(),
        HandshakeFault::Connection => error.to_string(),
    }
}

/// Whether the peer refused this side's certificate.
#[must_use]
pub fn refused_by_peer(error: &io::Error) -> bool {
    matches!(handshake_fault(error), HandshakeFault::RefusedByPeer(_))
}

/// The one certificate that this side presents.
#[derive(Debug)]
struct Presented(Option<Arc<CertifiedKey>>);

impl ResolvesClientCert for Presented {
    fn resolve(&self, _root_hint_subjects: &[&[u8]], schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.0.clone().filter(|key| key.key.choose_scheme(schemes).is_some())
    }

    fn has_certs(&self) -> bool {
        self.0.is_some()
    }
}

impl ResolvesServerCert for Presented {
    fn resolve(&self, _client_hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.clone()
    }
}

/// A client configuration that trusts nobody and presents nothing, for [`client_config`] to fill in.
fn client_template() -> Result<ClientConfig, rustls::Error> {
    let nobody = ServerVerifier { bundle: TrustBundle::empty(), expected: Vec::new(), provider: provider() };
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(nobody))
        .with_client_cert_resolver(Arc::new(Presented(None)));
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    config.enable_secret_extraction = true;
    Ok(config)
}

fn protocols(alpn: &[&[u8]]) -> Vec<Vec<u8>> {
    alpn.iter().map(|protocol| protocol.to_vec()).collect()
}

fn about_certificate(alert: AlertDescription) -> bool {
    matches!(
        alert,
        AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnknownCA
            | AlertDescription::AccessDenied
            | AlertDescription::CertificateRequired
            | AlertDescription::NoCertificate
    )
}

#[cfg(test)]
mod tests;
