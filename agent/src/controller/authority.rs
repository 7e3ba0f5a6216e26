//! The certificate authority: one self-made root, and the short-lived certificates that it signs.
//!
//! Enters: the state directory, certificate requests whose identity was already authorised, and the time. Leaves: certificate
//! chains, leaf first and root last. Of a request only the public key and the proof that the asker holds its private half are
//! used; everything else in the certificate is decided here. The root's key never leaves this module and its file, and a damaged
//! pair is reported, never replaced: a new root would cut every workload off that trusts the old one.

mod root;

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use aws_lc_rs::digest;
use rcgen::{
    CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData,
    SanType, SerialNumber, SubjectPublicKeyInfo,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer, PrivatePkcs8KeyDer};
use time::OffsetDateTime;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::FromDer;

pub use root::RootError;

use crate::model::SpiffeId;

/// The longest backdating of a certificate, against clocks that differ between nodes.
const BACKDATE: Duration = Duration::from_secs(30);
/// The largest certificate request taken, in bytes of PEM.
const MAX_REQUEST: usize = 16 * 1024;

/// Signs certificates under the mesh's root.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    root: CertificateDer<'static>,
    root_pem: Arc<str>,
    root_expires: OffsetDateTime,
    longest: Duration,
}

/// A signed chain and when it ends.
#[derive(Debug)]
pub struct Chain {
    /// PEM texts: the leaf first, the root last.
    pub pem: Vec<String>,
    /// The same in DER.
    pub der: Vec<CertificateDer<'static>>,
    /// The end of the leaf's life.
    pub expires: SystemTime,
}

/// Why a certificate was not signed.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// The request is longer than a request of a supported key can be.
    #[error("the certificate request has {0} bytes, more than the {MAX_REQUEST} that are taken")]
    TooLarge(usize),
    /// The request is not PEM-encoded PKCS#10.
    #[error("the certificate request is not a PEM-encoded PKCS#10 request (RFC 2986)")]
    Form,
    /// The request's signature does not verify: the asker did not prove that it holds the private key.
    #[error("the certificate request is not signed by the key that it asks a certificate for")]
    ProofOfPossession,
    /// The key is of a kind that is not signed for.
    #[error("the certificate request's key is not supported: use ECDSA P-256 or P-384, Ed25519, or RSA with at least 2048 bits")]
    Key,
    /// The root has expired, or the clock is wrong.
    #[error("the root certificate expired at {0}: check this machine's clock, or make a new root")]
    RootExpired(OffsetDateTime),
    /// The certificate could not be assembled.
    #[error("cannot assemble the certificate")]
    Assemble(#[from] rcgen::Error),
    /// The operating system gave no random bytes.
    #[error("no random bytes for a serial number")]
    Random,
}

impl Authority {
    /// Opens the root in `state_dir`, or makes one if there is none at all. Certificates live at most `longest`.
    ///
    /// # Errors
    /// [`RootError`] when the pair is incomplete, damaged, mismatched or expired, or a file cannot be read or written.
    pub fn open(state_dir: &Path, trust_domain: &str, longest: Duration, now: SystemTime) -> Result<Self, RootError> {
        let root = root::open_or_create(state_dir, trust_domain, now.into())?;
        Ok(Self { issuer: root.issuer, root: root.der, root_pem: root.pem.into(), root_expires: root.expires, longest })
    }

    /// The root certificate.
    #[must_use]
    pub fn root(&self) -> &CertificateDer<'static> {
        &self.root
    }

    /// SHA-256 of the root certificate, in hexadecimal.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        digest::digest(&digest::SHA256, &self.root).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Signs a workload's certificate for `identity`, which the caller has authorised. `asked` is the wanted lifetime; none, and
    /// anything longer than the authority's own limit, means that limit.
    ///
    /// # Errors
    /// [`SignError`] when the request is malformed, its proof of possession fails or its key is not supported.
    pub fn sign(&self, request: &str, identity: &SpiffeId, asked: Option<Duration>, now: SystemTime) -> Result<Chain, SignError> {
        if request.len() > MAX_REQUEST {
            return Err(SignError::TooLarge(request.len()));
        }
        let key = requested_key(request)?;
        let uri = identity.to_string().try_into().map_err(SignError::Assemble)?;
        let lifetime = asked.filter(|asked| !asked.is_zero()).map_or(self.longest, |asked| asked.min(self.longest));
        let usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        self.issue(&key, vec![SanType::URI(uri)], usages, lifetime, now)
    }

    /// Makes a key and a certificate for a TLS server at these addresses and names.
    ///
    /// # Errors
    /// [`SignError`] when the root has expired or the certificate cannot be assembled.
    pub fn serving(
        &self,
        addresses: &[IpAddr],
        names: &[String],
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<(Chain, PrivatePkcs8KeyDer<'static>), SignError> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let mut alternatives: Vec<_> = addresses.iter().copied().map(SanType::IpAddress).collect();
        for name in names {
            alternatives.push(SanType::DnsName(name.as_str().try_into()?));
        }
        let chain = self.issue(&key, alternatives, vec![ExtendedKeyUsagePurpose::ServerAuth], lifetime, now)?;
        Ok((chain, PrivatePkcs8KeyDer::from(key.serialize_der())))
    }

    fn issue(
        &self,
        key: &impl PublicKeyData,
        alternatives: Vec<SanType>,
        usages: Vec<ExtendedKeyUsagePurpose>,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Chain, SignError> {
        let begin = OffsetDateTime::from(now);
        if begin >= self.root_expires {
            return Err(SignError::RootExpired(self.root_expires));
        }
        // A tenth of the lifetime at most: an agent renews by the certificate's age, and a short one must not be born old.
        let not_before = begin - BACKDATE.min(lifetime / 10);
        // X.509 counts whole seconds, and a lifetime must not be cut short.
        let not_after = (begin + lifetime + Duration::from_millis(999)).min(self.root_expires);
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = alternatives;
        params.not_before = not_before;
        params.not_after = not_after;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = usages;
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(random_serial()?);
        let leaf = params.signed_by(key, &self.issuer)?;
        Ok(Chain {
            pem: vec![leaf.pem(), self.root_pem.to_string()],
            der: vec![leaf.der().clone(), self.root.clone()],
            expires: not_after.into(),
        })
    }
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").field("root", &self.fingerprint()).field("longest", &self.longest).finish_non_exhaustive()
    }
}

/// The public key of a PKCS#10 request, once the request's signature proved that the asker holds the private one.
fn requested_key(request: &str) -> Result<SubjectPublicKeyInfo, SignError> {
    let der = CertificateSigningRequestDer::from_pem_slice(request.as_bytes()).map_err(|_malformed| SignError::Form)?;
    let (rest, parsed) = X509CertificationRequest::from_der(&der).map_err(|_malformed| SignError::Form)?;
    if !rest.is_empty() {
        return Err(SignError::Form);
    }
    parsed.verify_signature().map_err(|_unproved| SignError::ProofOfPossession)?;
    let info = &parsed.certification_request_info.subject_pki;
    let too_weak =
        info.parsed().is_ok_and(|key| matches!(&key, x509_parser::public_key::PublicKey::RSA(_)) && key.key_size() < 2048);
    if too_weak {
        return Err(SignError::Key);
    }
    SubjectPublicKeyInfo::from_der(info.raw).map_err(|_unknown| SignError::Key)
}

/// 127 random bits: positive, as RFC 5280, section 4.1.2.2 asks.
fn random_serial() -> Result<SerialNumber, SignError> {
    let mut bytes = [0; 16];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_unspecified| SignError::Random)?;
    bytes[0] = (bytes[0] & 0x7f) | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}
