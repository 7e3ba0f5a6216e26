//! Promise: what agents tell of a connection is true, to the byte: both ends' access logs and metrics agree.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::Shutdown;

use harness::{Mesh, MeshSpec, Metrics, PodSpec, app, eventually};
use serde_json::Value;

const PORT: u16 = 8080;
const REQUEST: usize = 123_457;
const RESPONSE: usize = 1_765_433;

in_each_form!(logs_and_metrics_of_both_agents_agree_to_the_byte);

/// A line of the access log.
struct Line(Format, String);

#[derive(Clone, Copy, PartialEq)]
enum Format {
    Text,
    Json,
}

impl Line {
    /// A field's value as text.
    fn field(&self, name: &str) -> Option<String> {
        match self.0 {
            Format::Json => {
                let line: Value = serde_json::from_str(&self.1).unwrap_or_else(|error| panic!("{error} in {}", self.1));
                let value = line.get(name)?;
                Some(value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned))
            }
            Format::Text => {
                let value = self.1.split_once(&format!(" {name}="))?.1;
                Some(value.split(' ').next()?.trim_matches('"').to_owned())
            }
        }
    }

    fn check(&self, fields: &[(&str, &str)]) {
        for (name, wanted) in fields {
            assert_eq!(self.field(name).as_deref(), Some(*wanted), "{name} in {}", self.1);
        }
    }
}

/// The access-log lines of the node's agent that say this.
fn lines(mesh: &Mesh, who: &str, format: Format, message: &str) -> Vec<Line> {
    let log = mesh.log(who);
    let about = log.lines().filter(|line| line.contains(message) && line.contains("access"));
    about.map(|line| Line(format, line.to_owned())).collect()
}

/// Answers a request of `REQUEST` bytes by one of `RESPONSE` bytes.
fn answer(mut stream: std::net::TcpStream) {
    let mut request = Vec::new();
    let _read = stream.read_to_end(&mut request);
    if request.len() == REQUEST {
        let _written = stream.write_all(&[2; RESPONSE]);
    }
}

fn logs_and_metrics_of_both_agents_agree_to_the_byte(forms: [&str; 2]) {
    for formats in [[Format::Text, Format::Json], [Format::Json, Format::Text]] {
        let names = formats.map(|format| if format == Format::Json { "json" } else { "text" });
        let agents: [&[&str]; 2] =
            [&["--tunnel-form", forms[0], "--log-format", names[0]], &["--tunnel-form", forms[1], "--log-format", names[1]]];
        let mut mesh = Mesh::start_as(MeshSpec { agents, ..MeshSpec::default() });
        let server = mesh.pod(PodSpec { name: "server", namespace: "shop", node: 1, enrolled: true });
        app::server(&server.netns, PORT, answer);
        let client = mesh.pod(PodSpec { name: "client", namespace: "street", node: 0, enrolled: true });
        // Nobody listens there: a connection that is known to the byte, too, and is no part of what is counted below.
        let to_nobody = || {
            let stream = app::connect(&client.netns, server.at(false, 9));
            stream.and_then(|mut stream| stream.read(&mut [0; 1])).expect_err("nobody listens").kind()
        };
        eventually("the server's agent answers", || {
            to_nobody() == ErrorKind::ConnectionReset && !lines(&mesh, "agent-b", formats[1], "connection failed").is_empty()
        });

        let mut stream = app::connect(&client.netns, server.at(false, PORT)).expect("a connection");
        let own = stream.local_addr().expect("connected");
        stream.write_all(&[1; REQUEST]).expect("open");
        stream.shutdown(Shutdown::Write).expect("open");
        let mut response = Vec::new();
        stream.read_to_end(&mut response).expect("a response");
        assert_eq!(response.len(), RESPONSE);
        drop(stream);

        for who in ["agent-a", "agent-b"] {
            let format = formats[usize::from(who == "agent-b")];
            eventually("the line is written", || !lines(&mesh, who, format, "connection closed").is_empty());
        }
        check_logs(&mesh, formats, own, server.at(false, PORT));
        check_metrics(&mesh);
    }
}

fn check_logs(mesh: &Mesh, formats: [Format; 2], client: std::net::SocketAddr, server: std::net::SocketAddr) {
    let common = [
        ("src.workload", "client"),
        ("src.namespace", "street"),
        ("src.identity", "spiffe://cluster.local/ns/street/sa/client"),
        ("dst.workload", "server"),
        ("dst.namespace", "shop"),
        ("dst.identity", "spiffe://cluster.local/ns/shop/sa/server"),
        ("security", "mutual_tls"),
    ];
    let (request, response) = (REQUEST.to_string(), RESPONSE.to_string());
    // Each agent tells from its own pod's point of view.
    let sides = [("agent-a", "outbound", &request, &response), ("agent-b", "inbound", &response, &request)];
    for ((who, direction, sent, received), format) in sides.into_iter().zip(formats) {
        let closed = lines(mesh, who, format, "connection closed");
        assert_eq!(closed.len(), 1, "one connection, one line");
        closed[0].check(&common);
        closed[0].check(&[("direction", direction), ("bytes_sent", sent), ("bytes_recv", received), ("reason", "finished")]);
        closed[0].check(&[("dst.addr", &server.to_string())]);
        let source = closed[0].field("src.addr").expect("an address");
        assert!(source.starts_with(&client.ip().to_string()), "{source}");
        if direction == "outbound" {
            assert_eq!(source, client.to_string());
        }
        assert!(closed[0].field("duration_ms").is_some_and(|duration| duration.parse::<u64>().is_ok()));
        let failed = lines(mesh, who, format, "connection failed");
        let last = failed.last().expect("a line of the connection to nobody");
        last.check(&common);
        last.check(&[("direction", direction), ("reason", "destination_refused"), ("bytes_sent", "0"), ("bytes_recv", "0")]);
    }
}

fn check_metrics(mesh: &Mesh) {
    let pages: [Metrics; 2] = [mesh.metrics(0), mesh.metrics(1)];
    for (page, reporter) in pages.iter().zip(["source", "destination"]) {
        let reporter = format!("reporter=\"{reporter}\"");
        let labels = [
            reporter.as_str(),
            "source_workload=\"client\"",
            "source_workload_namespace=\"street\"",
            "source_principal=\"spiffe://cluster.local/ns/street/sa/client\"",
            "destination_workload=\"server\"",
            "destination_workload_namespace=\"shop\"",
            "destination_principal=\"spiffe://cluster.local/ns/shop/sa/server\"",
            "connection_security_policy=\"mutual_tls\"",
            "request_protocol=\"tcp\"",
        ];
        let sum = |name: &str| page.sum(name, &labels);
        assert_eq!(sum("istio_tcp_connections_opened_total"), 1, "{reporter}");
        assert_eq!(sum("istio_tcp_connections_closed_total"), 1, "{reporter}");
        assert_eq!(sum("istio_tcp_received_bytes_total"), REQUEST as u64, "{reporter}: the request");
        assert_eq!(sum("istio_tcp_sent_bytes_total"), RESPONSE as u64, "{reporter}: the response");
        let refused = [&labels[..], &["response_flags=\"destination_refused\""]].concat();
        assert!(page.sum("istio_tcp_connections_failed_total", &refused) > 0, "{reporter}");
        assert_eq!(page.sum("istio_tcp_received_bytes_total", &[]), REQUEST as u64, "{reporter}: and nothing else");
    }
}

#[test]
fn plaintext_denials_and_refusals_are_counted_as_what_they_are() {
    let mut mesh = Mesh::start();
    let server = mesh.pod(PodSpec { name: "server", namespace: "shop", node: 1, enrolled: true });
    app::server(&server.netns, PORT, answer);
    let [denied, plain] = [("denied", true), ("plain", false)]
        .map(|(name, enrolled)| mesh.pod(PodSpec { name, namespace: "shop", node: 0, enrolled }));
    mesh.deny("denied");
    let at_server = |name: &str, more: &[&str]| {
        let labels = [&["reporter=\"destination\"", "destination_workload=\"server\""], more].concat();
        mesh.metrics(1).sum(name, &labels)
    };

    // Before the agent has the policy in force the kernel passes plaintext, which nobody counts.
    let of_plain = ["source_workload=\"plain\"", "source_principal=\"unknown\"", "connection_security_policy=\"none\""];
    eventually("plaintext comes to the agent", || {
        app::connect(&plain.netns, server.at(false, PORT)).is_ok()
            && at_server("istio_tcp_connections_closed_total", &of_plain) > 0
    });
    let opened = at_server("istio_tcp_connections_opened_total", &of_plain);
    let mut stream = app::connect(&plain.netns, server.at(false, PORT)).expect("PERMISSIVE takes plaintext");
    stream.write_all(&[1; REQUEST]).expect("open");
    stream.shutdown(Shutdown::Write).expect("open");
    assert_eq!(stream.read_to_end(&mut Vec::new()).expect("a response"), RESPONSE);
    eventually("it is counted", || at_server("istio_tcp_connections_opened_total", &of_plain) == opened + 1);
    eventually("to the byte", || at_server("istio_tcp_received_bytes_total", &of_plain) == REQUEST as u64);
    assert_eq!(at_server("istio_tcp_sent_bytes_total", &of_plain), RESPONSE as u64);
    let tunnelled = ["source_workload=\"plain\"", "connection_security_policy=\"mutual_tls\""];
    assert_eq!(at_server("istio_tcp_connections_opened_total", &tunnelled), 0, "and as nothing else");

    let of_denied = [
        "source_principal=\"spiffe://cluster.local/ns/shop/sa/denied\"",
        "connection_security_policy=\"mutual_tls\"",
        "response_flags=\"policy_denied\"",
    ];
    let verdicts = || mesh.metrics(1).sum("culvert_policy_verdicts_total", &["policy=\"shop/rule\"", "verdict=\"deny\""]);
    eventually("a denial is counted", || {
        assert!(app::converse(&denied.netns, server.at(false, PORT), "hello").is_err());
        at_server("istio_tcp_connections_failed_total", &of_denied) > 0
    });
    assert_eq!(verdicts(), at_server("istio_tcp_connections_failed_total", &of_denied), "by the policy as by the pair");
    assert_eq!(mesh.metrics(1).sum("culvert_connections_closed_total", &["reason=\"policy_denied\""]), verdicts());
    let at_source = |more: &[&str]| {
        let labels = [&["reporter=\"source\"", "source_workload=\"denied\""], more].concat();
        mesh.metrics(0).sum("istio_tcp_connections_failed_total", &labels)
    };
    eventually("at the source as well", || at_source(&["response_flags=\"policy_denied\""]) == verdicts());

    let refused = || mesh.metrics(1).sum("culvert_plaintext_refused_total", &[]);
    assert_eq!(refused(), 0);
    mesh.mode("shop", "STRICT");
    let is_refused =
        || app::connect(&plain.netns, server.at(false, PORT)).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused);
    eventually("STRICT holds", is_refused);
    eventually("the refusal is counted", || refused() > 0);
    let before = refused();
    assert!((0..5).all(|_| is_refused()));
    eventually("each is counted", || refused() == before + 5);
    let by_pair = [&of_plain[..], &["response_flags=\"plaintext_refused\""]].concat();
    eventually("by the pair as well", || at_server("istio_tcp_connections_failed_total", &by_pair) == refused());
}
