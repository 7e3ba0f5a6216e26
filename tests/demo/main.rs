//! `cargo xtask demo`: two nodes and four pods as network namespaces, a controller, two agents, nginx and curl. Six steps, each of which
//! checks what it says; the exit code is 0 only if all of them hold.
//!
//! With `--cluster` it is a Kubernetes cluster instead, with pods and Istio's manifests: see [`cluster`].
//!
//! Nothing that is printed is known beforehand: it comes from the programs' own output, from a capture between the nodes, from the
//! agents' access logs and from their admin interfaces.

mod application;
mod cluster;
mod handshake;
mod lab;
mod mesh;
mod netns;
mod payload;
mod report;
mod steps;
mod tls;
mod wire;

use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::Parser;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::signal_name;

use lab::Lab;
use report::Report;

/// Shows transparent mutual TLS between pods on two nodes, and checks each thing that it shows.
#[derive(Debug, Parser)]
#[command(name = "demo")]
struct Arguments {
    /// The culvert binary.
    #[arg(long, env = "CULVERT_BIN", value_name = "FILE")]
    culvert: std::path::PathBuf,
    /// Leaves everything running, and says how to use it and how to remove it.
    #[arg(long)]
    keep: bool,
    /// Removes what --keep left, and does nothing else.
    #[arg(long, conflicts_with = "keep")]
    remove: bool,
    /// Shows it on the cluster that KUBECONFIG names, on which Culvert is installed.
    #[arg(long, conflicts_with = "remove")]
    cluster: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<bool> {
    if arguments.cluster {
        return Ok(cluster::show(&arguments.culvert, arguments.keep));
    }
    let lab = Lab::claim()?;
    lab.remove().context("removing what an earlier run left")?;
    if arguments.remove {
        return Ok(true);
    }
    remove_on_signals(lab.clone())?;
    let cleanup = lab.cleanup();
    let mut report = Report::new();
    let shown = steps::all(&lab, &arguments.culvert, &mut report);
    if let Err(error) = &shown {
        report.broken(error);
        eprintln!("{}", lab.last_words());
    }
    let passed = report.finish();
    if arguments.keep && shown.is_ok() {
        std::mem::forget(cleanup);
        report.text(&steps::how_to_use(&lab));
    } else {
        lab.remove().context("cleaning up")?;
    }
    Ok(passed)
}

/// Ctrl-C, and the signals that ask a program to end, remove everything before they end it. The programs of the lab are in process groups of
/// their own, so that the terminal's signal reaches nobody else; and they have their signals as they were: a mask they would inherit.
fn remove_on_signals(lab: Lab) -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("taking over the signals")?;
    std::thread::spawn(move || {
        let Some(signal) = signals.forever().next() else { return };
        // Whoever is about to print that a program ended waits here for ever.
        let _silence = std::io::stdout().lock();
        eprintln!("\n{}: cleaning up", signal_name(signal).unwrap_or("a signal"));
        if let Err(error) = lab.remove_for_good() {
            eprintln!("demo: {error:#}");
        }
        std::process::exit(128 + signal);
    });
    Ok(())
}
