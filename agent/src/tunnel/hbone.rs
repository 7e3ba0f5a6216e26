//! HBONE: one captured connection is one HTTP/2 `CONNECT` stream (RFC 9113, section 8.5), its destination in `:authority`, its source in
//! `forwarded` (RFC 7239).
//!
//! Interoperates with Istio ambient. A stream's END_STREAM is the connection's FIN, its RST_STREAM the connection's RST, and its
//! flow-control window the connection's: a window is given back only when the application has taken the bytes. How large windows
//! are, so that one slow stream cannot hold up another and no peer fills the agent's memory, is up to `windows`.

use std::future::{Future as _, poll_fn};
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use futures_util::task::AtomicWaker;
use h2::{Reason, RecvStream, client, server};
use http::header::{FORWARDED, HeaderValue};
use http::{HeaderName, Method, Request, Response, StatusCode};
use tokio::time::{Instant, Sleep, sleep};
use tracing::{Instrument as _, debug};

mod halves;
mod windows;

use self::halves::halves;
pub use self::halves::{HboneSink, HboneSource};
use self::windows::{Flow, Still, Windows};
use super::single::Open;
use super::tls_stream::TlsStream;
use super::{ACCEPTED_IDLE, TunnelError};
use crate::model::CloseReason;

/// The ALPN protocol of this form.
pub const ALPN: &[u8] = b"h2";
/// The largest frame taken, in bytes: a part of one is kept until the rest has come.
const FRAME: u32 = 64 << 10;
/// How many bytes of a tunnel may wait for its connection to take them, over all its streams.
const UNSENT: usize = 1 << 20;
/// How many of each stream's may when there are so many already.
const LITTLE: usize = 16 << 10;
/// What small frames may cost beyond their bytes while nobody has taken them out of the tunnel, by h2's reckoning of 256 bytes each.
const SMALL_FRAMES: usize = 2 << 20;
/// How many streams a tunnel carries at once.
pub const STREAMS: u32 = 100;
/// An idle tunnel is looked at so many times before it ends, and so often.
const IDLE_PARTS: u32 = 5;
const IDLE_PART: Duration = Duration::from_secs(ACCEPTED_IDLE.as_secs() / (IDLE_PARTS as u64 - 1));
/// Names the reason of a refusal, in the words of the access log. Other implementations skip it.
const REASON: HeaderName = HeaderName::from_static("culvert-close-reason");
/// The source port of the stream, of whichever tunnel between the two, that is to be delivered first. The same.
const AFTER: HeaderName = HeaderName::from_static("culvert-after");

/// The dialling side of a tunnel.
#[derive(Debug)]
pub struct Outbound {
    requests: client::SendRequest<Bytes>,
    shared: Arc<Shared>,
}

/// What a tunnel's streams and its connection tell each other.
#[derive(Debug, Default)]
struct Shared {
    streams: AtomicUsize,
    /// How many of them stand still: they hold bytes that nobody takes. And how many bytes those are.
    still: AtomicUsize,
    held: AtomicUsize,
    /// The task of the connection, which sees to the windows.
    connection: AtomicWaker,
    closed: AtomicBool,
    /// How many bytes have been taken out of it.
    taken: AtomicU64,
    /// How many bytes wait for the connection.
    unsent: AtomicUsize,
    /// Who waits for there to be fewer.
    crowd: Mutex<Vec<Waker>>,
}

/// Bytes that wait for the connection.
struct Unsent {
    bytes: Bytes,
    place: Arc<Place>,
}

/// The accepting side of a tunnel.
pub struct Inbound {
    connection: server::Connection<TlsStream, Bytes>,
    windows: Windows,
    shared: Arc<Shared>,
    idle: Idle,
}

/// For how long a tunnel has carried nothing, in parts of [`ACCEPTED_IDLE`].
struct Idle {
    parts: u32,
    part: Pin<Box<Sleep>>,
}

/// A peer's wish to open a stream.
pub struct OpenRequest {
    request: Request<RecvStream>,
    respond: server::SendResponse<Bytes>,
    place: Place,
}

/// A stream's place in its tunnel's count.
#[derive(Debug)]
pub(super) struct Place {
    tunnel: Arc<Shared>,
    /// How many of its bytes wait for the connection.
    unsent: AtomicUsize,
    sink: AtomicWaker,
}

impl Outbound {
    /// Starts HTTP/2 on an authenticated connection. The tunnel runs in a task of its own until it breaks or the last handle to it
    /// is dropped.
    ///
    /// # Errors
    /// [`TunnelError::Broken`] when the peer does not speak HTTP/2.
    pub(super) async fn start(io: TlsStream) -> Result<Self, TunnelError> {
        let mut windows = Windows::new();
        let (requests, mut connection) = client::Builder::new()
            .initial_window_size(windows.stream())
            .initial_connection_window_size(windows.tunnel())
            .data_frame_budget(SMALL_FRAMES)
            .max_frame_size(FRAME)
            .max_send_buffer_size(UNSENT)
            .enable_push(false)
            .handshake(io)
            .await?;
        let shared = Arc::new(Shared::default());
        let watched = Arc::clone(&shared);
        tokio::spawn(
            async move {
                let ended = poll_fn(|cx| {
                    watched.connection.register(cx.waker());
                    loop {
                        watched.adapt(&mut windows, &mut connection);
                        let polled = Pin::new(&mut connection).poll(cx);
                        if polled.is_ready() || !watched.adapt(&mut windows, &mut connection) {
                            return polled;
                        }
                    }
                });
                if let Err(error) = ended.await {
                    debug!(%error, "tunnel broke");
                }
                watched.closed.store(true, Ordering::Release);
            }
            .in_current_span(),
        );
        Ok(Self { requests, shared })
    }

    /// How many streams it carries now.
    #[must_use]
    pub fn streams(&self) -> usize {
        self.shared.streams.load(Ordering::Relaxed)
    }

    /// Whether it has ended.
    #[must_use]
    pub fn closed(&self) -> bool {
        self.shared.closed.load(Ordering::Acquire)
    }

    /// Takes the place of one more stream; none when the tunnel has ended, or carries as many as both sides let it. A stream past
    /// that would wait unheard for another's end.
    #[must_use]
    pub(super) fn place(&self) -> Option<Place> {
        let most = self.requests.current_max_send_streams().min(STREAMS as usize);
        if self.closed() { None } else { Place::take(&self.shared, most) }
    }

    /// Opens a stream, whose destination the peer must reach for us before it answers.
    ///
    /// # Errors
    /// [`TunnelError::Refused`] with the peer's reason, or [`TunnelError::Broken`].
    pub(super) async fn open(&self, place: Place, open: &Open) -> Result<(HboneSource, HboneSink), TunnelError> {
        let mut request = Request::new(());
        *request.method_mut() = Method::CONNECT;
        // An address and a port are always an authority.
        *request.uri_mut() = open
            .destination
            .to_string()
            .parse()
            .map_err(|_never: http::uri::InvalidUri| h2::Error::from(Reason::INTERNAL_ERROR))?;
        // An address and a port are always a value.
        let source = HeaderValue::try_from(format!("for=\"{}\"", open.source))
            .map_err(|_never| h2::Error::from(Reason::INTERNAL_ERROR))?;
        request.headers_mut().insert(FORWARDED, source);
        if let Some(port) = open.after {
            request.headers_mut().insert(AFTER, port.into());
        }
        let mut requests = self.requests.clone().ready().await?;
        let (response, sink) = requests.send_request(request, false)?;
        let (head, stream) = response.await?.into_parts();
        if head.status != StatusCode::OK {
            let word = head.headers.get(&REASON).and_then(|word| word.to_str().ok());
            let reason = word.and_then(CloseReason::from_word).unwrap_or_else(|| reason_of(head.status));
            return Err(TunnelError::Refused { reason });
        }
        Ok(halves(stream, sink, place))
    }
}

impl Place {
    fn take(shared: &Arc<Shared>, most: usize) -> Option<Self> {
        let one_more = |streams| (streams < most).then_some(streams + 1);
        shared.streams.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).ok()?;
        Some(Self::in_tunnel(shared))
    }

    /// Of a stream that is there.
    fn one_more(shared: &Arc<Shared>) -> Self {
        shared.streams.fetch_add(1, Ordering::Relaxed);
        Self::in_tunnel(shared)
    }

    fn in_tunnel(shared: &Arc<Shared>) -> Self {
        Self { tunnel: Arc::clone(shared), unsent: AtomicUsize::new(0), sink: AtomicWaker::new() }
    }

    /// Waits until the connection has taken enough, and says how many bytes it may be given at once. A tunnel that is full lets every
    /// stream have a little there: what the others have may wait for their readers, when their windows have become smaller.
    fn poll_room(&self, cx: &mut Context<'_>) -> Poll<usize> {
        let room = || match (self.tunnel.unsent.load(Ordering::Acquire), self.unsent.load(Ordering::Acquire)) {
            (..UNSENT, _) => Some(UNSENT),
            (_, 0) => Some(LITTLE),
            _ => None,
        };
        if let Some(room) = room() {
            return Poll::Ready(room);
        }
        self.sink.register(cx.waker());
        let mut crowd = self.tunnel.crowd();
        if !crowd.iter().any(|waker| waker.will_wake(cx.waker())) {
            crowd.push(cx.waker().clone());
        }
        drop(crowd);
        // Whoever has made room before has not seen us.
        room().map_or(Poll::Pending, Poll::Ready)
    }

    /// Counts bytes as waiting for the connection, until they are dropped.
    fn unsent(self: &Arc<Self>, bytes: Bytes) -> Bytes {
        self.unsent.fetch_add(bytes.len(), Ordering::AcqRel);
        self.tunnel.unsent.fetch_add(bytes.len(), Ordering::AcqRel);
        Bytes::from_owner(Unsent { bytes, place: Arc::clone(self) })
    }
}

impl Shared {
    fn adapt(&self, windows: &mut Windows, flow: &mut impl Flow) -> bool {
        let still = Still { streams: self.still.load(Ordering::Relaxed), bytes: self.held.load(Ordering::Relaxed) };
        windows.adapt(still, self.taken.load(Ordering::Relaxed), flow)
    }

    fn crowd(&self) -> MutexGuard<'_, Vec<Waker>> {
        self.crowd.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsRef<[u8]> for Unsent {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Unsent {
    fn drop(&mut self) {
        let (bytes, tunnel) = (self.bytes.len(), &self.place.tunnel);
        if self.place.unsent.fetch_sub(bytes, Ordering::AcqRel) == bytes {
            self.place.sink.wake();
        }
        let before = tunnel.unsent.fetch_sub(bytes, Ordering::AcqRel);
        if before >= UNSENT && before - bytes < UNSENT {
            let crowd = std::mem::take(&mut *tunnel.crowd());
            crowd.into_iter().for_each(Waker::wake);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.tunnel.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Inbound {
    /// Starts HTTP/2 on an authenticated connection.
    ///
    /// # Errors
    /// [`TunnelError::Broken`] when the peer does not speak HTTP/2.
    pub(super) async fn start(io: TlsStream) -> Result<Self, TunnelError> {
        let windows = Windows::new();
        let connection = server::Builder::new()
            .initial_window_size(windows.stream())
            .initial_connection_window_size(windows.tunnel())
            .data_frame_budget(SMALL_FRAMES)
            .max_frame_size(FRAME)
            .max_send_buffer_size(UNSENT)
            .max_concurrent_streams(STREAMS)
            .max_header_list_size(16 * 1024)
            .handshake(io)
            .await?;
        Ok(Self { connection, windows, shared: Arc::default(), idle: Idle { parts: 0, part: Box::pin(sleep(IDLE_PART)) } })
    }

    /// The peer's next wish; none when the tunnel has ended in order, or has carried nothing for too long. Must be called until then: it
    /// drives all the streams. Cancel safe.
    ///
    /// # Errors
    /// [`TunnelError::Broken`] when the tunnel breaks.
    pub async fn next(&mut self) -> Option<Result<OpenRequest, TunnelError>> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<OpenRequest, TunnelError>>> {
        self.shared.connection.register(cx.waker());
        loop {
            self.shared.adapt(&mut self.windows, &mut self.connection);
            if self.poll_idle(cx).is_ready() {
                return Poll::Ready(None);
            }
            // What is polled is the connection: it has no state beside it.
            if let Poll::Ready(accepted) = pin!(self.connection.accept()).poll(cx) {
                self.idle.parts = 0;
                let place = |(request, respond)| OpenRequest { request, respond, place: Place::one_more(&self.shared) };
                return Poll::Ready(accepted.map(|accepted| accepted.map(place).map_err(TunnelError::from)));
            }
            if !self.shared.adapt(&mut self.windows, &mut self.connection) {
                return Poll::Pending;
            }
        }
    }

    /// Ends an idle tunnel: the peer is told first, and has a while to take note.
    fn poll_idle(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while self.idle.part.as_mut().poll(cx).is_ready() {
            self.idle.part.as_mut().reset(Instant::now() + IDLE_PART);
            let idle = self.shared.streams.load(Ordering::Relaxed) == 0;
            self.idle.parts = if idle { self.idle.parts + 1 } else { 0 };
            match self.idle.parts {
                ..IDLE_PARTS => {}
                IDLE_PARTS => self.drain(),
                _ => return Poll::Ready(()),
            }
        }
        Poll::Pending
    }

    /// Takes no more streams; those that are open go on.
    pub fn drain(&mut self) {
        self.connection.graceful_shutdown();
    }
}

impl OpenRequest {
    /// The address that the peer asks for; none when the request is not a `CONNECT` to an address and a port.
    #[must_use]
    pub fn destination(&self) -> Option<SocketAddr> {
        if self.request.method() != Method::CONNECT {
            return None;
        }
        self.request.uri().authority()?.as_str().parse().ok()
    }

    /// Who dialled, as the peer says; none when it does not.
    #[must_use]
    pub fn source(&self) -> Option<SocketAddr> {
        let forwarded = self.request.headers().get(FORWARDED)?.to_str().ok()?;
        let parameters = forwarded.split(';').filter_map(|parameter| parameter.trim().split_once('='));
        parameters
            .filter(|(name, _)| name.eq_ignore_ascii_case("for"))
            .find_map(|(_, value)| value.trim_matches('"').parse().ok())
    }

    /// The source port of the stream that is to be delivered first; none when the peer names none.
    #[must_use]
    pub fn after(&self) -> Option<u16> {
        self.request.headers().get(AFTER)?.to_str().ok()?.parse().ok()
    }

    /// Grants the wish.
    ///
    /// # Errors
    /// [`TunnelError::Broken`] when the peer has given up meanwhile.
    pub fn accept(mut self) -> Result<(HboneSource, HboneSink), TunnelError> {
        let sink = self.respond.send_response(Response::new(()), false)?;
        Ok(halves(self.request.into_body(), sink, self.place))
    }

    /// Waits until the peer gives the stream up.
    pub async fn abandoned(&mut self) {
        let _reason = poll_fn(|cx| self.respond.poll_reset(cx)).await;
    }

    /// Refuses the wish.
    pub fn refuse(mut self, reason: CloseReason) {
        let mut response = Response::new(());
        *response.status_mut() = status_of(reason);
        response.headers_mut().insert(REASON, http::HeaderValue::from_static(reason.as_str()));
        // A peer that has gone meanwhile needs no answer.
        let _gone = self.respond.send_response(response, true);
    }
}

/// The status that says a reason to any implementation.
fn status_of(reason: CloseReason) -> StatusCode {
    match reason {
        CloseReason::PolicyDenied
        | CloseReason::PolicyChanged
        | CloseReason::PeerNotAuthenticated
        | CloseReason::PlaintextRefused => StatusCode::UNAUTHORIZED,
        CloseReason::BadRequest | CloseReason::NoOriginalDst => StatusCode::BAD_REQUEST,
        CloseReason::Finished
        | CloseReason::SourceReset
        | CloseReason::DestinationReset
        | CloseReason::DestinationRefused
        | CloseReason::DestinationUnreachable
        | CloseReason::NoEndpoint
        | CloseReason::TunnelFailed
        | CloseReason::NoIdentity
        | CloseReason::Overloaded
        | CloseReason::Draining
        | CloseReason::PodGone => StatusCode::SERVICE_UNAVAILABLE,
    }
}

/// What a status of an implementation that gives no word means.
fn reason_of(status: StatusCode) -> CloseReason {
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => CloseReason::PolicyDenied,
        StatusCode::SERVICE_UNAVAILABLE | StatusCode::BAD_GATEWAY | StatusCode::GATEWAY_TIMEOUT => {
            CloseReason::DestinationRefused
        }
        _ => CloseReason::BadRequest,
    }
}

#[cfg(test)]
mod tests;
