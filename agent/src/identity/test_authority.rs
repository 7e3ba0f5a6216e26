//! A certificate authority for tests, which also issues what a good one never would.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use time::OffsetDateTime;

use super::provider::provider;
use super::svid::Svid;

/// The present, cut to whole seconds as certificates are.
pub(crate) fn now() -> SystemTime {
    let now = SystemTime::now();
    now - Duration::from_nanos(u64::from(now.duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").subsec_nanos()))
}

pub(crate) fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

pub(crate) struct TestAuthority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

pub(crate) struct Leaf<'a> {
    authority: &'a TestAuthority,
    params: CertificateParams,
}

pub(crate) struct Issued {
    /// The leaf alone.
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) key: PrivateKeyDer<'static>,
    pem: String,
}

impl TestAuthority {
    pub(crate) fn new(name: &str) -> Self {
        Self::valid(name, now() - seconds(3600), now() + seconds(1_000_000))
    }

    pub(crate) fn valid(name: &str, not_before: SystemTime, not_after: SystemTime) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        (params.not_before, params.not_after) = (OffsetDateTime::from(not_before), OffsetDateTime::from(not_after));
        let key = KeyPair::generate().expect("a key");
        Self { issuer: CertifiedIssuer::self_signed(params, key).expect("a root") }
    }

    pub(crate) fn root(&self) -> CertificateDer<'static> {
        self.issuer.der().clone()
    }

    pub(crate) fn root_pem(&self) -> String {
        self.issuer.pem()
    }

    /// A leaf for these URIs (separated by spaces; may be none), valid from a minute ago for an hour.
    pub(crate) fn leaf(&self, uris: &str) -> Leaf<'_> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let uris = uris.split_whitespace();
        params.subject_alt_names = uris.map(|uri| SanType::URI(uri.try_into().expect("ASCII"))).collect();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        Leaf { authority: self, params }.valid(now() - seconds(60), now() + seconds(3600))
    }

    /// Signs a request as a controller does: the answer's PEM blocks.
    pub(crate) fn sign(&self, csr: &str, not_before: SystemTime, not_after: SystemTime) -> Vec<String> {
        let mut request = CertificateSigningRequestParams::from_pem(csr).expect("a legal request");
        request.params.not_before = OffsetDateTime::from(not_before);
        request.params.not_after = OffsetDateTime::from(not_after);
        vec![request.signed_by(&self.issuer).expect("signed").pem(), self.root_pem()]
    }
}

impl Leaf<'_> {
    pub(crate) fn valid(mut self, not_before: SystemTime, not_after: SystemTime) -> Self {
        (self.params.not_before, self.params.not_after) = (OffsetDateTime::from(not_before), OffsetDateTime::from(not_after));
        self
    }

    pub(crate) fn authority_itself(mut self) -> Self {
        self.params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        self
    }

    pub(crate) fn purpose(mut self, purposes: &[ExtendedKeyUsagePurpose]) -> Self {
        self.params.extended_key_usages = purposes.to_vec();
        self
    }

    pub(crate) fn address(mut self, address: std::net::IpAddr) -> Self {
        self.params.subject_alt_names.push(SanType::IpAddress(address));
        self
    }

    pub(crate) fn issue(self) -> Issued {
        let key = KeyPair::generate().expect("a key");
        let certificate = self.params.signed_by(&key, &self.authority.issuer).expect("signed");
        Issued::new(&certificate, &key)
    }

    pub(crate) fn self_signed(self) -> Issued {
        let key = KeyPair::generate().expect("a key");
        let certificate = self.params.self_signed(&key).expect("signed");
        Issued::new(&certificate, &key)
    }
}

impl Issued {
    fn new(certificate: &rcgen::Certificate, key: &KeyPair) -> Self {
        let chain = vec![certificate.der().clone()];
        Self { chain, key: PrivatePkcs8KeyDer::from(key.serialize_der()).into(), pem: certificate.pem() }
    }

    /// As a controller answers it: PEM, the root last.
    pub(crate) fn answer(&self, root: &TestAuthority) -> Vec<String> {
        vec![self.pem.clone(), root.root_pem()]
    }

    /// An SVID of it, whatever it is worth. `id` is what its holder believes to be.
    pub(crate) fn svid(&self, id: &str) -> Svid {
        let key = CertifiedKey::from_der(self.chain.clone(), self.key.clone_key(), &provider()).expect("a matching key");
        Svid {
            id: id.parse().expect("a legal id"),
            certified_key: Arc::new(key),
            not_before: now(),
            not_after: now() + seconds(3600),
            serial: String::new(),
            generation: 0,
            obtained: now(),
            root: None,
        }
    }
}
