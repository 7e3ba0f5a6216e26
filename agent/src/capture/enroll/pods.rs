//! Which pod a network namespace is, by the node's own word: so that a pod is known before its application runs, when nobody has told its
//! address yet; and so that pods of namespaces that never join are known without the controller, which may be one of them.
//!
//! Enters: the cgroups that the kubelet keeps pods in, the processes below, and the kubelet's directory of logs. Leaves: the UID of the pod
//! that a namespace is, and whether its namespace in the API never joins. It is looked while a namespace is not decided on, and never for
//! a connection.
//!
//! Trusted is what root of the node alone may write: the names of pods' cgroups, and which processes are below. The name has the UID that
//! the API server gave, which is never used again; what has it there, on this node, only the controller says. A pod chooses neither its
//! cgroup nor the network namespace that its first process is in. It may make namespaces of its own, or (with privileges over the node) enter
//! others': a pod whose processes are in several is not taken for any of them, and neither is a namespace with processes of several pods
//! taken for one of these. What a namespace was found to be, it is for as long as it lives: it is one sandbox's. Pods on their node's network
//! share a namespace that is never in the runtime's directory. The numbers of namespaces are used again: what was found counts for the one
//! only that the agent held open, and so kept alive, all the while.
//!
//! Directories of logs tell of excluded namespaces and of nothing else. Who may write there is trusted to name the pods that need no mesh:
//! whoever mounts that directory into a pod trusts it with the node. Static pods have the hash of their file for a UID, which the API
//! server does not know: they are known by their addresses.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::classify::Standing;
use super::tracked::Tracked;
use super::{Enroller, Message};
use crate::capture::cgroup;
use crate::model::PodUid;

/// Where a kubelet keeps the logs of pods: `NAMESPACE_NAME_UID` is the name of a pod's directory. It makes that before the sandbox.
const LOGS: &str = "/var/log/pods";
/// A runtime makes the first process of a pod some 50 ms after its network namespace, and an application's some 80 ms after that.
pub(super) const SOON: Duration = Duration::from_millis(20);
/// For how long after a change of a namespace's addresses its first process is waited for like that. Then it is looked ever more seldom.
pub(super) const EAGER: Duration = Duration::from_secs(2);
/// How seldom at last: a namespace that is no pod's may never be decided on.
const SELDOM: Duration = Duration::from_secs(5);
/// How deep below its cgroup a pod's processes are.
const DEPTH: usize = 4;
/// How the cgroups are named, right below a pod's, in which CRI-O may keep what watches over the pod's containers. That is on the node's
/// network, and no process of the pod's.
const MONITORS: &str = "crio-conmon-";

/// The pod that a namespace is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Owner {
    pub(super) uid: PodUid,
    /// The UID in the mesh of the workload that the controller has said this pod to be, once it has.
    pub(super) workload: Option<Arc<str>>,
}

/// What a look has found.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    /// The network namespaces that it was about, by their cookies.
    looked: BTreeSet<u64>,
    /// Pods, by the cookies of their network namespaces.
    pods: BTreeMap<u64, PodUid>,
    /// Pods of namespaces that never join.
    excluded: BTreeSet<PodUid>,
}

/// What there is to look for.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    /// Network namespaces whose pods are not known: their cookies, by inode.
    cookies: HashMap<u64, u64>,
    /// Pods whose network namespaces are.
    known: BTreeSet<PodUid>,
}

/// Where to look.
#[derive(Clone, Debug)]
pub(super) struct NodePods {
    excluded_namespaces: BTreeSet<String>,
    logs: PathBuf,
    cgroups: PathBuf,
    processes: PathBuf,
}

impl NodePods {
    /// Those of a node whose pods are below this cgroup.
    pub(super) fn new(excluded_namespaces: &[String], cgroups: &Path) -> Self {
        let excluded_namespaces = excluded_namespaces.iter().cloned().collect();
        let (logs, cgroups) = (cgroup::in_init(Path::new(LOGS)), cgroups.to_owned());
        Self { excluded_namespaces, logs, cgroups, processes: PathBuf::from("/proc") }
    }

    fn look(&self, wanted: &Wanted) -> Found {
        let mut owners: BTreeMap<u64, BTreeSet<PodUid>> = BTreeMap::new();
        for (uid, cgroup) in self.pods().into_iter().filter(|(uid, _)| !wanted.known.contains(uid)) {
            let cookie = self.netns_of(&cgroup, &uid).and_then(|inode| wanted.cookies.get(&inode));
            if let Some(cookie) = cookie {
                owners.entry(*cookie).or_default().insert(uid);
            }
        }
        let one = |(cookie, mut uids): (u64, BTreeSet<PodUid>)| Some((cookie, uids.pop_first()?)).filter(|_| uids.is_empty());
        let looked = wanted.cookies.values().copied().collect();
        Found { looked, pods: owners.into_iter().filter_map(one).collect(), excluded: self.excluded() }
    }

    /// All pods with their cgroups. Those with guarantees are right below, others below a class.
    fn pods(&self) -> Vec<(PodUid, PathBuf)> {
        let pods_in = |directory: &Path| {
            let named = children(directory).into_iter().map(|cgroup| (uid_of(name_of(&cgroup)), cgroup));
            named.collect::<Vec<_>>()
        };
        let all = pods_in(&self.cgroups).into_iter().flat_map(|(uid, cgroup)| match uid {
            // What is below a pod's own is the pod's to name, if it may write there.
            Some(uid) => vec![(Some(uid), cgroup)],
            None => pods_in(&cgroup),
        });
        all.filter_map(|(uid, cgroup)| Some((uid?, cgroup))).collect()
    }

    fn excluded(&self) -> BTreeSet<PodUid> {
        if self.excluded_namespaces.is_empty() {
            return BTreeSet::new();
        }
        let entries = fs::read_dir(&self.logs).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let uid = |name: String| {
            let (namespace, rest) = name.split_once('_')?;
            let (_, uid) = rest.rsplit_once('_')?;
            (self.excluded_namespaces.contains(namespace) && !uid.is_empty()).then(|| uid.into())
        };
        names.filter_map(uid).collect()
    }

    /// The inode of the one network namespace of all processes of a pod.
    fn netns_of(&self, cgroup: &Path, uid: &PodUid) -> Option<u64> {
        let mut found = None;
        let containers = children(cgroup).into_iter().filter(|container| !name_of(container).starts_with(MONITORS));
        let inside = containers.flat_map(|container| processes(&container, DEPTH - 1));
        for process in processes(cgroup, 0).into_iter().chain(inside) {
            match self.netns_of_process(&process, uid) {
                Ok(netns) if found.is_some_and(|found| found != netns) => return None,
                Ok(netns) => found = Some(netns),
                Err(error) if has_ended(&error) => {}
                Err(_) => return None,
            }
        }
        found
    }

    fn netns_of_process(&self, process: &str, uid: &PodUid) -> io::Result<u64> {
        // All is read of one process: the number may be another's at any time.
        let process = File::open(self.processes.join(process))?;
        let directory = PathBuf::from(format!("/proc/self/fd/{}", process.as_raw_fd()));
        let netns = fs::metadata(directory.join("ns/net"))?.ino();
        let cgroups = fs::read_to_string(directory.join("cgroup"))?;
        let is_in = cgroups.lines().any(|line| line.split('/').find_map(uid_of).as_ref() == Some(uid));
        if is_in { Ok(netns) } else { Err(io::ErrorKind::NotFound.into()) }
    }
}

fn has_ended(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// The pod whose cgroup has this name: the kubelet's own (`podUID`) or systemd's (`kubepods-CLASS-podUID.slice`, with `_` for `-`).
fn uid_of(name: &str) -> Option<PodUid> {
    let uid = match name.strip_suffix(".slice") {
        Some(slice) => slice.rsplit_once("-pod")?.1.replace('_', "-"),
        None => name.strip_prefix("pod")?.to_owned(),
    };
    // `podman-1.scope` is nobody's.
    (!uid.is_empty() && !uid.contains('.')).then(|| uid.as_str().into())
}

fn name_of(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
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
    let unsaid = matches!(standing, Standing::Unsynced | Standing::NoAddress | Standing::Ask(_) | Standing::Disputed);
    if unsaid && tracked.excluded { Standing::Exempt } else { standing }
}

impl Enroller {
    /// A namespace is there of which it is not known which pod it is.
    pub(super) fn expect_pod(&mut self, after: Duration) {
        if self.node_pods.is_some() {
            let at = Instant::now() + after;
            self.pods_at = Some(self.pods_at.map_or(at, |planned| planned.min(at)));
        }
    }

    pub(super) fn look_for_pods(&mut self) {
        self.pods_at = None;
        if !self.caught_up {
            // One look for all that is there.
            return;
        }
        if self.looking_for_pods || !self.tracked.values().any(|tracked| tracked.wants_pod().is_some()) {
            return;
        }
        let Some(node_pods) = self.node_pods.clone() else { return };
        self.looking_for_pods = true;
        let unknown = self.tracked.iter().filter(|(_, tracked)| tracked.owner.is_none());
        let wanted = Wanted {
            cookies: unknown.map(|(cookie, tracked)| (tracked.netns.inode(), *cookie)).collect(),
            known: self.tracked.values().filter_map(|tracked| Some(tracked.owner.as_ref()?.uid.clone())).collect(),
        };
        self.spawn_blocking(move |_| Message::Pods(node_pods.look(&wanted)));
    }

    pub(super) async fn take_pods(&mut self, found: Found) {
        self.looking_for_pods = false;
        let mut changed: BTreeSet<u64> = BTreeSet::new();
        for (cookie, uid) in found.pods {
            if let Some(tracked) = self.tracked.get_mut(&cookie)
                && tracked.owner.is_none()
            {
                tracing::debug!(cookie, pod = %uid, "the pod of a network namespace");
                tracked.owner = Some(Owner { uid, workload: None });
                changed.insert(cookie);
            }
        }
        for (cookie, tracked) in &mut self.tracked {
            let excluded = tracked.owner.as_ref().is_some_and(|owner| found.excluded.contains(&owner.uid));
            if excluded && !std::mem::replace(&mut tracked.excluded, true) {
                tracing::debug!(cookie, "the pod of a namespace that never joins");
                changed.insert(*cookie);
            }
        }
        for (cookie, tracked) in &mut self.tracked {
            if found.looked.contains(cookie) && std::mem::replace(&mut tracked.unlooked, false) {
                changed.insert(*cookie);
            }
        }
        for cookie in changed {
            self.doubt(cookie).await;
            self.reconcile(cookie).await;
        }
        if let Some(age) = self.tracked.values().filter_map(Tracked::wants_pod).min() {
            self.expect_pod(if age < EAGER { SOON } else { (age / 10).min(SELDOM) });
        }
    }
}

#[cfg(test)]
mod tests;
