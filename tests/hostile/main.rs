//! Promise: bytes from the network end neither an agent nor the controller, cost a bounded amount of memory, leave no descriptor
//! behind, and honest traffic passes meanwhile.
//!
//! `CULVERT_FUZZ_SEED` repeats a run, `CULVERT_FUZZ_SECONDS` makes each attack longer.

mod controller;
mod mistakes;
mod noise;
mod pods;
mod tunnels;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use harness::{Footprint, Mesh, Pod, PodSpec, Process, app, eventually};
use rand::SeedableRng as _;
use rand::rngs::StdRng;

const PORT: u16 = 8080;
const WHO: [&str; 3] = ["controller", "agent-a", "agent-b"];
/// What a process may have grown by when an attack is over, in KiB: what its allocator keeps for the next. On a machine with other
/// work to do that has been 80 MiB, after six seconds of an attack as after twenty.
const GROWTH_KIB: u64 = 128 * 1024;
/// What a process may hold more at the height of an attack than before it, in KiB.
const PEAK_KIB: u64 = 256 * 1024;
/// Descriptors that may come and go on their own: connections that are kept warm.
const DESCRIPTORS: usize = 24;
/// Tunnels that agents keep for a while from one workload of the mesh to another, for its next connections.
const WARM_TUNNELS: usize = 256;
/// The longest that a deadline of the controller's or an agent's lets a silent peer stay, with room to spare.
const DEADLINES: Duration = Duration::from_secs(45);

/// A server and its client, both in the mesh, and a pod outside of it that attacks.
struct Scene {
    mesh: Mesh,
    server: Pod,
    friend: Pod,
    outsider: Pod,
    random: StdRng,
    /// Descriptors that the attacker may leave for a while, by what an agent does for every pod of the mesh.
    left: usize,
}

impl Scene {
    fn new() -> Self {
        raise_limit();
        let mut mesh = Mesh::start();
        let server = mesh.pod(PodSpec { name: "server", namespace: "shop", node: 1, enrolled: true });
        app::server(&server.netns, PORT, app::echo);
        let friend = mesh.pod(PodSpec { name: "friend", namespace: "shop", node: 0, enrolled: true });
        let outsider = mesh.pod(PodSpec { name: "outsider", namespace: "shop", node: 0, enrolled: false });
        let seed = number("CULVERT_FUZZ_SEED", 0x6375_6c76_6572_7400);
        eprintln!("CULVERT_FUZZ_SEED={seed}");
        let scene = Self { mesh, server, friend, outsider, random: StdRng::seed_from_u64(seed), left: 0 };
        eventually("the server is reached", || scene.converse().is_ok());
        scene
    }

    fn converse(&self) -> std::io::Result<app::Seen> {
        app::converse(&self.friend.netns, self.server.at(false, PORT), "honest")
    }

    /// Runs `attack` beside honest traffic, and checks that all of them live on as they were.
    fn withstand(&mut self, what: &str, attack: impl FnOnce(&Self, &mut StdRng)) {
        let processes = WHO.map(|who| self.mesh.process(who));
        processes.iter().for_each(Process::reset_peak);
        let before = processes.each_ref().map(Process::footprint);
        let mut random = self.random.clone();
        let over = AtomicBool::new(false);
        let served = std::thread::scope(|scope| {
            let honest = scope.spawn(|| {
                let mut served = 0;
                while !over.load(Ordering::Relaxed) {
                    self.converse().unwrap_or_else(|error| panic!("honest connection {served} during {what}: {error}"));
                    served += 1;
                }
                served
            });
            let attacked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| attack(self, &mut random)));
            over.store(true, Ordering::Relaxed);
            let served = honest.join();
            attacked.and(served).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        self.random = random;
        assert!(served > 0, "no honest connection during {what}");
        let after = self.at_rest(what, before);
        for who in WHO {
            assert!(!self.mesh.log(who).contains("panicked"), "{who} panicked in {what}");
        }
        let grown = |(before, after): (&Footprint, &Footprint)| after.resident_kib.saturating_sub(before.resident_kib);
        let peak = |(before, after): (&Footprint, &Footprint)| after.peak_kib.saturating_sub(before.resident_kib);
        for (place, who) in WHO.into_iter().enumerate() {
            let pair = (&before[place], &after[place]);
            eprintln!("{what}: {who}: +{} KiB, at its height +{} KiB, {served} honest connections", grown(pair), peak(pair));
            assert!(grown(pair) <= GROWTH_KIB, "{who} has grown by {} KiB in {what}", grown(pair));
            assert!(peak(pair) <= PEAK_KIB, "{who} held {} KiB more at the height of {what}", peak(pair));
        }
        eventually("the server is reached afterwards", || self.converse().is_ok());
    }

    /// Waits until every process has as few descriptors as before, and gives what each holds then.
    fn at_rest(&mut self, what: &str, before: [Footprint; 3]) -> [Footprint; 3] {
        let (deadline, left) = (Instant::now() + DEADLINES, DESCRIPTORS + self.left);
        loop {
            let now = WHO.map(|who| self.mesh.process(who).footprint());
            let more = before.iter().zip(&now).any(|(before, now)| now.descriptors > before.descriptors + left);
            if !more {
                return now;
            }
            let counts = |all: &[Footprint; 3]| all.map(|one| one.descriptors);
            assert!(Instant::now() < deadline, "descriptors after {what}: {:?}, before: {:?}", counts(&now), counts(&before));
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// How long an attack goes on.
fn duration() -> Duration {
    Duration::from_secs(number("CULVERT_FUZZ_SECONDS", 6))
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().expect("a number"))
}

/// The attacker's own connections count as well.
fn raise_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("the hard limit is allowed");
}
