//! Programs that outlive `xtask`: started with a log of their own, waited for until they say that they serve, found again by the network
//! namespace that they run in, and ended.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Cluster, network};

/// How long a program may take until it serves: a loaded machine compiles beside it.
pub(super) const PATIENCE: Duration = Duration::from_secs(120);
const DEATH: Duration = Duration::from_secs(20);
const LOOK: Duration = Duration::from_millis(10);

/// When a program counts as started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ready {
    /// When it runs.
    Started,
    /// When it tells the service manager so (`sd_notify(3)`).
    Notified,
}

/// Starts a program that goes on when `xtask` has ended. What it says goes to `log/NAME.log`.
pub(super) fn start(cluster: &Cluster, name: &str, command: &mut Command, ready: Ready) -> Result<()> {
    let log = cluster.path("log");
    fs::create_dir_all(&log)?;
    let log = log.join(format!("{name}.log"));
    let file = File::options().create(true).append(true).open(&log)?;
    let notify = cluster.path(&format!("notify-{name}"));
    let _none_yet = fs::remove_file(&notify);
    let socket = UnixDatagram::bind(&notify).context("a socket for the readiness of programs")?;
    socket.set_read_timeout(Some(Duration::from_millis(200)))?;
    command.env("NOTIFY_SOCKET", &notify).stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file).process_group(0);
    let mut child = command.spawn().with_context(|| format!("starting {name}"))?;
    if ready == Ready::Notified {
        await_ready(&mut child, &socket).with_context(|| format!("starting {name}; {}", last_lines(&log)))?;
    }
    fs::remove_file(&notify)?;
    Ok(())
}

fn await_ready(child: &mut Child, socket: &UnixDatagram) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let mut message = [0; 512];
    loop {
        match socket.recv(&mut message) {
            Ok(length) if message[..length].split(|byte| *byte == b'\n').any(|line| line == b"READY=1") => return Ok(()),
            Ok(_other) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {}
            Err(error) => return Err(error).context("waiting for its readiness"),
        }
        if let Some(status) = child.try_wait()? {
            bail!("it ended ({status})");
        }
        ensure!(Instant::now() < deadline, "it does not get ready");
    }
}

/// The processes whose network namespace is one of these.
pub(super) fn running(namespaces: &[String]) -> Vec<Process> {
    let inode = |path: PathBuf| fs::metadata(path).ok().map(|metadata| metadata.ino());
    let wanted: Vec<u64> = namespaces.iter().filter_map(|name| inode(network::path(name))).collect();
    let inside = all().filter(|pid| inode(format!("/proc/{pid}/ns/net").into()).is_some_and(|inode| wanted.contains(&inode)));
    inside.filter_map(Process::look).collect()
}

/// The processes, but for this one, that were started with this variable.
pub(super) fn with_variable(name: &str, value: &str) -> Vec<Process> {
    let wanted = format!("{name}={value}");
    let has = |pid: &i32| {
        let variables = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        variables.split(|byte| *byte == 0).any(|variable| variable == wanted.as_bytes())
    };
    all().filter(|pid| *pid != std::process::id().cast_signed() && has(pid)).filter_map(Process::look).collect()
}

/// The numbers of all processes.
fn all() -> impl Iterator<Item = i32> {
    fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// A process, as it was when somebody looked.
#[derive(Clone, Debug)]
pub(super) struct Process {
    pub(super) pid: i32,
    /// The first 15 bytes of its program's name.
    pub(super) name: String,
    /// In how many PID namespaces below ours it is, and its number in the innermost.
    pub(super) depth: usize,
    pub(super) inner_pid: i32,
}

impl Process {
    fn look(pid: i32) -> Option<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t"));
        let pids: Vec<i32> = field("NSpid")?.split('\t').filter_map(|pid| pid.parse().ok()).collect();
        Some(Self { pid, name: field("Name")?.to_owned(), depth: pids.len() - 1, inner_pid: *pids.last()? })
    }

    /// Resident memory, in bytes.
    pub(super) fn memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap_or_default();
        let kilobytes = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse().ok());
        kilobytes.map_or(0, |kilobytes: u64| kilobytes * 1024)
    }
}

/// Ends processes at once, and waits until they are gone; `find` finds them again each time.
pub(super) fn end(what: &str, find: impl Fn() -> Vec<Process>) -> Result<()> {
    let deadline = Instant::now() + DEATH;
    loop {
        let running = find();
        if running.is_empty() {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{what}: processes {running:?} do not end");
        for process in running {
            // Whatever it says: the next look tells whether the process is gone.
            let _gone = kill(Pid::from_raw(process.pid), Signal::SIGKILL);
        }
        std::thread::sleep(LOOK);
    }
}

/// Tries until `attempt` succeeds, and gives its last failure when it has not in time.
pub(super) fn retry<T>(mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match attempt() {
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_not_yet) => std::thread::sleep(LOOK * 10),
            done => return done,
        }
    }
}

/// The end of each program's log.
pub(super) fn last_words(logs: &Path) -> String {
    let mut logs: Vec<PathBuf> = fs::read_dir(logs).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    logs.sort();
    logs.iter().map(|log| last_lines(log) + "\n").collect()
}

fn last_lines(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    format!("the end of {}:\n{}", log.display(), lines[lines.len().saturating_sub(8)..].join("\n"))
}
