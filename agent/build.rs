//! Compiles the wire formats in `proto/` and the eBPF programs in `../ebpf`, which the agent embeds.
//!
//! The programs need a compiler with a `core` for `bpfel-unknown-none` and `bpf-linker`; `cargo xtask setup` installs both. Where
//! they are missing an empty object is embedded, so that `cargo check`, `clippy` and editors work, unless
//! `CULVERT_REQUIRE_EBPF` is set, as `cargo xtask build` does: then the build fails and says what is missing.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

const TARGET: &str = "bpfel-unknown-none";

fn main() -> Result<()> {
    compile_protos().context("compiling agent/proto")?;
    embed_programs().context("building the eBPF programs")
}

fn compile_protos() -> Result<()> {
    let protos = ["authorization", "ca", "culvert", "discovery", "workload"].map(|name| format!("proto/{name}.proto"));
    for proto in &protos {
        println!("cargo::rerun-if-changed={proto}");
    }
    let descriptors = protox::compile(&protos, [Path::new("proto")])?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}

fn embed_programs() -> Result<()> {
    for input in ["src", "Cargo.toml", "common/src", "common/Cargo.toml"] {
        println!("cargo::rerun-if-changed=../ebpf/{input}");
    }
    println!("cargo::rerun-if-env-changed=CULVERT_REQUIRE_EBPF");
    println!("cargo::rerun-if-env-changed=PATH");
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").context("OUT_DIR is not set")?);
    let object = out_dir.join("culvert-ebpf");
    let toolchain = find_bpf_linker().and_then(|()| Toolchain::find());
    match toolchain {
        Ok(toolchain) => {
            let built = toolchain.build(&out_dir.join("ebpf-target"))?;
            std::fs::copy(&built, &object).with_context(|| format!("copying {}", built.display()))?;
        }
        Err(missing) if env::var_os("CULVERT_REQUIRE_EBPF").is_none() => {
            println!("cargo::warning=no eBPF programs in this build ({missing:#}); run `cargo xtask setup`");
            std::fs::write(&object, [])?;
        }
        Err(missing) => return Err(missing.context("run `cargo xtask setup`")),
    }
    Ok(())
}

fn find_bpf_linker() -> Result<()> {
    let found = Command::new("bpf-linker").arg("--version").output().is_ok_and(|output| output.status.success());
    ensure!(found, "bpf-linker is not on the PATH");
    Ok(())
}

/// A compiler that can build for the kernel.
enum Toolchain {
    /// A rustup nightly with the source of `core`.
    Nightly,
    /// A distribution's compiler, with a `core` built for the target.
    Packaged,
}

impl Toolchain {
    fn find() -> Result<Self> {
        let sysroot = Command::new("rustup").args(["run", "nightly", "rustc", "--print", "sysroot"]).env_remove("RUSTC").output();
        if let Ok(output) = sysroot {
            let sysroot = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
            if output.status.success() && sysroot.join("lib/rustlib/src/rust/library/core").is_dir() {
                return Ok(Self::Nightly);
            }
        }
        let core = ["/usr/lib/rustlib", "/usr/lib/rust-web/lib/rustlib"].map(|dir| Path::new(dir).join(TARGET));
        if core.iter().any(|dir| dir.is_dir()) && Path::new("/usr/bin/cargo").exists() {
            return Ok(Self::Packaged);
        }
        bail!("no compiler for {TARGET}: neither a rustup nightly with rust-src nor the distribution's libstd-rust-web-dev-bpf")
    }

    fn build(&self, target_dir: &Path) -> Result<PathBuf> {
        let arch = env::var("CARGO_CFG_TARGET_ARCH").context("CARGO_CFG_TARGET_ARCH is not set")?;
        let mut command = match self {
            Self::Nightly => {
                let mut command = Command::new("rustup");
                command.args(["run", "nightly", "cargo", "build", "-Z", "build-std=core"]);
                command.env_remove("RUSTC");
                command
            }
            Self::Packaged => {
                let mut command = Command::new("/usr/bin/cargo");
                command.arg("build").env("RUSTC", "/usr/bin/rustc").env("RUSTC_BOOTSTRAP", "1");
                command
            }
        };
        let flags = format!("-C linker=bpf-linker -C debuginfo=2 -C link-arg=--btf --cfg bpf_target_arch=\"{arch}\"");
        command
            .args(["--release", "--package", "culvert-ebpf", "--target", TARGET, "--target-dir"])
            .arg(target_dir)
            .env("RUSTFLAGS", flags)
            .env("CARGO_PROFILE_RELEASE_LTO", "off");
        for inherited in ["CARGO_ENCODED_RUSTFLAGS", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "RUSTUP_TOOLCHAIN", "RUSTDOC"] {
            command.env_remove(inherited);
        }
        let output = command.output().context("starting cargo")?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(target_dir.join(TARGET).join("release/culvert-ebpf"))
    }
}
