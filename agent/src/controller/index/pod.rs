//! What the mesh needs to know of a pod and of a node.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::jiff::Timestamp;

use super::same_node::labelled;
use crate::model::SameNode;
pub(super) use crate::model::enrolment;
use crate::proto::workload::WorkloadType;

/// A pod, reduced to what the mesh needs.
#[derive(Clone, Debug)]
pub(super) struct PodRecord {
    pub(super) labels: BTreeMap<String, String>,
    pub(super) node: Arc<str>,
    pub(super) addresses: Vec<IpAddr>,
    /// What the pod's node knows it by.
    pub(super) uid: Option<Box<str>>,
    pub(super) service_account: Arc<str>,
    pub(super) host_network: bool,
    /// It has not run to its end.
    pub(super) live: bool,
    pub(super) ready: bool,
    pub(super) created: Option<Timestamp>,
    /// What the pod's own labels say of enrolment.
    pub(super) enrolment: Option<bool>,
    /// What the pod's own label says of the way to other pods of its node.
    pub(super) same_node: Option<SameNode>,
    pub(super) maker: (WorkloadType, String),
    /// TCP ports by name.
    pub(super) ports: BTreeMap<String, u16>,
}

impl PodRecord {
    pub(super) fn of(pod: &Pod) -> Self {
        let labels = pod.metadata.labels.clone().unwrap_or_default();
        let spec = pod.spec.as_ref();
        let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
        fn text(text: Option<&String>) -> Option<&str> {
            text.map(String::as_str).filter(|text| !text.is_empty())
        }
        let addresses = addresses(pod);
        let uid = text(pod.metadata.uid.as_ref());
        let account = spec.and_then(|spec| text(spec.service_account_name.as_ref()).or(text(spec.service_account.as_ref())));
        Self {
            node: spec.and_then(|spec| text(spec.node_name.as_ref())).unwrap_or_default().into(),
            addresses,
            uid: uid.map(Into::into),
            service_account: account.unwrap_or("default").into(),
            host_network: spec.and_then(|spec| spec.host_network).unwrap_or(false),
            live: !matches!(phase, Some("Succeeded" | "Failed")),
            ready: ready(pod),
            created: pod.metadata.creation_timestamp.as_ref().map(|time| time.0),
            enrolment: enrolment(&labels),
            same_node: labelled(&labels),
            maker: maker(pod, &labels),
            ports: ports(pod),
            labels,
        }
    }

    /// The addresses that are the pod's own: none that it shares with its node, none once it has ended.
    pub(super) fn claimed(&self) -> &[IpAddr] {
        if self.host_network || !self.live { &[] } else { &self.addresses }
    }

    /// The first of these labels that is set.
    pub(super) fn label(&self, keys: &[&str]) -> Option<&str> {
        keys.iter().find_map(|key| self.labels.get(*key)).map(String::as_str)
    }
}

/// The ranges of a node's pods.
pub(super) fn node_ranges(node: &Node) -> Vec<IpNet> {
    let spec = node.spec.as_ref();
    let cidrs = spec.into_iter().flat_map(|spec| spec.pod_cidrs.iter().flatten().chain(&spec.pod_cidr));
    let mut ranges: Vec<_> = cidrs.filter_map(|cidr| cidr.parse::<IpNet>().ok()).map(|range| range.trunc()).collect();
    ranges.sort_unstable();
    ranges.dedup();
    ranges
}

fn addresses(pod: &Pod) -> Vec<IpAddr> {
    let Some(status) = &pod.status else { return Vec::new() };
    let several = status.pod_ips.iter().flatten().map(|ip| &ip.ip);
    let mut addresses: Vec<IpAddr> = Vec::new();
    for address in several.chain(&status.pod_ip).filter_map(|text| text.parse::<IpAddr>().ok()) {
        let address = address.to_canonical();
        if addresses.iter().all(|known| known.is_ipv4() != address.is_ipv4()) {
            addresses.push(address);
        }
    }
    addresses
}

fn ready(pod: &Pod) -> bool {
    let Some(status) = &pod.status else { return true };
    match status.conditions.as_deref() {
        None | Some([]) => status.phase.as_deref() != Some("Pending"),
        Some(conditions) => conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True"),
    }
}

fn ports(pod: &Pod) -> BTreeMap<String, u16> {
    let containers = pod.spec.iter().flat_map(|spec| spec.containers.iter().chain(spec.init_containers.iter().flatten()));
    let ports = containers.flat_map(|container| container.ports.iter().flatten());
    let tcp = ports.filter(|port| port.protocol.as_deref().unwrap_or("TCP") == "TCP");
    let mut named = BTreeMap::new();
    for port in tcp {
        if let (Some(name), Ok(number)) = (&port.name, u16::try_from(port.container_port)) {
            named.entry(name.clone()).or_insert(number);
        }
    }
    named
}

/// What made the pod, as far as its owner tells.
fn maker(pod: &Pod, labels: &BTreeMap<String, String>) -> (WorkloadType, String) {
    let own = || (WorkloadType::Pod, pod.metadata.name.clone().unwrap_or_default());
    let owners = pod.metadata.owner_references.as_deref().unwrap_or_default();
    let Some(owner) = owners.iter().find(|owner| owner.controller == Some(true)).or(owners.first()) else { return own() };
    match owner.kind.as_str() {
        "ReplicaSet" => {
            let suffix = labels.get("pod-template-hash").map(|hash| format!("-{hash}"));
            let name = suffix.and_then(|suffix| owner.name.strip_suffix(&suffix)).unwrap_or(&owner.name);
            (WorkloadType::Deployment, name.to_owned())
        }
        "Deployment" | "StatefulSet" | "DaemonSet" | "ReplicationController" => (WorkloadType::Deployment, owner.name.clone()),
        "Job" => match owner.name.rsplit_once('-') {
            // The scheduler names a CronJob's jobs after the minute that they are for.
            Some((name, minute)) if minute.len() >= 8 && minute.bytes().all(|byte| byte.is_ascii_digit()) => {
                (WorkloadType::Cronjob, name.to_owned())
            }
            _ => (WorkloadType::Job, owner.name.clone()),
        },
        _ => own(),
    }
}
