//! `check`: all that can be said of the code without running it.

use std::process::Command;

use anyhow::Result;

use crate::run::{cargo, run, succeeds};
use crate::setup::{self, Scope};
use crate::{generated, tidy};

const CARGO_DENY: &str = "0.19.0";

/// Runs all checks.
pub(crate) fn all() -> Result<()> {
    setup::ensure(Scope::Build)?;
    tidy::all()?;
    run(cargo().args(["fmt", "--all", "--check"]))?;
    run(cargo().args(["clippy", "--workspace", "--all-targets", "--", "--deny", "warnings"]))?;
    run(cargo().args(["doc", "--workspace", "--no-deps", "--document-private-items"]).env("RUSTDOCFLAGS", "--deny warnings"))?;
    generated::check()?;
    if !succeeds(Command::new("cargo").args(["deny", "--version"])) {
        run(cargo().args(["install", "cargo-deny", "--version", CARGO_DENY, "--locked"]))?;
    }
    // Advisories come from a database that is fetched; the rest is in the lock file.
    run(cargo().args(["deny", "check", "bans", "licenses", "sources"]))
}
