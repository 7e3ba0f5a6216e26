//! Other programs: run to their end for what they print, or kept running beside the measurements.

use std::io::Read as _;
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use harness::Namespace;

use crate::interrupt;

/// Runs a program to its end and gives what it printed.
pub(crate) fn output(mut command: Command) -> Result<String> {
    interrupt::check()?;
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().with_context(|| format!("starting {command:?}"))?;
    interrupt::waiting_for(Some(child.id()));
    let mut printed = String::new();
    let read = child.stdout.take().context("no output")?.read_to_string(&mut printed);
    // It has closed its output; until it is waited for its number is nobody else's.
    interrupt::waiting_for(None);
    let status = child.wait()?;
    interrupt::check()?;
    read?;
    ensure!(status.success(), "{command:?}: {status}: {printed}");
    Ok(printed)
}

/// A program that runs until this is dropped.
#[derive(Debug)]
pub(crate) struct Daemon(Child);

impl Daemon {
    /// Starts it in a pod, and waits until it listens at `port`.
    pub(crate) fn start(pod: &Namespace, mut command: Command, port: u16) -> Result<Self> {
        let command = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let daemon = Self(command.spawn().with_context(|| format!("starting {command:?}"))?);
        let local = SocketAddr::from(([127, 0, 0, 1], port));
        harness::eventually(&format!("{command:?} listens"), || harness::app::connect(pod, local).is_ok());
        Ok(daemon)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ended_already = self.0.kill();
        let _status = self.0.wait();
    }
}
