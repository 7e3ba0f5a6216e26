//! The agent role's composition root: builds the parts in order, starts them, and waits for the end.
//!
//! Nothing imports this module but the command line. What a part needs of another it is given here, as narrow as it can be.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::capture::{Ask, Capture, ListenerRole, LoadConfig, LocalPod, PodEvent};
use crate::config::AgentConfig;
use crate::discovery::{Discovery, DiscoveryHandle};
use crate::drain::Drain;
use crate::identity::SvidStore;
use crate::inbound::Inbound;
use crate::model::Snapshot;
use crate::observe::{AdminSources, Observer, Readiness};
use crate::outbound::Outbound;

/// How often tunnels and counters that nobody needs are dropped.
const SWEEP: Duration = Duration::from_secs(10);

/// Runs the agent of a node until it is told to stop, and its connections have ended or the drain deadline has passed.
///
/// # Errors
/// What keeps it from starting: the kernel, permissions, an address in use.
pub async fn run(config: AgentConfig) -> Result<()> {
    raise_file_limit();
    let observer = Observer::new(&config.node);
    let readiness = Readiness::new();
    let (loaded, synced) = (readiness.condition("programs loaded"), readiness.condition("mesh known"));
    let drain = Drain::on_signals(config.drain_timeout).context("waiting for signals")?;
    let discovery = Discovery::start(&config);
    let svids = SvidStore::start(&config, observer.clone());
    let capture = Capture::load(&LoadConfig::from(&config)).context("taking over the node's connections")?;
    loaded.met();
    observe(&config, &observer, &readiness, &discovery, &svids, &capture)?;

    let outbound = Outbound::new(capture.maps(), discovery.clone(), svids.clone(), observer.clone(), drain.clone());
    let inbound = Inbound::new(discovery.snapshots(), svids.clone(), observer.clone(), drain.clone());
    let (pod_events, events) = mpsc::channel(256);
    let stop = CancellationToken::new();
    let capturing = tokio::spawn(capture.run(discovery.snapshots(), ask(discovery.clone()), pod_events, stop.clone()));
    tokio::spawn(async move {
        let mut snapshots = discovery.snapshots();
        if snapshots.wait_for(|snapshot| snapshot.synced()).await.is_ok() {
            synced.met();
        }
    });
    info!(node = %config.node, controller = %config.controller, "agent started");
    let pods = Pods { outbound, inbound, svids, observer };
    tokio::select! {
        () = pods.serve(events) => warn!("enrolment ended by itself"),
        () = drain.started() => {}
    }
    stop.cancel();
    drain.finished().await;
    capturing.await.context("the capture task panicked")?;
    info!("agent stopped; enrolled pods stay closed until an agent is back");
    Ok(())
}

/// What is done for pods as they come and go.
struct Pods {
    outbound: Arc<Outbound>,
    inbound: Arc<Inbound>,
    svids: SvidStore,
    observer: Observer,
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
            PodEvent::Enrolled { pod, listeners } => {
                let workload = pod.workload();
                let (name, namespace) = (&workload.name, workload.identity.namespace());
                info!(pod = %name, namespace, addresses = ?pod.addresses, "pod enrolled");
                self.observer.metrics().enrolled_pods(1);
                for (role, listener) in listeners {
                    let pod = Arc::clone(&pod);
                    match role {
                        ListenerRole::Outbound => tokio::spawn(Arc::clone(&self.outbound).serve(pod, listener)),
                        ListenerRole::Plaintext => tokio::spawn(Arc::clone(&self.inbound).serve_plaintext(pod, listener)),
                        ListenerRole::Tunnel => tokio::spawn(Arc::clone(&self.inbound).serve_tunnels(pod, listener)),
                    };
                }
                let lease = self.svids.lease(&workload.identity);
                tokio::spawn(async move {
                    pod.gone.cancelled().await;
                    drop(lease);
                });
            }
            PodEvent::Updated(pod) => {
                let inbound = Arc::clone(&self.inbound);
                tokio::task::spawn_blocking(move || inbound.recheck(&pod));
            }
            PodEvent::Released(pod) => self.release(&pod),
        }
    }

    fn release(&self, pod: &LocalPod) {
        let workload = pod.workload();
        info!(pod = %workload.name, namespace = workload.identity.namespace(), "pod released");
        self.observer.metrics().enrolled_pods(-1);
        self.outbound.forget(pod);
    }
}

/// Asks the controller about an address; none when it cannot be asked now.
fn ask(discovery: DiscoveryHandle) -> Ask {
    Arc::new(move |address| {
        let discovery = discovery.clone();
        Box::pin(async move { discovery.resolve(address).await.ok() })
    })
}

/// Starts what people and scrapers look at, on a runtime of its own, so that looking cannot stall traffic.
fn observe(
    config: &AgentConfig,
    observer: &Observer,
    readiness: &Readiness,
    discovery: &DiscoveryHandle,
    svids: &SvidStore,
    capture: &Capture,
) -> Result<()> {
    let maps = capture.maps();
    observer.metrics().set_capture_outcomes(Box::new(move || maps.outcomes()));
    let snapshots: watch::Receiver<Arc<Snapshot>> = discovery.snapshots();
    let (svids, pods) = (svids.clone(), capture.pods());
    let sources = AdminSources {
        snapshots,
        certificates: Box::new(move || serde_json::json!(svids.list())),
        pods: Box::new(move || serde_json::json!(pods())),
    };
    crate::observe::start(config, observer.clone(), readiness.clone(), sources)
}

/// Every connection costs descriptors; the agent takes as many as it may have.
fn raise_file_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        warn!(%error, "the limit of open files stays as it is");
    }
}
