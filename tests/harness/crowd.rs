//! Pods by the hundred, each with clients that connect from the first moment of its network namespace, before any agent can have
//! seen it.
//!
//! A pod is made as a runtime makes one: the namespace, its file in the node's directory, the mount, then the network. Its clients
//! are there before all of these, and try again every 10 ms, as an application does that starts before what it needs.

use std::fs::{self, File};
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use crate::Mesh;
use crate::mesh::{self, PodSpec};

/// How long a client goes on trying once its pod's network is there.
const TRIES: Duration = Duration::from_secs(4);
/// How long a client waits for its pod's network.
const NETWORK: Duration = Duration::from_secs(60);
/// How long a client waits before it tries again.
pub const PAUSE: Duration = Duration::from_millis(10);
/// How long one attempt may take.
pub const ATTEMPT: Duration = Duration::from_millis(300);

/// Which comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// The pod's object, as on a real cluster.
    ObjectFirst,
    /// The pod's namespace, with a network.
    NamespaceFirst,
}

/// One pod of a crowd.
#[derive(Clone, Debug)]
pub struct Member {
    /// Its name, service account and label `app`.
    pub name: String,
    /// Its namespace.
    pub namespace: &'static str,
    /// The number of its addresses.
    pub number: u16,
    /// The number of its node.
    pub node: usize,
    /// Whether it is in the mesh.
    pub enrolled: bool,
}

/// What a client of a member's met at one target.
#[derive(Clone, Debug)]
pub struct Attempts {
    /// When it first had its answer, counted from when the pod's network was there.
    pub reached: Option<Duration>,
    /// How often it tried in vain once the network was there.
    pub failures: usize,
    /// How many of these had no answer at all.
    pub unanswered: usize,
    /// The last failure.
    pub last: Option<String>,
}

/// A crowd that is there; its namespaces go when it is dropped.
#[derive(Debug)]
pub struct Crowd {
    mounts: Vec<PathBuf>,
    /// For each member, its node's namespace and the link there.
    links: Vec<(String, String)>,
    /// For each member, what its clients met at each target.
    pub attempts: Vec<Vec<Attempts>>,
}

impl Member {
    fn spec(&self) -> PodSpec<'_> {
        PodSpec { name: &self.name, namespace: self.namespace, node: self.node, enrolled: self.enrolled }
    }
}

impl Crowd {
    /// Starts all members at once, and waits until each of their clients, one a target, has its answer or has given up. A client
    /// says `<member's name>-<target's number>` to an echoing server.
    ///
    /// # Panics
    /// When a namespace cannot be made.
    #[must_use]
    pub fn start(mesh: &Mesh, members: &[Member], targets: &[SocketAddr], order: Order) -> Self {
        if order == Order::ObjectFirst {
            write_objects(mesh, members);
        }
        let attempts = std::thread::scope(|scope| {
            let all: Vec<_> = members.iter().map(|member| scope.spawn(|| start_member(mesh, member, targets, order))).collect();
            all.into_iter().map(|one| one.join().expect("a pod that starts")).collect()
        });
        let mounts = members.iter().map(|member| mesh.netns_dir(member.node).join(&member.name)).collect();
        let link = |member: &Member| (mesh.node(member.node).name().to_owned(), link_name(member.number));
        Self { mounts, links: members.iter().map(link).collect(), attempts }
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        // The kernel takes its time with what is left in a namespace, and the next of that number wants its names.
        for (node, link) in &self.links {
            let _gone_already = Command::new("ip").args(["-n", node, "link", "del", link]).output();
        }
        for mount in &self.mounts {
            let _gone_already = umount2(mount, MntFlags::MNT_DETACH);
            let _gone_already = fs::remove_file(mount);
        }
    }
}

/// Writes the objects of all members in one file, named for the first.
fn write_objects(mesh: &Mesh, members: &[Member]) {
    let documents: Vec<_> = members.iter().map(|member| mesh::manifest(member.spec(), member.number)).collect();
    mesh.apply(&format!("crowd-{}", members[0].name), &documents.join("---\n"));
}

/// Removes the objects of a crowd.
pub fn delete_objects(mesh: &Mesh, members: &[Member], order: Order) {
    match order {
        Order::ObjectFirst => mesh.delete(&format!("crowd-{}", members[0].name)),
        Order::NamespaceFirst => members.iter().for_each(|member| mesh.delete(&format!("pod-{}", member.name))),
    }
}

fn start_member(mesh: &Mesh, member: &Member, targets: &[SocketAddr], order: Order) -> Vec<Attempts> {
    unshare(CloneFlags::CLONE_NEWNET).expect("root may make a namespace");
    let connected = OnceLock::new();
    std::thread::scope(|scope| {
        // Threads are born into their parent's namespace: these try before anybody can know of it.
        let spawn = |(number, target)| {
            let (marker, connected) = (format!("{}-{number}", member.name), &connected);
            scope.spawn(move || try_until_reached(target, &marker, connected))
        };
        let clients: Vec<_> = targets.iter().copied().enumerate().map(spawn).collect();
        let file = mesh.netns_dir(member.node).join(&member.name);
        File::create(&file).expect("a file to mount on");
        let bind = mount(Some("/proc/thread-self/ns/net"), &file, None::<&str>, MsFlags::MS_BIND, None::<&str>);
        bind.expect("root may mount");
        let plugged = connect_to_node(mesh, member);
        // Clients of a member that has no network give up, too.
        connected.set(Instant::now()).expect("set once");
        plugged.expect("root may make a network");
        if order == Order::NamespaceFirst {
            mesh.apply(&format!("pod-{}", member.name), &mesh::manifest(member.spec(), member.number));
        }
        clients.into_iter().map(|client| client.join().expect("a client that ends")).collect()
    })
}

/// Gives the calling thread's namespace its network: a veth to the node's bridge, and addresses.
fn connect_to_node(mesh: &Mesh, member: &Member) -> Result<(), String> {
    let (node, number, link) = (mesh.node(member.node).name(), member.number, link_name(member.number));
    let (v4, v6) = mesh::addresses(number);
    // The far end first: on a cluster an application starts when the whole network is there.
    let address = mesh::link_address(number);
    batch(&[], &format!("link set lo up\nlink add eth0 address {address} type veth peer name {link} netns {node}\n"))?;
    batch(&["-n", node], &format!("link set {link} master br0\nlink set {link} up\n"))?;
    batch(&[], &format!("link set eth0 up\naddr add {v6}/64 dev eth0 nodad\naddr add {v4}/16 dev eth0\n"))
}

/// The node's end of a member's network.
fn link_name(number: u16) -> String {
    format!("v{number}")
}

/// Has one `ip` do all of these lines.
fn batch(options: &[&str], lines: &str) -> Result<(), String> {
    let mut ip =
        Command::new("ip").args(options).args(["-batch", "-"]).stdin(Stdio::piped()).spawn().expect("iproute2 is installed");
    let mut input = ip.stdin.take().expect("a pipe was asked for");
    input.write_all(lines.as_bytes()).expect("ip reads");
    drop(input);
    if ip.wait().expect("a child of ours").success() { Ok(()) } else { Err(format!("ip {options:?}: {lines}")) }
}

fn try_until_reached(target: SocketAddr, marker: &str, connected: &OnceLock<Instant>) -> Attempts {
    let mut attempts = Attempts { reached: None, failures: 0, unanswered: 0, last: None };
    let started = Instant::now();
    loop {
        match converse(target, marker) {
            Ok(()) => {
                attempts.reached = Some(connected.get().map_or(Duration::ZERO, Instant::elapsed));
                return attempts;
            }
            Err(error) => {
                let late = matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock);
                attempts.failures += usize::from(connected.get().is_some());
                attempts.unanswered += usize::from(connected.get().is_some() && late);
                attempts.last = Some(error.to_string());
            }
        }
        // Without a network there is nothing to wait for: the pod could not be made, which is told elsewhere.
        if connected.get().map_or(started.elapsed() > NETWORK, |since| since.elapsed() > TRIES) {
            return attempts;
        }
        std::thread::sleep(PAUSE);
    }
}

fn converse(target: SocketAddr, marker: &str) -> std::io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&target, ATTEMPT)?;
    stream.set_read_timeout(Some(ATTEMPT))?;
    stream.write_all(marker.as_bytes())?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    if answer.ends_with(&format!("\n{marker}")) { Ok(()) } else { Err(std::io::ErrorKind::UnexpectedEof.into()) }
}
