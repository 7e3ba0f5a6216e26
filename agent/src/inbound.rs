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
use std::io;
use std::iter::repeat_with;
use std::net::SocketAddr;
use std::ops::Range;
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
use crate::observe::{ConnectionInfo, CountedTunnel, Direction, Observer, OpenConnection, Security, Side};
use crate::open_connections::{OpenConnections, Registered};
use crate::order::{Arrival, Arrivals, Departures, Turn};
use crate::policy::evaluate::{evaluate, judge};
use crate::policy::explain::explain;
use crate::relay::{Sink, Source, relay, tcp};
use crate::same_node::SameNode;
use crate::serve::{Full, Permits, serve};
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
/// From where deliveries have their source ports, as long as there is room: above Linux's default range, from which clients have theirs. A
/// client's SYN with the source port of a delivery would reach the application's end of that, and nobody would answer the client.
const SOURCE_PORTS: Range<u16> = 61_000..u16::MAX;
/// Linux's default range.
const CLIENTS_PORTS: Range<u16> = 32_768..61_000;
/// How many ports of the first range are tried, and then of the second.
const TRIES: [usize; 2] = [4, 8];

/// The destination's side of a node.
pub struct Inbound {
    snapshots: watch::Receiver<Arc<Snapshot>>,
    svids: SvidStore,
    open: Arc<OpenConnections>,
    /// The plaintext connections that are to be let in.
    departures: Arc<Departures>,
    arrivals: Arrivals,
    same_node: Arc<SameNode>,
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
        same_node: Arc<SameNode>,
        observer: Observer,
        drain: Drain,
        form: TunnelForm,
    ) -> Arc<Self> {
        let open = Arc::new(OpenConnections::default());
        let strangers = Antechamber::new(STRANGERS);
        let (departures, arrivals) = (Arc::default(), Arrivals::default());
        let (server_configs, peers) = (Mutex::default(), Shares::new());
        Arc::new(Self {
            snapshots,
            svids,
            open,
            departures,
            arrivals,
            same_node,
            observer,
            drain,
            form,
            server_configs,
            strangers,
            peers,
        })
    }

    /// Serves the tunnels that peers open to `pod`, until the pod leaves the mesh or the agent stops.
    pub async fn serve_tunnels(self: Arc<Self>, pod: Arc<LocalPod>, listener: Listener, permits: Permits) {
        let handle = |accepted| Arc::clone(&self).tunnel(Arc::clone(&pod), accepted, permits.clone());
        let overloaded = |accepted: &Accepted, full| self.overloaded(&pod, accepted, full);
        serve(listener, Arc::clone(&pod), self.drain.clone(), permits.clone(), handle, overloaded).await;
    }

    /// Serves the plaintext connections to `pod` that the kernel would not rule on alone.
    pub async fn serve_plaintext(self: Arc<Self>, pod: Arc<LocalPod>, listener: Listener, permits: Permits) {
        let handle = |accepted: Accepted| {
            let turn = self.departures.enter(accepted.peer, accepted.local);
            Arc::clone(&self).plaintext(Arc::clone(&pod), Box::new((accepted, turn)))
        };
        let overloaded = |accepted: &Accepted, full| self.overloaded(&pod, accepted, full);
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
        let (workload, denied) = (pod.workload(), self.judge(pod));
        let closed = self.open.close_denied(&workload.uid, &denied);
        let plaintext = |source, destination| denied(&Flow { source_identity: None, source, destination });
        let closed = closed + self.destroy_denied(pod, &denied, plaintext);
        if closed > 0 {
            info!(pod = %workload.name, namespace = workload.identity.namespace(), closed, "closed connections that policy denies now");
        }
    }

    /// Closes those connections from pods of the node that the kernel has let through by a verdict and that are denied by now. Blocks as
    /// [`recheck`](Self::recheck) does.
    pub fn recheck_attested(&self, pod: &LocalPod) {
        // Plaintext that was open before the pod was in the mesh goes on.
        self.destroy_denied(pod, self.judge(pod), |_, _| false);
    }

    /// Says what mode and policies of the pod deny now.
    fn judge(&self, pod: &LocalPod) -> impl Fn(&Flow) -> bool + use<> {
        let (snapshot, workload) = (Arc::clone(&self.snapshots.borrow()), pod.workload());
        let (policies, missing) = snapshot.policies_for(&workload);
        move |flow| {
            strictly_refused(&workload, flow) || !evaluate(flow, &policies, &missing, snapshot.default_deny()).verdict.allowed()
        }
    }

    /// Ends connections that the kernel has let through to the pod's application; gives how many. Those from pods of the node are judged
    /// by who opened them, the others by `plaintext`.
    fn destroy_denied(
        &self,
        pod: &LocalPod,
        denied: impl Fn(&Flow) -> bool,
        plaintext: impl Fn(SocketAddr, SocketAddr) -> bool,
    ) -> usize {
        let workload = pod.workload();
        let destroyed = destroy_inbound(&pod.netns, |source, destination| {
            let Some(attested) = self.same_node.attested(source, destination) else { return plaintext(source, destination) };
            let flow = Flow { source_identity: attested.identity(), source, destination };
            let ends = attested.lacks_encryption(&workload) || denied(&flow);
            if ends {
                self.same_node.call_off(attested.id, CloseReason::PolicyChanged);
            }
            ends
        });
        destroyed.unwrap_or_else(|error| {
            warn!(pod = %workload.name, %error, "open connections that the kernel let through could not be held against the changed policy");
            0
        })
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

    fn overloaded(&self, pod: &LocalPod, accepted: &Accepted, full: Full) {
        let info = ConnectionInfo {
            destination: Some(pod.workload()),
            ..ConnectionInfo::new(Direction::Inbound, accepted.peer, accepted.local)
        };
        self.observer.fail(&info, CloseReason::Overloaded, &full);
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
        let stream = Arc::new(stream);
        let waiting = self.strangers.enter(Arc::downgrade(&stream));
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

    async fn plaintext(self: Arc<Self>, pod: Arc<LocalPod>, accepted: Box<(Accepted, Turn)>) {
        let Some((stream, far, carried)) = Box::pin(self.let_in(&pod, accepted)).await else { return };
        let (mut source, mut sink) = tcp::split(stream);
        relay_inbound((&mut source, &mut sink), far, carried).await;
    }

    /// Connects a plaintext connection to the application; one that is refused is reset, counted and logged.
    async fn let_in(&self, pod: &LocalPod, accepted: Box<(Accepted, Turn)>) -> Option<(TcpStream, TcpStream, Carried)> {
        let (Accepted { stream, peer: source, local }, turn) = *accepted;
        turn.leads_to(Some(local));
        let mut info = ConnectionInfo {
            source: self.snapshots.borrow().workload_at(source.ip()).cloned(),
            destination: Some(pod.workload()),
            ..ConnectionInfo::new(Direction::Inbound, source, local)
        };
        // From a pod of this node's, which the kernel has let go by a verdict that is void by now.
        let attested = self.same_node.attested(source, local);
        if let Some(attested) = &attested {
            info.source_identity = attested.identity();
            info.destination_identity = Some(pod.workload().identity.clone());
            info.security = Security::Attested;
        }
        let flow = Arc::new(Flow { source_identity: info.source_identity.clone(), source, destination: local });
        let registered = self.open.register_in_the_clear(&pod.workload().uid, Arc::clone(&flow));
        let opened = if attested.is_some_and(|attested| attested.lacks_encryption(&pod.workload())) {
            let detail = "connections between these pods of one node are to be encrypted by now".to_owned();
            Err(Refusal { reason: CloseReason::PlaintextRefused, detail })
        } else {
            let arrival = self.arrivals.arriving(source, local);
            turn.ready().await;
            self.deliver(pod, &flow, (arrival, turn.depart())).await
        };
        match opened {
            Ok(far) => Some((stream, far, Carried { open: self.observer.open(info), registered })),
            Err(Refusal { reason, detail }) => {
                tcp::reset_on_close(&stream);
                self.observer.fail(&info, reason, &detail);
                None
            }
        }
    }

    /// Asks mode and policy, and connects to the application, once the connection from the source port `after` is there.
    async fn deliver(
        &self,
        pod: &LocalPod,
        flow: &Flow,
        (arrival, after): (Arrival<'_>, Option<u16>),
    ) -> Result<TcpStream, Refusal> {
        arrival.after(after).await;
        let workload = pod.workload();
        self.permit(&workload, flow)?;
        let port = |range: Range<u16>| move || rand::rng().random_range(range.clone());
        let above = repeat_with(port(SOURCE_PORTS)).take(TRIES[0]);
        // At last the kernel looks for one itself.
        let ports = above.chain(repeat_with(port(CLIENTS_PORTS)).take(TRIES[1])).chain([0]);
        let mut refused = DeliverError::Socket { destination: flow.destination, source: io::ErrorKind::AddrInUse.into() };
        for port in ports {
            let source = SocketAddr::new(flow.source.ip(), port);
            // The kernel could not tell the two apart.
            if self.open.holds_plaintext(&workload.uid, source, flow.destination) {
                continue;
            }
            match connect::connect(delivery_socket(pod, flow)?, source, flow.destination, DELIVERY_MARK).await {
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
        let evaluation = judge(&snapshot, workload, flow);
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

/// A TCP socket in the pod's network namespace, for the destination's family.
fn delivery_socket(pod: &LocalPod, flow: &Flow) -> Result<Socket, DeliverError> {
    let domain = Domain::for_address(flow.destination);
    let made = pod.netns.enter(|| Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP)));
    made.map_err(|source| DeliverError::Socket { destination: flow.destination, source })
}

/// Whether the connection is plaintext to a port that takes none.
fn strictly_refused(workload: &Workload, flow: &Flow) -> bool {
    flow.source_identity.is_none() && workload.peer_authentication.mode_of(flow.destination.port()) == Mode::Strict
}
