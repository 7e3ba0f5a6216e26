//! Promise: a connection begins and ends as it would without a mesh. FIN is FIN in each direction, RST is RST, refused is never an
//! end of file, and idle connections live; in every form that tunnels can have, and in a node's kernel.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use harness::{Mesh, Pod, PodSpec, app, eventually};

const PORT: u16 = 8080;
/// How long the news of an end may be on its way.
const SOON: Duration = Duration::from_secs(5);
/// How long nobody at the other end may go unnoticed while a connection is being made.
const BOUND: Duration = Duration::from_secs(20);
/// More bytes than all buffers between a writer and a reader that has stopped can hold.
const MORE_THAN_FITS: usize = 64 << 20;

in_each_form!(
    a_half_close_by_either_side_leaves_the_other_direction_open,
    a_reset_by_either_side_is_a_reset_to_the_other,
    a_reset_overtakes_data_in_flight,
    a_reset_after_an_end_in_one_direction_is_no_second_end,
    a_server_may_speak_first_and_a_client_may_leave_at_once,
    a_refusal_is_a_reset_and_never_an_end,
    a_pod_that_is_gone_is_an_error_in_bounded_time_and_idle_connections_live,
);

in_the_kernel!(
    a_half_close_by_either_side_leaves_the_other_direction_open,
    a_reset_by_either_side_is_a_reset_to_the_other,
    a_reset_overtakes_data_in_flight,
    a_reset_after_an_end_in_one_direction_is_no_second_end,
    a_server_may_speak_first_and_a_client_may_leave_at_once,
);

/// A client and a server on two nodes, whose agents make tunnels in these forms; or on one.
struct Stage {
    mesh: Mesh,
    client: Pod,
    server: Pod,
}

impl Stage {
    fn new(forms: [&str; 2]) -> Self {
        let mut mesh = Mesh::start_in(forms);
        let (client, server) = app::pair(&mut mesh, PORT);
        Self { mesh, client, server }
    }

    /// Has the server serve on one more port.
    fn serve<T: Send + 'static>(&self, port: u16, serve: impl Fn(TcpStream) -> T + Clone + Send + 'static) -> Receiver<T> {
        if self.mesh.in_the_kernel() {
            app::await_verdict(&self.mesh, &self.client, &self.server, port);
        }
        app::reporting(&self.server.netns, port, serve)
    }

    fn at(&self, port: u16) -> SocketAddr {
        self.server.at(false, port)
    }

    fn connect(&self, port: u16) -> TcpStream {
        if !self.mesh.in_the_kernel() {
            return app::connect(&self.client.netns, self.at(port)).expect("a connection");
        }
        let before = self.mesh.outcome(0, "admitted_same_node");
        let stream = app::connect(&self.client.netns, self.at(port)).expect("a connection");
        assert_eq!(self.mesh.outcome(0, "admitted_same_node"), before + 1, "the connection is not in the kernel");
        stream
    }
}

/// What a server reports, which it must soon.
fn told<T>(reports: &Receiver<T>) -> T {
    reports.recv_timeout(SOON + SOON).expect("the server's report")
}

/// The end of what comes: how many bytes, and the error, if it is one.
fn read_on(mut stream: &TcpStream) -> (usize, Option<ErrorKind>) {
    let mut rest = Vec::new();
    let ended = stream.read_to_end(&mut rest);
    (rest.len(), ended.err().map(|error| error.kind()))
}

fn a_half_close_by_either_side_leaves_the_other_direction_open(forms: [&str; 2]) {
    let stage = Stage::new(forms);
    // The client's half first.
    let _reports = stage.serve(PORT + 1, |mut stream| {
        let (bytes, error) = read_on(&stream);
        // Nothing moves for a while: the open half must not be closed for it.
        std::thread::sleep(Duration::from_millis(300));
        writeln!(stream, "{bytes} bytes, {error:?}")
    });
    let mut stream = stage.connect(PORT + 1);
    stream.write_all(&[7; 100_000]).expect("open");
    stream.shutdown(Shutdown::Write).expect("half closed");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("the other half is open");
    assert_eq!(answer, "100000 bytes, None\n");

    // The server's half first.
    let reports = stage.serve(PORT + 2, |mut stream| {
        stream.write_all(&[8; 100_000]).expect("open");
        stream.shutdown(Shutdown::Write).expect("half closed");
        read_on(&stream)
    });
    let mut stream = stage.connect(PORT + 2);
    assert_eq!(read_on(&stream), (100_000, None), "the server's half ends in order");
    std::thread::sleep(Duration::from_millis(300));
    stream.write_all(&[9; 200_000]).expect("the other half is open");
    drop(stream);
    assert_eq!(told(&reports), (200_000, None), "the client's half goes on, and ends in order");
}

fn a_reset_by_either_side_is_a_reset_to_the_other(forms: [&str; 2]) {
    let stage = Stage::new(forms);
    let reports = stage.serve(PORT + 1, |stream| read_on(&stream));
    let mut stream = stage.connect(PORT + 1);
    stream.write_all(b"hello").expect("open");
    std::thread::sleep(Duration::from_millis(100));
    app::reset(stream);
    assert_eq!(told(&reports), (5, Some(ErrorKind::ConnectionReset)), "the client's reset, as the server sees it");

    let _reports = stage.serve(PORT + 2, |mut stream| {
        let _hello = stream.read(&mut [0; 16]);
        app::reset(stream);
    });
    let mut stream = stage.connect(PORT + 2);
    stream.write_all(b"hello").expect("open");
    assert_eq!(read_on(&stream), (0, Some(ErrorKind::ConnectionReset)), "the server's reset, as the client sees it");

    // Who closes with bytes unread has lost some, and TCP says so by a reset.
    let _reports = stage.serve(PORT + 3, |stream| {
        eventually("bytes to leave unread", || stream.peek(&mut [0; 16]).is_ok_and(|bytes| bytes > 0));
    });
    let mut stream = stage.connect(PORT + 3);
    stream.write_all(b"hello").expect("open");
    assert_eq!(read_on(&stream), (0, Some(ErrorKind::ConnectionReset)), "a close with bytes unread");
}

/// Writes until nothing more fits, as far as `MORE_THAN_FITS`.
fn fill(mut stream: &TcpStream) -> usize {
    stream.set_nonblocking(true).expect("an option");
    let (mut written, mut refusals) = (0, 0);
    while written < MORE_THAN_FITS && refusals < 100 {
        match stream.write(&[5; 1 << 16]) {
            Ok(bytes) => (written, refusals) = (written + bytes, 0),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                refusals += 1;
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(error) => panic!("after {written} bytes: {error}"),
        }
    }
    written
}

fn a_reset_overtakes_data_in_flight(forms: [&str; 2]) {
    let stage = Stage::new(forms);
    // Neither reader reads: whoever waits for the data to be taken before he passes the reset on waits for ever.
    let reports = stage.serve(PORT + 1, |stream| app::breaks(&stream, SOON));
    let stream = stage.connect(PORT + 1);
    assert!(fill(&stream) < MORE_THAN_FITS, "the writer was not held up");
    app::reset(stream);
    assert!(told(&reports), "the client's reset has not reached the server that does not read");

    let _reports = stage.serve(PORT + 2, |stream| {
        fill(&stream);
        app::reset(stream);
    });
    let stream = stage.connect(PORT + 2);
    assert!(app::breaks(&stream, SOON), "the server's reset has not reached the client that does not read");

    // The same once the direction is finished in which the news could travel, had it not been.
    let reports = stage.serve(PORT + 3, |stream| {
        stream.shutdown(Shutdown::Write).expect("half closed");
        app::breaks(&stream, SOON)
    });
    let stream = stage.connect(PORT + 3);
    assert_eq!(read_on(&stream), (0, None));
    assert!(fill(&stream) < MORE_THAN_FITS, "the writer was not held up");
    app::reset(stream);
    assert!(told(&reports), "the client's reset has not reached the server that has finished and does not read");

    let _reports = stage.serve(PORT + 4, |stream| {
        let ended = read_on(&stream);
        fill(&stream);
        app::reset(stream);
        ended
    });
    let stream = stage.connect(PORT + 4);
    stream.shutdown(Shutdown::Write).expect("half closed");
    assert!(app::breaks(&stream, SOON), "the server's reset has not reached the client that has finished and does not read");
}

fn a_reset_after_an_end_in_one_direction_is_no_second_end(forms: [&str; 2]) {
    let stage = Stage::new(forms);
    // The client ends, then the client resets.
    let reports = stage.serve(PORT + 1, |stream| (read_on(&stream), app::breaks(&stream, SOON)));
    let stream = stage.connect(PORT + 1);
    stream.shutdown(Shutdown::Write).expect("half closed");
    std::thread::sleep(Duration::from_millis(100));
    app::reset(stream);
    assert_eq!(told(&reports), ((0, None), true));

    // The client ends, then the server resets.
    let _reports = stage.serve(PORT + 2, |stream| {
        let ended = read_on(&stream);
        app::reset(stream);
        ended
    });
    let stream = stage.connect(PORT + 2);
    stream.shutdown(Shutdown::Write).expect("half closed");
    assert_eq!(read_on(&stream), (0, Some(ErrorKind::ConnectionReset)));

    // The server ends, then the client resets.
    let reports = stage.serve(PORT + 3, |stream| {
        stream.shutdown(Shutdown::Write).expect("half closed");
        read_on(&stream)
    });
    let stream = stage.connect(PORT + 3);
    assert_eq!(read_on(&stream), (0, None));
    app::reset(stream);
    assert_eq!(told(&reports), (0, Some(ErrorKind::ConnectionReset)));

    // The server ends, then the server resets.
    let _reports = stage.serve(PORT + 4, |stream| {
        stream.shutdown(Shutdown::Write).expect("half closed");
        std::thread::sleep(Duration::from_millis(100));
        app::reset(stream);
    });
    let stream = stage.connect(PORT + 4);
    assert_eq!(read_on(&stream), (0, None));
    assert!(app::breaks(&stream, SOON));
}

fn a_server_may_speak_first_and_a_client_may_leave_at_once(forms: [&str; 2]) {
    let stage = Stage::new(forms);
    let _reports = stage.serve(PORT + 1, |mut stream| {
        stream.write_all(b"welcome\n").expect("open");
        stream.read(&mut [0; 16])
    });
    let mut stream = stage.connect(PORT + 1);
    let mut welcome = [0; 8];
    stream.read_exact(&mut welcome).expect("the server speaks first");
    assert_eq!(&welcome, b"welcome\n");

    // A client that leaves at once has been there all the same.
    let reports = stage.serve(PORT + 2, |stream| (stream.peer_addr().map(|client| client.ip().to_canonical()), read_on(&stream)));
    for _ in 0..20 {
        drop(stage.connect(PORT + 2));
    }
    for _ in 0..20 {
        let (client, ended) = told(&reports);
        assert_eq!((client.ok(), ended), (Some(stage.client.v4), (0, None)));
    }

    // And so has a server.
    let _reports = stage.serve(PORT + 3, drop);
    assert_eq!(read_on(&stage.connect(PORT + 3)), (0, None));
}

fn a_refusal_is_a_reset_and_never_an_end(forms: [&str; 2]) {
    let stage = Stage::new(forms);
    for round in 0..20 {
        let nobody = stage.server.at(round % 2 == 1, PORT + 7);
        // Nothing sent, and something sent.
        let mut stream = app::connect(&stage.client.netns, nobody).expect("the agent has taken the connection");
        // The reset may be faster, and is told once.
        let written = if round % 4 > 1 { stream.write_all(b"anybody there?") } else { Ok(()) };
        let told = written.map_or_else(|error| (0, Some(error.kind())), |()| read_on(&stream));
        assert_eq!(told, (0, Some(ErrorKind::ConnectionReset)), "round {round}");
        let mut reached = app::connect(&stage.client.netns, stage.server.at(round % 2 == 1, PORT)).expect("a connection");
        reached.write_all(b"x").expect("open");
        assert!(reached.read(&mut [0; 8]).expect("an answer") > 0, "a refusal has spoiled the tunnel in round {round}");
    }
    eventually("the agent says why", || stage.mesh.log("agent-a").contains("destination_refused"));
}

fn a_pod_that_is_gone_is_an_error_in_bounded_time_and_idle_connections_live(forms: [&str; 2]) {
    let mut stage = Stage::new(forms);
    let gone = [("warm", true), ("cold", false)].map(|(name, warm)| {
        let pod = stage.mesh.pod(PodSpec { name, namespace: "shop", node: 1, enrolled: true });
        app::server(&pod.netns, PORT, app::echo);
        // An agent that has a tunnel to the pod finds it dead; one that has none finds no way.
        if warm {
            let warmed = || app::converse(&stage.client.netns, pod.at(false, PORT), "warm").is_ok();
            eventually("the pod is reached", warmed);
        }
        pod
    });
    let mut idle: Vec<_> = [false, true].into_iter().map(|v6| begin(&stage, stage.server.at(v6, PORT))).collect();
    gone.iter().for_each(Pod::unplug);
    for pod in &gone {
        let started = Instant::now();
        let stream = app::connect(&stage.client.netns, pod.at(false, PORT)).expect("the agent has taken the connection");
        stream.set_read_timeout(Some(BOUND * 2)).expect("an option");
        assert_eq!(read_on(&stream), (0, Some(ErrorKind::ConnectionReset)), "a pod that is gone answers");
        assert!(started.elapsed() < BOUND, "only after {:?}", started.elapsed());
    }
    for stream in &mut idle {
        stream.write_all(b"after").expect("open");
        let mut answer = [0; 5];
        stream.read_exact(&mut answer).expect("open");
        assert_eq!(&answer, b"after");
    }
}

/// A connection to an echo server, over which something has been said.
fn begin(stage: &Stage, to: SocketAddr) -> TcpStream {
    let mut stream = app::connect(&stage.client.netns, to).expect("a connection");
    stream.write_all(b"before").expect("open");
    let mut said = Vec::new();
    while !said.ends_with(b"before") {
        let mut some = [0; 64];
        let bytes = stream.read(&mut some).expect("open");
        assert!(bytes > 0, "ended");
        said.extend(&some[..bytes]);
    }
    stream
}
