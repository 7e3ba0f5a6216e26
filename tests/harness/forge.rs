//! Certificates as they should be, and as they should not: from the controller's own root, or from another.

use std::fs;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use time::OffsetDateTime;

use crate::Mesh;

/// Signs whatever it is told to.
pub struct Forge {
    issuer: Issuer<'static, KeyPair>,
    root: CertificateDer<'static>,
    /// The root, as PEM text.
    pub root_pem: String,
}

/// A certificate to be made. The default is a good one for nobody.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The subject's alternative names.
    pub names: Vec<SanType>,
    /// From when to when, counted from now, in seconds.
    pub valid: (i64, i64),
}

/// A chain, leaf first, and its key.
#[derive(Debug)]
pub struct Credentials {
    /// The chain.
    pub chain: Vec<CertificateDer<'static>>,
    /// The leaf's key.
    pub key: PrivateKeyDer<'static>,
}

impl Wanted {
    /// A good certificate for a workload.
    ///
    /// # Panics
    /// When this is no URI.
    #[must_use]
    pub fn workload(id: &str) -> Self {
        Self { names: vec![SanType::URI(id.try_into().expect("a URI"))], valid: (-60, 3600) }
    }

    /// A good certificate for a server of this name, which is no workload.
    ///
    /// # Panics
    /// When this is no DNS name.
    #[must_use]
    pub fn host(name: &str) -> Self {
        Self { names: vec![SanType::DnsName(name.try_into().expect("a name"))], valid: (-60, 3600) }
    }

    /// The same, valid from when to when, counted from now, in seconds.
    #[must_use]
    pub fn valid(self, from: i64, to: i64) -> Self {
        Self { valid: (from, to), ..self }
    }
}

impl Forge {
    /// With the controller's own root and key.
    ///
    /// # Panics
    /// When the controller has not made them yet.
    #[must_use]
    pub fn of_controller(mesh: &Mesh) -> Self {
        let read = |name| fs::read_to_string(mesh.directory().join("state").join(name)).expect("the controller keeps it there");
        let root_pem = read("root-cert.pem");
        let root = CertificateDer::from_pem_slice(root_pem.as_bytes()).expect("a certificate");
        let key = KeyPair::from_pem(&read("ca-key.pem")).expect("a key");
        Self { issuer: Issuer::from_ca_cert_der(&root, key).expect("an authority's certificate"), root, root_pem }
    }

    /// With a root of its own, that looks like the controller's.
    ///
    /// # Panics
    /// When the library cannot make one.
    #[must_use]
    pub fn of_nobody() -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "cluster.local");
        params.distinguished_name.push(DnType::CommonName, "Culvert root");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let root = params.self_signed(&key).expect("a root");
        Self { issuer: Issuer::new(params, key), root: root.der().clone(), root_pem: root.pem() }
    }

    /// Makes what is wanted.
    ///
    /// # Panics
    /// When the library cannot.
    #[must_use]
    pub fn make(&self, wanted: &Wanted) -> Credentials {
        let key = KeyPair::generate().expect("a key");
        let leaf = leaf(wanted).signed_by(&key, &self.issuer).expect("a certificate");
        let key = PrivatePkcs8KeyDer::from(key.serialize_der()).into();
        Credentials { chain: vec![leaf.der().clone(), self.root.clone()], key }
    }
}

/// Makes what is wanted, signed by its own key: there is no root to it.
///
/// # Panics
/// When the library cannot.
#[must_use]
pub fn self_signed(wanted: &Wanted) -> Credentials {
    let key = KeyPair::generate().expect("a key");
    let leaf = leaf(wanted).self_signed(&key).expect("a certificate");
    Credentials { chain: vec![leaf.der().clone()], key: PrivatePkcs8KeyDer::from(key.serialize_der()).into() }
}

fn leaf(wanted: &Wanted) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names.clone_from(&wanted.names);
    params.not_before = OffsetDateTime::now_utc() + time::Duration::seconds(wanted.valid.0);
    params.not_after = OffsetDateTime::now_utc() + time::Duration::seconds(wanted.valid.1);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params
}

impl std::fmt::Debug for Forge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Forge").finish_non_exhaustive()
    }
}

impl Credentials {
    /// A chain of nobody's: one certificate, signed by its own key, that claims `identity`.
    ///
    /// # Panics
    /// When this is no URI.
    #[must_use]
    pub fn self_signed(identity: &str) -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.subject_alt_names = Wanted::workload(identity).names;
        let certificate = params.self_signed(&key).expect("a certificate");
        Self { chain: vec![certificate.der().clone()], key: PrivatePkcs8KeyDer::from(key.serialize_der()).into() }
    }
}

impl Clone for Credentials {
    fn clone(&self) -> Self {
        Self { chain: self.chain.clone(), key: self.key.clone_key() }
    }
}

/// What a request to sign looks like, for a key that nobody keeps.
///
/// # Panics
/// When the library cannot make one.
#[must_use]
pub fn signing_request() -> String {
    let key = KeyPair::generate().expect("a key");
    CertificateParams::default().serialize_request(&key).expect("a request").pem().expect("text")
}
