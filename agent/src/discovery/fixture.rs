//! Messages for tests, as a controller would send them.

use prost::Message;
use prost_types::Any;

use crate::proto::discovery::{DeltaDiscoveryResponse, Resource};
use crate::proto::{
    ADDRESS_TYPE, AUTHORIZATION_TYPE, MESH_TYPE, PEER_AUTHENTICATION_TYPE, POD_TYPE, SAME_NODE_TYPE, culvert, security, workload,
};

/// A legal pod `name` of namespace `shop` at `address`, which leaves its trust domain to the mesh.
pub(super) fn pod(name: &str, address: [u8; 4]) -> workload::Workload {
    workload::Workload {
        uid: uid(name),
        name: name.to_owned(),
        namespace: "shop".to_owned(),
        addresses: vec![address.to_vec()],
        tunnel_protocol: workload::TunnelProtocol::Hbone as i32,
        service_account: "cart".to_owned(),
        node: "node".to_owned(),
        workload_type: workload::WorkloadType::Pod as i32,
        ..workload::Workload::default()
    }
}

pub(super) fn uid(name: &str) -> String {
    format!("cluster//Pod/shop/{name}")
}

/// A legal service `name` of namespace `shop` at `address`, with port 80.
pub(super) fn service(name: &str, address: [u8; 4]) -> workload::Service {
    workload::Service {
        name: name.to_owned(),
        namespace: "shop".to_owned(),
        hostname: format!("{name}.shop.svc.cluster.local"),
        addresses: vec![workload::NetworkAddress { network: String::new(), address: address.to_vec() }],
        ports: vec![workload::Port { service_port: 80, target_port: 8080 }],
        ..workload::Service::default()
    }
}

pub(super) fn modes(mode: i32, ports: &[(u32, i32)]) -> workload::Extension {
    let message = culvert::PeerAuthentication { mode, ports: ports.iter().copied().collect() };
    workload::Extension {
        name: "peer_authentication".to_owned(),
        config: Some(Any { type_url: PEER_AUTHENTICATION_TYPE.to_owned(), value: message.encode_to_vec() }),
    }
}

pub(super) fn same_node(way: i32) -> workload::Extension {
    let value = culvert::SameNode { way }.encode_to_vec();
    workload::Extension { name: "same_node".to_owned(), config: Some(Any { type_url: SAME_NODE_TYPE.to_owned(), value }) }
}

pub(super) fn pod_uid(uid: &str) -> workload::Extension {
    let value = culvert::Pod { uid: uid.to_owned() }.encode_to_vec();
    workload::Extension { name: "pod_uid".to_owned(), config: Some(Any { type_url: POD_TYPE.to_owned(), value }) }
}

pub(super) fn pod_resource(message: workload::Workload) -> Resource {
    let name = message.uid.clone();
    let address = workload::Address { r#type: Some(workload::address::Type::Workload(message)) };
    resource(ADDRESS_TYPE, &name, address)
}

pub(super) fn service_resource(message: workload::Service) -> Resource {
    let name = format!("{}/{}", message.namespace, message.hostname);
    let address = workload::Address { r#type: Some(workload::address::Type::Service(message)) };
    resource(ADDRESS_TYPE, &name, address)
}

pub(super) fn policy_resource(message: security::Authorization) -> Resource {
    let name = format!("{}/{}", message.namespace, message.name);
    resource(AUTHORIZATION_TYPE, &name, message)
}

pub(super) fn mesh_resource(trust_domain: &str, ranges: &[&str]) -> Resource {
    let cluster_ranges = ranges.iter().map(|range| (*range).to_owned()).collect();
    let mesh = culvert::Mesh { trust_domain: trust_domain.to_owned(), default_deny: true, cluster_ranges };
    resource(MESH_TYPE, "mesh", mesh)
}

pub(super) fn resource(type_url: &str, name: &str, message: impl Message) -> Resource {
    Resource {
        version: "1".to_owned(),
        resource: Some(Any { type_url: type_url.to_owned(), value: message.encode_to_vec() }),
        name: name.to_owned(),
        aliases: Vec::new(),
    }
}

pub(super) fn response(type_url: &str, resources: Vec<Resource>, removed: &[&str]) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        system_version_info: String::new(),
        resources,
        type_url: type_url.to_owned(),
        nonce: "nonce".to_owned(),
        removed_resources: removed.iter().map(|name| (*name).to_owned()).collect(),
    }
}
