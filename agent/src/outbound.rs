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
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::capture::listener::{self, Captured};
use crate::capture::{LocalPod, Maps};
use crate::deliver::{DeliverError, passthrough};
use crate::discovery::DiscoveryHandle;
use crate::drain::Drain;
use crate::identity::{SvidError, SvidStore};
use crate::model::{CloseReason, OriginalDst, PeerAddr, Service, Snapshot, SpiffeId, Workload};
use crate::observe::{ConnectionInfo, Direction, Observer, Security};
use crate::relay::{End, Sink, Source, relay, tcp};
use crate::tunnel::pool::Pool;
use crate::tunnel::single::Open;
use crate::tunnel::{ALPN, Stream, TunnelError, dial, tls};

pub mod route;

use route::{RoundRobin, Route, route};

/// How long a connection waits for its pod's certificate.
const IDENTITY_DEADLINE: Duration = Duration::from_secs(5);
/// The port of peers' tunnels.
const HBONE_PORT: u16 = 15008;

/// The source's side of a node.
pub struct Outbound {
    maps: Maps,
    discovery: DiscoveryHandle,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    svids: SvidStore,
    pool: Pool<TunnelKey>,
    robin: RoundRobin,
    observer: Observer,
    drain: Drain,
}

/// Who speaks to whom, under which certificate.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TunnelKey {
    source: SpiffeId,
    source_pod: Arc<str>,
    generation: u64,
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
    pub fn new(maps: Maps, discovery: DiscoveryHandle, svids: SvidStore, observer: Observer, drain: Drain) -> Arc<Self> {
        let snapshots = discovery.snapshots();
        let (pool, robin) = (Pool::new(), RoundRobin::default());
        Arc::new(Self { maps, discovery, snapshots, svids, pool, robin, observer, drain })
    }

    /// Carries the connections that `pod` makes, until the pod leaves the mesh or the agent stops.
    pub async fn serve(self: Arc<Self>, pod: Arc<LocalPod>, listener: TcpListener) {
        listener::serve(listener, &pod.gone, &self.drain, |captured| {
            let (outbound, pod) = (Arc::clone(&self), Arc::clone(&pod));
            async move { outbound.carry(pod, captured).await }
        })
        .await;
    }

    /// Drops tunnels and turns that nobody needs any more. To be called every few seconds.
    pub fn sweep(&self) {
        self.pool.sweep(Instant::now());
        self.robin.sweep(&self.snapshots.borrow());
        self.observer.metrics().tunnels_open(Direction::Outbound, self.pool.len());
    }

    /// Closes the tunnels of a pod that left, once their streams have ended.
    pub fn forget(&self, pod: &LocalPod) {
        let uid = Arc::clone(&pod.workload().uid);
        self.pool.retire(|key| key.source_pod == uid);
    }

    async fn carry(&self, pod: Arc<LocalPod>, Captured { stream, source, .. }: Captured) {
        let workload = pod.workload();
        let Some(original_dst) = self.maps.original_dst(source) else {
            let info = ConnectionInfo { source: Some(workload), ..ConnectionInfo::new(Direction::Outbound, source, source) };
            let detail = "nothing is filed under its source: not captured here, or the table overflowed";
            self.observer.fail(info, CloseReason::NoOriginalDst, &detail);
            return tcp::reset_on_close(&stream);
        };
        let mut info = ConnectionInfo {
            source: Some(Arc::clone(&workload)),
            original_dst: Some(original_dst.0),
            ..ConnectionInfo::new(Direction::Outbound, source, original_dst.0)
        };
        let carried = match self.route(&workload, original_dst).await {
            Ok(Route::Tunnel { workload: destination, target, service }) => {
                info.describe(Some(&destination), target, service);
                self.through_tunnel(&pod, &workload, &destination, target, info.clone(), stream).await
            }
            Ok(Route::Local { target, service }) => {
                info.describe(Some(&workload), target, service);
                self.plainly(&pod, target, info.clone(), stream).await
            }
            Ok(Route::Passthrough { target, workload: destination, service }) => {
                info.describe(destination.as_ref(), target, service);
                self.plainly(&pod, target, info.clone(), stream).await
            }
            Err(failure) => Err((failure, stream)),
        };
        if let Err((failure, stream)) = carried {
            tcp::reset_on_close(&stream);
            self.observer.fail(info, failure.reason, &failure.detail);
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

    async fn through_tunnel(
        &self,
        pod: &LocalPod,
        source: &Workload,
        destination: &Workload,
        target: SocketAddr,
        mut info: ConnectionInfo,
        stream: TcpStream,
    ) -> Result<(), (Failure, TcpStream)> {
        info.security = Security::MutualTls;
        info.source_identity = Some(source.identity.clone());
        info.destination_identity = Some(destination.identity.clone());
        match self.open(pod, source, destination, &Open::new(info.source_addr, target)).await {
            Ok(mut far) => {
                self.relay(stream, (&mut far.source, &mut far.sink), info).await;
                far.end();
                Ok(())
            }
            Err(failure) => Err((failure, stream)),
        }
    }

    /// Opens a stream to `target`, in a tunnel to its workload.
    async fn open(
        &self,
        pod: &LocalPod,
        source: &Workload,
        destination: &Workload,
        open: &Open,
    ) -> Result<Stream, Failure> {
        let svid = self.svids.wait(&source.identity, IDENTITY_DEADLINE).await?;
        let peer = PeerAddr(SocketAddr::new(open.destination.ip(), HBONE_PORT));
        let key = TunnelKey {
            source: source.identity.clone(),
            source_pod: Arc::clone(&source.uid),
            generation: svid.generation,
            destination: destination.identity.clone(),
            peer,
        };
        let dial = || async {
            let bundle = Arc::clone(&self.svids.bundle().borrow());
            let config = tls::client_config(&svid, &bundle, vec![destination.identity.clone()], &ALPN)?;
            let socket = pod_socket(pod, peer.0).map_err(|source| TunnelError::Connect { peer: peer.0, source })?;
            let connected = passthrough::connect(socket, peer.0).await;
            let stream = connected.map_err(|error| TunnelError::Connect { peer: peer.0, source: io::Error::other(error) })?;
            let started = Instant::now();
            let made = dial::handshake(stream, peer, config).await;
            let result = made.as_ref().map(|_| ()).map_err(TunnelError::reason);
            self.observer.metrics().handshake(Direction::Outbound, result, started.elapsed());
            made
        };
        Ok(self.pool.open(&key, open, dial).await?)
    }

    async fn plainly(
        &self,
        pod: &LocalPod,
        target: SocketAddr,
        info: ConnectionInfo,
        stream: TcpStream,
    ) -> Result<(), (Failure, TcpStream)> {
        let socket = match pod_socket(pod, target) {
            Ok(socket) => socket,
            Err(source) => return Err((DeliverError::Socket { destination: target, source }.into(), stream)),
        };
        match passthrough::connect(socket, target).await {
            Ok(far) => {
                let (mut source, mut sink) = tcp::split(far);
                self.relay(stream, (&mut source, &mut sink), info).await;
                Ok(())
            }
            Err(error) => Err((error.into(), stream)),
        }
    }

    async fn relay(&self, stream: TcpStream, far: (&mut impl Source, &mut impl Sink), info: ConnectionInfo) {
        let open = self.observer.open(info);
        let (mut source, mut sink) = tcp::split(stream);
        let cancel: &CancellationToken = self.drain.force();
        let bytes = Arc::clone(open.bytes());
        let end = relay((&mut source, &mut sink), far, (&bytes.sent, &bytes.received), cancel).await;
        open.close(
            match end {
                End::Finished => CloseReason::Finished,
                End::NearBroke => CloseReason::SourceReset,
                End::FarBroke => CloseReason::DestinationReset,
                End::Cancelled => CloseReason::Draining,
            },
            None,
        );
    }
}

/// A TCP socket in the pod's network namespace, for `destination`'s family.
fn pod_socket(pod: &LocalPod, destination: SocketAddr) -> io::Result<Socket> {
    let domain = Domain::for_address(destination);
    pod.netns.enter(|| Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP)))
}

/// The parts of a connection's description that its route tells.
trait Describe {
    fn describe(&mut self, destination: Option<&Arc<Workload>>, target: SocketAddr, service: Option<Arc<Service>>);
}

impl Describe for ConnectionInfo {
    fn describe(&mut self, destination: Option<&Arc<Workload>>, target: SocketAddr, service: Option<Arc<Service>>) {
        self.destination = destination.cloned();
        self.destination_addr = target;
        self.destination_service = service;
    }
}
