//! Promise: pods of one address family are pods of the mesh like others, and what has no way without a mesh has none with one.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};

use harness::mesh::Families;
use harness::{Endpoint, Mesh, Pod, PodSpec, Service, app, eventually};

const PORT: u16 = 8080;

fn pod(mesh: &mut Mesh, name: &str, node: usize, enrolled: bool, families: Families) -> Pod {
    mesh.pod_of(PodSpec { name, namespace: "shop", node, enrolled }, families)
}

fn server(mesh: &mut Mesh, name: &str, families: Families) -> Pod {
    let server = pod(mesh, name, 1, true, families);
    app::server(&server.netns, PORT, app::echo);
    server
}

/// Asserts that the client reaches the address, is seen under its own, and that none of it is in sight.
fn encrypted(mesh: &Mesh, client: &Pod, to: SocketAddr) {
    eventually(&format!("{to} is reached"), || app::converse(&client.netns, to, "warm").is_ok());
    let mut capture = mesh.capture_between_nodes();
    let seen = app::converse(&client.netns, to, "marker-single").expect("reached before");
    capture.finish();
    assert_eq!((seen.client.ip(), seen.peer), (client.at(to.is_ipv6(), 0).ip(), to));
    assert!(!capture.shows(b"marker-single"), "{to}: in plaintext");
    let segments = capture.segments();
    assert!(segments.iter().any(|(_, to)| to.port() == 15008), "{to}: by tunnel");
    assert!(segments.iter().all(|(_, to)| to.port() != PORT), "{to}: beside the tunnel");
}

#[test]
fn pods_of_one_family_reach_each_other_encrypted_and_others_not_at_all() {
    let mut mesh = Mesh::start();
    for (families, v6) in [(Families::V4, false), (Families::V6, true)] {
        let word = if v6 { "v6" } else { "v4" };
        let server = server(&mut mesh, &format!("server-{word}"), families);
        let both = self::server(&mut mesh, &format!("server-both-{word}"), Families::Both);
        let client = pod(&mut mesh, &format!("client-{word}"), 0, true, families);
        encrypted(&mesh, &client, server.at(v6, PORT));
        encrypted(&mesh, &client, both.at(v6, PORT));
        let outsider = pod(&mut mesh, &format!("outsider-{word}"), 0, false, families);
        let of_outsider = || app::converse(&outsider.netns, server.at(v6, PORT), "plain").is_ok();
        eventually("PERMISSIVE is the default", of_outsider);

        // The other family leads nowhere, for a member as for who is none.
        let mut capture = mesh.capture_between_nodes();
        for client in [&client, &outsider] {
            let lost = app::connect(&client.netns, both.at(!v6, PORT)).expect_err("there is no address to dial from");
            assert_eq!(lost.kind(), ErrorKind::NetworkUnreachable, "{word}");
        }
        capture.finish();
        let segments = capture.segments();
        assert!(segments.iter().all(|(_, to)| to.ip() != both.at(!v6, 0).ip()), "{word}: on the wire: {segments:?}");

        mesh.mode("shop", "STRICT");
        eventually("STRICT holds", || !of_outsider());
        encrypted(&mesh, &client, server.at(v6, PORT));
        mesh.mode("shop", "PERMISSIVE");
    }
}

#[test]
fn a_service_of_both_families_is_reached_in_those_that_its_endpoint_has() {
    let mut mesh = Mesh::start();
    let client = pod(&mut mesh, "client", 0, true, Families::Both);
    for (number, (families, v6)) in [(Families::V4, false), (Families::V6, true)].into_iter().enumerate() {
        let server = server(&mut mesh, if v6 { "server-v6" } else { "server-v4" }, families);
        let addresses: [IpAddr; 2] =
            [format!("10.96.0.{}", number + 1), format!("fd96::{}", number + 1)].map(|text| text.parse().expect("an address"));
        let service = Service { name: if v6 { "v6" } else { "v4" }, addresses: &addresses, port: 80, target: "8080", more: "" };
        mesh.serve(service, &[Endpoint::ready(server.at(v6, 0).ip(), PORT)]);
        encrypted(&mesh, &client, SocketAddr::new(addresses[usize::from(v6)], 80));
        let mut capture = mesh.capture_between_nodes();
        let other = SocketAddr::new(addresses[usize::from(!v6)], 80);
        let refused = app::converse(&client.netns, other, "marker-other").expect_err("no endpoint of that family");
        capture.finish();
        assert!([ErrorKind::ConnectionRefused, ErrorKind::ConnectionReset].contains(&refused.kind()), "{refused}");
        assert!(!capture.shows(b"marker-other"), "in plaintext");
        let segments = capture.segments();
        assert!(segments.iter().all(|(_, to)| ![80, PORT].contains(&to.port())), "on the wire: {segments:?}");
        eventually("the lack is logged", || {
            let service = format!("dst.addr={other} ");
            mesh.log("agent-a").lines().any(|line| line.contains(&service) && line.contains("reason=\"no_endpoint\""))
        });
    }
}
