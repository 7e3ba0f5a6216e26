//! Real programs, unmodified, in a pod: servers that end with their handle, and clients that are waited for.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;

use crate::Namespace;

/// How long a server may take to end.
const PATIENCE: Duration = Duration::from_secs(5);

/// A program that runs. Dropped, it is ended.
#[derive(Debug)]
pub struct Program {
    child: Child,
    log: PathBuf,
}

impl Program {
    /// Starts one; what it says goes to a file in `directory`.
    ///
    /// # Panics
    /// When it is not installed.
    #[must_use]
    pub fn start(mut command: Command, directory: &Path) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let log = directory.join(format!("program-{}.log", NEXT.fetch_add(1, Ordering::Relaxed)));
        let file = File::create(&log).expect("a log");
        command.stdin(Stdio::null()).stdout(file.try_clone().expect("a log")).stderr(file);
        let child = command.spawn().expect("nsenter is installed");
        Self { child, log }
    }

    /// What it has said.
    #[must_use]
    pub fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // All of the servers here take this for "now, and your children with you".
        let _ended_already = signal::kill(Pid::from_raw(self.child.id() as i32), Signal::SIGINT);
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ended_already = self.child.kill();
        let _status = self.child.wait();
    }
}

impl Namespace {
    /// Runs a program inside to its end.
    ///
    /// # Panics
    /// When it is not installed.
    #[must_use]
    pub fn output(&self, program: &str, arguments: &[&str]) -> Output {
        // No test waits for ever: a program that hangs is ended, and has failed.
        let words = [&["60", program], arguments].concat();
        self.command("timeout").args(words).stdin(Stdio::null()).output().expect("nsenter is installed")
    }

    /// The same, for a program that must succeed: what it wrote.
    ///
    /// # Panics
    /// When it fails.
    #[must_use]
    pub fn succeed(&self, program: &str, arguments: &[&str]) -> String {
        let output = self.output(program, arguments);
        let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{program} {}: {}\n{said}{complained}", arguments.join(" "), output.status);
        said.into_owned()
    }
}
