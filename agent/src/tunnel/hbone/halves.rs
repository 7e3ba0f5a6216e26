//! The two halves of a stream, as a relay sees them.
//!
//! The half that gives takes out of the tunnel what nobody passes on while a reset may be behind it; the half that takes hands on what
//! windows and the tunnel's unsent bytes allow.

use std::collections::VecDeque;
use std::io::{self, IoSliceMut};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};

use super::Place;
use crate::relay::buffer::{Buffer, Size};
use crate::relay::{Broken, Fault, Sink, Slices, Source};

/// Fewer bytes than this are copied, so that they don't keep a whole buffer while they wait.
const SMALL_CHUNK: usize = 4 * 1024;

/// The half of a stream that gives bytes.
#[derive(Debug)]
pub struct HboneSource {
    pub(super) stream: RecvStream,
    /// What has come and was not passed on.
    chunk: Bytes,
    pub(super) kept: Kept,
    /// How many bytes it holds while it stands still.
    held: usize,
    place: Arc<Place>,
}

/// What has come behind a chunk that nobody takes: it is taken out of the tunnel, so that a reset behind it shows.
#[derive(Debug, Default)]
pub(super) struct Kept {
    pub(super) chunks: VecDeque<Bytes>,
    /// The last of them, while they are small: each costs more than its bytes.
    small: BytesMut,
    bytes: usize,
    /// The stream's end behind all of them, in order or not.
    pub(super) end: Option<Result<(), io::ErrorKind>>,
}

/// The half of a stream that takes bytes. Dropped before it has finished, it resets the stream.
#[derive(Debug)]
pub struct HboneSink {
    stream: SendStream<Bytes>,
    /// What was taken and is not yet the tunnel's.
    pending: Bytes,
    wanted: Size,
    pub(super) place: Arc<Place>,
}

/// Both halves of a stream that has a place in its tunnel.
pub(super) fn halves(stream: RecvStream, sink: SendStream<Bytes>, place: Place) -> (HboneSource, HboneSink) {
    let place = Arc::new(place);
    let source = HboneSource { stream, chunk: Bytes::new(), kept: Kept::default(), held: 0, place: Arc::clone(&place) };
    (source, HboneSink { stream: sink, pending: Bytes::new(), wanted: Size::default(), place })
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
        self.place.tunnel.taken.fetch_add(bytes as u64, Ordering::Relaxed);
        if self.held > 0 {
            self.hold(self.chunk.len() + self.kept.bytes);
        }
    }

    fn holds(&self) -> bool {
        !self.chunk.is_empty()
    }

    /// The sink half hears of it only until it has finished. What comes is kept meanwhile: it is the peer's window, and no more.
    fn poll_broken(&mut self, cx: &mut Context<'_>) -> Poll<Broken> {
        let broken = self.poll_kept(cx);
        self.hold(self.chunk.len() + self.kept.bytes);
        broken
    }
}

impl HboneSource {
    /// Takes what comes out of the tunnel.
    fn poll_kept(&mut self, cx: &mut Context<'_>) -> Poll<Broken> {
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

    /// Counts as standing still with so many bytes.
    fn hold(&mut self, bytes: usize) {
        let shared = &self.place.tunnel;
        match (self.held, bytes) {
            (0, 1..) => drop(shared.still.fetch_add(1, Ordering::Relaxed)),
            (1.., 0) => drop(shared.still.fetch_sub(1, Ordering::Relaxed)),
            _ => {}
        }
        if bytes > self.held {
            shared.held.fetch_add(bytes - self.held, Ordering::Relaxed);
            shared.connection.wake();
        } else {
            shared.held.fetch_sub(self.held - bytes, Ordering::Relaxed);
        }
        self.held = bytes;
    }
}

impl Drop for HboneSource {
    fn drop(&mut self) {
        self.hold(0);
    }
}

impl Kept {
    fn push(&mut self, bytes: Bytes) {
        self.bytes += bytes.len();
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
        let small = |small: &mut BytesMut| (!small.is_empty()).then(|| std::mem::take(small).freeze());
        let first = self.chunks.pop_front().or_else(|| small(&mut self.small))?;
        self.bytes -= first.len();
        Some(first)
    }
}

impl HboneSink {
    /// Hands what was taken to the tunnel, as its window allows.
    pub(super) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        while !self.pending.is_empty() {
            let room = ready!(self.place.poll_room(cx));
            self.stream.reserve_capacity(self.pending.len());
            // Each capacity is told once, and not all of it may have been used.
            while self.stream.capacity() == 0 {
                let told = ready!(self.stream.poll_capacity(cx));
                told.ok_or_else(|| Broken(io::ErrorKind::BrokenPipe.into()))?.map_err(broken)?;
            }
            let capacity = self.stream.capacity();
            let part = self.pending.split_to(capacity.min(room).min(self.pending.len()));
            self.stream.send_data(self.place.unsent(part), false).map_err(broken)?;
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

/// Why a stream broke, as a relay has it.
pub(super) fn broken(error: h2::Error) -> Broken {
    Broken(error.into_io().unwrap_or_else(|| io::ErrorKind::ConnectionReset.into()))
}
