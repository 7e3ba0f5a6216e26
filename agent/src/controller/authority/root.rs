//! The root's key and certificate in the state directory.
//!
//! Enters: the directory. Leaves: the pair, read or newly made. Both files are written whole or not at all; the certificate comes
//! last, so that it never names a key that was not stored.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use time::OffsetDateTime;

use super::material::{Material, NewRoot};
use crate::controller::state_file::{self, StateFileError};

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

/// Reads the root's pair from `directory`, or makes one when neither file is there.
pub(super) fn open_or_create(directory: &Path, trust_domain: &str, now: OffsetDateTime) -> Result<Material, RootError> {
    state_file::create_private_directory(directory)?;
    let (key_path, certificate_path) = (directory.join(KEY_FILE), directory.join(CERTIFICATE_FILE));
    match (read(&key_path)?, read(&certificate_path)?) {
        (Some(key), Some(certificate)) => Material::root(&key, &certificate, CERTIFICATE_FILE, now).map_err(|error| {
            let path = if error.part == KEY_FILE { key_path } else { certificate_path };
            RootError::Damaged { path, reason: error.reason }
        }),
        (None, None) => create(&key_path, &certificate_path, trust_domain, now),
        (Some(_), None) => Err(RootError::Incomplete { present: key_path, missing: certificate_path }),
        (None, Some(_)) => Err(RootError::Incomplete { present: certificate_path, missing: key_path }),
    }
}

fn create(key_path: &Path, certificate_path: &Path, trust_domain: &str, now: OffsetDateTime) -> Result<Material, RootError> {
    let NewRoot { material, certificate, key } = Material::new_root(trust_domain, now)?;
    state_file::write_atomically(key_path, key.as_bytes(), 0o600)?;
    state_file::write_atomically(certificate_path, certificate.as_bytes(), 0o644)?;
    Ok(material)
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
