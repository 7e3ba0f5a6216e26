//! Compiles the wire formats in `proto/` and the eBPF programs in `../ebpf`.

use std::path::Path;

use anyhow::{Context, Result};

fn main() -> Result<()> {
    compile_protos().context("compiling agent/proto")
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
