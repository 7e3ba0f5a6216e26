//! Attacks on 15008: before the handshake, in it, and after it with a certificate that is real and stolen.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use harness::attacker::{self, Tls};
use harness::forge::{Credentials, Forge, Wanted};
use harness::http2::{self, kind};
use harness::{app, eventually, peer};
use rand::Rng as _;
use rand::rngs::StdRng;
use socket2::SockRef;

use super::{PORT, Scene, duration, noise};

const TUNNELS: u16 = 15008;
/// So many peers may be about to shake hands with an agent at once.
const STRANGERS: usize = 1024;
const H2: &[u8] = b"h2";
const SINGLE: &[u8] = b"culvert/1";
const FRIEND: &str = "spiffe://cluster.local/ns/shop/sa/friend";

/// How the attacker leaves.
fn leave(random: &mut StdRng, socket: &TcpStream) {
    match random.random_range(0..3) {
        0 => SockRef::from(socket).set_linger(Some(Duration::ZERO)).expect("an option"),
        1 => drop(socket.shutdown(std::net::Shutdown::Write)),
        _ => {}
    }
}

/// Reads what comes in a moment, which may be nothing.
fn listen(stream: &mut Tls, moment: Duration) {
    stream.sock.set_read_timeout(Some(moment)).expect("a timeout");
    let mut bytes = [0; 16_384];
    while matches!(stream.read(&mut bytes), Ok(read) if read > 0) {}
}

/// Connects with the stolen certificate, and writes for as long as it is taken.
fn say(to: SocketAddr, stolen: &Credentials, alpn: &[u8], bytes: &[u8]) -> Option<Tls> {
    let mut stream = attacker::connect(to, Some(stolen), &[alpn]).ok()?;
    stream.sock.set_write_timeout(Some(Duration::from_millis(300))).expect("a timeout");
    let _blocked_or_ended = stream.write_all(bytes).and_then(|()| stream.flush());
    Some(stream)
}

/// An honest request for a stream to the server.
fn connect_to(authority: &str) -> Vec<u8> {
    http2::headers(&[(":method", "CONNECT"), (":authority", authority)])
}

/// An honest OPEN of `culvert/1`.
fn open(destination: SocketAddr) -> Vec<u8> {
    let mut frame = vec![1, 0, 0, 36];
    for end in [destination, SocketAddr::from(([10, 77, 1, 2], 40_000))] {
        frame.extend(end.port().to_be_bytes());
        frame.extend(match end.ip() {
            std::net::IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
            std::net::IpAddr::V6(address) => address.octets(),
        });
    }
    frame
}

#[test]
fn strangers_at_the_tunnel_port() {
    let mut scene = Scene::new();
    scene.withstand("noise at the tunnel port", |scene, random| {
        let (to, mut random) = (scene.server.at(false, TUNNELS), random.clone());
        let hello = attacker::client_hello(&[H2]);
        scene.outsider.netns.run(move || {
            let until = Instant::now() + duration();
            while Instant::now() < until {
                let mut socket = attacker::dial(to).expect("the agent listens");
                let _ended_early = socket.write_all(&noise::handshake(&mut random, &hello));
                leave(&mut random, &socket);
            }
        });
    });
    scene.withstand("handshakes without a certificate that counts", |scene, _| {
        let to = scene.server.at(false, TUNNELS);
        scene.outsider.netns.run(move || {
            let until = Instant::now() + duration() / 2;
            let impostor = Credentials::self_signed(FRIEND);
            for credentials in [None, Some(&impostor)].into_iter().cycle().take_while(|_| Instant::now() < until) {
                // In TLS 1.3 a client is done before the server has looked at its certificate.
                if let Ok(mut stream) = attacker::connect(to, credentials, &[SINGLE, H2]) {
                    let _ended_early = stream.write_all(&open(SocketAddr::new(to.ip(), PORT)));
                    stream.sock.set_read_timeout(Some(Duration::from_secs(5))).expect("a timeout");
                    let answer = stream.read(&mut [0; 64]);
                    assert!(!matches!(answer, Ok(read) if read > 0), "a stranger got an answer: {answer:?}");
                }
            }
        });
    });
}

#[test]
fn thousands_of_half_open_connections() {
    let mut scene = Scene::new();
    let agent = scene.mesh.process("agent-b");
    scene.withstand("half-open connections", |scene, _| {
        let to = scene.server.at(false, TUNNELS);
        let hello = attacker::client_hello(&[H2]);
        let silent = scene.outsider.netns.run(move || {
            let mut silent: Vec<TcpStream> = Vec::new();
            for number in 0..4000 {
                let Ok(mut socket) = attacker::dial(to) else { continue };
                // A third says nothing, a third half of a greeting, a third is about to say all of it, byte by byte.
                let said = [0, hello.len() / 2, 1][number % 3];
                let _evicted = socket.write_all(&hello[..said]);
                silent.push(socket);
            }
            for byte in &hello[1..20] {
                for socket in silent.iter_mut().skip(2).step_by(3) {
                    let _evicted = socket.write_all(&[*byte]);
                }
                std::thread::sleep(Duration::from_millis(100));
            }
            silent
        });
        let held = agent.footprint().descriptors;
        // Some of those who had to go may not be gone yet.
        assert!(held < 2 * STRANGERS, "{held} descriptors are held, most for strangers");
        drop(silent);
    });
}

#[test]
fn a_stolen_certificate_and_hostile_http2() {
    let mut scene = Scene::new();
    let stolen = scene.mesh.credentials(0, FRIEND);
    scene.withstand("random HTTP/2", |scene, random| {
        let (server, mut random, stolen) = (scene.server.at(false, PORT), random.clone(), stolen.clone());
        scene.outsider.netns.run(move || {
            let until = Instant::now() + duration();
            let honest = connect_to(&server.to_string());
            while Instant::now() < until {
                let bytes = noise::http2(&mut random, &honest);
                let stream = say(SocketAddr::new(server.ip(), TUNNELS), &stolen, H2, &bytes);
                if let Some(mut stream) = stream {
                    listen(&mut stream, Duration::from_millis(2));
                    leave(&mut random, &stream.sock);
                }
            }
        });
    });
    for (what, bytes) in floods(scene.server.at(false, PORT)).into_iter().chain(floods_of_headers()) {
        scene.withstand(what, |scene, _| {
            let (to, stolen) = (scene.server.at(false, TUNNELS), stolen.clone());
            scene.outsider.netns.run(move || {
                // Nobody reads the answers.
                let silent: Vec<_> = (0..8).map(|_| say(to, &stolen, H2, &bytes)).collect();
                std::thread::sleep(Duration::from_millis(300));
                drop(silent);
            });
        });
    }
}

/// Streams of a tunnel, and bytes that are pushed into each: more than the sockets behind it take.
const PRESSED: (usize, usize) = (100, 8 << 20);

#[test]
fn a_stolen_certificate_and_streams_that_nobody_reads() {
    let mut scene = Scene::new();
    let unread = SocketAddr::new(scene.server.v4, PORT + 1);
    app::server(&scene.server.netns, PORT + 1, |_stream| std::thread::park());
    let stolen = Forge::of_controller(&scene.mesh).make(&Wanted::workload(FRIEND));
    scene.withstand("streams into an application that does not read", |scene, _| {
        std::thread::scope(|scope| {
            for _ in 0..2 {
                let stolen = stolen.clone();
                scope.spawn(move || {
                    let taken = peer::press(&scene.outsider.netns, scene.server.v4, stolen, unread, PRESSED).expect("a tunnel");
                    eprintln!("{} MiB were taken", taken >> 20);
                });
            }
        });
    });
}

/// Authorities that are none, or of nobody whom a peer may reach through the server's tunnel.
const AUTHORITIES: [&str; 16] = [
    "",
    ":",
    "a",
    "a:1",
    "10.0.0.1",
    "10.77.1.1:0",
    "10.77.1.1:99999",
    "[::1]:80",
    "127.0.0.1:15000",
    "10.77.1.2:8080",
    "user@10.77.1.1:8080",
    "10.77.1.1:8080/x",
    "::ffff:10.77.1.1:80",
    "10.77.1.1:15001",
    "10.77.1.1:15008",
    "0.0.0.0:80",
];

/// A connection that is made of one thing, over and over: what it is, and its bytes.
type Flood = (&'static str, Vec<u8>);

/// A connection whose frames are made by number.
fn flood(times: u32, frame: &dyn Fn(u32) -> Vec<u8>) -> Vec<u8> {
    let mut all = [http2::PREFACE, &http2::frame(kind::SETTINGS, 0, 0, &[])].concat();
    (0..times).for_each(|number| all.extend(frame(number)));
    all
}

fn request(number: u32, authority: &str) -> Vec<u8> {
    http2::frame(kind::HEADERS, http2::END_HEADERS, 2 * number + 1, &connect_to(authority))
}

fn floods(server: SocketAddr) -> Vec<Flood> {
    let server = server.to_string();
    let request_to_server = |number: u32| request(number, &server);
    let reset = |number: u32| http2::frame(kind::RST_STREAM, 0, 2 * number + 1, &[0, 0, 0, 8]);
    let stalled = |number: u32| {
        let data = http2::frame(kind::DATA, 0, 2 * number + 1, &[7; 16_000]);
        [request(number, &server), data.repeat(4)].concat()
    };
    let empty = |number: u32| match number {
        0 => request(0, &server),
        _ => http2::frame(kind::DATA, 0, 1, &[]),
    };
    vec![
        ("a flood of settings", flood(20_000, &|_| http2::frame(kind::SETTINGS, 0, 0, &[0, 4, 0, 1, 0, 0]))),
        ("a flood of pings", flood(20_000, &|_| http2::frame(kind::PING, 0, 0, &[1; 8]))),
        ("windows that overflow", flood(50, &|_| http2::frame(kind::WINDOW_UPDATE, 0, 0, &[0x7f, 0xff, 0xff, 0xff]))),
        ("streams reset as soon as opened", flood(5_000, &|number| [request(number, &server), reset(number)].concat())),
        ("more streams than are allowed", flood(5_000, &request_to_server)),
        ("wishes for what is not there", flood(90, &|number| request(number, AUTHORITIES[number as usize % AUTHORITIES.len()]))),
        ("answers that nobody reads", flood(100, &stalled)),
        ("empty data without end", flood(20_000, &empty)),
    ]
}

fn floods_of_headers() -> Vec<Flood> {
    let endless = |number: u32| {
        let kind = if number == 0 { kind::HEADERS } else { kind::CONTINUATION };
        http2::frame(kind, 0, 1, &http2::headers(&[("x-header", "y")]).repeat(100))
    };
    let value = "x".repeat(100_000);
    let giant = http2::headers(&[(":method", "CONNECT"), (":authority", "10.0.0.1:80"), ("x", &value)]);
    let parts: Vec<_> = giant.chunks(16_000).collect();
    let in_parts = |number: u32| {
        let kind = if number == 0 { kind::HEADERS } else { kind::CONTINUATION };
        http2::frame(kind, 0, 1, parts[number as usize])
    };
    let names: Vec<_> = (0..4000).map(|number| format!("x{number}")).collect();
    let many = http2::headers(&names.iter().map(|name| (name.as_str(), "v")).collect::<Vec<_>>());
    vec![
        ("endless headers", flood(2_000, &endless)),
        ("a giant header", flood(7, &in_parts)),
        ("thousands of headers", flood(1, &|_| http2::frame(kind::HEADERS, http2::END_HEADERS, 1, &many[..16_000]))),
    ]
}

#[test]
fn a_stolen_certificate_and_hostile_frames() {
    let mut scene = Scene::new();
    let stolen = scene.mesh.credentials(0, FRIEND);
    scene.withstand("random frames", |scene, random| {
        let (server, mut random, stolen) = (scene.server.at(false, PORT), random.clone(), stolen.clone());
        scene.outsider.netns.run(move || {
            let until = Instant::now() + duration();
            while Instant::now() < until {
                let bytes = noise::single(&mut random, &open(server));
                let stream = say(SocketAddr::new(server.ip(), TUNNELS), &stolen, SINGLE, &bytes);
                if let Some(mut stream) = stream {
                    listen(&mut stream, Duration::from_millis(2));
                    leave(&mut random, &stream.sock);
                }
            }
        });
    });
    let server = scene.server.at(false, PORT);
    let others = ["127.0.0.1:15000", "10.77.0.1:15012", "10.77.1.2:8080", "[::1]:8080", "0.0.0.0:0"];
    let elsewhere: Vec<u8> = others.iter().flat_map(|to| open(to.parse().expect("an address"))).collect();
    for (what, bytes) in [
        ("frames that never end", [open(server), vec![0, 0xff, 0xff, 0xff]].concat()),
        ("an open without its end", open(server)[..20].to_vec()),
        ("an open in an open stream", open(server).repeat(100)),
        ("ends before the beginning", vec![3, 0, 0, 0]),
        ("destinations elsewhere", elsewhere),
        ("an echo that nobody reads", [open(server), vec![0, 0xff, 0xff, 0xff], vec![7; 1 << 20]].concat()),
    ] {
        scene.withstand(what, |scene, _| {
            let (to, stolen) = (scene.server.at(false, TUNNELS), stolen.clone());
            scene.outsider.netns.run(move || {
                let idle: Vec<_> = (0..100)
                    .map(|_| {
                        let mut stream = attacker::connect(to, Some(&stolen), &[SINGLE]).expect("a real certificate");
                        stream.sock.set_write_timeout(Some(Duration::from_millis(10))).expect("a timeout");
                        let _blocked_or_ended = stream.write_all(&bytes);
                        stream
                    })
                    .collect();
                std::thread::sleep(Duration::from_millis(300));
                drop(idle);
            });
        });
    }
    eventually("a destination elsewhere is refused", || scene.mesh.log("agent-b").contains("bad_request"));
}
