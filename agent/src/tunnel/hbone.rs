//! HBONE: one captured connection is one HTTP/2 `CONNECT` stream (RFC 9113, section 8.5), its destination in `:authority`.
//!
//! Interoperates with Istio ambient. A stream's END_STREAM is the connection's FIN, its RST_STREAM the connection's RST, and its
//! flow-control window the connection's: a window is given back only when the application has taken the bytes. The tunnel's own
//! window is so large that one slow stream cannot hold up another.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream, client, server};
use http::{HeaderName, Method, Request, Response, StatusCode};
use tracing::{Instrument as _, debug};

use super::TunnelError;
use super::tls_stream::TlsStream;
use crate::model::CloseReason;
use crate::relay::buffer::{Buffer, Size};
use crate::relay::{Broken, Fault, Sink, Slices, Source};

/// The ALPN protocol of this form.
pub const ALPN: &[u8] = b"h2";
/// A stream's window, in bytes: what one connection may have in flight.
const STREAM_WINDOW: u32 = 4 << 20;
/// The tunnel's window, in bytes: more than all its streams can use.
const TUNNEL_WINDOW: u32 = 1 << 30;
/// The largest frame taken, in bytes.
const FRAME: u32 = 1 << 20;
/// How many streams a tunnel carries at once.
pub const STREAMS: u32 = 100;
/// Fewer bytes than this are copied, so that they don't keep a whole buffer while they wait.
const SMALL_CHUNK: usize = 4 * 1024;
/// Names the reason of a refusal, in the words of the access log. Other implementations skip it.
const REASON: HeaderName = HeaderName::from_static("culvert-close-reason");

/// The dialling side of a tunnel.
#[derive(Debug)]
pub struct Outbound {
    requests: client::SendRequest<Bytes>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    streams: AtomicUsize,
    closed: AtomicBool,
}

/// The accepting side of a tunnel.
pub struct Inbound {
    connection: server::Connection<TlsStream, Bytes>,
}

/// A peer's wish to open a stream.
pub struct OpenRequest {
    request: Request<RecvStream>,
    respond: server::SendResponse<Bytes>,
}

/// The half of a stream that gives bytes.
#[derive(Debug)]
pub struct HboneSource {
    stream: RecvStream,
    /// What has come and was not passed on.
    chunk: Bytes,
    kept: Kept,
    _place: Option<Arc<Place>>,
}

/// What has come behind a chunk that nobody takes: it is taken out of the tunnel, so that a reset behind it shows.
#[derive(Debug, Default)]
struct Kept {
    chunks: VecDeque<Bytes>,
    /// The last of them, while they are small: each costs more than its bytes.
    small: BytesMut,
    /// The stream's end behind all of them, in order or not.
    end: Option<Result<(), io::ErrorKind>>,
}

/// The half of a stream that takes bytes. Dropped before it has finished, it resets the stream.
#[derive(Debug)]
pub struct HboneSink {
    stream: SendStream<Bytes>,
    /// What was taken and is not yet the tunnel's.
    pending: Bytes,
    wanted: Size,
    _place: Option<Arc<Place>>,
}

/// A stream's place in its tunnel's count.
#[derive(Debug)]
pub(super) struct Place(Arc<Shared>);

impl Outbound {
    /// Starts HTTP/2 on an authenticated connection. The tunnel runs in a task of its own until it breaks or the last handle to it
    /// is dropped.
    ///
    /// # Errors
    /// [`TunnelError::Broken`] when the peer does not speak HTTP/2.
    pub(super) async fn start(io: TlsStream) -> Result<Self, TunnelError> {
        let (requests, connection) = client::Builder::new()
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(TUNNEL_WINDOW)
            .max_frame_size(FRAME)
            .max_send_buffer_size(STREAM_WINDOW as usize)
            .enable_push(false)
            .handshake(io)
            .await?;
        let shared = Arc::new(Shared::default());
        let watched = Arc::clone(&shared);
        tokio::spawn(
            async move {
                if let Err(error) = connection.await {
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

    /// Opens a stream to `destination`, which the peer must reach for us before it answers.
    ///
    /// # Errors
    /// [`TunnelError::Refused`] with the peer's reason, or [`TunnelError::Broken`].
    pub(super) async fn open(&self, place: Place, destination: SocketAddr) -> Result<(HboneSource, HboneSink), TunnelError> {
        let mut request = Request::new(());
        *request.method_mut() = Method::CONNECT;
        // An address and a port are always an authority.
        *request.uri_mut() =
            destination.to_string().parse().map_err(|_never: http::uri::InvalidUri| h2::Error::from(Reason::INTERNAL_ERROR))?;
        let mut requests = self.requests.clone().ready().await?;
        let (response, sink) = requests.send_request(request, false)?;
        let (head, stream) = response.await?.into_parts();
        if head.status != StatusCode::OK {
            let word = head.headers.get(&REASON).and_then(|word| word.to_str().ok());
            let reason = word.and_then(CloseReason::from_word).unwrap_or_else(|| reason_of(head.status));
            return Err(TunnelError::Refused { reason });
        }
        Ok(halves(stream, sink, Some(Arc::new(place))))
    }
}

impl Place {
    fn take(shared: &Arc<Shared>, most: usize) -> Option<Self> {
        let one_more = |streams| (streams < most).then_some(streams + 1);
        shared.streams.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).ok()?;
        Some(Self(Arc::clone(shared)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Inbound {
    /// Starts HTTP/2 on an authenticated connection.
    ///
    /// # Errors
    /// [`TunnelError::Broken`] when the peer does not speak HTTP/2.
    pub(super) async fn start(io: TlsStream) -> Result<Self, TunnelError> {
        let connection = server::Builder::new()
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(TUNNEL_WINDOW)
            .max_frame_size(FRAME)
            .max_send_buffer_size(STREAM_WINDOW as usize)
            .max_concurrent_streams(STREAMS)
            .max_header_list_size(16 * 1024)
            .handshake(io)
            .await?;
        Ok(Self { connection })
    }

    /// The peer's next wish; none when the tunnel has ended in order. Must be called until then: it drives all the streams. Cancel
    /// safe.
    ///
    /// # Errors
    /// [`TunnelError::Broken`] when the tunnel breaks.
    pub async fn next(&mut self) -> Option<Result<OpenRequest, TunnelError>> {
        let accepted = self.connection.accept().await?;
        Some(accepted.map(|(request, respond)| OpenRequest { request, respond }).map_err(TunnelError::from))
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

    /// Grants the wish.
    ///
    /// # Errors
    /// [`TunnelError::Broken`] when the peer has given up meanwhile.
    pub fn accept(mut self) -> Result<(HboneSource, HboneSink), TunnelError> {
        let sink = self.respond.send_response(Response::new(()), false)?;
        Ok(halves(self.request.into_body(), sink, None))
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

fn halves(stream: RecvStream, sink: SendStream<Bytes>, place: Option<Arc<Place>>) -> (HboneSource, HboneSink) {
    let source = HboneSource { stream, chunk: Bytes::new(), kept: Kept::default(), _place: place.clone() };
    (source, HboneSink { stream: sink, pending: Bytes::new(), wanted: Size::default(), _place: place })
}

impl Source for HboneSource {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<()>, Broken>> {
        // An empty frame says nothing.
        while self.chunk.is_empty() {
            if let Some(chunk) = self.kept.take() {
                self.chunk = chunk;
                continue;
            }
            match self.kept.end {
                Some(Ok(())) => return Poll::Ready(Ok(None)),
                Some(Err(kind)) => return Poll::Ready(Err(Broken(kind.into()))),
                None => {}
            }
            match ready!(self.stream.poll_data(cx)) {
                Some(Ok(bytes)) => self.chunk = bytes,
                // A tunnel that was cut is no end of file.
                Some(Err(error)) => return Poll::Ready(Err(broken(error))),
                None => return Poll::Ready(Ok(None)),
            }
        }
        Poll::Ready(Ok(Some(())))
    }

    fn filled<'a>(&'a self, slices: &mut Slices<'a>) {
        slices.push(&self.chunk);
    }

    fn consume(&mut self, bytes: usize) {
        self.chunk.advance(bytes);
        // Refused only when more is given back than was taken, or when the stream is gone.
        let _gone = self.stream.flow_control().release_capacity(bytes);
    }

    fn holds(&self) -> bool {
        !self.chunk.is_empty()
    }

    /// The sink half hears of it only until it has finished. What comes is kept meanwhile: it is the peer's window, and no more.
    fn poll_broken(&mut self, cx: &mut Context<'_>) -> Poll<Broken> {
        loop {
            match self.kept.end {
                // There is nothing left to break.
                Some(Ok(())) => return Poll::Pending,
                Some(Err(kind)) => return Poll::Ready(Broken(kind.into())),
                None => {}
            }
            match ready!(self.stream.poll_data(cx)) {
                Some(Ok(bytes)) => self.kept.push(bytes),
                Some(Err(error)) => self.kept.end = Some(Err(broken(error).0.kind())),
                None => self.kept.end = Some(Ok(())),
            }
        }
    }
}

impl Kept {
    fn push(&mut self, bytes: Bytes) {
        if bytes.len() < SMALL_CHUNK {
            self.small.extend_from_slice(&bytes);
        }
        if !self.small.is_empty() && (bytes.len() >= SMALL_CHUNK || self.small.len() >= 4 * SMALL_CHUNK) {
            self.chunks.push_back(std::mem::take(&mut self.small).freeze());
        }
        if bytes.len() >= SMALL_CHUNK {
            self.chunks.push_back(bytes);
        }
    }

    /// The first of what is kept.
    fn take(&mut self) -> Option<Bytes> {
        let first = self.chunks.pop_front();
        first.or_else(|| (!self.small.is_empty()).then(|| std::mem::take(&mut self.small).freeze()))
    }
}

impl HboneSink {
    /// Hands what was taken to the tunnel, as its window allows.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        while !self.pending.is_empty() {
            self.stream.reserve_capacity(self.pending.len());
            let capacity = ready!(self.stream.poll_capacity(cx));
            let capacity = capacity.ok_or_else(|| Broken(io::ErrorKind::BrokenPipe.into()))?.map_err(broken)?;
            let part = self.pending.split_to(capacity.min(self.pending.len()));
            self.stream.send_data(part, false).map_err(broken)?;
        }
        Poll::Ready(Ok(()))
    }
}

impl Sink for HboneSink {
    fn poll_move<S: Source>(&mut self, cx: &mut Context<'_>, source: &mut S) -> Poll<Result<usize, Fault>> {
        ready!(self.poll_flush(cx)).map_err(|Broken(_)| Fault::Sink)?;
        let mut buffer = Buffer::take(self.wanted);
        let bytes = ready!(source.poll_read(cx, &mut [IoSliceMut::new(&mut buffer)])).map_err(|Broken(_)| Fault::Source)?;
        if bytes == buffer.len() {
            self.wanted = self.wanted.larger();
        }
        self.pending =
            if bytes < SMALL_CHUNK { Bytes::copy_from_slice(&buffer[..bytes]) } else { Bytes::from_owner(buffer).slice(..bytes) };
        match self.poll_flush(cx) {
            Poll::Ready(Err(Broken(_))) => Poll::Ready(Err(Fault::Sink)),
            Poll::Ready(Ok(())) | Poll::Pending => Poll::Ready(Ok(bytes)),
        }
    }

    fn holds(&self) -> bool {
        !self.pending.is_empty()
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        ready!(self.poll_flush(cx))?;
        Poll::Ready(self.stream.send_data(Bytes::new(), true).map_err(broken))
    }

    fn poll_broken(&mut self, cx: &mut Context<'_>) -> Poll<Broken> {
        self.stream.poll_reset(cx).map(|reset| reset.map_or_else(broken, |reason| broken(reason.into())))
    }

    fn reset(&mut self) {
        self.stream.send_reset(Reason::CONNECT_ERROR);
    }
}

fn broken(error: h2::Error) -> Broken {
    Broken(error.into_io().unwrap_or_else(|| io::ErrorKind::ConnectionReset.into()))
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
