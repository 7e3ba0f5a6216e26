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
//! | 1 | OPEN | dialler | destination: port (2), address (16); source: port (2), address (16); then nothing, or `after`: source port (2) |
//! | 2 | ANSWER | acceptor | one byte: 0 connected, else why not |
//! | 3 | FIN | both | none: no more DATA in this direction |
//!
//! A stream is delivered after the one to the same destination whose source has the port `after`, which is on its way, too, in whichever of
//! the dialler's tunnels. More that may stand in an OPEN is left unread.
//!
//! Numbers are big endian; IPv4 addresses are mapped into IPv6. A stream is OPEN, ANSWER, then DATA and one FIN in each direction;
//! after a refusal, or both FINs, the dialler may send the next OPEN. A connection that ends anywhere else has been reset. An unknown
//! kind, or one out of turn, ends the connection.
//!
//! Behind an OPEN, in the same record, the dialler may send one DATA at once, which the acceptor forgets when it refuses; behind an
//! ANSWER to that, in the same record, DATA or FIN may follow. An acceptor that ends a tunnel of its own accord says so by TLS's
//! `close_notify`, and has then acted on nothing that came after the last stream: only by that a dialler knows that it may send those
//! bytes again elsewhere.

use std::future::{Future, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker, ready};

use tokio::task::yield_now;
use tokio::time::timeout;

use super::ACCEPTED_IDLE;
use super::record::LARGEST_PAYLOAD;
use super::tls_stream::{RecordReader, RecordWriter, TlsStream};
use crate::model::CloseReason;
use crate::relay::buffer::Size;
use crate::relay::tcp::{ResetOnDrop, Watch};
use crate::relay::{Broken, Fault, Sink, Slices, Source};

mod frame;

pub use frame::Open;
#[cfg(any(test, feature = "fuzz"))]
pub use frame::fuzz;
use frame::{Frames, Piece};

/// The ALPN protocol of this form.
pub const ALPN: &[u8] = b"culvert/1";

/// How often the thread may find nothing else to do before an answer goes without the stream's first bytes.
const LOOKS: u8 = 3;

/// A tunnel that carries no stream now.
#[derive(Debug)]
pub struct Idle(Box<SingleStream>);

/// A tunnel while it carries a stream, both halves of it. One and the same place for all streams of a tunnel: it is moved by its
/// address.
#[derive(Debug)]
pub struct SingleStream {
    /// The half that gives bytes.
    pub source: SingleSource,
    /// The half that takes them.
    pub sink: SingleSink,
}

/// The half of a stream that gives bytes.
#[derive(Debug)]
pub struct SingleSource {
    reader: RecordReader,
    /// The far end has sent its FIN.
    read_finished: Arc<AtomicBool>,
    frames: Frames,
    /// What was opened and not looked at.
    payload: Range<usize>,
    /// What was found of the stream and not passed on.
    data: Vec<Range<usize>>,
    finished: bool,
    watch: Watch,
}

/// The half of a stream that takes bytes. Dropped before it has finished, it resets the stream.
#[derive(Debug)]
pub struct SingleSink {
    writer: RecordWriter,
    read_finished: Arc<AtomicBool>,
    /// The FIN has been handed to the writer.
    finishing: bool,
    /// Bytes that went with the OPEN, which the stream's source still holds.
    early: usize,
    /// The dialler has not been told that the destination is connected; so often it may still wait for the stream's first bytes.
    answer_waits: Option<u8>,
    end: ResetOnDrop,
}

/// Why a stream was not opened.
#[derive(Debug)]
pub enum Unopened {
    /// The peer refused it, and the tunnel is there for the next.
    Refused(CloseReason, Idle),
    /// The tunnel has broken, or the peer spoke out of turn; nothing of the stream's was sent, or the peer has not acted on it.
    Cut(io::Error),
    /// The same, and whether the stream's first bytes have arrived is not known.
    Lost(io::Error),
}

impl Idle {
    /// A tunnel on an authenticated connection.
    pub(super) fn new(TlsStream { reader, writer, .. }: TlsStream) -> Self {
        let read_finished = Arc::new(AtomicBool::new(false));
        let mut end = ResetOnDrop::new(writer.socket());
        end.disarm();
        let sink =
            SingleSink { writer, read_finished: Arc::clone(&read_finished), finishing: false, early: 0, answer_waits: None, end };
        let source = SingleSource {
            reader,
            read_finished,
            frames: Frames::default(),
            payload: 0..0,
            data: Vec::new(),
            finished: false,
            watch: Watch::default(),
        };
        Self(Box::new(SingleStream { source, sink }))
    }

    /// Whether the peer is still there, as far as can be told without asking: an idle peer says nothing.
    #[must_use]
    pub fn quiet(&self) -> bool {
        self.0.source.reader.quiet()
    }

    /// Opens a stream, as the dialler. The `first` of its bytes go along with the question, as far as a record takes them, and need not wait
    /// for the answer. They stay with the stream's source, from which its sink takes them when it is first moved to.
    ///
    /// # Errors
    /// [`Unopened`].
    pub async fn open(self, open: &Open, first: &[u8]) -> Result<Box<SingleStream>, Unopened> {
        let mut stream = self.start();
        let asked = stream.sink.ask(open, first).await;
        // Whoever could not be asked may have taken leave.
        let answer = stream.source.piece_or_end().await;
        let answer = asked.and(answer).and_then(|piece| piece.ok_or_else(|| io::ErrorKind::UnexpectedEof.into()));
        let error = match answer {
            Ok(Piece::Answer(None)) => return Ok(stream),
            Ok(Piece::Answer(Some(reason))) => match stream.refused() {
                Some(idle) => return Err(Unopened::Refused(reason, idle)),
                None => return Err(Unopened::Cut(out_of_turn())),
            },
            Ok(Piece::Open(_) | Piece::Data(_) | Piece::Fin) => out_of_turn(),
            Err(error) => error,
        };
        let untouched = stream.sink.early == 0 || stream.source.reader.took_leave();
        Err(if untouched { Unopened::Cut(error) } else { Unopened::Lost(error) })
    }

    /// Waits for the next stream, as the acceptor; none when the dialler has closed the tunnel or has left it idle for too long, or once
    /// there are to be `no_more`. Cancel safe: dropped, it resets the tunnel.
    ///
    /// # Errors
    /// The connection's error: it broke, or the peer spoke out of turn.
    pub async fn next(self, no_more: impl Future<Output = ()>) -> io::Result<Option<(Open, Box<SingleStream>)>> {
        let mut stream = self.start();
        let piece = tokio::select! {
            biased;
            () = no_more => Ok(None),
            piece = timeout(ACCEPTED_IDLE, stream.source.piece_or_end()) => piece.unwrap_or(Ok(None)),
        };
        match piece? {
            Some(Piece::Open(open)) => Ok(Some((open, stream))),
            Some(Piece::Answer(_) | Piece::Data(_) | Piece::Fin) => Err(out_of_turn()),
            None => {
                stream.sink.take_leave();
                Ok(None)
            }
        }
    }

    /// The tunnel with nothing left of its last stream.
    fn start(self) -> Box<SingleStream> {
        let mut stream = self.0;
        let SingleStream { source, sink } = &mut *stream;
        source.read_finished.store(false, Ordering::Relaxed);
        (source.finished, sink.finishing, sink.early, sink.answer_waits) = (false, false, 0, None);
        source.watch = Watch::default();
        sink.end.arm();
        stream
    }
}

impl SingleStream {
    /// Says, as the acceptor, that the destination is connected: at once, or, where first bytes came with the question, with the
    /// destination's own first bytes. These are not waited for: the answer goes by itself once the thread has nothing else to do.
    ///
    /// # Errors
    /// The connection's error.
    pub async fn connected(&mut self) -> io::Result<()> {
        if self.source.payload.is_empty() {
            return self.sink.answer(None).await;
        }
        self.sink.answer_waits = Some(LOOKS);
        Ok(())
    }

    /// The tunnel of a stream that has ended in order, ready for the next; none when it has not.
    #[must_use]
    pub fn end(self: Box<Self>) -> Option<Idle> {
        let ended = self.source.finished && self.source.data.is_empty() && self.sink.end.is_disarmed();
        (ended && self.source.is_between()).then(|| Idle(self))
    }

    /// Ends a stream that was refused, with whatever came along with its OPEN, and keeps the tunnel; none when the peer has spoken out of
    /// turn.
    #[must_use]
    pub fn refuse(mut self: Box<Self>) -> Option<Idle> {
        while let Some(Piece::Data(_)) = self.source.received_piece().ok()? {}
        self.source.reader.release();
        self.refused()
    }

    fn refused(mut self: Box<Self>) -> Option<Idle> {
        if !self.source.is_between() {
            return None;
        }
        self.sink.end.disarm();
        Some(Idle(self))
    }
}

impl SingleSource {
    /// Whether nothing was opened that belongs to a frame still to be looked at.
    fn is_between(&self) -> bool {
        self.payload.is_empty() && self.frames.between()
    }

    /// The next piece; none when the connection ended between two streams.
    async fn piece_or_end(&mut self) -> io::Result<Option<Piece>> {
        poll_fn(|cx| self.poll_piece(cx)).await
    }

    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Piece>>> {
        loop {
            if let Some(piece) = self.received_piece()? {
                if self.payload.is_empty() {
                    self.reader.release();
                }
                return Poll::Ready(Ok(Some(piece)));
            }
            if !ready!(self.reader.poll_more(cx))? {
                let end = if self.frames.between() { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
                return Poll::Ready(end);
            }
        }
    }

    /// The next piece in what has been received.
    fn received_piece(&mut self) -> io::Result<Option<Piece>> {
        loop {
            if !self.payload.is_empty() {
                let start = self.payload.start;
                let (spent, piece) = self.frames.next(self.reader.bytes(self.payload.clone()))?;
                self.payload.start += spent;
                match piece {
                    Some(Piece::Data(data)) => return Ok(Some(Piece::Data(start + data.start..start + data.end))),
                    Some(piece) => return Ok(Some(piece)),
                    None => {}
                }
            }
            match self.reader.next_record()? {
                Some(payload) => self.payload = payload,
                None => return Ok(None),
            }
        }
    }
}

impl Source for SingleSource {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<()>, Broken>> {
        while self.data.len() < Slices::MOST && !self.finished {
            match self.received_piece()? {
                Some(Piece::Data(data)) => self.data.push(data),
                Some(Piece::Fin) => {
                    self.finished = true;
                    self.read_finished.store(true, Ordering::Relaxed);
                }
                Some(Piece::Open(_) | Piece::Answer(_)) => return Poll::Ready(Err(out_of_turn().into())),
                None if !self.data.is_empty() => break,
                None if ready!(self.reader.poll_more(cx))? => {}
                None => return Poll::Ready(Err(Broken(io::ErrorKind::UnexpectedEof.into()))),
            }
        }
        if self.data.is_empty() {
            self.reader.release();
            return Poll::Ready(Ok(None));
        }
        Poll::Ready(Ok(Some(())))
    }

    fn filled<'a>(&'a self, slices: &mut Slices<'a>) {
        self.data.iter().for_each(|data| slices.push(self.reader.bytes(data.clone())));
    }

    fn consume(&mut self, mut bytes: usize) {
        let mut gone = 0;
        for data in &mut self.data {
            let part = bytes.min(data.len());
            data.start += part;
            bytes -= part;
            gone += usize::from(data.start == data.end);
        }
        self.data.drain(..gone);
        if self.data.is_empty() && self.payload.is_empty() {
            self.reader.release();
        }
    }

    fn holds(&self) -> bool {
        !self.data.is_empty()
    }

    /// Watches the connection itself: what waits in it is not read.
    fn poll_broken(&mut self, cx: &mut Context<'_>) -> Poll<Broken> {
        self.watch.poll(self.reader.socket(), cx)
    }
}

impl SingleSink {
    /// Answers an open, as the acceptor.
    ///
    /// # Errors
    /// The connection's error.
    pub async fn answer(&mut self, refused: Option<CloseReason>) -> io::Result<()> {
        self.send(&[&frame::answer(refused)]).await
    }

    /// Writes all of it and makes sure that it leaves.
    async fn send(&mut self, parts: &[&[u8]]) -> io::Result<()> {
        poll_fn(|cx| self.writer.poll_write_record(cx, parts)).await?;
        poll_fn(|cx| self.writer.poll_flush(cx)).await
    }

    /// Asks for a stream, and sends the first of its bytes along.
    async fn ask(&mut self, open: &Open, first: &[u8]) -> io::Result<()> {
        let frame = open.encode();
        let first = &first[..first.len().min(LARGEST_PAYLOAD - frame.len() - frame::HEAD)];
        self.early = first.len();
        let parts: [&[u8]; 3] = [&frame, &frame::data_head(first.len()), first];
        self.send(if first.is_empty() { &parts[..1] } else { &parts }).await
    }

    /// Moves the destination's first bytes along with the answer, which waits no longer than its time.
    fn poll_answer<S: Source>(&mut self, cx: &mut Context<'_>, source: &mut S, looks: u8) -> Poll<Result<usize, Fault>> {
        let moved = self.writer.poll_move(cx, source, Size::Small, frame::connected_and_data_head);
        match (&moved, looks.checked_sub(1)) {
            // The end of what there is goes with the answer, too.
            (Poll::Ready(Ok(0) | Err(_)), _) => {}
            (Poll::Ready(Ok(_)), _) => self.answer_waits = None,
            (Poll::Pending, Some(left)) => {
                self.answer_waits = Some(left);
                // Wakes the task after the kernel has been asked for news.
                let _once_more = pin!(yield_now()).poll(cx);
            }
            (Poll::Pending, None) => {
                ready!(self.writer.poll_write_record(cx, &[&frame::answer(None)])).map_err(|_error| Fault::Sink)?;
                self.answer_waits = None;
            }
        }
        moved
    }

    /// How many bytes went with the OPEN that the stream's source still holds.
    #[cfg(test)]
    pub(super) fn early(&self) -> usize {
        self.early
    }

    /// Ends the tunnel in order, and says so as far as that can be done at once.
    pub(super) fn take_leave(&mut self) {
        let _gone_already = self.writer.take_leave();
        self.end.disarm();
    }
}

impl Sink for SingleSink {
    fn poll_move<S: Source>(&mut self, cx: &mut Context<'_>, source: &mut S) -> Poll<Result<usize, Fault>> {
        if self.early > 0 {
            let sent_already = std::mem::take(&mut self.early);
            source.consume(sent_already);
            return Poll::Ready(Ok(sent_already));
        }
        match self.answer_waits {
            None => self.writer.poll_move(cx, source, Size::Large, frame::data_head),
            Some(looks) => self.poll_answer(cx, source, looks),
        }
    }

    fn holds(&self) -> bool {
        self.writer.holds()
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        if !self.finishing {
            let frames: [&[u8]; 2] = [&frame::answer(None), &frame::fin()];
            let frames = if self.answer_waits.is_some() { &frames[..] } else { &frames[1..] };
            ready!(self.writer.poll_write_record(cx, frames))?;
            (self.finishing, self.answer_waits) = (true, None);
        }
        ready!(self.writer.poll_flush(cx))?;
        self.end.disarm();
        Poll::Ready(Ok(()))
    }

    /// While the stream is read from, a reset shows there; after the far end's FIN the peer has nothing to say, and what comes is the
    /// connection's end.
    fn poll_broken(&mut self, cx: &mut Context<'_>) -> Poll<Broken> {
        if !self.read_finished.load(Ordering::Relaxed) {
            return Poll::Pending;
        }
        RecordReader::poll_broken(self.writer.socket(), cx).map(Broken)
    }

    fn reset(&mut self) {
        if self.answer_waits.take().is_some() {
            // That the stream was there is true all the same, and the dialler should know.
            let mut cx = Context::from_waker(Waker::noop());
            let _gone_already = self.writer.poll_write_record(&mut cx, &[&frame::answer(None)]);
        }
        self.end.reset();
    }
}

impl Open {
    /// A stream to `destination` on behalf of `source`.
    #[must_use]
    pub fn new(source: SocketAddr, destination: SocketAddr) -> Self {
        Self { source, destination, after: None }
    }
}

fn out_of_turn() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the peer sent a frame out of turn")
}

#[cfg(test)]
mod tests;
