//! Each field's legal forms, and each illegal one by the field that the error names.

use prost_types::Any;

use super::super::fixture::{modes, pod, pod_resource, pod_uid, policy_resource, resource, same_node, service, service_resource};
use super::*;
use crate::model::{Mode, SameNode};
use crate::proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE, MESH_TYPE};

#[test]
fn a_pod_becomes_a_workload() {
    let mut message = pod("a", [10, 0, 0, 1]);
    message.addresses.push([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1].to_vec());
    message.extensions.push(modes(1, &[(8080, 2)]));
    message.authorization_policies.push("shop/allow".to_owned());
    let port = workload::Port { service_port: 80, target_port: 8080 };
    message.services.insert("shop/web.shop.svc".to_owned(), workload::PortList { ports: vec![port] });
    let Ok(Decoded::Workload { workload, implicit_domain: true }) = decode_address(&pod_resource(message)) else {
        panic!("a legal pod")
    };
    assert_eq!(workload.identity.to_string(), "spiffe://cluster.local/ns/shop/sa/cart");
    assert_eq!(*workload.addresses, ["10.0.0.1", "fd00::1"].map(|text| text.parse::<IpAddr>().expect("legal")));
    assert_eq!(
        (workload.peer_authentication.mode_of(1), workload.peer_authentication.mode_of(8080)),
        (Mode::Strict, Mode::Disable)
    );
    assert_eq!(workload.target_port("shop/web.shop.svc", 80), Some(8080));
    assert!(workload.enrolled() && workload.healthy);
}

#[test]
fn what_a_pod_leaves_out_has_its_documented_meaning() {
    let mut message = pod("a", [10, 0, 0, 1]);
    message.service_account = String::new();
    message.addresses = vec![[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 7].to_vec()];
    let Ok(Decoded::Workload { workload, .. }) = decode_address(&pod_resource(message)) else { panic!("a legal pod") };
    assert_eq!(workload.identity.service_account(), "default");
    assert_eq!(*workload.addresses, [IpAddr::from([10, 0, 0, 7])], "an IPv4-mapped address is the IPv4 address");
    let mut message = pod("a", [10, 0, 0, 1]);
    message.trust_domain = "elsewhere".to_owned();
    let Ok(Decoded::Workload { workload, implicit_domain: false }) = decode_address(&pod_resource(message)) else {
        panic!("a legal pod")
    };
    assert_eq!(workload.identity.trust_domain().as_str(), "elsewhere");
}

#[test]
fn telemetry_has_the_names_that_were_given() {
    let names = |workload_name: &str, canonical_name: &str| {
        let (workload_name, canonical_name) = (workload_name.to_owned(), canonical_name.to_owned());
        let message = workload::Workload { workload_name, canonical_name, ..pod("a", [10, 0, 0, 1]) };
        let Ok(Decoded::Workload { workload, .. }) = decode_address(&pod_resource(message)) else { panic!("a legal pod") };
        assert_eq!(&*workload.name, "a");
        (workload.workload_name().to_owned(), workload.canonical_name().to_owned())
    };
    for (workload_name, canonical_name) in
        [("a", "a"), ("a", "b"), ("b", "a"), ("b", "b"), ("b", "c"), ("", "a"), ("a", ""), ("", "")]
    {
        assert_eq!(names(workload_name, canonical_name), (workload_name.to_owned(), canonical_name.to_owned()));
    }
    let stranger = workload::Workload { uid: "elsewhere".to_owned(), ..pod("a", [10, 0, 0, 1]) };
    let Ok(Decoded::Workload { workload, .. }) = decode_address(&pod_resource(stranger)) else { panic!("a legal pod") };
    assert_eq!((&*workload.uid, &*workload.name), ("elsewhere", "a"), "a UID may be of any form");
}

#[test]
fn each_bad_field_of_a_pod_is_named() {
    let check = |field: &str, spoil: &dyn Fn(&mut workload::Workload)| {
        let mut message = pod("a", [10, 0, 0, 1]);
        spoil(&mut message);
        let error = decode_address(&pod_resource(message)).expect_err(field);
        assert_eq!(error.field, field);
        assert!(error.to_string().contains(&format!("`{field}`")), "{error}");
    };
    let ports = |service_port, target_port| workload::PortList { ports: vec![workload::Port { service_port, target_port }] };
    check("uid", &|pod| pod.uid.clear());
    check("namespace, service_account", &|pod| pod.namespace = "a/b".to_owned());
    check("namespace, service_account", &|pod| pod.namespace.clear());
    check("namespace, service_account", &|pod| pod.service_account = "a b".to_owned());
    check("trust_domain", &|pod| pod.trust_domain = "Not A Domain".to_owned());
    check("addresses[0]", &|pod| pod.addresses = vec![vec![1, 2, 3]]);
    check("addresses[1]", &|pod| pod.addresses.push(vec![10, 0, 0, 2]));
    check("tunnel_protocol", &|pod| pod.tunnel_protocol = 7);
    check("network_mode", &|pod| pod.network_mode = -1);
    check("status", &|pod| pod.status = 2);
    check("workload_type", &|pod| pod.workload_type = 9);
    check("authorization_policies[0]", &|pod| pod.authorization_policies = vec!["nameless".to_owned()]);
    check("services[web]", &|pod| drop(pod.services.insert("web".to_owned(), ports(80, 80))));
    check("services[a/b].ports[0].service_port", &|pod| drop(pod.services.insert("a/b".to_owned(), ports(65536, 80))));
    check("services[a/b].ports[0].target_port", &|pod| drop(pod.services.insert("a/b".to_owned(), ports(80, 0))));
    check("extensions[peer_authentication].mode", &|pod| pod.extensions = vec![modes(3, &[])]);
    check("extensions[peer_authentication].ports[0]", &|pod| pod.extensions = vec![modes(1, &[(0, 1)])]);
    check("extensions[peer_authentication].ports[80]", &|pod| pod.extensions = vec![modes(1, &[(80, 5)])]);
    check("extensions[peer_authentication]", &|pod| {
        pod.extensions = vec![workload::Extension { config: None, ..modes(0, &[]) }];
    });
    check("extensions[peer_authentication].type_url", &|pod| {
        pod.extensions = vec![workload::Extension { config: Some(Any::default()), ..modes(0, &[]) }];
    });
    check("extensions[pod_uid].uid", &|pod| pod.extensions = vec![pod_uid("")]);
    check("extensions[pod_uid]", &|pod| pod.extensions = vec![workload::Extension { config: None, ..pod_uid("uid") }]);
    check("extensions[same_node].way", &|pod| pod.extensions = vec![same_node(2)]);
    check("extensions[same_node]", &|pod| pod.extensions = vec![workload::Extension { config: None, ..same_node(1) }]);
    check("extensions[same_node].type_url", &|pod| {
        pod.extensions = vec![workload::Extension { config: Some(Any::default()), ..same_node(1) }];
    });
}

#[test]
fn the_way_to_pods_of_its_node_is_the_kernel_unless_the_pod_says_otherwise() {
    let way = |extensions: Vec<workload::Extension>| {
        let message = workload::Workload { extensions, ..pod("a", [10, 0, 0, 1]) };
        let Ok(Decoded::Workload { workload, .. }) = decode_address(&pod_resource(message)) else { panic!("a legal pod") };
        workload.same_node
    };
    assert_eq!(way(vec![]), SameNode::Kernel);
    assert_eq!(way(vec![same_node(0)]), SameNode::Kernel);
    assert_eq!(way(vec![modes(1, &[]), same_node(1)]), SameNode::Tunnel);
}

#[test]
fn a_pod_of_the_node_is_known_by_its_uid() {
    let message = workload::Workload { extensions: vec![pod_uid("uid-of-a")], addresses: Vec::new(), ..pod("a", [10, 0, 0, 1]) };
    let Ok(Decoded::Workload { workload, .. }) = decode_address(&pod_resource(message)) else { panic!("a legal pod") };
    assert_eq!(workload.pod.as_deref(), Some(&"uid-of-a".into()));
    let Ok(Decoded::Workload { workload, .. }) = decode_address(&pod_resource(pod("a", [10, 0, 0, 1]))) else {
        panic!("a legal pod")
    };
    assert_eq!(workload.pod, None);
}

#[test]
fn extensions_of_others_are_skipped() {
    let mut message = pod("a", [10, 0, 0, 1]);
    message.extensions = vec![workload::Extension { name: "other".to_owned(), config: None }];
    assert!(decode_address(&pod_resource(message)).is_ok());
}

#[test]
fn a_service_keeps_its_ports_and_which_endpoints_it_takes() {
    let mut message = service("web", [10, 96, 0, 1]);
    message.ports.push(workload::Port { service_port: 443, target_port: 0 });
    message.load_balancing = Some(workload::LoadBalancing { routing_preference: vec![4], mode: 1, health_policy: 1 });
    let Ok(Decoded::Service(decoded)) = decode_address(&service_resource(message)) else { panic!("a legal service") };
    assert!(decoded.node_local && decoded.unready_too);
    assert_eq!(decoded.ports[1], PortMapping { service_port: 443, target_port: 443 });
    let Ok(Decoded::Service(decoded)) = decode_address(&service_resource(service("web", [10, 96, 0, 1]))) else {
        panic!("a legal service")
    };
    assert!(!decoded.node_local && !decoded.unready_too);
}

#[test]
fn each_bad_field_of_a_service_is_named() {
    let check = |field: &str, spoil: &dyn Fn(&mut workload::Service)| {
        let mut message = service("web", [10, 96, 0, 1]);
        spoil(&mut message);
        assert_eq!(decode_address(&service_resource(message)).expect_err(field).field, field);
    };
    check("namespace", &|service| service.namespace.clear());
    check("hostname", &|service| service.hostname.clear());
    check("addresses[0]", &|service| service.addresses[0].address.clear());
    check("ports[0].service_port", &|service| service.ports[0].service_port = 0);
    check("ports[0].target_port", &|service| service.ports[0].target_port = 70000);
    check("load_balancing.mode", &|service| {
        service.load_balancing = Some(workload::LoadBalancing { mode: 9, ..workload::LoadBalancing::default() });
    });
    check("load_balancing.health_policy", &|service| {
        service.load_balancing = Some(workload::LoadBalancing { health_policy: 2, ..workload::LoadBalancing::default() });
    });
}

#[test]
fn a_policy_keeps_every_condition() {
    let text = |kind| security::StringMatch { match_type: Some(kind) };
    let condition = security::Match {
        namespaces: vec![text(security::string_match::MatchType::Exact("a".to_owned()))],
        not_principals: vec![text(security::string_match::MatchType::Presence(()))],
        source_ips: vec![security::Address { address: vec![10, 0, 0, 0], length: 8 }],
        not_source_ips: vec![security::Address {
            address: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 0].to_vec(),
            length: 104,
        }],
        not_destination_ports: vec![65535],
        service_accounts: vec![security::ServiceAccountMatch { namespace: "a".to_owned(), service_account: "b".to_owned() }],
        ..security::Match::default()
    };
    let Ok(Decoded::Policy(policy)) = authorization(&policy_resource(policy_with(condition)), AUTHORIZATION_TYPE) else {
        panic!("a legal policy")
    };
    assert_eq!((policy.action, policy.scope, policy.dry_run), (Action::Audit, Scope::WorkloadSelector, true));
    let condition = &policy.rules[0].clauses[0].matches[0];
    let ten = IpBlock { address: IpAddr::from([10, 0, 0, 0]), length: 8 };
    assert_eq!((&condition.source_ips[..], &condition.not_source_ips[..]), (&[ten][..], &[ten][..]));
    assert_eq!(condition.namespaces, [StringMatch::Exact("a".into())]);
    assert_eq!(condition.not_principals, [StringMatch::Presence]);
    assert_eq!(condition.not_destination_ports, [65535]);
    assert_eq!(condition.service_accounts.len(), 1);
}

#[test]
fn each_bad_field_of_a_policy_is_named() {
    let check = |field: &str, spoil: &dyn Fn(&mut security::Match)| {
        let mut condition = security::Match::default();
        spoil(&mut condition);
        let error = authorization(&policy_resource(policy_with(condition)), AUTHORIZATION_TYPE).expect_err(field);
        assert_eq!(error.field, format!("rules[0].clauses[0].matches[0].{field}"));
    };
    let block = |bytes: &[u8], length| vec![security::Address { address: bytes.to_vec(), length }];
    check("principals[0]", &|condition| condition.principals = vec![security::StringMatch { match_type: None }]);
    check("not_service_accounts[0]", &|condition| {
        condition.not_service_accounts = vec![security::ServiceAccountMatch::default()];
    });
    check("source_ips[0]", &|condition| condition.source_ips = block(&[10, 0, 0, 0], 33));
    check("destination_ips[0]", &|condition| condition.destination_ips = block(&[0; 16], 129));
    check("not_destination_ips[0]", &|condition| condition.not_destination_ips = block(&[0; 5], 1));
    check("destination_ports[0]", &|condition| condition.destination_ports = vec![0]);
    check("extensions", &|condition| condition.extensions = vec![vec![]]);
    let spoiled = security::Authorization { action: 8, ..policy_with(security::Match::default()) };
    assert_eq!(authorization(&policy_resource(spoiled), AUTHORIZATION_TYPE).expect_err("no action").field, "action");
    let spoiled = security::Authorization { scope: 8, ..policy_with(security::Match::default()) };
    assert_eq!(authorization(&policy_resource(spoiled), AUTHORIZATION_TYPE).expect_err("no scope").field, "scope");
}

#[test]
fn mesh_settings_are_read_and_each_bad_field_is_named() {
    let settings = |trust_domain: &str, range: &str| {
        let message = culvert::Mesh {
            trust_domain: trust_domain.to_owned(),
            default_deny: true,
            cluster_ranges: vec!["fd00::/48".to_owned(), range.to_owned()],
        };
        mesh(&resource(MESH_TYPE, "mesh", message), MESH_TYPE)
    };
    let Ok(Decoded::Mesh(decoded)) = settings("td", "10.1.2.3/8") else { panic!("legal settings") };
    assert!(decoded.default_deny && decoded.cluster_ranges.contains(&"10.0.0.0/8".parse().expect("legal")));
    assert_eq!(settings("", "10.0.0.0/8").expect_err("no domain").field, "trust_domain");
    assert_eq!(settings("td", "10.0.0.0/99").expect_err("no range").field, "cluster_ranges[1]");
}

#[test]
fn foreign_bytes_types_and_names_are_refused() {
    let mut resource = pod_resource(pod("a", [10, 0, 0, 1]));
    resource.name = "other".to_owned();
    assert!(matches!(decode_address(&resource).expect_err("a name").fault, Fault::OtherName { .. }));
    let mut resource = pod_resource(pod("a", [10, 0, 0, 1]));
    resource.resource.as_mut().expect("set").value = vec![0xff; 40];
    assert!(matches!(decode_address(&resource).expect_err("bytes").fault, Fault::Proto(_)));
    resource.resource = Some(Any { type_url: MESH_TYPE.to_owned(), value: Vec::new() });
    assert!(matches!(decode_address(&resource).expect_err("a type").fault, Fault::Type { .. }));
    resource.resource = None;
    assert!(matches!(decode_address(&resource).expect_err("nothing").fault, Fault::Missing));
    let hostile = Resource { name: "\n".repeat(100_000), ..Resource::default() };
    let text = decode_address(&hostile).expect_err("hostile").to_string();
    assert!(text.len() < 1000 && !text.contains('\n'));
}

proptest::proptest! {
    #[test]
    fn no_bytes_make_decoding_panic(name: String, value: Vec<u8>) {
        for type_url in [MESH_TYPE, ADDRESS_TYPE, AUTHORIZATION_TYPE] {
            let any = Any { type_url: type_url.to_owned(), value: value.clone() };
            let resource = Resource { name: name.clone(), resource: Some(any), ..Resource::default() };
            let _results = (mesh(&resource, type_url), decode_address(&resource), authorization(&resource, type_url));
        }
    }
}

fn decode_address(resource: &Resource) -> Result<Decoded, DecodeError> {
    address(resource, ADDRESS_TYPE, &"cluster.local".parse().expect("legal"), &mut Shared::default())
}

fn policy_with(condition: security::Match) -> security::Authorization {
    security::Authorization {
        name: "policy".to_owned(),
        namespace: "shop".to_owned(),
        scope: security::Scope::WorkloadSelector as i32,
        action: security::Action::Audit as i32,
        rules: vec![security::Rule { clauses: vec![security::Clause { matches: vec![condition] }] }],
        dry_run: true,
        extensions: Vec::new(),
    }
}
