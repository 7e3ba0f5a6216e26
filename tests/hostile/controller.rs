//! Attacks on 15012: from strangers, and from a node whose token is real.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use harness::attacker::{self, CONTROLLER, CREATE_CERTIFICATE, DISCOVERY, Tls};
use harness::http2::{self, kind};
use rand::Rng as _;

use super::{Scene, duration, noise};

const H2: &[u8] = b"h2";

fn tls() -> Option<Tls> {
    attacker::connect(CONTROLLER, None, &[H2]).ok()
}

/// Writes for as long as it is taken, and reads what comes in a moment.
fn say(bytes: &[u8], moment: Duration) {
    let Some(mut stream) = tls() else { return };
    stream.sock.set_write_timeout(Some(Duration::from_millis(500))).expect("a timeout");
    let _blocked_or_ended = stream.write_all(bytes).and_then(|()| stream.flush());
    stream.sock.set_read_timeout(Some(moment)).expect("a timeout");
    let mut answer = [0; 16_384];
    while matches!(stream.read(&mut answer), Ok(read) if read > 0) {}
}

/// A connection's beginning, with windows so large that no answer waits for one.
fn begin() -> Vec<u8> {
    let settings = http2::frame(kind::SETTINGS, 0, 0, &[0, 4, 0x7f, 0xff, 0xff, 0xff]);
    [http2::PREFACE, &settings, &http2::frame(kind::WINDOW_UPDATE, 0, 0, &[0x7f, 0xfe, 0, 0])].concat()
}

/// A call on a stream, with a body in frames of 16 KiB, and no end.
fn call(stream: u32, path: &str, token: Option<&str>, body: &[u8]) -> Vec<u8> {
    let mut all = http2::frame(kind::HEADERS, http2::END_HEADERS, stream, &http2::call(path, token));
    for part in body.chunks(16_384) {
        all.extend(http2::frame(kind::DATA, 0, stream, part));
    }
    all
}

/// A discovery request of a type.
fn ask(type_url: &str, subscribe: &[String], unsubscribe: &[String]) -> Vec<u8> {
    let mut request = http2::field(2, type_url.as_bytes());
    subscribe.iter().for_each(|name| request.extend(http2::field(3, name.as_bytes())));
    unsubscribe.iter().for_each(|name| request.extend(http2::field(4, name.as_bytes())));
    http2::message(&request)
}

const ADDRESS: &str = "type.googleapis.com/istio.workload.Address";

#[test]
fn strangers_at_the_controller() {
    let mut scene = Scene::new();
    scene.withstand("noise at the controller", |scene, random| {
        let mut random = random.clone();
        let hello = attacker::client_hello(&[H2]);
        scene.outsider.netns.run(move || {
            let until = Instant::now() + duration();
            while Instant::now() < until {
                let mut socket = attacker::dial(CONTROLLER).expect("the controller listens");
                let _ended_early = socket.write_all(&noise::handshake(&mut random, &hello));
            }
        });
    });
    scene.withstand("random HTTP/2 and gRPC without a token", |scene, random| {
        let mut random = random.clone();
        scene.outsider.netns.run(move || {
            let until = Instant::now() + duration();
            while Instant::now() < until {
                let token = random.random::<bool>().then_some("bm90IGEgdG9rZW4");
                let path = [CREATE_CERTIFICATE, DISCOVERY, "/", "/x/y"][random.random_range(0..4)];
                let bytes = match random.random::<bool>() {
                    true => noise::http2(&mut random, &http2::call(path, token)),
                    false => [begin(), call(1, path, token, &http2::message(&noise::protobuf(&mut random)))].concat(),
                };
                say(&bytes, Duration::from_millis(2));
            }
        });
    });
    scene.withstand("bodies without a token", |scene, _| {
        scene.outsider.netns.run(move || {
            // A thousand calls at once, each about to send more than is taken, of which a part comes.
            let body = [&[0, 0, 1, 0, 0][..], &[7; 60_000]].concat();
            for _ in 0..4 {
                let calls = (0..1000).flat_map(|number| call(2 * number + 1, CREATE_CERTIFICATE, Some("x"), &body));
                say(&[begin(), calls.collect()].concat(), Duration::from_millis(200));
            }
        });
    });
}

#[test]
fn connections_that_say_nothing_to_the_controller() {
    let mut scene = Scene::new();
    scene.withstand("half-open connections to the controller", |scene, _| {
        let node = scene.mesh.node(0);
        let (hello, token) = (attacker::client_hello(&[H2]), scene.mesh.token(0));
        let (served, _silent) = scene.outsider.netns.run(move || {
            let mut silent: Vec<TcpStream> = Vec::new();
            for number in 0..3000 {
                let Ok(mut socket) = attacker::dial(CONTROLLER) else { continue };
                let _evicted = socket.write_all(&hello[..[0, hello.len() / 2, 1][number % 3]]);
                silent.push(socket);
            }
            let shaken: Vec<_> = (0..1500).filter_map(|_| tls()).collect();
            (silent.len() + shaken.len(), (silent, shaken))
        });
        assert!(served > 1000, "the attack did not come about");
        // A node is served meanwhile.
        node.run(move || {
            let started = Instant::now();
            let mut stream = tls().expect("a node gets through");
            let answer = http2::unary(&mut stream, CREATE_CERTIFICATE, Some(&token), b"").expect("an answer");
            assert_eq!(answer, None, "an empty request is refused");
            assert!(started.elapsed() < Duration::from_secs(5), "a node waited {:?}", started.elapsed());
        });
    });
}

#[test]
fn a_node_that_turns_on_the_controller() {
    let mut scene = Scene::new();
    let token = scene.mesh.token(0);
    scene.withstand("random messages with a token", |scene, random| {
        let (mut random, token) = (random.clone(), token.clone());
        scene.outsider.netns.run(move || {
            let until = Instant::now() + duration();
            let honest = ask(ADDRESS, &["*".to_owned()], &[]);
            while Instant::now() < until {
                let path = [CREATE_CERTIFICATE, DISCOVERY][random.random_range(0..2)];
                let mut body = match random.random_range(0..3) {
                    0 => http2::message(&noise::protobuf(&mut random)),
                    1 => noise::mutated(&mut random, &honest),
                    _ => honest.repeat(random.random_range(1..50)),
                };
                if random.random_ratio(1, 4) {
                    body = noise::mutated(&mut random, &body);
                }
                let bytes = [begin(), call(1, path, Some(&token), &body)].concat();
                say(&bytes, Duration::from_millis(2));
            }
        });
    });
}

#[test]
fn a_node_that_asks_for_too_much() {
    let mut scene = Scene::new();
    let token = scene.mesh.token(0);
    let names = |prefix: &str, count: usize| (0..count).map(|number| format!("{prefix}{number}")).collect::<Vec<_>>();
    let everything = ["*".to_owned()];
    for (what, body) in [
        ("a name of eight megabytes", ask(ADDRESS, &["n".repeat(8 << 20)], &[])),
        ("more names than can be followed", ask(ADDRESS, &names("Kubernetes//Pod/shop/x", 200_000), &[])),
        ("addresses by the thousand", ask(ADDRESS, &names("/10.1.2.", 60_000), &[])),
        (
            "a subscription that changes its mind",
            [ask(ADDRESS, &everything, &[]), ask(ADDRESS, &[], &everything)].concat().repeat(20_000),
        ),
        (
            "names that come and go",
            (0..2_000)
                .flat_map(|number| ask(ADDRESS, &names(&format!("{number}-"), 20), &names(&format!("{}-", number - 1), 20)))
                .collect(),
        ),
        (
            "types that are not there",
            (0..5_000).flat_map(|number| ask(&format!("type.googleapis.com/no.{number}"), &names("n", 20), &[])).collect(),
        ),
    ] {
        scene.withstand(what, |scene, _| {
            let token = token.clone();
            scene.outsider.netns.run(move || {
                for _ in 0..3 {
                    say(&[begin(), call(1, DISCOVERY, Some(&token), &body)].concat(), Duration::from_millis(200));
                }
            });
        });
    }
    scene.withstand("streams by the thousand", |scene, _| {
        let token = token.clone();
        scene.outsider.netns.run(move || {
            // Each about to send a message as large as is taken.
            let head = [&[0, 3, 0xff, 0xff, 0xff][..], &http2::field(2, ADDRESS.as_bytes())].concat();
            let calls: Vec<u8> = (0..1000).flat_map(|number| call(2 * number + 1, DISCOVERY, Some(&token), &head)).collect();
            let open: Vec<_> = (0..8)
                .map(|_| {
                    let mut stream = tls().expect("a connection");
                    let _ended = stream.write_all(&[begin(), calls.clone()].concat());
                    stream
                })
                .collect();
            std::thread::sleep(Duration::from_secs(1));
            drop(open);
        });
    });
    scene.withstand("giant certificate requests", |scene, _| {
        let token = token.clone();
        scene.outsider.netns.run(move || {
            for length in [20_000, 60_000, 200_000, 5_000_000] {
                let request = attacker::certificate_request(&"A".repeat(length), "spiffe://cluster.local/ns/shop/sa/friend", 0);
                let mut stream = tls().expect("a connection");
                let answer = http2::unary(&mut stream, CREATE_CERTIFICATE, Some(&token), &request);
                assert!(!matches!(answer, Ok(Some(_))), "{length} bytes of nothing were signed");
            }
        });
    });
}
