//! Resources byte by byte, as another control plane of today writes them (istio/ztunnel: proto/workload.proto, proto/authorization.proto):
//! with every published field, those that are of no use here among them, and with fields that no version has yet.

use prost_types::Any;

use super::*;
use crate::model::Mode;
use crate::proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE, MESH_TYPE, PEER_AUTHENTICATION_TYPE};

/// A field that no version has yet, of each wire type.
const NEWER: &[&[u8]] =
    &[&[0xc0, 0x3e, 7], &[0xca, 0x3e, 1, 7], &[0xd5, 0x3e, 1, 2, 3, 4], &[0xd9, 0x3e, 1, 2, 3, 4, 5, 6, 7, 8]];

/// A field of bytes: a text, or a message.
fn bytes(number: u8, value: impl AsRef<[u8]>) -> Vec<u8> {
    let value = value.as_ref();
    [key(number, 2), varint(value.len()), value.to_vec()].concat()
}

/// A field that is a number.
fn number(number: u8, value: usize) -> Vec<u8> {
    [key(number, 0), varint(value)].concat()
}

fn key(number: u8, wire_type: u8) -> Vec<u8> {
    varint(usize::from(number) << 3 | usize::from(wire_type))
}

fn varint(mut value: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value > 0x7f {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

fn message(fields: &[Vec<u8>]) -> Vec<u8> {
    [fields.concat(), NEWER.concat()].concat()
}

fn resource(type_url: &str, name: &str, value: Vec<u8>) -> Resource {
    let any = Any { type_url: type_url.to_owned(), value };
    Resource { name: name.to_owned(), resource: Some(any), ..Resource::default() }
}

/// `GatewayAddress`, to a hostname.
fn gateway() -> Vec<u8> {
    message(&[bytes(1, message(&[bytes(1, "shop"), bytes(2, "waypoint.shop.svc")])), number(3, 15008)])
}

/// `Port`, with the application's protocol.
fn port(service: usize, target: usize) -> Vec<u8> {
    message(&[number(1, service), number(2, target), number(3, 2)])
}

fn decoded(name: &str, address: Vec<u8>) -> Decoded {
    address_of(name, address).expect("a resource of today")
}

fn address_of(name: &str, value: Vec<u8>) -> Result<Decoded, DecodeError> {
    address(&resource(ADDRESS_TYPE, name, value), ADDRESS_TYPE, &"cluster.local".parse().expect("legal"), &mut Shared::default())
}

#[test]
fn a_workload_of_today_is_read() {
    let extension = |name: &str| message(&[bytes(1, name), bytes(2, message(&[bytes(1, "type"), bytes(2, [1])]))]);
    let workload = message(&[
        bytes(1, "cart-1"),
        bytes(2, "shop"),
        bytes(3, [10, 0, 0, 7]),
        bytes(4, ""),
        number(5, 1),
        bytes(6, "td.example"),
        bytes(7, "cart"),
        bytes(8, gateway()),
        bytes(9, "node-a"),
        bytes(10, "cart"),
        bytes(11, "v2"),
        number(12, 2),
        bytes(13, "cart-1"),
        number(14, 1),
        bytes(16, "shop/policy"),
        number(17, 1),
        bytes(18, "cluster"),
        bytes(19, gateway()),
        bytes(20, "cluster//Pod/shop/cart-1"),
        bytes(21, "cart.example"),
        bytes(22, message(&[bytes(1, "shop/cart.shop.svc"), bytes(2, message(&[bytes(1, port(80, 8080))]))])),
        bytes(23, message(&[number(1, 1), number(2, 15080)])),
        bytes(24, message(&[bytes(1, "region"), bytes(2, "zone"), bytes(3, "subzone")])),
        number(25, 0),
        bytes(26, extension("another's")),
        bytes(27, message(&[number(1, 5)])),
    ]);
    let name = "cluster//Pod/shop/cart-1";
    let Decoded::Workload { workload, implicit_domain: false } = decoded(name, message(&[bytes(1, workload)])) else {
        panic!("a workload")
    };
    assert_eq!(workload.identity.to_string(), "spiffe://td.example/ns/shop/sa/cart");
    assert_eq!(*workload.addresses, ["10.0.0.7".parse::<IpAddr>().expect("legal")]);
    assert_eq!((&*workload.name, &*workload.node), ("cart-1", "node-a"));
    assert_eq!(workload.target_port("shop/cart.shop.svc", 80), Some(8080));
    assert!(workload.enrolled() && !workload.healthy);
}

#[test]
fn a_service_of_today_is_read() {
    let service = message(&[
        bytes(1, "cart"),
        bytes(2, "shop"),
        bytes(3, "cart.shop.svc"),
        bytes(4, message(&[bytes(1, ""), bytes(2, [10, 96, 0, 9])])),
        bytes(5, port(80, 0)),
        bytes(6, "spiffe://td/ns/a/sa/b"),
        bytes(7, gateway()),
        bytes(8, message(&[bytes(1, [4]), number(2, 1), number(3, 1)])),
        number(9, 1),
        bytes(10, message(&[bytes(1, "another's")])),
        number(11, 1),
        number(12, 1),
        bytes(13, message(&[bytes(1, gateway()), number(2, 1)])),
        number(14, 1),
    ]);
    let Decoded::Service(service) = decoded("shop/cart.shop.svc", message(&[bytes(2, service)])) else { panic!("a service") };
    assert_eq!(service.ports[..], [PortMapping { service_port: 80, target_port: 80 }]);
    assert!(service.node_local && service.unready_too);
}

#[test]
fn an_authorization_of_today_is_read() {
    let text = |kind: u8, text: &str| message(&[bytes(kind, text)]);
    let block = |last: u8| message(&[bytes(1, [10, 0, 0, last]), number(2, 32)]);
    let account = |name: &str| message(&[bytes(1, "shop"), bytes(2, name)]);
    let condition = message(&[
        bytes(1, text(1, "a")),
        bytes(2, text(2, "b")),
        bytes(3, text(3, "c")),
        bytes(4, message(&[bytes(4, [])])),
        bytes(5, block(5)),
        bytes(6, block(6)),
        bytes(7, block(7)),
        bytes(8, block(8)),
        bytes(9, [9]),
        bytes(10, [10]),
        bytes(11, account("k")),
        bytes(12, account("l")),
    ]);
    let rule = message(&[bytes(1, message(&[bytes(2, condition)]))]);
    let policy = message(&[bytes(1, "policy"), bytes(2, "shop"), number(3, 2), number(4, 1), bytes(5, rule), number(6, 1)]);
    let read = authorization(&resource(AUTHORIZATION_TYPE, "shop/policy", policy), AUTHORIZATION_TYPE);
    let Ok(Decoded::Policy(policy)) = read else { panic!("{read:?}") };
    assert_eq!((policy.scope, policy.action, policy.dry_run), (Scope::WorkloadSelector, Action::Deny, true));
    let condition = &policy.rules[0].clauses[0].matches[0];
    assert_eq!(condition.namespaces, [StringMatch::Exact("a".into())]);
    assert_eq!(condition.not_namespaces, [StringMatch::Prefix("b".into())]);
    assert_eq!(condition.principals, [StringMatch::Suffix("c".into())]);
    assert_eq!(condition.not_principals, [StringMatch::Presence]);
    let blocks = [&condition.source_ips, &condition.not_source_ips, &condition.destination_ips, &condition.not_destination_ips];
    for (list, last) in blocks.into_iter().zip(5..) {
        assert_eq!(list[..], [IpBlock { address: IpAddr::from([10, 0, 0, last]), length: 32 }]);
    }
    assert_eq!((&condition.destination_ports[..], &condition.not_destination_ports[..]), (&[9][..], &[10][..]));
    let names = [&condition.service_accounts, &condition.not_service_accounts].map(|list| list[0].service_account.to_string());
    assert_eq!(names, ["k", "l"]);
}

#[test]
fn settings_of_an_older_and_of_a_newer_controller_are_read() {
    let read = |fields: Vec<u8>| match mesh(&resource(MESH_TYPE, "mesh", fields), MESH_TYPE) {
        Ok(Decoded::Mesh(mesh)) => mesh,
        other => panic!("{other:?}"),
    };
    let old = read(bytes(1, "td.example"));
    assert_eq!((old.trust_domain.as_str(), old.default_deny, old.cluster_ranges.len()), ("td.example", false, 0));
    let new = read(message(&[bytes(1, "td.example"), number(2, 1), bytes(3, "10.96.0.0/12")]));
    assert_eq!((new.trust_domain.as_str(), new.default_deny, new.cluster_ranges.len()), ("td.example", true, 1));
    let mode_of = |modes: Vec<u8>| {
        let config = message(&[bytes(1, PEER_AUTHENTICATION_TYPE), bytes(2, modes)]);
        let workload = message(&[
            bytes(2, "shop"),
            bytes(3, [10, 0, 0, 7]),
            bytes(20, "uid"),
            bytes(26, message(&[bytes(1, "peer_authentication"), bytes(2, config)])),
        ]);
        let Decoded::Workload { workload, .. } = decoded("uid", message(&[bytes(1, workload)])) else { panic!("a workload") };
        [80, 81].map(|port| workload.peer_authentication.mode_of(port))
    };
    assert_eq!(mode_of(number(1, 1)), [Mode::Strict, Mode::Strict]);
    let port = message(&[number(1, 81), number(2, 2)]);
    assert_eq!(mode_of(message(&[number(1, 1), bytes(2, port)])), [Mode::Strict, Mode::Disable]);
}
