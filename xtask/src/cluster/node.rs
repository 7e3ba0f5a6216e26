//! A node: network, mount, PID, UTS, IPC and cgroup namespaces of its own, and a root that is an overlay over this machine's. In it run
//! what runs its containers and Kubernetes' kubelet and kube-proxy.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::Ipv4Addr;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};

use super::processes::{self, Process, Ready};
use super::runtime::Runtime;
use super::{Cluster, network, node_files};

/// A node of a cluster, which need not run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Node<'a> {
    cluster: &'a Cluster,
    number: u8,
}

impl<'a> Node<'a> {
    /// The first nodes of a cluster.
    pub(super) fn first(cluster: &'a Cluster, count: u8) -> Vec<Self> {
        (1..=count).map(|number| Self { cluster, number }).collect()
    }

    /// The node of that name.
    pub(super) fn named(cluster: &'a Cluster, name: &str) -> Result<Self> {
        let nodes = cluster.nodes()?;
        ensure!(nodes.iter().any(|node| node == name), "no node {name}; there are {}", nodes.join(", "));
        let number =
            name.strip_prefix("node").and_then(|number| number.parse().ok()).context("a node's name ends in its number")?;
        Ok(Self { cluster, number })
    }

    /// Its cluster.
    pub(super) fn cluster(&self) -> &'a Cluster {
        self.cluster
    }

    /// Its name, for Kubernetes and as a host.
    pub(super) fn name(&self) -> String {
        format!("node{}", self.number)
    }

    /// Its address on the fabric.
    pub(super) fn address(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 99, 0, 10 + self.number)
    }

    /// The range of its pods.
    pub(super) fn pods(&self) -> String {
        format!("10.244.{}.0/24", self.number)
    }

    /// The name of its network namespace.
    pub(super) fn netns(&self) -> String {
        self.cluster.netns(&self.name())
    }

    /// A file or directory of its own, on this machine and seen by the node under the same path.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.cluster.path(&self.name()).join(name)
    }

    /// Starts it: its first process, what runs containers with the images, kubelet and kube-proxy.
    pub(super) fn start(&self, archives: &[PathBuf]) -> Result<()> {
        self.make_cgroups()?;
        node_files::write(self)?;
        self.start_init()?;
        self.start_program(Runtime::of(self.cluster).program(), Ready::Notified)?;
        self.import(archives)?;
        self.start_program("kubelet", Ready::Started)?;
        self.start_program("kube-proxy", Ready::Started)
    }

    /// Ends every process of it at once, and forgets what a machine forgets without power: interfaces, routes, rules, pinned programs,
    /// cgroups and everything below `/run`. Its disk stays.
    pub(super) fn cut_power(&self) -> Result<()> {
        processes::end(&self.name(), || processes::running(&[self.netns()]))?;
        network::remove(&self.netns())?;
        remove_cgroups(&self.netns())
    }

    /// Starts one of its programs. What it says goes to a log of this machine's.
    pub(super) fn start_program(&self, program: &str, ready: Ready) -> Result<()> {
        ensure!(self.program(program).is_none(), "{program} of {} runs already", self.name());
        let mut command = self.enter()?;
        command.args(node_files::command_line(self, program)?);
        processes::start(self.cluster, &format!("{}-{program}", self.name()), &mut command, ready)
    }

    /// Ends one of its programs at once.
    pub(super) fn stop_program(&self, program: &str) -> Result<()> {
        processes::end(program, || self.program(program).into_iter().collect())
    }

    /// One of its programs, if it runs. Not a pod's: those are in a PID namespace below the node's, or another network namespace.
    fn program(&self, program: &str) -> Option<Process> {
        let inside = processes::running(&[self.netns()]);
        inside.into_iter().find(|process| process.depth == 1 && process.name == program)
    }

    /// Its first process, if it runs.
    pub(super) fn init(&self) -> Option<Process> {
        let inside = processes::running(&[self.netns()]);
        inside.into_iter().find(|process| process.depth == 1 && process.inner_pid == 1)
    }

    /// Imports docker-archive tars.
    pub(super) fn import(&self, archives: &[PathBuf]) -> Result<()> {
        archives.iter().try_for_each(|archive| Runtime::of(self.cluster).import(self, archive))
    }

    /// Becomes a program in the node.
    pub(super) fn exec(&self, words: &[OsString]) -> Result<()> {
        let mut command = self.nsenter()?;
        command.args(words);
        self.join_cgroups()?;
        Err(command.exec()).context("starting nsenter")
    }

    /// A program that will run in the node; the first argument names it.
    pub(super) fn enter(&self) -> Result<Command> {
        self.nsenter()?;
        let mut command = Command::new(self.cluster.own_program());
        command.args(["cluster", "--name", &self.cluster.name, "exec", &self.name()]);
        Ok(command)
    }

    fn nsenter(&self) -> Result<Command> {
        let Some(init) = self.init() else { bail!("{} does not run", self.name()) };
        let mut command = Command::new("nsenter");
        command.args(["--target", &init.pid.to_string(), "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--"]);
        command.env("PATH", self.cluster.search_path());
        Ok(command)
    }

    /// Starts the first process, and waits until it has made the node's file systems.
    fn start_init(&self) -> Result<()> {
        let log = self.cluster.path("log");
        fs::create_dir_all(&log)?;
        let log = fs::File::options().create(true).append(true).open(log.join(format!("{}-init.log", self.name())))?;
        let mut command = network::inside(&self.netns(), self.cluster.own_program());
        command.args(["cluster", "--name", &self.cluster.name, "init", &self.name()]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).process_group(0);
        let mut child = command.spawn().context("starting a node")?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("a piped output")?).read_line(&mut line)?;
        ensure!(
            line == super::init::READY,
            "{} does not start: {}",
            self.name(),
            processes::last_words(&self.cluster.path("log"))
        );
        Ok(())
    }

    /// Its cgroup in each hierarchy.
    pub(super) fn cgroups(&self) -> Vec<PathBuf> {
        hierarchies().into_iter().map(|hierarchy| hierarchy.join(self.netns())).collect()
    }

    fn make_cgroups(&self) -> Result<()> {
        for cgroup in self.cgroups() {
            fs::create_dir_all(&cgroup).with_context(|| format!("making {}", cgroup.display()))?;
            // A cgroup of the first version starts without processors and memory, and takes no process before it has some.
            for file in ["cpuset.cpus", "cpuset.mems"] {
                let parent = cgroup.parent().unwrap_or(Path::new("/")).join(file);
                if !hierarchy_is_unified(&cgroup) && parent.exists() {
                    fs::write(cgroup.join(file), fs::read(parent)?)?;
                }
            }
            if let Some(parent) = cgroup.parent().filter(|_| hierarchy_is_unified(&cgroup)) {
                hand_down_controllers(parent)?;
            }
        }
        Ok(())
    }

    /// Moves this process into the node's cgroups.
    pub(super) fn join_cgroups(&self) -> Result<()> {
        for cgroup in self.cgroups() {
            let init = cgroup.join(super::init::CGROUP);
            let own = if init.is_dir() { init } else { cgroup };
            let file = own.join("cgroup.procs");
            fs::write(&file, std::process::id().to_string()).with_context(|| format!("joining {}", file.display()))?;
        }
        Ok(())
    }
}

/// Removes the cgroups, in each hierarchy, whose names start so. Their processes have ended.
pub(super) fn remove_cgroups(prefix: &str) -> Result<()> {
    for hierarchy in hierarchies() {
        for entry in fs::read_dir(hierarchy)?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(prefix) && entry.file_type()?.is_dir() {
                remove_cgroup(&entry.path())?;
            }
        }
    }
    Ok(())
}

fn remove_cgroup(cgroup: &Path) -> Result<()> {
    for entry in fs::read_dir(cgroup)?.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        remove_cgroup(&entry.path())?;
    }
    // The kernel takes a moment to let go of one whose processes have just ended.
    processes::retry(|| fs::remove_dir(cgroup).with_context(|| format!("removing {}", cgroup.display())))
}

/// Where this machine's cgroup hierarchies are mounted.
pub(super) fn hierarchies() -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mounts = table.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (point, kind) = (fields.next()?, fields.next()?);
        (kind.starts_with("cgroup") && point.starts_with("/sys/fs/cgroup")).then(|| PathBuf::from(point))
    });
    let mut mounts: Vec<PathBuf> = mounts.collect();
    mounts.sort();
    mounts.dedup();
    mounts
}

/// Gives the children of a cgroup of the second version the controllers that it has itself.
pub(super) fn hand_down_controllers(cgroup: &Path) -> Result<()> {
    let (has, gives) = (cgroup.join("cgroup.controllers"), cgroup.join("cgroup.subtree_control"));
    for controller in fs::read_to_string(has)?.split_whitespace() {
        fs::write(&gives, format!("+{controller}"))
            .with_context(|| format!("handing {controller} down to {}", cgroup.display()))?;
    }
    Ok(())
}

/// Whether a cgroup is of the second version.
pub(super) fn hierarchy_is_unified(cgroup: &Path) -> bool {
    cgroup.join("cgroup.controllers").exists()
}

/// The words of a command line.
pub(super) fn words<const N: usize>(words: [&dyn AsRef<OsStr>; N]) -> Vec<OsString> {
    words.iter().map(|word| word.as_ref().to_os_string()).collect()
}
