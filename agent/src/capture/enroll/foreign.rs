//! Namespaces that are mounted, but not in the node's directory: another's business, as soon as it is certain that they are.
//!
//! Enters: the mount table, and what was opened of it. Leaves: entries that exempt them. A runtime may mount a pod's namespace
//! elsewhere before it does so in the directory: one without an address yet may become a pod of ours, and one with a pod's address is.
//! Either stays closed, and so does one at an address that is not known, until the controller was asked. Loopback is never closed.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use culvert_ebpf_common::{Namespace, NamespaceState};
use tokio::task::AbortHandle;

use super::setup::{Opened, SetupError};
use super::{Enroller, Message, addresses, setup, tracked};
use crate::capture::Netns;

/// A namespace that is mounted elsewhere.
pub(super) struct Foreign {
    pub(super) netns: Netns,
    addresses: BTreeSet<IpAddr>,
    watcher: AbortHandle,
    /// It appeared while the agent was there.
    pub(super) fresh: bool,
    /// What the programs hold it for.
    state: Option<NamespaceState>,
    inquiry: Inquiry,
}

/// Whether the controller was asked who has a namespace's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Inquiry {
    Due,
    UnderWay,
    Over,
}

impl Drop for Foreign {
    fn drop(&mut self) {
        self.watcher.abort();
    }
}

impl Enroller {
    /// Opens what is new in the mount table, and forgets what is no longer in it.
    pub(super) fn look_elsewhere(&mut self, mounted: BTreeMap<u64, PathBuf>) {
        let ours: HashSet<u64> = self.names.values().copied().chain([self.own.inode()]).collect();
        for (inode, foreign) in self.foreign.extract_if(|inode, _| !mounted.contains_key(inode)) {
            if let Some(foreign) = foreign
                && !ours.contains(&inode)
            {
                self.maps.forget_namespace(foreign.netns.cookie());
            }
        }
        for (inode, path) in mounted {
            if ours.contains(&inode) || self.foreign.contains_key(&inode) {
                continue;
            }
            self.foreign.insert(inode, None);
            // What was there before the agent goes on undisturbed.
            let (maps, close) = (self.maps.clone(), self.caught_up);
            self.work(move |_| Message::Foreign { inode, fresh: close, result: setup::open(&path, &maps, close) });
        }
    }

    pub(super) fn take_foreign(&mut self, inode: u64, fresh: bool, result: Result<Option<Opened>, SetupError>) {
        if self.names.values().any(|ours| *ours == inode) {
            // It has got its name meanwhile. Who opens it by that has to know that it was closed just now, and by no predecessor: a pod
            // that has just started is one whose object may be to come.
            if !fresh {
                self.foreign.remove(&inode);
            }
            return;
        }
        match result {
            Ok(Some(Opened { netns, watch, addresses, former })) if netns.inode() == inode => {
                if self.tracked.contains_key(&netns.cookie()) {
                    return;
                }
                let watcher = addresses::watch(netns.cookie(), watch, self.messages.clone());
                // One that the programs did not know was closed when it was opened.
                let state = former.or(fresh.then_some(NamespaceState::Pending));
                self.foreign.insert(inode, Some(Foreign { netns, addresses, watcher, fresh, state, inquiry: Inquiry::Due }));
                self.judge_foreign(inode);
            }
            // Unmounted, or out of reach under another mount: what connects from it tells of itself.
            Ok(_) | Err(_) => drop(self.foreign.remove(&inode)),
        }
    }

    pub(super) fn set_foreign_addresses(&mut self, cookie: u64, addresses: BTreeSet<IpAddr>) {
        let mut known = self.foreign.iter_mut().filter_map(|(inode, foreign)| Some((*inode, foreign.as_mut()?)));
        let Some((inode, foreign)) = known.find(|(_, foreign)| foreign.netns.cookie() == cookie) else { return };
        foreign.addresses = addresses;
        if foreign.inquiry == Inquiry::Over {
            foreign.inquiry = Inquiry::Due;
        }
        self.judge_foreign(inode);
    }

    /// The controller was asked about these addresses. Without an answer, too, the namespace is somebody else's.
    pub(super) async fn take_foreign_answer(&mut self, inode: u64, addresses: &BTreeSet<IpAddr>) {
        self.take_pending_snapshot().await;
        let Some(Some(foreign)) = self.foreign.get_mut(&inode) else { return };
        foreign.inquiry = if foreign.addresses == *addresses { Inquiry::Over } else { Inquiry::Due };
        self.judge_foreign(inode);
    }

    fn inquire(&mut self, inode: u64) {
        let Some(Some(foreign)) = self.foreign.get_mut(&inode) else { return };
        foreign.inquiry = Inquiry::UnderWay;
        let (addresses, ask, messages) = (foreign.addresses.clone(), Arc::clone(&self.ask), self.messages.clone());
        self.tasks.spawn(async move {
            for address in &addresses {
                let _unanswered_counts_as_nobody = ask(*address).await;
            }
            tokio::time::sleep(tracked::UNKNOWN).await;
            let _owner_is_gone = messages.send(Message::ForeignAnswered { inode, addresses }).await;
        });
    }

    pub(super) fn judge_all_foreign(&mut self) {
        for inode in self.foreign.keys().copied().collect::<Vec<_>>() {
            self.judge_foreign(inode);
        }
    }

    fn judge_foreign(&mut self, inode: u64) {
        let Some(Some(foreign)) = self.foreign.get(&inode) else { return };
        let cookie = foreign.netns.cookie();
        let known = foreign.addresses.iter().any(|address| self.snapshot.workload_at(*address).is_some());
        let unknown = !foreign.addresses.is_empty() && !known && foreign.inquiry != Inquiry::Over;
        let untold = foreign.fresh && !self.agents.has_node(cookie) && (foreign.addresses.is_empty() || unknown);
        if untold && unknown && foreign.inquiry == Inquiry::Due {
            self.inquire(inode);
        }
        let Some(Some(foreign)) = self.foreign.get(&inode) else { return };
        let closed = self.left.contains(&cookie) || self.has_member_address(&foreign.addresses) || untold;
        let closed = closed && !self.agents.has_node(cookie);
        let (state, namespace) = match closed {
            true => (NamespaceState::Pending, Namespace::pending()),
            false => (NamespaceState::Exempt, Namespace::exempt()),
        };
        if foreign.state != Some(state) {
            self.mark(cookie, namespace);
            if let Some(Some(foreign)) = self.foreign.get_mut(&inode) {
                foreign.state = Some(state);
            }
        }
    }

    /// Whether one of these addresses is that of a pod of this node that is in the mesh.
    pub(super) fn has_member_address(&self, addresses: &BTreeSet<IpAddr>) -> bool {
        let mut workloads = addresses.iter().filter_map(|address| self.snapshot.workload_at(*address));
        workloads.any(|workload| workload.enrolled() && *workload.node == *self.snapshot.node())
    }
}
