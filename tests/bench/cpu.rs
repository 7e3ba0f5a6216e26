//! What processors did, and what processes hold, as /proc tells.

use std::fs;

use anyhow::{Context as _, Result};

/// The unit of time in /proc, which Linux has had for ever (`USER_HZ`).
const TICKS: f64 = 100.0;

/// The processor time, in seconds, that the processes and the machine have used since it was started.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    processes: f64,
    machine: f64,
}

impl Clock {
    /// Reads it.
    pub(crate) fn read(processes: &[u32]) -> Result<Self> {
        let processes = processes.iter().map(|process| process_seconds(*process)).sum::<Result<f64>>()?;
        Ok(Self { processes, machine: machine_seconds()? })
    }

    /// What was used since `earlier`: by the processes, and by the whole machine.
    pub(crate) fn since(self, earlier: Self) -> (f64, f64) {
        (self.processes - earlier.processes, self.machine - earlier.machine)
    }
}

fn process_seconds(process: u32) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{process}/stat")).with_context(|| format!("process {process} has ended"))?;
    // The second field is a name in parentheses, which may hold anything; utime and stime are the 14th and 15th.
    let fields: Vec<&str> = text.rsplit_once(") ").context("a line of another form")?.1.split(' ').collect();
    let ticks = fields.get(11..13).context("a line too short")?;
    Ok(ticks.iter().map(|field| field.parse::<f64>()).sum::<Result<f64, _>>()? / TICKS)
}

/// All but idle, waiting for disks, and what a hypervisor took.
fn machine_seconds() -> Result<f64> {
    let text = fs::read_to_string("/proc/stat").context("reading /proc/stat")?;
    let line = text.lines().next().context("an empty /proc/stat")?;
    let fields: Vec<f64> = line.split_whitespace().skip(1).map(str::parse).collect::<Result<_, _>>()?;
    let used = [0, 1, 2, 5, 6].into_iter().filter_map(|place| fields.get(place));
    Ok(used.sum::<f64>() / TICKS)
}

/// The memory that a process holds, its code included, in bytes.
pub(crate) fn resident(process: u32) -> Result<f64> {
    held(process, "VmRSS:")
}

/// The most that a process has held until now, its code included, in bytes.
pub(crate) fn most_resident(process: u32) -> Result<f64> {
    held(process, "VmHWM:")
}

/// The memory that a process has for itself, in bytes.
pub(crate) fn anonymous(process: u32) -> Result<f64> {
    held(process, "RssAnon:")
}

fn held(process: u32, field: &'static str) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{process}/status")).with_context(|| format!("process {process} has ended"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(field)).context(field)?;
    Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? * 1024.0)
}
