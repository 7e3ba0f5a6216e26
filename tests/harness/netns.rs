//! Network namespaces: made, entered by threads and programs, and removed on drop.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::JoinHandle;

use nix::sched::{CloneFlags, setns};

use crate::cgroup;

/// A network namespace of this test's.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    cgroup: Option<PathBuf>,
}

impl Namespace {
    /// Makes one.
    #[must_use]
    pub fn new(name: &str) -> Self {
        ip(&["netns", "add", name]);
        let namespace = Self { name: name.to_owned(), cgroup: None };
        namespace.ip("link set lo up");
        namespace
    }

    /// The same, with a [threaded cgroup](cgroup::threaded) that threads and programs enter together with it.
    #[must_use]
    pub fn in_cgroup(name: &str, cgroup: Option<&Path>) -> Self {
        let mut namespace = Self::new(name);
        namespace.cgroup = cgroup.map(Path::to_owned);
        namespace
    }

    /// The name by which `ip` knows it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that stands for it.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    /// Runs `ip` with these words inside.
    pub fn ip(&self, words: &str) {
        let words: Vec<&str> = ["-n", &self.name].into_iter().chain(words.split(' ')).collect();
        ip(&words);
    }

    /// Runs `f` on a thread inside.
    ///
    /// # Panics
    /// When the namespace cannot be entered.
    pub fn spawn<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        let (file, cgroup) = (File::open(self.path()).expect("the namespace is there"), self.cgroup.clone());
        std::thread::spawn(move || {
            setns(file.as_fd(), CloneFlags::CLONE_NEWNET).expect("root may enter");
            if let Some(cgroup) = cgroup {
                cgroup::enter_with_thread(&cgroup);
            }
            f()
        })
    }

    /// Runs `f` inside and waits for it.
    ///
    /// # Panics
    /// When `f` does.
    pub fn run<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> T {
        match self.spawn(f).join() {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// A program to be run inside, with this machine's own file systems.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let nsenter = "nsenter";
        let mut command = match &self.cgroup {
            None => Command::new(nsenter),
            Some(cgroup) => cgroup::command(cgroup, nsenter),
        };
        command.arg(format!("--net={}", self.path().display())).arg(program);
        command
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _gone_already = Command::new("ip").args(["netns", "del", &self.name]).output();
    }
}

/// Runs `ip`.
///
/// # Panics
/// When it fails.
pub fn ip(words: &[&str]) {
    let output = Command::new("ip").args(words).output().expect("iproute2 is installed");
    assert!(output.status.success(), "ip {}: {}", words.join(" "), String::from_utf8_lossy(&output.stderr));
}
