//! Promise: pods of the mesh that share a node speak through its kernel, attested and at native speed, where nobody asks for encryption; and
//! everything that holds for a tunnel holds for them.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use harness::{Capture, Mesh, Pod, PodSpec, app, eventually};
use nix::sys::signal::Signal;

mod telling;

const PORT: u16 = 8080;
const OTHER_PORT: u16 = 8081;
const TUNNELS: u16 = 15008;
const PATIENCE: Duration = Duration::from_secs(8);

/// A client and a server of the mesh on one node, under STRICT: what is not attested is refused.
struct Stage {
    mesh: Mesh,
    client: Pod,
    server: Pod,
}

impl Stage {
    fn new() -> Self {
        Self::with(&[])
    }

    /// The same, with more arguments for the controller.
    fn with(controller: &[&str]) -> Self {
        let mut mesh = Mesh::start_with(controller);
        mesh.mode("shop", "STRICT");
        let server = mesh.pod(PodSpec { name: "server", namespace: "shop", node: 0, enrolled: true });
        [PORT, OTHER_PORT].into_iter().for_each(|port| app::server(&server.netns, port, app::echo));
        let client = mesh.pod(PodSpec { name: "client", namespace: "shop", node: 0, enrolled: true });
        Self { mesh, client, server }
    }

    fn server(&self) -> SocketAddr {
        self.server.at(false, PORT)
    }

    /// Whether the server answers.
    fn reached(&self) -> bool {
        app::converse(&self.client.netns, self.server(), "hello").is_ok()
    }

    /// How often the programs of the node ended so.
    fn outcome(&self, word: &str) -> u64 {
        self.mesh.outcome(0, word)
    }

    /// Waits until the kernel lets the client's connections go to the server by themselves.
    fn await_kernel(&self, to: SocketAddr) {
        eventually("the kernel has a verdict", || {
            let before = self.outcome("admitted_same_node");
            app::converse(&self.client.netns, to, "hello").is_ok() && self.outcome("admitted_same_node") > before
        });
    }

    /// Opens a connection that stays in the kernel.
    fn open(&self) -> TcpStream {
        self.await_kernel(self.server());
        let before = self.outcome("admitted_same_node");
        let stream = app::open(&self.client.netns, self.server()).expect("a connection");
        assert_eq!(self.outcome("admitted_same_node"), before + 1, "it has not stayed in the kernel");
        stream
    }

    fn policy(&self, name: &str, action: &str, rules: &str) {
        self.mesh.apply(
            name,
            &format!(
                "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: shop}}\n\
                 spec: {{action: {action}, rules: [{rules}]}}\n"
            ),
        );
    }
}

/// A rule that matches the client.
const CLIENT: &str = "{from: [{source: {principals: [cluster.local/ns/shop/sa/client]}}]}";
/// A rule that matches nobody of these tests.
const NOBODY: &str = "{from: [{source: {principals: [cluster.local/ns/shop/sa/nobody]}}]}";

/// What passes within the node while the client speaks to a server, and what it saw.
fn captured(stage: &Stage, to: SocketAddr, marker: &str) -> (Capture, app::Seen) {
    let mut capture = stage.mesh.capture_on_node(0);
    let seen = app::converse(&stage.client.netns, to, marker).expect("an answer");
    capture.finish();
    (capture, seen)
}

fn passed(capture: &Capture, to: SocketAddr) -> bool {
    capture.segments().iter().any(|(_, destination)| *destination == to)
}

#[test]
fn the_first_connection_is_in_a_tunnel_and_later_ones_are_in_the_kernel_with_the_same_addresses() {
    let stage = Stage::new();
    eventually("the server is reached", || stage.reached());
    for v6 in [false, true] {
        let to = stage.server.at(v6, OTHER_PORT);
        let (first, _) = captured(&stage, to, "marker-first");
        assert!(!first.shows(b"marker-first"), "the first is not encrypted, before anybody has decided");
        assert!(passed(&first, stage.server.at(v6, TUNNELS)) && !passed(&first, to));
        stage.await_kernel(to);
        let (capture, seen) = captured(&stage, to, "marker-kernel");
        assert!(capture.shows(b"marker-kernel"), "it has not stayed as it is");
        assert!(passed(&capture, to), "it has gone another way");
        assert_eq!((seen.peer, seen.client), (to, seen.local));
        assert_eq!(seen.client.ip(), stage.client.at(v6, 0).ip());
    }
    // What says that it is the client, and is not, is plaintext under STRICT.
    let mut mesh = stage.mesh;
    let outsider = mesh.pod(PodSpec { name: "outsider", namespace: "shop", node: 0, enrolled: false });
    let refused = app::converse(&outsider.netns, stage.server.at(false, PORT), "hello").expect_err("STRICT takes no plaintext");
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn a_denial_is_a_denial_and_a_new_one_cuts_what_is_open() {
    let stage = Stage::new();
    stage.policy("rule", "ALLOW", NOBODY);
    stage.mesh.await_policy("shop", Some("rule"));
    eventually("who is not allowed is refused", || !stage.reached());
    assert!((0..5).all(|_| !stage.reached()));
    assert_eq!(stage.outcome("admitted_same_node"), 0, "the kernel has let a connection through that policy denies");

    stage.policy("rule", "ALLOW", CLIENT);
    eventually("who is allowed is served", || stage.reached());
    let open = stage.open();
    app::ping(&open).expect("open");
    stage.policy("rule", "DENY", CLIENT);
    assert!(app::breaks(&open, PATIENCE), "an open connection outlives its denial");
    assert!((0..5).all(|_| !stage.reached()), "a verdict outlives its denial");
    let cut = |line: &&str| line.contains("reason=\"policy_changed\"") && line.contains("security=\"attested\"");
    eventually("both sides are told why", || stage.mesh.log("agent-a").lines().filter(cut).count() == 2);

    // Another policy than one that matches voids the verdict as well, but breaks nothing.
    stage.policy("rule", "ALLOW", CLIENT);
    eventually("who is allowed is served", || stage.reached());
    let open = stage.open();
    let tunnelled =
        || stage.mesh.metrics(0).sum("istio_tcp_connections_opened_total", &["connection_security_policy=\"mutual_tls\""]);
    let before = tunnelled();
    stage.policy("other", "DENY", NOBODY);
    eventually("the next connection is decided on anew", || stage.reached() && tunnelled() > before);
    app::ping(&open).expect("an open connection that nothing denies has been cut");
}

#[test]
fn a_change_of_mode_voids_the_verdict_and_breaks_nothing_that_it_allows() {
    let stage = Stage::new();
    let open = stage.open();
    let captures = || stage.outcome("captured");
    for mode in ["PERMISSIVE", "STRICT"] {
        let before = captures();
        stage.mesh.mode("shop", mode);
        eventually("the next connection is decided on anew", || stage.reached() && captures() > before);
        app::ping(&open).expect("an open connection that nothing denies has been cut");
        stage.await_kernel(stage.server());
    }
    // DISABLE needs no verdict.
    stage.mesh.mode("shop", "DISABLE");
    eventually("it passes as what is outside", || {
        let before = stage.outcome("passed_outside");
        stage.reached() && stage.outcome("passed_outside") > before
    });
}

#[test]
fn a_destination_that_refuses_does_so_itself_and_resets_and_half_closes_are_what_they_are() {
    let stage = Stage::new();
    stage.await_kernel(stage.server());
    let reports = app::reporting(&stage.server.netns, 8082, |mut stream: TcpStream| {
        let mut all = Vec::new();
        let end = stream.read_to_end(&mut all).map_err(|error| error.kind());
        let _gone = stream.write_all(b"bye");
        end.map(|_| all)
    });
    let to = stage.server.at(false, 8082);
    eventually("it listens", || {
        let half_closed = || -> std::io::Result<Vec<u8>> {
            let mut stream = app::connect(&stage.client.netns, to)?;
            stream.write_all(b"hello")?;
            stream.shutdown(Shutdown::Write)?;
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer)?;
            Ok(answer)
        };
        half_closed().is_ok_and(|answer| answer == b"bye") && reports.recv_timeout(PATIENCE) == Ok(Ok(b"hello".to_vec()))
    });
    stage.await_kernel(stage.server());
    let stream = app::connect(&stage.client.netns, to).expect("a connection");
    app::reset(stream);
    assert_eq!(reports.recv_timeout(PATIENCE).expect("a report"), Err(ErrorKind::ConnectionReset));

    // A server that ends: what was decided of its port still holds, and the pod's own kernel answers.
    let server = stage.server.netns.run(|| std::net::TcpListener::bind("0.0.0.0:8083").expect("a free port"));
    let to = stage.server.at(false, 8083);
    eventually("the kernel has a verdict", || {
        let before = stage.outcome("passed_same_node");
        app::connect(&stage.client.netns, to).is_ok() && stage.outcome("passed_same_node") > before
    });
    drop(server);
    let refused = app::connect(&stage.client.netns, to).expect_err("nobody listens").kind();
    assert_eq!(refused, ErrorKind::ConnectionRefused, "connect() itself says so");
    let told = |line: &&str| line.contains("reason=\"destination_refused\"") && line.contains("security=\"attested\"");
    eventually("it is told of", || stage.mesh.log("agent-a").lines().filter(told).count() == 2);
}

#[test]
fn without_an_agent_no_verdict_holds_and_its_successor_decides_anew() {
    let mut stage = Stage::new();
    let open = stage.open();
    stage.mesh.kill_agent(0);
    let refused =
        || app::connect(&stage.client.netns, stage.server()).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused);
    eventually("without an agent new connections are refused", refused);
    assert!((0..20).all(|_| refused()), "a verdict outlives its agent");
    app::ping(&open).expect("what is open needs no agent");
    // Denied while nobody was there to hear of it.
    stage.policy("rule", "DENY", CLIENT);
    stage.mesh.start_agent(0);
    assert!(app::breaks(&open, PATIENCE), "an open connection outlives its denial");
    assert!((0..20).all(|_| !stage.reached()), "the successor keeps what its predecessor decided");
    stage.policy("rule", "ALLOW", CLIENT);
    eventually("the successor decides by itself", || stage.reached());
    stage.await_kernel(stage.server());

    let open = stage.open();
    stage.mesh.signal_agent(0, Signal::SIGTERM);
    let refused =
        || app::connect(&stage.client.netns, stage.server()).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused);
    eventually("an agent that stops takes its verdicts with it", refused);
    assert!((0..20).all(|_| refused()));
    assert!(stage.mesh.await_agent(0), "the agent has not stopped in order");
    app::ping(&open).expect("what is open needs no agent");
    assert!(!stage.mesh.log("agent-a").contains("reason=\"draining\""), "the agent says that it has ended what goes on");
    // Its end is told by the next one.
    let own = open.local_addr().expect("connected");
    drop(open);
    stage.mesh.start_agent(0);
    let told = |line: &&str| line.contains(&format!("src.addr={own} ")) && line.contains("reason=\"finished\"");
    eventually("it is told of", || stage.mesh.log("agent-a").lines().filter(told).count() == 2);
}

#[test]
fn a_connection_on_its_way_while_its_destination_changes_is_decided_on_anew() {
    let stage = Stage::new();
    let (client, to) = (&stage.client.netns, stage.server());
    // The server's link to its node: what is sent meanwhile is lost, and sent again after a second.
    let cut = || stage.mesh.node(0).ip("link set v1 nomaster");
    let mend = || stage.mesh.node(0).ip("link set v1 master br0");
    for (name, action, allowed) in [("one", "ALLOW", true), ("other", "DENY", false)] {
        stage.await_kernel(to);
        let (before, passed) = (stage.outcome("steered_same_node"), stage.outcome("passed_same_node"));
        cut();
        let conversation = std::thread::scope(|scope| {
            let conversation = scope.spawn(|| app::converse(client, to, "hello"));
            eventually("the connection is on its way", || stage.outcome("passed_same_node") > passed);
            stage.policy(name, action, CLIENT);
            stage.mesh.await_policy_beside(name);
            mend();
            conversation.join().expect("a conversation")
        });
        assert_eq!(stage.outcome("steered_same_node"), before + 1, "the kernel has not asked");
        match conversation {
            Ok(seen) => assert!(allowed && seen.client.ip() == stage.client.v4, "{name}: {seen:?}"),
            Err(error) => assert!(!allowed && error.kind() == ErrorKind::ConnectionReset, "{name}: {error}"),
        }
    }
    let lines = |part: &str| {
        let log = stage.mesh.log("agent-a");
        log.lines().filter(|line| line.contains("security=\"attested\"") && line.contains(part)).count()
    };
    eventually("the agent says that policy denies it", || lines("reason=\"policy_denied\"") == 1);
}

#[test]
fn where_the_network_takes_tunnels_only_connections_go_back_to_them() {
    let stage = Stage::new();
    stage.await_kernel(stage.server());
    // As a NetworkPolicy of the user's may have it, which knows of port 15008 only.
    for rule in ["add pref 5 lookup local", "del pref 0", "add pref 1 iif eth0 ipproto tcp dport 8080 blackhole"] {
        stage.server.netns.ip(&format!("rule {rule}"));
    }
    let (given_up, passed) = (Duration::from_millis(500), stage.outcome("passed_same_node"));
    let to = stage.server();
    let lost = stage.client.netns.run(move || TcpStream::connect_timeout(&to, given_up)).expect_err("nobody hears it");
    assert_eq!((lost.kind(), stage.outcome("passed_same_node")), (ErrorKind::TimedOut, passed + 1));
    assert!((0..5).all(|_| stage.reached()), "the next ones are lost, too");
    assert_eq!(stage.outcome("passed_same_node"), passed + 1, "it is tried again and again");
    let told = |line: &&str| line.contains("reason=\"destination_unreachable\"") && line.contains("security=\"attested\"");
    eventually("it is told of", || stage.mesh.log("agent-a").lines().filter(told).count() == 1);
}

#[test]
fn a_verdict_ends_with_the_certificates_of_its_day() {
    let mut stage = Stage::with(&["--cert-ttl", "8s"]);
    let open = stage.open();
    stage.mesh.kill_controller();
    let (killed, mut served) = (Instant::now(), Instant::now());
    // Who has no certificate waits for one for some seconds before it says so.
    while stage.reached() {
        served = Instant::now();
    }
    assert!(served - killed < Duration::from_secs(9), "a verdict outlives its certificates");
    assert!(!stage.reached());
    app::ping(&open).expect("a connection that was opened before lives on");
    stage.mesh.start_controller();
    eventually("there are certificates again", || stage.reached());
    // Renewals come and go, and are not waited for.
    let until = Instant::now() + Duration::from_secs(10);
    while Instant::now() < until {
        assert!(stage.reached(), "a renewal has broken it");
    }
    stage.await_kernel(stage.server());
}

#[test]
fn a_pod_that_leaves_the_mesh_has_no_verdicts() {
    let stage = Stage::new();
    stage.await_kernel(stage.server());
    let labelled = stage.mesh.manifest("pod-client");
    stage.mesh.apply("pod-client", &labelled.replace("mesh: enabled", "mesh: disabled"));
    // Outside of the mesh it is a stranger to a server that is STRICT.
    eventually("the client is out of the mesh", || {
        app::connect(&stage.client.netns, stage.server()).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
    });
    stage.mesh.apply("pod-client", &labelled);
    eventually("the client is back", || stage.reached());
    stage.await_kernel(stage.server());
}

/// What the label says.
fn labelled(manifest: &str, way: &str) -> String {
    manifest.replacen("culvert.dev/mesh:", &format!("culvert.dev/same-node: {way}, culvert.dev/mesh:"), 1)
}

#[test]
fn either_pod_may_demand_encryption_and_what_is_open_without_is_cut() {
    let stage = Stage::new();
    let encrypted = |marker: &str| {
        let (capture, _) = captured(&stage, stage.server(), marker);
        !capture.shows(marker.as_bytes()) && !passed(&capture, stage.server())
    };
    for pod in ["server", "client"] {
        let open = stage.open();
        let name = format!("pod-{pod}");
        let plain = stage.mesh.manifest(&name);
        stage.mesh.apply(&name, &labelled(&plain, "tunnel"));
        assert!(app::breaks(&open, PATIENCE), "{pod}: an open connection goes on in plaintext");
        let cut = || stage.mesh.log("agent-a").lines().filter(|line| line.contains("reason=\"policy_changed\"")).count();
        eventually("it is told why", || cut() == if pod == "server" { 2 } else { 4 });
        for number in 0..3 {
            assert!(encrypted(&format!("marker-{pod}-{number}")), "{pod}: not encrypted, though it demands it");
        }
        assert_eq!(stage.mesh.workload(0, pod)["same_node"], "tunnel");
        stage.mesh.apply(&name, &plain);
        stage.await_kernel(stage.server());
    }
}

#[test]
fn a_namespace_may_demand_encryption_and_a_slip_of_the_pen_does() {
    let stage = Stage::new();
    stage.await_kernel(stage.server());
    let way = || stage.mesh.workload(0, "server")["same_node"].as_str().map(str::to_owned);
    let namespace = |way: &str| {
        let text =
            format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: shop, labels: {{culvert.dev/same-node: {way}}}}}\n");
        stage.mesh.apply("namespace-shop", &text);
    };
    namespace("tunnel");
    eventually("the namespace's word is heard", || way().as_deref() == Some("tunnel"));
    let before = stage.outcome("passed_same_node");
    assert!((0..5).all(|_| stage.reached()));
    assert_eq!(stage.outcome("passed_same_node"), before, "a connection has stayed in the kernel");
    namespace("kernel");
    stage.await_kernel(stage.server());
    namespace("kernal");
    eventually("the slip is named", || stage.mesh.log("controller").contains("`kernal`"));
    eventually("it demands encryption", || way().as_deref() == Some("tunnel"));
}
