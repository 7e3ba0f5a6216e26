//! The second form, `culvert/1`: a TLS connection that carries one stream at a time and is used again when that has ended.
//!
//! Spoken between Culvert agents only, where both offer it by ALPN. Every stream has TCP's own flow control and nobody else's
//! losses to wait for; the peer's answer to an open tells the truth about the destination; and a reset is a reset of the
//! underlying connection, so that nothing can be mistaken for an end of file.
//!
//! # Format
//! Inside TLS, frames of a 4-byte head (kind, then the payload's length as 24 bits, big endian) and the payload:
//!
//! | kind | name | from | payload |
//! |---|---|---|---|
//! | 0 | DATA | both | bytes of the stream |
//! | 1 | OPEN | dialler | destination: port (2), address (16); source: port (2), address (16); the rest: W3C trace context or nothing |
//! | 2 | ANSWER | acceptor | one byte: 0 connected, else why not |
//! | 3 | FIN | both | none: no more DATA in this direction |
//!
//! Numbers are big endian; IPv4 addresses are mapped into IPv6. A stream is OPEN, ANSWER, then DATA and one FIN in each direction;
//! after a refusal, or both FINs, the dialler may send the next OPEN. A connection that ends anywhere else has been reset. An unknown
//! kind, or one out of turn, ends the connection.

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes, BytesMut};
use tokio::io::{AsyncRead as _, AsyncWrite as _};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio_rustls::TlsStream;

use crate::model::CloseReason;
use crate::relay::{Broken, Sink, Source, tcp};

mod frame;

pub use frame::Open;
use frame::{Frames, Piece};

/// The ALPN protocol of this form.
pub const ALPN: &[u8] = b"culvert/1";

/// The buffer that a stream reads with at first, in bytes.
const FIRST_BUFFER: usize = 8 * 1024;
/// The buffer that a stream reads with once it has shown to fill it, in bytes.
const LARGEST_BUFFER: usize = 128 * 1024;
/// The most bytes in one DATA frame.
const LARGEST_DATA: usize = (1 << 24) - 1;

/// A tunnel that carries no stream now.
#[derive(Debug)]
pub struct Idle {
    shared: Arc<Shared>,
    buffer: BytesMut,
}

#[derive(Debug)]
struct Shared {
    tls: Mutex<TlsStream<TcpStream>>,
}

/// The half of a stream that gives bytes.
#[derive(Debug)]
pub struct SingleSource {
    shared: Arc<Shared>,
    /// Told when the far end has sent its FIN.
    read_finished: Arc<Notify>,
    frames: Frames,
    buffer: BytesMut,
    wanted: usize,
    finished: bool,
}

/// The half of a stream that takes bytes. Dropped before it has finished, it resets the stream.
#[derive(Debug)]
pub struct SingleSink {
    shared: Arc<Shared>,
    read_finished: Arc<Notify>,
    finished: bool,
}

impl Idle {
    /// A tunnel on an authenticated connection.
    #[must_use]
    pub fn new(tls: TlsStream<TcpStream>) -> Self {
        Self { shared: Arc::new(Shared { tls: Mutex::new(tls) }), buffer: BytesMut::new() }
    }

    /// Whether the peer is still there, as far as can be told without asking: an idle peer says nothing.
    #[must_use]
    pub fn quiet(&self) -> bool {
        let mut byte = [0; 1];
        let mut read = tokio::io::ReadBuf::new(&mut byte);
        let mut cx = Context::from_waker(std::task::Waker::noop());
        self.buffer.is_empty() && Pin::new(&mut *self.shared.lock()).poll_read(&mut cx, &mut read).is_pending()
    }

    /// Opens a stream, as the dialler.
    ///
    /// # Errors
    /// The connection's error: it broke, or the peer spoke out of turn.
    pub async fn open(self, open: &Open) -> io::Result<Result<(SingleSource, SingleSink), (CloseReason, Self)>> {
        let (mut source, mut sink) = self.start();
        sink.send(open.encode()).await?;
        match source.piece().await? {
            Piece::Answer(None) => Ok(Ok((source, sink))),
            Piece::Answer(Some(reason)) => {
                sink.finished = true;
                Ok(Err((reason, Self { shared: Arc::clone(&source.shared), buffer: std::mem::take(&mut source.buffer) })))
            }
            Piece::Open(_) | Piece::Data(_) | Piece::Fin => Err(out_of_turn()),
        }
    }

    /// Waits for the next stream, as the acceptor; none when the dialler has closed the tunnel. Cancel safe: dropped, it closes the
    /// tunnel.
    ///
    /// # Errors
    /// The connection's error: it broke, or the peer spoke out of turn.
    pub async fn next(self) -> io::Result<Option<(Open, SingleSource, SingleSink)>> {
        let (mut source, mut sink) = self.start();
        match source.piece_or_end().await {
            Ok(Some(Piece::Open(open))) => Ok(Some((open, source, sink))),
            Ok(Some(Piece::Answer(_) | Piece::Data(_) | Piece::Fin)) => Err(out_of_turn()),
            Ok(None) => {
                sink.finished = true;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn start(self) -> (SingleSource, SingleSink) {
        let read_finished = Arc::new(Notify::new());
        let sink = SingleSink { shared: Arc::clone(&self.shared), read_finished: Arc::clone(&read_finished), finished: false };
        let source = SingleSource {
            shared: self.shared,
            read_finished,
            frames: Frames::default(),
            buffer: self.buffer,
            wanted: FIRST_BUFFER,
            finished: false,
        };
        (source, sink)
    }
}

/// The tunnel of a stream that has ended in order, ready for the next; none when it has not.
#[must_use]
pub fn reunite(mut source: SingleSource, sink: SingleSink) -> Option<Idle> {
    (source.finished && sink.finished)
        .then(|| Idle { shared: Arc::clone(&source.shared), buffer: std::mem::take(&mut source.buffer) })
}

impl SingleSource {
    /// The next piece. A connection that ends before it is broken.
    async fn piece(&mut self) -> io::Result<Piece> {
        self.piece_or_end().await?.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    /// The next piece; none when the connection ended between two streams.
    async fn piece_or_end(&mut self) -> io::Result<Option<Piece>> {
        poll_fn(|cx| self.poll_piece(cx)).await
    }

    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Piece>>> {
        loop {
            if let Some(piece) = self.frames.next(&mut self.buffer)? {
                return Poll::Ready(Ok(Some(piece)));
            }
            if self.buffer.capacity() - self.buffer.len() < self.wanted {
                self.buffer.reserve(self.wanted);
            }
            let read = {
                let mut tls = self.shared.lock();
                tokio_util::io::poll_read_buf(Pin::new(&mut *tls), cx, &mut self.buffer)
            };
            let Poll::Ready(bytes) = read else {
                if self.buffer.is_empty() {
                    self.buffer = BytesMut::new();
                }
                return Poll::Pending;
            };
            match bytes? {
                0 if self.buffer.is_empty() && self.frames.between() => return Poll::Ready(Ok(None)),
                0 => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                bytes if bytes >= self.wanted => self.wanted = (self.wanted * 4).min(LARGEST_BUFFER),
                _ => {}
            }
        }
    }
}

impl Source for SingleSource {
    async fn chunk(&mut self) -> Result<Option<Bytes>, Broken> {
        match self.piece().await? {
            Piece::Data(bytes) => Ok(Some(bytes)),
            Piece::Fin => {
                self.finished = true;
                self.read_finished.notify_one();
                Ok(None)
            }
            Piece::Open(_) | Piece::Answer(_) => Err(out_of_turn().into()),
        }
    }

    fn passed_on(&mut self, _bytes: usize) {}
}

impl SingleSink {
    /// Answers an open, as the acceptor.
    ///
    /// # Errors
    /// The connection's error.
    pub async fn answer(&mut self, refused: Option<CloseReason>) -> io::Result<()> {
        self.send(frame::answer(refused)).await
    }

    /// Ends a stream that was refused, and keeps the tunnel.
    #[must_use]
    pub fn refused(mut self, mut source: SingleSource) -> Idle {
        self.finished = true;
        Idle { shared: Arc::clone(&source.shared), buffer: std::mem::take(&mut source.buffer) }
    }

    /// Writes all of the frame and makes sure that it leaves.
    async fn send(&mut self, frame: BytesMut) -> io::Result<()> {
        self.send_parts(&frame, &[]).await
    }

    async fn send_parts(&mut self, mut head: &[u8], mut body: &[u8]) -> io::Result<()> {
        poll_fn(|cx| {
            let mut tls = self.shared.lock();
            while !head.is_empty() || !body.is_empty() {
                let parts = [IoSlice::new(head), IoSlice::new(body)];
                let written = ready!(Pin::new(&mut *tls).poll_write_vectored(cx, &parts))?;
                if written == 0 {
                    return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
                }
                let of_head = written.min(head.len());
                head.advance(of_head);
                body.advance(written - of_head);
            }
            Pin::new(&mut *tls).poll_flush(cx)
        })
        .await
    }
}

impl Sink for SingleSink {
    async fn write(&mut self, mut chunk: Bytes) -> Result<(), Broken> {
        while !chunk.is_empty() {
            let part = chunk.split_to(chunk.len().min(LARGEST_DATA));
            self.send_parts(&frame::data_head(part.len()), &part).await?;
        }
        Ok(())
    }

    /// While the stream is read from, a reset shows there; after the far end's FIN the peer has nothing to say, and what comes is the
    /// connection's end.
    async fn broken(&mut self) -> Broken {
        self.read_finished.notified().await;
        self.read_finished.notify_one();
        let mut byte = [0; 1];
        let read = poll_fn(|cx| {
            let mut read = tokio::io::ReadBuf::new(&mut byte);
            Pin::new(&mut *self.shared.lock()).poll_read(cx, &mut read)
        });
        Broken(read.await.err().unwrap_or_else(|| io::ErrorKind::ConnectionReset.into()))
    }

    async fn finish(&mut self) -> Result<(), Broken> {
        self.send(frame::fin()).await?;
        self.finished = true;
        Ok(())
    }

    fn reset(&mut self) {
        tcp::reset_on_close(self.shared.lock().get_ref().0);
        self.finished = true;
    }
}

impl Drop for SingleSink {
    fn drop(&mut self) {
        if !self.finished {
            self.reset();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, TlsStream<TcpStream>> {
        // A panic inside TLS would leave a connection whose next use fails; it can do no harm.
        self.tls.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The peer of a stream, as the acceptor's policy needs it.
impl Open {
    /// A stream to `destination` on behalf of `source`.
    #[must_use]
    pub fn new(source: SocketAddr, destination: SocketAddr) -> Self {
        Self { source, destination, trace: Bytes::new() }
    }
}

fn out_of_turn() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the peer sent a frame out of turn")
}

#[cfg(test)]
mod tests;
