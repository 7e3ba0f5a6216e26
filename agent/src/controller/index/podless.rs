//! Endpoints that are no pods: the API server's own, or whatever else a service stands for that somebody wrote a slice for.
//!
//! Agents hear of each as a workload that takes no tunnels. Otherwise a service with nothing but such endpoints would look as if it
//! had none, and be refused instead of being left to the node. The workload claims no address: whoever dials that address directly
//! is none of the mesh's business, and a pod that turns up with it is a pod.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use super::resource::{self, Resource};
use super::{Index, ObjectName};
use crate::model::{PeerAuthentication, SameNode};
use crate::proto::workload::{NetworkMode, TunnelProtocol, Workload, WorkloadStatus};

/// An address behind a service.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Podless {
    pub(super) service: ObjectName,
    pub(super) address: IpAddr,
}

impl Podless {
    /// Its UID in the mesh.
    pub(super) fn uid(&self) -> Arc<str> {
        let Self { service, address } = self;
        format!("{}//EndpointSlice/{}/{}/{address}", resource::CLUSTER, service.namespace, service.name).into()
    }
}

impl Index {
    /// The workload of an endpoint; none when the service or the endpoint is gone, or the
    /// address is a pod's or may be one's of which nobody has told yet: that one may take nothing but tunnels.
    pub(super) fn podless(&self, endpoint: &Podless) -> Option<Resource> {
        let Podless { service, address } = endpoint;
        let record = self.services.get(service)?;
        let slices = self.slices.of_address(service, *address);
        let of_pods = self.ranges().any(|range| range.contains(address));
        if slices.is_empty() || of_pods || self.claims.contains_key(address) {
            return None;
        }
        let mut ports = Vec::new();
        let mut all_ready = true;
        for (slice, ready) in slices {
            all_ready &= ready;
            for port in record.slice_ports(slice, None) {
                if !ports.contains(&port) {
                    ports.push(port);
                }
            }
        }
        let wire = Workload {
            name: address.to_string(),
            namespace: service.namespace.to_string(),
            addresses: vec![resource::octets(*address)],
            tunnel_protocol: TunnelProtocol::None.into(),
            canonical_name: service.name.to_string(),
            canonical_revision: "latest".to_owned(),
            workload_name: service.name.to_string(),
            status: if all_ready { WorkloadStatus::Healthy } else { WorkloadStatus::Unhealthy }.into(),
            cluster_id: resource::CLUSTER.to_owned(),
            uid: endpoint.uid().to_string(),
            // What keeps agents from taking the address for the workload's own.
            network_mode: NetworkMode::HostNetwork.into(),
            ..Workload::default()
        };
        let services = BTreeMap::from([(self.service_key(service).to_string(), ports)]);
        Some(resource::workload(endpoint.uid(), &[], wire, &services, &PeerAuthentication::default(), SameNode::default()))
    }
}
