//! `image`: the container image, the same bits each time, without Docker.
//!
//! In it are the binary without its debug information, the shared libraries that it names, and three small files. There is no
//! shell, no package manager and no certificate authority: Culvert trusts its own root and the API server's, which are mounted.

mod archive;
mod libraries;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use self::archive::{Entry, Image};
use crate::launch;
use crate::run::{cargo, root, run, succeeds};
use crate::setup::{self, Scope};

/// What the image is called, without its tag.
const NAME: &str = "culvert.dev/culvert";
/// The user that the image runs as unless a pod says otherwise: nobody, by the number that others use for it too.
const NOBODY: u32 = 65_532;

/// A processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Arch {
    /// x86-64.
    Amd64,
    /// AArch64.
    Arm64,
}

/// What is to be made.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct ImageArgs {
    /// The processor that the image is for [default: this machine's].
    #[arg(long, value_enum)]
    arch: Option<Arch>,

    /// Where the image goes, as a docker-archive [default: target/culvert-ARCH.tar].
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,

    /// Write the image's files to this directory instead: for a Dockerfile.
    #[arg(long, value_name = "DIR", conflicts_with = "output")]
    rootfs: Option<PathBuf>,

    /// Take this binary instead of building one.
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
}

impl ImageArgs {
    /// An image for this machine, of a binary that is there.
    pub(crate) fn of(binary: &Path, output: &Path) -> Self {
        Self { arch: None, output: Some(output.to_owned()), rootfs: None, binary: Some(binary.to_owned()) }
    }
}

impl Arch {
    /// This machine's.
    pub(crate) fn host() -> Result<Self> {
        match std::env::consts::ARCH {
            "x86_64" => Ok(Self::Amd64),
            "aarch64" => Ok(Self::Arm64),
            other => bail!("Culvert runs on amd64 and arm64, and this machine is {other}"),
        }
    }

    /// As images call it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }

    /// As compilers call it.
    fn machine(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64",
            Self::Arm64 => "aarch64",
        }
    }

    fn target(self) -> String {
        format!("{}-unknown-linux-gnu", self.machine())
    }

    /// A program of the GNU tools, for this processor.
    fn tool(self, name: &str) -> String {
        match Self::host() {
            Ok(host) if host == self => name.to_owned(),
            _ => format!("{}-linux-gnu-{name}", self.machine()),
        }
    }
}

/// Builds the binary and makes the image.
pub(crate) fn make(args: &ImageArgs) -> Result<()> {
    let host = Arch::host()?;
    let arch = args.arch.unwrap_or(host);
    let binary = match &args.binary {
        Some(binary) => binary.clone(),
        None if arch == host => launch::build(true)?,
        None => cross_build(arch)?,
    };
    let entries = entries(&binary, arch)?;
    if let Some(directory) = &args.rootfs {
        return archive::write_tree(&entries, directory);
    }
    let version = env!("CARGO_PKG_VERSION");
    let image = Image { name: format!("{NAME}:{version}"), version, architecture: arch.name(), user: NOBODY, entries };
    let output = args.output.clone().unwrap_or_else(|| root().join(format!("target/culvert-{}.tar", arch.name())));
    let bytes = image.docker_archive()?;
    fs::write(&output, &bytes).with_context(|| format!("writing {}", output.display()))?;
    eprintln!("{}: {} for {}, {:.1} MB", output.display(), image.name, arch.name(), bytes.len() as f64 / 1e6);
    Ok(())
}

/// The image's files.
fn entries(binary: &Path, arch: Arch) -> Result<Vec<Entry>> {
    let stripped = root().join("target").join(format!("culvert-{}-stripped", arch.name()));
    run(Command::new(arch.tool("strip")).args(["--strip-debug", "-o"]).arg(&stripped).arg(binary))?;
    let read = |path: &Path| fs::read(path).with_context(|| format!("reading {}", path.display()));
    let accounts = format!("root:x:0:0:root:/:/nologin\nculvert:x:{NOBODY}:{NOBODY}:culvert:/:/nologin\n");
    let groups = format!("root:x:0:\nculvert:x:{NOBODY}:\n");
    let mut entries = vec![
        Entry::file("culvert", 0o755, read(&stripped)?),
        Entry::file("etc/passwd", 0o644, accounts.into_bytes()),
        Entry::file("etc/group", 0o644, groups.into_bytes()),
        Entry::file("etc/nsswitch.conf", 0o644, b"hosts: files dns\n".to_vec()),
    ];
    for library in libraries::of(&stripped, &arch.tool("gcc"))? {
        entries.push(Entry::file(&library.inside, 0o755, read(&library.source)?));
    }
    Ok(entries)
}

/// Builds for a processor that this machine has not.
fn cross_build(arch: Arch) -> Result<PathBuf> {
    setup::ensure(Scope::Build)?;
    let (target, linker) = (arch.target(), arch.tool("gcc"));
    let mut missing = Vec::new();
    if !has_target(&target) {
        missing.push(format!("Rust's standard library for {target} (`rustup target add {target}`)"));
    }
    if !succeeds(Command::new(&linker).arg("--version")) {
        missing.push(format!("{linker} (Debian's gcc-{0}-linux-gnu and libc6-dev-{1}-cross)", arch.machine(), arch.name()));
    }
    ensure!(
        missing.is_empty(),
        "building for {} on this machine takes {}; or run this on such a machine",
        arch.name(),
        missing.join(", and ")
    );
    let variable = target.to_uppercase().replace('-', "_");
    let mut command = cargo();
    command.args(["build", "--package", "culvert", "--release", "--target", &target]).env("CULVERT_REQUIRE_EBPF", "1");
    command.env(format!("CARGO_TARGET_{variable}_LINKER"), &linker).env(format!("CC_{}", target.replace('-', "_")), &linker);
    run(&mut command)?;
    let directory = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    Ok(directory.join(target).join("release/culvert"))
}

fn has_target(target: &str) -> bool {
    let output = Command::new("rustc").args(["--print", "target-libdir", "--target", target]).current_dir(root()).output();
    output.is_ok_and(|output| output.status.success() && Path::new(String::from_utf8_lossy(&output.stdout).trim()).is_dir())
}
