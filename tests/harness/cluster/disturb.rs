//! Parts of the cluster that are stopped and started, and programs that are run on a node itself. That is for the clusters of
//! `cargo xtask cluster`: of another, the tests have no more than the API.

use std::process::{Command, Stdio};

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
