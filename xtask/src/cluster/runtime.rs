//! What runs a node's containers: containerd, or CRI-O where the directory that Kubernetes is taken from has that.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};

use super::node::{Node, words};
use super::{Cluster, images};

/// Where the distribution has the CNI plugins.
const PLUGINS: &str = "/usr/lib/cni";
/// CRI-O's program, and what it cannot do without that is its own.
const CRIO: &str = "crio";
const PINNS: &str = "pinns";
/// Where CRI-O keeps images and containers, in the node: what lasts, and what does not.
const STORAGE: &str = "/var/lib/containers/storage";
const RUN_STORAGE: &str = "/run/containers/storage";
/// A runc that asks for no more than a machine may have: it may keep CAP_SYS_RESOURCE from us, without which no process can be made less
/// likely to be killed than others, and its kernel may have a controller of huge pages that is mounted nowhere. CRI-O hands on what kubelet
/// and pods want; containerd looks, or can be told.
const RUNC: &str = r#"#!/bin/sh
for word; do
    case $before in
        --bundle | -b) asked=$word/config.json ;;
        --process | -p) asked=$word ;;
    esac
    before=$word
done
[ -z "$asked" ] || sed -z -i 's/"oomScoreAdj": *-[0-9]*/"oomScoreAdj":0/
    s/"hugepageLimits": *\[[^]]*\]/"hugepageLimits":[]/
    s/,[[:space:]]*"CAP_SYS_RESOURCE"//g' "$asked"
exec runc "$@"
"#;

/// What runs containers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Runtime {
    Containerd,
    CriO,
}

impl Runtime {
    /// That of a cluster whose programs are in place.
    pub(super) fn of(cluster: &Cluster) -> Self {
        Self::among(&cluster.path("bin"))
    }

    /// That of a cluster whose programs are these.
    pub(super) fn among(programs: &Path) -> Self {
        if programs.join(CRIO).is_file() { Self::CriO } else { Self::Containerd }
    }

    /// The programs that come with it from nowhere else.
    pub(super) fn needs(self) -> &'static [&'static str] {
        match self {
            Self::Containerd => &[],
            Self::CriO => &[PINNS],
        }
    }

    /// Its program, which tells when it serves.
    pub(super) fn program(self) -> &'static str {
        match self {
            Self::Containerd => "containerd",
            Self::CriO => CRIO,
        }
    }

    /// Where it serves, in the node.
    pub(super) fn endpoint(self) -> &'static str {
        match self {
            Self::Containerd => "unix:///run/containerd/containerd.sock",
            Self::CriO => "unix:///run/crio/crio.sock",
        }
    }

    /// The directory below `/var/lib` that it keeps images in. It puts overlays there, as the node's own root is one.
    pub(super) fn store(self) -> &'static str {
        match self {
            Self::Containerd => "containerd",
            Self::CriO => "containers",
        }
    }

    /// Writes what it reads.
    pub(super) fn configure(self, node: &Node<'_>) -> Result<()> {
        fs::create_dir_all(node.path(self.store()))?;
        let text = match self {
            Self::Containerd => containerd(node),
            Self::CriO => {
                let runc = node.path("runc");
                fs::write(&runc, RUNC)?;
                fs::set_permissions(&runc, fs::Permissions::from_mode(0o755))?;
                fs::write(node.path("policy.json"), r#"{"default": [{"type": "insecureAcceptAnything"}]}"#)?;
                crio(node)
            }
        };
        Ok(fs::write(node.path(&self.file()), text)?)
    }

    /// Its command line.
    pub(super) fn command_line(self, node: &Node<'_>) -> Vec<OsString> {
        words([&self.program(), &"--config", &node.path(&self.file())])
    }

    fn file(self) -> String {
        format!("{}.toml", self.program())
    }

    /// Imports a docker-archive tar. That is a file of this machine's, which the node may not see: it goes in by the standard input.
    pub(super) fn import(self, node: &Node<'_>, archive: &Path) -> Result<()> {
        let file = File::open(archive).with_context(|| format!("opening {}", archive.display()))?;
        let mut command = node.enter()?;
        match self {
            Self::Containerd => command.args(["ctr", "--namespace", "k8s.io", "images", "import", "-"]),
            Self::CriO => command
                .args(["skopeo", "--insecure-policy", "copy", "--quiet", "docker-archive:/dev/stdin"])
                .arg(format!("containers-storage:[overlay@{STORAGE}+{RUN_STORAGE}]{}", images::name(archive)?)),
        };
        let output = command.stdin(file).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "importing {} on {}: {}", archive.display(), node.name(), said.trim());
        Ok(())
    }
}

/// Containers in the distribution's runc. A machine may keep CAP_SYS_RESOURCE from us, and then no process can be made less likely to be
/// killed than it is.
fn containerd(node: &Node<'_>) -> String {
    format!(
        "version = 2\n\
         [plugins.\"io.containerd.grpc.v1.cri\"]\n\
         sandbox_image = \"{}\"\n\
         restrict_oom_score_adj = true\n\
         [plugins.\"io.containerd.grpc.v1.cri\".containerd]\n\
         snapshotter = \"overlayfs\"\n\
         [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\n\
         runtime_type = \"io.containerd.runc.v2\"\n\
         [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc.options]\n\
         SystemdCgroup = false\n\
         [plugins.\"io.containerd.grpc.v1.cri\".cni]\n\
         bin_dir = \"{PLUGINS}\"\n\
         conf_dir = \"{}\"\n",
        images::PAUSE,
        node.path("cni").display()
    )
}

/// As CRI-O is by itself, but for cgroups, as the kubelet has them here, and a power cut: by itself it takes its images for damaged then.
fn crio(node: &Node<'_>) -> String {
    let [runc, policy, cni] = ["runc", "policy.json", "cni"].map(|name| node.path(name));
    format!(
        "[crio]\n\
         root = \"{STORAGE}\"\n\
         runroot = \"{RUN_STORAGE}\"\n\
         storage_driver = \"overlay\"\n\
         clean_shutdown_file = \"\"\n\
         [crio.api]\n\
         listen = \"/run/crio/crio.sock\"\n\
         [crio.runtime]\n\
         cgroup_manager = \"cgroupfs\"\n\
         conmon_cgroup = \"pod\"\n\
         default_runtime = \"runc\"\n\
         [crio.runtime.runtimes.runc]\n\
         runtime_path = \"{}\"\n\
         [crio.image]\n\
         pause_image = \"{}\"\n\
         pause_command = \"\"\n\
         signature_policy = \"{}\"\n\
         [crio.network]\n\
         network_dir = \"{}\"\n\
         plugin_dirs = [\"{PLUGINS}\"]\n",
        runc.display(),
        images::PAUSE,
        policy.display(),
        cni.display()
    )
}
