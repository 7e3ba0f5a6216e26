//! Promise: whatever an application does with its sockets, it may go on doing: binding first, not blocking, fast open, IPv4 over IPv6
//! sockets, connecting again, handing on to children; and it sees the addresses that it would see without a mesh.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, OwnedFd};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use harness::{Mesh, Namespace, Pod, PodSpec, app, eventually};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, SockRef, Socket, Type};

const PORT: u16 = 8080;
/// `IPPROTO_MPTCP` and `MSG_FASTOPEN`, of Linux.
const MPTCP: i32 = 262;
const MSG_FASTOPEN: i32 = 0x2000_0000;

/// A client and a server on two nodes; the server echoes.
struct Stage {
    mesh: Mesh,
    client: Pod,
    server: Pod,
}

impl Stage {
    fn new() -> Self {
        let mut mesh = Mesh::start();
        let (client, server) = app::pair(&mut mesh, PORT);
        Self { mesh, client, server }
    }

    /// Makes a socket in the client's pod, lets `prepare` do with it what it likes, connects it to the server and checks that both see
    /// each other as they must. Gives the connected socket's own address.
    fn check(
        &self,
        what: &str,
        v6: bool,
        prepare: impl FnOnce(&Socket, SocketAddr) -> io::Result<()> + Send + 'static,
    ) -> SocketAddr {
        let to = self.server.at(v6, PORT);
        let stream = self.client.netns.run(move || -> io::Result<TcpStream> {
            let socket = stream_socket(to);
            prepare(&socket, to)?;
            Ok(socket.into())
        });
        let seen = stream.and_then(|stream| app::converse_over(stream, what)).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(seen.peer, to, "{what}: getpeername");
        assert_eq!(seen.local.ip(), self.client.at(v6, 0).ip(), "{what}: getsockname");
        assert_eq!(seen.client.ip(), self.client.at(v6, 0).ip(), "{what}: what the server sees");
        seen.local
    }
}

fn stream_socket(like: SocketAddr) -> Socket {
    Socket::new(Domain::for_address(like), Type::STREAM, Some(Protocol::TCP)).expect("a socket")
}

fn any(v6: bool, port: u16) -> SockAddr {
    let ip: IpAddr = if v6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    SocketAddr::new(ip, port).into()
}

#[test]
fn an_application_may_bind_before_it_connects() {
    let stage = Stage::new();
    // Ports that both families would share rest in between, as they would without a mesh.
    for (v6, fixed) in [(false, 7000), (true, 7100)] {
        let own = stage.client.at(v6, 0).ip();
        let local = stage.check("a fixed port", v6, move |socket, to| {
            socket.bind(&any(v6, fixed))?;
            socket.connect(&to.into())
        });
        assert_eq!(local.port(), fixed);
        stage.check("a fixed address", v6, move |socket, to| {
            socket.bind(&SocketAddr::new(own, 0).into())?;
            socket.connect(&to.into())
        });
        let local = stage.check("a fixed address and port", v6, move |socket, to| {
            socket.set_reuse_address(true)?;
            socket.bind(&SocketAddr::new(own, fixed + 1).into())?;
            socket.connect(&to.into())
        });
        assert_eq!(local.port(), fixed + 1);
        stage.check("a fixed address whose port is chosen late", v6, move |socket, to| {
            setsockopt(socket, sockopt::IpBindAddressNoPort, &true)?;
            socket.bind(&SocketAddr::new(own, 0).into())?;
            socket.connect(&to.into())
        });
        stage.check("a device", v6, |socket, to| {
            socket.bind_device(Some(b"eth0"))?;
            socket.connect(&to.into())
        });
    }
}

#[test]
fn an_application_may_connect_without_blocking() {
    let stage = Stage::new();
    for v6 in [false, true] {
        stage.check("without blocking", v6, |socket, to| {
            socket.set_nonblocking(true)?;
            match socket.connect(&to.into()) {
                // A peer so near may have answered before the call returns.
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(Errno::EINPROGRESS as i32) => {}
                Err(error) => return Err(error),
            }
            let mut polled = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
            poll(&mut polled, PollTimeout::from(5000_u16))?;
            assert_eq!(polled[0].revents(), Some(PollFlags::POLLOUT), "writable, and nothing else");
            assert!(socket.take_error()?.is_none(), "SO_ERROR");
            socket.set_nonblocking(false)
        });
    }
}

#[test]
fn an_application_may_use_fast_open() {
    let stage = Stage::new();
    for v6 in [false, true] {
        stage.check("TCP_FASTOPEN_CONNECT", v6, |socket, to| {
            setsockopt(socket, sockopt::TcpFastOpenConnect, &true)?;
            socket.connect(&to.into())
        });
        // MSG_FASTOPEN connects and writes at once; the server echoes what comes.
        for round in 0..2 {
            let to = stage.server.at(v6, PORT);
            let stream = stage.client.netns.run(move || {
                let socket = stream_socket(to);
                let sent = socket.send_to_with_flags(b"first ", &to.into(), MSG_FASTOPEN)?;
                assert_eq!(sent, 6);
                Ok::<TcpStream, io::Error>(socket.into())
            });
            let mut stream = stream.expect("a connection");
            stream.set_read_timeout(Some(Duration::from_secs(8))).expect("an option");
            assert_eq!(stream.peer_addr().expect("connected"), to, "round {round}");
            stream.write_all(b"second").expect("open");
            stream.shutdown(std::net::Shutdown::Write).expect("open");
            let mut answer = String::new();
            stream.read_to_string(&mut answer).expect("an answer");
            assert!(answer.ends_with("\nfirst second"), "{answer:?}");
            assert!(answer.starts_with(&stage.client.at(v6, 0).ip().to_string()) || v6, "{answer:?}");
        }
    }
}

#[test]
fn ipv4_over_ipv6_sockets_shows_mapped_addresses_to_whom_it_should() {
    let stage = Stage::new();
    let mapped = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => IpAddr::V6(ip.to_ipv6_mapped()),
        IpAddr::V6(_) => panic!("an IPv4 address is mapped"),
    };
    let to = SocketAddr::new(mapped(stage.server.v4), PORT);
    // The server that listens on both families tells the address as its own socket has it.
    let raw = app::reporting(&stage.server.netns, PORT + 1, |stream| (stream.peer_addr().ok(), stream.local_addr().ok()));
    let stream = app::connect(&stage.client.netns, SocketAddr::new(to.ip(), PORT + 1)).expect("a connection");
    assert_eq!(stream.peer_addr().expect("connected"), SocketAddr::new(to.ip(), PORT + 1));
    assert_eq!(stream.local_addr().expect("connected").ip(), mapped(stage.client.v4));
    let (client, own) = raw.recv_timeout(Duration::from_secs(8)).expect("the server's report");
    assert_eq!(client.map(|client| client.ip()), Some(mapped(stage.client.v4)), "the server's IPv6 socket");
    assert_eq!(own, Some(SocketAddr::new(to.ip(), PORT + 1)));
    // A server of IPv4 only sees IPv4.
    let (report, reports) = std::sync::mpsc::channel();
    let listener = stage.server.netns.run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT + 2)).expect("a free port"));
    app::accept(listener, move |stream| report.send(stream.peer_addr().ok()).expect("the test listens"));
    let _stream = app::connect(&stage.client.netns, SocketAddr::new(to.ip(), PORT + 2)).expect("a connection");
    let client = reports.recv_timeout(Duration::from_secs(8)).expect("the server's report");
    assert_eq!(client.map(|client| client.ip()), Some(stage.client.v4), "the server's IPv4 socket");
    // Bound first, in the mapped form.
    let own = SocketAddr::new(mapped(stage.client.v4), 7002);
    let stream = stage.client.netns.run(move || {
        let socket = stream_socket(to);
        socket.bind(&own.into())?;
        socket.connect(&to.into())?;
        Ok::<TcpStream, io::Error>(socket.into())
    });
    let seen = stream.and_then(|stream| app::converse_over(stream, "mapped")).expect("a conversation");
    assert_eq!((seen.local, seen.peer, seen.client.ip()), (own, to, stage.client.v4));
}

#[test]
fn the_unspecified_address_is_the_pod_itself() {
    let stage = Stage::new();
    let before = stage.mesh.metrics(1).sum("culvert_capture_outcomes_total", &["outcome=\"captured\""]);
    for to in ["0.0.0.0:8080", "[::]:8080", "[::ffff:0.0.0.0]:8080", "127.0.0.1:8080", "[::1]:8080", "127.9.9.9:8080"] {
        let to: SocketAddr = to.parse().expect("an address");
        let seen = app::converse(&stage.server.netns, to, "myself").unwrap_or_else(|error| panic!("{to}: {error}"));
        assert_eq!(seen.client.port(), seen.local.port(), "{to}: somebody stands between");
    }
    let after = stage.mesh.metrics(1).sum("culvert_capture_outcomes_total", &["outcome=\"captured\""]);
    assert_eq!(after, before, "captured what is the pod's own");
}

#[test]
fn localhost_is_never_refused_not_even_before_the_agent_knows_the_namespace() {
    let stage = Stage::new();
    let outside = SocketAddr::from(([10, 77, 0, 1], 15012));
    let mut refused = 0;
    for round in 0..20 {
        let young = Namespace::new(&format!("cv{}-young{round}", std::process::id()));
        let answers = young.run(move || {
            let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, PORT)).expect("a free port");
            let local = ["127.0.0.1:8080", "[::1]:8080"].map(|to| TcpStream::connect(to).map(drop));
            drop(listener);
            (local, TcpStream::connect(outside).map(drop))
        });
        let (local, left) = answers;
        assert!(local.iter().all(Result::is_ok), "round {round}: {local:?}");
        refused += usize::from(left.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused));
    }
    assert!(refused > 0, "no namespace was young enough to show anything");
    drop(stage);
}

#[test]
fn a_socket_may_connect_again_and_tells_its_new_peer() {
    let mut stage = Stage::new();
    let outside = stage.mesh.pod(PodSpec { name: "outside", namespace: "shop", node: 1, enrolled: false });
    app::server(&outside.netns, PORT, app::echo);
    eventually("the outside is reached", || app::converse(&stage.client.netns, outside.at(false, PORT), "warm").is_ok());
    let (inside, to_outside) = (stage.server.at(false, PORT), outside.at(false, PORT));
    for first in [inside, to_outside] {
        for second in [inside, to_outside] {
            let stream = stage.client.netns.run(move || {
                let socket = stream_socket(first);
                socket.connect(&first.into())?;
                assert_eq!(socket.peer_addr()?.as_socket(), Some(first));
                let twice = socket.connect(&second.into()).expect_err("connected already");
                assert_eq!(twice.raw_os_error(), Some(Errno::EISCONN as i32));
                // To no address at all: connected no more.
                socket.connect(&unspecified())?;
                assert!(socket.peer_addr().is_err());
                socket.connect(&second.into())?;
                Ok::<TcpStream, io::Error>(socket.into())
            });
            let seen = stream.and_then(|stream| app::converse_over(stream, "again"));
            let seen = seen.unwrap_or_else(|error| panic!("{first}, then {second}: {error}"));
            assert_eq!(seen.peer, second, "{first}, then {second}: getpeername");
            assert_eq!(seen.client.ip(), stage.client.v4);
        }
    }
}

/// An address of the family `AF_UNSPEC`.
#[expect(unsafe_code, reason = "the typed addresses leave this family out")]
fn unspecified() -> SockAddr {
    // SAFETY: all zeros are a legal address of the family 0, `AF_UNSPEC`, for which a `struct sockaddr` of 16 bytes is enough.
    unsafe { SockAddr::new(SockAddrStorage::zeroed(), 16) }
}

#[test]
fn a_connected_socket_may_be_handed_to_a_child() {
    // The child tells its peer and its own address, says what it was told to say, and passes on what comes back.
    const CHILD: &str = r#"
        use Socket;
        sub show { my ($port, $ip) = sockaddr_in($_[0]); return inet_ntoa($ip) . ":$port" }
        open(S, "+<&=0") or die; $own = show(getsockname(S)); $peer = show(getpeername(S));
        syswrite(S, $ARGV[0]) or die; shutdown(S, 1) or die;
        $answer .= $part while sysread(S, $part, 4096);
        syswrite(STDOUT, "$own $peer $answer");
    "#;
    let stage = Stage::new();
    let to = stage.server.at(false, PORT);
    let stream = app::connect(&stage.client.netns, to).expect("a connection");
    let own = stream.local_addr().expect("connected");
    // Outside of the pod: the child has the socket, whatever else it has not.
    let mut child = std::process::Command::new("perl");
    child.args(["-e", CHILD, "handed over"]).stdin(Stdio::from(OwnedFd::from(stream)));
    let output = child.output().expect("every Debian has perl");
    let said = String::from_utf8_lossy(&output.stdout);
    let (addresses, echoed) = said.split_once('\n').unwrap_or((&said, ""));
    let client = addresses.strip_prefix(&format!("{own} {to} ")).unwrap_or_else(|| panic!("{output:?}"));
    assert!(client.starts_with(&format!("{}:", stage.client.v4)), "what the server saw: {client}");
    assert_eq!(echoed, "handed over");
}

#[test]
fn servers_may_share_a_port() {
    let stage = Stage::new();
    let listen = || {
        let listener = stage.server.netns.run(|| {
            let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP)).expect("a socket");
            socket.set_only_v6(false).expect("an option");
            socket.set_reuse_port(true).expect("an option");
            socket.bind(&any(true, PORT + 1)).expect("a port that is shared");
            socket.listen(64).expect("a listener");
            TcpListener::from(socket)
        });
        let served = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&served);
        app::accept(listener, move |stream| {
            counter.fetch_add(1, Ordering::Relaxed);
            app::echo(stream);
        });
        served
    };
    let served: Vec<_> = (0..4).map(|_| listen()).collect();
    for number in 0..64 {
        let to = stage.server.at(number % 2 == 1, PORT + 1);
        app::converse(&stage.client.netns, to, "shared").expect("a conversation");
    }
    let served: Vec<_> = served.iter().map(|served| served.load(Ordering::Relaxed)).collect();
    assert_eq!(served.iter().sum::<usize>(), 64);
    assert!(served.iter().filter(|served| **served > 0).count() >= 3, "the kernel spreads over them: {served:?}");
}

#[test]
fn multipath_tcp_is_carried_as_the_tcp_that_it_falls_back_to() {
    let stage = Stage::new();
    let multipath = |like: SocketAddr| Socket::new(Domain::for_address(like), Type::STREAM, Some(Protocol::from(MPTCP)));
    if let Err(error) = stage.client.netns.run(move || multipath(([0, 0, 0, 0], 0).into())) {
        // Nothing to show where the kernel has none: no application can use it there.
        assert_eq!(error.raw_os_error(), Some(Errno::EPROTONOSUPPORT as i32));
        return;
    }
    let listener = stage.server.netns.run(move || {
        let socket = multipath((Ipv6Addr::UNSPECIFIED, 0).into()).expect("a socket");
        socket.set_only_v6(false).expect("an option");
        socket.bind(&any(true, PORT + 1)).expect("a free port");
        socket.listen(64).expect("a listener");
        TcpListener::from(socket)
    });
    app::accept(listener, app::echo);
    let mut capture = stage.mesh.capture_between_nodes();
    for port in [PORT, PORT + 1] {
        for v6 in [false, true] {
            let to = stage.server.at(v6, port);
            let stream = stage.client.netns.run(move || {
                let socket = multipath(to)?;
                socket.connect(&to.into())?;
                Ok::<TcpStream, io::Error>(socket.into())
            });
            let seen = stream.and_then(|stream| app::converse_over(stream, "marker-multipath")).expect("a conversation");
            // What a socket of this kind says of its peer is not the one thing that it should: the README names it among the limits.
            assert_eq!((seen.local.ip(), seen.client.ip()), (stage.client.at(v6, 0).ip(), stage.client.at(v6, 0).ip()));
        }
    }
    capture.finish();
    assert!(!capture.shows(b"marker-multipath"), "in plaintext between the nodes");
}

#[test]
fn an_urgent_byte_is_not_lost() {
    let stage = Stage::new();
    let reports = app::reporting(&stage.server.netns, PORT + 1, |mut stream| {
        let mut all = String::new();
        stream.read_to_string(&mut all).map(|_bytes| all)
    });
    let mut stream = app::connect(&stage.client.netns, stage.server.at(false, PORT + 1)).expect("a connection");
    stream.write_all(b"before").expect("open");
    SockRef::from(&stream).send_out_of_band(b"!").expect("open");
    stream.write_all(b"after").expect("open");
    stream.shutdown(Shutdown::Write).expect("open");
    let all = reports.recv_timeout(Duration::from_secs(8)).expect("the server's report");
    assert_eq!(all.expect("an end in order"), "before!after");
}
