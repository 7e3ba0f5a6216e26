//! A node's first process: gives the node a host name, a root and file systems of its own, then does what the first process of a machine
//! must, and no more: it waits for the children that others have left it.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{chdir, pivot_root};

use super::node::{self, Node};
use super::runtime::Runtime;

/// What it says when the node's file systems are there.
pub(super) const READY: &str = "ready\n";
/// Where the node's own programs are below the node's cgroup, where cgroups of the second version hold the controllers: such a cgroup has
/// either processes or children with controllers.
pub(super) const CGROUP: &str = "init";

/// What kubelet sets for a whole machine. A node shows it the wanted values, so that this machine keeps its own.
const SHOWN: [(&str, &str); 6] = [
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
];

/// Becomes the node's first process.
pub(super) fn run(node: &Node<'_>) -> Result<()> {
    if std::process::id() != 1 {
        node.join_cgroups()?;
        let mut command = Command::new("unshare");
        command.args(["--mount", "--uts", "--ipc", "--pid", "--cgroup", "--fork", "--kill-child", "--"]);
        command.arg(node.cluster().own_program()).args(["cluster", "--name", &node.cluster().name, "init", &node.name()]);
        return Err(command.exec()).context("starting unshare");
    }
    let mut children = SigSet::empty();
    children.add(Signal::SIGCHLD);
    children.thread_block()?;
    make_root(node)?;
    fs::write("/proc/sys/kernel/hostname", node.name()).context("naming the host")?;
    fs::write("/proc/sys/net/ipv4/ip_forward", "1").context("forwarding")?;
    std::io::stdout().write_all(READY.as_bytes())?;
    std::io::stdout().flush()?;
    loop {
        children.wait()?;
        while !matches!(waitpid(None, Some(WaitPidFlag::WNOHANG)), Ok(WaitStatus::StillAlive) | Err(_)) {}
    }
}

/// An overlay over this machine's root, whose changes stay in the node's directory, with everything mounted on it that a machine has.
fn make_root(node: &Node<'_>) -> Result<()> {
    attach(None, Path::new("/"), None, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None)?;
    let root = node.path("root");
    for directory in ["root", "upper", "work"] {
        fs::create_dir_all(node.path(directory))?;
    }
    let (upper, work) = (node.path("upper"), node.path("work"));
    let layers = format!("lowerdir=/,upperdir={},workdir={}", upper.display(), work.display());
    attach(Some("overlay"), &root, Some("overlay"), MsFlags::empty(), Some(&layers))?;
    for (kind, point) in [("proc", "proc"), ("sysfs", "sys"), ("bpf", "sys/fs/bpf")] {
        attach(Some(kind), &root.join(point), Some(kind), MsFlags::empty(), None)?;
    }
    show_settings(node, &root)?;
    bind(Path::new("/dev"), &root.join("dev"), MsFlags::MS_REC)?;
    mount_cgroups(&root.join("sys/fs/cgroup"))?;
    attach(Some("tmpfs"), &root.join("run"), Some("tmpfs"), MsFlags::empty(), Some("mode=755"))?;
    bind(&node.path("tmp"), &root.join("tmp"), MsFlags::empty())?;
    for store in [Runtime::of(node.cluster()).store(), "kubelet"] {
        bind(&node.path(store), &root.join("var/lib").join(store), MsFlags::empty())?;
    }
    let cluster = node.cluster().dir();
    bind(&cluster, &root.join(cluster.strip_prefix("/").unwrap_or(&cluster)), MsFlags::empty())?;
    for directory in ["run/netns", "var/lib/cni", "mnt/machine"] {
        fs::create_dir_all(root.join(directory))?;
    }
    chdir(&root)?;
    pivot_root(".", "mnt/machine").context("changing the root")?;
    chdir("/")?;
    umount2("/mnt/machine", MntFlags::MNT_DETACH).context("leaving the machine's root")?;
    attach(None, Path::new("/"), None, MsFlags::MS_REC | MsFlags::MS_SHARED, None)?;
    fs::write("/etc/hostname", node.name())?;
    fs::write("/etc/hosts", format!("127.0.0.1 localhost\n{} {}\n", node.address(), node.name()))?;
    fs::write("/etc/resolv.conf", "")?;
    Ok(())
}

fn show_settings(node: &Node<'_>, root: &Path) -> Result<()> {
    let values = node.path("settings");
    fs::create_dir_all(&values)?;
    for (setting, value) in SHOWN {
        let file = values.join(setting.replace('/', "."));
        fs::write(&file, format!("{value}\n"))?;
        bind(&file, &root.join("proc/sys").join(setting), MsFlags::empty())?;
    }
    Ok(())
}

/// The node's own view of each cgroup hierarchy that this machine has, whose root is the node's cgroup.
fn mount_cgroups(place: &Path) -> Result<()> {
    let hierarchies = node::hierarchies();
    if hierarchies == [Path::new("/sys/fs/cgroup")] {
        attach(Some("cgroup2"), place, Some("cgroup2"), MsFlags::empty(), None)?;
        return delegate(place);
    }
    attach(Some("tmpfs"), place, Some("tmpfs"), MsFlags::empty(), Some("mode=755"))?;
    for hierarchy in hierarchies {
        let name = hierarchy.file_name().context("a hierarchy's name")?.to_string_lossy().into_owned();
        let point = place.join(&name);
        fs::create_dir_all(&point)?;
        let options = if name == "systemd" { "none,name=systemd" } else { &name };
        if node::hierarchy_is_unified(&hierarchy) {
            attach(Some("cgroup2"), &point, Some("cgroup2"), MsFlags::empty(), None)?;
        } else {
            attach(Some("cgroup"), &point, Some("cgroup"), MsFlags::empty(), Some(options))?;
        }
    }
    Ok(())
}

/// Moves this process out of the way, and hands all controllers down.
fn delegate(place: &Path) -> Result<()> {
    let own = place.join(CGROUP);
    fs::create_dir_all(&own)?;
    for process in fs::read_to_string(place.join("cgroup.procs"))?.lines() {
        fs::write(own.join("cgroup.procs"), process)?;
    }
    node::hand_down_controllers(place)
}

fn bind(what: &Path, point: &Path, flags: MsFlags) -> Result<()> {
    if what.is_dir() {
        fs::create_dir_all(point)?;
    } else if !point.exists() {
        File::create(point)?;
    }
    mount(Some(what), point, None::<&str>, MsFlags::MS_BIND | flags, None::<&str>)
        .with_context(|| format!("mounting {} on {}", what.display(), point.display()))
}

fn attach(what: Option<&str>, point: &Path, kind: Option<&str>, flags: MsFlags, options: Option<&str>) -> Result<()> {
    mount(what, point, kind, flags, options)
        .with_context(|| format!("mounting {} on {}", kind.unwrap_or("flags"), point.display()))
}
