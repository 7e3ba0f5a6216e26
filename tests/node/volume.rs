//! Promise: much data and many connections pass whole, and at the pace of the slower end, in every form of tunnel.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use harness::{Mesh, Pod, app, eventually};

const PORT: u16 = 8080;
const BLOCK: usize = 1 << 18;
const GIBIBYTE: usize = 1 << 30;
const CONNECTIONS: usize = 2000;

in_each_form!(
    a_gibibyte_each_way_at_once_arrives_whole_past_a_reader_that_pauses,
    two_thousand_connections_are_open_at_once_and_each_is_its_own,
    a_reader_that_stops_stops_its_writer_and_fills_no_memory,
);

in_the_kernel!(a_gibibyte_each_way_at_once_arrives_whole_past_a_reader_that_pauses);

/// A client and a server on two nodes, or on one.
fn stage(forms: [&str; 2]) -> (Mesh, Pod, Pod) {
    let mut mesh = Mesh::start_in(forms);
    let (client, server) = app::pair(&mut mesh, PORT);
    (mesh, client, server)
}

/// The block of this number: no two are alike, since each starts at another place among bytes without a pattern.
fn block(number: usize) -> &'static [u8] {
    static BYTES: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut bytes = Vec::with_capacity(2 * BLOCK);
        while bytes.len() < 2 * BLOCK {
            // xorshift64, by George Marsaglia.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.extend(state.to_le_bytes());
        }
        bytes
    });
    let start = number.wrapping_mul(7919) % BLOCK;
    &BYTES[start..start + BLOCK]
}

fn send_all(mut stream: &TcpStream) {
    for number in 0..GIBIBYTE / BLOCK {
        stream.write_all(block(number)).expect("an open connection");
    }
    stream.shutdown(Shutdown::Write).expect("an open connection");
}

/// Comparing every byte is the strictest checksum, and the cheapest.
fn check_all(mut stream: &TcpStream) {
    let mut seen = vec![0; BLOCK];
    for number in 0..GIBIBYTE / BLOCK {
        stream.read_exact(&mut seen).expect("an open connection");
        assert!(seen == block(number), "block {number} is damaged");
        if number % 1024 == 64 {
            // The sender must wait meanwhile.
            std::thread::sleep(Duration::from_millis(300));
        }
    }
    assert_eq!(stream.read(&mut seen).expect("an end in order"), 0);
}

fn both_ways(stream: &TcpStream) {
    std::thread::scope(|scope| {
        scope.spawn(|| send_all(stream));
        check_all(stream);
    });
}

fn a_gibibyte_each_way_at_once_arrives_whole_past_a_reader_that_pauses(forms: [&str; 2]) {
    let (_mesh, client, server) = stage(forms);
    let arrived = app::reporting(&server.netns, PORT + 1, |stream| both_ways(&stream));
    both_ways(&app::connect(&client.netns, server.at(false, PORT + 1)).expect("a connection"));
    arrived.recv_timeout(Duration::from_secs(60)).expect("the server got everything, too");
}

fn two_thousand_connections_are_open_at_once_and_each_is_its_own(forms: [&str; 2]) {
    let (mesh, client, server) = stage(forms);
    let to = server.at(false, PORT);
    let open: Vec<_> =
        client.netns.run(move || (0..CONNECTIONS).map(|_| TcpStream::connect(to).expect("a connection")).collect());
    for (number, mut stream) in open.iter().enumerate() {
        writeln!(stream, "connection {number}").expect("an open connection");
    }
    eventually("all are open at both ends", || {
        let open = |node, direction| mesh.metrics(node).sum("culvert_connections_open", &[direction]);
        open(0, "direction=\"outbound\"") >= CONNECTIONS as u64 && open(1, "direction=\"inbound\"") >= CONNECTIONS as u64
    });
    for (number, mut stream) in open.iter().enumerate() {
        stream.set_read_timeout(Some(Duration::from_secs(8))).expect("an option");
        stream.shutdown(Shutdown::Write).expect("an open connection");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        assert!(answer.ends_with(&format!("\nconnection {number}\n")), "connection {number} got {answer:?}");
    }
}

/// How many writers push at readers that have stopped.
const STOPPED: usize = 8;
/// What the agents' memory may grow by for each of them, in bytes.
const GROWTH: u64 = 12 << 20;

fn a_reader_that_stops_stops_its_writer_and_fills_no_memory(forms: [&str; 2]) {
    let (mesh, client, server) = stage(forms);
    let (go_on, signal) = channel::<()>();
    let signal = Arc::new(std::sync::Mutex::new(signal));
    let taken = app::reporting(&server.netns, PORT + 1, move |stream| {
        wait(&signal);
        count(&stream)
    });
    let (held, before) = (most_held(), [0, 1].map(|node| mesh.agent_memory(node)));
    let writers: Vec<_> =
        (0..STOPPED).map(|_| app::connect(&client.netns, server.at(false, PORT + 1)).expect("a connection")).collect();
    let pushed: Vec<_> = writers.iter().map(|writer| push(writer, held)).collect();
    let grown: Vec<_> = before.iter().enumerate().map(|(node, before)| mesh.agent_memory(node).saturating_sub(*before)).collect();
    assert!(pushed.iter().all(|pushed| (1..held).contains(pushed)), "a writer was not held up: {pushed:?}");
    assert!(grown.iter().all(|grown| *grown < GROWTH * STOPPED as u64), "the agents' memory has grown by {grown:?}");
    // Those who read meanwhile are not held up.
    app::converse(&client.netns, server.at(false, PORT), "meanwhile").expect("a conversation beside them");

    drop(go_on);
    drop(writers);
    let mut arrived: Vec<_> = (0..STOPPED).map(|_| taken.recv_timeout(Duration::from_secs(30)).expect("a count")).collect();
    let mut pushed = pushed;
    arrived.sort_unstable();
    pushed.sort_unstable();
    assert_eq!(arrived, pushed, "once they read, all of it arrives");
}

/// Waits until the test lets go.
fn wait(signal: &std::sync::Mutex<Receiver<()>>) {
    let signal = signal.lock().expect("no panic");
    let _let_go = signal.recv();
}

fn count(mut stream: &TcpStream) -> usize {
    let (mut buffer, mut total) = (vec![0; BLOCK], 0);
    loop {
        match stream.read(&mut buffer).expect("an end in order") {
            0 => return total,
            bytes => total += bytes,
        }
    }
}

/// What one connection may take in without anybody reading, in bytes: what the kernel buffers for the sockets between the two
/// applications, and little in the agents.
fn most_held() -> usize {
    let most = |name: &str| {
        let limits = std::fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).expect("Linux tells");
        limits.split_whitespace().last().and_then(|limit| limit.parse::<usize>().ok()).expect("three numbers")
    };
    3 * (most("tcp_rmem") + most("tcp_wmem")) + (4 << 20)
}

/// Writes until nothing has been taken for a second, or more than `most` bytes have. Gives how many were.
fn push(mut stream: &TcpStream, most: usize) -> usize {
    stream.set_nonblocking(true).expect("an option");
    let (mut pushed, mut last) = (0, Instant::now());
    while last.elapsed() < Duration::from_secs(1) && pushed <= most {
        match stream.write(block(0)) {
            Ok(bytes) => (pushed, last) = (pushed + bytes, Instant::now()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::sleep(Duration::from_millis(5)),
            Err(error) => panic!("after {pushed} bytes: {error}"),
        }
    }
    pushed
}
