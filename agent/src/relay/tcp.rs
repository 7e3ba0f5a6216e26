//! A TCP connection as an endpoint of a relay.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use socket2::SockRef;
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::Notify;

use super::{Broken, Sink, Source};

/// The buffer that a connection reads with at first, in bytes.
const FIRST_BUFFER: usize = 8 * 1024;
/// The buffer that a connection reads with once it has shown to fill it, in bytes.
const LARGEST_BUFFER: usize = 256 * 1024;

/// The half that reads. Holds no buffer while it waits, so that an idle connection costs none.
#[derive(Debug)]
pub struct TcpSource {
    half: OwnedReadHalf,
    read_finished: Arc<Notify>,
    buffer: BytesMut,
    wanted: usize,
}

/// The half that writes. Dropped before it has finished, it resets the connection.
#[derive(Debug)]
pub struct TcpSink {
    half: Option<OwnedWriteHalf>,
    read_finished: Arc<Notify>,
    finished: bool,
}

/// Splits a connection into its halves.
#[must_use]
pub fn split(stream: TcpStream) -> (TcpSource, TcpSink) {
    let (read, write) = stream.into_split();
    let read_finished = Arc::new(Notify::new());
    let source =
        TcpSource { half: read, read_finished: Arc::clone(&read_finished), buffer: BytesMut::new(), wanted: FIRST_BUFFER };
    (source, TcpSink { half: Some(write), read_finished, finished: false })
}

/// Makes the coming close of a connection a reset, not an end of file.
pub fn reset_on_close(stream: &TcpStream) {
    // Only a socket that is already gone refuses this, and its far end has its answer.
    let _gone = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

impl TcpSource {
    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Broken>> {
        loop {
            let stream: &TcpStream = self.half.as_ref();
            let Poll::Ready(readable) = stream.poll_read_ready(cx) else {
                self.buffer = BytesMut::new();
                return Poll::Pending;
            };
            readable?;
            self.buffer.reserve(self.wanted);
            let read = tokio_util::io::poll_read_buf(Pin::new(&mut self.half), cx, &mut self.buffer);
            let Poll::Ready(bytes) = read else { continue };
            let bytes = bytes?;
            if bytes == 0 {
                self.buffer = BytesMut::new();
                self.read_finished.notify_one();
                return Poll::Ready(Ok(None));
            }
            if bytes >= self.wanted {
                self.wanted = (self.wanted * 4).min(LARGEST_BUFFER);
            }
            return Poll::Ready(Ok(Some(self.buffer.split().freeze())));
        }
    }
}

impl Source for TcpSource {
    async fn chunk(&mut self) -> Result<Option<Bytes>, Broken> {
        poll_fn(|cx| self.poll_chunk(cx)).await
    }

    fn passed_on(&mut self, _bytes: usize) {}
}

impl Sink for TcpSink {
    async fn write(&mut self, chunk: Bytes) -> Result<(), Broken> {
        Ok(self.half()?.write_all(&chunk).await?)
    }

    /// While the connection is read from, a reset shows there; afterwards it shows here.
    async fn broken(&mut self) -> Broken {
        self.read_finished.notified().await;
        self.read_finished.notify_one();
        let Ok(half) = self.half() else { return std::future::pending().await };
        let stream: &TcpStream = half.as_ref();
        match stream.ready(Interest::ERROR).await {
            Ok(_) => Broken(stream.take_error().ok().flatten().unwrap_or_else(|| std::io::ErrorKind::ConnectionReset.into())),
            Err(error) => Broken(error),
        }
    }

    async fn finish(&mut self) -> Result<(), Broken> {
        self.finished = true;
        Ok(self.half()?.shutdown().await?)
    }

    fn reset(&mut self) {
        if let Some(half) = self.half.take() {
            reset_on_close(half.as_ref());
            // Dropping the half would send a FIN first.
            half.forget();
        }
    }
}

impl TcpSink {
    fn half(&mut self) -> Result<&mut OwnedWriteHalf, Broken> {
        self.half.as_mut().ok_or_else(|| Broken(std::io::ErrorKind::NotConnected.into()))
    }
}

impl Drop for TcpSink {
    fn drop(&mut self) {
        if !self.finished {
            self.reset();
        }
    }
}
