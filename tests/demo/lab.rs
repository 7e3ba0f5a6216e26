//! What is made for the demo, and how all of it goes away: namespaces, addresses, processes, files. Removal goes by names alone, so it
//! also removes what a run left that was killed.

use std::fs::{self, File};
use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::netns::{self, ip};

/// Before the name of each network namespace.
const PREFIX: &str = "culvert-demo-";
/// Everything in files.
const DIRECTORY: &str = "/run/culvert-demo";
/// Held while the demo runs.
const LOCK: &str = "/run/culvert-demo.lock";
/// How long programs may take to end before they are killed.
const PATIENCE: Duration = Duration::from_secs(5);

/// Joins the nodes, and leads out of the cluster.
pub(crate) const FABRIC: &str = "fabric";
/// The way out of the cluster, from all nodes and pods.
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 77, 255, 254);
/// A server outside the cluster (RFC 5737).
pub(crate) const OUTSIDE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 10);

/// A node.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) name: &'static str,
    pub(crate) address: Ipv4Addr,
    /// The range of its pods.
    pub(crate) pods: &'static str,
}

/// A pod.
#[derive(Debug)]
pub(crate) struct Pod {
    pub(crate) name: &'static str,
    pub(crate) namespace: &'static str,
    pub(crate) account: &'static str,
    pub(crate) node: &'static str,
    pub(crate) address: Ipv4Addr,
    pub(crate) in_mesh: bool,
}

impl Pod {
    /// The identity that its certificate is to carry.
    pub(crate) fn spiffe_id(&self) -> String {
        format!("spiffe://cluster.local/ns/{}/sa/{}", self.namespace, self.account)
    }
}

pub(crate) const NODE_A: Node = Node { name: "demo-a", address: Ipv4Addr::new(10, 77, 0, 1), pods: "10.77.1.0/24" };
pub(crate) const NODE_B: Node = Node { name: "demo-b", address: Ipv4Addr::new(10, 77, 0, 2), pods: "10.77.2.0/24" };

pub(crate) const CART: Pod = pod("cart", "shop", NODE_A.name, [10, 77, 1, 11], true);
pub(crate) const BATCH: Pod = pod("batch", "jobs", NODE_A.name, [10, 77, 1, 12], true);
pub(crate) const LEGACY: Pod = pod("legacy", "old", NODE_A.name, [10, 77, 1, 13], false);
pub(crate) const WEB: Pod = pod("web", "shop", NODE_B.name, [10, 77, 2, 21], true);
pub(crate) const NODES: [&Node; 2] = [&NODE_A, &NODE_B];
pub(crate) const PODS: [&Pod; 4] = [&CART, &BATCH, &LEGACY, &WEB];

const fn pod(name: &'static str, namespace: &'static str, node: &'static str, address: [u8; 4], in_mesh: bool) -> Pod {
    let [a, b, c, d] = address;
    Pod { name, namespace, account: name, node, address: Ipv4Addr::new(a, b, c, d), in_mesh }
}

/// The name of a namespace for `ip netns`.
pub(crate) fn namespace(name: &str) -> String {
    format!("{PREFIX}{name}")
}

/// The demo's place on this machine. One at a time.
#[derive(Clone, Debug)]
pub(crate) struct Lab {
    state: Arc<Mutex<State>>,
    /// Nothing may be made any more.
    ending: Arc<AtomicBool>,
}

#[derive(Debug)]
struct State {
    /// Who started them waits for them; what an earlier run left has no such parent.
    children: Vec<Child>,
    _lock: Flock<File>,
}

impl Lab {
    /// Takes the place, if no other demo runs.
    pub(crate) fn claim() -> Result<Self> {
        let file = File::create(LOCK).with_context(|| format!("opening {LOCK}"))?;
        let Ok(lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else {
            bail!("another demo is running on this machine ({LOCK} is locked)");
        };
        let state = State { children: Vec::new(), _lock: lock };
        Ok(Self { state: Arc::new(Mutex::new(state)), ending: Arc::default() })
    }

    /// A directory, or a file's name, of the demo's own.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        Path::new(DIRECTORY).join(name)
    }

    /// Where a node's runtime would keep its pods' namespaces.
    pub(crate) fn netns_dir(&self, node: &Node) -> PathBuf {
        self.path(node.name).join("netns")
    }

    /// Makes nodes and pods, and joins them.
    pub(crate) fn build(&self) -> Result<()> {
        let _state = self.enter()?;
        for directory in ["manifests", "state", "logs"] {
            fs::create_dir_all(self.path(directory)).with_context(|| format!("making {DIRECTORY}/{directory}"))?;
        }
        make_bridge(FABRIC, GATEWAY)?;
        ip(&format!("-n {} addr add {OUTSIDE}/32 dev lo", namespace(FABRIC)))?;
        for node in NODES {
            make_bridge(node.name, node.address)?;
            join(FABRIC, node.name, &format!("to-{}", node.name), "uplink")?;
            ip(&format!("-n {} link set uplink master bridge", namespace(node.name)))?;
            fs::create_dir_all(self.netns_dir(node))?;
        }
        for pod in PODS {
            let name = namespace(pod.name);
            ip(&format!("netns add {name}"))?;
            ip(&format!("-n {name} link set lo up"))?;
            join(pod.node, pod.name, &format!("to-{}", pod.name), "eth0")?;
            ip(&format!("-n {name} addr add {}/16 dev eth0", pod.address))?;
            ip(&format!("-n {name} route add default via {GATEWAY}"))?;
            self.show_to_node(pod)?;
        }
        Ok(())
    }

    /// Puts the pod's namespace where its node's agent looks for it.
    fn show_to_node(&self, pod: &Pod) -> Result<()> {
        let seen = self.path(pod.node).join("netns").join(pod.name);
        File::create(&seen)?;
        let source = netns::path(&namespace(pod.name));
        nix::mount::mount(Some(&source), &seen, None::<&str>, nix::mount::MsFlags::MS_BIND, None::<&str>)
            .with_context(|| format!("mounting {}", seen.display()))
    }

    /// Starts a program that runs until the end; what it says goes to a file, whose path this gives.
    pub(crate) fn start(&self, log: &str, mut command: Command) -> Result<PathBuf> {
        use std::os::unix::process::CommandExt as _;
        let mut state = self.enter()?;
        let path = self.path("logs").join(log);
        let file = File::create(&path).with_context(|| format!("making {}", path.display()))?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file).process_group(0);
        let child = command.spawn().with_context(|| format!("starting {command:?}"))?;
        state.children.push(child);
        Ok(path)
    }

    /// The state, for somebody who makes something.
    fn enter(&self) -> Result<MutexGuard<'_, State>> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if self.ending.load(Ordering::SeqCst) {
            bail!("the demo is being removed");
        }
        Ok(state)
    }

    /// The end of each program's log.
    pub(crate) fn last_words(&self) -> String {
        let mut words = String::new();
        for entry in fs::read_dir(self.path("logs")).into_iter().flatten().flatten() {
            let log = fs::read_to_string(entry.path()).unwrap_or_default();
            let lines: Vec<&str> = log.lines().rev().take(8).collect();
            words += &format!("--- {}\n", entry.path().display());
            words.extend(lines.into_iter().rev().map(|line| format!("{line}\n")));
        }
        words
    }

    /// Removes everything when it is dropped, as when a step panics.
    pub(crate) fn cleanup(&self) -> Cleanup {
        Cleanup(self.clone())
    }

    /// Removes everything, and lets nothing be made after.
    pub(crate) fn remove_for_good(&self) -> Result<()> {
        self.ending.store(true, Ordering::SeqCst);
        self.remove()
    }

    /// Ends the programs and removes what was made. All steps are tried; the failures are in the error.
    pub(crate) fn remove(&self) -> Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut failures = Vec::new();
        let mut attempt = |result: Result<()>| failures.extend(result.err().map(|error| format!("{error:#}")));
        let namespaces = namespaces();
        attempt(end_programs(&namespaces, &mut state.children));
        for point in mounts_below(Path::new(DIRECTORY)) {
            attempt(umount2(&point, MntFlags::MNT_DETACH).with_context(|| format!("unmounting {}", point.display())));
        }
        for name in namespaces {
            attempt(ip(&format!("netns del {name}")));
        }
        for cgroup in agents_cgroups() {
            attempt(fs::remove_dir(&cgroup).with_context(|| format!("removing {}", cgroup.display())));
        }
        match fs::remove_dir_all(DIRECTORY) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => attempt(Err(error).context(DIRECTORY)),
            _ => {}
        }
        if failures.is_empty() { Ok(()) } else { bail!("{}", failures.join("; ")) }
    }
}

/// Removes everything when it is dropped.
#[derive(Debug)]
pub(crate) struct Cleanup(Lab);

impl Drop for Cleanup {
    fn drop(&mut self) {
        if let Err(error) = self.0.remove() {
            eprintln!("demo: cleaning up: {error:#}");
        }
    }
}

/// A namespace with a bridge that has an address.
fn make_bridge(name: &str, address: Ipv4Addr) -> Result<()> {
    let name = namespace(name);
    ip(&format!("netns add {name}"))?;
    ip(&format!("-n {name} link set lo up"))?;
    ip(&format!("-n {name} link add bridge type bridge"))?;
    ip(&format!("-n {name} link set bridge up"))?;
    ip(&format!("-n {name} addr add {address}/16 dev bridge"))
}

/// Joins a namespace to another's bridge by a pair of interfaces.
fn join(bridge: &str, other: &str, port: &str, interface: &str) -> Result<()> {
    let (bridge, other) = (namespace(bridge), namespace(other));
    ip(&format!("-n {bridge} link add {port} type veth peer name {interface} netns {other}"))?;
    ip(&format!("-n {bridge} link set {port} master bridge up"))?;
    ip(&format!("-n {other} link set {interface} up"))
}

fn namespaces() -> Vec<String> {
    let names =
        fs::read_dir("/run/netns").into_iter().flatten().flatten().filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| name.starts_with(PREFIX)).collect()
}

/// Asks the programs in the namespaces to end, and ends those that do not.
fn end_programs(namespaces: &[String], children: &mut Vec<Child>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let mut signal = Signal::SIGTERM;
    loop {
        children.retain_mut(|child| !matches!(child.try_wait(), Ok(Some(_))));
        let running = running(namespaces);
        if running.is_empty() && children.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline + PATIENCE {
            bail!("processes {running:?} do not end");
        }
        if signal == Signal::SIGTERM || Instant::now() > deadline {
            for pid in &running {
                // Whatever it says: the next look tells whether the process is gone.
                let _gone = kill(Pid::from_raw(*pid), signal);
            }
            signal = Signal::SIGKILL;
        }
        sleep(Duration::from_millis(20));
    }
}

/// The processes whose own namespace is one of these.
fn running(namespaces: &[String]) -> Vec<i32> {
    use std::os::unix::fs::MetadataExt as _;
    let inode = |path: PathBuf| fs::metadata(path).ok().map(|metadata| metadata.ino());
    let wanted: Vec<u64> = namespaces.iter().filter_map(|name| inode(netns::path(name))).collect();
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid: &i32| inode(PathBuf::from(format!("/proc/{pid}/ns/net"))).is_some_and(|inode| wanted.contains(&inode)))
        .collect()
}

/// The deepest first.
fn mounts_below(directory: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let points = table.lines().filter_map(|line| line.split(' ').nth(1)).map(PathBuf::from);
    let mut below: Vec<PathBuf> = points.filter(|point| point.starts_with(directory)).collect();
    below.sort();
    below.reverse();
    below
}

/// The cgroups that agents of the demo's nodes made for themselves.
fn agents_cgroups() -> Vec<PathBuf> {
    let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(PathBuf::from);
    let cgroups = roots.iter().flat_map(|root| NODES.map(|node| root.join(format!("culvert-agent-{}", node.name))));
    cgroups.filter(|cgroup| cgroup.is_dir()).collect()
}
