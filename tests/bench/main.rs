//! `cargo xtask bench`: what Culvert costs, in one run on one topology, beside the same bytes on the same way without it. Paths are
//! measured in turns (direct, culvert, direct, culvert …), so that what else the machine does falls on all of them.

mod api;
mod cpu;
mod facts;
mod interrupt;
mod json;
mod lab;
mod load;
mod measure;
mod metrics;
mod other;
mod picture;
mod program;
mod results;
mod rows;
mod table;
mod topology;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result, anyhow, ensure};
use clap::Parser;
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use facts::Facts;
use lab::Lab;
use measure::Scale;
use results::{Measured, Sample};
use rows::{ROWS, Row};

/// Descriptors for 10,000 connections: two ends here, and up to four in an agent.
const DESCRIPTORS: u64 = 1 << 17;

/// Measures Culvert against direct connections.
#[derive(Debug, Parser)]
#[command(name = "bench")]
struct Arguments {
    /// Where the results go, with every value of every round.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Where a picture of the ratios goes.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Another proxy to be measured beside: a program that starts and stops it (`FILE start`, `FILE stop`) for the pods that its
    /// environment names.
    #[arg(long, value_name = "FILE")]
    other: Option<PathBuf>,
    /// Fewer and shorter rounds.
    #[arg(long)]
    quick: bool,
    /// Only rows whose names begin so.
    #[arg(long, value_name = "ROW", num_args = 1..)]
    only: Vec<String>,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[expect(clippy::print_stdout, reason = "the table is what this program is for")]
fn run(arguments: &Arguments) -> Result<()> {
    let chosen = choose(&arguments.only)?;
    interrupt::listen()?;
    raise_file_limit()?;
    let scale = if arguments.quick { Scale::QUICK } else { Scale::FULL };
    let facts = Facts::collect();
    let Outcome { done, ended } = measure_all(&chosen, scale, arguments.other.clone());
    if done.is_empty() {
        return ended;
    }
    print!("{}", table::render(&facts, &done));
    if let Some(file) = &arguments.json {
        write(file, &(serde_json::to_string_pretty(&json::document(&facts, &done))? + "\n"))?;
    }
    if let Some(file) = &arguments.svg {
        write(file, &picture::render(&facts, &done))?;
    }
    ended
}

fn write(file: &Path, text: &str) -> Result<()> {
    std::fs::write(file, text).with_context(|| format!("writing {}", file.display()))
}

fn choose(only: &[String]) -> Result<Vec<&'static Row>> {
    let unknown = only.iter().find(|wanted| !ROWS.iter().any(|row| row.name.starts_with(wanted.as_str())));
    let names = || ROWS.iter().map(|row| row.name).collect::<Vec<_>>().join(", ");
    ensure!(unknown.is_none(), "no row begins with {:?}; there are {}", unknown.map_or("", String::as_str), names());
    let by_default = |row: &Row| only.is_empty() && !row.by_name_only();
    let wanted = |row: &&Row| by_default(row) || only.iter().any(|wanted| row.name.starts_with(wanted.as_str()));
    Ok(ROWS.iter().filter(wanted).collect())
}

/// Raises the limit of open files as far as may be, for this process and those that it starts.
fn raise_file_limit() -> Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let wanted = most.max(DESCRIPTORS);
    match setrlimit(Resource::RLIMIT_NOFILE, wanted, wanted) {
        // Containers have no right to more than they were given; the measurements go as far as that reaches.
        Err(Errno::EPERM) => setrlimit(Resource::RLIMIT_NOFILE, most, most).context("raising the limit of open files"),
        other => other.context("raising the limit of open files"),
    }
}

/// What was measured until the end, whatever ended it.
struct Outcome {
    done: Vec<Measured>,
    ended: Result<()>,
}

fn measure_all(rows: &[&'static Row], scale: Scale, other: Option<PathBuf>) -> Outcome {
    let with_other = other.is_some();
    let mut lab = Lab::new(other);
    let (mut done, mut failed) = (Vec::new(), Vec::new());
    let begun = Instant::now();
    for row in rows {
        let mut paths: Vec<_> = row.base.iter().chain(row.paths).copied().collect();
        if with_other && row.of_any_proxy() {
            paths.push(topology::Path::Other);
        }
        match measure(row, &paths, &mut lab, scale, begun) {
            Ok(measured) => done.push(measured),
            Err(error) if interrupt::wanted() => return Outcome { done, ended: Err(error.context(row.name)) },
            // The others do not depend on it, once everything is made anew.
            Err(error) => {
                eprintln!("bench: {}: {error:#}", row.name);
                failed.push(row.name);
                lab.clear();
            }
        }
    }
    let ended = if failed.is_empty() { Ok(()) } else { Err(anyhow!("not measured: {}", failed.join(", "))) };
    Outcome { done, ended }
}

fn measure(row: &'static Row, paths: &[topology::Path], lab: &mut Lab, scale: Scale, begun: Instant) -> Result<Measured> {
    let mut samples = Vec::new();
    for round in 0..row.measure.rounds(scale) {
        for path in paths {
            interrupt::check()?;
            eprintln!("{:>4} s  {} round {} {}", begun.elapsed().as_secs(), row.name, round + 1, path.name());
            samples.push(Sample { path: *path, round, values: row.measure.run(lab, *path, scale)? });
        }
    }
    Ok(Measured { row, samples })
}
