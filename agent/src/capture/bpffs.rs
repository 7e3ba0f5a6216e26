//! The directory in bpffs where programs' links and maps are pinned.
//!
//! Enters: the operator's choice of directory. Leaves: a path on a bpffs that outlives the agent. An agent in a mount
//! namespace of its own (`ip netns exec` makes one) must not pin there: the pins would go with it, and its pods would be open.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

use super::{cgroup, netns};

const BPF_FS_MAGIC: u64 = 0xcafe_4a11;
/// Where the kernel keeps a place for bpffs.
const USUAL: &str = "/sys/fs/bpf";
const INIT_MOUNT_NAMESPACE: &str = "/proc/1/ns/mnt";
const OWN_MOUNT_NAMESPACE: &str = "/proc/self/ns/mnt";

/// Finds or makes `directory` on a bpffs, and gives the path by which this process reaches it.
///
/// # Errors
/// When bpffs can be neither found nor mounted.
pub(super) fn prepare(directory: &Path) -> io::Result<PathBuf> {
    if let Some(found) = find(directory) {
        fs::create_dir_all(&found)?;
        return Ok(found);
    }
    let point = if directory.starts_with(USUAL) { Path::new(USUAL) } else { directory };
    match File::open(INIT_MOUNT_NAMESPACE) {
        Ok(namespace) if !same_file(INIT_MOUNT_NAMESPACE, OWN_MOUNT_NAMESPACE) => mount_inside(namespace, point.to_owned())?,
        _ => mount_here(point)?,
    }
    let found = find(directory).ok_or_else(|| io::Error::other("bpffs was mounted, but is not to be seen"))?;
    fs::create_dir_all(&found)?;
    Ok(found)
}

/// The path to `directory` if it is, or would be made, on a bpffs.
pub(super) fn find(directory: &Path) -> Option<PathBuf> {
    [directory.to_owned(), cgroup::in_init(directory)].into_iter().find(|path| on_bpffs(path))
}

fn on_bpffs(path: &Path) -> bool {
    let there = path.ancestors().find_map(|ancestor| File::open(ancestor).ok());
    there.is_some_and(|file| netns::file_system(&file).is_ok_and(|magic| magic == BPF_FS_MAGIC))
}

fn same_file(one: &str, other: &str) -> bool {
    let inode = |path| fs::metadata(path).map(|metadata| metadata.ino());
    matches!((inode(one), inode(other)), (Ok(one), Ok(other)) if one == other)
}

fn mount_here(point: &Path) -> io::Result<()> {
    fs::create_dir_all(point)?;
    mount(Some("bpf"), point, Some("bpf"), MsFlags::empty(), Some("mode=0700"))?;
    Ok(())
}

/// Mounts in another mount namespace, from a thread that ends there.
fn mount_inside(namespace: File, point: PathBuf) -> io::Result<()> {
    let there = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_FS)?;
        setns(namespace, CloneFlags::CLONE_NEWNS)?;
        mount_here(&point)
    });
    there.join().unwrap_or_else(|_panic| Err(io::Error::other("the thread that mounts bpffs ended early")))
}
