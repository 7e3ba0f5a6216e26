//! The directory tree: which files there are, and which of them must be read again.
//!
//! Enters: inotify events, and the tree itself. Leaves: files handed to the [`Ledger`]. A file that someone has open for writing is
//! left alone until it is closed, or has rested for [`WRITING`]. Names that begin with a dot are passed over: editors' and
//! atomic writers' drafts, and the versions behind a mounted `ConfigMap`'s links.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use inotify::{Event, EventMask, WatchDescriptor, WatchMask, Watches};
use tracing::{info, warn};

use super::ledger::Ledger;
use super::parse::{MAX_FILE, parse};
use crate::policy::compile::MeshContext;

/// How long a file that stays open for writing must rest before it is read all the same.
const WRITING: Duration = Duration::from_secs(1);
/// A file changed this recently may change again without a new time stamp.
const STAMP_RESOLUTION: Duration = Duration::from_millis(50);
/// Directories deeper than this are not read.
const MAX_DEPTH: usize = 32;

/// The manifests directory as it was last seen.
pub(super) struct Tree {
    root: PathBuf,
    mesh: MeshContext,
    watches: Watches,
    watched: HashMap<WatchDescriptor, BTreeSet<PathBuf>>,
    root_identity: Option<(u64, u64)>,
    files: BTreeMap<PathBuf, Option<Stamp>>,
    writing: HashMap<PathBuf, Instant>,
    stale: BTreeSet<PathBuf>,
    rescan: bool,
    unwatched: bool,
    pub(super) ledger: Ledger,
}

/// What changes when a file's content does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    inode: (u64, u64),
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Tree {
    pub(super) fn new(root: PathBuf, mesh: MeshContext, watches: Watches) -> Self {
        Self {
            root,
            mesh,
            watches,
            watched: HashMap::new(),
            root_identity: None,
            files: BTreeMap::new(),
            writing: HashMap::new(),
            stale: BTreeSet::new(),
            rescan: true,
            unwatched: false,
            ledger: Ledger::default(),
        }
    }

    /// Whether [`Tree::settle`] has anything to do.
    pub(super) fn is_stale(&self) -> bool {
        self.rescan || !self.stale.is_empty()
    }

    /// Whether the directory is there.
    pub(super) fn exists(&self) -> bool {
        self.root_identity.is_some()
    }

    /// Takes note of an event.
    pub(super) fn note<S: AsRef<Path>>(&mut self, event: &Event<S>) {
        let reshaped = EventMask::Q_OVERFLOW | EventMask::IGNORED | EventMask::DELETE_SELF | EventMask::MOVE_SELF;
        if event.mask.intersects(reshaped) {
            if event.mask.contains(EventMask::IGNORED) {
                self.watched.remove(&event.wd);
            }
            self.rescan = true;
            return;
        }
        let paths: Vec<_> = self.watched.get(&event.wd).into_iter().flatten().cloned().collect();
        for path in paths {
            match &event.name {
                Some(name) => self.note_entry(&path, name.as_ref(), event.mask),
                None => self.note_file(path, event.mask),
            }
        }
    }

    fn note_entry(&mut self, directory: &Path, name: &Path, mask: EventMask) {
        let moved = EventMask::CREATE | EventMask::MOVED_TO | EventMask::MOVED_FROM | EventMask::DELETE;
        let text = name.to_string_lossy();
        if text.starts_with("..") || (mask.contains(EventMask::ISDIR) && !text.starts_with('.')) {
            self.rescan |= mask.intersects(moved);
        } else if !text.starts_with('.') {
            let path = directory.join(name);
            if is_manifest(&path) {
                self.note_file(path, mask);
            } else if mask.intersects(moved) {
                // A link to a directory is no directory to inotify; nor is one that is gone to anyone.
                let linked = fs::symlink_metadata(&path).is_ok_and(|found| found.is_symlink());
                self.rescan |= linked || self.watched.values().flatten().any(|watched| *watched == path);
            }
        }
    }

    fn note_file(&mut self, path: PathBuf, mask: EventMask) {
        if mask.intersects(
            EventMask::CLOSE_WRITE | EventMask::MOVED_TO | EventMask::MOVED_FROM | EventMask::DELETE | EventMask::ATTRIB,
        ) {
            if !mask.contains(EventMask::ATTRIB) {
                self.writing.remove(&path);
            }
            // What a link points to needs a watch of its own.
            self.rescan |= fs::symlink_metadata(&path).is_ok_and(|found| found.is_symlink());
            self.stale.insert(path);
        } else if mask.contains(EventMask::CREATE) {
            match fs::symlink_metadata(&path) {
                Ok(found) if found.is_symlink() || found.nlink() > 1 => self.rescan = true,
                Ok(_) => drop(self.writing.insert(path, Instant::now())),
                Err(_) => drop(self.stale.insert(path)),
            }
        } else if mask.contains(EventMask::MODIFY) {
            self.writing.insert(path, Instant::now());
        }
    }

    /// Finds out whether the directory came, went or was replaced, which no event tells.
    pub(super) fn look_for_directory(&mut self) {
        let identity = fs::metadata(&self.root).ok().map(|found| (found.dev(), found.ino()));
        self.rescan |= identity != self.root_identity || self.unwatched;
    }

    /// Finds all that no event tells: also a writer that never closes, and a tree that cannot be watched.
    pub(super) fn look_around(&mut self) {
        self.look_for_directory();
        let now = Instant::now();
        let rested: Vec<_> = self
            .writing
            .iter()
            .filter(|(_, since)| now.duration_since(**since) >= WRITING)
            .map(|(path, _)| path.clone())
            .collect();
        for path in rested {
            self.writing.remove(&path);
            self.stale.insert(path);
        }
    }

    /// Reads all that is stale.
    pub(super) fn settle(&mut self) {
        if std::mem::take(&mut self.rescan) {
            self.scan();
        }
        for path in std::mem::take(&mut self.stale) {
            if !self.writing.contains_key(&path) {
                self.read(&path);
            }
        }
    }

    fn scan(&mut self) {
        let Ok(root) = fs::metadata(&self.root) else {
            if self.root_identity.take().is_some() {
                warn!("{} is gone: what it held stays in force until it is back", self.root.display());
            } else {
                info!("{} does not exist yet: waiting for it", self.root.display());
            }
            return;
        };
        self.root_identity = Some((root.dev(), root.ino()));
        let mut walk = Walk::default();
        self.unwatched = false;
        let known: HashMap<_, _> = std::mem::take(&mut self.watched);
        self.walk(&self.root.clone(), &root, 0, &mut walk);
        for (descriptor, _) in known {
            if !self.watched.contains_key(&descriptor) {
                // The kernel has dropped it already if the directory is gone.
                drop(self.watches.remove(descriptor));
            }
        }
        let gone: Vec<_> = self.files.keys().filter(|path| !walk.files.contains_key(*path)).cloned().collect();
        self.stale.extend(gone);
        for (path, stamp) in walk.files {
            let current = self.files.get(&path).is_some_and(|known| *known == Some(stamp));
            if !current {
                self.stale.insert(path);
            }
        }
    }

    /// Watches and lists one directory: watched first, so that nothing falls between. In order of names, so that of several ways to a
    /// directory it is always the same that counts.
    fn walk(&mut self, directory: &Path, metadata: &Metadata, depth: usize, walk: &mut Walk) {
        if !walk.directories.insert((metadata.dev(), metadata.ino())) {
            return;
        }
        if depth > MAX_DEPTH {
            return warn!("{} is {MAX_DEPTH} directories deep: what is in it is not read", directory.display());
        }
        self.watch(directory, WatchMask::ONLYDIR);
        match fs::read_dir(directory) {
            Ok(entries) => {
                let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
                paths.sort_unstable();
                for path in paths {
                    self.walk_entry(path, depth, walk);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => warn!("cannot list {}: {error}", directory.display()),
        }
    }

    fn walk_entry(&mut self, path: PathBuf, depth: usize, walk: &mut Walk) {
        if path.file_name().is_none_or(|name| name.to_string_lossy().starts_with('.')) {
            return;
        }
        let Ok(metadata) = fs::metadata(&path) else { return };
        if metadata.is_dir() {
            self.walk(&path, &metadata, depth + 1, walk);
        } else if metadata.is_file() && is_manifest(&path) {
            if fs::symlink_metadata(&path).is_ok_and(|found| found.is_symlink()) {
                self.watch(&path, WatchMask::empty());
            }
            walk.files.insert(path, Stamp::of(&metadata));
        }
    }

    fn watch(&mut self, path: &Path, kind: WatchMask) {
        let changes = WatchMask::CREATE | WatchMask::CLOSE_WRITE | WatchMask::MODIFY | WatchMask::MOVE | WatchMask::DELETE;
        let mask = changes | WatchMask::DELETE_SELF | WatchMask::MOVE_SELF | WatchMask::ATTRIB | kind;
        match self.watches.add(path, mask) {
            Ok(descriptor) => drop(self.watched.entry(descriptor).or_default().insert(path.to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.rescan = true,
            Err(error) => {
                self.unwatched = true;
                warn!(
                    "cannot watch {}: {error}; it is looked at every second instead (is fs.inotify.max_user_watches too low?)",
                    path.display()
                );
            }
        }
    }

    fn read(&mut self, path: &Path) {
        let (content, stamp) = match read_file(path) {
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.files.remove(path);
                return self.ledger.file_gone(path);
            }
            Err(error) => {
                self.files.insert(path.to_owned(), None);
                return self.ledger.file_bad(path, None, &format_args!("cannot be read: {error}"));
            }
        };
        self.files.insert(path.to_owned(), stamp);
        let mut digest = [0; 32];
        digest.copy_from_slice(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &content).as_ref());
        if !self.ledger.is_current(path, &digest) {
            self.ledger.file_read(path, digest, parse(path, &content, &self.mesh));
        }
    }
}

/// What one walk over the tree has found.
#[derive(Default)]
struct Walk {
    files: BTreeMap<PathBuf, Stamp>,
    /// The directories that were listed: another way to one of them leads to nothing new, or in a circle.
    directories: HashSet<(u64, u64)>,
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            inode: (metadata.dev(), metadata.ino()),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

fn is_manifest(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml" || extension == "json")
}

/// A file's content, and the stamp to know it by; no stamp when the file changed too recently to rely on one.
fn read_file(path: &Path) -> io::Result<(Vec<u8>, Option<Stamp>)> {
    // Without O_NONBLOCK a named pipe in the directory would hold the reader for ever.
    let mut file: File = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::new(io::ErrorKind::NotFound, "it is not a regular file"));
    }
    if metadata.size() > MAX_FILE {
        let problem = format!("it has {} bytes, more than the {MAX_FILE} that are read: split it", metadata.size());
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, problem));
    }
    let mut content = Vec::new();
    file.by_ref().take(MAX_FILE).read_to_end(&mut content)?;
    let (seconds, nanos) = (u64::try_from(metadata.ctime()).unwrap_or(0), u32::try_from(metadata.ctime_nsec()).unwrap_or(0));
    let changed = SystemTime::UNIX_EPOCH + Duration::new(seconds, nanos);
    let settled = SystemTime::now().duration_since(changed).is_ok_and(|age| age > STAMP_RESOLUTION);
    Ok((content, settled.then(|| Stamp::of(&metadata))))
}
