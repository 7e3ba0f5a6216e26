//! The command line: one subcommand a file.
//!
//! Enters: arguments. Leaves: a running role, or a command's output, and an error for `main` to print.

pub mod agent;
pub mod ca;
pub mod check;
mod cluster;
pub mod controller;
pub mod install;
pub mod uninstall;

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use tokio::runtime::{Builder, Runtime};

/// Mutual TLS for every pod of a node, without a sidecar.
#[derive(Debug, Parser)]
#[command(name = "culvert", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs the node's agent: captures the connections of enrolled pods and carries them through mutual TLS.
    Agent(Box<agent::AgentArgs>),
    /// Runs the control plane: certificate authority and configuration server.
    Controller(Box<controller::ControllerArgs>),
    /// Puts Culvert on a Kubernetes cluster, or brings it up to date there.
    Install(install::InstallArgs),
    /// Tells what is wrong with a cluster, or with this machine as a node, and what mends it.
    Check(check::CheckArgs),
    /// Takes Culvert off a Kubernetes cluster: nothing is left on its nodes or in its API.
    Uninstall(uninstall::UninstallArgs),
    /// Operates the mesh's certificate authority on Kubernetes.
    Ca(ca::CaArgs),
}

/// Does what the arguments say. Wrong arguments end with their own message and exit code 2, help and version with 0.
///
/// # Errors
/// Whatever kept the command from doing its work, with its causes.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> anyhow::Result<ExitCode> {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            error.print().context("cannot print")?;
            return Ok(ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2)));
        }
    };
    match cli.command {
        Command::Agent(args) => agent::run(*args)?,
        Command::Controller(args) => runtime(None)?.block_on(controller::run(*args))?,
        Command::Install(args) => runtime(None)?.block_on(install::run(&args))?,
        Command::Check(args) => return runtime(None)?.block_on(check::run(args)),
        Command::Uninstall(args) => return runtime(None)?.block_on(uninstall::run(&args)),
        Command::Ca(args) => runtime(Some(1))?.block_on(ca::run(args))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// A multi-threaded runtime of `workers` threads; none: as many as the machine has processors.
fn runtime(workers: Option<usize>) -> anyhow::Result<Runtime> {
    let mut builder = Builder::new_multi_thread();
    if let Some(workers) = workers {
        builder.worker_threads(workers);
    }
    builder.enable_all().thread_name("culvert").build().context("cannot start the threads of the runtime")
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
