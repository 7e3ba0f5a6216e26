//! The agent role's composition root: builds the parts in order, starts them, and waits for the end.
//!
//! Nothing imports this module but the command line. What a part needs of another it is given here, as narrow as it can be.

pub mod privileges;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use serde_json::json;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::capture::{Ask, Capture, ListenerKind, LoadConfig, LocalPod, PodEvent};
use crate::config::AgentConfig;
use crate::discovery::{Discovery, DiscoveryConfig, DiscoveryHandle};
use crate::drain::{Drain, StopSignals};
use crate::identity::{ControllerEndpoint, ControllerIssuer, StoreConfig, SvidStore, SystemClock};
use crate::inbound::Inbound;
use crate::model::SameNode as Way;
use crate::observe::readiness::Condition;
use crate::observe::{AdminSources, ConnectionInfo, Direction, Observer, Readiness, admin, http};
use crate::outbound::Outbound;
use crate::same_node::SameNode;
use crate::serve::Permits;
use crate::{footprint, limits};

/// How often tunnels and counters that nobody needs are dropped.
const SWEEP: Duration = Duration::from_secs(10);
/// How long after the mesh is known starting is over: the node's pods are enrolled, or the programs wait for them.
const SETTLED: Duration = Duration::from_secs(2);
/// The life that certificates are asked for; the controller may give less.
const CERTIFICATE_LIFE: Duration = Duration::from_secs(24 * 3600);
/// The trust domain of a control plane that does not name its own.
const DEFAULT_TRUST_DOMAIN: &str = "cluster.local";

/// Runs the agent of a node until it is told to stop, and its connections have ended or the drain deadline has passed.
///
/// # Errors
/// What keeps it from starting: the kernel, permissions, an address in use.
pub async fn run(config: AgentConfig) -> Result<()> {
    privileges::check()?;
    let permits = Permits::for_descriptors(limits::raise_descriptors());
    let observer = Observer::new(&config.node);
    let readiness = Readiness::new();
    let loaded = readiness.condition("eBPF programs loaded");
    let synced = readiness.condition("mesh known");
    let drain = Drain::new();
    tokio::spawn(drain.clone().on_signal(StopSignals::install().context("taking over the signals")?));

    let endpoint =
        ControllerEndpoint::new(&config.controller.to_string(), &config.root_cert, &config.token_file).context("--controller")?;
    let discovery = Discovery::start(DiscoveryConfig {
        endpoint: endpoint.clone(),
        node: config.node.as_str().into(),
        default_trust_domain: DEFAULT_TRUST_DOMAIN.parse().context("the default trust domain")?,
        state_dir: config.state_dir.clone(),
        received: observer.metrics().xds_received(),
    });
    let issuer = Arc::new(ControllerIssuer::new(endpoint, CERTIFICATE_LIFE));
    let svids = SvidStore::start(StoreConfig { root_cert: config.root_cert.clone() }, issuer, Arc::new(SystemClock));

    let local_pods = LocalPods::default();
    observe(&config, &observer, &readiness, &discovery, &svids, &local_pods).await?;
    let mut capture =
        tokio::task::block_in_place(|| Capture::load(&load_config(&config))).context("taking over the node's connections")?;
    loaded.met();
    let maps = capture.maps();
    let outcomes = capture.maps();
    observer.metrics().read_capture_outcomes_from(Box::new(move || outcomes.outcomes()));

    let same_node =
        SameNode::new(capture.same_node(), discovery.snapshots(), svids.clone(), Arc::new(SystemClock), observer.clone());
    if let Some(events) = capture.take_same_node_events() {
        tokio::spawn(Arc::clone(&same_node).run(events, capture.maps()));
    }
    let (form, to) = (config.tunnel_form, Arc::clone(&same_node));
    let outbound = Outbound::new(maps, discovery.clone(), svids.clone(), to, observer.clone(), drain.clone(), form);
    let to = Arc::clone(&same_node);
    let inbound = Inbound::new(discovery.snapshots(), svids.clone(), to, observer.clone(), drain.clone(), form);
    let (pod_events, events) = mpsc::channel(256);
    let stop = CancellationToken::new();
    let capturing = tokio::spawn(capture.run(discovery.snapshots(), ask(discovery.clone()), pod_events, stop.clone()));
    tokio::spawn(settle(discovery.clone(), synced));
    info!(node = %config.node, controller = %config.controller, "agent started");
    let pods = Pods { outbound, inbound, same_node, svids, observer, permits, local: local_pods };
    let ended = tokio::select! {
        ended = async {
            // There are events for as long as there is capture; only its own end tells why.
            pods.serve(events).await;
            capturing.await.context("the capture task panicked")
        } => ended?,
        () = drain.started() => Ok(()),
    };
    stop.cancel();
    drain.finish(config.drain_timeout).await;
    info!("agent stopped; enrolled pods stay closed until an agent is back");
    ended.context("enrolling pods")
}

/// Says when the mesh is known, and gives back what learning it took.
async fn settle(discovery: DiscoveryHandle, synced: Condition) {
    if discovery.snapshots().wait_for(|snapshot| snapshot.synced()).await.is_err() {
        return;
    }
    synced.met();
    tokio::time::sleep(SETTLED).await;
    tokio::task::spawn_blocking(footprint::release);
    let mut connected = discovery.connected();
    // A controller that is back is told of all that is known, which for a moment takes as much again.
    while connected.wait_for(|there| !there).await.is_ok() && connected.wait_for(|there| *there).await.is_ok() {
        tokio::time::sleep(SETTLED).await;
        tokio::task::spawn_blocking(footprint::release_free);
    }
}

fn load_config(config: &AgentConfig) -> LoadConfig {
    LoadConfig {
        node: config.node.as_str().into(),
        netns_dir: config.netns_dir.clone(),
        cgroup_root: config.cgroup_root.clone(),
        excluded_namespaces: config.excluded_namespaces.clone(),
        kubelet_names: config.kubelet_names.clone(),
        bpf_dir: config.bpf_dir.clone(),
    }
}

/// The pods that are enrolled, for the admin interface.
#[derive(Clone, Debug, Default)]
struct LocalPods(Arc<Mutex<HashMap<Arc<str>, Arc<LocalPod>>>>);

impl LocalPods {
    fn with<T>(&self, f: impl FnOnce(&mut HashMap<Arc<str>, Arc<LocalPod>>) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn list(&self) -> Vec<serde_json::Value> {
        let describe = |pod: &Arc<LocalPod>| {
            let workload = pod.workload();
            json!({
                "uid": *workload.uid,
                "name": *workload.name,
                "namespace": workload.identity.namespace(),
                "identity": workload.identity.to_string(),
                "addresses": pod.addresses,
                "mode": workload.peer_authentication.mode.to_string(),
                "same_node": workload.same_node.to_string(),
            })
        };
        self.with(|pods| pods.values().map(describe).collect())
    }
}

/// What is done for pods as they come and go.
struct Pods {
    outbound: Arc<Outbound>,
    inbound: Arc<Inbound>,
    same_node: Arc<SameNode>,
    svids: SvidStore,
    observer: Observer,
    permits: Permits,
    local: LocalPods,
}

impl Pods {
    async fn serve(&self, mut events: mpsc::Receiver<PodEvent>) {
        let mut sweep = interval(SWEEP);
        sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                event = events.recv() => match event {
                    Some(event) => self.handle(event),
                    None => return,
                },
                _ = sweep.tick() => self.outbound.sweep(),
            }
        }
    }

    fn handle(&self, event: PodEvent) {
        match event {
            PodEvent::Enrolled { pod, listeners, inherited } => self.enrolled(pod, listeners, inherited),
            PodEvent::Updated(pod) => {
                let (inbound, same_node) = (Arc::clone(&self.inbound), Arc::clone(&self.same_node));
                tokio::task::spawn_blocking(move || {
                    inbound.recheck(&pod);
                    // What it asks for holds for the connections that it opened, too; the rest of it is others' to ask for.
                    if pod.workload().same_node == Way::Tunnel {
                        same_node.destinations_of(&pod).iter().for_each(|destination| inbound.recheck(destination));
                    }
                });
            }
            PodEvent::Released(pod) => self.released(&pod),
            PodEvent::PlaintextRefused { source, destination } => {
                let snapshot = self.inbound.snapshot();
                let info = ConnectionInfo {
                    source: snapshot.workload_at(source.ip()).cloned(),
                    destination: snapshot.workload_at(destination.ip()).cloned(),
                    ..ConnectionInfo::new(Direction::Inbound, source, destination)
                };
                self.observer.metrics().plaintext_refused();
                let detail = format!("port {} takes mutual TLS only", destination.port());
                self.observer.fail(&info, crate::model::CloseReason::PlaintextRefused, &detail);
            }
        }
    }

    fn enrolled(&self, pod: Arc<LocalPod>, listeners: Vec<crate::capture::Listener>, inherited: bool) {
        let workload = pod.workload();
        info!(pod = %workload.name, namespace = workload.identity.namespace(), addresses = ?pod.addresses, "pod enrolled");
        self.same_node.add(&pod);
        let (inbound, enrolled) = (Arc::clone(&self.inbound), Arc::clone(&pod));
        let recheck = if inherited { Inbound::recheck } else { Inbound::recheck_attested };
        tokio::task::spawn_blocking(move || recheck(&inbound, &enrolled));
        for listener in listeners {
            let (pod, permits) = (Arc::clone(&pod), self.permits.clone());
            match listener.kind() {
                ListenerKind::Outbound => tokio::spawn(Arc::clone(&self.outbound).serve(pod, listener, permits)),
                ListenerKind::Plaintext => tokio::spawn(Arc::clone(&self.inbound).serve_plaintext(pod, listener, permits)),
                ListenerKind::Hbone => tokio::spawn(Arc::clone(&self.inbound).serve_tunnels(pod, listener, permits)),
            };
        }
        let count = self.local.with(|pods| {
            pods.insert(Arc::clone(&workload.uid), Arc::clone(&pod));
            pods.len()
        });
        self.observer.metrics().set_enrolled_pods(count);
        let lease = self.svids.lease(&workload.identity);
        tokio::spawn(async move {
            pod.released.cancelled().await;
            drop(lease);
        });
    }

    fn released(&self, pod: &Arc<LocalPod>) {
        let workload = pod.workload();
        info!(pod = %workload.name, namespace = workload.identity.namespace(), "pod released");
        self.same_node.remove(pod);
        self.outbound.forget(pod);
        self.inbound.forget(pod);
        let count = self.local.with(|pods| {
            if pods.get(&workload.uid).is_some_and(|known| Arc::ptr_eq(known, pod)) {
                pods.remove(&workload.uid);
            }
            pods.len()
        });
        self.observer.metrics().set_enrolled_pods(count);
    }
}

/// Asks the controller about an address; none when it cannot be asked now.
fn ask(discovery: DiscoveryHandle) -> Ask {
    Arc::new(move |address| {
        let discovery = discovery.clone();
        Box::pin(async move { discovery.resolve(address).await.ok() })
    })
}

/// Starts what people and scrapers look at. Pages that take time to write are written off the threads that move bytes.
async fn observe(
    config: &AgentConfig,
    observer: &Observer,
    readiness: &Readiness,
    discovery: &DiscoveryHandle,
    svids: &SvidStore,
    pods: &LocalPods,
) -> Result<()> {
    let (certificates, pods) = (svids.clone(), pods.clone());
    let sources = AdminSources {
        node: config.node.clone(),
        snapshot: discovery.snapshots(),
        certificates: Box::new(move || certificates.list().iter().map(certificate).collect()),
        pods: Box::new(move || pods.list()),
        observer: observer.clone(),
    };
    let metrics = http::Server::metrics(config.metrics_listen).await?;
    let ready = http::Server::readiness(config.ready_listen).await?;
    let admin_server = http::Server::admin(config.admin_listen).await?;
    let never = CancellationToken::new();
    tokio::spawn(metrics.serve(http::metrics_router(observer.clone()), never.clone()));
    tokio::spawn(ready.serve(crate::observe::readiness::router(readiness.clone()), never.clone()));
    tokio::spawn(admin_server.serve(admin::router(sources), never));
    watch_controller(discovery.clone(), svids.clone(), observer.clone());
    watch_certificates(svids.clone(), observer.clone());
    Ok(())
}

/// Keeps the connection in the metrics. A controller that is back is asked at once for the certificates that it was asked for in vain.
fn watch_controller(discovery: DiscoveryHandle, svids: SvidStore, observer: Observer) {
    let mut connected = discovery.connected();
    tokio::spawn(async move {
        loop {
            let there = *connected.borrow_and_update();
            observer.metrics().set_xds_connected(there);
            if there {
                svids.retry();
            }
            if connected.changed().await.is_err() {
                return;
            }
        }
    });
}

/// Keeps the certificates' expiry in the metrics.
fn watch_certificates(svids: SvidStore, observer: Observer) {
    let mut changes = svids.changes();
    tokio::spawn(async move {
        let mut held = HashMap::new();
        while changes.changed().await.is_ok() {
            let now: HashMap<_, _> = svids.list().into_iter().filter_map(|status| Some((status.id, status.not_after?))).collect();
            for (id, not_after) in &now {
                if held.get(id) != Some(not_after) {
                    let seconds = not_after.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
                    observer.metrics().certificate_held(id, i64::try_from(seconds).unwrap_or(i64::MAX));
                    observer.metrics().certificate_request("issued");
                }
            }
            for id in held.keys().filter(|id| !now.contains_key(id)) {
                observer.metrics().certificate_dropped(id);
            }
            held = now;
        }
    });
}

fn certificate(status: &crate::identity::SvidStatus) -> serde_json::Value {
    let readable = |time: std::time::SystemTime| crate::identity::clock::readable(time);
    json!({
        "identity": status.id.to_string(),
        "serial": status.serial,
        "not_before": status.not_before.map(readable),
        "not_after": status.not_after.map(readable),
        "next_attempt": readable(status.next_attempt),
        "failures": status.failures,
        "last_error": status.last_error,
    })
}
