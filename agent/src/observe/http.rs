//! The small HTTP servers of the agent: metrics, readiness, admin.
//!
//! Enters: an address and a router. Leaves: answers until the stop token is cancelled. Connections are bounded in number and an
//! idle one is closed, so that clients on the pod network can't use up the agent's file descriptors.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use axum::serve::Listener;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep};
use tokio_util::sync::CancellationToken;

use super::connection::Observer;
use super::metrics::CONTENT_TYPE;

/// Connections that one server holds at once; more wait in the listener's backlog.
const MAX_CONNECTIONS: usize = 128;

/// A connection without a byte in either direction for this long is closed. Longer than a scraper's usual minute.
const IDLE: Duration = Duration::from_secs(90);

/// A server could not listen.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {addr} for {purpose}: choose another address with {flag}")]
pub struct BindError {
    /// What the server is for.
    pub purpose: &'static str,
    /// The flag that sets the address.
    pub flag: &'static str,
    /// The address.
    pub addr: SocketAddr,
    /// What the kernel said.
    pub source: io::Error,
}

/// A server that is bound and not yet serving.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    addr: SocketAddr,
}

impl Server {
    /// Binds the metrics server's address.
    ///
    /// # Errors
    /// [`BindError`] with the address and the cause.
    pub async fn metrics(addr: SocketAddr) -> Result<Self, BindError> {
        Self::bind("metrics", "--metrics-listen", addr).await
    }

    /// Binds the readiness server's address.
    ///
    /// # Errors
    /// [`BindError`] with the address and the cause.
    pub async fn readiness(addr: SocketAddr) -> Result<Self, BindError> {
        Self::bind("readiness", "--ready-listen", addr).await
    }

    /// Binds the admin server's address.
    ///
    /// # Errors
    /// [`BindError`] with the address and the cause.
    pub async fn admin(addr: SocketAddr) -> Result<Self, BindError> {
        Self::bind("the admin interface", "--admin-listen", addr).await
    }

    async fn bind(purpose: &'static str, flag: &'static str, addr: SocketAddr) -> Result<Self, BindError> {
        let error = |source| BindError { purpose, flag, addr, source };
        let listener = TcpListener::bind(addr).await.map_err(error)?;
        let addr = listener.local_addr().map_err(error)?;
        Ok(Self { listener, addr })
    }

    /// The address that is listened on, with the port that the kernel chose for port 0.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Serves until `stop` is cancelled, and then until the requests being answered are done.
    ///
    /// # Cancel safety
    /// Dropping the future closes the listener; connections that are open are served on until they idle out.
    pub async fn serve(self, router: Router, stop: CancellationToken) {
        let listener = BoundedListener { inner: self.listener, room: Arc::new(Semaphore::new(MAX_CONNECTIONS)), addr: self.addr };
        let served = axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned());
        if let Err(error) = served.await {
            tracing::warn!(addr = %self.addr, %error, "server stopped");
        }
    }
}

/// The routes of the metrics server: `/metrics`, and `/stats/prometheus` where Envoy has it.
pub fn metrics_router(observer: Observer) -> Router {
    let page = move || {
        let observer = observer.clone();
        let body = page::body(move |page| observer.expose(page));
        async { ([(header::CONTENT_TYPE, CONTENT_TYPE)], body) }
    };
    Router::new().route("/metrics", get(page.clone())).route("/stats/prometheus", get(page))
}

pub(super) fn content(media_type: &'static str, body: String) -> Response {
    ([(header::CONTENT_TYPE, media_type)], body).into_response()
}

/// Makes an answer on a thread for blocking work.
pub(super) async fn offload(answer: impl FnOnce() -> Response + Send + 'static) -> Response {
    match tokio::task::spawn_blocking(answer).await {
        Ok(response) => response,
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("cannot answer: {error}\n")).into_response(),
    }
}

struct BoundedListener {
    inner: TcpListener,
    room: Arc<Semaphore>,
    addr: SocketAddr,
}

impl Listener for BoundedListener {
    type Io = BoundedStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, SocketAddr) {
        let permit = Arc::clone(&self.room).acquire_owned().await.ok();
        // The blanket implementation waits and retries when the process is out of file descriptors.
        let (stream, addr) = Listener::accept(&mut self.inner).await;
        (BoundedStream { stream, idle: Box::pin(tokio::time::sleep(IDLE)), _permit: permit }, addr)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.addr)
    }
}

/// A connection that holds its place among the bounded number and ends when it idles.
struct BoundedStream {
    stream: TcpStream,
    idle: Pin<Box<Sleep>>,
    _permit: Option<OwnedSemaphorePermit>,
}

impl BoundedStream {
    fn watch<T>(&mut self, cx: &mut Context<'_>, result: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if result.is_ready() {
            self.idle.as_mut().reset(Instant::now() + IDLE);
            return result;
        }
        self.idle.as_mut().poll(cx).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for BoundedStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.stream).poll_read(cx, buf);
        self.watch(cx, result)
    }
}

impl AsyncWrite for BoundedStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.watch(cx, result)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

mod page;
#[cfg(test)]
pub(super) mod tests;
