//! Promise: who may talk to whom is decided by verified identity, address and port; a change reaches open connections.

use std::io::{ErrorKind, Read as _};
use std::net::TcpStream;

use harness::{Mesh, Pod, PodSpec, app, eventually, eventually_equal};

const PORT: u16 = 8080;
const OTHER_PORT: u16 = 8081;

in_each_form!(a_change_cuts_the_open_connections_that_it_denies_and_no_others);

/// A client, as policies see it.
#[derive(Clone, Copy, Debug)]
struct Client {
    name: &'static str,
    namespace: &'static str,
    /// Whether it is in the mesh, and so has an identity.
    member: bool,
}

const FRIEND: Client = Client { name: "friend", namespace: "shop", member: true };
const STRANGER: Client = Client { name: "stranger", namespace: "street", member: true };
const PLAIN: Client = Client { name: "plain", namespace: "shop", member: false };

/// One connection, as policies see it.
#[derive(Clone, Copy, Debug)]
struct Attempt {
    client: Client,
    v6: bool,
    port: u16,
}

impl Attempt {
    fn is(&self, client: Client) -> bool {
        self.client.name == client.name
    }

    /// Whether it comes with this name of an identity's; what has no identity has no names.
    fn member_of(&self, namespace: &str) -> bool {
        self.client.member && self.client.namespace == namespace
    }
}

/// A server in `shop` on node b, which listens on two ports, and three clients on node a.
struct Scene {
    mesh: Mesh,
    server: Pod,
    clients: [(Client, Pod); 3],
    policies: usize,
}

impl Scene {
    fn new() -> Self {
        let mut mesh = Mesh::start();
        let server = mesh.pod(PodSpec { name: "server", namespace: "shop", node: 1, enrolled: true });
        [PORT, OTHER_PORT].into_iter().for_each(|port| app::server(&server.netns, port, app::echo));
        let clients = [FRIEND, STRANGER, PLAIN].map(|client| {
            let Client { name, namespace, member } = client;
            (client, mesh.pod(PodSpec { name, namespace, node: 0, enrolled: member }))
        });
        let scene = Self { mesh, server, clients, policies: 0 };
        eventually("everybody is let through without a policy", || scene.wrong(|_| true).is_empty());
        scene
    }

    /// The attempts whose outcome is not what `expected` says.
    fn wrong(&self, expected: impl Fn(&Attempt) -> bool) -> Vec<Attempt> {
        let clients = self.clients.iter().flat_map(|(client, pod)| [false, true].map(|v6| (client, pod, v6)));
        let attempts =
            clients.flat_map(|(client, pod, v6)| [PORT, OTHER_PORT].map(|port| (pod, Attempt { client: *client, v6, port })));
        let reached =
            |pod: &Pod, attempt: &Attempt| app::converse(&pod.netns, self.server.at(attempt.v6, attempt.port), "hello").is_ok();
        attempts.filter(|(pod, attempt)| reached(pod, attempt) != expected(attempt)).map(|(_, attempt)| attempt).collect()
    }

    /// Puts one policy for the server into force in place of the last, and checks that exactly `expected` passes.
    fn check(&mut self, action: &str, rule: &str, expected: impl Fn(&Attempt) -> bool) {
        self.policies += 1;
        let name = format!("rule-{}", self.policies);
        self.mesh.apply("rule", &policy(&name, action, rule));
        self.mesh.await_policy("shop", Some(&name));
        eventually("the server is told of its policy", || {
            let known = self.mesh.workload(1, "server");
            let policies = known["authorization_policies"].as_array().into_iter().flatten().filter_map(|policy| policy.as_str());
            policies.filter_map(|policy| policy.strip_prefix("shop/")).eq([name.as_str()])
        });
        let mut wrong = Vec::new();
        // The kernel's tables follow what the agents know within moments.
        for _ in 0..3 {
            wrong = self.wrong(&expected);
            if wrong.is_empty() {
                return;
            }
        }
        panic!("{action} {rule}: not as expected: {wrong:#?}");
    }

    fn address(&self, client: Client, v6: bool) -> String {
        let (_, pod) = self.clients.iter().find(|(known, _)| known.name == client.name).expect("a client");
        if v6 { pod.v6.to_string() } else { pod.v4.to_string() }
    }
}

fn policy(name: &str, action: &str, rules: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: shop}}\n\
         spec: {{selector: {{matchLabels: {{app: server}}}}, action: {action}, rules: [{rules}]}}\n"
    )
}

fn from(source: &str) -> String {
    format!("{{from: [{{source: {{{source}}}}}]}}")
}

fn to(operation: &str) -> String {
    format!("{{to: [{{operation: {{{operation}}}}}]}}")
}

fn when(condition: &str) -> String {
    format!("{{when: [{{{condition}}}]}}")
}

type Matches = fn(&Attempt) -> bool;

/// Rules on identities, each with the attempts that it matches.
const IDENTITIES: [(&str, &str, Matches); 14] = [
    ("principals", "[cluster.local/ns/shop/sa/friend]", |it| it.is(FRIEND)),
    ("principals", "[\"*/sa/friend\"]", |it| it.is(FRIEND)),
    ("principals", "[\"cluster.local/ns/street/*\"]", |it| it.is(STRANGER)),
    ("principals", "[\"*\"]", |it| it.client.member),
    ("principals", "[cluster.local/ns/no/sa/body, cluster.local/ns/street/sa/stranger]", |it| it.is(STRANGER)),
    ("principals", "[cluster.local/ns/shop/sa/plain]", |_| false),
    ("namespaces", "[shop]", |it| it.member_of("shop")),
    ("namespaces", "[\"str*\"]", |it| it.member_of("street")),
    ("namespaces", "[\"*hop\"]", |it| it.member_of("shop")),
    ("namespaces", "[\"*\"]", |it| it.client.member),
    ("serviceAccounts", "[friend]", |it| it.is(FRIEND)),
    ("serviceAccounts", "[street/stranger, shop/friend]", |it| it.client.member),
    // Without a namespace it is the policy's own.
    ("serviceAccounts", "[stranger]", |_| false),
    ("serviceAccounts", "[street/stranger]", |it| it.is(STRANGER)),
];

/// The same field in its other places: its negation, and the condition of that meaning with its negation.
fn forms(field: &str, values: &str) -> [(String, bool); 4] {
    let (negation, key) = match field {
        "principals" => ("notPrincipals", "source.principal"),
        "namespaces" => ("notNamespaces", "source.namespace"),
        "serviceAccounts" => ("notServiceAccounts", "source.serviceAccount"),
        "ipBlocks" => ("notIpBlocks", "source.ip"),
        _ => panic!("no such field: {field}"),
    };
    [
        (from(&format!("{field}: {values}")), true),
        (from(&format!("{negation}: {values}")), false),
        (when(&format!("key: {key}, values: {values}")), true),
        (when(&format!("key: {key}, notValues: {values}")), false),
    ]
}

#[test]
fn every_match_on_identity_and_its_negation_lets_the_right_ones_through() {
    let mut scene = Scene::new();
    for (field, values, matches) in IDENTITIES {
        for (rule, plainly) in forms(field, values) {
            scene.check("ALLOW", &rule, |it| matches(it) == plainly);
            scene.check("DENY", &rule, |it| matches(it) != plainly);
        }
    }
}

#[test]
fn every_match_on_address_and_port_and_its_negation_lets_the_right_ones_through() {
    let mut scene = Scene::new();
    let friend = [false, true].map(|v6| scene.address(FRIEND, v6));
    let addresses: [(String, Matches); 7] = [
        (format!("[\"{}\"]", friend[0]), |it| it.is(FRIEND) && !it.v6),
        (format!("[\"{}/32\", \"{}/128\"]", friend[0], friend[1]), |it| it.is(FRIEND)),
        (format!("[\"::ffff:{}\"]", friend[0]), |it| it.is(FRIEND) && !it.v6),
        ("[10.77.0.0/16]".to_owned(), |it| !it.v6),
        ("[\"fd77::/64\"]".to_owned(), |it| it.v6),
        ("[0.0.0.0/0, \"::/0\"]".to_owned(), |_| true),
        ("[192.0.2.1]".to_owned(), |_| false),
    ];
    for (values, matches) in &addresses {
        for (rule, plainly) in forms("ipBlocks", values) {
            scene.check("ALLOW", &rule, |it| matches(it) == plainly);
            scene.check("DENY", &rule, |it| matches(it) != plainly);
        }
    }
    let server = scene.server.v4;
    let rules: [(String, Matches); 10] = [
        (to("ports: [\"8080\"]"), |it| it.port == PORT),
        (to("notPorts: [\"8080\"]"), |it| it.port != PORT),
        (to("ports: [\"8080\", \"8081\"]"), |_| true),
        (when("key: destination.port, values: [\"8081\"]"), |it| it.port == OTHER_PORT),
        (when("key: destination.port, notValues: [\"8081\", \"9\"]"), |it| it.port != OTHER_PORT),
        (when(&format!("key: destination.ip, values: [\"{server}\"]")), |it| !it.v6),
        (when(&format!("key: destination.ip, notValues: [\"{server}\"]")), |it| it.v6),
        // All parts of a rule must hold, any of a list's items, any of the rules.
        (
            "{from: [{source: {namespaces: [shop], notPrincipals: [\"*/friend\"]}}, {source: {ipBlocks: [\"fd77::/64\"]}}], \
             to: [{operation: {ports: [\"8081\"]}}]}"
                .to_owned(),
            |it| it.v6 && it.port == OTHER_PORT,
        ),
        (when("key: source.namespace, values: [\"*\"], notValues: [street]"), |it| it.is(FRIEND)),
        (format!("{}, {}", from("namespaces: [street]"), to("ports: [\"8080\"]")), |it| it.is(STRANGER) || it.port == PORT),
    ];
    for (rule, matches) in &rules {
        scene.check("ALLOW", rule, matches);
        scene.check("DENY", rule, |it| !matches(it));
    }
}

#[test]
fn what_cannot_be_told_of_a_connection_never_allows_always_denies_and_is_reported() {
    let mut scene = Scene::new();
    for (rule, field, value) in [
        (to("methods: [GET]"), "to[0].operation.methods", "GET"),
        (to("notPaths: [/admin]"), "to[0].operation.notPaths", "/admin"),
        (to("hosts: [shop.example]"), "to[0].operation.hosts", "shop.example"),
        (from("requestPrincipals: [\"*\"]"), "from[0].source.requestPrincipals", "*"),
        (from("remoteIpBlocks: [10.0.0.0/8]"), "from[0].source.remoteIpBlocks", "10.0.0.0/8"),
        (from("notRemoteIpBlocks: [10.0.0.0/8]"), "from[0].source.notRemoteIpBlocks", "10.0.0.0/8"),
        (when("key: remote.ip, values: [10.0.0.0/8]"), "when[0].key", "remote.ip"),
        (when("key: remote.ip, notValues: [10.0.0.0/8]"), "when[0].key", "remote.ip"),
        (when("key: \"request.headers[x]\", values: [y]"), "when[0].key", "request.headers[x]"),
    ] {
        for (action, effect) in [("ALLOW", "allows less"), ("DENY", "denies more")] {
            scene.check(action, &rule, |_| false);
            let name = format!("shop/rule-{}", scene.policies);
            let parts = [name.as_str(), &format!("spec.rules[0].{field}"), value, effect];
            eventually(&format!("{action} {rule} is reported"), || {
                scene.mesh.log("controller").lines().any(|line| parts.iter().all(|part| line.contains(part)))
            });
        }
    }
    // The rest of a DENY still counts; the other rules of an ALLOW, too.
    let mixed = "{to: [{operation: {ports: [\"8080\"], methods: [GET]}}]}";
    scene.check("DENY", mixed, |it| it.port != PORT);
    scene.check("ALLOW", &format!("{mixed}, {}", to("ports: [\"8081\"]")), |it| it.port == OTHER_PORT);
    scene.check("CUSTOM", &to("ports: [\"8080\"]"), |it| it.port != PORT);
}

#[test]
fn denials_come_first_whatever_the_scope_and_other_workloads_are_left_alone() {
    let mut scene = Scene::new();
    let other = scene.mesh.pod(PodSpec { name: "other", namespace: "elsewhere", node: 1, enrolled: true });
    app::server(&other.netns, PORT, app::echo);
    let other_reached = |scene: &Scene| app::converse(&scene.clients[0].1.netns, other.at(false, PORT), "hello").is_ok();
    eventually("the other server is reached", || other_reached(&scene));
    // Where the policy is, whom it selects, and whether it bears on the other server as well.
    let scopes = [("shop", "selector: {matchLabels: {app: server}}, ", false), ("shop", "", false), ("istio-system", "", true)];
    for (number, (namespace, selector, everywhere)) in scopes.into_iter().enumerate() {
        let object = |name: &str, action: &str, rule: &str| {
            format!(
                "apiVersion: security.istio.io/v1beta1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: {namespace}}}\n\
                 spec: {{{selector}action: {action}, rules: [{rule}]}}\n---\n"
            )
        };
        let name = format!("allow-{number}");
        scene.mesh.apply("scope", &object(&name, "ALLOW", &from("principals: [\"*/sa/stranger\"]")));
        scene.mesh.await_policy(namespace, Some(&name));
        eventually(&format!("ALLOW in {namespace} {selector}"), || scene.wrong(|it| it.is(STRANGER)).is_empty());
        assert_eq!(other_reached(&scene), !everywhere, "ALLOW in {namespace} {selector}");
        let both = object("b-allow", "ALLOW", "{}") + &object("c-deny", "DENY", &from("principals: [\"*/sa/stranger\"]"));
        scene.mesh.apply("scope", &(both + &object("d-allow", "ALLOW", &from("namespaces: [street]"))));
        eventually(&format!("DENY in {namespace} {selector}"), || scene.wrong(|it| !it.is(STRANGER)).is_empty());
        assert!(other_reached(&scene), "a DENY of somebody else");
        scene.mesh.delete("scope");
        eventually("nothing is left of it", || scene.wrong(|_| true).is_empty());
    }
    // One of a namespace and one of the mesh: both count.
    let mesh_wide = policy("wide", "DENY", &to("ports: [\"8081\"]")).replace("namespace: shop", "namespace: istio-system");
    scene.mesh.apply("wide", &mesh_wide);
    scene.mesh.await_policy("istio-system", Some("wide"));
    scene.check("ALLOW", &from("namespaces: [\"*\"]"), |it| it.client.member && it.port == PORT);
}

#[test]
fn policies_for_waypoints_dry_runs_and_audits_change_nothing_and_are_told_of() {
    let mut scene = Scene::new();
    let target = policy("target", "DENY", "{}")
        .replace("selector: {matchLabels: {app: server}}", "targetRefs: [{kind: Service, group: \"\", name: web}]");
    scene.mesh.apply("target", &target);
    eventually("the target is reported", || {
        scene.mesh.log("controller").lines().any(|line| {
            ["shop/target", "spec.targetRefs[0]", "Service/web", "waypoint"].into_iter().all(|part| line.contains(part))
        })
    });
    assert_eq!(scene.wrong(|_| true).len(), 0, "a policy for a waypoint is not enforced");

    let verdicts = |scene: &Scene, policy: &str, verdict: &str, dry_run: bool| {
        let labels = [("policy", format!("shop/{policy}")), ("verdict", verdict.to_owned()), ("dry_run", dry_run.to_string())];
        let labels = labels.map(|(label, value)| format!("{label}=\"{value}\""));
        scene.mesh.metrics(1).sum("culvert_policy_verdicts_total", &labels.each_ref().map(String::as_str))
    };
    for (annotation, number) in [("culvert.dev/dry-run", 1), ("istio.io/dry-run", 2)] {
        let name = format!("dry-{number}");
        let dry = policy(&name, "DENY", &from("principals: [\"*/sa/friend\"]"));
        let dry = dry.replace(&format!("name: {name},"), &format!("name: {name}, annotations: {{{annotation}: \"true\"}},"));
        scene.mesh.apply("rule", &dry);
        scene.mesh.await_policy("shop", Some(&name));
        assert_eq!(verdicts(&scene, &name, "deny", true), 0);
        eventually("a dry run lets all through", || scene.wrong(|_| true).is_empty());
        eventually("a dry run is counted", || {
            assert_eq!(scene.wrong(|_| true).len(), 0);
            verdicts(&scene, &name, "deny", true) > 0
        });
        assert_eq!(verdicts(&scene, &name, "deny", false), 0, "and not as if it were enforced");
    }
    scene.mesh.apply("rule", &policy("audit", "AUDIT", &from("namespaces: [shop]")));
    scene.mesh.await_policy("shop", Some("audit"));
    eventually("an audit is counted", || {
        assert_eq!(scene.wrong(|_| true).len(), 0, "an audit denies nothing");
        verdicts(&scene, "audit", "audit", false) > 0
    });
    // Its enforced twin denies, so that the above is not for want of reach.
    scene.check("DENY", &from("principals: [\"*/sa/friend\"]"), |it| !it.is(FRIEND));
    let denied = format!("rule-{}", scene.policies);
    assert!(verdicts(&scene, &denied, "deny", false) > 0, "a denial is counted by its policy");
    let said = format!("by DENY policy shop/{denied}");
    eventually("it is said in the access log", || scene.mesh.log("agent-b").contains(&said));
}

/// A client's connections over both families, open.
struct Open {
    name: &'static str,
    streams: [TcpStream; 2],
}

impl Open {
    fn live(&self) {
        for _ in 0..3 {
            self.streams.iter().for_each(|stream| app::ping(stream).unwrap_or_else(|error| panic!("{}: {error}", self.name)));
        }
    }

    /// What was on its way may still arrive; then the connections end, and not in order.
    fn cut(&self) {
        for mut stream in &self.streams {
            let ended = stream.read_to_end(&mut Vec::new()).expect_err("an end in order");
            assert_eq!(ended.kind(), ErrorKind::ConnectionReset, "{}", self.name);
        }
    }
}

fn a_change_cuts_the_open_connections_that_it_denies_and_no_others(forms: [&str; 2]) {
    for steered in [false, true] {
        let mut mesh = Mesh::start_in(forms);
        let server = mesh.pod(PodSpec { name: "server", namespace: "shop", node: 1, enrolled: true });
        app::server(&server.netns, PORT, app::echo);
        if steered {
            // Where there is a policy at all, the kernel leaves plaintext to the agent.
            mesh.apply("unrelated", &policy("unrelated", "DENY", &from("principals: [\"*/sa/nobody\"]")));
            mesh.await_policy("shop", Some("unrelated"));
        }
        let clients = [("denied", true), ("member", true), ("denied-plain", false), ("plain", false)]
            .map(|(name, enrolled)| (name, mesh.pod(PodSpec { name, namespace: "shop", node: 0, enrolled })));
        let outcomes =
            |outcome: &str| mesh.metrics(1).sum("culvert_capture_outcomes_total", &[&format!("outcome=\"{outcome}\"")]);
        let [taken, other] =
            if steered { ["steered_plaintext", "admitted_plaintext"] } else { ["admitted_plaintext", "steered_plaintext"] };
        eventually("plaintext takes its way", || {
            app::converse(&clients[3].1.netns, server.at(false, PORT), "warm").is_ok() && outcomes(taken) > 0
        });
        let before = outcomes(other);
        let [denied, member, denied_plain, plain] = clients.each_ref().map(|(name, client)| {
            let open = |v6| {
                let mut open = None;
                eventually(&format!("{name} is served"), || {
                    open = app::open(&client.netns, server.at(v6, PORT)).ok();
                    open.is_some()
                });
                open.expect("served")
            };
            Open { name, streams: [false, true].map(open) }
        });
        assert_eq!(outcomes(other), before, "plaintext took another way");

        let addresses = [clients[2].1.v4, clients[2].1.v6];
        let rules =
            [from("principals: [\"*/sa/denied\"]"), from(&format!("ipBlocks: [\"{}\", \"{}\"]", addresses[0], addresses[1]))];
        mesh.apply("rule", &policy("rule", "DENY", &rules.join(", ")));
        denied.cut();
        denied_plain.cut();
        eventually("all four are told of", || closed_by_change(&mesh) == 4);
        [&member, &plain].into_iter().for_each(Open::live);

        mesh.mode("shop", "STRICT");
        plain.cut();
        eventually("two more are told of", || closed_by_change(&mesh) == 6);
        member.live();
        check_access_log(&mesh, steered);
    }
}

/// How many connections the server's agent says to have closed since policies or modes changed.
fn closed_by_change(mesh: &Mesh) -> usize {
    let log = mesh.log("agent-b");
    let lines = log.lines().filter(|line| line.contains("closed connections that policy denies now"));
    lines.filter_map(|line| line.split(" closed=").nth(1)?.split(' ').next()?.parse::<usize>().ok()).sum()
}

/// The access log says of each connection that the agent carried, and was cut, that a change of policy did it, and of no other.
fn check_access_log(mesh: &Mesh, steered: bool) {
    let plain = if steered { 2 } else { 0 };
    eventually_equal("lines of denied, member, denied-plain and plain", &[2, 0, plain, plain], || {
        let log = mesh.log("agent-b");
        ["denied", "member", "denied-plain", "plain"].map(|name| {
            let about = format!("src.workload=\"{name}\"");
            log.lines().filter(|line| line.contains(&about) && line.contains("reason=\"policy_changed\"")).count()
        })
    });
}

#[test]
fn default_deny_lets_through_only_what_is_allowed() {
    let mut mesh = Mesh::start_with(&["--default-deny"]);
    let server = mesh.pod(PodSpec { name: "server", namespace: "shop", node: 1, enrolled: true });
    app::server(&server.netns, PORT, app::echo);
    let [friend, other, plain] = [("friend", true), ("other", true), ("plain", false)]
        .map(|(name, enrolled)| mesh.pod(PodSpec { name, namespace: "shop", node: 0, enrolled }));
    let reached = |client: &Pod| app::converse(&client.netns, server.at(false, PORT), "hello").is_ok();
    let denied = |name: &str| {
        let about = format!("src.workload=\"{name}\"");
        let log = mesh.log("agent-b");
        log.lines().filter(|line| line.contains(&about) && line.contains("reason=\"policy_denied\"")).count()
    };
    for (client, name) in [(&friend, "friend"), (&other, "other"), (&plain, "plain")] {
        eventually(&format!("the denial of {name} is logged"), || {
            assert!(!reached(client), "{name}");
            denied(name) > 0
        });
    }
    mesh.apply("rule", &policy("rule", "ALLOW", "{from: [{source: {principals: [cluster.local/ns/shop/sa/friend]}}]}"));
    eventually("what is allowed passes", || reached(&friend));
    for (client, name) in [(&other, "other"), (&plain, "plain")] {
        let before = denied(name);
        assert!(!reached(client), "{name} is denied still");
        eventually(&format!("the denial of {name} is logged"), || denied(name) > before);
    }
    // Without it, nobody is.
    mesh.delete("rule");
    eventually("what was allowed is denied again", || !reached(&friend));
}
