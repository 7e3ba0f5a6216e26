//! Another proxy beside Culvert, which a script starts and stops. Nothing here knows what it is.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use harness::mesh::NODES;
use harness::{Mesh, Pod};

use crate::program;

/// A proxy that serves two pods of its own, which Culvert leaves alone. It is stopped when this is dropped.
#[derive(Debug)]
pub(crate) struct Other {
    pub(crate) client: Pod,
    pub(crate) server: Pod,
    /// Its processes, as the script has printed them.
    pub(crate) processes: Vec<u32>,
    script: PathBuf,
    environment: Vec<(&'static str, String)>,
}

impl Other {
    /// Runs `SCRIPT start`, which returns when the proxy serves. It prints a line `pid NUMBER` for each process whose time and memory
    /// count: first those on the client's node. What it starts must not keep its output open.
    pub(crate) fn start(script: &Path, client: Pod, server: Pod, mesh: &Mesh) -> Result<Self> {
        let path = |path: PathBuf| path.display().to_string();
        let environment = vec![
            ("CLIENT_NETNS", path(client.netns.path())),
            ("CLIENT_IP", client.v4.to_string()),
            ("CLIENT_NODE_NETNS", path(mesh.node(0).path())),
            ("CLIENT_NODE_NAME", NODES[0].to_owned()),
            ("SERVER_NETNS", path(server.netns.path())),
            ("SERVER_IP", server.v4.to_string()),
            ("SERVER_NODE_NETNS", path(mesh.node(1).path())),
            ("SERVER_NODE_NAME", NODES[1].to_owned()),
            ("DIRECTORY", path(mesh.directory().to_owned())),
        ];
        let mut other = Self { client, server, processes: Vec::new(), script: script.to_owned(), environment };
        let printed = program::output(other.command("start"))?;
        let processes = printed.lines().filter_map(|line| line.strip_prefix("pid "));
        other.processes =
            processes.map(|number| number.trim().parse()).collect::<Result<_, _>>().context("lines `pid NUMBER`")?;
        ensure!(!other.processes.is_empty(), "{} start printed no line `pid NUMBER`", script.display());
        Ok(other)
    }

    fn command(&self, verb: &str) -> Command {
        let mut command = Command::new(&self.script);
        command.arg(verb).envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        match self.command("stop").status() {
            Ok(status) if status.success() => {}
            ended => eprintln!("bench: {} stop: {ended:?}", self.script.display()),
        }
    }
}
