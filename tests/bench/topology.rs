//! Two nodes and the pods of the benchmark: each server twice, as a pod of the mesh and as a pod outside of it, so that the same bytes
//! go the same way with and without Culvert.

use std::fs;

use anyhow::{Context as _, Result, bail};

use harness::{Mesh, Namespace, Pod, PodSpec, app, eventually};

use crate::load::server::Server;
use crate::program::Daemon;

/// Where iperf3 listens.
pub(crate) const IPERF: u16 = 5201;
/// Where what is said comes back.
const ECHO: u16 = 9009;
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
        }
    }

    /// Whether no agent is on it.
    pub(crate) fn is_direct(self) -> bool {
        matches!(self, Self::Direct | Self::DirectSameNode)
    }

    /// Whether a capture between the nodes must show what is said.
    fn in_plain_sight(self) -> Option<bool> {
        match self {
            Self::Direct | Self::OutOfMesh | Self::Plaintext => Some(true),
            Self::Culvert => Some(false),
            Self::DirectSameNode | Self::SameNode => None,
        }
    }
}

const PATHS: [Path; 6] = [Path::Direct, Path::Culvert, Path::DirectSameNode, Path::SameNode, Path::OutOfMesh, Path::Plaintext];

/// What is measured on. Everything is removed when it is dropped: first the programs, last the mesh.
#[derive(Debug)]
pub(crate) struct Topology {
    _servers: Vec<Server>,
    _daemons: Vec<Daemon>,
    client: Pod,
    plain_client: Pod,
    server: Pod,
    plain_server: Pod,
    near: Pod,
    plain_near: Pod,
    mesh: Mesh,
}

impl Topology {
    /// Makes nodes and pods, starts controller, agents and servers, and checks that each path is what its name says.
    pub(crate) fn start() -> Result<Self> {
        let mut mesh = Mesh::start();
        let mut pod = |name, node, enrolled| -> Result<Pod> {
            crate::interrupt::check()?;
            let pod = mesh.pod(PodSpec { name, namespace: "bench", node, enrolled });
            set(&pod.netns, "net/ipv4/tcp_congestion_control", CONGESTION_CONTROL)?;
            Ok(pod)
        };
        let (client, plain_client) = (pod("client", 0, true)?, pod("plain-client", 0, false)?);
        let (server, plain_server) = (pod("server", 1, true)?, pod("plain-server", 1, false)?);
        let (near, plain_near) = (pod("near", 0, true)?, pod("plain-near", 0, false)?);
        let (mut servers, mut daemons) = (Vec::new(), Vec::new());
        for pod in [&server, &plain_server, &near, &plain_near] {
            servers.push(Server::start(&pod.netns)?);
            let mut iperf = pod.netns.command("iperf3");
            iperf.args(["--server", "--port", &IPERF.to_string()]);
            daemons.push(Daemon::start(&pod.netns, iperf, IPERF)?);
            app::server(&pod.netns, ECHO, app::echo);
        }
        let topology =
            Self { _servers: servers, _daemons: daemons, client, plain_client, server, plain_server, near, plain_near, mesh };
        PATHS.into_iter().try_for_each(|path| topology.check(path))?;
        Ok(topology)
    }

    /// The client's pod and the server's.
    pub(crate) fn ends(&self, path: Path) -> (&Pod, &Pod) {
        match path {
            Path::Direct => (&self.plain_client, &self.plain_server),
            Path::Culvert => (&self.client, &self.server),
            Path::DirectSameNode => (&self.plain_client, &self.plain_near),
            Path::SameNode => (&self.client, &self.near),
            Path::OutOfMesh => (&self.client, &self.plain_server),
            Path::Plaintext => (&self.plain_client, &self.server),
        }
    }

    /// The processes of the agents.
    pub(crate) fn agents(&self) -> Vec<u32> {
        (0..harness::mesh::NODES.len()).filter_map(|node| self.mesh.agent_process(node)).collect()
    }

    fn check(&self, path: Path) -> Result<()> {
        let (client, server) = self.ends(path);
        let to = server.at(false, ECHO);
        eventually(&format!("the path {} is there", path.name()), || app::converse(&client.netns, to, "hello").is_ok());
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
}

/// Sets a parameter of the kernel's for a namespace. `name` is a path below /proc/sys.
pub(crate) fn set(namespace: &Namespace, name: &str, value: &str) -> Result<()> {
    let (file, text) = (format!("/proc/sys/{name}"), value.to_owned());
    namespace.run(move || fs::write(&file, text)).with_context(|| format!("setting {name} to {value}"))
}
