//! The certificate authority: the key in force, the roots to trust, and the short-lived certificates that are signed.
//!
//! Enters: a [`Material`], certificate requests whose identity was already authorised, and the time. Leaves: certificate chains,
//! leaf first and root last. Of a request only the public key and the proof that the asker holds its private half are used;
//! everything else in the certificate is decided here. The key never leaves this module and where it is kept, and a damaged pair
//! is reported, never replaced: a new root would cut every workload off that trusts the old one.

pub mod material;
mod root;
#[cfg(test)]
pub(in crate::controller) mod tests;

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use aws_lc_rs::digest;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rcgen::{
    CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, PublicKeyData, SanType,
    SerialNumber, SubjectPublicKeyInfo,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer, PrivatePkcs8KeyDer};
use time::OffsetDateTime;
use tokio::sync::watch;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::FromDer;

pub use material::{Material, MaterialError};
pub use root::RootError;

use crate::model::SpiffeId;

/// The longest backdating of a certificate, against clocks that differ between nodes.
const BACKDATE: Duration = Duration::from_secs(30);
/// The largest certificate request taken, in bytes of PEM.
const MAX_REQUEST: usize = 16 * 1024;

/// Signs certificates under the mesh's root. Which key does so can change while it runs.
pub struct Authority {
    signer: ArcSwap<Signer>,
    roots: watch::Sender<Arc<[CertificateDer<'static>]>>,
    longest: Duration,
}

/// What is signed with at present.
struct Signer {
    material: Material,
    /// PEM texts of the material's chain, the root last.
    chain: Vec<String>,
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
    /// An authority that signs with `material`. Certificates live at most `longest`.
    #[must_use]
    pub fn new(material: Material, longest: Duration) -> Self {
        let roots = watch::Sender::new(material.roots.clone().into());
        Self { signer: ArcSwap::from_pointee(Signer::new(material)), roots, longest }
    }

    /// Opens the root in `state_dir`, or makes one if there is none at all. Certificates live at most `longest`.
    ///
    /// # Errors
    /// [`RootError`] when the pair is incomplete, damaged, mismatched or expired, or a file cannot be read or written.
    pub fn open(state_dir: &Path, trust_domain: &str, longest: Duration, now: SystemTime) -> Result<Self, RootError> {
        Ok(Self::new(root::open_or_create(state_dir, trust_domain, now.into())?, longest))
    }

    /// Signs with `material` from now on.
    pub fn sign_with(&self, material: Material) {
        self.signer.store(Arc::new(Signer::new(material)));
    }

    /// Has these roots trusted from now on. They are told to whoever follows [`Authority::roots`].
    pub fn trust(&self, roots: Vec<CertificateDer<'static>>) {
        self.roots.send_if_modified(|current| {
            let changed = **current != *roots;
            if changed {
                *current = roots.into();
            }
            changed
        });
    }

    /// The roots to trust, and their changes.
    #[must_use]
    pub fn roots(&self) -> watch::Receiver<Arc<[CertificateDer<'static>]>> {
        self.roots.subscribe()
    }

    /// The certificate that signs: another one after [`Authority::sign_with`].
    #[must_use]
    pub fn issuer(&self) -> CertificateDer<'static> {
        self.signer.load().material.issuer().clone()
    }

    /// The root in force.
    #[must_use]
    pub fn anchor(&self) -> CertificateDer<'static> {
        self.signer.load().material.root.clone()
    }

    /// SHA-256 of the root certificate in force, in hexadecimal.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        fingerprint(&self.signer.load().material.root)
    }

    /// The longest life of a certificate.
    #[must_use]
    pub fn longest(&self) -> Duration {
        self.longest
    }

    /// When the chain that is signed with ends.
    #[must_use]
    pub fn expires(&self) -> SystemTime {
        self.signer.load().material.expires.into()
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
        let signer = self.signer.load();
        let end = signer.material.expires;
        if begin >= end {
            return Err(SignError::RootExpired(end));
        }
        // A tenth of the lifetime at most: an agent renews by the certificate's age, and a short one must not be born old.
        let not_before = begin - BACKDATE.min(lifetime / 10);
        // X.509 counts whole seconds, and a lifetime must not be cut short.
        let not_after = (begin + lifetime + Duration::from_millis(999)).min(end);
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
        let leaf = params.signed_by(key, &signer.material.issuer)?;
        let Material { intermediates, root, .. } = &signer.material;
        let mut pem = vec![leaf.pem()];
        pem.extend(signer.chain.iter().cloned());
        let der = [leaf.der()].into_iter().chain(intermediates).chain([root]).cloned().collect();
        Ok(Chain { pem, der, expires: not_after.into() })
    }
}

impl Signer {
    fn new(material: Material) -> Self {
        let chain = material.intermediates.iter().chain([&material.root]).map(pem_of).collect();
        Self { material, chain }
    }
}

/// SHA-256 of a certificate, in hexadecimal.
#[must_use]
pub fn fingerprint(certificate: &CertificateDer<'_>) -> String {
    digest::digest(&digest::SHA256, certificate).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A certificate in PEM (RFC 7468).
#[must_use]
pub fn pem_of(certificate: &CertificateDer<'_>) -> String {
    let text = STANDARD.encode(certificate);
    let lines = text.as_bytes().chunks(64).map(|line| String::from_utf8_lossy(line).into_owned());
    format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", lines.collect::<Vec<_>>().join("\n"))
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
