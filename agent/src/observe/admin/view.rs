//! The model's objects as JSON, sorted so that two dumps can be compared.
//!
//! Enters: a snapshot or an open connection. Leaves: JSON values. Nothing here is a stable interface to the control plane: field
//! names follow the model.

use serde_json::{Value, json};

use super::super::connection::OpenView;
use crate::model::{
    Action, Authorization, Clause, IpBlock, Match, PortMapping, Scope, Service, ServiceAccountMatch, Snapshot, StringMatch,
    TunnelProtocol, Workload, WorkloadType,
};

pub(super) fn mesh(snapshot: &Snapshot) -> Value {
    json!({
        "synced": snapshot.synced(),
        "node": snapshot.node(),
        "trust_domain": snapshot.trust_domain().map(ToString::to_string),
        "default_deny": snapshot.default_deny(),
        "cluster_ranges": snapshot.cluster_ranges().iter().map(ToString::to_string).collect::<Vec<_>>(),
    })
}

pub(super) fn workloads(snapshot: &Snapshot) -> Value {
    let mut all: Vec<_> = snapshot.workloads().collect();
    all.sort_unstable_by(|a, b| a.uid.cmp(&b.uid));
    all.into_iter().map(|item| workload(item)).collect()
}

pub(super) fn services(snapshot: &Snapshot) -> Value {
    let mut all: Vec<_> = snapshot.services().map(|service| (service.key(), service)).collect();
    all.sort_unstable_by(|a, b| a.0.cmp(&b.0));
    all.into_iter().map(|(key, item)| service(snapshot, &key, item)).collect()
}

pub(super) fn policies(snapshot: &Snapshot) -> Value {
    let mut all: Vec<_> = snapshot.policies().collect();
    all.sort_unstable_by_key(|policy| policy.key());
    all.into_iter().map(|item| policy(item)).collect()
}

pub(super) fn connection(open: &OpenView) -> Value {
    let info = &open.info;
    json!({
        "id": open.id,
        "direction": info.direction.as_str(),
        "security": info.security.as_str(),
        "source": {
            "address": info.source_addr.to_string(),
            "workload": info.source.as_ref().map(|workload| &*workload.uid),
            "identity": info.source_identity.as_ref().map(ToString::to_string),
        },
        "destination": {
            "address": info.destination_addr.to_string(),
            "original_address": info.original_dst.map(|address| address.to_string()),
            "service": info.destination_service.as_ref().map(|service| service.key().to_string()),
            "workload": info.destination.as_ref().map(|workload| &*workload.uid),
            "identity": info.destination_identity.as_ref().map(ToString::to_string),
        },
        "bytes_sent": open.bytes_sent,
        "bytes_recv": open.bytes_received,
        "age_ms": u64::try_from(open.age.as_millis()).unwrap_or(u64::MAX),
    })
}

fn workload(workload: &Workload) -> Value {
    let modes = &workload.peer_authentication;
    let port_modes = modes.ports.iter().map(|(port, mode)| (port.to_string(), mode.to_string().into()));
    let services = workload.services.iter().map(|(key, mappings)| (key.to_string(), ports(mappings)));
    json!({
        "uid": &*workload.uid,
        "name": &*workload.name,
        "namespace": workload.identity.namespace(),
        "identity": workload.identity.to_string(),
        "addresses": *workload.addresses,
        "node": &*workload.node,
        "protocol": match workload.protocol {
            TunnelProtocol::None => "NONE",
            TunnelProtocol::Hbone => "HBONE",
        },
        "host_network": workload.host_network,
        "healthy": workload.healthy,
        "workload_name": workload.workload_name(),
        "workload_type": match workload.telemetry.workload_type {
            WorkloadType::Deployment => "deployment",
            WorkloadType::CronJob => "cronjob",
            WorkloadType::Pod => "pod",
            WorkloadType::Job => "job",
        },
        "canonical_name": workload.canonical_name(),
        "canonical_revision": &*workload.telemetry.canonical_revision,
        "services": services.collect::<serde_json::Map<_, _>>(),
        "authorization_policies": texts(&workload.authorization_policies),
        "mode": modes.mode.to_string(),
        "same_node": workload.same_node.to_string(),
        "port_modes": port_modes.collect::<serde_json::Map<_, Value>>(),
    })
}

fn service(snapshot: &Snapshot, key: &str, service: &Service) -> Value {
    let ready =
        snapshot.endpoints(key).map(|endpoints| endpoints.ready.iter().map(|workload| &*workload.uid).collect::<Vec<_>>());
    json!({
        "name": &*service.name,
        "namespace": &*service.namespace,
        "hostname": &*service.hostname,
        "addresses": service.addresses,
        "ports": ports(&service.ports),
        "node_local": service.node_local,
        "unready_too": service.unready_too,
        "ready_endpoints": ready.unwrap_or_default(),
        "endpoints": snapshot.endpoints(key).map_or(0, |endpoints| endpoints.total),
    })
}

fn policy(policy: &Authorization) -> Value {
    let rules = policy.rules.iter().map(|rule| json!({ "clauses": rule.clauses.iter().map(clause).collect::<Vec<_>>() }));
    json!({
        "namespace": &*policy.namespace,
        "name": &*policy.name,
        "scope": match policy.scope {
            Scope::Global => "GLOBAL",
            Scope::Namespace => "NAMESPACE",
            Scope::WorkloadSelector => "WORKLOAD_SELECTOR",
        },
        "action": match policy.action {
            Action::Allow => "ALLOW",
            Action::Deny => "DENY",
            Action::Audit => "AUDIT",
        },
        "dry_run": policy.dry_run,
        "rules": rules.collect::<Vec<_>>(),
    })
}

fn clause(clause: &Clause) -> Value {
    json!({ "matches": clause.matches.iter().map(conditions).collect::<Vec<_>>() })
}

/// The fields that constrain; those that are empty are left out.
fn conditions(conditions: &Match) -> Value {
    let strings = |matches: &[StringMatch]| matches.iter().map(string).collect::<Vec<_>>();
    let accounts = |matches: &[ServiceAccountMatch]| {
        matches.iter().map(|account| format!("{}/{}", account.namespace, account.service_account)).collect::<Vec<_>>()
    };
    let blocks =
        |blocks: &[IpBlock]| blocks.iter().map(|block| format!("{}/{}", block.address, block.length)).collect::<Vec<_>>();
    let numbers = |ports: &[u16]| ports.iter().map(ToString::to_string).collect::<Vec<_>>();
    let fields = [
        ("namespaces", strings(&conditions.namespaces)),
        ("not_namespaces", strings(&conditions.not_namespaces)),
        ("service_accounts", accounts(&conditions.service_accounts)),
        ("not_service_accounts", accounts(&conditions.not_service_accounts)),
        ("principals", strings(&conditions.principals)),
        ("not_principals", strings(&conditions.not_principals)),
        ("source_ips", blocks(&conditions.source_ips)),
        ("not_source_ips", blocks(&conditions.not_source_ips)),
        ("destination_ips", blocks(&conditions.destination_ips)),
        ("not_destination_ips", blocks(&conditions.not_destination_ips)),
        ("destination_ports", numbers(&conditions.destination_ports)),
        ("not_destination_ports", numbers(&conditions.not_destination_ports)),
    ];
    let set = fields.into_iter().filter(|(_, values)| !values.is_empty());
    Value::Object(set.map(|(name, values)| (name.to_owned(), values.into())).collect())
}

/// A string match as a policy writes it.
fn string(value: &StringMatch) -> String {
    match value {
        StringMatch::Exact(text) => text.to_string(),
        StringMatch::Prefix(text) => format!("{text}*"),
        StringMatch::Suffix(text) => format!("*{text}"),
        StringMatch::Presence => "*".to_owned(),
    }
}

fn ports(mappings: &[PortMapping]) -> Value {
    let port = |mapping: &PortMapping| json!({ "service_port": mapping.service_port, "target_port": mapping.target_port });
    mappings.iter().map(port).collect()
}

fn texts(values: &[std::sync::Arc<str>]) -> Vec<&str> {
    values.iter().map(|value| &**value).collect()
}
