//! The shared libraries that a binary needs, found where its compiler would look.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

/// A library.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Library {
    /// Where it is on this machine.
    pub(super) source: PathBuf,
    /// Where the loader looks for it, without the leading `/`.
    pub(super) inside: String,
}

/// What `binary` needs, directly and not, and the loader that it names; `compiler` knows where they are.
pub(super) fn of(binary: &Path, compiler: &str) -> Result<Vec<Library>> {
    let text = readelf(binary)?;
    let Some(loader) = interpreter(&text) else { return Ok(Vec::new()) };
    let mut libraries = Vec::new();
    let mut seen = BTreeSet::new();
    let mut wanted = needed(&text);
    while let Some(name) = wanted.pop() {
        if loader.ends_with(&format!("/{name}")) || !seen.insert(name.clone()) {
            continue;
        }
        let source = find(&name, compiler)?;
        wanted.extend(needed(&readelf(&source)?));
        libraries.push(Library { source, inside: format!("lib/{name}") });
    }
    let name = loader.rsplit('/').next().unwrap_or(&loader);
    libraries.push(Library { source: find(name, compiler)?, inside: loader.trim_start_matches('/').to_owned() });
    libraries.sort_by(|a, b| a.inside.cmp(&b.inside));
    Ok(libraries)
}

fn find(name: &str, compiler: &str) -> Result<PathBuf> {
    let output = Command::new(compiler).arg(format!("-print-file-name={name}")).output();
    let output = output.with_context(|| format!("starting {compiler}"))?;
    let path = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
    ensure!(path.is_absolute(), "{compiler} does not know where {name} is");
    fs::canonicalize(&path).with_context(|| format!("finding {}", path.display()))
}

fn readelf(file: &Path) -> Result<String> {
    let output = Command::new("readelf").args(["--wide", "--program-headers", "--dynamic"]).arg(file).output();
    let output = output.context("starting readelf, of binutils")?;
    ensure!(output.status.success(), "readelf {}: {}", file.display(), String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// `[Requesting program interpreter: /lib64/ld-linux-x86-64.so.2]`.
fn interpreter(text: &str) -> Option<String> {
    let (_, rest) = text.split_once("program interpreter: ")?;
    rest.split_once(']').map(|(path, _)| path.to_owned())
}

/// `0x… (NEEDED) Shared library: [libc.so.6]`.
fn needed(text: &str) -> Vec<String> {
    let names = text.lines().filter(|line| line.contains("(NEEDED)"));
    names.filter_map(|line| Some(line.split_once('[')?.1.split_once(']')?.0.to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const READELF: &str = "  INTERP 0x1 \n      [Requesting program interpreter: /lib64/ld-linux-x86-64.so.2]\n\
        0x0000000000000001 (NEEDED)             Shared library: [libgcc_s.so.1]\n\
        0x0000000000000001 (NEEDED)             Shared library: [libc.so.6]\n 0x000000000000000e (SONAME) Library soname: [x]\n";

    #[test]
    fn the_loader_and_the_libraries_are_read() {
        assert_eq!(interpreter(READELF).as_deref(), Some("/lib64/ld-linux-x86-64.so.2"));
        assert_eq!(needed(READELF), ["libgcc_s.so.1", "libc.so.6"]);
        assert_eq!(interpreter("no such line"), None);
    }
}
