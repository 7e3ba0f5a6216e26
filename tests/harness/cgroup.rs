//! A cgroup of this process's own: the agents under test attach to it, so that they see what this process starts, and nothing else of
//! the machine's; nor does another run beside it see them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

const PREFIX: &str = "culvert-test-";

/// The cgroup v2 directory that this process is in, and what it starts from now on.
///
/// # Panics
/// When it cannot be made: root and a mount of cgroup v2 are needed.
pub fn own() -> &'static Path {
    static OWN: LazyLock<PathBuf> = LazyLock::new(|| {
        let root = root().expect("cgroup v2 is mounted");
        remove_left(&root);
        let own = root.join(format!("{PREFIX}{}", std::process::id()));
        fs::create_dir_all(&own).expect("root may make a cgroup");
        fs::write(own.join("cgroup.procs"), "0").expect("root may enter a cgroup");
        own
    });
    &OWN
}

/// A directory below [`own`] by the name that a kubelet gives to the one of all pods. The agents' own cgroups are made there; nothing else is.
///
/// # Panics
/// As [`own`].
#[must_use]
pub fn pods() -> PathBuf {
    let pods = own().join("kubepods");
    fs::create_dir_all(&pods).expect("root may make a cgroup");
    pods
}

/// Makes a cgroup below [`own`] that single threads of this process can [enter](enter_with_thread), too.
///
/// # Panics
/// As [`own`].
#[must_use]
pub fn threaded(name: &str) -> PathBuf {
    let cgroup = own().join(name);
    fs::create_dir_all(&cgroup).expect("root may make a cgroup");
    fs::write(cgroup.join("cgroup.type"), "threaded").expect("no cgroup beside it has a process and is of another type");
    cgroup
}

/// Moves the calling thread to a [`threaded`] cgroup: the sockets that it makes from now on are the cgroup's.
///
/// # Panics
/// When it is none of this process's.
pub fn enter_with_thread(cgroup: &Path) {
    fs::write(cgroup.join("cgroup.threads"), "0").expect("a threaded cgroup of this process's");
}

/// A program that is to run in a cgroup. The process that is started becomes it.
#[must_use]
pub fn command(cgroup: &Path, program: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", "echo 0 > \"$0/cgroup.procs\" && exec \"$@\""]).arg(cgroup).arg(program);
    command
}

/// Where the whole tree is mounted.
fn root() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let trees = mounts.lines().filter_map(|line| {
        let (place, kind) = line.split_once(" - ")?;
        let mut fields = place.split(' ').skip(3);
        let (part, point) = (fields.next()?, fields.next()?);
        kind.starts_with("cgroup2 ").then(|| (part.len(), PathBuf::from(point)))
    });
    trees.min_by_key(|(depth, _)| *depth).map(|(_, point)| point)
}

/// Removes what ended processes have left: none can leave the cgroup that it is in, and one with processes stays.
fn remove_left(root: &Path) {
    // A test cluster's nodes have names that begin so, too.
    let of_tests = |path: &PathBuf| {
        let process = path.file_name().and_then(|name| name.to_str()?.strip_prefix(PREFIX)?.parse::<u32>().ok());
        process.is_some()
    };
    directories(root).filter(of_tests).for_each(|cgroup| remove(&cgroup));
}

/// Removes a cgroup with all below it, as far as it has no processes.
pub(crate) fn remove(cgroup: &Path) {
    directories(cgroup).for_each(|part| remove(&part));
    let _in_use = fs::remove_dir(cgroup);
}

fn directories(path: &Path) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path()).filter(|path| path.is_dir())
}
