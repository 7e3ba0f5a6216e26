//! The bytes that other implementations read, by the published field numbers (istio/ztunnel: proto/workload.proto,
//! proto/authorization.proto, proto/citadel.proto; envoyproxy/data-plane-api: service/discovery/v3/discovery.proto).
//!
//! The reader here knows wire types only, so that a change of the generated code shows.

use std::fmt::Write as _;

use prost::Message;
use prost_types::{Any, Struct, Value, value::Kind};

use crate::controller::index::tests::World;
use crate::controller::index::{self, ResourceKind};
use crate::proto::ca::{IstioCertificateRequest, IstioCertificateResponse, istio_certificate_service_server};
use crate::proto::discovery::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Resource, Status, aggregated_discovery_service_server,
};
use crate::proto::security::{self, Match, ServiceAccountMatch, StringMatch, string_match::MatchType};
use crate::proto::workload::{
    Extension, LoadBalancing, NetworkAddress, NetworkMode, Port, PortList, Service, TunnelProtocol, Workload, WorkloadStatus,
    WorkloadType,
};
use crate::proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE};

const SHOP: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Pod
metadata:
  name: web-7d4f-x2
  namespace: shop
  labels: {app: web, version: v2, pod-template-hash: 7d4f}
  ownerReferences: [{apiVersion: apps/v1, kind: ReplicaSet, name: web-7d4f, uid: u}]
spec: {nodeName: node-a, serviceAccountName: web, containers: [{name: a, ports: [{name: http, containerPort: 8080}]}]}
status: {podIP: 10.1.0.2, conditions: [{type: Ready, status: 'False'}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {clusterIP: 10.96.0.9, internalTrafficPolicy: Local, selector: {app: web}, ports: [{port: 80, targetPort: http}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: some, namespace: shop, annotations: {istio.io/dry-run: 'true'}}
spec:
  selector: {matchLabels: {app: web}}
  action: DENY
  rules:
  - from: [{source: {principals: ['*/ns/shop/sa/cart'], notNamespaces: [bank], ipBlocks: [10.0.0.0/8], serviceAccounts: [shop/cart]}}]
    to: [{operation: {ports: ['8080'], notPorts: ['9090']}}]
";

/// The value of the resource of this name.
fn resource(kind: ResourceKind, name: &str) -> Vec<u8> {
    let mut world = World::of("example.org", SHOP);
    world.resources.remove(&(kind, name.to_owned())).unwrap_or_else(|| panic!("no {name}")).value
}

/// Field numbers and values, one a line, messages indented. Which fields are messages is said by their paths.
fn dump(bytes: &[u8], messages: &[&str]) -> String {
    let mut text = String::new();
    write_fields(bytes, messages, "", &mut text);
    text
}

fn write_fields(mut bytes: &[u8], messages: &[&str], path: &str, text: &mut String) {
    while !bytes.is_empty() {
        let key = varint(&mut bytes);
        let path = if path.is_empty() { (key >> 3).to_string() } else { format!("{path}.{}", key >> 3) };
        match key & 7 {
            0 => writeln!(text, "{path}: {}", varint(&mut bytes)).unwrap(),
            2 => {
                let length = usize::try_from(varint(&mut bytes)).unwrap();
                let (value, rest) = bytes.split_at(length);
                bytes = rest;
                match std::str::from_utf8(value) {
                    _ if messages.contains(&path.as_str()) => {
                        writeln!(text, "{path}").unwrap();
                        write_fields(value, messages, &path, text);
                    }
                    Ok(value) if value.chars().all(|c| !c.is_control()) => writeln!(text, "{path}: {value:?}").unwrap(),
                    _ => writeln!(text, "{path}: {value:?}").unwrap(),
                }
            }
            other => panic!("wire type {other} at {path}"),
        }
    }
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let mut value = 0;
    for shift in (0..).step_by(7) {
        let (first, rest) = bytes.split_first().unwrap();
        *bytes = rest;
        value |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            break;
        }
    }
    value
}

#[track_caller]
fn check(bytes: &[u8], messages: &[&str], expected: &str) {
    let lines = |text: &str| text.trim().lines().map(|line| line.trim().to_owned()).collect::<Vec<_>>();
    assert_eq!(lines(&dump(bytes, messages)), lines(expected));
}

#[test]
fn a_workload_has_the_published_numbers() {
    let bytes = resource(ResourceKind::Address, "Kubernetes//Pod/shop/web-7d4f-x2");
    let expected = r#"
        1
        1.1: "web-7d4f-x2"
        1.2: "shop"
        1.3: [10, 1, 0, 2]
        1.5: 1
        1.6: "example.org"
        1.7: "web"
        1.9: "node-a"
        1.10: "web"
        1.11: "v2"
        1.13: "web"
        1.16: "shop/some"
        1.17: 1
        1.18: "Kubernetes"
        1.20: "Kubernetes//Pod/shop/web-7d4f-x2"
        1.22
        1.22.1: "shop/web.shop.svc.cluster.local"
        1.22.2
        1.22.2.1
        1.22.2.1.1: 80
        1.22.2.1.2: 8080
    "#;
    check(&bytes, &["1", "1.22", "1.22.2", "1.22.2.1"], expected);
}

#[test]
fn a_pod_has_its_uid_where_it_runs() {
    let key = (ResourceKind::Address, "Kubernetes//Pod/shop/web-7d4f-x2".to_owned());
    let placed = SHOP.replace("  name: web-7d4f-x2", "  uid: 37182395-691d\n  name: web-7d4f-x2");
    let unplaced = placed.replace("podIP: 10.1.0.2, ", "");
    let [placed, unplaced] =
        [placed, unplaced].map(|objects| World::of("example.org", &objects).resources.remove(&key).expect("a pod"));
    let extension = [
        "1.26",
        "1.26.1: \"pod_uid\"",
        "1.26.2",
        "1.26.2.1: \"type.googleapis.com/culvert.v1.Pod\"",
        "1.26.2.2",
        "1.26.2.2.1: \"37182395-691d\"",
    ];
    let text = |resource: &index::Resource| dump(&resource.value_for("node-a"), &["1", "1.26", "1.26.2", "1.26.2.2"]);
    assert!(text(&placed).ends_with(&(extension.join("\n") + "\n")), "{}", text(&placed));
    assert!(
        text(&unplaced).ends_with(&(extension.join("\n") + "\n")) && !text(&unplaced).contains("1.3:"),
        "{}",
        text(&unplaced)
    );
    assert_eq!(placed.value_for("node-b"), resource(key.0, &key.1));
}

#[test]
fn a_service_has_the_published_numbers() {
    let bytes = resource(ResourceKind::Address, "shop/web.shop.svc.cluster.local");
    let expected = r#"
        2
        2.1: "web"
        2.2: "shop"
        2.3: "web.shop.svc.cluster.local"
        2.4
        2.4.2: [10, 96, 0, 9]
        2.5
        2.5.1: 80
        2.8
        2.8.1: [4]
        2.8.2: 1
        2.9: 1
    "#;
    check(&bytes, &["2", "2.4", "2.5", "2.8"], expected);
}

#[test]
fn an_authorization_has_the_published_numbers() {
    let bytes = resource(ResourceKind::Authorization, "shop/some");
    let matches = "5.1.2";
    let messages = ["5", "5.1", matches, "5.1.2.2", "5.1.2.3", "5.1.2.5", "5.1.2.11"];
    // 8080 and 9090 are packed.
    let expected = r#"
        1: "some"
        2: "shop"
        3: 2
        4: 1
        5
        5.1
        5.1.2
        5.1.2.2
        5.1.2.2.1: "bank"
        5.1.2.3
        5.1.2.3.3: "/ns/shop/sa/cart"
        5.1.2.5
        5.1.2.5.1: [10, 0, 0, 0]
        5.1.2.5.2: 8
        5.1.2.11
        5.1.2.11.1: "shop"
        5.1.2.11.2: "cart"
        5.1
        5.1.2
        5.1.2.9: [144, 63]
        5.1.2.10: [130, 71]
        6: 1
    "#;
    check(&bytes, &messages, expected);
}

#[test]
fn every_field_of_a_workload_has_its_published_number() {
    let config = Some(Any { type_url: "t".to_owned(), value: vec![0] });
    let workload = Workload {
        name: "name".to_owned(),
        namespace: "namespace".to_owned(),
        addresses: vec![vec![10, 1, 0, 2], vec![10, 1, 0, 3]],
        network: "network".to_owned(),
        tunnel_protocol: TunnelProtocol::Hbone.into(),
        trust_domain: "domain".to_owned(),
        service_account: "account".to_owned(),
        node: "node".to_owned(),
        canonical_name: "canonical".to_owned(),
        canonical_revision: "revision".to_owned(),
        workload_type: WorkloadType::Job.into(),
        workload_name: "maker".to_owned(),
        native_tunnel: true,
        authorization_policies: vec!["policy".to_owned()],
        status: WorkloadStatus::Unhealthy.into(),
        cluster_id: "cluster".to_owned(),
        uid: "uid".to_owned(),
        hostname: "hostname".to_owned(),
        services: [("service".to_owned(), PortList { ports: vec![Port { service_port: 80, target_port: 81 }] })].into(),
        network_mode: NetworkMode::HostNetwork.into(),
        extensions: vec![Extension { name: "extension".to_owned(), config }],
    };
    let expected = r#"
        1: "name"
        2: "namespace"
        3: [10, 1, 0, 2]
        3: [10, 1, 0, 3]
        4: "network"
        5: 1
        6: "domain"
        7: "account"
        9: "node"
        10: "canonical"
        11: "revision"
        12: 3
        13: "maker"
        14: 1
        16: "policy"
        17: 1
        18: "cluster"
        20: "uid"
        21: "hostname"
        22
        22.1: "service"
        22.2
        22.2.1
        22.2.1.1: 80
        22.2.1.2: 81
        25: 1
        26
        26.1: "extension"
        26.2
        26.2.1: "t"
        26.2.2: [0]
    "#;
    check(&workload.encode_to_vec(), &["22", "22.2", "22.2.1", "26", "26.2"], expected);
    assert_eq!([WorkloadType::Deployment, WorkloadType::Cronjob, WorkloadType::Pod].map(i32::from), [0, 1, 2]);
    assert_eq!((TunnelProtocol::None as i32, WorkloadStatus::Healthy as i32, NetworkMode::Standard as i32), (0, 0, 0));
}

#[test]
fn every_field_of_a_service_has_its_published_number() {
    let service = Service {
        name: "name".to_owned(),
        namespace: "namespace".to_owned(),
        hostname: "hostname".to_owned(),
        addresses: vec![NetworkAddress { network: "network".to_owned(), address: vec![10, 96, 0, 9] }],
        ports: vec![Port { service_port: 80, target_port: 81 }],
        subject_alt_names: vec!["san".to_owned()],
        load_balancing: Some(LoadBalancing { routing_preference: vec![4], mode: 2, health_policy: 1 }),
        ip_families: 3,
    };
    let expected = r#"
        1: "name"
        2: "namespace"
        3: "hostname"
        4
        4.1: "network"
        4.2: [10, 96, 0, 9]
        5
        5.1: 80
        5.2: 81
        6: "san"
        8
        8.1: [4]
        8.2: 2
        8.3: 1
        9: 3
    "#;
    check(&service.encode_to_vec(), &["4", "5", "8"], expected);
}

#[test]
fn every_condition_of_an_authorization_has_its_published_number() {
    let text = |kind| vec![StringMatch { match_type: Some(kind) }];
    let block = |address: [u8; 4]| vec![security::Address { address: address.to_vec(), length: 32 }];
    let account = |name: &str| vec![ServiceAccountMatch { namespace: "n".to_owned(), service_account: name.to_owned() }];
    let condition = Match {
        namespaces: text(MatchType::Exact("1".to_owned())),
        not_namespaces: text(MatchType::Prefix("2".to_owned())),
        principals: text(MatchType::Suffix("3".to_owned())),
        not_principals: text(MatchType::Presence(())),
        source_ips: block([0, 0, 0, 5]),
        not_source_ips: block([0, 0, 0, 6]),
        destination_ips: block([0, 0, 0, 7]),
        not_destination_ips: block([0, 0, 0, 8]),
        destination_ports: vec![9],
        not_destination_ports: vec![10],
        service_accounts: account("11"),
        not_service_accounts: account("12"),
        extensions: vec![vec![10, 2, b'1', b'3']],
    };
    let expected = r#"
        1
        1.1: "1"
        2
        2.2: "2"
        3
        3.3: "3"
        4
        4.4: ""
        5
        5.1: [0, 0, 0, 5]
        5.2: 32
        6
        6.1: [0, 0, 0, 6]
        6.2: 32
        7
        7.1: [0, 0, 0, 7]
        7.2: 32
        8
        8.1: [0, 0, 0, 8]
        8.2: 32
        9: [9]
        10: [10]
        11
        11.1: "n"
        11.2: "11"
        12
        12.1: "n"
        12.2: "12"
        13
        13.1: "13"
    "#;
    check(&condition.encode_to_vec(), &["1", "2", "3", "4", "5", "6", "7", "8", "11", "12", "13"], expected);
    assert_eq!([security::Action::Allow, security::Action::Deny].map(i32::from), [0, 1]);
    assert_eq!(
        [security::Scope::Global, security::Scope::Namespace, security::Scope::WorkloadSelector].map(i32::from),
        [0, 1, 2]
    );
}

#[test]
fn services_and_types_have_the_published_names() {
    assert_eq!(istio_certificate_service_server::SERVICE_NAME, "istio.v1.auth.IstioCertificateService");
    assert_eq!(aggregated_discovery_service_server::SERVICE_NAME, "envoy.service.discovery.v3.AggregatedDiscoveryService");
    assert_eq!(ADDRESS_TYPE, "type.googleapis.com/istio.workload.Address");
    assert_eq!(AUTHORIZATION_TYPE, "type.googleapis.com/istio.security.Authorization");
}

#[test]
fn the_certificate_service_has_the_published_numbers() {
    let identity = Value { kind: Some(Kind::StringValue("spiffe://td/ns/a/sa/b".to_owned())) };
    let request = IstioCertificateRequest {
        csr: "csr".to_owned(),
        validity_duration: 300,
        metadata: Some(Struct { fields: [("ImpersonatedIdentity".to_owned(), identity)].into() }),
    };
    let expected = r#"
        1: "csr"
        3: 300
        4
        4.1
        4.1.1: "ImpersonatedIdentity"
        4.1.2
        4.1.2.3: "spiffe://td/ns/a/sa/b"
    "#;
    check(&request.encode_to_vec(), &["4", "4.1", "4.1.2"], expected);
    let response = IstioCertificateResponse { cert_chain: vec!["leaf".to_owned(), "root".to_owned()] };
    check(&response.encode_to_vec(), &[], "1: \"leaf\"\n1: \"root\"");
}

#[test]
fn discovery_has_the_published_numbers() {
    let request = DeltaDiscoveryRequest {
        node: Some(Node { id: "n".to_owned(), cluster: "c".to_owned(), metadata: None }),
        type_url: "t".to_owned(),
        resource_names_subscribe: vec!["s".to_owned()],
        resource_names_unsubscribe: vec!["u".to_owned()],
        initial_resource_versions: [("r".to_owned(), "v".to_owned())].into(),
        response_nonce: "o".to_owned(),
        error_detail: Some(Status { code: 3, message: "m".to_owned() }),
    };
    let expected = r#"
        1
        1.1: "n"
        1.2: "c"
        2: "t"
        3: "s"
        4: "u"
        5
        5.1: "r"
        5.2: "v"
        6: "o"
        7
        7.1: 3
        7.2: "m"
    "#;
    check(&request.encode_to_vec(), &["1", "5", "7"], expected);
    let response = DeltaDiscoveryResponse {
        system_version_info: "i".to_owned(),
        resources: vec![Resource {
            version: "v".to_owned(),
            resource: Some(Any { type_url: "t".to_owned(), value: vec![0] }),
            name: "n".to_owned(),
            aliases: vec!["a".to_owned()],
        }],
        type_url: "t".to_owned(),
        nonce: "o".to_owned(),
        removed_resources: vec!["g".to_owned()],
    };
    let expected = r#"
        1: "i"
        2
        2.1: "v"
        2.2
        2.2.1: "t"
        2.2.2: [0]
        2.3: "n"
        2.4: "a"
        4: "t"
        5: "o"
        6: "g"
    "#;
    check(&response.encode_to_vec(), &["2", "2.2"], expected);
}
