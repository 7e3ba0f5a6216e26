//! Pods as a kubelet and its runtime make them: with a cgroup that is named for the pod, and a first process.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::{Mesh, Pod};
use crate::cgroup;

/// A pod's cgroup, with its first process in the pod's network namespace. The process ends with it.
#[derive(Debug)]
pub struct Sandbox {
    cgroup: PathBuf,
    netns: PathBuf,
    first: Child,
}

impl Mesh {
    /// Makes the cgroup of the pod of this UID, and starts its first process. The agents must be attached where a kubelet keeps pods
    /// ([`Attached::ToKubelet`](super::Attached::ToKubelet)).
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn sandbox(&self, pod: &Pod, uid: &str) -> Sandbox {
        let cgroup = cgroup::pods().join("burstable").join(format!("pod{uid}"));
        let first = inside(&cgroup, "pause", &pod.netns.path()).args(["sleep", "infinity"]).spawn().expect("sh is installed");
        Sandbox { cgroup, netns: pod.netns.path(), first }
    }
}

impl Sandbox {
    /// A program that is to run in a container of the pod's.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let mut command = inside(&self.cgroup, "app", &self.netns);
        command.arg(program);
        command
    }

    /// Has the pod say a word to an [`echo`](crate::app::echo) server, and gives whether it was answered.
    ///
    /// # Panics
    /// When bash is not installed.
    #[must_use]
    pub fn converses(&self, server: SocketAddr, word: &str) -> bool {
        let script = "exec 3<>/dev/tcp/$0/$1 && echo $2 >&3 && head -n 2 <&3";
        let (address, port) = (server.ip().to_string(), server.port().to_string());
        let mut command = self.command("timeout");
        command.args(["10", "bash", "-c", script, &address, &port, word]).stderr(Stdio::null());
        let told = command.output().expect("bash is installed");
        String::from_utf8_lossy(&told.stdout).lines().nth(1) == Some(word)
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        let _ended_already = self.first.kill();
        let _status = self.first.wait();
        let _in_use = ["pause", "app"].map(|container| fs::remove_dir(self.cgroup.join(container)));
        let _in_use = fs::remove_dir(&self.cgroup);
    }
}

/// What runs a program in a container's cgroup and a network namespace.
fn inside(cgroup: &Path, container: &str, netns: &Path) -> Command {
    let cgroup = cgroup.join(container);
    fs::create_dir_all(&cgroup).expect("root may make a cgroup");
    let mut command = cgroup::command(&cgroup, "nsenter");
    command.arg(format!("--net={}", netns.display())).stdin(Stdio::null());
    command
}
