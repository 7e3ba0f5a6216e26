//! `setup`: finds what this machine lacks and installs it. Quick when nothing is missing.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::run::{root, run, succeeds};

/// What for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// Building.
    Build,
    /// Building, testing and showing.
    Test,
    /// All of it, and measuring.
    Bench,
    /// Making the images that a Kubernetes cluster of the tests' has, beside building.
    Images,
    /// Running a Kubernetes cluster whose nodes are namespaces, beside that.
    Cluster,
    /// Running containers by CRI-O in such a cluster. CRI-O itself is not of the distribution.
    CriO,
    /// Building Kubernetes for such a cluster.
    Kubernetes,
    /// Booting other kernels.
    Vm,
    /// Exploring parsers with libFuzzer, which is C++.
    Fuzz,
}

/// The linker's version and the LLVM that it is built against: the compilers' own.
const BPF_LINKER: &str = "0.13.0";
const LLVM: &str = "22";

/// Programs that building needs, with Debian's packages that have them.
const BUILD: [(&str, &str); 1] = [("cc", "gcc libc6-dev")];
/// Programs that the tests run, with Debian's packages that have them.
const TEST: [(&str, &str); 7] = [
    ("ip", "iproute2"),
    ("curl", "curl"),
    ("nginx", "nginx-light"),
    ("iperf3", "iperf3"),
    ("redis-server", "redis-server"),
    ("redis-cli", "redis-tools"),
    ("psql", "postgresql-client"),
];
/// Programs that measuring runs beside those.
const BENCH: [(&str, &str); 1] = [("wrk", "wrk")];
/// What goes into the tests' images, with Debian's packages that have it.
const IMAGES: [(&str, &str); 1] = [("/var/lib/dpkg/info/busybox-static.list", "busybox-static")];
/// Programs and other files of a cluster of namespaces beside those, with Debian's packages that have them.
const CLUSTER: [(&str, &str); 10] = [
    ("ip", "iproute2"),
    ("openssl", "openssl"),
    ("etcd", "etcd-server"),
    ("containerd", "containerd"),
    ("runc", "runc"),
    ("/usr/lib/cni/ptp", "containernetworking-plugins"),
    ("iptables", "iptables"),
    ("conntrack", "conntrack"),
    ("ethtool", "ethtool"),
    ("socat", "socat"),
];
/// Programs that CRI-O runs, and what gives it images, with Debian's packages that have them.
const CRIO: [(&str, &str); 2] = [("conmon", "conmon"), ("skopeo", "skopeo")];
/// What builds Kubernetes, with Debian's packages that have it.
const KUBERNETES: [(&str, &str); 3] = [
    ("dpkg-source", "dpkg-dev"),
    ("/usr/lib/go-1.19/bin/go", "golang-1.19-go"),
    ("/usr/share/gocode/src/github.com/modern-go/reflect2", "golang-github-modern-go-reflect2-dev"),
];
/// Programs that boot the distribution's kernels, with Debian's packages that have them.
const VM: [(&str, &str); 4] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("/var/lib/dpkg/info/busybox-static.list", "busybox-static"),
    ("xz", "xz-utils"),
    ("/usr/share/keyrings/debian-archive-keyring.gpg", "debian-archive-keyring"),
];
/// Programs that exploring parsers needs, with Debian's packages that have them.
const FUZZ: [(&str, &str); 1] = [("c++", "g++")];
/// What links bpf-linker.
const LINKER_LIBRARIES: [&str; 5] = ["llvm-22-dev", "libpolly-22-dev", "zlib1g-dev", "libzstd-dev", "libxml2-dev"];
/// A compiler with a `core` for the kernel's target, where rustup has none.
const PACKAGED_COMPILER: [&str; 3] = ["rustc-web", "cargo-web", "libstd-rust-web-dev-bpf"];

/// Installs what is missing.
pub(crate) fn ensure(scope: Scope) -> Result<()> {
    let mut missing: Vec<&str> = Vec::new();
    let [more, yet_more]: [&[(&str, &str)]; 2] = match scope {
        Scope::Build => [&[], &[]],
        Scope::Test => [&TEST, &[]],
        Scope::Bench => [&TEST, &BENCH],
        Scope::Images => [&IMAGES, &[]],
        Scope::Cluster => [&IMAGES, &CLUSTER],
        Scope::CriO => [&CRIO, &[]],
        Scope::Kubernetes => [&KUBERNETES, &[]],
        Scope::Vm => [&TEST, &VM],
        Scope::Fuzz => [&FUZZ, &[]],
    };
    for (_, packages) in BUILD.iter().chain(more).chain(yet_more).filter(|(program, _)| find(program).is_none()) {
        missing.extend(packages.split(' '));
    }
    if matches!(scope, Scope::Test | Scope::Bench | Scope::Vm) && postgres().is_none() {
        missing.push("postgresql");
    }
    let (compiler, linker) = (has_kernel_compiler(), has_linker());
    if !missing.is_empty() || !compiler || !linker {
        refresh_packages()?;
    }
    // Where the distribution has neither, rustup's nightly and the linker's own LLVM stand in for them.
    let packaged = [(!compiler, &PACKAGED_COMPILER[..]), (!linker, &LINKER_LIBRARIES[..])]
        .map(|(wanted, packages)| wanted && packages.iter().all(|package| is_offered(package)));
    missing.extend(PACKAGED_COMPILER.iter().filter(|_| packaged[0]).chain(LINKER_LIBRARIES.iter().filter(|_| packaged[1])));
    install(&missing)?;
    if !compiler && !packaged[0] {
        run(Command::new("rustup").args(["toolchain", "install", "nightly", "--profile", "minimal", "--component", "rust-src"]))
            .context("the distribution has no compiler for the kernel's target, and rustup's nightly was not installed")?;
    }
    if !linker {
        build_linker(packaged[1])?;
    }
    ensure!(has_kernel_compiler(), "no compiler for bpfel-unknown-none, although one was installed");
    Ok(())
}

/// A program on the PATH, or where distributions keep those for administrators; or a file or directory, by its whole path.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    places.map(|place| place.join(program)).find(|file| file.is_file() || (file.exists() && program.starts_with('/')))
}

/// The server's programs, which Debian keeps off the PATH.
fn postgres() -> Option<PathBuf> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").ok()?;
    versions.flatten().map(|version| version.path().join("bin/postgres")).find(|file| file.is_file())
}

fn has_linker() -> bool {
    succeeds(Command::new("bpf-linker").arg("--version"))
}

/// As `agent/build.rs` looks for it: a nightly with the source of `core`, or the distribution's.
fn has_kernel_compiler() -> bool {
    let nightly = Command::new("rustup").args(["run", "nightly", "rustc", "--print", "sysroot"]).output();
    let nightly = nightly.is_ok_and(|output| {
        let sysroot = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        output.status.success() && Path::new(&sysroot).join("lib/rustlib/src/rust/library/core").is_dir()
    });
    nightly || (Path::new("/usr/lib/rustlib/bpfel-unknown-none").is_dir() && Path::new("/usr/bin/cargo").is_file())
}

fn install(packages: &[&str]) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    let line = format!("apt-get install --no-install-recommends {}", packages.join(" "));
    ensure!(find("apt-get").is_some(), "this machine lacks {}; install them", packages.join(" "));
    ensure!(is_root(), "this machine lacks packages; as root: {line}");
    // Servers come for their programs; none shall be started by its installation.
    let policy = Path::new("/usr/sbin/policy-rc.d");
    let ours = !policy.exists();
    if ours {
        std::fs::write(policy, "#!/bin/sh\nexit 101\n").context("keeping installed servers from starting")?;
        run(Command::new("chmod").arg("755").arg(policy))?;
    }
    let installed = apt(&[&["install", "-y", "-qq", "--no-install-recommends"], packages].concat());
    if ours {
        std::fs::remove_file(policy).context("removing policy-rc.d")?;
    }
    installed.with_context(|| line.clone())
}

fn apt(arguments: &[&str]) -> Result<()> {
    run(Command::new("apt-get").env("DEBIAN_FRONTEND", "noninteractive").args(arguments))
}

/// A program of apt's that knows the package sources in `directory`/parts instead of the machine's; what it learns of them goes to `lists`
/// beside them.
pub(crate) fn apt_of(directory: &Path, program: &str) -> Command {
    let mut apt = Command::new(program);
    apt.args(["-qq", "-o", "Acquire::Retries=3", "-o", "Dir::Etc::SourceList=/dev/null", "-o", "APT::Sandbox::User=root"]);
    apt.args(["-o", "Dir::Cache::pkgcache=", "-o", "Dir::Cache::srcpkgcache="]);
    apt.arg("-o").arg(format!("Dir::Etc::SourceParts={}/parts", directory.display()));
    apt.arg("-o").arg(format!("Dir::State::Lists={}/lists", directory.display()));
    apt
}

/// Reads the lists of packages anew: a fresh machine may have none. Without the means, installing says what is missing.
fn refresh_packages() -> Result<()> {
    if find("apt-get").is_some() && is_root() { apt(&["update", "-qq"]) } else { Ok(()) }
}

/// Whether the distribution has a package.
fn is_offered(package: &str) -> bool {
    succeeds(Command::new("apt-cache").args(["show", "--quiet", package]))
}

/// Builds the linker against the distribution's LLVM, or against its own.
fn build_linker(packaged: bool) -> Result<()> {
    let mut cargo = Command::new("cargo");
    cargo.current_dir(root()).args(["install", "bpf-linker", "--version", BPF_LINKER, "--locked"]);
    if packaged {
        cargo.env("LLVM_PREFIX", format!("/usr/lib/llvm-{LLVM}"));
        cargo.args(["--no-default-features", "--features", &format!("llvm-{LLVM}")]);
    }
    run(&mut cargo)
}

/// Whether we may do everything.
pub(crate) fn is_root() -> bool {
    let id = Command::new("id").arg("-u").output();
    id.is_ok_and(|output| output.stdout.trim_ascii() == b"0")
}
