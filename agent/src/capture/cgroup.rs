//! The cgroup v2 directory below which the connect programs see every process.
//!
//! Enters: the operator's choice, if any, and the mount table. Leaves: an open directory. On a machine with both versions of
//! cgroups the v2 tree is beside the others; the programs only need its directories, not its controllers. Where the kubelet keeps
//! pods below a directory of their own, that is it: what is elsewhere on the node is then none of the agent's business, and what is
//! there may stay refused when the agent is gone.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::{mounts, netns};

const CGROUP2_MAGIC: u64 = 0x6367_7270;
/// The first process's view of the file system: an agent in a mount namespace of its own may lack the mount.
const INIT_ROOT: &str = "/proc/1/root";
const INIT_MOUNTS: &str = "/proc/1/mountinfo";
/// Where a kubelet keeps pods: with systemd's cgroups or its own, below the root or, in nodes that are containers, below the kubelet's.
const PODS: [&str; 4] = ["kubepods.slice", "kubepods", "kubelet.slice/kubelet-kubepods.slice", "kubelet/kubepods"];

/// Why there is no directory to attach to.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The directory cannot be opened.
    #[error("cgroup root {}: {source}; give a cgroup v2 directory with --cgroup-root", path.display())]
    Open {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The directory is on another file system.
    #[error("cgroup root {} is not on cgroup v2; mount it (mount -t cgroup2 none DIR) and give that with --cgroup-root", path.display())]
    NotCgroup2 {
        /// The directory.
        path: PathBuf,
    },
    /// No mount of cgroup v2 is in sight.
    #[error("cgroup v2 is not mounted; mount it (mount -t cgroup2 none DIR) and give the directory with --cgroup-root")]
    NotMounted,
    /// The agent could not be moved below the root.
    #[error("moving the agent to the cgroup {}: {source}", path.display())]
    Move {
        /// The cgroup.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A cgroup v2 directory.
#[derive(Debug)]
pub(super) struct CgroupRoot {
    pub(super) directory: File,
    /// Only pods are below it, by the operator's word or by its name: what has not been seen is refused for ever.
    pub(super) dedicated: bool,
    /// The node's whole tree, if it is a kubelet that keeps pods below this directory.
    pub(super) node: Option<NodeRoot>,
    path: PathBuf,
}

/// The root of a node's cgroup v2 tree, of which pods have a part.
#[derive(Debug)]
pub(super) struct NodeRoot {
    pub(super) directory: File,
    /// The number of the pods' part, as programs are told it.
    pub(super) pods: u64,
}

impl CgroupRoot {
    /// Opens the operator's choice, or else the pods' part of the v2 tree, or else its root.
    pub(super) fn open(chosen: Option<&Path>) -> Result<Self, CgroupError> {
        let (path, dedicated) = match chosen {
            Some(path) => (path.to_owned(), true),
            None => {
                let root = find().ok_or(CgroupError::NotMounted)?;
                pods_below(&root).map_or((root, false), |pods| (pods, true))
            }
        };
        let open = |path: &Path| File::open(path).map_err(|source| CgroupError::Open { path: path.to_owned(), source });
        let (directory, path) = match open(&path) {
            Ok(directory) if is_cgroup2(&directory) => (directory, path),
            refused => {
                let seen_by_init = in_init(&path);
                match open(&seen_by_init) {
                    Ok(directory) if is_cgroup2(&directory) => (directory, seen_by_init),
                    _ => return Err(refused.err().unwrap_or(CgroupError::NotCgroup2 { path })),
                }
            }
        };
        let node = NodeRoot::above(&path, &directory)?;
        Ok(Self { directory, dedicated, node, path })
    }

    /// Where it was found.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Moves this process to the cgroup `name` right below the root, which is made if need be.
    pub(super) fn adopt_self(&self, name: &str) -> Result<(), CgroupError> {
        let path = self.path.join(name);
        let adopt = || {
            match fs::create_dir(&path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
            fs::write(path.join("cgroup.procs"), "0")
        };
        adopt().map_err(|source| CgroupError::Move { path: path.clone(), source })
    }
}

impl NodeRoot {
    /// The root above a part of the tree that a kubelet keeps pods in. None: it is no such part.
    fn above(pods: &Path, directory: &File) -> Result<Option<Self>, CgroupError> {
        let Some(path) = PODS.iter().find_map(|part| without(pods, Path::new(part))) else { return Ok(None) };
        let open = || Ok(Self { directory: File::open(path)?, pods: directory.metadata()?.ino() });
        open().map(Some).map_err(|source| CgroupError::Open { path: path.to_owned(), source })
    }
}

/// What is left of a path whose end is cut off.
fn without<'a>(path: &'a Path, end: &Path) -> Option<&'a Path> {
    path.ends_with(end).then(|| path.ancestors().nth(end.components().count())).flatten()
}

/// `path` as the first process sees it.
pub(super) fn in_init(path: &Path) -> PathBuf {
    Path::new(INIT_ROOT).join(path.strip_prefix("/").unwrap_or(path))
}

fn is_cgroup2(directory: &File) -> bool {
    netns::file_system(directory).is_ok_and(|magic| magic == CGROUP2_MAGIC)
}

fn find() -> Option<PathBuf> {
    let own = mounts::read(Path::new(mounts::OWN)).ok().and_then(|table| choose(&table));
    own.or_else(|| mounts::read(Path::new(INIT_MOUNTS)).ok().and_then(|table| choose(&table)).map(|path| in_init(&path)))
}

/// The part of the tree that a kubelet keeps pods in.
fn pods_below(root: &Path) -> Option<PathBuf> {
    PODS.iter().map(|part| root.join(part)).find(|part| part.is_dir())
}

/// The mount of the whole tree if there is one, or else of the least deep part.
fn choose(table: &[mounts::Mount]) -> Option<PathBuf> {
    let trees = table.iter().filter(|mount| mount.kind == "cgroup2");
    trees.min_by_key(|mount| mount.root.len()).map(|mount| mount.point.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_of_the_whole_tree_is_chosen() {
        let mount =
            |root: &str, point: &str, kind: &str| mounts::Mount { root: root.into(), point: point.into(), kind: kind.into() };
        let table = [
            mount("/", "/sys/fs/cgroup/cpu", "cgroup"),
            mount("/kubepods", "/x", "cgroup2"),
            mount("/", "/sys/fs/cgroup/unified", "cgroup2"),
        ];
        assert_eq!(choose(&table), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        assert_eq!(choose(&table[..1]), None);
    }

    #[test]
    fn the_kubelets_part_of_the_tree_is_found_in_all_its_places() {
        for part in PODS {
            let root = tempfile::tempdir().expect("a directory");
            assert_eq!(pods_below(root.path()), None);
            fs::create_dir_all(root.path().join(part)).expect("a directory");
            assert_eq!(pods_below(root.path()), Some(root.path().join(part)));
        }
    }

    #[test]
    fn the_root_is_what_is_above_the_kubelets_part() {
        let above = |pods: &str| PODS.iter().find_map(|part| without(Path::new(pods), Path::new(part))).map(PathBuf::from);
        assert_eq!(above("/sys/fs/cgroup/kubepods.slice"), Some("/sys/fs/cgroup".into()));
        assert_eq!(above("/sys/fs/cgroup/unified/kubepods"), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(above("/x/kubelet.slice/kubelet-kubepods.slice"), Some("/x".into()));
        assert_eq!(above("/sys/fs/cgroup"), None);
        assert_eq!(above("/sys/fs/cgroup/my-kubepods"), None);
    }

    #[test]
    fn a_directory_on_another_file_system_is_refused() {
        let directory = tempfile::tempdir().expect("a directory");
        assert!(matches!(CgroupRoot::open(Some(directory.path())), Err(CgroupError::NotCgroup2 { .. })));
        assert!(matches!(CgroupRoot::open(Some(Path::new("/no/such/place"))), Err(CgroupError::Open { .. })));
    }
}
