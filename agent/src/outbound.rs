//! The source's side: a captured connection leaves its pod in a tunnel, under the pod's own identity.
//!
//! ```text
//! accept ─> original destination ─> route ─┬─> tunnel (SVID, pool, open) ─┐
//!                                          ├─> the pod itself ────────────┼─> relay ─> access log
//!                                          └─> passthrough ───────────────┘
//! ```
//!
//! A connection that cannot be carried as the mesh's state asks is reset, never let through another way.

use std::fmt::Display;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::capture::{Accepted, Listener, LocalPod, Maps};
use crate::deliver::{DeliverError, passthrough};
use crate::discovery::DiscoveryHandle;
use crate::drain::Drain;
use crate::identity::{SvidError, SvidStore};
use crate::model::{CloseReason, Flow, OriginalDst, PeerAddr, Snapshot, SpiffeId, Workload};
use crate::observe::{ConnectionInfo, Direction, Observer, OpenConnection, Security, Side};
use crate::open_connections::{OpenConnections, Registered};
use crate::order::{Departures, Turn};
use crate::relay::tcp::{TcpSink, TcpSource};
use crate::relay::{Sink, Source, relay, tcp};
use crate::same_node::SameNode;
use crate::serve::{Full, Permits, serve};
use crate::tunnel::pool::Pool;
use crate::tunnel::single::Open;
use crate::tunnel::{Stream, TunnelError, TunnelForm, dial, tls};

pub mod route;

use route::{RoundRobin, Route, route};

/// How long a connection waits for its pod's certificate.
const IDENTITY_DEADLINE: Duration = Duration::from_secs(5);
/// How long the destination's agent may take to answer, its own connection to the application included. A tunnel whose far end has
/// gone without a word takes longer to be found dead.
const OPEN_DEADLINE: Duration = Duration::from_secs(15);
/// The port of peers' tunnels.
const HBONE_PORT: u16 = 15008;

/// The source's side of a node.
pub struct Outbound {
    maps: Maps,
    discovery: DiscoveryHandle,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    svids: SvidStore,
    pool: Pool<TunnelKey, dial::Setup>,
    robin: RoundRobin,
    open: Arc<OpenConnections>,
    departures: Arc<Departures>,
    same_node: Arc<SameNode>,
    observer: Observer,
    drain: Drain,
    form: TunnelForm,
}

/// A connection that a pod has made.
struct Captured {
    accepted: Accepted,
    /// What was dialled, and the connection's place among those that dialled the same; none when that is not on file.
    original_dst: Option<(OriginalDst, Turn)>,
}

/// Who speaks to whom, under which certificate, and who is believed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TunnelKey {
    source: SpiffeId,
    source_pod: Arc<str>,
    generation: u64,
    /// The fingerprint of the roots that the destination's certificate chained to: one of them may have been withdrawn since.
    roots: Arc<str>,
    destination: SpiffeId,
    peer: PeerAddr,
}

/// Why a captured connection was not carried.
#[derive(Debug)]
struct Failure {
    reason: CloseReason,
    detail: String,
}

impl Failure {
    fn new(reason: CloseReason, detail: impl Display) -> Self {
        Self { reason, detail: detail.to_string() }
    }
}

impl From<TunnelError> for Failure {
    fn from(error: TunnelError) -> Self {
        Self::new(error.reason(), error)
    }
}

impl From<DeliverError> for Failure {
    fn from(error: DeliverError) -> Self {
        Self::new(error.reason(), error)
    }
}

impl From<SvidError> for Failure {
    fn from(error: SvidError) -> Self {
        Self::new(CloseReason::NoIdentity, error)
    }
}

impl Outbound {
    /// The source's side, from its parts.
    #[must_use]
    pub fn new(
        maps: Maps,
        discovery: DiscoveryHandle,
        svids: SvidStore,
        same_node: Arc<SameNode>,
        observer: Observer,
        drain: Drain,
        form: TunnelForm,
    ) -> Arc<Self> {
        let snapshots = discovery.snapshots();
        let (pool, robin, open, departures) = (Pool::new(), RoundRobin::default(), Arc::default(), Arc::default());
        Arc::new(Self { maps, discovery, snapshots, svids, pool, robin, open, departures, same_node, observer, drain, form })
    }

    /// Carries the connections that `pod` makes, until the pod leaves the mesh or the agent stops.
    pub async fn serve(self: Arc<Self>, pod: Arc<LocalPod>, listener: Listener, permits: Permits) {
        let handle = |accepted| Arc::clone(&self).carry(Arc::clone(&pod), Box::new(self.captured(accepted)));
        let overloaded = |accepted: &Accepted, full: Full| {
            let info = ConnectionInfo { source: Some(pod.workload()), ..describe(accepted.peer, accepted.local) };
            self.observer.fail(&info, CloseReason::Overloaded, &full);
        };
        serve(listener, Arc::clone(&pod), self.drain.clone(), permits, handle, overloaded).await;
    }

    /// Drops tunnels and turns that nobody needs any more. To be called every few seconds.
    pub fn sweep(&self) {
        let snapshot = Arc::clone(&self.snapshots.borrow());
        // Whoever is there by now does not know of the tunnel, and who was there may not have been able to say farewell.
        let roots = Arc::clone(&self.svids.bundle().borrow().fingerprint);
        self.pool.retire(|key| {
            let there = snapshot.workload_at(key.peer.0.ip());
            key.roots != roots || there.is_none_or(|workload| workload.identity != key.destination)
        });
        self.pool.sweep(Instant::now());
        self.robin.sweep(&snapshot);
    }

    /// Closes the tunnels of a pod that left, once their streams have ended. The open connections of one that is gone altogether end.
    pub fn forget(&self, pod: &LocalPod) {
        let uid = Arc::clone(&pod.workload().uid);
        if pod.gone.is_cancelled() {
            self.open.close_all(&uid, CloseReason::PodGone);
        }
        self.pool.retire(|key| key.source_pod == uid);
    }

    /// Looks up what a connection has dialled. To be called in the order in which connections came.
    fn captured(&self, accepted: Accepted) -> Captured {
        let dialled = self.maps.original_dst(accepted.peer);
        let original_dst = dialled.map(|dialled| (dialled, self.departures.enter(accepted.peer, dialled.0)));
        Captured { accepted, original_dst }
    }

    async fn carry(self: Arc<Self>, pod: Arc<LocalPod>, captured: Box<Captured>) {
        // What it takes to find and open the way is long gone while bytes move.
        let Some((near, far, carried)) = Box::pin(self.connect(&pod, captured)).await else { return };
        match far {
            Opened::Tunnel(Stream::Single(mut far, home)) => {
                relay_outbound(near, (&mut far.source, &mut far.sink), carried).await;
                home.take_back(far);
            }
            Opened::Tunnel(Stream::Hbone(mut far)) => relay_outbound(near, (&mut far.0, &mut far.1), carried).await,
            Opened::Plain(far) => {
                let (mut source, mut sink) = tcp::split(far);
                relay_outbound(near, (&mut source, &mut sink), carried).await;
            }
        }
    }

    /// Opens the way that a captured connection takes; one that has none is reset, counted and logged.
    async fn connect(&self, pod: &LocalPod, captured: Box<Captured>) -> Option<((TcpSource, TcpSink), Opened, Carried)> {
        let Captured { accepted: Accepted { stream, peer: source, local }, original_dst } = *captured;
        // Dropped, it resets the connection.
        let mut near = tcp::split(stream);
        let workload = pod.workload();
        let Some((original_dst, turn)) = original_dst else {
            let info = ConnectionInfo { source: Some(workload), ..describe(source, local) };
            let detail = "its original destination is not on file: it was not captured here, or the table overflowed";
            self.observer.fail(&info, CloseReason::NoOriginalDst, &detail);
            return None;
        };
        let mut info = ConnectionInfo {
            source: Some(Arc::clone(&workload)),
            original_dst: Some(original_dst.0),
            ..describe(source, original_dst.0)
        };
        let opened = match self.route(&workload, original_dst).await {
            Ok(route) => {
                route.tell(&workload, &mut info);
                let opened = self.open(pod, &workload, &route, (source, &turn), &mut near.0).await;
                // In the kernel others would overtake those that are on their way.
                if opened.is_ok()
                    && turn.is_last()
                    && let Route::Tunnel { target, service: None, .. } = &route
                {
                    self.same_node.consider(pod, source, *target);
                }
                opened
            }
            Err(failure) => Err(failure),
        };
        match opened {
            Ok(far) => {
                let flow = Flow { source_identity: Some(workload.identity.clone()), source, destination: info.destination_addr };
                let registered = self.open.register(&workload.uid, Arc::new(flow));
                if pod.gone.is_cancelled() {
                    registered.cancel.cancel(CloseReason::PodGone);
                }
                Some((near, far, Carried { open: self.observer.open(info), registered }))
            }
            Err(failure) => {
                self.observer.fail(&info, failure.reason, &failure.detail);
                None
            }
        }
    }

    /// Where the connection goes. An address that nobody has told us of is asked about first.
    async fn route(&self, source: &Workload, dialled: OriginalDst) -> Result<Route, Failure> {
        let decide = |snapshot: &Snapshot| {
            route(snapshot, source, dialled, &self.robin)
                .map_err(|reason| Failure::new(reason, format_args!("no ready endpoint behind {dialled}")))
        };
        let snapshot = Arc::clone(&self.snapshots.borrow());
        if let Some(route) = decide(&snapshot)? {
            return Ok(route);
        }
        let asked = self.discovery.resolve(dialled.0.ip()).await.map_err(|error| {
            Failure::new(CloseReason::DestinationUnreachable, format_args!("who is at {dialled} is not known: {error}"))
        })?;
        Ok(decide(&asked)?.unwrap_or(Route::Passthrough { target: dialled.0, workload: None, service: None }))
    }

    async fn open(
        &self,
        pod: &LocalPod,
        source: &Workload,
        route: &Route,
        (client, turn): (SocketAddr, &Turn),
        near: &mut TcpSource,
    ) -> Result<Opened, Failure> {
        match route {
            Route::Tunnel { workload, target, .. } => {
                turn.leads_to(Some(*target));
                let open = Open::new(client, *target);
                Ok(Opened::Tunnel(self.open_stream(pod, source, workload, (&open, turn), near).await?))
            }
            Route::Local { target, .. } | Route::Passthrough { target, .. } => {
                turn.leads_to(None);
                let socket = pod_socket(pod, *target).map_err(|source| DeliverError::Socket { destination: *target, source })?;
                Ok(Opened::Plain(passthrough::connect(socket, *target).await?))
            }
        }
    }

    /// Opens a stream in a tunnel to the destination's workload.
    async fn open_stream(
        &self,
        pod: &LocalPod,
        source: &Workload,
        destination: &Workload,
        (open, turn): (&Open, &Turn),
        near: &mut TcpSource,
    ) -> Result<Stream, Failure> {
        let svid = self.svids.wait(&source.identity, IDENTITY_DEADLINE).await?;
        let peer = PeerAddr(SocketAddr::new(open.destination.ip(), HBONE_PORT));
        let bundle = Arc::clone(&self.svids.bundle().borrow());
        let key = TunnelKey {
            source: source.identity.clone(),
            source_pod: Arc::clone(&source.uid),
            generation: svid.generation,
            roots: Arc::clone(&bundle.fingerprint),
            destination: destination.identity.clone(),
            peer,
        };
        let setup = || Ok(tls::client_config(&svid, &bundle, vec![destination.identity.clone()], self.form.alpn())?);
        let dial = |config| async {
            let socket = pod_socket(pod, peer.0).map_err(|source| TunnelError::Connect { peer: peer.0, source })?;
            let connected = passthrough::connect(socket, peer.0).await;
            let stream = connected.map_err(|error| TunnelError::Connect { peer: peer.0, source: io::Error::other(error) })?;
            let started = Instant::now();
            let made = dial::handshake(stream, peer, config).await;
            let result = made.as_ref().map_or_else(|error| error.reason().as_str(), |_| "ok");
            self.observer.metrics().handshake(Side::Client, result, started.elapsed());
            made
        };
        let (ready, wish) = (|| turn.ready(), || Open { after: turn.depart(), ..open.clone() });
        match timeout(OPEN_DEADLINE, self.pool.open(&key, (ready, wish), near, setup, dial)).await {
            Ok(opened) => Ok(opened?),
            Err(_elapsed) => Err(Failure::new(
                CloseReason::DestinationUnreachable,
                format_args!("the agent at {} has not answered within {OPEN_DEADLINE:?}, the wait for our turn included", peer.0),
            )),
        }
    }
}

/// A connection that is carried: what is told of it, and what calls it off. The namespace of a pod that is gone lives for as long as
/// the agent has sockets in it, but leads nowhere any more.
struct Carried {
    open: OpenConnection,
    registered: Registered,
}

/// Moves a captured connection's bytes until it ends.
#[expect(clippy::manual_async_fn, reason = "an `async fn` would keep room for its arguments beside what they have become")]
fn relay_outbound<'a>(
    (mut source, mut sink): (TcpSource, TcpSink),
    far: (&'a mut impl Source, &'a mut impl Sink),
    Carried { open, registered }: Carried,
) -> impl Future<Output = ()> + Send + 'a {
    async move {
        let bytes = open.bytes();
        let end = relay((&mut source, &mut sink), far, (&bytes.sent, &bytes.received), &registered.cancel).await;
        open.close(end.reason(), None);
    }
}

/// The way to a destination, open.
enum Opened {
    Tunnel(Stream),
    Plain(TcpStream),
}

/// A connection of which only the ends are known.
fn describe(source: SocketAddr, destination: SocketAddr) -> ConnectionInfo {
    ConnectionInfo::new(Direction::Outbound, source, destination)
}

/// A TCP socket in the pod's network namespace, for `destination`'s family.
fn pod_socket(pod: &LocalPod, destination: SocketAddr) -> io::Result<Socket> {
    let domain = Domain::for_address(destination);
    pod.netns.enter(|| Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP)))
}

impl Route {
    /// Adds to a connection's description what its route tells.
    fn tell(&self, source: &Arc<Workload>, info: &mut ConnectionInfo) {
        let (destination, target, service) = match self {
            Self::Tunnel { workload, target, service } => {
                info.security = Security::MutualTls;
                info.source_identity = Some(source.identity.clone());
                info.destination_identity = Some(workload.identity.clone());
                (Some(workload), target, service)
            }
            Self::Local { target, service } => (Some(source), target, service),
            Self::Passthrough { target, workload, service } => (workload.as_ref(), target, service),
        };
        info.destination = destination.cloned();
        info.destination_addr = *target;
        info.destination_service = service.clone();
    }
}
