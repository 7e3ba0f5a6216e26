//! The objects that the controller reads, and the checks that each must pass before it is believed.
//!
//! Enters: typed objects. Leaves: their keys, and for a bad one the field, the value and the way out. An API server refuses such
//! objects itself; a directory does not.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use crate::policy::compile::{self, CompileError, MeshContext};
use crate::policy::objects::{AuthorizationPolicy, PeerAuthenticationPolicy};

/// A cluster object of a kind that the mesh is made of.
#[derive(Clone, Debug)]
pub enum Object {
    /// A node: its token and pod ranges.
    Node(Box<Node>),
    /// A namespace: its enrolment label.
    Namespace(Box<Namespace>),
    /// A pod.
    Pod(Box<Pod>),
    /// A service account: only that it exists.
    ServiceAccount(Box<ServiceAccount>),
    /// A service.
    Service(Box<Service>),
    /// A service's endpoints.
    EndpointSlice(Box<EndpointSlice>),
    /// What workloads accept.
    PeerAuthentication(Box<PeerAuthenticationPolicy>),
    /// Who may connect.
    AuthorizationPolicy(Box<AuthorizationPolicy>),
}

/// The kinds of [`Object`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// `v1`, without a namespace.
    Node,
    /// `v1`, without a namespace.
    Namespace,
    /// `v1`.
    Pod,
    /// `v1`.
    ServiceAccount,
    /// `v1`.
    Service,
    /// `discovery.k8s.io/v1`.
    EndpointSlice,
    /// `security.istio.io/v1` and `v1beta1`.
    PeerAuthentication,
    /// `security.istio.io/v1` and `v1beta1`.
    AuthorizationPolicy,
}

/// What tells one object from all others.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectKey {
    /// The object's kind.
    pub kind: Kind,
    /// The object's namespace; empty for kinds without one.
    pub namespace: String,
    /// The object's name.
    pub name: String,
}

/// One field of an object that cannot be taken as it is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {problem}")]
pub struct FieldError {
    /// The field's path in the object.
    pub path: String,
    /// The value, what is wrong with it, and what would be right.
    pub problem: String,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 8] = [
        Self::Node,
        Self::Namespace,
        Self::Pod,
        Self::ServiceAccount,
        Self::Service,
        Self::EndpointSlice,
        Self::PeerAuthentication,
        Self::AuthorizationPolicy,
    ];

    /// The kind as manifests write it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Node => "Node",
            Self::Namespace => "Namespace",
            Self::Pod => "Pod",
            Self::ServiceAccount => "ServiceAccount",
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::PeerAuthentication => "PeerAuthentication",
            Self::AuthorizationPolicy => "AuthorizationPolicy",
        }
    }

    /// The API group, and the versions of it that are read.
    #[must_use]
    pub fn group_versions(self) -> (&'static str, &'static [&'static str]) {
        match self {
            Self::Node | Self::Namespace | Self::Pod | Self::ServiceAccount | Self::Service => ("", &["v1"]),
            Self::EndpointSlice => ("discovery.k8s.io", &["v1"]),
            Self::PeerAuthentication | Self::AuthorizationPolicy => ("security.istio.io", &["v1", "v1beta1"]),
        }
    }

    /// Whether objects of this kind live in a namespace.
    #[must_use]
    pub fn namespaced(self) -> bool {
        !matches!(self, Self::Node | Self::Namespace)
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            write!(f, "{} {}", self.kind.as_str(), self.name)
        } else {
            write!(f, "{} {}/{}", self.kind.as_str(), self.namespace, self.name)
        }
    }
}

impl Object {
    /// The object's kind.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Node(_) => Kind::Node,
            Self::Namespace(_) => Kind::Namespace,
            Self::Pod(_) => Kind::Pod,
            Self::ServiceAccount(_) => Kind::ServiceAccount,
            Self::Service(_) => Kind::Service,
            Self::EndpointSlice(_) => Kind::EndpointSlice,
            Self::PeerAuthentication(_) => Kind::PeerAuthentication,
            Self::AuthorizationPolicy(_) => Kind::AuthorizationPolicy,
        }
    }

    /// The object's metadata.
    #[must_use]
    pub fn metadata(&self) -> &ObjectMeta {
        match self {
            Self::Node(object) => &object.metadata,
            Self::Namespace(object) => &object.metadata,
            Self::Pod(object) => &object.metadata,
            Self::ServiceAccount(object) => &object.metadata,
            Self::Service(object) => &object.metadata,
            Self::EndpointSlice(object) => &object.metadata,
            Self::PeerAuthentication(object) => &object.metadata,
            Self::AuthorizationPolicy(object) => &object.metadata,
        }
    }

    /// What tells the object from all others. A namespaced object that names none is in `default`.
    #[must_use]
    pub fn key(&self) -> ObjectKey {
        let (kind, metadata) = (self.kind(), self.metadata());
        let namespace = match (kind.namespaced(), metadata.namespace.as_deref()) {
            (false, _) => "",
            (true, None | Some("")) => "default",
            (true, Some(namespace)) => namespace,
        };
        ObjectKey { kind, namespace: namespace.to_owned(), name: metadata.name.clone().unwrap_or_default() }
    }

    /// Checks what the mesh will rely on.
    ///
    /// # Errors
    /// The first field that cannot be taken as it is.
    pub fn check(&self, mesh: &MeshContext) -> Result<(), FieldError> {
        let key = self.key();
        check_name("metadata.name", &key.name, 253)?;
        if key.kind.namespaced() {
            check_name("metadata.namespace", &key.namespace, 63)?;
        }
        match self {
            // What a PeerAuthentication may say is settled by its type.
            Self::Namespace(_) | Self::ServiceAccount(_) | Self::PeerAuthentication(_) => Ok(()),
            Self::Node(node) => check_node(node),
            Self::Pod(pod) => check_pod(pod),
            Self::Service(service) => check_service(service),
            Self::EndpointSlice(slice) => check_slice(slice),
            Self::AuthorizationPolicy(policy) => compile::authorization(policy, mesh).map(drop).map_err(|error| match error {
                CompileError::Value { policy: _, field, value, expected } => {
                    refuse(field, format!("`{value}` is not {expected}"))
                }
                error @ CompileError::SelectorAndTarget { .. } => refuse("spec", error.to_string()),
            }),
        }
    }
}

fn refuse(path: impl Into<String>, problem: impl Into<String>) -> FieldError {
    FieldError { path: path.into(), problem: problem.into() }
}

/// DNS-1123 subdomain: the form that Kubernetes demands, and safe as part of a path or a SPIFFE ID.
fn check_name(path: &str, name: &str, longest: usize) -> Result<(), FieldError> {
    if name.is_empty() {
        return Err(refuse(path, "is missing: every object needs one"));
    }
    let edge = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let legal = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'.';
    let bytes = name.as_bytes();
    if name.len() > longest || !edge(bytes.first()) || !edge(bytes.last()) || !name.bytes().all(legal) || name.contains("..") {
        let rule = format!("use at most {longest} of a-z, 0-9, '-' and '.', and begin and end with a letter or digit");
        return Err(refuse(path, format!("`{name}` is not a Kubernetes name: {rule}")));
    }
    Ok(())
}

fn check_address(path: impl FnOnce() -> String, text: &str) -> Result<(), FieldError> {
    match text.parse::<IpAddr>() {
        Ok(address) if address.is_unspecified() || address.is_multicast() || address.is_loopback() => {
            Err(refuse(path(), format!("`{text}` is not an address that a pod or service can have")))
        }
        Ok(_) => Ok(()),
        Err(_) => Err(refuse(path(), format!("`{text}` is not an IP address: write one like 10.0.0.1 or fd00::1"))),
    }
}

fn check_port(path: impl FnOnce() -> String, port: i32) -> Result<(), FieldError> {
    if (1..=65535).contains(&port) {
        return Ok(());
    }
    Err(refuse(path(), format!("{port} is not a port: use 1 to 65535")))
}

fn check_node(node: &Node) -> Result<(), FieldError> {
    let Some(spec) = &node.spec else { return Ok(()) };
    let cidrs = spec.pod_cidrs.iter().flatten().chain(&spec.pod_cidr);
    for cidr in cidrs.filter(|cidr| !cidr.is_empty()) {
        if cidr.parse::<IpNet>().is_err() {
            return Err(refuse("spec.podCIDRs", format!("`{cidr}` is not a range of addresses: write one like 10.0.0.0/24")));
        }
    }
    Ok(())
}

fn check_pod(pod: &Pod) -> Result<(), FieldError> {
    if let Some(status) = &pod.status {
        for (index, ip) in status.pod_ips.iter().flatten().enumerate() {
            check_address(|| format!("status.podIPs[{index}].ip"), &ip.ip)?;
        }
        if let Some(ip) = status.pod_ip.as_deref().filter(|ip| !ip.is_empty()) {
            check_address(|| "status.podIP".to_owned(), ip)?;
        }
    }
    let Some(spec) = &pod.spec else { return Ok(()) };
    if let Some(account) = spec.service_account_name.as_deref().filter(|name| !name.is_empty()) {
        check_name("spec.serviceAccountName", account, 253)?;
    }
    for (index, container) in spec.containers.iter().enumerate() {
        for (number, port) in container.ports.iter().flatten().enumerate() {
            check_port(|| format!("spec.containers[{index}].ports[{number}].containerPort"), port.container_port)?;
        }
    }
    Ok(())
}

fn check_service(service: &Service) -> Result<(), FieldError> {
    let Some(spec) = &service.spec else { return Ok(()) };
    for (index, port) in spec.ports.iter().flatten().enumerate() {
        check_port(|| format!("spec.ports[{index}].port"), port.port)?;
        if let Some(IntOrString::Int(target)) = port.target_port {
            check_port(|| format!("spec.ports[{index}].targetPort"), target)?;
        }
    }
    let virtual_address = |text: &&String| !matches!(text.as_str(), "" | "None");
    for (index, ip) in spec.cluster_ips.iter().flatten().filter(virtual_address).enumerate() {
        check_address(|| format!("spec.clusterIPs[{index}]"), ip)?;
    }
    spec.cluster_ip.iter().filter(virtual_address).try_for_each(|ip| check_address(|| "spec.clusterIP".to_owned(), ip))
}

fn check_slice(slice: &EndpointSlice) -> Result<(), FieldError> {
    for (index, port) in slice.ports.iter().flatten().enumerate() {
        if let Some(port) = port.port {
            check_port(|| format!("ports[{index}].port"), port)?;
        }
    }
    if slice.address_type == "FQDN" {
        return Ok(());
    }
    for (index, endpoint) in slice.endpoints.iter().flatten().enumerate() {
        for (number, address) in endpoint.addresses.iter().enumerate() {
            check_address(|| format!("endpoints[{index}].addresses[{number}]"), address)?;
        }
    }
    Ok(())
}
