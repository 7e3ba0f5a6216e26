//! The destination's side: what reaches a pod in the mesh reaches it through here, or through the kernel where mode and policy
//! need nobody to look.
//!
//! ```text
//! tunnel ────> authenticate ─> for each stream ─┐
//!                                               ├─> policy ─> deliver ─> relay ─> access log
//! plaintext (where policy must be asked) ───────┘
//! ```
//!
//! The source's identity comes from its verified certificate chain and from nothing else.

use std::collections::HashMap;
use std::fmt::Display;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rand::Rng as _;
use rustls::ServerConfig;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tracing::{info, warn};

use crate::capture::{Accepted, DELIVERY_MARK, Listener, LocalPod, destroy_inbound};
use crate::deliver::{DeliverError, connect};
use crate::drain::Drain;
use crate::identity::SvidStore;
use crate::limits::{Antechamber, Share, Shares};
use crate::model::{CloseReason, Flow, Mode, PeerAddr, Snapshot, SpiffeId, Verdict, Workload};
use crate::observe::{ConnectionInfo, CountedTunnel, Direction, Observer, OpenConnection, Side};
use crate::open_connections::{OpenConnections, Registered};
use crate::policy::evaluate::evaluate;
use crate::policy::explain::explain;
use crate::relay::{Sink, Source, relay, tcp};
use crate::serve::{Permits, serve};
use crate::tunnel::accept::Form;
use crate::tunnel::{TunnelError, TunnelForm, accept, tls};

mod streams;

use streams::Peer;

/// How long a peer waits for the pod's certificate.
const IDENTITY_DEADLINE: Duration = Duration::from_secs(5);
/// How many peers may be about to shake hands at once, over all pods.
const STRANGERS: usize = 1024;
/// Why a peer's tunnel or stream is refused that leaves too little to others.
const GREEDY: &str = "this identity holds as many of the agent's connections as are left for all others";
/// Linux's default range of source ports.
const SOURCE_PORTS: std::ops::Range<u16> = 32_768..61_000;

/// The destination's side of a node.
pub struct Inbound {
    snapshots: watch::Receiver<Arc<Snapshot>>,
    svids: SvidStore,
    open: Arc<OpenConnections>,
    observer: Observer,
    drain: Drain,
    form: TunnelForm,
    server_configs: Mutex<HashMap<SpiffeId, KeptConfig>>,
    strangers: Arc<Antechamber>,
    /// The tunnels and streams that each peer's workloads hold, over all pods.
    peers: Arc<Shares<SpiffeId>>,
}

/// The TLS set-up for one certificate and one bundle of roots.
struct KeptConfig {
    /// The certificate's.
    generation: u64,
    /// The fingerprint of the bundle.
    roots: Arc<str>,
    config: Arc<ServerConfig>,
}

/// What a connection is refused for.
struct Refusal {
    reason: CloseReason,
    detail: String,
}

impl From<DeliverError> for Refusal {
    fn from(error: DeliverError) -> Self {
        Self { reason: error.reason(), detail: error.to_string() }
    }
}

impl Inbound {
    /// The destination's side, from its parts.
    #[must_use]
    pub fn new(
        snapshots: watch::Receiver<Arc<Snapshot>>,
        svids: SvidStore,
        observer: Observer,
        drain: Drain,
        form: TunnelForm,
    ) -> Arc<Self> {
        let open = Arc::new(OpenConnections::default());
        let strangers = Antechamber::new(STRANGERS);
        let (server_configs, peers) = (Mutex::default(), Shares::new());
        Arc::new(Self { snapshots, svids, open, observer, drain, form, server_configs, strangers, peers })
    }

    /// Serves the tunnels that peers open to `pod`, until the pod leaves the mesh or the agent stops.
    pub async fn serve_tunnels(self: Arc<Self>, pod: Arc<LocalPod>, listener: Listener, permits: Permits) {
        let handle = |accepted| Arc::clone(&self).tunnel(Arc::clone(&pod), accepted, permits.clone());
        let overloaded = |accepted: &Accepted| self.overloaded(&pod, accepted);
        serve(listener, Arc::clone(&pod), self.drain.clone(), permits.clone(), handle, overloaded).await;
    }

    /// Serves the plaintext connections to `pod` that the kernel would not rule on alone.
    pub async fn serve_plaintext(self: Arc<Self>, pod: Arc<LocalPod>, listener: Listener, permits: Permits) {
        let handle = |accepted| Arc::clone(&self).plaintext(Arc::clone(&pod), accepted);
        let overloaded = |accepted: &Accepted| self.overloaded(&pod, accepted);
        serve(listener, Arc::clone(&pod), self.drain.clone(), permits, handle, overloaded).await;
    }

    /// The state of the mesh that connections are judged by now.
    #[must_use]
    pub fn snapshot(&self) -> Arc<Snapshot> {
        Arc::clone(&self.snapshots.borrow())
    }

    /// Closes those of the pod's open connections that its modes and policies deny now, also those that the kernel let through.
    /// Blocks for as long as the kernel takes to list the pod's sockets.
    pub fn recheck(&self, pod: &LocalPod) {
        let snapshot = Arc::clone(&self.snapshots.borrow());
        let workload = pod.workload();
        let (policies, missing) = snapshot.policies_for(&workload);
        let denied = |flow: &Flow| {
            strictly_refused(&workload, flow) || !evaluate(flow, &policies, &missing, snapshot.default_deny()).verdict.allowed()
        };
        let mut closed = self.open.close_denied(&workload.uid, denied);
        let direct =
            destroy_inbound(&pod.netns, |source, destination| denied(&Flow { source_identity: None, source, destination }));
        match direct {
            Ok(destroyed) => closed += destroyed,
            Err(error) => {
                warn!(pod = %workload.name, %error, "open plaintext connections could not be held against the changed policy");
            }
        }
        if closed > 0 {
            info!(pod = %workload.name, namespace = workload.identity.namespace(), closed, "closed connections that policy denies now");
        }
    }

    /// Forgets what is kept for a pod that left the mesh. The open connections of one that is gone altogether end.
    pub fn forget(&self, pod: &LocalPod) {
        let workload = pod.workload();
        // Another pod of the same identity has it made anew.
        self.server_configs.lock().unwrap_or_else(PoisonError::into_inner).remove(&workload.identity);
        if pod.gone.is_cancelled() {
            self.open.close_all(&workload.uid, CloseReason::PodGone);
        }
    }

    fn overloaded(&self, pod: &LocalPod, accepted: &Accepted) {
        let info = ConnectionInfo {
            destination: Some(pod.workload()),
            ..ConnectionInfo::new(Direction::Inbound, accepted.peer, accepted.local)
        };
        self.observer.fail(&info, CloseReason::Overloaded, &"the agent holds as many connections as its descriptors allow");
    }

    async fn tunnel(self: Arc<Self>, pod: Arc<LocalPod>, accepted: Accepted, permits: Permits) {
        // What a handshake takes is long gone while the tunnel is there.
        let Some((tunnel, peer, _held)) = Box::pin(self.authenticate(&pod, accepted, &permits)).await else { return };
        match tunnel {
            Form::Hbone(tunnel) => Box::pin(self.hbone(pod, peer, tunnel, permits)).await,
            Form::Single(tunnel) => self.single(&pod, &peer, tunnel).await,
        }
    }

    /// Shakes hands with a peer, and finds room for its tunnel; one that is refused is counted and logged.
    async fn authenticate(
        &self,
        pod: &LocalPod,
        Accepted { stream, peer: source, local }: Accepted,
        permits: &Permits,
    ) -> Option<(Form, Peer, (Share<SpiffeId>, CountedTunnel))> {
        let started = Instant::now();
        let waiting = self.strangers.enter();
        let handshake = async {
            let (config, roots) = self.tls(pod).await?;
            Ok((accept::handshake(stream, PeerAddr(source), config).await?, roots))
        };
        let accepted = tokio::select! {
            accepted = handshake => accepted,
            () = waiting.evicted() => Err(TunnelError::Crowded { peer: source }),
        };
        let result = accepted.as_ref().map_or_else(|error| error.reason().as_str(), |_| "ok");
        self.observer.metrics().handshake(Side::Server, result, started.elapsed());
        let info = ConnectionInfo { destination: Some(pod.workload()), ..ConnectionInfo::new(Direction::Inbound, source, local) };
        let (accepted, roots) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                self.observer.fail(&info, error.reason(), &error);
                return None;
            }
        };
        let Some(share) = self.peers.take(&accepted.source, permits.free()) else {
            let info = ConnectionInfo { source_identity: Some(accepted.source), ..info };
            self.observer.fail(&info, CloseReason::Overloaded, &GREEDY);
            return None;
        };
        let peer = Peer { identity: accepted.source, expires: accepted.expires, addr: source, local, roots };
        Some((accepted.tunnel, peer, (share, self.observer.metrics().tunnel(Side::Server))))
    }

    /// The TLS set-up for the pod's present certificate, and the fingerprint of the roots that it believes.
    async fn tls(&self, pod: &LocalPod) -> Result<(Arc<ServerConfig>, Arc<str>), TunnelError> {
        let workload = pod.workload();
        let no_identity = |why: &dyn Display| TunnelError::NoIdentity(why.to_string());
        let svid = self.svids.wait(&workload.identity, IDENTITY_DEADLINE).await.map_err(|error| no_identity(&error))?;
        let trust_domain = self.snapshots.borrow().trust_domain().cloned();
        let trust_domain = trust_domain.ok_or_else(|| no_identity(&"the mesh's trust domain is not known yet"))?;
        let bundle = Arc::clone(&self.svids.bundle().borrow());
        let mut configs = self.server_configs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kept) = configs.get(&workload.identity)
            && (kept.generation, &kept.roots) == (svid.generation, &bundle.fingerprint)
        {
            return Ok((Arc::clone(&kept.config), Arc::clone(&kept.roots)));
        }
        let config = tls::server_config(&svid, &bundle, &trust_domain, self.form.alpn())?;
        let (generation, roots) = (svid.generation, Arc::clone(&bundle.fingerprint));
        let kept = KeptConfig { generation, roots: Arc::clone(&roots), config: Arc::clone(&config) };
        configs.insert(workload.identity.clone(), kept);
        Ok((config, roots))
    }

    async fn plaintext(self: Arc<Self>, pod: Arc<LocalPod>, accepted: Accepted) {
        let Some((stream, far, carried)) = Box::pin(self.let_in(&pod, accepted)).await else { return };
        let (mut source, mut sink) = tcp::split(stream);
        relay_inbound((&mut source, &mut sink), far, carried).await;
    }

    /// Connects a plaintext connection to the application; one that is refused is reset, counted and logged.
    async fn let_in(
        &self,
        pod: &LocalPod,
        Accepted { stream, peer: source, local }: Accepted,
    ) -> Option<(TcpStream, TcpStream, Carried)> {
        let info = ConnectionInfo {
            source: self.snapshots.borrow().workload_at(source.ip()).cloned(),
            destination: Some(pod.workload()),
            ..ConnectionInfo::new(Direction::Inbound, source, local)
        };
        let flow = Arc::new(Flow { source_identity: None, source, destination: local });
        let registered = self.open.register(&pod.workload().uid, Arc::clone(&flow));
        match self.deliver(pod, &flow).await {
            Ok(far) => Some((stream, far, Carried { open: self.observer.open(info), registered })),
            Err(Refusal { reason, detail }) => {
                tcp::reset_on_close(&stream);
                self.observer.fail(&info, reason, &detail);
                None
            }
        }
    }

    /// Asks mode and policy, and connects to the application.
    async fn deliver(&self, pod: &LocalPod, flow: &Flow) -> Result<TcpStream, Refusal> {
        let workload = pod.workload();
        self.permit(&workload, flow)?;
        let socket = || {
            let domain = Domain::for_address(flow.destination);
            let made = pod.netns.enter(|| Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP)));
            made.map_err(|source| DeliverError::Socket { destination: flow.destination, source })
        };
        let client = flow.source.ip();
        if flow.source_identity.is_some() {
            return Ok(connect::connect(socket()?, client, None, flow.destination, DELIVERY_MARK).await?);
        }
        let mut refused = DeliverError::Socket { destination: flow.destination, source: std::io::ErrorKind::AddrInUse.into() };
        for _ in 0..8 {
            let port = rand::rng().random_range(SOURCE_PORTS);
            if self.open.holds_plaintext(&workload.uid, SocketAddr::new(client, port), flow.destination) {
                continue;
            }
            match connect::connect(socket()?, client, Some(port), flow.destination, DELIVERY_MARK).await {
                // The port is in use by another connection.
                Err(error @ DeliverError::Socket { .. }) => refused = error,
                answer => return Ok(answer?),
            }
        }
        Err(refused.into())
    }

    fn permit(&self, workload: &Workload, flow: &Flow) -> Result<(), Refusal> {
        if strictly_refused(workload, flow) {
            // It came before the kernel knew.
            self.observer.metrics().plaintext_refused();
            let detail = format!("port {} takes mutual TLS only", flow.destination.port());
            return Err(Refusal { reason: CloseReason::PlaintextRefused, detail });
        }
        let snapshot = Arc::clone(&self.snapshots.borrow());
        let (policies, missing) = snapshot.policies_for(workload);
        let evaluation = evaluate(flow, &policies, &missing, snapshot.default_deny());
        self.observer.metrics().evaluation(&evaluation);
        match &evaluation.verdict {
            Verdict::Allow { .. } => Ok(()),
            Verdict::Deny { .. } => Err(Refusal { reason: CloseReason::PolicyDenied, detail: explain(flow, &evaluation) }),
        }
    }
}

/// A connection that is carried: what is told of it, and what calls it off.
struct Carried {
    open: OpenConnection,
    registered: Registered,
}

/// Moves a connection's bytes to the application and back until it ends.
fn relay_inbound<'a>(
    near: (&'a mut impl Source, &'a mut impl Sink),
    far: TcpStream,
    Carried { open, registered }: Carried,
) -> impl Future<Output = ()> + Send + 'a {
    let (mut source, mut sink) = tcp::split(far);
    // Not an `async fn`, which would keep room for its arguments beside what they have become.
    async move {
        let bytes = open.bytes();
        let end = relay(near, (&mut source, &mut sink), (&bytes.sent, &bytes.received), &registered.cancel).await;
        open.close(end.reason(), None);
    }
}

/// Whether the connection is plaintext to a port that takes none.
fn strictly_refused(workload: &Workload, flow: &Flow) -> bool {
    flow.source_identity.is_none() && workload.peer_authentication.mode_of(flow.destination.port()) == Mode::Strict
}
