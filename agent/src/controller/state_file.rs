//! Files in the state directory: written whole or not at all, and for their owner only unless said otherwise.

use std::fs::{self, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// A file or directory of the state that cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {path}", path = path.display())]
pub struct StateFileError {
    /// What was tried.
    pub action: &'static str,
    /// On what.
    pub path: PathBuf,
    /// Why not.
    #[source]
    pub source: io::Error,
}

/// Makes `directory` and what is above it, readable by its owner only.
pub(super) fn create_private_directory(directory: &Path) -> Result<(), StateFileError> {
    let failed = |action| move |source| StateFileError { action, path: directory.to_owned(), source };
    if directory.exists() && !directory.is_dir() {
        return Err(failed("use")(io::ErrorKind::NotADirectory.into()));
    }
    if !directory.is_dir() {
        fs::create_dir_all(directory).map_err(failed("create"))?;
        fs::set_permissions(directory, Permissions::from_mode(0o700)).map_err(failed("set the permissions of"))?;
    }
    Ok(())
}

/// Writes a file so that a reader, and a restart after a crash, sees the old content or the new one, never a part.
pub(super) fn write_atomically(path: &Path, content: &[u8], mode: u32) -> Result<(), StateFileError> {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let draft = PathBuf::from(name);
    let failed = |action| {
        let path = path.to_owned();
        move |source| StateFileError { action, path, source }
    };
    if draft.exists() {
        fs::remove_file(&draft).map_err(failed("remove the unfinished draft of"))?;
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&draft).map_err(failed("write"))?;
    file.write_all(content).and_then(|()| file.sync_all()).map_err(failed("write"))?;
    file.set_permissions(Permissions::from_mode(mode)).map_err(failed("set the permissions of"))?;
    fs::rename(&draft, path).map_err(failed("put in place"))
}
