//! Two nodes and the pods of the benchmark: each server twice, as a pod of the mesh and as a pod outside of it, so that the same bytes
//! go the same way with and without Culvert. Each agent is attached to its own node's processes and pods of the mesh. To pods outside of
//! it none is: a direct connection runs no program of Culvert's at either end.

use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use harness::mesh::NODES;
use harness::{Attached, Mesh, MeshSpec, Namespace, Pod, PodSpec, app, eventually};

use crate::load::server::Server;
use crate::other::Other;
use crate::program::Daemon;
use crate::{interrupt, metrics};

/// Where iperf3 listens.
pub(crate) const IPERF: u16 = 5201;
/// Where nginx listens.
pub(crate) const NGINX: u16 = 8080;
/// Where what is said comes back.
const ECHO: u16 = 9009;
/// How many connections show whether an agent's programs run for them: more than the question takes.
const SHOWN_BY: u64 = 16;
/// What the pods' and so the agents' connections use: the figures that are to be reached were measured with it.
pub(crate) const CONGESTION_CONTROL: &str = "reno";

/// The way that a connection takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Path {
    /// From node to node, both pods outside of the mesh.
    Direct,
    /// From node to node, both pods in the mesh.
    Culvert,
    /// Within a node, both pods outside of the mesh.
    DirectSameNode,
    /// Within a node, both pods in the mesh.
    SameNode,
    /// From a pod in the mesh to one outside, on another node.
    OutOfMesh,
    /// From a pod outside to one in the mesh, on another node, which takes plaintext too.
    Plaintext,
    /// From node to node, between pods that another proxy serves.
    Other,
}

impl Path {
    /// Its name in the results.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Culvert => "culvert",
            Self::DirectSameNode => "direct_same_node",
            Self::SameNode => "same_node",
            Self::OutOfMesh => "out_of_mesh",
            Self::Plaintext => "plaintext",
            Self::Other => "other",
        }
    }

    /// What a line of the table says of it, if the line's heading does not.
    pub(crate) fn about(self) -> &'static str {
        match self {
            Self::Direct | Self::Culvert | Self::DirectSameNode | Self::SameNode => "",
            Self::OutOfMesh => "out of the mesh",
            Self::Plaintext => "plaintext in",
            Self::Other => "the other proxy",
        }
    }

    /// Whether a capture between the nodes must show what is said.
    fn in_plain_sight(self) -> Option<bool> {
        match self {
            Self::Direct | Self::OutOfMesh | Self::Plaintext => Some(true),
            Self::Culvert => Some(false),
            Self::DirectSameNode | Self::SameNode | Self::Other => None,
        }
    }

    /// Whether the programs of the client's node's agent must let its connections out; no other agent's programs may know of them. None:
    /// they have more to do than to let them out.
    fn let_out(self) -> Option<bool> {
        match self {
            Self::Direct | Self::DirectSameNode | Self::Plaintext | Self::Other => Some(false),
            Self::OutOfMesh => Some(true),
            Self::Culvert | Self::SameNode => None,
        }
    }
}

const PATHS: [Path; 6] = [Path::Direct, Path::Culvert, Path::DirectSameNode, Path::SameNode, Path::OutOfMesh, Path::Plaintext];

/// What is measured on. Everything is removed when it is dropped: first the programs, last the mesh.
#[derive(Debug)]
pub(crate) struct Topology {
    other: Option<Other>,
    _servers: Vec<Server>,
    _daemons: Vec<Daemon>,
    client: Pod,
    plain_client: Pod,
    server: Pod,
    plain_server: Pod,
    near: Pod,
    plain_near: Pod,
    newcomers: usize,
    mesh: Mesh,
}

impl Topology {
    /// Makes nodes and pods, starts controller, agents and servers, and the other proxy if there is a script for it, and checks that
    /// each path is what its name says.
    pub(crate) fn start(other: Option<&std::path::Path>) -> Result<Self> {
        let mut mesh = Mesh::start_as(MeshSpec { attached: Attached::ToNode, ..MeshSpec::default() });
        let (client, plain_client) = (pod(&mut mesh, "client", 0, true)?, pod(&mut mesh, "plain-client", 0, false)?);
        let (server, plain_server) = (pod(&mut mesh, "server", 1, true)?, pod(&mut mesh, "plain-server", 1, false)?);
        let (near, plain_near) = (pod(&mut mesh, "near", 0, true)?, pod(&mut mesh, "plain-near", 0, false)?);
        let (mut servers, mut daemons) = (Vec::new(), Vec::new());
        for pod in [&server, &plain_server, &near, &plain_near] {
            serve(pod, &mesh, &mut servers, &mut daemons)?;
        }
        let mut others = None;
        if let Some(script) = other {
            let (client, server) = (pod(&mut mesh, "other-client", 0, false)?, pod(&mut mesh, "other-server", 1, false)?);
            serve(&server, &mesh, &mut servers, &mut daemons)?;
            others = Some(Other::start(script, client, server, &mesh)?);
        }
        let topology = Self {
            other: others,
            _servers: servers,
            _daemons: daemons,
            client,
            plain_client,
            server,
            plain_server,
            near,
            plain_near,
            newcomers: 0,
            mesh,
        };
        PATHS.into_iter().try_for_each(|path| topology.check(path))?;
        if topology.other.is_some() {
            topology.check(Path::Other)?;
        }
        Ok(topology)
    }

    /// The client's pod and the server's.
    pub(crate) fn ends(&self, path: Path) -> Result<(&Pod, &Pod)> {
        Ok(match path {
            Path::Direct => (&self.plain_client, &self.plain_server),
            Path::Culvert => (&self.client, &self.server),
            Path::DirectSameNode => (&self.plain_client, &self.plain_near),
            Path::SameNode => (&self.client, &self.near),
            Path::OutOfMesh => (&self.client, &self.plain_server),
            Path::Plaintext => (&self.plain_client, &self.server),
            Path::Other => {
                let other = self.other.as_ref().context("there is no other proxy")?;
                (&other.client, &other.server)
            }
        })
    }

    /// The processes of those who carry connections on a path: first on the client's node, then on the server's.
    pub(crate) fn agents(&self, path: Path) -> Vec<u32> {
        match path {
            Path::Direct | Path::DirectSameNode => Vec::new(),
            Path::Other => self.other.iter().flat_map(|other| other.processes.clone()).collect(),
            Path::Culvert | Path::SameNode | Path::OutOfMesh | Path::Plaintext => {
                (0..NODES.len()).filter_map(|node| self.mesh.agent_process(node)).collect()
            }
        }
    }

    /// The value of a series of the agent's on a node.
    pub(crate) fn metric(&self, node: usize, series: &str) -> Result<f64> {
        metrics::value(self.mesh.node(node), series)
    }

    /// A new pod of the mesh beside the client, which has its certificate, and no tunnel to the server yet.
    pub(crate) fn newcomer(&mut self) -> Result<Pod> {
        let name = |number: usize| format!("newcomer-{number}");
        if self.newcomers > 0 {
            self.mesh.delete(&format!("pod-{}", name(self.newcomers)));
        }
        self.newcomers += 1;
        let newcomer = pod(&mut self.mesh, &name(self.newcomers), 0, true)?;
        let near = self.near.at(false, ECHO);
        eventually("the newcomer has its certificate", || app::converse(&newcomer.netns, near, "hello").is_ok());
        Ok(newcomer)
    }

    fn check(&self, path: Path) -> Result<()> {
        let (client, server) = self.ends(path)?;
        let to = server.at(false, ECHO);
        eventually(&format!("the path {} is there", path.name()), || app::converse(&client.netns, to, "hello").is_ok());
        self.check_programs(path)?;
        let Some(wanted) = path.in_plain_sight() else { return Ok(()) };
        let marker = format!("marker of the path {}", path.name());
        let mut capture = self.mesh.capture_between_nodes();
        app::converse(&client.netns, to, &marker).with_context(|| format!("on the path {}", path.name()))?;
        capture.finish();
        if capture.shows(marker.as_bytes()) == wanted {
            return Ok(());
        }
        bail!("on the path {} the wire shows {}", path.name(), if wanted { "no plaintext" } else { "plaintext" })
    }

    fn check_programs(&self, path: Path) -> Result<()> {
        let Some(wanted) = path.let_out() else { return Ok(()) };
        let (client, server) = self.ends(path)?;
        let let_out = || [0, 1].map(|node| self.mesh.outcome(node, "passed_outside"));
        let before = let_out();
        for _ in 0..SHOWN_BY {
            app::converse(&client.netns, server.at(false, ECHO), "hello")
                .with_context(|| format!("on the path {}", path.name()))?;
        }
        let after = let_out();
        let seen = [0, 1].map(|node| after[node] - before[node] >= SHOWN_BY);
        ensure!(seen == [wanted, false], "on the path {} connections were let out by the nodes' programs: {seen:?}", path.name());
        Ok(())
    }
}

fn pod(mesh: &mut Mesh, name: &str, node: usize, enrolled: bool) -> Result<Pod> {
    interrupt::check()?;
    let pod = mesh.pod(PodSpec { name, namespace: "bench", node, enrolled });
    set(&pod.netns, "net/ipv4/tcp_congestion_control", CONGESTION_CONTROL)?;
    Ok(pod)
}

/// Starts all servers in a pod.
fn serve(pod: &Pod, mesh: &Mesh, servers: &mut Vec<Server>, daemons: &mut Vec<Daemon>) -> Result<()> {
    servers.push(Server::start(&pod.netns)?);
    let mut iperf = pod.netns.command("iperf3");
    iperf.args(["--server", "--port", &IPERF.to_string()]);
    daemons.push(Daemon::start(&pod.netns, iperf, IPERF)?);
    daemons.push(Daemon::start(&pod.netns, nginx(pod, mesh)?, NGINX)?);
    app::server(&pod.netns, ECHO, app::echo);
    Ok(())
}

/// One process that serves 1 KiB, and keeps connections open as long as clients want.
fn nginx(pod: &Pod, mesh: &Mesh) -> Result<Command> {
    let directory = mesh.directory().join(format!("nginx-{}", pod.netns.name()));
    fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
    let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"];
    let temporary = temporary.map(|name| format!("{name}_temp_path {}/{name}; ", directory.display())).concat();
    let configuration = format!(
        "user root; daemon off; master_process off; pid {0}/pid; error_log stderr crit;\n\
         events {{ worker_connections 4096; }}\n\
         http {{ {temporary} access_log off; keepalive_requests 1000000000;\n\
         server {{ listen {NGINX}; default_type text/plain; return 200 '{1}'; }} }}\n",
        directory.display(),
        "a".repeat(1024),
    );
    let file = directory.join("nginx.conf");
    fs::write(&file, configuration).with_context(|| format!("writing {}", file.display()))?;
    let mut command = pod.netns.command("nginx");
    command.arg("-p").arg(&directory).args(["-e", "stderr", "-c"]).arg(&file);
    Ok(command)
}

/// Sets a parameter of the kernel's for a namespace. `name` is a path below /proc/sys.
pub(crate) fn set(namespace: &Namespace, name: &str, value: &str) -> Result<()> {
    let (file, text) = (format!("/proc/sys/{name}"), value.to_owned());
    namespace.run(move || fs::write(&file, text)).with_context(|| format!("setting {name} to {value}"))
}
