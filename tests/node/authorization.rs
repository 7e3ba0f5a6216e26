//! Promise: who may talk to whom is decided by verified identity, address and port; a change reaches open connections.

use std::io::{Read as _, Write as _};

use harness::{Mesh, PodSpec, app, eventually};

const PORT: u16 = 8080;

fn policy(action: &str, rules: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: rule, namespace: shop}}\n\
         spec: {{selector: {{matchLabels: {{app: server}}}}, action: {action}, rules: [{rules}]}}\n"
    )
}

#[test]
fn each_condition_and_its_negation_let_the_right_ones_through() {
    let mut mesh = Mesh::start();
    let server = mesh.pod(PodSpec { name: "server", namespace: "shop", node: 1, enrolled: true });
    app::server(&server.netns, PORT, app::echo);
    let friend = mesh.pod(PodSpec { name: "friend", namespace: "shop", node: 0, enrolled: true });
    let stranger = mesh.pod(PodSpec { name: "stranger", namespace: "street", node: 0, enrolled: true });
    let plain = mesh.pod(PodSpec { name: "plain", namespace: "shop", node: 0, enrolled: false });
    let reached = |pod: &harness::Pod| app::converse(&pod.netns, server.at(false, PORT), "hello").is_ok();
    let all = || [reached(&friend), reached(&stranger), reached(&plain)];
    eventually("everybody is let through without a policy", || all() == [true, true, true]);

    let from = |source: &str| format!("{{from: [{{source: {{{source}}}}}]}}");
    let (friend_ip, plain_ip) = (friend.v4, plain.v4);
    // A rule, and whom it matches: friend, stranger, plain.
    let rules = [
        (from("principals: [cluster.local/ns/shop/sa/friend]"), [true, false, false]),
        (from("notPrincipals: [cluster.local/ns/shop/sa/friend]"), [false, true, true]),
        (from("principals: [\"*/sa/friend\"]"), [true, false, false]),
        (from("principals: [\"cluster.local/ns/street/*\"]"), [false, true, false]),
        (from("principals: [\"*\"]"), [true, true, false]),
        (from("namespaces: [shop]"), [true, false, false]),
        (from("notNamespaces: [shop]"), [false, true, true]),
        (from(&format!("ipBlocks: [\"{friend_ip}/32\"]")), [true, false, false]),
        (from(&format!("notIpBlocks: [\"{plain_ip}\"]")), [true, true, false]),
        ("{to: [{operation: {ports: [\"8080\"]}}]}".to_owned(), [true, true, true]),
        ("{to: [{operation: {notPorts: [\"8080\"]}}]}".to_owned(), [false, false, false]),
        ("{when: [{key: source.namespace, values: [street]}]}".to_owned(), [false, true, false]),
        ("{when: [{key: source.principal, notValues: [\"*\"]}]}".to_owned(), [false, false, true]),
        ("{when: [{key: destination.port, values: [\"8080\"]}]}".to_owned(), [true, true, true]),
        // HTTP is out of sight: an ALLOW never matches.
        ("{to: [{operation: {methods: [GET]}}]}".to_owned(), [false, false, false]),
    ];
    for (rule, matched) in &rules {
        mesh.apply("rule", &policy("ALLOW", rule));
        eventually(&format!("ALLOW {rule} lets through {matched:?}"), || all() == *matched);
    }
    for (rule, matched) in rules.iter().filter(|(rule, _)| !rule.contains("methods")) {
        mesh.apply("rule", &policy("DENY", rule));
        let left = matched.map(|matched| !matched);
        eventually(&format!("DENY {rule} leaves {left:?}"), || all() == left);
    }
    mesh.apply("rule", &policy("DENY", "{to: [{operation: {methods: [GET]}}]}"));
    eventually("a DENY by HTTP denies more, not less", || all() == [false, false, false]);
    mesh.apply("rule", &policy("AUDIT", "{}"));
    eventually("AUDIT only counts", || all() == [true, true, true]);
    let dry = policy("DENY", "{}").replace("name: rule,", "name: rule, annotations: {culvert.dev/dry-run: \"true\"},");
    mesh.apply("rule", &policy("DENY", "{}"));
    eventually("DENY denies all", || all() == [false, false, false]);
    mesh.apply("rule", &dry);
    eventually("a dry run only counts", || all() == [true, true, true]);
}

#[test]
fn a_new_denial_cuts_open_connections_encrypted_or_not() {
    let mut mesh = Mesh::start();
    let server = mesh.pod(PodSpec { name: "server", namespace: "shop", node: 1, enrolled: true });
    app::server(&server.netns, PORT, app::echo);
    let clients = [("member", true), ("plain", false)]
        .map(|(name, enrolled)| mesh.pod(PodSpec { name, namespace: "shop", node: 0, enrolled }));
    let mut open: Vec<_> = clients
        .iter()
        .map(|client| {
            eventually("the server is reached", || app::converse(&client.netns, server.at(false, PORT), "warm").is_ok());
            let mut stream = app::connect(&client.netns, server.at(false, PORT)).expect("a connection");
            stream.write_all(b"x").expect("an open connection");
            assert!(stream.read(&mut [0; 64]).expect("the first line") > 0);
            stream
        })
        .collect();
    mesh.apply("rule", &policy("DENY", "{}"));
    for stream in &mut open {
        // What was on its way may still arrive; then the connection ends, and not in order.
        let mut rest = Vec::new();
        let ended = stream.read_to_end(&mut rest);
        assert!(ended.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset), "the connection was not reset");
    }
}

#[test]
fn default_deny_lets_through_only_what_is_allowed() {
    let mut mesh = Mesh::start_with(&["--default-deny"]);
    let server = mesh.pod(PodSpec { name: "server", namespace: "shop", node: 1, enrolled: true });
    app::server(&server.netns, PORT, app::echo);
    let friend = mesh.pod(PodSpec { name: "friend", namespace: "shop", node: 0, enrolled: true });
    let reached = || app::converse(&friend.netns, server.at(false, PORT), "hello").is_ok();
    eventually("the denial is logged", || {
        assert!(!reached());
        mesh.log("agent-b").contains("policy_denied")
    });
    mesh.apply("rule", &policy("ALLOW", "{from: [{source: {principals: [cluster.local/ns/shop/sa/friend]}}]}"));
    eventually("what is allowed passes", reached);
}
