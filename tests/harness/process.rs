//! What a process under test costs: memory and descriptors, read from `/proc`.

use std::fs;
use std::path::PathBuf;

/// A running process.
#[derive(Clone, Debug)]
pub struct Process(PathBuf);

/// What a process holds at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Resident memory, in KiB.
    pub resident_kib: u64,
    /// The most resident memory that it ever had, in KiB.
    pub peak_kib: u64,
    /// Open descriptors.
    pub descriptors: usize,
}

impl Process {
    pub(crate) fn new(pid: u32) -> Self {
        Self(PathBuf::from("/proc").join(pid.to_string()))
    }

    /// What it holds now.
    ///
    /// # Panics
    /// When it has ended.
    #[must_use]
    pub fn footprint(&self) -> Footprint {
        let status = fs::read_to_string(self.0.join("status")).expect("the process lives");
        let value = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.and_then(|line| line.split_whitespace().next()?.parse().ok()).expect("a process that has not ended has memory")
        };
        let descriptors = fs::read_dir(self.0.join("fd")).expect("the process lives").count();
        Footprint { resident_kib: value("VmRSS"), peak_kib: value("VmHWM"), descriptors }
    }

    /// Starts the count of the peak anew.
    ///
    /// # Panics
    /// When it has ended.
    pub fn reset_peak(&self) {
        fs::write(self.0.join("clear_refs"), "5").expect("the process lives");
    }
}
