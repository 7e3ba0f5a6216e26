//! Workloads and services as the mesh sees them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use super::{Mode, PeerAuthentication, SpiffeId};

/// A pod as the mesh sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Unique in the mesh: `<cluster>//Pod/<namespace>/<name>`.
    pub uid: Arc<str>,
    /// The pod's name.
    pub name: Arc<str>,
    /// Who the workload is; also its namespace and service account.
    pub identity: SpiffeId,
    /// The pod's addresses, at most one a family. Never IPv4-mapped.
    pub addresses: Vec<IpAddr>,
    /// The node it runs on.
    pub node: Arc<str>,
    /// How its agent is to be spoken to.
    pub protocol: TunnelProtocol,
    /// The pod shares its node's network namespace; such a pod is never enrolled.
    pub host_network: bool,
    /// The pod is ready to serve.
    pub healthy: bool,
    /// The name of what made the pod (a Deployment's, say), for telemetry.
    pub workload_name: Arc<str>,
    /// The kind of what made the pod, for telemetry.
    pub workload_type: WorkloadType,
    /// The canonical service's name, for telemetry.
    pub canonical_name: Arc<str>,
    /// The canonical service's revision, for telemetry.
    pub canonical_revision: Arc<str>,
    /// The services that it serves, by `namespace/hostname`, with this pod's own target ports.
    pub services: BTreeMap<Arc<str>, Vec<PortMapping>>,
    /// Keys (`namespace/name`) of the authorization policies that select it by labels.
    pub authorization_policies: Vec<Arc<str>>,
    /// What its ports accept.
    pub peer_authentication: PeerAuthentication,
}

/// How a workload's agent is to be spoken to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TunnelProtocol {
    /// The workload is not in the mesh: as it is, without a tunnel.
    #[default]
    None,
    /// HTTP/2 CONNECT over mutual TLS.
    Hbone,
}

/// The kind of what made a pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum WorkloadType {
    /// A Deployment, StatefulSet, DaemonSet or ReplicaSet.
    Deployment,
    /// A `CronJob`.
    CronJob,
    /// The pod itself.
    #[default]
    Pod,
    /// A Job.
    Job,
}

/// A service's port and the port of the workload behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PortMapping {
    /// The port that clients dial.
    pub service_port: u16,
    /// The port that the application listens on.
    pub target_port: u16,
}

/// A Kubernetes service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// The service's name.
    pub name: Arc<str>,
    /// The service's namespace.
    pub namespace: Arc<str>,
    /// `<name>.<namespace>.svc.<cluster domain>`.
    pub hostname: Arc<str>,
    /// Its virtual addresses; none for a headless service. Never IPv4-mapped.
    pub addresses: Vec<IpAddr>,
    /// The ports that it is dialled on.
    pub ports: Vec<PortMapping>,
    /// Only endpoints on the client's own node count (`internalTrafficPolicy: Local`).
    pub node_local: bool,
    /// Endpoints that are not ready count, too (`publishNotReadyAddresses`).
    pub unready_too: bool,
}

impl Workload {
    /// Whether the workload is in the mesh.
    #[must_use]
    pub fn enrolled(&self) -> bool {
        self.protocol == TunnelProtocol::Hbone && !self.host_network
    }

    /// Whether peers open a tunnel for a connection to `port`, rather than plaintext.
    #[must_use]
    pub fn tunnelled(&self, port: u16) -> bool {
        self.enrolled() && self.peer_authentication.mode_of(port) != Mode::Disable
    }

    /// The workload's address of the same family as `like`.
    #[must_use]
    pub fn address_like(&self, like: IpAddr) -> Option<IpAddr> {
        self.addresses.iter().copied().find(|address| address.is_ipv4() == like.is_ipv4())
    }

    /// The port behind `service_port` of the service `key`, if the workload serves it.
    #[must_use]
    pub fn target_port(&self, key: &str, service_port: u16) -> Option<u16> {
        let ports = self.services.get(key)?;
        ports.iter().find(|mapping| mapping.service_port == service_port).map(|mapping| mapping.target_port)
    }
}

impl Service {
    /// `namespace/hostname`, unique in the mesh.
    #[must_use]
    pub fn key(&self) -> Arc<str> {
        format!("{}/{}", self.namespace, self.hostname).into()
    }
}
