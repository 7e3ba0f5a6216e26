//! Which network namespaces there are: those in the node's directory, and those mounted anywhere else.
//!
//! Enters: inotify's word on the directory, and the mount table. Leaves: names with the inodes of their namespaces. A name appears
//! before its namespace is mounted on it (`ip netns add` makes an empty file first), so that a name may have none yet.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use futures_util::StreamExt as _;
use inotify::{EventMask, EventStream, Inotify, WatchMask};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::capture::{mounts, netns, readiness};

/// What is at a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Nothing.
    Missing,
    /// A file that is no namespace, or not yet.
    Unripe,
    /// It could not be looked at.
    Unreadable,
    /// A namespace of this inode.
    Namespace(u64),
}

/// News of the directory.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum News {
    /// Something happened to this name.
    Name(OsString),
    /// Anything may have happened.
    All,
}

/// The node's directory of namespaces, watched.
pub(in crate::capture) struct NetnsDir {
    path: PathBuf,
    inotify: EventStream<Vec<u8>>,
    watched: (u64, u64),
}

impl NetnsDir {
    /// Watches the directory, which is made if it is missing: a fresh node has none before its first pod. What it would be in has
    /// to be there, lest a mistyped path is watched for ever.
    pub(in crate::capture) fn watch(path: &Path) -> io::Result<Self> {
        make(path)?;
        let path = fs::canonicalize(path)?;
        let inotify = Inotify::init()?.into_event_stream(vec![0; 16 * 1024])?;
        let mut directory = Self { path, inotify, watched: (0, 0) };
        directory.renew()?;
        Ok(directory)
    }

    /// Watches what is at the path now: another directory may have been mounted there.
    pub(super) fn renew(&mut self) -> io::Result<()> {
        make(&self.path)?;
        let metadata = fs::metadata(&self.path)?;
        let found = (metadata.dev(), metadata.ino());
        if found != self.watched {
            let mask = WatchMask::CREATE | WatchMask::DELETE | WatchMask::MOVE | WatchMask::DELETE_SELF | WatchMask::ONLYDIR;
            self.inotify.watches().add(&self.path, mask)?;
            self.watched = found;
        }
        Ok(())
    }

    /// Waits for news.
    ///
    /// # Cancel safety
    /// No news is lost.
    pub(super) async fn next(&mut self) -> News {
        match self.inotify.next().await {
            Some(Ok(event)) => match event.name {
                Some(name) if !event.mask.contains(EventMask::Q_OVERFLOW) => News::Name(name),
                _ => News::All,
            },
            Some(Err(_)) => News::All,
            None => std::future::pending().await,
        }
    }

    /// The path of a name.
    pub(super) fn path(&self, name: &OsStr) -> PathBuf {
        self.path.join(name)
    }

    /// What is at a name.
    pub(super) fn place(&self, name: &OsStr) -> Place {
        // `O_PATH` opens without touching what is there: a FIFO would have us wait.
        let opened = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(self.path(name));
        match opened {
            Ok(file) => inode(&file).map_or(Place::Unripe, Place::Namespace),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Place::Missing,
            Err(error) => {
                tracing::warn!(%error, path = %self.path(name).display(), "cannot look at what may be a network namespace");
                Place::Unreadable
            }
        }
    }

    /// All names, with what is there.
    pub(super) fn places(&self) -> io::Result<BTreeMap<OsString, Place>> {
        let names = fs::read_dir(&self.path)?.flatten().map(|entry| entry.file_name());
        Ok(names.map(|name| (name.clone(), self.place(&name))).collect())
    }
}

fn make(directory: &Path) -> io::Result<()> {
    match fs::create_dir(directory) {
        Ok(()) => tracing::info!(dir = %directory.display(), "made the directory of network namespaces, which was missing"),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error),
    }
    Ok(())
}

fn inode(file: &File) -> Option<u64> {
    if netns::is_namespace(file).unwrap_or(false) { file.metadata().ok().map(|metadata| metadata.ino()) } else { None }
}

/// The mount table, watched.
pub(super) struct MountTable(AsyncFd<File>);

impl MountTable {
    /// Watches the calling process's mount table.
    pub(super) fn watch() -> io::Result<Self> {
        readiness::register(File::open(mounts::OWN)?, Interest::PRIORITY).map(Self)
    }

    /// Waits for a change.
    ///
    /// # Cancel safety
    /// No change is lost.
    pub(super) async fn changed(&self) -> io::Result<()> {
        self.0.ready(Interest::PRIORITY).await?.clear_ready();
        Ok(())
    }

    /// All network namespaces that are mounted, each with one place where it is.
    pub(super) fn namespaces() -> io::Result<BTreeMap<u64, PathBuf>> {
        let table = mounts::read(Path::new(mounts::OWN))?;
        Ok(table.into_iter().filter_map(|mount| Some((mount.netns_inode()?, mount.point))).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_file_in_the_directory_is_news_and_is_no_namespace() {
        let parent = tempfile::tempdir().expect("a directory");
        let mut directory = NetnsDir::watch(&parent.path().join("netns")).expect("a watch");
        fs::write(directory.path(OsStr::new("pod")), "").expect("a file");
        assert_eq!(directory.next().await, News::Name("pod".into()));
        assert_eq!(directory.place(OsStr::new("pod")), Place::Unripe);
        fs::remove_file(directory.path(OsStr::new("pod"))).expect("removed");
        assert_eq!(directory.next().await, News::Name("pod".into()));
        assert_eq!(directory.place(OsStr::new("pod")), Place::Missing);
    }

    #[tokio::test]
    async fn a_directory_is_made_where_its_parent_is_and_nowhere_else() {
        let parent = tempfile::tempdir().expect("a directory");
        let path = parent.path().join("netns");
        let mut directory = NetnsDir::watch(&path).expect("a watch");
        fs::remove_dir(&path).expect("removed");
        directory.renew().expect("made again");
        assert!(path.is_dir());
        fs::write(parent.path().join("file"), "").expect("a file");
        for (mistyped, kind) in [
            ("netsn/cni", io::ErrorKind::NotFound),
            ("file", io::ErrorKind::NotADirectory),
            ("file/netns", io::ErrorKind::NotADirectory),
        ] {
            let error = NetnsDir::watch(&parent.path().join(mistyped)).err().expect(mistyped);
            assert_eq!(error.kind(), kind, "{mistyped}");
        }
        assert!(!parent.path().join("netsn").exists());
    }

    #[tokio::test]
    async fn a_link_to_a_process_namespace_is_a_namespace() {
        let parent = tempfile::tempdir().expect("a directory");
        let directory = NetnsDir::watch(parent.path()).expect("a watch");
        std::os::unix::fs::symlink("/proc/self/ns/net", directory.path(OsStr::new("own"))).expect("a link");
        let own = netns::Netns::current().expect("the namespace").inode();
        assert_eq!(directory.place(OsStr::new("own")), Place::Namespace(own));
    }
}
