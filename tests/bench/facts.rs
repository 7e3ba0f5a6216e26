//! On what it was measured.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::topology::CONGESTION_CONTROL;

/// The machine and the tree.
#[derive(Debug)]
pub(crate) struct Facts {
    pub(crate) processors: usize,
    pub(crate) processor: String,
    pub(crate) kernel: String,
    pub(crate) commit: String,
    iperf3: String,
}

impl Facts {
    /// Collects them; what cannot be told is empty.
    pub(crate) fn collect() -> Self {
        let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        Self {
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            processor: model.map(|(_, name)| name.to_owned()).unwrap_or_default(),
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
            commit: first_line("git", &["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]),
            iperf3: first_line("iperf3", &["--version"]),
        }
    }

    /// As part of the results.
    pub(crate) fn to_json(&self) -> Value {
        json!({
            "processors": self.processors,
            "processor": self.processor,
            "kernel": self.kernel,
            "commit": self.commit,
            "iperf3": self.iperf3,
            "congestion_control": CONGESTION_CONTROL,
        })
    }
}

fn first_line(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).current_dir(Path::new(env!("CARGO_MANIFEST_DIR"))).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    text.lines().next().unwrap_or_default().to_owned()
}
