//! `fuzz`: explores the parsers of foreign bytes for a while. What it has found before is replayed by the unit tests.

use std::fs;

use anyhow::{Context as _, Result, ensure};

use crate::run::{cargo, root, run, succeeds};
use crate::setup::{self, Scope};

const CARGO_FUZZ: &str = "0.13.1";
const DIRECTORY: &str = "tests/fuzz";

/// Explores one target, or all of them one after the other, each for so many seconds.
pub(crate) fn explore(target: Option<&str>, seconds: u32) -> Result<()> {
    let all = targets()?;
    let chosen: Vec<_> = all.iter().filter(|name| target.is_none_or(|wanted| wanted == *name)).collect();
    ensure!(!chosen.is_empty(), "no target `{}`: there are {}", target.unwrap_or_default(), all.join(", "));
    setup::ensure(Scope::Fuzz)?;
    if !succeeds(cargo().args(["fuzz", "--version"])) {
        run(cargo().args(["install", "cargo-fuzz", "--version", CARGO_FUZZ, "--locked"]))?;
    }
    let limits = [format!("-max_total_time={seconds}"), "-rss_limit_mb=2048".to_owned(), "-timeout=10".to_owned()];
    for name in chosen {
        // Without sanitizers: there is no unsafe code in what is explored, and so any compiler will do.
        let mut command = cargo();
        command.args(["fuzz", "run", "--fuzz-dir", DIRECTORY, "--sanitizer", "none", name, "--"]).args(&limits);
        // The compiler's instrumentation is behind a flag that a release must be told to take.
        command.env("RUSTC_BOOTSTRAP", "1");
        run(&mut command).with_context(|| format!("{name}: what it failed on is below {DIRECTORY}/artifacts/{name}"))?;
    }
    Ok(())
}

/// The names of all targets, in order.
fn targets() -> Result<Vec<String>> {
    let directory = root().join(DIRECTORY).join("fuzz_targets");
    let mut names = Vec::new();
    for entry in fs::read_dir(&directory).with_context(|| format!("reading {}", directory.display()))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        names.extend(name.strip_suffix(".rs").map(str::to_owned));
    }
    names.sort();
    Ok(names)
}
