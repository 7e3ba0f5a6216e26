//! `cluster`: a Kubernetes cluster on this machine, to run the cluster tests on and to try Culvert on.
//!
//! Where a Docker engine and kind work, it is kind's. Elsewhere the nodes are namespaces of this machine and everything in them is the
//! distribution's: containerd, runc and the CNI plugins from its packages, Kubernetes itself built from its source package. Nothing is
//! kept but one directory below `/run`, and names: all that `down` removes is found by the cluster's name, so a run that was killed half-way
//! leaves nothing that the next `down` does not find. What uses a cluster that it
//! has made holds a [`Guard`], so that it does not come to that.

#![expect(clippy::print_stdout, reason = "paths and states are what these verbs are asked for")]

mod control_plane;
mod dns;
mod forward;
mod guard;
mod images;
mod init;
mod kind;
mod kubernetes;
mod network;
mod node;
mod node_files;
mod options;
mod pki;
mod processes;
mod runtime;
mod source_cluster;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use nix::mount::{MsFlags, mount};

use crate::setup;

pub(crate) use self::guard::{Guard, VARIABLE};

/// The directory of Kubernetes' programs for measuring, built if they have not been, with what the control plane needs beside them installed.
///
/// # Errors
/// What could not be installed or built.
pub(crate) fn programs() -> Result<PathBuf> {
    setup::ensure(setup::Scope::Cluster)?;
    kubernetes::programs(&Cluster::named("bench")?)
}

/// What to do with the cluster.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Which cluster, where a machine has several.
    #[arg(long, default_value = "local", global = true, value_parser = parse_name)]
    name: String,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Makes the cluster, and waits until its nodes are ready. Does nothing where it is up.
    Up(Up),
    /// Removes the cluster, and whatever an interrupted `up` has left of one.
    Down,
    /// Says what is running.
    Status,
    /// Prints the path of the administrator's kubeconfig.
    Kubeconfig,
    /// Imports every docker-archive tar of a directory on every node.
    Images {
        /// The directory.
        directory: PathBuf,
    },
    /// Runs a program on a node, in all of its namespaces.
    Exec {
        /// The node's name.
        node: String,
        /// The program and its arguments.
        #[arg(trailing_var_arg = true, required = true)]
        command: Vec<OsString>,
    },
    /// Prints the path of the file that stands for a node's network namespace.
    Netns {
        /// The node's name, or `control-plane`.
        node: String,
    },
    /// Stops `api-server`, a node as a power cut does (`node1`), its kubelet (`node1/kubelet`) or its link (`node1/link`).
    Stop {
        /// What.
        part: Part,
    },
    /// Starts what `stop` stopped.
    Start {
        /// What.
        part: Part,
    },
    /// A node's first process.
    #[command(hide = true)]
    Init {
        /// The node's name.
        node: String,
    },
    /// Serves the API on loopback.
    #[command(hide = true)]
    Forward,
    /// Serves the names of the cluster's services.
    #[command(hide = true)]
    Dns,
    /// Removes the cluster when the standard input ends.
    #[command(hide = true)]
    Guard,
}

/// How the cluster shall be.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Up {
    /// How many nodes run pods.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=9))]
    pub(crate) nodes: u8,
    /// Nodes as namespaces, with Kubernetes built from the distribution's source package, even where kind works.
    #[arg(long)]
    pub(crate) kubernetes_from_source: bool,
    /// Nodes as namespaces, with the Kubernetes of this directory: its programs by their own names. etcd, containerd, runc and what else a node
    /// runs are taken from there as well, where they are there; with `crio` and `pinns` there, CRI-O runs the containers.
    #[arg(long, value_name = "DIR")]
    pub(crate) kubernetes: Option<PathBuf>,
    /// kind, or nothing.
    #[arg(long, conflicts_with_all = ["kubernetes_from_source", "kubernetes"])]
    pub(crate) kind: bool,
    /// kind, with nodes of this image, as its own `--image` takes it: another Kubernetes than it has by itself, or where its own image is not
    /// to be had.
    #[arg(long, value_name = "IMAGE", conflicts_with_all = ["kubernetes_from_source", "kubernetes"])]
    pub(crate) node_image: Option<String>,
    /// Directories of docker-archive tars that the nodes shall have.
    #[arg(long)]
    pub(crate) images: Vec<PathBuf>,
}

impl Up {
    /// Two nodes, as this machine can have them.
    pub(crate) fn two_nodes() -> Self {
        Self { nodes: 2, kubernetes_from_source: false, kubernetes: None, kind: false, node_image: None, images: Vec::new() }
    }

    /// The directory that Kubernetes is to be taken from, if one is given, by its whole path.
    fn given_programs(&self) -> Result<Option<PathBuf>> {
        let find = |path: &PathBuf| std::fs::canonicalize(path).with_context(|| format!("looking for {}", path.display()));
        self.kubernetes.as_ref().map(find).transpose()
    }

    /// What Kubernetes is to be taken from, if that is given: a directory by its whole path, or kind's image.
    fn given_kubernetes(&self) -> Result<Option<OsString>> {
        let image = || self.node_image.as_ref().map(OsString::from);
        Ok(self.given_programs()?.map(PathBuf::into_os_string).or_else(image))
    }
}

/// What of a cluster can be stopped and started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// kube-apiserver.
    ApiServer,
    /// A node: every process of it, at once.
    Node(String),
    /// A node's kubelet; its pods go on.
    Kubelet(String),
    /// What joins a node to the others.
    Link(String),
}

impl std::str::FromStr for Part {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match text.split_once('/') {
            None if text == "api-server" => Ok(Self::ApiServer),
            None => Ok(Self::Node(text.to_owned())),
            Some((node, "kubelet")) => Ok(Self::Kubelet(node.to_owned())),
            Some((node, "link")) => Ok(Self::Link(node.to_owned())),
            Some((_, part)) => anyhow::bail!("a node has a kubelet and a link, no {part}"),
        }
    }
}

/// Which of the two kinds of cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Maker {
    Kind,
    Source,
}

/// Runs one of the verbs.
pub(crate) fn run(arguments: Arguments) -> Result<()> {
    let cluster = Cluster { name: arguments.name };
    match arguments.verb {
        Verb::Up(up) => cluster.up(&up),
        Verb::Down => cluster.down(),
        Verb::Status => cluster.status(),
        Verb::Kubeconfig => {
            println!("{}", cluster.existing_kubeconfig()?.display());
            Ok(())
        }
        Verb::Images { directory } => cluster.import(&[directory]),
        Verb::Exec { node, command } => match cluster.existing_maker()? {
            Maker::Kind => kind::exec(&cluster, &node, &command),
            Maker::Source => node::Node::named(&cluster, &node)?.exec(&command),
        },
        Verb::Netns { node } => {
            let path = match cluster.existing_maker()? {
                Maker::Kind => kind::netns(&cluster, &node)?,
                Maker::Source => network::path(&cluster.netns(&node)),
            };
            println!("{}", path.display());
            Ok(())
        }
        Verb::Stop { part } => match cluster.existing_maker()? {
            Maker::Kind => kind::stop(&cluster, &part),
            Maker::Source => source_cluster::stop(&cluster, &part),
        },
        Verb::Start { part } => match cluster.existing_maker()? {
            Maker::Kind => kind::start(&cluster, &part),
            Maker::Source => source_cluster::start(&cluster, &part),
        },
        Verb::Init { node } => init::run(&node::Node::named(&cluster, &node)?),
        Verb::Forward => forward::run(&cluster),
        Verb::Dns => dns::run(&cluster),
        Verb::Guard => guard::run(&cluster),
    }
}

/// A cluster's place on this machine: its name, and what follows from it.
#[derive(Clone, Debug)]
pub(crate) struct Cluster {
    name: String,
}

impl Cluster {
    /// The cluster of that name, which need not be up.
    pub(crate) fn named(name: &str) -> Result<Self> {
        Ok(Self { name: parse_name(name)? })
    }

    /// All files of the cluster.
    fn dir(&self) -> PathBuf {
        Path::new("/run/culvert-cluster").join(&self.name)
    }

    /// A file or directory of the cluster.
    fn path(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    /// This program, as it was when the cluster was made: a cluster outlives many builds.
    fn own_program(&self) -> PathBuf {
        self.path("bin/xtask")
    }

    /// The program that knows the cluster: its own, where it has one, or this one.
    ///
    /// # Errors
    /// When this program does not know its own path.
    pub(crate) fn xtask_program(&self) -> Result<PathBuf> {
        let own = self.own_program();
        if own.exists() { Ok(own) } else { std::env::current_exe().context("looking for this program") }
    }

    /// Before the name of each network namespace and cgroup of the cluster.
    fn prefix(&self) -> String {
        format!("culvert-{}-", self.name)
    }

    /// The network namespace of a node, or of the control plane.
    fn netns(&self, part: &str) -> String {
        format!("{}{part}", self.prefix())
    }

    /// The administrator's kubeconfig, which works from this machine's own network.
    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.path("kubeconfig")
    }

    fn existing_kubeconfig(&self) -> Result<PathBuf> {
        let file = self.kubeconfig();
        ensure!(file.is_file(), "no cluster {} is up: `cargo xtask cluster up` makes one", self.name);
        Ok(file)
    }

    /// Who made the cluster that is up; nobody if none is.
    fn maker(&self) -> Option<Maker> {
        match std::fs::read_to_string(self.path("maker")).ok()?.as_str() {
            "kind" => Some(Maker::Kind),
            _ => Some(Maker::Source),
        }
    }

    fn existing_maker(&self) -> Result<Maker> {
        self.maker().with_context(|| format!("no cluster {} is up: `cargo xtask cluster up` makes one", self.name))
    }

    /// Makes the cluster. One that is up stays as it is, and gets the images anew.
    ///
    /// # Errors
    /// What could not be made; what was made until then has been removed again.
    pub(crate) fn up(&self, up: &Up) -> Result<()> {
        ensure!(setup::is_root(), "a cluster's namespaces, mounts and containers need root");
        let kubeconfig = self.kubeconfig();
        if let Some(maker) = self.maker() {
            ensure!(
                kubeconfig.is_file() && self.nodes()?.len() == usize::from(up.nodes),
                "cluster {} is half made, or has another number of nodes: `cargo xtask cluster down` removes it",
                self.name
            );
            let (has, wanted) = (self.given_kubernetes(), up.given_kubernetes()?);
            let name = |given: Option<OsString>| given.map_or("its maker".into(), |given| given.display().to_string());
            ensure!(
                has == wanted,
                "cluster {} has the Kubernetes of {}, not of {}: `cargo xtask cluster down` removes it",
                self.name,
                name(has),
                name(wanted)
            );
            eprintln!("cluster {} is up, made {}", self.name, maker.way());
            images::own(&self.path("images"))?;
            self.import(&[&[self.path("images")], up.images.as_slice()].concat())?;
        } else {
            let maker = choose(up)?;
            let made = self.make_directory().and_then(|()| match maker {
                Maker::Kind => kind::up(self, up),
                Maker::Source => source_cluster::up(self, up),
            });
            if let Err(error) = made {
                eprintln!("{}", processes::last_words(&self.path("log")));
                if let Err(left) = self.down() {
                    eprintln!("xtask: removing what was made: {left:#}");
                }
                return Err(error);
            }
        }
        println!("export KUBECONFIG={}", kubeconfig.display());
        Ok(())
    }

    /// Makes the directory of the cluster's files, with this program in it. In memory: etcd and containerd ask for each write to be on the
    /// disk, and nothing here shall survive the machine. A mount of its own: in `/run` itself distributions let no program be started.
    fn make_directory(&self) -> Result<()> {
        std::fs::create_dir_all(self.dir())?;
        mount(Some("tmpfs"), &self.dir(), Some("tmpfs"), MsFlags::empty(), Some("mode=755"))
            .context("mounting the cluster's directory")?;
        std::fs::create_dir(self.path("bin"))?;
        std::fs::copy("/proc/self/exe", self.own_program()).context("copying this program")?;
        Ok(())
    }

    /// Removes the cluster, whoever made it.
    ///
    /// # Errors
    /// All that could not be removed.
    pub(crate) fn down(&self) -> Result<()> {
        // Its containers outlive the machine's start, which the directory does not.
        if self.maker() == Some(Maker::Kind) || kind::has(self) {
            kind::down(self)?;
        }
        source_cluster::down(self)
    }

    fn status(&self) -> Result<()> {
        let Some(maker) = self.maker() else {
            println!("cluster {}: not up", self.name);
            return Ok(());
        };
        println!("cluster {}: made {}, kubeconfig {}", self.name, maker.way(), self.kubeconfig().display());
        if maker == Maker::Source {
            source_cluster::status(self);
        }
        crate::run::run(self.kubectl().args(["get", "nodes", "--output", "wide"]))
    }

    fn import(&self, directories: &[PathBuf]) -> Result<()> {
        let mut archives = Vec::new();
        for directory in directories {
            archives.extend(images::archives(directory)?);
        }
        match self.existing_maker()? {
            Maker::Kind => kind::import(self, &archives),
            Maker::Source => self.nodes()?.iter().try_for_each(|node| node::Node::named(self, node)?.import(&archives)),
        }
    }

    /// The names of the nodes, as the cluster was made.
    fn nodes(&self) -> Result<Vec<String>> {
        let names = std::fs::read_to_string(self.path("nodes")).context("the list of nodes")?;
        Ok(names.lines().map(str::to_owned).collect())
    }

    /// The cluster's own kubectl, of its own version.
    pub(crate) fn kubectl_program(&self) -> PathBuf {
        self.path("bin/kubectl")
    }

    /// kubectl, as the administrator.
    pub(crate) fn kubectl(&self) -> Command {
        let mut command = Command::new(self.kubectl_program());
        command.arg("--kubeconfig").arg(self.kubeconfig());
        command
    }

    /// What its Kubernetes was taken from, if that was given: a directory, or kind's image.
    fn given_kubernetes(&self) -> Option<OsString> {
        std::fs::read_to_string(self.path("kubernetes")).ok().map(OsString::from)
    }

    /// Where nodes and control plane look for programs: those of the cluster first.
    fn search_path(&self) -> String {
        format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", self.path("bin").display())
    }
}

impl Maker {
    fn way(self) -> &'static str {
        match self {
            Self::Kind => "by kind",
            Self::Source => "of namespaces",
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Kind => "kind",
            Self::Source => "source",
        }
    }
}

/// kind where it works, unless told.
fn choose(up: &Up) -> Result<Maker> {
    if up.kubernetes_from_source || up.kubernetes.is_some() {
        return Ok(Maker::Source);
    }
    match kind::missing() {
        None => Ok(Maker::Kind),
        Some(reason) if up.kind || up.node_image.is_some() => anyhow::bail!("kind does not work here: {reason}"),
        Some(reason) => {
            eprintln!("no kind here ({reason}): the nodes are namespaces");
            Ok(Maker::Source)
        }
    }
}

/// Names of interfaces and namespaces come of it, and the removal goes by prefix.
fn parse_name(text: &str) -> Result<String> {
    let plain =
        !text.is_empty() && text.len() <= 12 && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
    ensure!(plain, "a cluster's name is of lower-case letters and digits, 12 at most");
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_read_as_they_are_written() {
        let part = |text: &str| text.parse::<Part>().ok();
        assert_eq!(part("api-server"), Some(Part::ApiServer));
        assert_eq!(part("node1"), Some(Part::Node("node1".to_owned())));
        assert_eq!(part("node1/kubelet"), Some(Part::Kubelet("node1".to_owned())));
        assert_eq!(part("node1/link"), Some(Part::Link("node1".to_owned())));
        assert_eq!(part("node1/disk"), None);
    }

    #[test]
    fn a_name_cannot_be_the_start_of_another_with_a_dash() {
        assert!(parse_name("a-b").is_err());
        assert!(parse_name("").is_err());
        assert!(parse_name("ci2").is_ok());
    }
}
