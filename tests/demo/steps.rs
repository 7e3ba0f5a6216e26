//! The steps of the demo, in order. Each shows what was seen and checks what it says.

use std::io::Read as _;
use std::net::{IpAddr, SocketAddr, SocketAddrV4};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Stdio;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::application::{Answer, Nginx, SECRET, curl, curl_command, service_url, url};
use crate::handshake::{Recorded, TUNNEL_PORT, Tunnel, short, tunnels};
use crate::lab::{BATCH, CART, FABRIC, LEGACY, Lab, NODE_A, NODE_B, NODES, Node, OUTSIDE, PODS, Pod, WEB, namespace};
use crate::mesh::{CERTIFICATE_LIFE, Mesh, SERVICE, WEB_PORT};
use crate::payload::{self, Payload, TRANSFER};
use crate::report::Report;
use crate::wire::{Streams, Wire};

/// The port of nginx outside.
const OUTSIDE_PORT: u16 = 80;
/// How much of the payload is read at a time while certificates are rotated: it is still under way at this rate.
const SLOWLY: usize = 64 << 10;
const PAUSE: Duration = Duration::from_millis(50);

/// All that runs.
struct Demo<'a> {
    mesh: Mesh<'a>,
    wire: Wire,
    web: Nginx,
    outside: Nginx,
}

/// The first connection, from all sides.
struct First {
    answer: Answer,
    /// What nginx logged.
    request: Value,
    streams: Streams,
    tunnels: Vec<Tunnel>,
    /// What the agents logged.
    out: Value,
    into: Value,
    /// By how much [`Demo::counts`] rose.
    counts: [u64; 5],
}

impl First {
    fn tunnel(&self) -> Result<&Tunnel> {
        self.tunnels.first().context("the capture has no tunnel from cart to web")
    }

    fn dialled(&self) -> String {
        self.answer.remote.map_or_else(String::new, |remote| remote.to_string())
    }

    fn seen_by_nginx(&self) -> String {
        let [request, scheme, client] = ["request", "scheme", "client"].map(|field| text(&self.request, field));
        format!("{request} over {scheme} from {client}")
    }
}

/// Builds the nodes and shows all steps.
pub(crate) fn all(lab: &Lab, culvert: &Path, report: &mut Report) -> Result<()> {
    report.text("Culvert: two nodes, four pods, nginx and curl");
    let started = Instant::now();
    lab.build().context("building nodes and pods")?;
    payload::write(lab)?;
    let wire = Wire::tap(&namespace(FABRIC), &format!("to-{}", NODE_A.name)).context("capturing between the nodes")?;
    let files = lab.path("files");
    let files = files.to_str().context("a path that is no text")?;
    let web = Nginx::start(lab, WEB.name, WEB_PORT, files)?;
    let outside = Nginx::start(lab, FABRIC, OUTSIDE_PORT, files)?;
    let mesh = Mesh::start(lab, culvert).context("starting controller and agents")?;
    let demo = Demo { mesh, wire, web, outside };
    demo.wait_for_nginx()?;
    demo.show_topology(report, started.elapsed())?;
    let first = demo.application_and_wire(report)?;
    demo.handshake(report, &first)?;
    demo.strict_and_permissive(report)?;
    demo.principals(report)?;
    demo.outside_of_the_mesh(report)?;
    demo.rotation(report)
}

/// What can be done with a demo that was left running.
pub(crate) fn how_to_use(lab: &Lab) -> String {
    let (cart, node) = (namespace(CART.name), namespace(NODE_A.name));
    format!(
        "\nEverything goes on running. For example:
  ip netns exec {cart} curl http://{}:{WEB_PORT}/hello
  ip netns exec {node} curl 127.0.0.1:15000/           the admin interface of {}
  ip netns exec {node} curl 127.0.0.1:15020/metrics
  ls {}                       change these: they are followed
  tail -f {}
To remove it:
  cargo xtask demo --remove",
        WEB.address,
        NODE_A.name,
        lab.path("manifests").display(),
        lab.path("logs/*").display(),
    )
}

impl Demo<'_> {
    fn show_topology(&self, report: &Report, time: Duration) -> Result<()> {
        let mut rows = vec![["pod", "namespace", "node", "address", "identity"].map(str::to_owned).to_vec()];
        for pod in PODS {
            let identity = if pod.in_mesh { pod.spiffe_id() } else { "none: not in the mesh".to_owned() };
            let words = [pod.name, pod.namespace, pod.node].map(str::to_owned);
            rows.push([words.as_slice(), &[pod.address.to_string(), identity]].concat());
        }
        report.table(&rows);
        for node in NODES {
            let pods = PODS.into_iter().filter(|pod| pod.in_mesh && pod.node == node.name);
            for pod in pods {
                let certificate = self.mesh.certificate(node, pod)?;
                let (serial, not_after) = (short(&certificate.serial), certificate.not_after);
                report.text(&format!("{} has a certificate for {}: serial {serial}, until {not_after}", node.name, pod.name));
            }
        }
        report.text(&format!("nginx listens in {} and outside, on {OUTSIDE}; ready after {:.1} s", WEB.name, time.as_secs_f64()));
        Ok(())
    }

    /// Step 1: the first connection, from all sides.
    fn application_and_wire(&self, report: &mut Report) -> Result<First> {
        report.step(1, "what the application saw, and what the wire saw");
        let first = self.first_connection(report)?;
        let First { answer, request, streams, tunnels, out, into, .. } = &first;
        let tunnel = first.tunnel()?;
        let (bytes, records) = tunnel.volume();
        report.table(&[
            row(["who", "saw"]),
            row(["curl", &format!("status {} from {}", answer.status, first.dialled())]),
            row(["nginx", &first.seen_by_nginx()]),
            row(["wire", &format!("{} to {}: {}", tunnel.client, tunnel.server, tunnel.agreed())]),
            row(["", &format!("{bytes} bytes in {} tunnel, {records} sealed records after the hellos", tunnels.len())]),
            row([NODE_A.name, &seen_by_agent(out)]),
            row([NODE_B.name, &seen_by_agent(into)]),
        ]);
        let service = SocketAddr::new(SERVICE.into(), 80).to_string();
        let tls13 = vec!["TLS 1.3".to_owned()];
        let readable = shows(streams, "/hello") || shows(streams, SECRET);
        let (client, server) = (CART.spiffe_id(), WEB.spiffe_id());
        report.check_equal(&answer.status, &200, "curl was served");
        report.check_equal(&first.dialled(), &service, "curl believes to speak to the service's own address");
        report.check_equal(&text(request, "client"), &CART.address.to_string().as_str(), "nginx saw the client's own address");
        report.check_equal(&text(request, "scheme"), &"http", "nginx saw plain HTTP");
        report.check_equal(
            &other_ports(streams, &CART, &WEB),
            &vec![],
            "between the two pods the wire saw the tunnels' port only",
        );
        report.check_equal(&tunnel.choice.versions, &tls13, "all of it is TLS 1.3: every record after the hellos is sealed");
        report.check(!readable, "neither request nor answer can be read on the wire", "they can");
        report.check_equal(
            &text(out, "dst.identity"),
            &server.as_str(),
            format_args!("{} verified the server's SPIFFE ID", NODE_A.name),
        );
        report.check_equal(
            &text(into, "src.identity"),
            &client.as_str(),
            format_args!("{} verified the client's SPIFFE ID", NODE_B.name),
        );
        Ok(first)
    }

    fn first_connection(&self, report: &Report) -> Result<First> {
        let (before, logged) = (self.counts()?, self.logged()?);
        let answer = self.show_curl(report, CART.name, &service_url("/hello"))?;
        let after = self.counts()?;
        let streams = self.wire.streams();
        let local = answer.local.map(|local| local.to_string());
        Ok(First {
            request: self.web.requests()?.pop().context("nginx logged nothing")?,
            tunnels: tunnels(&streams, CART.address, WEB.address)?,
            out: self.line(0, logged, |line| line["src.addr"].as_str() == local.as_deref())?,
            into: self.line(1, logged, |line| line["src.workload"] == CART.name)?,
            counts: std::array::from_fn(|index| after[index].saturating_sub(before[index])),
            answer,
            streams,
        })
    }

    /// Step 2.
    fn handshake(&self, report: &mut Report, first: &First) -> Result<()> {
        report.step(2, "the handshake of that tunnel");
        let tunnel = first.tunnel()?;
        let [captured, client_handshakes, server_handshakes, allowed, delivered] = first.counts;
        let recorded = Recorded {
            dialled: first.dialled(),
            captured,
            client_handshakes,
            server_handshakes,
            server_identity: text(&first.out, "dst.identity").to_owned(),
            client_identity: text(&first.into, "src.identity").to_owned(),
            client_serial: self.mesh.certificate(&NODE_A, &CART)?.serial,
            server_serial: self.mesh.certificate(&NODE_B, &WEB)?.serial,
            allowed,
            delivered,
            application_saw: first.seen_by_nginx(),
            status: first.answer.status,
        };
        report.table(&tunnel.table(&recorded, (NODE_A.name, NODE_B.name))?);
        report.text(
            "Client and server: states of RFC 8446, appendix A. What is sealed there: EncryptedExtensions, CertificateRequest,",
        );
        report.text("Certificate, CertificateVerify and Finished of the server; Certificate, CertificateVerify and Finished of the client.");
        let hybrid = vec!["X25519MLKEM768".to_owned()];
        report.check_equal(&(client_handshakes, server_handshakes), &(1, 1), "one handshake succeeded on each side");
        report.check_equal(&(captured, delivered), &(1, 1), "one connection was captured, one delivered");
        report.check_equal(&tunnel.hello.versions, &tunnel.choice.versions, "the client offers TLS 1.3 and nothing older");
        report.check_equal(&tunnel.choice.key_shares, &hybrid, "the keys were agreed with a post-quantum hybrid");
        report.check(!tunnel.hello.names_server, "the ClientHello does not say who is called", "it does");
        Ok(())
    }

    /// Step 3.
    fn strict_and_permissive(&self, report: &mut Report) -> Result<()> {
        report.step(3, "a client without identity: refused under STRICT, served under PERMISSIVE");
        let address = url(WEB.address, WEB_PORT, "/hello");
        self.apply_mode("STRICT")?;
        report.text("PeerAuthentication of namespace shop: STRICT");
        let logged = self.logged()?;
        let refused = self.show_curl(report, LEGACY.name, &address)?;
        report.check_equal(
            &(refused.code, refused.status),
            &(7, 0),
            "the client without identity is refused: curl could not connect",
        );
        let line = self.line(1, logged, |line| line["src.workload"] == LEGACY.name)?;
        report.check_equal(&text(&line, "reason"), &"plaintext_refused", format_args!("{} logged why", NODE_B.name));
        let served = self.show_curl(report, CART.name, &address)?;
        report.check_equal(&served.status, &200, "the client in the mesh is served at the same time");
        let streams = self.wire.streams();
        report.check(!shows_between(&streams, &LEGACY, &WEB, "/hello"), "the refused client's request never left it", "it did");

        self.apply_mode("PERMISSIVE")?;
        report.text("PeerAuthentication of namespace shop: PERMISSIVE");
        let served = self.show_curl(report, LEGACY.name, &address)?;
        report.check_equal(&served.status, &200, "the client without identity is served");
        let streams = self.wire.streams();
        report.check(
            shows_between(&streams, &LEGACY, &WEB, "/hello"),
            "in plaintext, as the wire shows",
            "the wire does not show it",
        );
        let requests = self.web.requests()?;
        let client = requests.last().map(|request| text(request, "client"));
        report.check_equal(&client, &Some(LEGACY.address.to_string().as_str()), "nginx saw its address");
        Ok(())
    }

    /// Step 4.
    fn principals(&self, report: &mut Report) -> Result<()> {
        report.step(4, "a denied principal refused, an allowed one served");
        let policy = format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: cart-only, namespace: {}}}\nspec:\n  \
             selector: {{matchLabels: {{app: {}}}}}\n  action: ALLOW\n  rules:\n  - from: [{{source: {{principals: [{}]}}}}]\n",
            WEB.namespace,
            WEB.name,
            CART.spiffe_id().trim_start_matches("spiffe://")
        );
        self.mesh.apply("policy.yaml", &policy)?;
        self.mesh.wait_for_policies(&["cart-only"])?;
        report.text(policy.split_once("spec:\n").map_or(&policy, |(_, spec)| spec));
        let requests = self.web.requests()?.len();
        for (pod, allowed) in [(&BATCH, false), (&CART, true)] {
            let logged = self.logged()?;
            let answer = self.show_curl(report, pod.name, &service_url("/hello"))?;
            let line = self.line(1, logged, |line| line["src.identity"] == pod.spiffe_id())?;
            let detail = ["error", "detail"].map(|field| text(&line, field)).concat();
            report.text(&format!(
                "{}: {}, {}{}",
                NODE_B.name,
                pod.spiffe_id(),
                text(&line, "reason"),
                if detail.is_empty() { String::new() } else { format!(": {detail}") }
            ));
            if allowed {
                report.check_equal(&answer.status, &200, format_args!("{} is served", pod.spiffe_id()));
            } else {
                report.check_equal(&answer.status, &0, format_args!("{} is refused", pod.spiffe_id()));
                report.check_equal(
                    &text(&line, "reason"),
                    &"policy_denied",
                    "because policy denies it, although its certificate is good",
                );
                report.check_equal(&self.web.requests()?.len(), &requests, "its request did not reach nginx");
            }
        }
        self.mesh.withdraw("policy.yaml")?;
        self.mesh.wait_for_policies(&[])
    }

    /// Step 5.
    fn outside_of_the_mesh(&self, report: &mut Report) -> Result<()> {
        report.step(5, "traffic to an address outside the mesh: untouched");
        let outcome = |outcome: &str| self.outcome(&NODE_A, outcome);
        let (captured, passed, logged) = (outcome("captured")?, outcome("passed_outside")?, self.logged()?);
        let answer = self.show_curl(report, CART.name, &url(OUTSIDE, OUTSIDE_PORT, "/hello"))?;
        let streams = self.wire.streams();
        let request = self.outside.requests()?.pop().context("nginx outside logged nothing")?;
        let seen = format!("{}:{}", text(&request, "client"), request["port"]);
        let local = answer.local.context("curl did not connect")?;
        report.check_equal(&answer.status, &200, "it is served");
        report.check_equal(&seen, &local.to_string(), "by a server that saw the very socket of curl's, address and port");
        let IpAddr::V4(address) = local.ip() else { anyhow::bail!("curl used {local}") };
        let ends = (SocketAddrV4::new(address, local.port()), SocketAddrV4::new(OUTSIDE, OUTSIDE_PORT));
        let plain = streams.get(&ends).is_some_and(|stream| stream.shows("GET /hello HTTP/1.1"));
        report.check(plain, "the wire saw the same two ends, and the request as curl wrote it", format_args!("{ends:?}"));
        let (captured, passed) = (outcome("captured")? - captured, outcome("passed_outside")? - passed);
        // Connections of the node itself, and of others on this machine, pass as well.
        let counted = format!("{captured} captured, {passed} passed");
        report.check(captured == 0 && passed >= 1, "connect4 let it pass, and captured nothing", counted);
        let carried = self.mesh.access_log_now(&NODE_A, logged[0])?;
        report.check_equal(&carried, &Vec::new(), "the agent has carried nothing meanwhile");
        Ok(())
    }

    /// Step 6.
    fn rotation(&self, report: &mut Report) -> Result<()> {
        report.step(6, "a certificate rotated under a running transfer");
        let before = (self.mesh.certificate(&NODE_A, &CART)?, self.mesh.certificate(&NODE_B, &WEB)?);
        let made = || Ok::<_, anyhow::Error>(tunnels(&self.wire.streams(), CART.address, WEB.address)?.len());
        let logged = self.logged()?;
        report.text(&format!("{}$ curl {} ({} MiB, read slowly)", CART.name, service_url("/payload"), TRANSFER >> 20));
        let mut command = curl_command(CART.name, &service_url("/payload"));
        let mut transfer = command.arg("--no-buffer").stdout(Stdio::piped()).process_group(0).spawn().context("starting curl")?;
        let mut output = transfer.stdout.take().context("curl has no output")?;
        let mut expected = Payload::default();
        let (mut received, mut whole) = (0, true);
        let started = Instant::now();
        let mut read = |limit: usize| -> Result<bool> {
            let mut buffer = vec![0; limit];
            let length = output.read(&mut buffer).context("reading from curl")?;
            whole &= buffer[..length].iter().all(|byte| *byte == expected.next_byte());
            received += length;
            Ok(length > 0)
        };
        let mut after = before.clone();
        self.mesh.wait_longer("both certificates to be rotated", || {
            let _more = read(SLOWLY)?;
            sleep(PAUSE);
            after = (self.mesh.certificate(&NODE_A, &CART)?, self.mesh.certificate(&NODE_B, &WEB)?);
            Ok((after.0.serial != before.0.serial && after.1.serial != before.1.serial).then_some(()))
        })?;
        let rotated = started.elapsed();
        let known = made()?;
        let meanwhile = self.show_curl(report, CART.name, &service_url("/hello"))?;
        let fresh = made()? - known;
        while read(1 << 20)? {}
        let status = transfer.wait().context("waiting for curl")?;
        let line = self.line(0, logged, |line| line["bytes_recv"].as_u64() >= Some(TRANSFER as u64))?;
        let serial = |change: (&str, &str)| format!("{} -> {}", short(change.0), short(change.1));
        report.table(&[
            row(["certificate", "serial"]),
            row([CART.name, &serial((&before.0.serial, &after.0.serial))]),
            row([WEB.name, &serial((&before.1.serial, &after.1.serial))]),
        ]);
        report.text(&format!(
            "rotated {:.1} s into a transfer of {:.1} s; certificates live for {CERTIFICATE_LIFE} here, and are renewed at half their life",
            rotated.as_secs_f64(),
            started.elapsed().as_secs_f64()
        ));
        report.check(
            before.0.serial != after.0.serial && before.1.serial != after.1.serial,
            "both certificates were replaced during the transfer",
            "no",
        );
        report.check(
            meanwhile.status == 200 && fresh == 1,
            "a connection made meanwhile took a new tunnel, under the new certificate",
            format_args!("status {}, {fresh} new tunnels", meanwhile.status),
        );
        report.check(
            status.success() && whole && received == TRANSFER,
            "the transfer went on to its end, every byte right",
            format_args!("{status}, {received} bytes"),
        );
        report.check_equal(&text(&line, "reason"), &"finished", "it was one connection for the agent, and ended in order");
        Ok(())
    }

    fn apply_mode(&self, mode: &str) -> Result<()> {
        let namespace = WEB.namespace;
        self.mesh.apply(
            "mode.yaml",
            &format!(
                "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: default, namespace: {namespace}}}\nspec: {{mtls: {{mode: {mode}}}}}\n"
            ),
        )?;
        self.mesh.wait_for_mode(mode)
    }

    fn show_curl(&self, report: &Report, place: &str, url: &str) -> Result<Answer> {
        let answer = curl(place, url)?;
        report.text(&answer.command);
        let words = if answer.error.is_empty() { answer.body.trim() } else { &answer.error };
        report.text(&format!("  {words}"));
        Ok(answer)
    }

    /// Lengths of the access logs, in the order of the nodes.
    fn logged(&self) -> Result<[usize; 2]> {
        Ok([self.mesh.access_log_length(&NODE_A)?, self.mesh.access_log_length(&NODE_B)?])
    }

    /// The first line of a node's access log after `logged` that fits.
    fn line(&self, node: usize, logged: [usize; 2], fits: impl Fn(&Value) -> bool) -> Result<Value> {
        let lines = self.mesh.access_log(NODES[node], logged[node], fits)?;
        lines.into_iter().next().context("no line")
    }

    /// Captured, handshakes of the client's and of the server's side, allowed by policy, delivered.
    fn counts(&self) -> Result<[u64; 5]> {
        let handshakes = |node, side: &str| {
            self.mesh.metric(node, "culvert_handshakes_total", &[&format!("side=\"{side}\""), "result=\"ok\""])
        };
        Ok([
            self.outcome(&NODE_A, "captured")?,
            handshakes(&NODE_A, "client")?,
            handshakes(&NODE_B, "server")?,
            self.mesh.metric(&NODE_B, "culvert_policy_verdicts_total", &["verdict=\"allow\""])?,
            self.outcome(&NODE_B, "admitted_delivery")?,
        ])
    }

    /// How often a node's programs have ended in this way.
    fn outcome(&self, node: &Node, outcome: &str) -> Result<u64> {
        self.mesh.metric(node, "culvert_capture_outcomes_total", &[&format!("outcome=\"{outcome}\"")])
    }

    /// nginx takes a moment to listen. Nobody asks it for anything that would be counted.
    fn wait_for_nginx(&self) -> Result<()> {
        for (place, port) in [(WEB.name, WEB_PORT), (FABRIC, OUTSIDE_PORT)] {
            let listening = || {
                let address = SocketAddr::from(([127, 0, 0, 1], port));
                Ok(Some(crate::netns::inside(&namespace(place), || Ok(std::net::TcpStream::connect(address).map(drop)?))?))
            };
            self.mesh.wait(&format!("nginx in {place}"), listening)?;
        }
        Ok(())
    }
}

fn text<'a>(line: &'a Value, field: &str) -> &'a str {
    line[field].as_str().unwrap_or_default()
}

fn row<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.map(str::to_owned).to_vec()
}

/// The agent's own line about the connection.
fn seen_by_agent(line: &Value) -> String {
    let (source, destination) = (text(line, "src.identity"), text(line, "dst.identity"));
    format!("{}: {source} to {destination}, {}", text(line, "direction"), text(line, "security"))
}

/// The ports other than the tunnels' on which anything passed between two pods.
fn other_ports(streams: &Streams, client: &Pod, server: &Pod) -> Vec<u16> {
    let between = streams.keys().filter(|(from, to)| *from.ip() == client.address && *to.ip() == server.address);
    between.map(|(_, to)| to.port()).filter(|port| *port != TUNNEL_PORT).collect()
}

fn shows(streams: &Streams, words: &str) -> bool {
    streams.values().any(|stream| stream.shows(words))
}

fn shows_between(streams: &Streams, client: &Pod, server: &Pod, words: &str) -> bool {
    let between = streams.iter().filter(|((from, to), _)| *from.ip() == client.address && *to.ip() == server.address);
    between.into_iter().any(|(_, stream)| stream.shows(words))
}
