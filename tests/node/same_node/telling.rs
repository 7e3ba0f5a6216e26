//! What is told of connections that stay in the kernel: true to the byte, of each once, whoever ends it and however.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpStream};

use harness::{app, eventually};
use socket2::{Domain, Socket, Type};

use super::{PATIENCE, Stage};

const REQUEST: usize = 1_000_003;
const RESPONSE: usize = 1_765_433;

#[test]
fn a_connection_whose_ends_another_takes_before_the_destination_knows_is_told_of_like_the_other() {
    let stage = Stage::new();
    let first = stage.open();
    app::ping(&first).expect("an answer");
    let (own, to) = (first.local_addr().expect("connected"), stage.server());
    let passed = stage.outcome("passed_same_node");
    // The reset is lost, and the server's end lives on.
    stage.mesh.node(0).ip("link set v1 nomaster");
    app::reset(first);
    stage.mesh.node(0).ip("link set v1 master br0");
    let second = stage.client.netns.run(move || {
        let socket = Socket::new(Domain::for_address(own), Type::STREAM, None).expect("a socket");
        socket.set_reuse_address(true).expect("an option");
        socket.bind(&own.into()).expect("the port is free");
        socket.connect_timeout(&to.into(), PATIENCE).expect("a connection");
        TcpStream::from(socket)
    });
    app::converse_over(second, "second").expect("a conversation");
    assert_eq!(stage.outcome("passed_same_node"), passed + 1);
    let told = |reason: &str, bytes: [usize; 2]| {
        let [sent, received] = bytes;
        let (out, inbound) =
            (format!("bytes_sent={sent} bytes_recv={received} "), format!("bytes_sent={received} bytes_recv={sent} "));
        let log = stage.mesh.log("agent-a");
        let lines = log.lines().filter(|line| line.contains(&format!("src.addr={own} ")) && line.contains(reason));
        lines.filter(|line| line.contains(&out) || line.contains(&inbound)).count()
    };
    let greeting = own.to_string().len() + 1;
    eventually("the second is told of", || told("finished", [6, greeting + 6]) == 2);
    assert_eq!(told("source_reset", [4, greeting + 4]), 2, "{}", stage.mesh.log("agent-a"));
}

#[test]
fn what_is_told_of_connections_in_the_kernel_is_true_to_the_byte() {
    let stage = Stage::new();
    // Who closes first, and whether all at once, must make no difference.
    for (number, (client_first, at_once)) in [(true, false), (false, false), (true, true)].into_iter().enumerate() {
        let port = 9000 + u16::try_from(number).expect("a few");
        app::server(&stage.server.netns, port, move |mut stream: TcpStream| {
            let mut request = vec![0; REQUEST];
            if stream.read_exact(&mut request).is_ok() {
                let _written = stream.write_all(&[2; RESPONSE]);
                if client_first {
                    let _ended = stream.read(&mut [0]);
                }
            }
        });
        stage.await_bytes(port, client_first, at_once);
    }
}

impl Stage {
    fn await_bytes(&self, port: u16, client_first: bool, at_once: bool) {
        let to = self.server.at(false, port);
        eventually("the kernel has a verdict", || {
            let before = self.outcome("admitted_same_node");
            app::connect(&self.client.netns, to).is_ok() && self.outcome("admitted_same_node") > before
        });
        let labels = ["connection_security_policy=\"attested\"", "source_workload=\"client\"", "destination_workload=\"server\""];
        let sums = || {
            let page = self.mesh.metrics(0);
            ["source", "destination"].map(|reporter| {
                let reporter = format!("reporter=\"{reporter}\"");
                let labels = [&labels[..], &[reporter.as_str()]].concat();
                ["opened_total", "closed_total"]
                    .map(|name| page.sum(&format!("istio_tcp_connections_{name}"), &labels))
                    .into_iter()
                    .chain(["received", "sent"].map(|name| page.sum(&format!("istio_tcp_{name}_bytes_total"), &labels)))
                    .collect::<Vec<_>>()
            })
        };
        let mut before = sums();
        eventually("what was before has ended", || {
            before = sums();
            before.iter().all(|sums| sums[0] == self.outcome("admitted_same_node") && sums[0] == sums[1])
        });
        // The next connection may have the port of one of these.
        let all = usize::try_from(before[0][1] + before[1][1]).expect("a few");
        let lines = |log: &str| log.lines().filter(|line| line.contains("security=\"attested\"")).count();
        eventually("their lines are written", || lines(&self.mesh.log("agent-a")) == all);
        let told = self.mesh.log("agent-a").len();
        let mut stream = app::connect(&self.client.netns, to).expect("a connection");
        let own = format!("src.addr={} ", stream.local_addr().expect("connected"));
        stream.write_all(&[1; REQUEST]).expect("open");
        if client_first && !at_once {
            stream.shutdown(Shutdown::Write).expect("open");
        }
        let mut response = vec![0; RESPONSE];
        stream.read_exact(&mut response).expect("a response");
        if !client_first {
            assert_eq!(stream.read(&mut [0]).expect("an end"), 0);
        }
        drop(stream);
        let wanted =
            before.clone().map(|sums| vec![sums[0] + 1, sums[1] + 1, sums[2] + REQUEST as u64, sums[3] + RESPONSE as u64]);
        eventually("it is told of", || sums().iter().all(|sums| sums[1] == wanted[0][1]));
        assert_eq!(sums(), wanted, "client first: {client_first}, at once: {at_once}");
        let log = || self.mesh.log("agent-a").split_off(told);
        eventually("the lines are written", || log().lines().filter(|line| line.contains(&own)).count() >= 2);
        let log = log();
        let last: Vec<_> = log.lines().filter(|line| line.contains(&own)).collect();
        assert_eq!(last.len(), 2, "one connection, one line for each side: {last:?}");
        for (direction, sent, received) in [("outbound", REQUEST, RESPONSE), ("inbound", RESPONSE, REQUEST)] {
            let line = last.iter().find(|line| line.contains(&format!("direction=\"{direction}\""))).expect("a line");
            for part in [
                format!("bytes_sent={sent} "),
                format!("bytes_recv={received} "),
                "security=\"attested\"".to_owned(),
                "reason=\"finished\"".to_owned(),
                "src.identity=spiffe://cluster.local/ns/shop/sa/client".to_owned(),
                "dst.identity=spiffe://cluster.local/ns/shop/sa/server".to_owned(),
            ] {
                assert!(line.contains(&part), "no {part} in {line}");
            }
        }
    }
}
