//! Parts of the cluster that are stopped and started, and programs that are run on a node itself. That is for the clusters of
//! `cargo xtask cluster`: of another, the tests have no more than the API.

use std::fs::File;
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};

use nix::sched::{CloneFlags, setns};

use super::{Cluster, text};

impl Cluster {
    /// Whether it is one of `cargo xtask cluster`, which can be disturbed.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        std::env::var_os("CULVERT_CLUSTER").is_some()
    }

    /// Stops a part, as `cargo xtask cluster stop` has it: `api-server`, `NODE`, `NODE/kubelet` or `NODE/link`. It starts again when what
    /// this gives is dropped.
    ///
    /// # Panics
    /// When it cannot be stopped.
    #[must_use]
    pub fn stop(&self, part: &str) -> Stopped {
        xtask(&["stop", part]).unwrap_or_else(|error| panic!("stopping {part}: {error}"));
        Stopped { part: part.to_owned() }
    }

    /// Runs a program on a node, in the node's own namespaces.
    ///
    /// # Errors
    /// What it printed, when it failed.
    pub fn on_node(&self, node: &str, words: &[&str]) -> Result<String, String> {
        xtask(&[&["exec", node, "--"], words].concat())
    }
}

impl Cluster {
    /// Has a node give this address to its next pod, as soon as nobody has it.
    ///
    /// # Panics
    /// When the node's addresses are not given out as they are in our clusters.
    pub fn set_next_address(&self, node: &str, address: &str) {
        let next: Ipv4Addr = address.parse().expect("an address");
        let last = Ipv4Addr::from_bits(next.to_bits() - 1);
        // The plugin host-local keeps a file for each address that is taken, and one that says where to go on: below our directory, or kind's.
        let script = format!(
            "cd /run/cni-ipam/pods || cd /run/cni-ipam-state/kindnet || exit; \
             for _ in $(seq 300); do [ -e {next} ] || break; sleep 0.1; done; \
             [ ! -e {next} ] && printf %s {last} > last_reserved_ip.0"
        );
        self.on_node(node, &["sh", "-c", &script]).unwrap_or_else(|error| panic!("giving {next} to the next pod: {error}"));
    }

    /// Runs `f` where somebody outside of the cluster is, who reaches the nodes: in our clusters where the control plane is, which runs no
    /// pods; for another cluster on this machine.
    ///
    /// # Panics
    /// When `f` does.
    pub fn outside<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> T {
        if !self.is_ours() {
            return f();
        }
        let path = xtask(&["netns", "control-plane"]).expect("there is a control plane");
        let namespace = File::open(path.trim()).expect("its network namespace is there");
        let inside = std::thread::spawn(move || {
            setns(namespace, CloneFlags::CLONE_NEWNET).expect("root may enter");
            f()
        });
        inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// A part that is stopped.
#[derive(Debug)]
pub struct Stopped {
    part: String,
}

impl Drop for Stopped {
    fn drop(&mut self) {
        if let Err(error) = xtask(&["start", &self.part]) {
            eprintln!("starting {}: {error}", self.part);
        }
    }
}

fn xtask(words: &[&str]) -> Result<String, String> {
    let (Some(program), Some(name)) = (std::env::var_os("CULVERT_XTASK"), std::env::var_os("CULVERT_CLUSTER")) else {
        panic!("this test disturbs nodes, which it can do with a cluster of `cargo xtask cluster` only");
    };
    let mut command = Command::new(program);
    command.args(["cluster", "--name"]).arg(name).args(words).stdin(Stdio::null());
    text(&command.output().expect("xtask starts"))
}
