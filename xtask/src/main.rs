//! `cargo xtask`: all that a contributor needs to know. One verb a file.

mod bench;
mod check;
mod cluster;
mod fuzz;
mod generated;
mod image;
mod installed;
mod launch;
mod run;
mod setup;
mod test;
mod tidy;
mod vm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Builds, checks, tests and shows Culvert. Every verb installs first what it needs and finds missing.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Installs what building and testing need and this machine lacks.
    Setup {
        /// Only what building needs.
        #[arg(long)]
        build_only: bool,
    },
    /// Builds the `culvert` binary, eBPF programs included.
    Build {
        /// Optimised: target/release/culvert.
        #[arg(long)]
        release: bool,
    },
    /// Format, lints, documentation, dependency licences and the project's own rules.
    Check,
    /// Makes the container image, the same bits each time, without Docker.
    Image(image::ImageArgs),
    /// Writes the files that are made from others: the plain manifests.
    Gen,
    /// Runs the tests: all of them, or one suite.
    Test {
        /// Which suite.
        suite: Option<test::Suite>,
        /// Only tests whose names contain this.
        filter: Option<String>,
        #[command(flatten)]
        cluster: test::ClusterOptions,
    },
    /// A Kubernetes cluster on this machine: made, looked at, disturbed and removed.
    Cluster(cluster::Arguments),
    /// Explores the parsers of foreign bytes: one target, or all.
    Fuzz {
        /// Which, of `tests/fuzz/fuzz_targets`.
        target: Option<String>,
        /// How long each is explored.
        #[arg(long, default_value_t = 60)]
        seconds: u32,
    },
    /// Shows the main job: two nodes, four pods, nginx and curl, beside what the wire sees.
    Demo {
        /// On a Kubernetes cluster of two nodes, which is made for it, with pods: by kind where Docker works.
        #[arg(long)]
        cluster: bool,
        /// By kind, with nodes of this image, as with `cluster up`.
        #[arg(long, value_name = "IMAGE", requires = "cluster")]
        node_image: Option<String>,
        /// Leaves everything running, and says how to use it.
        #[arg(long)]
        keep: bool,
        /// Removes what --keep left, and does nothing else.
        #[arg(long, conflicts_with = "keep")]
        remove: bool,
    },
    /// Measures what Culvert costs beside direct connections.
    Bench(bench::Arguments),
}

fn main() -> ExitCode {
    let done = match Cli::parse().verb {
        Verb::Setup { build_only } => setup::ensure(if build_only { setup::Scope::Build } else { setup::Scope::Test }),
        Verb::Build { release } => launch::build(release).map(drop),
        Verb::Check => check::all(),
        Verb::Image(args) => image::make(&args),
        Verb::Gen => generated::write(),
        Verb::Test { suite, filter, cluster } => test::run(suite, filter.as_deref(), &cluster),
        Verb::Fuzz { target, seconds } => fuzz::explore(target.as_deref(), seconds),
        Verb::Cluster(arguments) => cluster::run(arguments),
        Verb::Demo { cluster: false, keep, remove, .. } => launch::demo(keep, remove),
        Verb::Demo { cluster: true, keep, remove, node_image } => installed::demo(keep, remove, node_image),
        Verb::Bench(arguments) => bench::bench(&arguments),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
