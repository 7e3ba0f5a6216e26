//! What certificates are signed with: a key, its certificate, and the way from there to a root.
//!
//! Enters: PEM texts. Leaves: a [`Material`] that was tried out: a certificate signed with it verifies against its root. Nothing
//! less is taken, since workloads would find out one by one.

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData, SanType,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use time::OffsetDateTime;
use webpki::{EndEntityCert, KeyUsage};

/// A self-made root's life: ten years of 365.25 days.
const ROOT_LIFETIME: time::Duration = time::Duration::hours(87_660);
/// The identity of the certificate that material is tried out with. It is dropped at once.
const PROBE: &str = "spiffe://cluster.local/ns/culvert/sa/probe";

/// Ready to sign.
pub struct Material {
    pub(super) issuer: Issuer<'static, KeyPair>,
    /// From the issuer's own certificate to the one below the root. Empty when the issuer is the root itself.
    pub(super) intermediates: Vec<CertificateDer<'static>>,
    /// The root that the chain ends at.
    pub(super) root: CertificateDer<'static>,
    /// All roots to trust, that one among them.
    pub(super) roots: Vec<CertificateDer<'static>>,
    /// When the first certificate of the chain ends.
    pub(super) expires: OffsetDateTime,
}

/// A new root, with the texts to keep it as.
pub struct NewRoot {
    /// Ready to sign.
    pub material: Material,
    /// The certificate in PEM.
    pub certificate: String,
    /// The private key in PEM (PKCS#8).
    pub key: String,
}

/// The texts of an authority that is not its own root, as Istio names them.
#[derive(Clone, Copy, Debug)]
pub struct IntermediateTexts<'a> {
    /// `ca-cert.pem`: the certificate that signs.
    pub certificate: &'a str,
    /// `ca-key.pem`: its key, PKCS#8, PKCS#1 or SEC 1.
    pub key: &'a str,
    /// `cert-chain.pem`: from that certificate upwards, with or without the root.
    pub chain: &'a str,
    /// `root-cert.pem`: one root or several.
    pub roots: &'a str,
}

/// Which text cannot be used, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{part} {reason}")]
pub struct MaterialError {
    /// The text, by the name of its file or key.
    pub part: &'static str,
    /// What is wrong with it.
    pub reason: String,
}

impl Material {
    /// A root that signs itself.
    ///
    /// # Errors
    /// [`MaterialError`]; its parts are `ca-key.pem` and `certificate`, the name of the certificate's text.
    pub fn root(
        key: &str,
        certificate: &str,
        certificate_name: &'static str,
        now: OffsetDateTime,
    ) -> Result<Self, MaterialError> {
        let key = private_key(key)?;
        let root = one(certificate_name, certificate)?;
        let expires = check_authority(certificate_name, &root, Some(&key), now)?;
        let issuer =
            Issuer::from_ca_cert_der(&root, key).map_err(|error| bad(certificate_name, format!("cannot sign ({error})")))?;
        let material = Self { issuer, intermediates: Vec::new(), roots: vec![root.clone()], root, expires };
        material.try_out(now).map_err(|error| bad(certificate_name, format!("cannot sign: {error}")))?;
        Ok(material)
    }

    /// A new root.
    ///
    /// # Errors
    /// When the operating system gives no random bytes.
    pub fn new_root(trust_domain: &str, now: OffsetDateTime) -> Result<NewRoot, rcgen::Error> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, trust_domain);
        params.distinguished_name.push(DnType::CommonName, "Culvert root");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = now - time::Duration::minutes(5);
        params.not_after = now + ROOT_LIFETIME;
        let certificate = params.self_signed(&key)?;
        let (expires, root, key_pem) = (params.not_after, certificate.der().clone(), key.serialize_pem());
        let material =
            Self { issuer: Issuer::new(params, key), intermediates: Vec::new(), roots: vec![root.clone()], root, expires };
        Ok(NewRoot { material, certificate: certificate.pem(), key: key_pem })
    }

    /// An authority below somebody else's root.
    ///
    /// # Errors
    /// [`MaterialError`] with the key of the text as Istio names it.
    pub fn intermediate(texts: &IntermediateTexts<'_>, now: OffsetDateTime) -> Result<Self, MaterialError> {
        let key = private_key(texts.key)?;
        let own = one("ca-cert.pem", texts.certificate)?;
        let mut expires = check_authority("ca-cert.pem", &own, Some(&key), now)?;
        let roots = certificates("root-cert.pem", texts.roots)?;
        let chain = certificates("cert-chain.pem", texts.chain)?;
        let mut intermediates = vec![own.clone()];
        intermediates.extend(chain.into_iter().filter(|certificate| *certificate != own && !roots.contains(certificate)));
        for certificate in &intermediates[1..] {
            expires = expires.min(check_authority("cert-chain.pem", certificate, None, now)?);
        }
        let issuer = Issuer::from_ca_cert_der(&own, key).map_err(|error| bad("ca-cert.pem", format!("cannot sign ({error})")))?;
        let root_of_its_own = roots.contains(&own);
        if root_of_its_own {
            intermediates.clear();
        }
        let mut usable = Vec::new();
        let mut fault = None;
        for root in &roots {
            match check_authority("root-cert.pem", root, None, now) {
                Ok(root_expires) => usable.push((root, root_expires)),
                Err(error) => fault = Some(error),
            }
        }
        if usable.is_empty() {
            return Err(fault.unwrap_or_else(|| bad("root-cert.pem", "holds no certificate".to_owned())));
        }
        let mut material = Self { issuer, intermediates, root: own, roots: roots.clone(), expires };
        let mut reason = String::new();
        for (root, root_expires) in usable {
            material.root = root.clone();
            match material.try_out(now) {
                Ok(()) => return Ok(Self { expires: material.expires.min(root_expires), ..material }),
                Err(error) => reason = error,
            }
        }
        Err(bad("cert-chain.pem", format!("does not lead from ca-cert.pem to a root in root-cert.pem: {reason}")))
    }

    /// The root that the chain ends at.
    #[must_use]
    pub fn anchor(&self) -> &CertificateDer<'static> {
        &self.root
    }

    /// The certificate that signs.
    #[must_use]
    pub fn issuer(&self) -> &CertificateDer<'static> {
        self.intermediates.first().unwrap_or(&self.root)
    }

    /// All roots to trust.
    #[must_use]
    pub fn trusted(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// Signs a certificate and verifies it as a peer would.
    fn try_out(&self, now: OffsetDateTime) -> Result<(), String> {
        let said = |error: rcgen::Error| error.to_string();
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(said)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(PROBE.try_into().map_err(said)?)];
        params.not_before = now - time::Duration::seconds(1);
        params.not_after = (now + time::Duration::minutes(1)).min(self.expires);
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let leaf = params.signed_by(&key, &self.issuer).map_err(said)?;
        let leaf = EndEntityCert::try_from(leaf.der()).map_err(|error| error.to_string())?;
        let anchors = [webpki::anchor_from_trusted_cert(&self.root).map_err(|error| error.to_string())?];
        let seconds = u64::try_from(now.unix_timestamp()).unwrap_or(0);
        let at = UnixTime::since_unix_epoch(std::time::Duration::from_secs(seconds));
        for usage in [KeyUsage::server_auth(), KeyUsage::client_auth()] {
            let algorithms = webpki::ALL_VERIFICATION_ALGS;
            leaf.verify_for_usage(algorithms, &anchors, &self.intermediates, at, usage, None, None)
                .map_err(|error| error.to_string())?;
        }
        Ok(())
    }
}

impl std::fmt::Debug for Material {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Material").field("expires", &self.expires).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for NewRoot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NewRoot").field("certificate", &self.certificate).finish_non_exhaustive()
    }
}

/// The certificates of a PEM text.
///
/// # Errors
/// [`MaterialError`] with this name of the text.
pub fn certificates(part: &'static str, pem: &str) -> Result<Vec<CertificateDer<'static>>, MaterialError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    let found = found.map_err(|error| bad(part, format!("is not PEM ({error})")))?;
    if found.is_empty() {
        return Err(bad(part, "holds no PEM certificate".to_owned()));
    }
    Ok(found)
}

fn one(part: &'static str, pem: &str) -> Result<CertificateDer<'static>, MaterialError> {
    let mut found = certificates(part, pem)?;
    Ok(found.swap_remove(0))
}

fn private_key(pem: &str) -> Result<KeyPair, MaterialError> {
    const PART: &str = "ca-key.pem";
    let key = PrivateKeyDer::from_pem_slice(pem.as_bytes())
        .map_err(|error| bad(PART, format!("holds no usable private key ({error})")))?;
    KeyPair::try_from(&key).map_err(|error| bad(PART, format!("holds no usable private key ({error})")))
}

/// Whether a certificate is an authority's, of this key, at this time. Gives when it ends.
fn check_authority(
    part: &'static str,
    der: &CertificateDer<'_>,
    key: Option<&KeyPair>,
    now: OffsetDateTime,
) -> Result<OffsetDateTime, MaterialError> {
    let (_, certificate) =
        x509_parser::parse_x509_certificate(der).map_err(|error| bad(part, format!("holds no X.509 certificate ({error})")))?;
    if key.is_some_and(|key| certificate.public_key().raw != key.subject_public_key_info()) {
        return Err(bad(part, "is not the certificate of the key in ca-key.pem".to_owned()));
    }
    if !certificate.is_ca() {
        return Err(bad(part, "is not the certificate of an authority (basicConstraints CA is not set)".to_owned()));
    }
    let usage = certificate.key_usage().ok().flatten();
    if usage.is_some_and(|usage| !usage.value.key_cert_sign()) {
        return Err(bad(part, "may not sign certificates (its keyUsage lacks keyCertSign)".to_owned()));
    }
    let validity = certificate.validity();
    let (begins, expires) = (validity.not_before.to_datetime(), validity.not_after.to_datetime());
    if expires <= now {
        return Err(bad(part, format!("expired at {expires}")));
    }
    if begins > now {
        return Err(bad(part, format!("is not valid before {begins}")));
    }
    Ok(expires)
}

fn bad(part: &'static str, reason: String) -> MaterialError {
    MaterialError { part, reason }
}
