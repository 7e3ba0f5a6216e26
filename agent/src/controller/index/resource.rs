//! Resources as agents receive them: name, aliases, bytes, and a version that only the content decides.
//!
//! The same content gives the same bytes, so that a version survives the controller's restart: whatever the wire format keeps in
//! a map, whose order is not fixed, is written entry by entry in order. Concatenated messages of one type merge (Protocol Buffers,
//! encoding guide, "Last One Wins").

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use aws_lc_rs::digest;
use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint};
use prost_types::Any;

use super::ObjectName;
use crate::model::{self, Authorization, PeerAuthentication, SameNode, StringMatch};
use crate::proto::culvert::{self, peer_authentication::Mode};
use crate::proto::workload::{Extension, Port, PortList, Service, Workload};
use crate::proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE, MESH_TYPE, PEER_AUTHENTICATION_TYPE, POD_TYPE, SAME_NODE_TYPE, security};

/// The cluster's name, the first part of workloads' UIDs.
pub(super) const CLUSTER: &str = "Kubernetes";

/// The types of resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ResourceKind {
    /// Workloads and services.
    Address,
    /// Authorization policies.
    Authorization,
    /// Mesh-wide settings.
    Mesh,
}

/// One resource.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resource {
    /// Unique among those of its kind.
    pub name: Arc<str>,
    /// The addresses that it is found by as well.
    pub addresses: Vec<IpAddr>,
    /// The one node that is told of it; all are if none is named.
    pub node: Option<Arc<str>>,
    /// What one node alone is told besides.
    pub home: Option<Home>,
    /// Differs when the content does, for whichever node.
    pub version: Arc<str>,
    /// The encoded message.
    pub value: Vec<u8>,
}

/// A pod as its own node knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Home {
    node: Arc<str>,
    uid: Box<str>,
}

impl Resource {
    /// Whether an agent of this node is told of it.
    #[must_use]
    pub fn is_for(&self, node: &str) -> bool {
        self.node.as_deref().is_none_or(|only| only == node)
    }

    /// The encoded message as an agent of this node is told it.
    #[must_use]
    pub fn value_for(&self, node: &str) -> Vec<u8> {
        match &self.home {
            Some(home) if *home.node == *node => [&self.value[..], &pod(&home.uid)].concat(),
            Some(_) | None => self.value.clone(),
        }
    }

    /// The workload of a pod of which its node is told the UID.
    pub(super) fn known_at_home(self, node: &Arc<str>, uid: &str) -> Self {
        let version = version(&[self.version.as_bytes(), uid.as_bytes()]);
        Self { home: Some(Home { node: Arc::clone(node), uid: uid.into() }), version, ..self }
    }
}

impl ResourceKind {
    /// All kinds.
    pub const ALL: [Self; 3] = [Self::Address, Self::Authorization, Self::Mesh];

    /// The type's URL on the wire.
    #[must_use]
    pub fn type_url(self) -> &'static str {
        match self {
            Self::Address => ADDRESS_TYPE,
            Self::Authorization => AUTHORIZATION_TYPE,
            Self::Mesh => MESH_TYPE,
        }
    }

    /// The kind of this type URL.
    #[must_use]
    pub fn of(type_url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.type_url() == type_url)
    }
}

/// A pod's UID in the mesh.
pub(super) fn uid(pod: &ObjectName) -> Arc<str> {
    format!("{CLUSTER}//Pod/{}/{}", pod.namespace, pod.name).into()
}

/// An address as the wire has it: 4 or 16 bytes.
pub(super) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// What names the pod that a workload is: to be merged with the rest of it.
fn pod(uid: &str) -> Vec<u8> {
    let value = culvert::Pod { uid: uid.to_owned() }.encode_to_vec();
    let extension = Extension { name: "pod_uid".to_owned(), config: Some(Any { type_url: POD_TYPE.to_owned(), value }) };
    address(1, &Workload { extensions: vec![extension], ..Workload::default() }.encode_to_vec())
}

/// A workload's resource. `base` has neither services nor the extensions that follow from the other arguments yet.
pub(super) fn workload(
    uid: Arc<str>,
    addresses: &[IpAddr],
    mut base: Workload,
    services: &BTreeMap<String, Vec<Port>>,
    modes: &PeerAuthentication,
    way: SameNode,
) -> Resource {
    if *modes != PeerAuthentication::default() {
        let config = Any { type_url: PEER_AUTHENTICATION_TYPE.to_owned(), value: peer_authentication(modes) };
        base.extensions.push(Extension { name: "peer_authentication".to_owned(), config: Some(config) });
    }
    if way == SameNode::Tunnel {
        let value = culvert::SameNode { way: culvert::same_node::Way::Tunnel.into() }.encode_to_vec();
        let config = Any { type_url: SAME_NODE_TYPE.to_owned(), value };
        base.extensions.push(Extension { name: "same_node".to_owned(), config: Some(config) });
    }
    let mut message = base.encode_to_vec();
    for (key, ports) in services {
        let ports = PortList { ports: ports.clone() };
        let entry = Workload { services: [(key.clone(), ports)].into(), ..Workload::default() };
        message.extend(entry.encode_to_vec());
    }
    finish(uid, addresses, address(1, &message))
}

/// A service's resource.
pub(super) fn service(key: Arc<str>, addresses: &[IpAddr], service: Service) -> Resource {
    finish(key, addresses, address(2, &service.encode_to_vec()))
}

/// The resource of the mesh-wide settings.
pub(super) fn mesh(mesh: &culvert::Mesh) -> Resource {
    finish("mesh".into(), &[], mesh.encode_to_vec())
}

/// An authorization policy's resource.
pub(super) fn authorization(policy: &Authorization) -> Resource {
    let rule = |rule: &model::Rule| security::Rule { clauses: rule.clauses.iter().map(clause).collect() };
    let wire = security::Authorization {
        name: policy.name.to_string(),
        namespace: policy.namespace.to_string(),
        scope: match policy.scope {
            model::Scope::Global => security::Scope::Global,
            model::Scope::Namespace => security::Scope::Namespace,
            model::Scope::WorkloadSelector => security::Scope::WorkloadSelector,
        }
        .into(),
        action: match policy.action {
            model::Action::Allow => security::Action::Allow,
            model::Action::Deny => security::Action::Deny,
            model::Action::Audit => security::Action::Audit,
        }
        .into(),
        rules: policy.rules.iter().map(rule).collect(),
        dry_run: policy.dry_run,
        extensions: Vec::new(),
    };
    finish(policy.key(), &[], wire.encode_to_vec())
}

/// An `Address` message that holds this encoded message in field `tag`.
fn address(tag: u32, message: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(message.len() + 6);
    encode_key(tag, WireType::LengthDelimited, &mut bytes);
    encode_varint(message.len() as u64, &mut bytes);
    bytes.extend_from_slice(message);
    bytes
}

fn peer_authentication(modes: &PeerAuthentication) -> Vec<u8> {
    let mode = |mode| match mode {
        model::Mode::Permissive => Mode::Permissive,
        model::Mode::Strict => Mode::Strict,
        model::Mode::Disable => Mode::Disable,
    };
    let base = culvert::PeerAuthentication { mode: mode(modes.mode).into(), ports: [].into() };
    let mut message = base.encode_to_vec();
    for (port, of_port) in &modes.ports {
        let ports = [(u32::from(*port), mode(*of_port).into())].into();
        message.extend(culvert::PeerAuthentication { ports, ..culvert::PeerAuthentication::default() }.encode_to_vec());
    }
    message
}

fn clause(clause: &model::Clause) -> security::Clause {
    security::Clause { matches: clause.matches.iter().map(conditions).collect() }
}

fn conditions(from: &model::Match) -> security::Match {
    let texts = |texts: &[StringMatch]| texts.iter().map(text).collect();
    let blocks = |blocks: &[model::IpBlock]| blocks.iter().map(block).collect();
    let ports = |ports: &[u16]| ports.iter().map(|port| u32::from(*port)).collect();
    let accounts = |accounts: &[model::ServiceAccountMatch]| accounts.iter().map(account).collect();
    security::Match {
        namespaces: texts(&from.namespaces),
        not_namespaces: texts(&from.not_namespaces),
        principals: texts(&from.principals),
        not_principals: texts(&from.not_principals),
        source_ips: blocks(&from.source_ips),
        not_source_ips: blocks(&from.not_source_ips),
        destination_ips: blocks(&from.destination_ips),
        not_destination_ips: blocks(&from.not_destination_ips),
        destination_ports: ports(&from.destination_ports),
        not_destination_ports: ports(&from.not_destination_ports),
        service_accounts: accounts(&from.service_accounts),
        not_service_accounts: accounts(&from.not_service_accounts),
        extensions: Vec::new(),
    }
}

fn text(from: &StringMatch) -> security::StringMatch {
    use security::string_match::MatchType;
    let match_type = match from {
        StringMatch::Exact(text) => MatchType::Exact(text.to_string()),
        StringMatch::Prefix(text) => MatchType::Prefix(text.to_string()),
        StringMatch::Suffix(text) => MatchType::Suffix(text.to_string()),
        StringMatch::Presence => MatchType::Presence(()),
    };
    security::StringMatch { match_type: Some(match_type) }
}

fn block(from: &model::IpBlock) -> security::Address {
    security::Address { address: octets(from.address), length: from.length.into() }
}

fn account(from: &model::ServiceAccountMatch) -> security::ServiceAccountMatch {
    security::ServiceAccountMatch { namespace: from.namespace.to_string(), service_account: from.service_account.to_string() }
}

fn finish(name: Arc<str>, addresses: &[IpAddr], value: Vec<u8>) -> Resource {
    Resource { name, addresses: addresses.to_vec(), node: None, home: None, version: version(&[&value]), value }
}

fn version(content: &[&[u8]]) -> Arc<str> {
    let mut hash = digest::Context::new(&digest::SHA256);
    content.iter().for_each(|part| hash.update(part));
    let version: String = hash.finish().as_ref().iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    version.into()
}
