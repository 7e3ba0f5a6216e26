//! Attacks on 15001, from a pod of the mesh, and on 15006, from one outside of it.

use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use harness::{PodSpec, app, attacker, eventually};
use rand::Rng as _;
use socket2::SockRef;

use super::{PORT, Scene, WARM_TUNNELS, duration, noise};

const OUTBOUND: u16 = 15001;
const PLAINTEXT: u16 = 15006;

#[test]
fn a_pod_of_the_mesh_against_its_own_agent() {
    let mut scene = Scene::new();
    let insider = scene.mesh.pod(PodSpec { name: "insider", namespace: "shop", node: 0, enrolled: true });
    scene.left = WARM_TUNNELS;
    scene.withstand("bytes, resets and silence at the outbound port", |scene, random| {
        let (server, own, mut random) = (scene.server.at(false, PORT), insider.v4, random.clone());
        insider.netns.run(move || {
            let until = Instant::now() + duration();
            let mut silent = Vec::new();
            while Instant::now() < until {
                // Captured, to a port that is served and to one that is not; and the agent's listeners by every address that there is.
                let to = match random.random_range(0..6) {
                    0 => SocketAddr::from(([127, 0, 0, 1], OUTBOUND)),
                    1 => SocketAddr::new(own, OUTBOUND),
                    2 => SocketAddr::new(server.ip(), PORT + 1),
                    3 => SocketAddr::new(server.ip(), OUTBOUND),
                    _ => server,
                };
                let Ok(mut socket) = attacker::dial(to) else { continue };
                let _ended_early = socket.write_all(&noise::bytes(&mut random, 1 << 16));
                match random.random_range(0..4) {
                    0 => SockRef::from(&socket).set_linger(Some(Duration::ZERO)).expect("an option"),
                    1 => drop(socket.shutdown(std::net::Shutdown::Write)),
                    2 if silent.len() < 500 => silent.push(socket),
                    _ => {}
                }
            }
        });
    });
    scene.withstand("two thousand connections opened and left", |scene, _| {
        let server = scene.server.at(false, PORT);
        insider.netns.run(move || {
            let silent: Vec<_> = (0..2000).map(|_| attacker::dial(server).expect("the agent takes it")).collect();
            drop(silent);
        });
    });
}

#[test]
fn plaintext_that_needs_a_decision() {
    let mut scene = Scene::new();
    let policy = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: no-9999, namespace: shop}\n\
                  spec: {action: DENY, rules: [{to: [{operation: {ports: [\"9999\"]}}]}]}\n";
    scene.mesh.apply("policy", policy);
    scene.mesh.await_policy("shop", Some("no-9999"));
    app::server(&scene.server.netns, 9999, app::echo);
    eventually("the policy is asked", || app::converse(&scene.outsider.netns, scene.server.at(false, 9999), "no").is_err());
    scene.withstand("bytes, resets and silence at the plaintext port", |scene, random| {
        let (server, mut random) = (scene.server.at(false, PORT), random.clone());
        scene.outsider.netns.run(move || {
            let until = Instant::now() + duration();
            let mut silent = Vec::new();
            while Instant::now() < until {
                let port = [PORT, PORT, PORT + 1, 9999, PLAINTEXT, OUTBOUND][random.random_range(0..6)];
                let Ok(mut socket) = attacker::dial(SocketAddr::new(server.ip(), port)) else { continue };
                let _ended_early = socket.write_all(&noise::bytes(&mut random, 1 << 16));
                match random.random_range(0..4) {
                    0 => SockRef::from(&socket).set_linger(Some(Duration::ZERO)).expect("an option"),
                    1 => drop(socket.shutdown(std::net::Shutdown::Write)),
                    2 if silent.len() < 500 => silent.push(socket),
                    _ => drop(socket.read(&mut [0; 64])),
                }
            }
        });
    });
}
