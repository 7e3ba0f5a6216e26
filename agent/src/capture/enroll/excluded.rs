//! Pods of the namespaces that never join, known without the controller's word: the controller is one of them, and what it needs to start
//! are others.
//!
//! Enters: the kubelet's directory of logs, whose names tell the namespace and UID of each pod, and the pods' cgroups. Leaves: the network
//! namespaces that those pods have for themselves. What is not surely one of these is left to the controller.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::Instant;

use super::classify::Standing;
use super::tracked::Tracked;
use super::{Enroller, Message};
use crate::capture::cgroup;

/// Where a kubelet keeps the logs of pods: `NAMESPACE_NAME_UID` is the name of a pod's directory.
const LOGS: &str = "/var/log/pods";
/// A runtime makes the first process of a pod so long after its network namespace.
pub(super) const FIRST_LOOK: Duration = Duration::from_millis(60);
const NEXT_LOOK: Duration = Duration::from_millis(300);
/// How deep below its cgroup a pod's processes are.
const DEPTH: usize = 4;

/// Where to look for them.
#[derive(Clone, Debug)]
pub(super) struct ExcludedPods {
    namespaces: BTreeSet<String>,
    logs: PathBuf,
    cgroups: PathBuf,
    processes: PathBuf,
}

impl ExcludedPods {
    /// Those of a node whose pods are below this cgroup. None: no namespace is excluded, or there is no such cgroup.
    pub(super) fn new(namespaces: &[String], pods: Option<&Path>) -> Option<Self> {
        let namespaces: BTreeSet<String> = namespaces.iter().cloned().collect();
        let cgroups = pods.filter(|_| !namespaces.is_empty())?.to_owned();
        Some(Self { namespaces, logs: cgroup::in_init(Path::new(LOGS)), cgroups, processes: PathBuf::from("/proc") })
    }

    /// The inodes of their network namespaces.
    fn netns(&self) -> BTreeSet<u64> {
        let pods = self.uids();
        if pods.is_empty() {
            return BTreeSet::new();
        }
        let mut cgroups = children(&self.cgroups);
        // Those of pods with guarantees are right below, others below a class.
        cgroups.extend(cgroups.iter().flat_map(|class| children(class)).collect::<Vec<_>>());
        let is_theirs = |cgroup: &&PathBuf| pods.iter().any(|uid| is_of(cgroup, uid));
        cgroups.iter().filter(is_theirs).filter_map(|cgroup| self.netns_of(cgroup)).collect()
    }

    fn uids(&self) -> BTreeSet<String> {
        let entries = fs::read_dir(&self.logs).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let uid = |name: String| {
            let (namespace, rest) = name.split_once('_')?;
            let (_, uid) = rest.rsplit_once('_')?;
            (self.namespaces.contains(namespace) && !uid.is_empty()).then(|| uid.to_owned())
        };
        names.filter_map(uid).collect()
    }

    /// The one network namespace of all processes of a pod. A pod that visits others, as those of network plug-ins do, has several.
    fn netns_of(&self, cgroup: &Path) -> Option<u64> {
        let name = cgroup.file_name()?.to_str()?;
        let mut found = BTreeSet::new();
        for process in processes(cgroup, DEPTH) {
            match self.netns_of_process(&process, name) {
                Ok(netns) => drop(found.insert(netns)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(_) => return None,
            }
        }
        found.first().copied().filter(|_| found.len() == 1)
    }

    fn netns_of_process(&self, process: &str, pod: &str) -> io::Result<u64> {
        let directory = self.processes.join(process);
        let netns = fs::metadata(directory.join("ns/net"))?.ino();
        // After the other: its number may have become another pod's process.
        let is_in = fs::read_to_string(directory.join("cgroup"))?.lines().any(|line| line.split('/').any(|part| part == pod));
        if is_in { Ok(netns) } else { Err(io::ErrorKind::NotFound.into()) }
    }
}

/// Whether a cgroup is the pod's, by the kubelet's own cgroups or systemd's.
fn is_of(cgroup: &Path, uid: &str) -> bool {
    let Some(name) = cgroup.file_name().and_then(|name| name.to_str()) else { return false };
    match name.strip_suffix(".slice") {
        Some(slice) => slice.ends_with(&format!("-pod{}", uid.replace('-', "_"))),
        None => name.strip_prefix("pod") == Some(uid),
    }
}

fn children(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()).collect()
}

fn processes(cgroup: &Path, depth: usize) -> Vec<String> {
    let text = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    let mut found: Vec<String> = text.lines().map(str::to_owned).collect();
    if depth > 0 {
        found.extend(children(cgroup).iter().flat_map(|child| processes(child, depth - 1)));
    }
    found
}

/// What a namespace of an excluded pod is while the controller has not said so.
pub(super) fn known(standing: Standing, tracked: &Tracked) -> Standing {
    let unsaid = matches!(standing, Standing::Unsynced | Standing::NoAddress | Standing::Ask(_));
    if unsaid && tracked.excluded { Standing::Exempt } else { standing }
}

impl Enroller {
    /// A namespace is closed that may be an excluded pod's.
    pub(super) fn expect_excluded(&mut self, after: Duration) {
        if self.excluded.is_some() {
            let at = Instant::now() + after;
            self.excluded_at = Some(self.excluded_at.map_or(at, |planned| planned.min(at)));
        }
    }

    pub(super) fn look_for_excluded(&mut self) {
        self.excluded_at = None;
        if let Some(excluded) = self.excluded.clone()
            && self.tracked.values().any(Tracked::is_pending)
        {
            self.spawn_blocking(move |_| Message::Excluded { inodes: excluded.netns() });
        }
    }

    pub(super) async fn take_excluded(&mut self, inodes: &BTreeSet<u64>) {
        for cookie in inodes.iter().filter_map(|inode| self.cookies.get(inode)).copied().collect::<Vec<_>>() {
            let Some(tracked) = self.tracked.get_mut(&cookie) else { continue };
            if !std::mem::replace(&mut tracked.excluded, true) {
                tracing::debug!(cookie, "the pod of a namespace that never joins");
                self.reconcile(cookie).await;
            }
        }
        if self.tracked.values().any(Tracked::is_pending) {
            self.expect_excluded(NEXT_LOOK);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "37182395-691d-4cd4-9c3f-93f2b9c9d83f";

    /// A node of files.
    struct Node(tempfile::TempDir);

    impl Node {
        fn new() -> Self {
            Self(tempfile::tempdir().expect("a directory"))
        }

        fn path(&self, path: &str) -> PathBuf {
            self.0.path().join(path)
        }

        fn write(&self, path: &str, text: &str) {
            let path = self.path(path);
            fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
            fs::write(path, text).expect("a file");
        }

        fn pod(&self, namespace: &str, uid: &str) {
            fs::create_dir_all(self.path(&format!("logs/{namespace}_any-name_{uid}"))).expect("a directory");
        }

        /// A process in a cgroup, whose network namespace is a file of that name.
        fn process(&self, number: u32, cgroup: &str, netns: &str) {
            let procs = self.path(&format!("cgroup/{cgroup}/cgroup.procs"));
            let before = fs::read_to_string(procs).unwrap_or_default();
            self.write(&format!("cgroup/{cgroup}/cgroup.procs"), &format!("{before}{number}\n"));
            self.write(&format!("proc/{number}/cgroup"), &format!("1:name=systemd:/other\n0::/kubepods/{cgroup}\n"));
            if !self.path(netns).exists() {
                self.write(netns, "");
            }
            fs::create_dir_all(self.path(&format!("proc/{number}/ns"))).expect("a directory");
            fs::hard_link(self.path(netns), self.path(&format!("proc/{number}/ns/net"))).expect("a link");
        }

        fn found(&self) -> Vec<u64> {
            let namespaces = BTreeSet::from(["kube-system".to_owned()]);
            let [logs, cgroups, processes] = ["logs", "cgroup", "proc"].map(|name| self.path(name));
            ExcludedPods { namespaces, logs, cgroups, processes }.netns().into_iter().collect()
        }

        fn inode(&self, netns: &str) -> u64 {
            fs::metadata(self.path(netns)).expect("a file").ino()
        }
    }

    #[test]
    fn pods_of_excluded_namespaces_are_found_in_cgroups_of_every_driver_and_class_and_others_are_not() {
        let slice = format!("kubepods-besteffort.slice/kubepods-besteffort-pod{}.slice", UID.replace('-', "_"));
        for cgroup in [format!("burstable/pod{UID}/container"), format!("pod{UID}/container"), format!("{slice}/cri-x.scope")] {
            let node = Node::new();
            node.process(7, &cgroup, "netns");
            node.pod("shop", UID);
            assert!(node.found().is_empty(), "{cgroup}");
            node.pod("kube-system", UID);
            assert_eq!(node.found(), [node.inode("netns")], "{cgroup}");
        }
    }

    #[test]
    fn a_pod_that_is_in_several_network_namespaces_tells_of_none() {
        let node = Node::new();
        node.pod("kube-system", UID);
        node.process(7, &format!("pod{UID}/sandbox"), "own");
        node.process(8, &format!("pod{UID}/plug-in"), "visited");
        assert!(node.found().is_empty());
    }

    #[test]
    fn a_number_that_is_another_pods_by_now_tells_nothing() {
        let node = Node::new();
        node.pod("kube-system", UID);
        node.process(7, &format!("pod{UID}/sandbox"), "netns");
        node.write("proc/7/cgroup", "0::/kubepods/podof-another/container\n");
        assert!(node.found().is_empty());
    }
}
