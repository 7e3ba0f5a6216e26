//! A connection between two workloads, for tests.

use std::sync::Arc;

use super::{ConnectionInfo, Direction, Observer, Security};
use crate::model::{PortMapping, SameNode, Service, TelemetryNames, TunnelProtocol, Workload, WorkloadType};

/// A pod `<name>-0` of the workload `<name>` in `namespace`.
pub(crate) fn workload(namespace: &str, name: &str, address: &str) -> Workload {
    let identity = format!("spiffe://cluster.local/ns/{namespace}/sa/{name}");
    Workload {
        uid: format!("Kubernetes//Pod/{namespace}/{name}-0").into(),
        name: format!("{name}-0").as_str().into(),
        identity: identity.parse().expect("a legal identity"),
        addresses: address.parse::<std::net::IpAddr>().expect("an address").into(),
        node: "node-a".into(),
        protocol: TunnelProtocol::Hbone,
        host_network: false,
        healthy: true,
        telemetry: Arc::new(TelemetryNames {
            workload: Some(name.into()),
            workload_type: WorkloadType::Deployment,
            canonical_name: None,
            canonical_revision: "v1".into(),
        }),
        services: Arc::default(),
        authorization_policies: Arc::default(),
        peer_authentication: Arc::default(),
        same_node: SameNode::default(),
        pod: None,
    }
}

/// The service `stock.store`.
pub(crate) fn service() -> Service {
    Service {
        name: "stock".into(),
        namespace: "store".into(),
        hostname: "stock.store.svc.cluster.local".into(),
        addresses: vec!["10.96.0.7".parse().expect("an address")],
        ports: vec![PortMapping { service_port: 80, target_port: 8080 }],
        node_local: false,
        unready_too: false,
    }
}

/// `cart` in `shop` dials the service `stock` in `store`, through a tunnel; seen at the source.
pub(crate) fn info() -> ConnectionInfo {
    let source = workload("shop", "cart", "10.1.0.1");
    let destination = workload("store", "stock", "10.1.1.2");
    ConnectionInfo {
        direction: Direction::Outbound,
        source_addr: "10.1.0.1:40000".parse().expect("an address"),
        source_identity: Some(source.identity.clone()),
        destination_addr: "10.1.1.2:8080".parse().expect("an address"),
        original_dst: Some("10.96.0.7:80".parse().expect("an address")),
        destination_identity: Some(destination.identity.clone()),
        destination_service: Some(Arc::new(service())),
        security: Security::MutualTls,
        source: Some(Arc::new(source)),
        destination: Some(Arc::new(destination)),
    }
}

/// The page of metrics.
pub(crate) fn exposition(observer: &Observer) -> String {
    let mut page = String::new();
    observer.expose(&mut page).expect("a string takes it all");
    page
}

/// A plaintext client that nobody knows, seen at the destination.
pub(crate) fn stranger() -> ConnectionInfo {
    let source = "192.0.2.9:50000".parse().expect("an address");
    let dialled = info();
    ConnectionInfo {
        destination: dialled.destination,
        ..ConnectionInfo::new(Direction::Inbound, source, dialled.destination_addr)
    }
}
