//! Pods in and out: the task that knows every network namespace of the node and keeps the kernel's view of it.
//!
//! Enters: namespaces that appear and vanish, their addresses and pods, snapshots, and what the programs refused. Leaves:
//! [`PodEvent`]s, and entries in the maps. One task owns all state; what blocks runs on other threads and comes back as a `Message`. A
//! namespace is open only after it is known to be none of ours, or fully enrolled; in every other moment nothing leaves it.

mod addresses;
mod classify;
mod foreign;
mod places;
mod pods;
mod setup;
mod tracked;
mod watch;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::ffi::OsString;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use culvert_ebpf_common::{Namespace, NamespaceState};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::classify::Phase;
use self::foreign::Foreign;
use self::pods::NodePods;
use self::setup::{Enrolled, Opened, SetupError};
use self::tracked::Tracked;
use self::watch::MountTable;
pub(super) use self::watch::NetnsDir;
use super::events::{self, Report};
use super::load::{Loaded, LookupProgram};
use super::maps::monotonic;
use super::others::Agents;
use super::{Ask, CaptureError, LoadConfig, Maps, Netns, PodEvent, SameNodeMaps};
use crate::model::{Snapshot, Workload};

/// How many namespaces are entered at a time.
const WORKERS: usize = 8;
/// How long changes of the mount table are gathered before it is read as a whole.
const SETTLE: Duration = Duration::from_millis(20);
/// How long passes at least between two looks at everything that refused connections ask for.
const LOOK_PAUSE: Duration = Duration::from_millis(10);
/// Of so much time one part at most goes into such looks: on a machine with many mounts a look takes long.
const LOOK_SHARE: u32 = 4;
/// How long passes at least before other agents' settings are read again.
const AGENTS_READ: Duration = Duration::from_millis(100);
/// For how long the kernel goes on refusing unseen namespaces after the agent's last sign of life, on a shared cgroup root.
const LEASE: Duration = Duration::from_secs(3);
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(10);
const QUEUE: usize = 1024;

/// What other tasks and threads tell the owner of the state.
enum Message {
    /// A namespace of the directory was opened.
    Opened { name: OsString, result: Result<Option<Opened>, SetupError> },
    /// A namespace elsewhere was opened.
    Foreign { inode: u64, fresh: bool, result: Result<Option<Opened>, SetupError> },
    /// The namespace of a process that was refused.
    Unmounted { netns: Option<Netns>, addresses: BTreeSet<IpAddr> },
    /// A namespace's addresses changed.
    Addresses { cookie: u64, addresses: BTreeSet<IpAddr> },
    /// An enrolment ended.
    Enrolled { cookie: u64, workload: Arc<Workload>, result: Result<Enrolled, SetupError> },
    /// The controller was asked about an address; false when it has not answered.
    Answered { cookie: u64, address: IpAddr, answered: bool },
    /// The controller was asked about the addresses of a namespace elsewhere.
    ForeignAnswered { inode: u64, addresses: BTreeSet<IpAddr> },
    /// It was looked which pods namespaces are.
    Pods(pods::Found),
    /// It is time to look at a namespace again.
    Retry { cookie: u64 },
}

/// The owner of the state.
pub(super) struct Enroller {
    config: LoadConfig,
    maps: Maps,
    same_node: SameNodeMaps,
    lookup: LookupProgram,
    snapshots: tokio::sync::watch::Receiver<Arc<Snapshot>>,
    snapshot: Arc<Snapshot>,
    ask: Ask,
    pods: mpsc::Sender<PodEvent>,
    messages: mpsc::Sender<Message>,
    inbox: Option<mpsc::Receiver<Message>>,
    reports: Option<mpsc::Receiver<Report>>,
    workers: Arc<Semaphore>,
    tasks: tokio::task::JoinSet<()>,
    directory: NetnsDir,
    own: Netns,
    /// Names in the directory that have a namespace, by its inode.
    names: HashMap<OsString, u64>,
    /// Names that have none yet.
    unripe: BTreeSet<OsString>,
    tracked: HashMap<u64, Tracked>,
    /// Cookies of tracked namespaces, by inode.
    cookies: HashMap<u64, u64>,
    /// Tracked namespaces by their addresses.
    holders: HashMap<IpAddr, BTreeSet<u64>>,
    /// Tracked namespaces that may have lost their last name.
    vanished: BTreeSet<u64>,
    seen: u64,
    /// Namespaces mounted elsewhere, by inode; none while one is being opened.
    foreign: HashMap<u64, Option<Foreign>>,
    unmounted: VecDeque<u64>,
    /// Namespaces of pods that are gone. What still runs in one, or keeps it mounted elsewhere, does not get out in the clear.
    left: VecDeque<u64>,
    agents: Agents,
    agents_read: Option<Instant>,
    claimed_id: u32,
    /// The programs refuse what was not seen for ever, by themselves.
    dedicated: bool,
    /// None: no kubelet keeps pods in cgroups that the agent can tell from others.
    node_pods: Option<NodePods>,
    /// When to look for them.
    pods_at: Option<Instant>,
    looking_for_pods: bool,
    /// How many namespaces are being opened.
    opening: usize,
    /// Processes that were refused since the last look, by the cookie of their namespace.
    reported: HashMap<u64, u32>,
    /// Those of before, to be looked up when all that was seen then is open.
    unresolved: HashMap<u64, u32>,
    look_at: Option<Instant>,
    looked: Instant,
    /// How long the last look took.
    look_took: Duration,
    caught_up: bool,
    destinations_stale: bool,
}

impl Enroller {
    pub(super) fn new(
        config: LoadConfig,
        directory: NetnsDir,
        loaded: Loaded,
        mut snapshots: tokio::sync::watch::Receiver<Arc<Snapshot>>,
        ask: Ask,
        pods: mpsc::Sender<PodEvent>,
    ) -> Self {
        let (messages, inbox) = mpsc::channel(QUEUE);
        let (reporter, reports) = mpsc::channel(QUEUE);
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn(loaded.program_log);
        tasks.spawn(async move {
            if let Err(error) = events::read(loaded.events, reporter).await {
                tracing::warn!(%error, "cannot read what the programs tell; new pods are found by their files alone");
            }
        });
        let snapshot = snapshots.borrow_and_update().clone();
        let node_pods = loaded.pods_cgroup.as_deref().map(|cgroups| NodePods::new(&config.excluded_namespaces, cgroups));
        let now = Instant::now();
        Self {
            config,
            maps: loaded.maps,
            same_node: loaded.same_node,
            lookup: loaded.lookup,
            snapshots,
            snapshot,
            ask,
            pods,
            messages,
            inbox: Some(inbox),
            reports: Some(reports),
            workers: Arc::new(Semaphore::new(WORKERS)),
            tasks,
            directory,
            own: loaded.own,
            names: HashMap::new(),
            unripe: BTreeSet::new(),
            tracked: HashMap::new(),
            cookies: HashMap::new(),
            holders: HashMap::new(),
            vanished: BTreeSet::new(),
            seen: 0,
            foreign: HashMap::new(),
            unmounted: VecDeque::new(),
            left: VecDeque::new(),
            agents: Agents::default(),
            agents_read: None,
            claimed_id: loaded.claimed_id,
            dedicated: loaded.dedicated,
            node_pods,
            pods_at: None,
            looking_for_pods: false,
            opening: 0,
            reported: HashMap::new(),
            unresolved: HashMap::new(),
            look_at: None,
            looked: now,
            look_took: Duration::ZERO,
            caught_up: false,
            destinations_stale: false,
        }
    }

    /// Runs until `shutdown`, or until nobody receives pods.
    pub(super) async fn run(mut self, shutdown: CancellationToken) -> Result<(), CaptureError> {
        let failed = |source| CaptureError::Mounts { source };
        let mounts = MountTable::watch().map_err(failed)?;
        let Some(mut inbox) = self.inbox.take() else { return Ok(()) };
        let Some(mut reports) = self.reports.take() else { return Ok(()) };
        self.sync_tables();
        self.look();
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return Ok(()),
                () = self.pods.closed() => return Ok(()),
                Some(message) = inbox.recv() => self.receive(message).await,
                news = self.directory.next() => self.hear(news),
                changed = mounts.changed() => {
                    changed.map_err(failed)?;
                    self.ripen();
                    self.look_again(SETTLE);
                }
                Ok(()) = self.snapshots.changed() => self.advance().await,
                Some(report) = reports.recv() => self.consider(report).await,
                () = sleep_until(self.look_at) => self.look(),
                () = sleep_until(self.pods_at) => self.look_for_pods(),
            }
            self.reconcile_vanished().await;
        }
    }

    /// Takes over the newest snapshot.
    async fn advance(&mut self) {
        let newest = self.snapshots.borrow_and_update().clone();
        let judged_anew = !newest.same_policies(&self.snapshot);
        self.snapshot = newest;
        self.sync_tables();
        if judged_anew {
            self.tracked.values_mut().for_each(|tracked| tracked.judged = false);
        }
        for cookie in self.tracked.keys().copied().collect::<Vec<_>>() {
            self.reconcile(cookie).await;
        }
        self.judge_all_foreign();
    }

    /// What an answer of the controller's changed is in the channel before the answer is.
    async fn take_pending_snapshot(&mut self) {
        if self.snapshots.has_changed().unwrap_or(false) {
            self.advance().await;
        }
    }

    /// Brings the tables that are for all pods in line with the snapshot. What a predecessor knew stays until there is something
    /// to put in its place.
    fn sync_tables(&mut self) {
        if !self.snapshot.synced() {
            return;
        }
        let ranges = self.maps.sync_cluster_ranges(self.snapshot.cluster_ranges());
        let destinations = self.maps.sync_destinations(self.snapshot.destinations());
        let failed = ranges.and(destinations).err();
        if let Some(error) = &failed
            && !self.destinations_stale
        {
            tracing::error!(%error, "the kernel's table of the mesh is incomplete: some destinations are asked about, or missed");
        }
        self.destinations_stale = failed.is_some();
    }

    /// Runs what opens a namespace on a thread that may block, and has its message come back.
    fn work(&mut self, job: impl FnOnce(&tokio::runtime::Handle) -> Message + Send + 'static) {
        self.opening += 1;
        self.spawn_blocking(job);
    }

    fn spawn_blocking(&mut self, job: impl FnOnce(&tokio::runtime::Handle) -> Message + Send + 'static) {
        let (workers, messages) = (Arc::clone(&self.workers), self.messages.clone());
        self.tasks.spawn(async move {
            let Ok(permit) = workers.acquire_owned().await else { return };
            let runtime = tokio::runtime::Handle::current();
            let Ok(message) = tokio::task::spawn_blocking(move || job(&runtime)).await else { return };
            drop(permit);
            let _owner_is_gone = messages.send(message).await;
        });
    }

    async fn receive(&mut self, message: Message) {
        while self.tasks.try_join_next().is_some() {}
        match message {
            Message::Opened { name, result } => {
                self.opening -= 1;
                match result {
                    Ok(Some(opened)) => self.track(name, opened).await,
                    Ok(None) => self.unsettle(&name),
                    Err(error) => {
                        tracing::warn!(%error, "cannot open a network namespace");
                        self.unsettle(&name);
                    }
                }
                self.catch_up();
            }
            Message::Foreign { inode, fresh, result } => {
                self.opening -= 1;
                self.take_foreign(inode, fresh, result);
                self.catch_up();
            }
            Message::Unmounted { netns, addresses } => {
                self.opening -= 1;
                self.exempt_unmounted(netns, &addresses);
                self.catch_up();
            }
            Message::Addresses { cookie, addresses } if !self.tracked.contains_key(&cookie) => {
                self.set_foreign_addresses(cookie, addresses);
            }
            Message::Addresses { cookie, addresses } => {
                self.set_addresses(cookie, addresses);
                self.expect_pod(pods::SOON);
                self.reconcile(cookie).await;
                self.reconcile_contested().await;
            }
            Message::Enrolled { cookie, workload, result } => self.finish_enrolment(cookie, workload, result).await,
            Message::Answered { cookie, address, answered } => self.take_answer(cookie, address, answered).await,
            Message::ForeignAnswered { inode, addresses } => self.take_foreign_answer(inode, &addresses).await,
            Message::Pods(found) => self.take_pods(found).await,
            Message::Retry { cookie } => {
                if let Some(tracked) = self.tracked.get_mut(&cookie) {
                    tracked.waiting = false;
                    self.reconcile(cookie).await;
                }
            }
        }
    }

    async fn track(&mut self, name: OsString, opened: Opened) {
        let Opened { netns, watch, addresses, former } = opened;
        let (cookie, inode) = (netns.cookie(), netns.inode());
        if self.names.get(&name) != Some(&inode) {
            // Another namespace, or none, is at the name by now. If this one is at no other name either, forget it.
            if !self.tracked.contains_key(&cookie) && former.is_none() {
                self.maps.forget_namespace(cookie);
            }
            self.visit(name);
            return;
        }
        if let Some(tracked) = self.tracked.get_mut(&cookie) {
            tracked.names.insert(name);
            return;
        }
        let (elsewhere, unmounted) = (self.foreign.remove(&inode), self.unmounted.contains(&cookie));
        let was_foreign = elsewhere.is_some() || unmounted;
        // One that was seen elsewhere first has been closed for that, not by a predecessor.
        let new = former.is_none() || unmounted || elsewhere.is_some_and(|foreign| foreign.is_none_or(|foreign| foreign.fresh));
        self.unmounted.retain(|unmounted| *unmounted != cookie);
        let phase = match former {
            Some(NamespaceState::Enrolled) => Phase::Inherited,
            Some(NamespaceState::Exempt) if !was_foreign => Phase::Exempt,
            Some(NamespaceState::Exempt | NamespaceState::Pending) | None => Phase::Pending,
        };
        if was_foreign {
            self.mark(cookie, Namespace::pending());
        }
        self.seen += 1;
        let mut tracked = Tracked::new(netns, name, phase, self.seen);
        tracked.fresh = self.caught_up && new;
        tracked.unlooked = !tracked.fresh && self.node_pods.is_some();
        if self.caught_up && tracked.is_pending() {
            // Nobody gets in either, from before it has an address: a server may listen long before it is enrolled.
            self.guard(&tracked.netns);
        }
        tracked.watcher = Some(addresses::watch(cookie, watch, self.messages.clone()));
        self.cookies.insert(inode, cookie);
        self.tracked.insert(cookie, tracked);
        self.set_addresses(cookie, addresses);
        self.expect_pod(pods::SOON);
        self.reconcile(cookie).await;
    }

    /// Lets nothing into a namespace but what its tables say, which say nothing yet.
    fn guard(&self, netns: &Netns) {
        if let Err(error) = self.lookup.attach(netns) {
            tracing::error!(%error, cookie = netns.cookie(), "cannot close a network namespace to plaintext until it is classified");
        }
    }

    /// Tells the programs what a namespace is.
    fn mark(&self, cookie: u64, namespace: Namespace) {
        if let Err(error) = self.maps.set_namespace(cookie, namespace) {
            tracing::error!(%error, cookie, "the kernel does not take a namespace's state: it stays as it is");
        }
    }

    /// Once everything that was there at the start is classified or closed: what is unseen from now on is refused.
    fn catch_up(&mut self) {
        if self.opening > 0 {
            return;
        }
        for (cookie, process) in std::mem::take(&mut self.unresolved) {
            self.resolve(process, cookie);
        }
        if std::mem::replace(&mut self.caught_up, true) {
            return;
        }
        self.expect_pod(Duration::ZERO);
        let known = |cookie: &u64| {
            self.tracked.contains_key(cookie) || self.foreign.values().flatten().any(|foreign| foreign.netns.cookie() == *cookie)
        };
        for cookie in self.maps.namespaces().into_iter().filter(|cookie| !known(cookie)) {
            self.maps.forget_namespace(cookie);
        }
        for cookie in self.lookup.attached().into_iter().filter(|cookie| !known(cookie)) {
            let _gone_with_its_namespace = self.lookup.detach(cookie);
        }
        for address in self.maps.admitted_addresses().into_iter().filter(|address| !self.holders.contains_key(address)) {
            self.maps.forget_admissions(address);
        }
        if !self.dedicated {
            self.tasks.spawn(keep_refusing(self.maps.clone()));
        }
    }

    async fn consider(&mut self, report: Report) {
        match report {
            Report::PlaintextRefused { source, destination } => {
                let _full = self.pods.try_send(PodEvent::PlaintextRefused { source, destination });
            }
            Report::UnseenNamespace { process, cookie } => {
                if self.tracked.contains_key(&cookie) {
                    // Another agent may have started in it: then it is a node.
                    if self.read_agents() {
                        self.reconcile(cookie).await;
                    }
                } else if self.reported.len() < QUEUE && self.maps.namespace(cookie).is_none() {
                    self.reported.insert(cookie, process);
                    let pause = LOOK_PAUSE.max(self.look_took * LOOK_SHARE);
                    self.look_again(pause.saturating_sub(self.looked.elapsed()));
                }
            }
        }
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Keeps the programs refusing namespaces that nobody has seen, for as long as the agent lives.
async fn keep_refusing(maps: Maps) {
    let mut tick = tokio::time::interval(LEASE / 3);
    loop {
        tick.tick().await;
        let result = monotonic().map(|now| maps.set(|settings| settings.refuse_unseen_until_ns = now + LEASE.as_nanos() as u64));
        if !matches!(result, Ok(Ok(()))) {
            tracing::warn!("cannot renew the refusal of unseen namespaces");
        }
    }
}
