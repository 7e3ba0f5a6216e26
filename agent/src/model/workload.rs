//! Workloads and services as the mesh sees them.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::ops::Deref;
use std::sync::Arc;

use super::{Mode, PeerAuthentication, SameNode, SpiffeId};

/// A pod as the mesh sees it. What many pods have in common is shared by all of them: an agent knows the whole mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Unique in the mesh: `<cluster>//Pod/<namespace>/<name>`.
    pub uid: Arc<str>,
    /// The pod's name.
    pub name: TextEnd,
    /// Who the workload is; also its namespace and service account.
    pub identity: SpiffeId,
    /// The pod's addresses. Never IPv4-mapped.
    pub addresses: PodAddresses,
    /// The node it runs on.
    pub node: Arc<str>,
    /// How its agent is to be spoken to.
    pub protocol: TunnelProtocol,
    /// The pod shares its node's network namespace; such a pod is never enrolled.
    pub host_network: bool,
    /// The pod is ready to serve.
    pub healthy: bool,
    /// What telemetry calls it.
    pub telemetry: Arc<TelemetryNames>,
    /// The services that it serves.
    pub services: Arc<ServedPorts>,
    /// Keys (`namespace/name`) of the authorization policies that select it by labels.
    pub authorization_policies: Arc<Vec<Arc<str>>>,
    /// What its ports accept.
    pub peer_authentication: Arc<PeerAuthentication>,
    /// How it speaks to other pods of its node.
    pub same_node: SameNode,
    /// Which pod it is. Only its own node is told.
    pub pod: Option<Arc<PodUid>>,
}

/// What the API server calls a pod: unlike a name, never used again.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PodUid(Box<str>);

/// A text that is the end of another, which is kept once for both: as a pod's name is of its UID.
#[derive(Clone)]
pub struct TextEnd {
    whole: Arc<str>,
    start: u32,
}

/// What telemetry calls a workload. Pods that nothing made have names of their own, and share this all the same.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct TelemetryNames {
    /// The name of what made the pod (a Deployment's, say); none if it is the pod's own.
    pub workload: Option<Arc<str>>,
    /// The kind of what made the pod.
    pub workload_type: WorkloadType,
    /// The canonical service's name; none if it is that of what made the pod.
    pub canonical_name: Option<Arc<str>>,
    /// The canonical service's revision.
    pub canonical_revision: Arc<str>,
}

/// The addresses of a pod: at most one a family, so at most two.
#[derive(Clone, Copy)]
pub struct PodAddresses {
    places: [IpAddr; 2],
    count: u8,
}

/// The services that a workload serves, by `namespace/hostname`, with its own target ports. In the order of the keys.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct ServedPorts(Box<[OfService]>);

/// A service's key and the target ports for it.
type OfService = (Arc<str>, Box<[PortMapping]>);

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

    /// The name of what made the pod.
    #[must_use]
    pub fn workload_name(&self) -> &str {
        self.telemetry.workload.as_deref().unwrap_or(&self.name)
    }

    /// The name of its cluster, with which its UID begins; empty when that has none.
    #[must_use]
    pub fn cluster(&self) -> &str {
        let end = self.uid.as_bytes().windows(2).position(|pair| pair == b"//");
        end.map_or("", |end| &self.uid[..end])
    }

    /// The canonical service's name.
    #[must_use]
    pub fn canonical_name(&self) -> &str {
        self.telemetry.canonical_name.as_deref().unwrap_or_else(|| self.workload_name())
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
        let ports = self.services.of(key)?;
        ports.iter().find(|mapping| mapping.service_port == service_port).map(|mapping| mapping.target_port)
    }
}

impl PodUid {
    /// Whether the API server may have given it. A static pod has a hash of its file, in hexadecimal digits; its object has another UID.
    #[must_use]
    pub fn is_of_the_api(&self) -> bool {
        self.0.len() != 32 || self.0.bytes().any(|byte| !byte.is_ascii_hexdigit())
    }
}

impl From<&str> for PodUid {
    fn from(text: &str) -> Self {
        Self(text.into())
    }
}

impl fmt::Display for PodUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TextEnd {
    /// The text `end`, shared with `whole` if that ends so.
    #[must_use]
    pub fn of(whole: &Arc<str>, end: &str) -> Self {
        let start = whole.ends_with(end).then(|| u32::try_from(whole.len() - end.len()).ok()).flatten();
        start.map_or_else(|| end.into(), |start| Self { whole: Arc::clone(whole), start })
    }
}

impl From<&str> for TextEnd {
    fn from(text: &str) -> Self {
        Self { whole: text.into(), start: 0 }
    }
}

impl Deref for TextEnd {
    type Target = str;

    fn deref(&self) -> &str {
        &self.whole[self.start as usize..]
    }
}

impl PartialEq for TextEnd {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for TextEnd {}

impl fmt::Display for TextEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self)
    }
}

impl fmt::Debug for TextEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

impl PodAddresses {
    /// Adds an address.
    ///
    /// # Errors
    /// The address, if there is one of its family already.
    pub fn add(&mut self, address: IpAddr) -> Result<(), IpAddr> {
        if self.iter().any(|other| other.is_ipv4() == address.is_ipv4()) {
            return Err(address);
        }
        self.places[usize::from(self.count)] = address;
        self.count += 1;
        Ok(())
    }
}

impl From<IpAddr> for PodAddresses {
    fn from(address: IpAddr) -> Self {
        Self { places: [address; 2], count: 1 }
    }
}

impl PartialEq for PodAddresses {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for PodAddresses {}

impl Default for PodAddresses {
    fn default() -> Self {
        Self { places: [IpAddr::V4(Ipv4Addr::UNSPECIFIED); 2], count: 0 }
    }
}

impl Deref for PodAddresses {
    type Target = [IpAddr];

    fn deref(&self) -> &[IpAddr] {
        &self.places[..usize::from(self.count)]
    }
}

impl fmt::Debug for PodAddresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

impl<'a> IntoIterator for &'a PodAddresses {
    type Item = &'a IpAddr;
    type IntoIter = std::slice::Iter<'a, IpAddr>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl ServedPorts {
    /// The ports of one service.
    #[must_use]
    pub fn of(&self, service: &str) -> Option<&[PortMapping]> {
        let place = self.0.binary_search_by(|(key, _)| (**key).cmp(service)).ok()?;
        self.0.get(place).map(|(_, ports)| &**ports)
    }

    /// Every service's key and ports.
    pub fn iter(&self) -> impl Iterator<Item = (&Arc<str>, &[PortMapping])> {
        self.0.iter().map(|(key, ports)| (key, &**ports))
    }
}

/// Of several with one key the first counts.
impl FromIterator<(Arc<str>, Box<[PortMapping]>)> for ServedPorts {
    fn from_iter<I: IntoIterator<Item = (Arc<str>, Box<[PortMapping]>)>>(services: I) -> Self {
        let mut services: Vec<_> = services.into_iter().collect();
        services.sort_by(|one, other| one.0.cmp(&other.0));
        services.dedup_by(|later, earlier| later.0 == earlier.0);
        Self(services.into())
    }
}

impl Service {
    /// `namespace/hostname`, unique in the mesh.
    #[must_use]
    pub fn key(&self) -> Arc<str> {
        format!("{}/{}", self.namespace, self.hostname).into()
    }
}
