//! One namespace of the node's directory, and the steps that bring it to what it should be.
//!
//! Enters: the pure decision of [`classify`]. Leaves: the kernel and the rest of the agent in line with it.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use culvert_ebpf_common::Namespace;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::classify::{self, Phase, Standing, Step};
use super::pods::Owner;
use super::setup::{Enrolled, Enrolment, SetupError, enrolled};
use super::{Enroller, FIRST_RETRY, LAST_RETRY, Message, pods};
use crate::capture::routing::Routing;
use crate::capture::{Listener, LocalPod, Netns, PodEvent};
use crate::model::{Snapshot, Workload};

/// For how long a new namespace stays closed although the controller knows nobody at its address, unless the node's kubelet says that it
/// is a pod: the pod's object may come after its namespace. Short enough for an application outside of the mesh that tries again for a second.
pub(super) const UNKNOWN: Duration = Duration::from_millis(800);

/// The same, while a pod of this node's is known that has no address yet: its namespace may be the one at hand, and a kubelet tells an
/// address a second or more after the network has it.
const AWAITED: Duration = Duration::from_secs(10);

/// How often it is looked whether that still holds.
const AGAIN: Duration = Duration::from_millis(300);

/// A namespace of the node's directory.
pub(super) struct Tracked {
    pub(super) netns: Netns,
    pub(super) names: BTreeSet<OsString>,
    pub(super) addresses: BTreeSet<IpAddr>,
    /// Addresses that the controller has said to be nobody's.
    pub(super) unknown: BTreeSet<IpAddr>,
    pub(super) watcher: Option<AbortHandle>,
    /// What it accepts is in line with the policies of the snapshot.
    pub(super) judged: bool,
    /// A retry is due.
    pub(super) waiting: bool,
    /// The programs did not know it when it appeared, and the agent was there: its object may be on its way.
    pub(super) fresh: bool,
    /// It was there before the agent was, and its pod has not been looked for: its address alone may be a former pod's.
    pub(super) unlooked: bool,
    /// Which pod it is, once the node has said.
    pub(super) owner: Option<Owner>,
    /// It is the pod's of a namespace that never joins.
    pub(super) excluded: bool,
    /// When its addresses last changed.
    pub(super) settled: Instant,
    /// When it appeared, among all.
    seen: u64,
    phase: Phase,
    pod: Option<Arc<LocalPod>>,
    routing: Routing,
    /// It is being enrolled.
    busy: bool,
    asking: bool,
    retry: Duration,
    contested: bool,
    disputed: bool,
}

/// What a pod's namespace is after it has been released.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Release {
    /// Closed, with its programs in place.
    Closed,
    /// None of ours.
    Exempt,
    /// Gone.
    Gone,
}

impl Tracked {
    pub(super) fn new(netns: Netns, name: OsString, phase: Phase, seen: u64) -> Self {
        Self {
            netns,
            names: BTreeSet::from([name]),
            addresses: BTreeSet::new(),
            unknown: BTreeSet::new(),
            watcher: None,
            judged: false,
            waiting: false,
            fresh: false,
            unlooked: false,
            owner: None,
            excluded: false,
            settled: Instant::now(),
            seen,
            phase,
            pod: None,
            routing: Routing::default(),
            busy: false,
            asking: false,
            retry: FIRST_RETRY,
            contested: false,
            disputed: false,
        }
    }

    /// Nothing leaves it.
    pub(super) fn is_pending(&self) -> bool {
        self.phase == Phase::Pending
    }

    /// How long its addresses are as they are, if it matters which pod it is.
    pub(super) fn wants_pod(&self) -> Option<Duration> {
        let age = self.settled.elapsed();
        let undecided = self.unlooked || matches!(self.phase, Phase::Pending | Phase::Inherited);
        // Until its pod is known, its address may have been taken for a former pod's.
        let unsure = self.owner.is_none() && age < pods::EAGER;
        (undecided || unsure).then_some(age)
    }

    /// Whether the controller will tell of it, as of every pod: a kubelet runs it, so that the API server has an object of it.
    fn will_be_told(&self, snapshot: &Snapshot) -> bool {
        snapshot.of_every_pod() && self.owner.is_some() && !self.excluded
    }

    fn backoff(&mut self) -> Duration {
        let delay = self.retry;
        self.retry = (delay * 2).min(LAST_RETRY);
        // Many pods that fail together do not try again together.
        delay.mul_f64(rand::random_range(0.5..1.0))
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        if let Some(watcher) = &self.watcher {
            watcher.abort();
        }
    }
}

impl Enroller {
    /// Brings a namespace to what it should be, as far as can be told now.
    pub(super) async fn reconcile(&mut self, cookie: u64) {
        let Some(tracked) = self.tracked.get_mut(&cookie) else { return };
        if tracked.busy || tracked.unlooked || tracked.names.is_empty() {
            return;
        }
        if let Some(owner) = &mut tracked.owner
            && let Some(workload) = self.snapshot.pod(&owner.uid)
        {
            owner.workload = Some(Arc::clone(&workload.uid));
        }
        let Some(tracked) = self.tracked.get(&cookie) else { return };
        let standing = self.standing(cookie, tracked);
        self.tell_dispute(cookie, standing == Standing::Disputed);
        let Some(tracked) = self.tracked.get(&cookie) else { return };
        match classify::next(&tracked.phase, standing) {
            Step::Stay => {}
            Step::Ask(address) => self.ask(cookie, address),
            Step::Close => self.release(cookie, Release::Closed).await,
            Step::Exempt => {
                let named = tracked.owner.as_ref().is_some_and(|owner| owner.workload.is_some());
                if tracked.excluded || named || self.is_of_this_node(&tracked.addresses) {
                    self.claim_from_others(cookie);
                }
                tracing::debug!(cookie, "a network namespace is none of the mesh's");
                self.release(cookie, Release::Exempt).await;
            }
            Step::Enrol(workload) => {
                self.claim_from_others(cookie);
                self.enrol(cookie, workload).await;
            }
            Step::Reenrol(workload) => {
                self.release(cookie, Release::Closed).await;
                self.enrol(cookie, workload).await;
            }
            Step::Update(workload) => self.update(cookie, workload).await,
        }
    }

    fn standing(&self, cookie: u64, tracked: &Tracked) -> Standing {
        if self.agents.has_node(cookie) {
            return Standing::Exempt;
        }
        let owner = tracked.owner.as_ref();
        let told = classify::classify(&tracked.addresses, owner, &tracked.phase, &self.snapshot, &tracked.unknown);
        pods::known(told, tracked)
    }

    /// Tells once of a pod that stays closed since node and controller do not agree on its addresses.
    fn tell_dispute(&mut self, cookie: u64, disputed: bool) {
        let Some(tracked) = self.tracked.get_mut(&cookie) else { return };
        if std::mem::replace(&mut tracked.disputed, disputed) || !disputed {
            return;
        }
        if let Some(owner) = &tracked.owner {
            tracing::info!(
                pod_uid = %owner.uid,
                addresses = ?tracked.addresses,
                "the controller knows an address of the pod's as another's, or several may be its own: it stays closed until that is put right"
            );
        }
    }

    /// Whether what has these addresses is a pod of this node's, in the mesh or not.
    fn is_of_this_node(&self, addresses: &BTreeSet<IpAddr>) -> bool {
        let mut workloads = addresses.iter().filter_map(|address| self.snapshot.workload_at(*address));
        workloads.any(|workload| *workload.node == *self.snapshot.node())
    }

    /// Releases the pods whose namespaces have no name any more, and forgets those.
    pub(super) async fn reconcile_vanished(&mut self) {
        if self.vanished.is_empty() {
            return;
        }
        for cookie in std::mem::take(&mut self.vanished) {
            let Some(tracked) = self.tracked.get(&cookie) else { continue };
            if !tracked.names.is_empty() {
                continue;
            }
            if tracked.busy {
                self.vanished.insert(cookie);
                continue;
            }
            self.release(cookie, Release::Gone).await;
            self.set_addresses(cookie, BTreeSet::new());
            if let Some(tracked) = self.tracked.remove(&cookie) {
                self.cookies.remove(&tracked.netns.inode());
            }
        }
        self.reconcile_contested().await;
    }

    /// Looks again at the namespaces that wait for another to give an address up.
    pub(super) async fn reconcile_contested(&mut self) {
        let contested: Vec<_> = self.tracked.iter().filter(|(_, tracked)| tracked.contested).map(|(cookie, _)| *cookie).collect();
        for cookie in contested {
            self.reconcile(cookie).await;
        }
    }

    fn ask(&mut self, cookie: u64, address: IpAddr) {
        let Some(tracked) = self.tracked.get_mut(&cookie) else { return };
        if tracked.waiting || std::mem::replace(&mut tracked.asking, true) {
            return;
        }
        let (answer, messages) = ((self.ask)(address), self.messages.clone());
        self.tasks.spawn(async move {
            let answered = answer.await.is_some();
            let _owner_is_gone = messages.send(Message::Answered { cookie, address, answered }).await;
        });
    }

    pub(super) async fn take_answer(&mut self, cookie: u64, address: IpAddr, answered: bool) {
        self.take_pending_snapshot().await;
        let known = self.snapshot.workload_at(address).is_some();
        let Some(tracked) = self.tracked.get_mut(&cookie) else { return };
        let patience = if self.snapshot.awaits_address() { AWAITED } else { UNKNOWN };
        let patience = patience.saturating_sub(tracked.settled.elapsed());
        if answered && !known && tracked.fresh && !patience.is_zero() {
            // The snapshot has the object as soon as there is one: the question stays open meanwhile.
            let messages = self.messages.clone();
            self.tasks.spawn(async move {
                tokio::time::sleep(patience.min(AGAIN)).await;
                let _owner_is_gone = messages.send(Message::Answered { cookie, address, answered }).await;
            });
            return;
        }
        tracked.asking = false;
        if answered && !known && tracked.will_be_told(&self.snapshot) && tracked.phase != Phase::Exempt {
            // The controller is behind: what it does not know lets nothing out.
            self.retry(cookie);
        } else if answered {
            if !known && tracked.addresses.contains(&address) {
                tracked.unknown.insert(address);
            }
            self.reconcile(cookie).await;
        } else {
            self.retry(cookie);
        }
    }

    /// A namespace turns out to be a pod's, by the node's word. Was it let out as nobody's, because the controller did not know its
    /// addresses, then that was too soon.
    pub(super) async fn doubt(&mut self, cookie: u64) {
        let Some(tracked) = self.tracked.get_mut(&cookie) else { return };
        let unknown = |address: &IpAddr| tracked.unknown.contains(address) && self.snapshot.workload_at(*address).is_none();
        let nobodys = !tracked.addresses.is_empty() && tracked.addresses.iter().all(unknown);
        if nobodys && tracked.phase == Phase::Exempt && tracked.will_be_told(&self.snapshot) {
            tracing::debug!(cookie, "a network namespace was taken for nobody's, and is a pod's");
            tracked.unknown.clear();
            self.release(cookie, Release::Closed).await;
        }
    }

    /// Looks at a namespace again after a while.
    fn retry(&mut self, cookie: u64) {
        let Some(tracked) = self.tracked.get_mut(&cookie) else { return };
        if std::mem::replace(&mut tracked.waiting, true) {
            return;
        }
        let (delay, messages) = (tracked.backoff(), self.messages.clone());
        self.tasks.spawn(async move {
            tokio::time::sleep(delay).await;
            let _owner_is_gone = messages.send(Message::Retry { cookie }).await;
        });
    }

    async fn enrol(&mut self, cookie: u64, workload: Arc<Workload>) {
        if !self.claim(cookie, &workload).await {
            return;
        }
        let Some(tracked) = self.tracked.get_mut(&cookie) else { return };
        if tracked.waiting {
            return;
        }
        tracked.busy = true;
        tracked.judged = true;
        let (netns, routing) = (tracked.netns.clone(), tracked.routing.clone());
        let (maps, lookup, snapshot) = (self.maps.clone(), self.lookup.clone(), Arc::clone(&self.snapshot));
        let generation = self.same_node.next_generation();
        self.spawn_blocking(move |runtime| {
            let runtime = runtime.clone();
            let enrolment = Enrolment { netns, workload, snapshot, routing, maps, generation, lookup, runtime };
            let result = enrolment.run();
            Message::Enrolled { cookie, workload: enrolment.workload, result }
        });
    }

    /// Whether a namespace may be enrolled as this workload: only one can be, and it is the one that was enrolled first for as long
    /// as its own object is there; else the one that appeared last.
    async fn claim(&mut self, cookie: u64, workload: &Workload) -> bool {
        let Some(seen) = self.tracked.get(&cookie).map(|tracked| tracked.seen) else { return false };
        let rivals: Vec<u64> = workload
            .addresses
            .iter()
            .flat_map(|address| self.holders.get(address).into_iter().flatten())
            .copied()
            .filter(|rival| *rival != cookie && !self.agents.has_node(*rival))
            .collect();
        for rival in rivals {
            let Some(other) = self.tracked.get(&rival) else { continue };
            let established = match &other.phase {
                Phase::Enrolled(current) => self.snapshot.workload(&current.uid).is_some(),
                Phase::Pending | Phase::Exempt | Phase::Inherited => false,
            };
            if established || other.seen > seen || other.busy {
                self.contest(cookie, workload);
                return false;
            }
            if other.pod.is_some() {
                self.release(rival, Release::Closed).await;
            }
        }
        if let Some(tracked) = self.tracked.get_mut(&cookie) {
            tracked.contested = false;
        }
        true
    }

    fn contest(&mut self, cookie: u64, workload: &Workload) {
        let Some(tracked) = self.tracked.get_mut(&cookie) else { return };
        if !std::mem::replace(&mut tracked.contested, true) {
            tracing::warn!(
                pod = %workload.name,
                namespace = workload.identity.namespace(),
                "another network namespace has the pod's address: this one stays closed until that is gone"
            );
        }
    }

    pub(super) async fn finish_enrolment(&mut self, cookie: u64, workload: Arc<Workload>, result: Result<Enrolled, SetupError>) {
        let Some(tracked) = self.tracked.get_mut(&cookie) else { return };
        tracked.busy = false;
        let made = result.and_then(|enrolled| {
            let listeners = enrolled.listeners.into_iter().map(|(kind, address, socket)| Listener::new(kind, address, socket));
            let listeners: std::io::Result<Vec<_>> = listeners.collect();
            Ok((enrolled.generation, enrolled.routing, listeners.map_err(SetupError::Listener)?))
        });
        match made {
            Ok((generation, routing, listeners)) => {
                tracked.retry = FIRST_RETRY;
                let inherited = std::mem::replace(&mut tracked.phase, Phase::Enrolled(Arc::clone(&workload))) == Phase::Inherited;
                let pod = Arc::new(LocalPod::new(tracked.netns.clone(), Arc::clone(&workload), generation, Some(routing)));
                tracked.pod = Some(Arc::clone(&pod));
                tracing::debug!(pod = %workload.name, namespace = workload.identity.namespace(), "enrolled");
                let _nobody_serves = self.pods.send(PodEvent::Enrolled { pod, listeners, inherited }).await;
                self.reconcile(cookie).await;
            }
            Err(error) => {
                tracing::warn!(%error, pod = %workload.name, namespace = workload.identity.namespace(), "cannot enrol; the pod stays closed");
                self.withdraw(cookie, &workload.addresses, Release::Closed);
                self.retry(cookie);
            }
        }
    }

    /// What an enrolled pod accepts may have changed.
    async fn update(&mut self, cookie: u64, workload: Arc<Workload>) {
        let Some(tracked) = self.tracked.get_mut(&cookie) else { return };
        let Phase::Enrolled(current) = &tracked.phase else { return };
        if tracked.judged && Arc::ptr_eq(current, &workload) {
            return;
        }
        let wanted = classify::admissions(&workload, &self.snapshot);
        let result = workload.addresses.iter().try_for_each(|address| self.maps.set_admissions(*address, &wanted));
        // Whoever decides by the new generation finds the new workload; and from here on verdicts on the pod are void.
        let generation = self.same_node.next_generation();
        if let Some(pod) = &tracked.pod {
            pod.set_workload(Arc::clone(&workload));
        }
        let result = result.and(self.maps.set_namespace(cookie, enrolled(&workload.addresses, generation)));
        if let (Ok(()), Some(pod)) = (&result, &tracked.pod) {
            pod.set_generation(generation);
        }
        let updated = tracked.pod.clone().map(PodEvent::Updated);
        tracked.phase = Phase::Enrolled(workload);
        tracked.judged = result.is_ok();
        if let Err(error) = result {
            tracing::error!(%error, "the kernel does not take what a pod accepts: trying again");
            self.retry(cookie);
        }
        if let Some(updated) = updated {
            let _nobody_serves = self.pods.send(updated).await;
        }
    }

    /// Ends a pod's enrolment, if there is one, and marks its namespace.
    async fn release(&mut self, cookie: u64, release: Release) {
        let Some(tracked) = self.tracked.get_mut(&cookie) else { return };
        tracked.contested = false;
        let pod = tracked.pod.take();
        let inherited = tracked.phase == Phase::Inherited;
        let alone = |address: &&IpAddr| self.holders.get(*address).is_none_or(|holders| holders.len() < 2);
        let addresses = match &pod {
            Some(pod) => pod.addresses.clone(),
            None if inherited => tracked.addresses.iter().filter(alone).copied().collect(),
            None => Vec::new(),
        };
        self.withdraw(cookie, &addresses, release);
        if release == Release::Gone && (pod.is_some() || inherited) {
            self.leave(cookie);
        }
        let Some(pod) = pod else { return };
        if release == Release::Gone {
            pod.gone.cancel();
        }
        pod.released.cancel();
        tracing::debug!(pod = %pod.workload().name, namespace = pod.workload().identity.namespace(), ?release, "released");
        let _nobody_serves = self.pods.send(PodEvent::Released(pod)).await;
    }

    /// Takes a namespace's entries out of the kernel, in the reverse order of enrolment.
    fn withdraw(&mut self, cookie: u64, addresses: &[IpAddr], release: Release) {
        let Some(tracked) = self.tracked.get_mut(&cookie) else { return };
        tracked.phase = if release == Release::Exempt { Phase::Exempt } else { Phase::Pending };
        match release {
            Release::Closed => self.mark(cookie, Namespace::pending()),
            Release::Exempt => self.mark(cookie, Namespace::exempt()),
            Release::Gone => {
                self.maps.forget_namespace(cookie);
                self.agents.disclaim(cookie);
            }
        }
        if release != Release::Closed
            && let Err(error) = self.lookup.detach(cookie)
        {
            tracing::warn!(%error, cookie, "cannot detach from a network namespace");
        }
        for address in addresses {
            self.maps.forget_listeners(*address);
            self.maps.forget_admissions(*address);
        }
    }
}
