//! A pod and all that bears on it, put together as the workload that agents hear of.

use std::collections::BTreeMap;
use std::sync::Arc;

use ipnet::IpNet;

use super::resource::{self, Resource, octets};
use super::service::{hostname, selects};
use super::{Index, ObjectName, PodRecord};
use crate::model::SameNode;
use crate::proto::culvert::Mesh;
use crate::proto::workload::{NetworkMode, Port, TunnelProtocol, Workload, WorkloadStatus};

impl Index {
    /// The workload of a pod; none when there is no such pod, it has no address any more, or an older pod has its address. Its node is told
    /// its UID, and nobody else: a sandbox that is made anew may have another's address. Of one that has no address yet its node alone is
    /// told at all: by its UID, or if it will be in the mesh, so that the node knows whom to expect. Whether it is in the mesh may be its
    /// namespace's to say: nothing is said of it before that is known.
    pub(super) fn workload(&self, name: &ObjectName) -> Option<Resource> {
        let pod = self.pods.get(name)?;
        if !pod.live || pod.claimed().iter().any(|address| self.owner(*address) != Some(name)) {
            return None;
        }
        if self.settings.namespaces_told && !self.namespaces.contains_key(&name.namespace) {
            return None;
        }
        let enrolled = self.enrolled(name, pod);
        let placed = !pod.addresses.is_empty();
        if !placed && (pod.node.is_empty() || pod.host_network || !enrolled && pod.uid.is_none()) {
            return None;
        }
        let (services, ready) = self.services_of(name, pod);
        let or_empty = |text: &str, default: &str| if text == default { String::new() } else { text.to_owned() };
        let canonical = ["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"];
        let revision = ["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"];
        let trust_domain = self.settings.trust_domain.as_str();
        let wire = Workload {
            name: name.name.to_string(),
            namespace: name.namespace.to_string(),
            addresses: pod.addresses.iter().map(|address| octets(*address)).collect(),
            network: String::new(),
            tunnel_protocol: if enrolled { TunnelProtocol::Hbone } else { TunnelProtocol::None }.into(),
            trust_domain: or_empty(trust_domain, "cluster.local"),
            service_account: or_empty(&pod.service_account, "default"),
            node: pod.node.to_string(),
            canonical_name: pod.label(&canonical).unwrap_or(&pod.maker.1).to_owned(),
            canonical_revision: pod.label(&revision).unwrap_or("latest").to_owned(),
            workload_type: pod.maker.0.into(),
            workload_name: pod.maker.1.clone(),
            native_tunnel: false,
            authorization_policies: self.policies.selecting(&name.namespace, &pod.labels),
            status: if ready && pod.ready { WorkloadStatus::Healthy } else { WorkloadStatus::Unhealthy }.into(),
            cluster_id: resource::CLUSTER.to_owned(),
            uid: resource::uid(name).to_string(),
            hostname: String::new(),
            services: [].into(),
            network_mode: if pod.host_network { NetworkMode::HostNetwork } else { NetworkMode::Standard }.into(),
            extensions: Vec::new(),
        };
        let modes = self.policies.modes(&name.namespace, &pod.labels);
        let way = if enrolled { self.same_node(name, pod) } else { SameNode::default() };
        let resource = resource::workload(resource::uid(name), pod.claimed(), wire, &services, &modes, way);
        let resource = match &pod.uid {
            Some(uid) if !pod.host_network => resource.known_at_home(&pod.node, uid),
            Some(_) | None => resource,
        };
        Some(Resource { node: (!placed).then(|| Arc::clone(&pod.node)), ..resource })
    }

    /// The mesh-wide settings.
    pub(super) fn mesh(&self) -> Resource {
        let mut ranges: Vec<_> = self.ranges().collect();
        ranges.sort_unstable();
        ranges.dedup();
        resource::mesh(&Mesh {
            trust_domain: self.settings.trust_domain.to_string(),
            default_deny: self.settings.default_deny,
            cluster_ranges: ranges.iter().map(ToString::to_string).collect(),
        })
    }

    /// The ranges of the cluster's addresses, in no order and perhaps more than once.
    pub(super) fn ranges(&self) -> impl Iterator<Item = IpNet> {
        self.nodes.values().flatten().chain(&self.settings.cluster_ranges).copied()
    }

    /// `namespace/hostname` of a service.
    pub(super) fn service_key(&self, name: &ObjectName) -> Arc<str> {
        format!("{}/{}", name.namespace, hostname(name, &self.settings.cluster_domain)).into()
    }

    /// The services that a pod serves, with its own ports, and whether all of them find it ready.
    fn services_of(&self, name: &ObjectName, pod: &PodRecord) -> (BTreeMap<String, Vec<Port>>, bool) {
        let mut services: BTreeMap<String, Vec<Port>> = BTreeMap::new();
        let mut all_ready = true;
        for (slice, ready) in self.slices.of_pod(name, pod.claimed()) {
            let Some(service) = self.services.get(&slice.service) else { continue };
            all_ready &= ready;
            let ports = services.entry(self.service_key(&slice.service).to_string()).or_default();
            for port in service.slice_ports(slice, Some(pod)) {
                if !ports.contains(&port) {
                    ports.push(port);
                }
            }
        }
        let first = ObjectName { namespace: Arc::clone(&name.namespace), name: "".into() };
        let in_namespace = self.services.range(first..).take_while(|(service, _)| service.namespace == name.namespace);
        for (service, record) in in_namespace {
            let by_selector = !record.selector.is_empty() && !self.slices.serves(service);
            if by_selector && selects(&record.selector, &pod.labels) {
                services.insert(self.service_key(service).to_string(), record.selected_ports(pod));
            }
        }
        (services, all_ready)
    }
}
