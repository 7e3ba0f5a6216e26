//! The root's key and certificate in the state directory.
//!
//! Enters: the directory. Leaves: the pair, read or newly made. Both files are written whole or not at all; the certificate comes
//! last, so that it never names a key that was not stored.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use time::OffsetDateTime;

use crate::controller::state_file::{self, StateFileError};

/// The root's life: ten years of 365.25 days.
const LIFETIME: time::Duration = time::Duration::hours(87_660);
const KEY_FILE: &str = "ca-key.pem";
const CERTIFICATE_FILE: &str = "root-cert.pem";

/// Why there is no root to sign with.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// A file or directory cannot be read or written.
    #[error(transparent)]
    File(#[from] StateFileError),
    /// One file of the pair is there, the other is not.
    #[error(
        "{missing} is missing beside {present}: restore it from a backup, or remove {present} as well to start with a new root \
         (every agent must then get the new root-cert.pem)",
        missing = missing.display(),
        present = present.display()
    )]
    Incomplete {
        /// The file that is there.
        present: PathBuf,
        /// The file that is not.
        missing: PathBuf,
    },
    /// A file does not hold what it should.
    #[error(
        "{path} {reason}: restore it from a backup, or remove both {KEY_FILE} and {CERTIFICATE_FILE} to start with a new root \
         (every agent must then get the new root-cert.pem)",
        path = path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A new root could not be made.
    #[error("cannot make a new root certificate")]
    Create(#[from] rcgen::Error),
}

/// The root, ready to sign.
pub(super) struct Root {
    pub(super) issuer: Issuer<'static, KeyPair>,
    pub(super) der: CertificateDer<'static>,
    pub(super) pem: String,
    pub(super) expires: OffsetDateTime,
}

/// Reads the root's pair from `directory`, or makes one when neither file is there.
pub(super) fn open_or_create(directory: &Path, trust_domain: &str, now: OffsetDateTime) -> Result<Root, RootError> {
    state_file::create_private_directory(directory)?;
    let (key_path, certificate_path) = (directory.join(KEY_FILE), directory.join(CERTIFICATE_FILE));
    match (read(&key_path)?, read(&certificate_path)?) {
        (Some(key), Some(certificate)) => parse(&key_path, &key, &certificate_path, certificate, now),
        (None, None) => create(&key_path, &certificate_path, trust_domain, now),
        (Some(_), None) => Err(RootError::Incomplete { present: key_path, missing: certificate_path }),
        (None, Some(_)) => Err(RootError::Incomplete { present: certificate_path, missing: key_path }),
    }
}

fn create(key_path: &Path, certificate_path: &Path, trust_domain: &str, now: OffsetDateTime) -> Result<Root, RootError> {
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, trust_domain);
    params.distinguished_name.push(DnType::CommonName, "Culvert root");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = now - time::Duration::minutes(5);
    params.not_after = now + LIFETIME;
    let certificate = params.self_signed(&key)?;
    state_file::write_atomically(key_path, key.serialize_pem().as_bytes(), 0o600)?;
    state_file::write_atomically(certificate_path, certificate.pem().as_bytes(), 0o644)?;
    let expires = params.not_after;
    Ok(Root { der: certificate.der().clone(), pem: certificate.pem(), expires, issuer: Issuer::new(params, key) })
}

fn parse(key_path: &Path, key: &str, path: &Path, pem: String, now: OffsetDateTime) -> Result<Root, RootError> {
    let damaged = |path: &Path, reason: String| RootError::Damaged { path: path.to_owned(), reason };
    let key = KeyPair::from_pem(key).map_err(|error| damaged(key_path, format!("holds no usable private key ({error})")))?;
    let der = CertificateDer::from_pem_slice(pem.as_bytes())
        .map_err(|error| damaged(path, format!("holds no PEM certificate ({error})")))?;
    let (_, certificate) = x509_parser::parse_x509_certificate(&der)
        .map_err(|error| damaged(path, format!("holds no X.509 certificate ({error})")))?;
    if certificate.public_key().raw != key.subject_public_key_info() {
        return Err(damaged(path, format!("is not the certificate of the key in {}", key_path.display())));
    }
    if !certificate.is_ca() {
        return Err(damaged(path, "is not the certificate of an authority (basicConstraints CA is not set)".to_owned()));
    }
    let expires = certificate.validity().not_after.to_datetime();
    if expires <= now {
        return Err(damaged(path, format!("expired at {expires}")));
    }
    let issuer = Issuer::from_ca_cert_der(&der, key).map_err(|error| damaged(path, format!("cannot sign ({error})")))?;
    Ok(Root { issuer, der: der.clone(), pem, expires })
}

fn read(path: &Path) -> Result<Option<String>, RootError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            Err(RootError::Damaged { path: path.to_owned(), reason: "is not text".to_owned() })
        }
        Err(source) => Err(StateFileError { action: "read", path: path.to_owned(), source }.into()),
    }
}
