//! A mesh of two nodes.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

mod control;
mod place;
mod sandbox;

pub use place::{Families, Pod, PodSpec, addresses, link_address, manifest, manifest_of};
pub use sandbox::Sandbox;

use crate::netns::Namespace;
use crate::{Capture, Metrics, PATIENCE, Process, cgroup, eventually, eventually_within};

/// The nodes' names.
pub const NODES: [&str; 2] = ["a", "b"];
/// The ranges of pods' addresses, on both nodes: all of the fabric's but where the nodes' own are.
const POD_RANGES: [&str; 9] = [
    "10.77.1.0/24",
    "10.77.2.0/23",
    "10.77.4.0/22",
    "10.77.8.0/21",
    "10.77.16.0/20",
    "10.77.32.0/19",
    "10.77.64.0/18",
    "10.77.128.0/17",
    "\"fd77::1:0/112\"",
];

/// In the place of tunnels' forms: no tunnel at all, but one node for both pods.
pub const IN_THE_KERNEL: [&str; 2] = ["kernel"; 2];

/// Two nodes, their pods, a controller and two agents.
#[derive(Debug)]
pub struct Mesh {
    id: String,
    dir: PathBuf,
    /// Where the agent of each node is attached.
    cgroups: [PathBuf; 2],
    attached: Attached,
    fabric: Namespace,
    nodes: Vec<Namespace>,
    controller: Option<Child>,
    agents: [Option<Child>; 2],
    controller_arguments: Vec<String>,
    agent_arguments: [Vec<String>; 2],
    agent_environment: Vec<(String, String)>,
    agent_descriptors: Option<u32>,
    root: PathBuf,
    one_netns_dir: bool,
    one_node: bool,
    pods: u16,
}

/// How the parts of a mesh are to be started.
#[derive(Clone, Copy, Debug, Default)]
pub struct MeshSpec<'a> {
    /// More arguments for the controller.
    pub controller: &'a [&'a str],
    /// More arguments for the agent of each node.
    pub agents: [&'a [&'a str]; 2],
    /// Where the agents are attached.
    pub attached: Attached,
}

/// Which part of the tree of cgroups the agents are attached to: what is elsewhere they never see.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Attached {
    /// All that this process starts, on both nodes.
    #[default]
    ToAll,
    /// Where a kubelet keeps pods, which then is the part of the tree that is the agents'.
    ToKubelet,
    /// To each node its own part, in which are the node's own processes and those in its pods of the mesh. Other pods are in no part.
    ToNode,
}

impl Mesh {
    /// Makes the network and starts everything.
    #[must_use]
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// The same, with more arguments for the controller.
    #[must_use]
    pub fn start_with(controller_arguments: &[&str]) -> Self {
        Self::start_as(MeshSpec { controller: controller_arguments, ..MeshSpec::default() })
    }

    /// The same, with the agents' tunnels in these forms (`--tunnel-form`); or, for [`IN_THE_KERNEL`], for pairs of pods on one node.
    #[must_use]
    pub fn start_in(forms: [&str; 2]) -> Self {
        if forms == IN_THE_KERNEL {
            let mut mesh = Self::start();
            mesh.one_node = true;
            return mesh;
        }
        let [first, second] = forms;
        let agents: [&[&str]; 2] = [&["--tunnel-form", first], &["--tunnel-form", second]];
        Self::start_as(MeshSpec { agents, ..MeshSpec::default() })
    }

    /// Whether pairs of pods are on one node, and speak through its kernel.
    #[must_use]
    pub fn in_the_kernel(&self) -> bool {
        self.one_node
    }

    /// How often the programs of a node ended so.
    #[must_use]
    pub fn outcome(&self, node: usize, word: &str) -> u64 {
        self.metrics(node).sum("culvert_capture_outcomes_total", &[&format!("outcome=\"{word}\"")])
    }

    /// The same, as `spec` says.
    #[must_use]
    pub fn start_as(spec: MeshSpec<'_>) -> Self {
        let mut mesh = Self::prepare(spec);
        mesh.start_all();
        mesh
    }

    /// Makes the network, and starts nothing yet.
    ///
    /// # Panics
    /// When something cannot be made: root, iproute2 and a built binary are needed.
    #[must_use]
    pub fn prepare(spec: MeshSpec<'_>) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let id = format!("cv{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = PathBuf::from("/run/culvert-test").join(&id);
        let cgroups = NODES.map(|node| match spec.attached {
            Attached::ToAll => cgroup::own().to_owned(),
            Attached::ToKubelet => cgroup::pods(),
            Attached::ToNode => cgroup::threaded(&format!("{id}-{node}")),
        });
        let (fabric, root) = (Namespace::new(&format!("{id}-fabric")), dir.join("state/root-cert.pem"));
        fabric.ip("link add br0 type bridge");
        fabric.ip("link set br0 up");
        let mut mesh = Self {
            id,
            dir,
            cgroups,
            attached: spec.attached,
            fabric,
            nodes: Vec::new(),
            controller: None,
            agents: [None, None],
            controller_arguments: spec.controller.iter().map(ToString::to_string).collect(),
            agent_arguments: spec.agents.map(|arguments| arguments.iter().map(ToString::to_string).collect()),
            agent_environment: Vec::new(),
            agent_descriptors: None,
            root,
            one_netns_dir: false,
            one_node: false,
            pods: 0,
        };
        clear(&mesh.dir);
        fs::create_dir_all(mesh.dir.join("netns")).expect("a directory");
        for (number, name) in NODES.iter().enumerate() {
            fs::create_dir_all(mesh.dir.join(name).join("netns")).expect("a directory");
            let node = Namespace::in_cgroup(&format!("{}-{name}", mesh.id), mesh.cgroup(number));
            // A bridge without an address of its own takes its ports' lowest, and goes astray for others when it changes.
            node.ip(&format!("link add br0 address 02:00:00:00:00:0{number} type bridge"));
            node.ip("link set br0 up");
            node.ip(&format!("addr add 10.77.0.{}/16 dev br0", number + 1));
            node.ip(&format!("addr add fd77::{}/64 dev br0 nodad", number + 1));
            node.ip(&format!("link add up0 type veth peer name n{name} netns {}", mesh.fabric.name()));
            node.ip("link set up0 master br0");
            node.ip("link set up0 up");
            mesh.fabric.ip(&format!("link set n{name} master br0"));
            mesh.fabric.ip(&format!("link set n{name} up"));
            mesh.nodes.push(node);
            let object = format!(
                "apiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\nspec: {{podCIDRs: [{}]}}\n",
                POD_RANGES.join(", ")
            );
            mesh.apply(&format!("node-{name}"), &object);
        }
        mesh
    }

    /// Starts the controller, then the agents.
    pub fn start_all(&mut self) {
        self.start_controller();
        (0..NODES.len()).for_each(|node| self.start_agent(node));
    }

    /// Starts the controller, and waits until it serves.
    ///
    /// # Panics
    /// When it does not.
    pub fn start_controller(&mut self) {
        self.start_controller_within(PATIENCE);
    }

    /// The same, when there are so many manifests that they take a while.
    ///
    /// # Panics
    /// When it does not serve in time.
    pub fn start_controller_within(&mut self, patience: Duration) {
        let mut command = self.nodes[0].command(&binary());
        command.arg("controller").arg("--manifests").arg(self.dir.join("manifests"));
        command.arg("--state-dir").arg(self.dir.join("state")).args(["--listen", "10.77.0.1:15012"]);
        command.args(&self.controller_arguments);
        self.controller = Some(self.spawn(command, "controller"));
        eventually_within(patience, "the controller serves", || self.log("controller").contains("serving agents"));
    }

    /// Ends the controller at once.
    pub fn kill_controller(&mut self) {
        end(&mut self.controller);
    }

    /// Starts the agent of a node, and waits until it has taken over.
    ///
    /// # Panics
    /// When it does not.
    pub fn start_agent(&mut self, node: usize) {
        let name = NODES[node];
        let mut command = match self.agent_descriptors {
            None => self.nodes[node].command(&binary()),
            Some(limit) => {
                let mut command = self.nodes[node].command("prlimit");
                command.arg(format!("--nofile={limit}")).arg(binary());
                command
            }
        };
        command.args(["agent", "--node", name, "--controller", "https://10.77.0.1:15012", "--root-cert"]);
        command.arg(&self.root).arg("--token-file").arg(self.dir.join("state/tokens").join(name));
        command.arg("--netns-dir").arg(self.netns_dir(node)).arg("--bpf-dir").arg(self.dir.join(name).join("bpf"));
        command.arg("--cgroup-root").arg(&self.cgroups[node]).arg("--state-dir").arg(self.agent_state_dir(node));
        command.args(&self.agent_arguments[node]).envs(self.agent_environment.iter().cloned());
        self.agents[node] = Some(self.spawn(command, &format!("agent-{name}")));
        let started = format!("agent-{name}");
        eventually("the agent starts", || self.log(&started).contains("agent started"));
    }

    /// The process of a node's agent, while it runs.
    #[must_use]
    pub fn agent_process(&self, node: usize) -> Option<u32> {
        // The program that enters the namespace becomes the agent.
        self.agents[node].as_ref().map(Child::id)
    }

    /// Ends the agent of a node at once.
    pub fn kill_agent(&mut self, node: usize) {
        end(&mut self.agents[node]);
    }

    /// The memory of a node's agent, in bytes: what it has for itself. Its code comes and goes with what it does.
    ///
    /// # Panics
    /// When it does not run.
    #[must_use]
    pub fn agent_memory(&self, node: usize) -> u64 {
        let agent = self.agents[node].as_ref().expect("the agent runs");
        let status = fs::read_to_string(format!("/proc/{}/status", agent.id())).expect("the agent runs");
        let resident = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("Linux tells");
        resident.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
    }

    /// The page of metrics of a node's agent.
    ///
    /// # Panics
    /// When it is not served.
    #[must_use]
    pub fn metrics(&self, node: usize) -> Metrics {
        let mut page = None;
        eventually("the metrics are served", || {
            page = self.nodes[node].run(|| Metrics::fetch(SocketAddr::from(([127, 0, 0, 1], 15020))).ok());
            page.is_some()
        });
        page.expect("fetched")
    }

    /// A page of the admin interface of a node's agent.
    ///
    /// # Panics
    /// When it is not served.
    #[must_use]
    pub fn admin(&self, node: usize, path: &'static str) -> String {
        let mut page = None;
        eventually("the admin interface is served", || {
            page = self.nodes[node].run(move || crate::metrics::get(SocketAddr::from(([127, 0, 0, 1], 15000)), path).ok());
            page.is_some()
        });
        page.expect("fetched")
    }

    /// A manifest as it was written last.
    ///
    /// # Panics
    /// When it never was.
    #[must_use]
    pub fn manifest(&self, name: &str) -> String {
        fs::read_to_string(self.dir.join("manifests").join(format!("{name}.yaml"))).expect("a manifest")
    }

    /// Writes a manifest in YAML, as a whole.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn apply(&self, name: &str, text: &str) {
        self.apply_file(&format!("{name}.yaml"), text);
    }

    /// Writes a manifest whose file's name says what it is written in.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn apply_file(&self, file: &str, text: &str) {
        let manifests = self.dir.join("manifests");
        fs::create_dir_all(&manifests).expect("a directory");
        let half = self.dir.join(format!("half-written-{file}"));
        fs::write(&half, text).expect("a file");
        fs::rename(half, manifests.join(file)).expect("a file moved");
    }

    /// Removes a manifest.
    ///
    /// # Panics
    /// When it is not there.
    pub fn delete(&self, name: &str) {
        fs::remove_file(self.dir.join("manifests").join(format!("{name}.yaml"))).expect("a manifest");
    }

    /// Sets the mode of all ports in a namespace.
    pub fn mode(&self, namespace: &str, mode: &str) {
        let text = format!(
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: default, namespace: {namespace}}}\n\
             spec: {{mtls: {{mode: {mode}}}}}\n"
        );
        self.apply(&format!("mode-{namespace}"), &text);
    }

    /// Has a policy `rule` of the namespace `shop` deny a service account of its own, and waits until both agents know it. Plaintext comes
    /// to the agent from then on.
    ///
    /// # Panics
    /// When that does not come to pass in time.
    pub fn deny(&self, account: &str) {
        self.apply(
            "rule",
            &format!(
                "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: rule, namespace: shop}}\n\
                 spec: {{action: DENY, rules: [{{from: [{{source: {{principals: [cluster.local/ns/shop/sa/{account}]}}}}]}}]}}\n"
            ),
        );
        self.await_policy("shop", Some("rule"));
    }

    /// Captures what passes between the nodes.
    #[must_use]
    pub fn capture_between_nodes(&self) -> Capture {
        Capture::start(&self.fabric)
    }

    /// Captures what passes within a node, outside of its pods.
    #[must_use]
    pub fn capture_on_node(&self, node: usize) -> Capture {
        Capture::start(&self.nodes[node])
    }

    /// A node's network namespace.
    #[must_use]
    pub fn node(&self, node: usize) -> &Namespace {
        &self.nodes[node]
    }

    /// A directory that is removed with the mesh.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.dir
    }

    /// Where the controller keeps its state.
    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        self.dir.join("state")
    }

    /// The process of `controller`, `agent-a` or `agent-b`.
    ///
    /// # Panics
    /// When it was not started, or has ended.
    pub fn process(&mut self, who: &str) -> Process {
        let child = match who {
            "controller" => self.controller.as_mut(),
            "agent-a" => self.agents[0].as_mut(),
            _ => self.agents[1].as_mut(),
        };
        let child = child.expect("it was started");
        assert_eq!(child.try_wait().expect("a child"), None, "{who} has ended");
        Process::new(child.id())
    }

    /// The names of what the agent of a node has pinned, in order.
    #[must_use]
    pub fn pins(&self, node: &str) -> Vec<String> {
        let mut found = Vec::new();
        let mut places = vec![self.dir.join(node).join("bpf")];
        while let Some(place) = places.pop() {
            for entry in fs::read_dir(place).into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    places.push(entry.path());
                } else {
                    found.push(entry.file_name().to_string_lossy().into_owned());
                }
            }
        }
        found.sort();
        found
    }

    /// What `controller`, `agent-a` or `agent-b` has logged.
    #[must_use]
    pub fn log(&self, who: &str) -> String {
        fs::read_to_string(self.dir.join(format!("{who}.log"))).unwrap_or_default()
    }

    /// Prints what a node's programs have decided so far, for who reads of a failure.
    fn tell_outcomes(&self, node: usize) {
        let metrics = self.nodes[node].run(|| Metrics::fetch(SocketAddr::from(([127, 0, 0, 1], 15020))));
        let Ok(metrics) = metrics else { return };
        eprintln!("--- outcomes on {}", NODES[node]);
        metrics.series("culvert_capture_outcomes_total").for_each(|series| eprintln!("{series}"));
    }

    /// What the processes of a node are in, if it is not what everything is in.
    fn cgroup(&self, node: usize) -> Option<&Path> {
        (self.attached == Attached::ToNode).then_some(self.cgroups[node].as_path())
    }

    fn spawn(&self, mut command: Command, name: &str) -> Child {
        let log = File::create(self.dir.join(format!("{name}.log"))).expect("a log");
        command.stdout(log.try_clone().expect("a log")).stderr(log).spawn().expect("nsenter is installed")
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        if std::thread::panicking() {
            (0..NODES.len()).for_each(|node| self.tell_outcomes(node));
        }
        self.agents.iter_mut().for_each(end);
        end(&mut self.controller);
        if std::thread::panicking() {
            for who in ["controller", "agent-a", "agent-b"] {
                eprintln!("--- {who}\n{}", tail(&self.log(who)));
            }
        }
        for name in NODES {
            let bpf = self.dir.join(name).join("bpf");
            for mount in [bpf.join(name), bpf] {
                let _not_mounted = Command::new("umount").arg(mount).output();
            }
        }
        remove(&self.dir);
        (0..NODES.len()).filter_map(|node| self.cgroup(node)).for_each(cgroup::remove);
    }
}

/// Removes a directory with all that is in it, mounts included: what a process of the same number has left, whose pods outlived their mesh.
pub fn clear(dir: &Path) {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(Path::new).filter(|point| point.starts_with(dir));
    for point in points {
        let _gone_meanwhile = Command::new("umount").arg("--lazy").arg(point).output();
    }
    let _was_never_there = fs::remove_dir_all(dir);
}

fn remove(dir: &Path) {
    let _left_by_a_pod_that_lives_on = fs::remove_dir_all(dir);
}

fn tail(log: &str) -> String {
    let lines: Vec<_> = log.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}

fn end(child: &mut Option<Child>) {
    if let Some(mut child) = child.take() {
        let _ended_already = child.kill();
        let _status = child.wait();
    }
}

/// The binary under test.
///
/// # Panics
/// When nobody has named it.
#[must_use]
pub fn binary() -> String {
    std::env::var("CULVERT_BIN").expect("CULVERT_BIN names the binary under test: run `cargo xtask test node`")
}
