//! What a peer's tunnel carries to a pod, stream by stream, in either form.

use std::fmt::Display;
use std::future::pending;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::net::TcpStream;
use tokio::time::timeout;
use tracing::debug;

use super::{Carried, GREEDY, Inbound, Refusal, relay_inbound};
use crate::capture::LocalPod;
use crate::identity::clock::{Clock as _, SystemClock, readable};
use crate::model::{CloseReason, Flow, SpiffeId};
use crate::observe::{ConnectionInfo, Direction, Security};
use crate::open_connections::Registered;
use crate::relay::tcp;
use crate::serve::{Full, Permits};
use crate::tunnel::hbone::{self, OpenRequest};
use crate::tunnel::single::{self, Open, SingleStream};

/// How long a peer of HBONE may take to hear that its tunnel carries nothing new; streams that it opens meanwhile are served.
const HEARING: Duration = Duration::from_secs(5);
/// Why one is refused after that.
const DISTRUSTED: &str =
    "other roots are believed than when the client showed its certificate, and it was told so: it has to show one again";

/// The far end of a tunnel.
#[derive(Clone)]
pub(super) struct Peer {
    /// Who its workload is, from the verified certificate chain.
    pub(super) identity: SpiffeId,
    /// When that chain's leaf ends.
    pub(super) expires: SystemTime,
    /// Its address, which is its workload's.
    pub(super) addr: SocketAddr,
    /// The pod's address and the tunnel port.
    pub(super) local: SocketAddr,
    /// The fingerprint of the roots that its chain was held against.
    pub(super) roots: Arc<str>,
}

impl Peer {
    /// The peer with the source port that one of its streams has. Only the port is taken from what it says; the address is its tunnel's.
    fn at_port(self, port: u16) -> Self {
        Self { addr: SocketAddr::new(self.addr.ip(), port), ..self }
    }
}

impl Inbound {
    /// The streams of an HBONE tunnel, side by side. Each is a connection of its own to the application, and takes a permit.
    pub(super) async fn hbone(
        self: Arc<Self>,
        pod: Arc<LocalPod>,
        peer: Peer,
        mut tunnel: Box<hbone::Inbound>,
        permits: Permits,
    ) {
        let mut distrusted = pin!(self.distrusted(&peer));
        let mut draining = false;
        // A peer that is told that its tunnel ends need not care.
        let mut heard = None;
        loop {
            let request = tokio::select! {
                request = tunnel.next() => request,
                () = &mut distrusted, if heard.is_none() => {
                    tunnel.drain();
                    draining = true;
                    heard = Some(Instant::now() + HEARING);
                    continue;
                }
                () = pod.released.cancelled(), if !draining => {
                    tunnel.drain();
                    draining = true;
                    continue;
                }
                () = self.drain.started(), if !draining => {
                    tunnel.drain();
                    draining = true;
                    continue;
                }
                () = pod.gone.cancelled() => break,
            };
            match request {
                Some(Ok(request)) if heard.is_some_and(|by| Instant::now() >= by) => {
                    self.turn_away(&pod, &peer, request, CloseReason::PeerNotAuthenticated, DISTRUSTED);
                }
                Some(Ok(request)) => {
                    let Some(share) = self.peers.take(&peer.identity, permits.free()) else {
                        self.turn_away(&pod, &peer, request, CloseReason::Overloaded, GREEDY);
                        continue;
                    };
                    let Some(permit) = permits.take() else {
                        self.turn_away(&pod, &peer, request, CloseReason::Overloaded, Full::Agent);
                        continue;
                    };
                    let (inbound, pod, peer) = (Arc::clone(&self), Arc::clone(&pod), peer.clone());
                    self.drain.spawn(async move { inbound.hbone_stream(&pod, peer, request).await }, (permit, share));
                }
                Some(Err(error)) => {
                    debug!(peer = %peer.addr, %error, "tunnel broke");
                    break;
                }
                None => break,
            }
        }
    }

    /// The streams of a tunnel of the single form, one after the other.
    pub(super) async fn single(&self, pod: &LocalPod, peer: &Peer, mut tunnel: single::Idle) {
        // A tunnel that waits for its next stream needs no room for one, and a stream none for what its tunnel has waited with.
        while let Some((open, mut stream)) = Box::pin(self.next_stream(pod, peer, tunnel)).await {
            let carried = match Box::pin(self.answer(pod, peer, &open, &mut stream)).await {
                Ok(Some((far, carried))) => {
                    Box::pin(relay_inbound((&mut stream.source, &mut stream.sink), far, carried)).await;
                    stream.end()
                }
                Ok(None) => stream.refuse(),
                Err(_broken) => None,
            };
            match carried {
                Some(idle) => tunnel = idle,
                None => return,
            }
        }
    }

    /// Waits for the next stream of a tunnel; none when there will be no more.
    async fn next_stream(&self, pod: &LocalPod, peer: &Peer, tunnel: single::Idle) -> Option<(Open, Box<SingleStream>)> {
        let no_more = async {
            tokio::select! {
                () = self.distrusted(peer) => {}
                () = pod.released.cancelled() => {}
                () = self.drain.started() => {}
            }
        };
        tunnel.next(no_more).await.unwrap_or_else(|error| {
            debug!(peer = %peer.addr, %error, "tunnel broke");
            None
        })
    }

    /// Waits until others are believed than when the peer showed its certificate, or that has ended. No more streams may be opened then:
    /// the peer has to show one again.
    async fn distrusted(&self, peer: &Peer) {
        let mut bundle = self.svids.bundle();
        let changed = async {
            if bundle.wait_for(|bundle| bundle.fingerprint != peer.roots).await.is_err() {
                // The store has ended, and the agent with it.
                pending().await
            }
        };
        let left = peer.expires.duration_since(SystemClock.now()).unwrap_or_default();
        let _whichever = timeout(left, changed).await;
    }

    async fn hbone_stream(&self, pod: &LocalPod, peer: Peer, mut request: OpenRequest) {
        let (destination, after) = (request.destination(), request.after());
        let port = request.source().map_or(peer.addr.port(), |source| source.port());
        let peer = peer.at_port(port);
        let arrival = self.arrivals.arriving(peer.addr, destination.unwrap_or(peer.local));
        let info = self.describe(pod, &peer, destination.unwrap_or(peer.local));
        let delivered = match self.admit(pod, &peer, destination) {
            Ok((flow, registered)) => tokio::select! {
                delivered = Box::pin(self.deliver(pod, &flow, (arrival, after))) => delivered.map(|far| (far, registered)),
                () = request.abandoned() => {
                    let detail = "the source gave up before the destination answered";
                    return self.observer.fail(&info, CloseReason::SourceReset, &detail);
                }
            },
            Err(refusal) => Err(refusal),
        };
        let (far, registered) = match delivered {
            Ok(delivered) => delivered,
            Err(Refusal { reason, detail }) => {
                self.observer.fail(&info, reason, &detail);
                return request.refuse(reason);
            }
        };
        match request.accept() {
            Ok((mut source, mut sink)) => {
                let carried = Carried { open: self.observer.open(info), registered };
                relay_inbound((&mut source, &mut sink), far, carried).await;
            }
            Err(error) => {
                tcp::reset_on_close(&far);
                self.observer.fail(&info, CloseReason::SourceReset, &error);
            }
        }
    }

    /// Opens the way from a stream to the application, and answers the peer; none when it was refused.
    ///
    /// # Errors
    /// The tunnel's error: there is nobody to answer.
    async fn answer(
        &self,
        pod: &LocalPod,
        peer: &Peer,
        open: &Open,
        stream: &mut SingleStream,
    ) -> io::Result<Option<(TcpStream, Carried)>> {
        let peer = peer.clone().at_port(open.source.port());
        let arrival = self.arrivals.arriving(peer.addr, open.destination);
        let info = self.describe(pod, &peer, open.destination);
        let delivered = match self.admit(pod, &peer, Some(open.destination)) {
            Ok((flow, registered)) => self.deliver(pod, &flow, (arrival, open.after)).await.map(|far| (far, registered)),
            Err(refusal) => Err(refusal),
        };
        let (far, registered) = match delivered {
            Ok(delivered) => delivered,
            Err(Refusal { reason, detail }) => {
                self.observer.fail(&info, reason, &detail);
                return stream.sink.answer(Some(reason)).await.map(|()| None);
            }
        };
        if let Err(error) = stream.connected().await {
            tcp::reset_on_close(&far);
            self.observer.fail(&info, CloseReason::SourceReset, &error);
            return Err(error);
        }
        Ok(Some((far, Carried { open: self.observer.open(info), registered })))
    }

    fn turn_away(&self, pod: &LocalPod, peer: &Peer, request: OpenRequest, reason: CloseReason, why: impl Display) {
        let destination = request.destination().unwrap_or(peer.local);
        if let Some(source) = request.source() {
            // Nobody has to wait for it.
            drop(self.arrivals.arriving(SocketAddr::new(peer.addr.ip(), source.port()), destination));
        }
        let info = self.describe(pod, peer, destination);
        self.observer.fail(&info, reason, &why);
        request.refuse(reason);
    }

    fn describe(&self, pod: &LocalPod, peer: &Peer, destination: SocketAddr) -> ConnectionInfo {
        let snapshot = self.snapshots.borrow();
        let workload = pod.workload();
        ConnectionInfo {
            source: snapshot.workload_at(peer.addr.ip()).filter(|workload| workload.identity == peer.identity).cloned(),
            source_identity: Some(peer.identity.clone()),
            destination_identity: Some(workload.identity.clone()),
            destination: Some(workload),
            security: Security::MutualTls,
            ..ConnectionInfo::new(Direction::Inbound, peer.addr, destination)
        }
    }

    /// Enters a stream among the open connections, if it is for this pod and its source still who it was.
    fn admit(&self, pod: &LocalPod, peer: &Peer, destination: Option<SocketAddr>) -> Result<(Arc<Flow>, Registered), Refusal> {
        if SystemClock.now() >= peer.expires {
            let detail = format!("the client's certificate has ended, at {}, while its tunnel was open", readable(peer.expires));
            return Err(Refusal { reason: CloseReason::PeerNotAuthenticated, detail });
        }
        let Some(destination) = destination.filter(|destination| pod.addresses.contains(&destination.ip())) else {
            let detail = "the stream's destination is not an address and port of this pod".to_owned();
            return Err(Refusal { reason: CloseReason::BadRequest, detail });
        };
        if destination.is_ipv4() != peer.addr.is_ipv4() {
            // The application could not be shown the client's address, but its own pod's.
            let detail = "the stream's destination is of another address family than the tunnel".to_owned();
            return Err(Refusal { reason: CloseReason::BadRequest, detail });
        }
        let flow = Arc::new(Flow { source_identity: Some(peer.identity.clone()), source: peer.addr, destination });
        let registered = self.open.register(&pod.workload().uid, Arc::clone(&flow));
        Ok((flow, registered))
    }
}
