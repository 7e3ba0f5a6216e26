//! Connections between two pods of this node that stay in the kernel, where both of them may.
//!
//! ```text
//! outbound: first connection, in a tunnel ─> consider ─> verdict ─> connect programs let later ones go straight to the pod
//! programs: opened, ended ─> accounted for, as if the agent had carried it            change ─> recheck ─> destroyed if denied
//! ```
//!
//! Enters: a connection that outbound has carried, and what the programs tell. Leaves: verdicts for the kernel; metrics, access log and
//! open connections. A verdict is given for what the destination's policies allow this very source by the identity that the agent
//! enrolled it with, where neither end asks for encryption; it is bound to both pods' generations, so that it is void before the agent
//! begins to look at what a change denies, and ends with the first of both certificates.

mod between;

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use foldhash::fast::RandomState;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};
use tracing::warn;

use self::between::{Between, Ends, Kept};
use crate::capture::{LocalPod, Maps, SameNodeConnection, SameNodeEvents, SameNodeMaps};
use crate::identity::{Clock, SvidStore};
use crate::model::{CloseReason, Flow, SameNode as Way, Snapshot, SpiffeId, Workload};
use crate::observe::{Observer, OpenConnection};
use crate::policy::evaluate::{Evaluation, judge};

/// How often it is looked whether the end of a connection could not be told.
const LOOK: Duration = Duration::from_secs(10);

/// The connections of this node's pods that stay in the kernel.
pub struct SameNode {
    maps: SameNodeMaps,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    svids: SvidStore,
    clock: Arc<dyn Clock>,
    observer: Observer,
    pods: Mutex<Pods>,
    decided: Mutex<HashMap<(u64, SocketAddr), Decided>>,
    between: Mutex<Kept>,
    open: Mutex<HashMap<u64, Open, RandomState>>,
    called_off: Mutex<HashMap<u64, CloseReason, RandomState>>,
}

/// The enrolled pods.
#[derive(Default)]
struct Pods {
    by_netns: HashMap<u64, Arc<LocalPod>, RandomState>,
    by_address: HashMap<IpAddr, Arc<LocalPod>>,
}

/// What was decided on connections of a pod to an address.
struct Decided {
    /// The source's generation and the destination's.
    generations: [u64; 2],
    evaluation: Arc<Evaluation>,
}

/// A connection that is open.
struct Open {
    outbound: OpenConnection,
    /// None where the destination's end is the agent, which accounts for it itself.
    inbound: Option<OpenConnection>,
    source: Option<Arc<Workload>>,
}

/// Who opened a connection that is attested.
pub struct Attested {
    /// The connection's number.
    pub id: u64,
    /// The source's workload; none when nobody can tell any more.
    pub source: Option<Arc<Workload>>,
}

impl Attested {
    /// The source's identity, as the agent enrolled it.
    #[must_use]
    pub fn identity(&self) -> Option<SpiffeId> {
        self.source.as_ref().map(|workload| workload.identity.clone())
    }

    /// Whether the connection must be encrypted, as it is not.
    #[must_use]
    pub fn lacks_encryption(&self, destination: &Workload) -> bool {
        self.source.iter().any(|source| source.same_node == Way::Tunnel) || destination.same_node == Way::Tunnel
    }
}

impl SameNode {
    /// Knows of no pod yet.
    #[must_use]
    pub fn new(
        maps: SameNodeMaps,
        snapshots: watch::Receiver<Arc<Snapshot>>,
        svids: SvidStore,
        clock: Arc<dyn Clock>,
        observer: Observer,
    ) -> Arc<Self> {
        let (pods, decided, between) = (Mutex::default(), Mutex::default(), Mutex::default());
        let (open, called_off) = (Mutex::default(), Mutex::default());
        Arc::new(Self { maps, snapshots, svids, clock, observer, pods, decided, between, open, called_off })
    }

    /// A pod is enrolled.
    pub fn add(&self, pod: &Arc<LocalPod>) {
        let mut pods = lock(&self.pods);
        pods.by_netns.insert(pod.netns.cookie(), Arc::clone(pod));
        for address in &pod.addresses {
            pods.by_address.insert(*address, Arc::clone(pod));
        }
    }

    /// A pod has left the mesh or the node. Another may have its addresses already.
    pub fn remove(&self, pod: &Arc<LocalPod>) {
        let mut pods = lock(&self.pods);
        if pods.by_netns.get(&pod.netns.cookie()).is_some_and(|known| Arc::ptr_eq(known, pod)) {
            pods.by_netns.remove(&pod.netns.cookie());
        }
        pods.by_address.retain(|_, known| !Arc::ptr_eq(known, pod));
    }

    /// Lets later connections of `source` to `destination` go straight there, if that is a pod of this node's, and policies and both ends'
    /// settings let them. `client` is the end of one that the agent has just carried, as it was dialled: no service's address.
    pub fn consider(&self, source: &LocalPod, client: SocketAddr, destination: SocketAddr) {
        let Some(to) = lock(&self.pods).by_address.get(&destination.ip()).cloned() else { return };
        // These first: what is looked at after them is at least as new.
        let generations = [source.generation(), to.generation()];
        let snapshot = Arc::clone(&self.snapshots.borrow());
        let now = |pod: &LocalPod| {
            let known = pod.workload();
            snapshot.workload(&known.uid).cloned().unwrap_or(known)
        };
        let (from, into) = (now(source), now(&to));
        let encrypt = from.same_node == Way::Tunnel || into.same_node == Way::Tunnel;
        if encrypt || !into.tunnelled(destination.port()) || !source.addresses.contains(&client.ip()) {
            return;
        }
        let evaluation =
            judge(&snapshot, &into, &Flow { source_identity: Some(from.identity.clone()), source: client, destination });
        if !evaluation.verdict.allowed() {
            return;
        }
        // A tunnel would need them, too.
        let Some(lasting) = [&from, &into].iter().map(|pod| self.certified(pod)).min().flatten() else { return };
        let decided = Decided { generations, evaluation: Arc::new(evaluation) };
        lock(&self.decided).insert((source.netns.cookie(), destination), decided);
        self.maps.allow(source, &to, destination, generations, lasting);
    }

    /// How long the workload's certificate lasts from now on; none when it has none.
    fn certified(&self, workload: &Workload) -> Option<Duration> {
        self.svids.current(&workload.identity)?.not_after.duration_since(self.clock.now()).ok()
    }

    /// Who opened the connection between these ends, if it is one of those that stay in the kernel.
    #[must_use]
    pub fn attested(&self, source: SocketAddr, destination: SocketAddr) -> Option<Attested> {
        let connection = self.maps.find(source, destination)?;
        let enrolled = self.pod(connection.source_netns).map(|pod| pod.workload());
        // One that has left the mesh since is still who it was then; and one that a predecessor enrolled is about to be again.
        let source = enrolled.or_else(|| lock(&self.open).get(&connection.id)?.source.clone()).or_else(|| {
            let snapshot = self.snapshots.borrow();
            let there = snapshot.workload_at(source.ip()).filter(|workload| workload.enrolled());
            there.filter(|workload| *workload.node == *snapshot.node()).cloned()
        });
        Some(Attested { id: connection.id, source })
    }

    /// The agent ends an open connection.
    pub fn call_off(&self, id: u64, reason: CloseReason) {
        lock(&self.called_off).insert(id, reason);
    }

    /// The pods that `source` has connections to which stay in the kernel. Takes a system call for each such connection of the node.
    #[must_use]
    pub fn destinations_of(&self, source: &LocalPod) -> Vec<Arc<LocalPod>> {
        let from = source.netns.cookie();
        let connections = self.maps.all().into_iter().filter(|connection| connection.source_netns == from);
        let mut destinations: Vec<_> = connections.map(|connection| connection.destination_netns).collect();
        destinations.sort_unstable();
        destinations.dedup();
        destinations.into_iter().filter_map(|netns| self.pod(netns)).collect()
    }

    /// Accounts for the connections that the programs tell of, for ever.
    pub async fn run(self: Arc<Self>, mut events: SameNodeEvents, programs: Maps) {
        let mut look = interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut news, mut untold) = (Vec::new(), Vec::new());
        let (mut delayed, mut bundle) = (0, self.svids.bundle());
        bundle.mark_unchanged();
        loop {
            tokio::select! {
                read = events.next(&mut news) => if let Err(error) = read {
                    warn!(%error, "cannot read what the programs tell of connections within the node: they are not accounted for");
                    return;
                },
                Ok(()) = bundle.changed() => {
                    // Others are believed now than those by whom it was decided.
                    if let Err(error) = self.maps.void_all() {
                        warn!(%error, "verdicts on connections within the node outlive the roots of their day");
                    }
                }
                _ = look.tick() => {
                    self.forget_decisions();
                    lock(&self.between).drop_unused();
                    let count = programs.outcomes().into_iter().find(|(word, _)| *word == SameNodeMaps::delayed());
                    let count = count.map_or(0, |(_, count)| count);
                    if std::mem::replace(&mut delayed, count) != count {
                        untold = self.maps.take_untold();
                        // That one of these was open may be among what was told before.
                        events.rest(&mut news);
                    }
                }
            }
            let over: HashSet<_, RandomState> = news.iter().filter(|told| told.ended.is_some()).map(|told| told.id).collect();
            // What is over already was never seen open: all that is to be told of it comes with its end.
            for connection in news.drain(..).filter(|told| told.ended.is_some() || !over.contains(&told.id)) {
                self.hear(&connection);
            }
            untold.drain(..).for_each(|connection| self.hear(&connection));
        }
    }

    fn hear(&self, connection: &SameNodeConnection) {
        match connection.ended {
            None => {
                let open = self.opened(connection);
                lock(&self.open).insert(connection.id, open);
            }
            Some(reason) if connection.lasted.is_some() => self.closed(connection, reason),
            Some(reason) => self.failed(connection, reason),
        }
    }

    fn opened(&self, connection: &SameNodeConnection) -> Open {
        let between = self.between(connection);
        count_policies(connection, &between);
        let [outbound, inbound] = between.infos(connection.source.port());
        let source = outbound.source.clone();
        let inbound = (!connection.steered).then(|| self.observer.open(inbound));
        Open { outbound: self.observer.open(outbound), inbound, source }
    }

    fn closed(&self, connection: &SameNodeConnection, reason: CloseReason) {
        let reason = lock(&self.called_off).remove(&connection.id).unwrap_or(reason);
        let lasted = connection.lasted.unwrap_or_default();
        let Some(Open { outbound, inbound, .. }) = lock(&self.open).remove(&connection.id) else {
            // That it was open was told at once with its end, to a predecessor, or to nobody.
            let between = self.between(connection);
            count_policies(connection, &between);
            let [outbound, inbound] = &between.recurring;
            for recurring in [Some(outbound), (!connection.steered).then_some(inbound)].into_iter().flatten() {
                let bytes = [connection.sent, connection.received];
                self.observer.carried(recurring, connection.source.port(), bytes, lasted, reason);
            }
            return;
        };
        for open in [Some(outbound), inbound].into_iter().flatten() {
            open.bytes().sent.store(connection.sent, Ordering::Relaxed);
            open.bytes().received.store(connection.received, Ordering::Relaxed);
            open.close_after(lasted, reason);
        }
    }

    fn failed(&self, connection: &SameNodeConnection, reason: CloseReason) {
        let [outbound, inbound] = self.between(connection).infos(connection.source.port());
        let refused = reason == CloseReason::DestinationRefused;
        let detail = if refused {
            "the destination's kernel refused it: nothing listens there"
        } else {
            "no answer came, or the client gave up before"
        };
        self.observer.fail(&outbound, reason, &detail);
        if refused {
            self.observer.fail(&inbound, reason, &detail);
        }
    }

    /// What the connection has in common with others between the same two pods.
    fn between(&self, connection: &SameNodeConnection) -> Arc<Between> {
        let ends = self.ends(connection);
        if let Some(between) = lock(&self.between).get(connection, &ends) {
            return between;
        }
        let evaluation = self.evaluation(connection);
        let between = Arc::new(Between::new(connection, ends, evaluation.as_deref(), &self.observer));
        lock(&self.between).keep(connection, &between);
        between
    }

    fn ends(&self, connection: &SameNodeConnection) -> Ends {
        let enrolled = {
            let pods = lock(&self.pods);
            [connection.source_netns, connection.destination_netns]
                .map(|netns| pods.by_netns.get(&netns).map(|pod| pod.workload()))
        };
        let [source, destination] = enrolled;
        let at = |address: SocketAddr| self.snapshots.borrow().workload_at(address.ip()).cloned();
        [source.or_else(|| at(connection.source)), destination.or_else(|| at(connection.destination))]
    }

    /// What policies said of such a connection, those that are not enforced included.
    fn evaluation(&self, connection: &SameNodeConnection) -> Option<Arc<Evaluation>> {
        let decided = lock(&self.decided)
            .get(&(connection.source_netns, connection.destination))
            .filter(|decided| decided.generations[1] == connection.generation)
            .map(|decided| Arc::clone(&decided.evaluation));
        decided.or_else(|| {
            let into = self.pod(connection.destination_netns)?.workload();
            let from = self.pod(connection.source_netns)?.workload();
            let snapshot = Arc::clone(&self.snapshots.borrow());
            let (source, destination) = (connection.source, connection.destination);
            let flow = Flow { source_identity: Some(from.identity.clone()), source, destination };
            Some(Arc::new(judge(&snapshot, &into, &flow)))
        })
    }

    fn forget_decisions(&self) {
        let pods = lock(&self.pods);
        let generation = |netns: &u64| pods.by_netns.get(netns).map(|pod| pod.generation());
        let at = |address: IpAddr| pods.by_address.get(&address).map(|pod| pod.generation());
        lock(&self.decided)
            .retain(|(source, destination), decided| [generation(source), at(destination.ip())] == decided.generations.map(Some));
    }

    fn pod(&self, netns: u64) -> Option<Arc<LocalPod>> {
        lock(&self.pods).by_netns.get(&netns).cloned()
    }
}

impl Drop for SameNode {
    /// The agent ends, and these connections go on.
    fn drop(&mut self) {
        for (_, Open { outbound, inbound, .. }) in lock(&self.open).drain() {
            outbound.leave();
            inbound.into_iter().for_each(OpenConnection::leave);
        }
    }
}

/// Where the destination's end is the agent, that counts them itself.
fn count_policies(connection: &SameNodeConnection, between: &Between) {
    if let Some(verdicts) = between.verdicts.as_ref().filter(|_| !connection.steered) {
        verdicts.count();
    }
}

/// Every change of what is locked is one call: it is whole also after a panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
