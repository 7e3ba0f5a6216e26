//! An authenticated connection: what goes in at one side in plaintext comes out of the other in TLS records, and back.
//!
//! The two directions are independent, each with its key and at most one buffer, which it holds only while bytes wait in it. Reading
//! opens records where they were received; writing seals them where the source has put their payload. As a whole it is also an
//! ordinary stream of bytes, for protocols that want one.

use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use rustls::client::ClientConnectionData;
use rustls::kernel::KernelConnection;
use rustls::server::ServerConnectionData;
use rustls::{ConnectionTrafficSecrets, ContentType, ExtractedSecrets};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::record::{self, HEAD, LARGEST_PAYLOAD, Opener, Sealer, TAIL, Unusable};
use crate::relay::buffer::{Buffer, Size};
use crate::relay::tcp::{poll_receive, poll_send};
use crate::relay::{Broken, Fault, Source};

/// The place of a full record.
const SLOT: usize = HEAD + LARGEST_PAYLOAD + TAIL;
/// Handshake messages that may come after the handshake (RFC 8446, section 4.6).
const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;
/// The longest of them that is put together from several records.
const LARGEST_MESSAGE: usize = 1 << 16;

/// A connection with both its directions.
#[derive(Debug)]
pub(super) struct TlsStream {
    pub(super) reader: RecordReader,
    pub(super) writer: RecordWriter,
    /// What was read and not yet taken, as a stream of bytes.
    payload: Range<usize>,
    /// The peer has been told that no more comes.
    closing: bool,
}

/// What rustls keeps of a connection: the secrets that the next keys are made from.
pub(super) enum Kernel {
    /// The dialling side's.
    Client(KernelConnection<ClientConnectionData>),
    /// The accepting side's.
    Server(KernelConnection<ServerConnectionData>),
}

/// The direction that comes in.
#[derive(Debug)]
pub(super) struct RecordReader {
    stream: Arc<TcpStream>,
    opener: Opener,
    keys: Arc<Keys>,
    buffer: Option<Buffer>,
    /// What has been received and not been opened.
    sealed: Range<usize>,
    wanted: Size,
    /// The beginning of a message that goes on in the next record.
    message: Vec<u8>,
    closed: bool,
}

/// The direction that goes out.
#[derive(Debug)]
pub(super) struct RecordWriter {
    stream: Arc<TcpStream>,
    sealer: Sealer,
    keys: Arc<Keys>,
    buffer: Option<Buffer>,
    /// What has been sealed and not been sent.
    pending: Range<usize>,
    wanted: Size,
}

/// What the two directions share.
struct Keys {
    kernel: Mutex<Kernel>,
    /// The peer wants us to change our key.
    update_wanted: AtomicBool,
}

impl TlsStream {
    /// A connection that has just been made. `received` is what came behind the handshake.
    pub(super) fn new(
        stream: Arc<TcpStream>,
        secrets: &ExtractedSecrets,
        kernel: Kernel,
        received: &[u8],
    ) -> Result<Self, Unusable> {
        let keys = Arc::new(Keys { kernel: Mutex::new(kernel), update_wanted: AtomicBool::new(false) });
        let mut reader = RecordReader {
            stream: Arc::clone(&stream),
            opener: Opener::new(&secrets.rx)?,
            keys: Arc::clone(&keys),
            buffer: None,
            sealed: 0..0,
            wanted: Size::default(),
            message: Vec::new(),
            closed: false,
        };
        reader.keep(received)?;
        let sealer = Sealer::new(&secrets.tx)?;
        let writer = RecordWriter { stream, sealer, keys, buffer: None, pending: 0..0, wanted: Size::default() };
        Ok(Self { reader, writer, payload: 0..0, closing: false })
    }

    /// The socket.
    pub(super) fn socket(&self) -> &Arc<TcpStream> {
        &self.reader.stream
    }
}

impl RecordReader {
    /// The payload of the next record of application data, if all of it has come; the range is for [`bytes`](Self::bytes). Messages
    /// to the TLS layer itself are dealt with here.
    #[expect(clippy::wildcard_enum_match_arm, reason = "the library's enum grows; nothing else is legal here")]
    pub(super) fn next_record(&mut self) -> io::Result<Option<Range<usize>>> {
        while !self.closed {
            let Some(buffer) = &mut self.buffer else { return Ok(None) };
            let sealed = &mut buffer[self.sealed.clone()];
            let Some(length) = record::length(sealed)?.filter(|length| *length <= sealed.len()) else { return Ok(None) };
            let opened = self.opener.open(&mut sealed[..length])?;
            let start = self.sealed.start;
            self.sealed.start += length;
            let payload = start + opened.payload.start..start + opened.payload.end;
            match opened.content {
                ContentType::ApplicationData => return Ok(Some(payload)),
                ContentType::Alert => match record::alert(&buffer[payload]) {
                    Some(error) => return Err(error),
                    None => self.closed = true,
                },
                ContentType::Handshake => {
                    self.message.extend_from_slice(&buffer[payload]);
                    self.take_messages()?;
                }
                other => return Err(record::invalid(format_args!("a record of type {other:?}"))),
            }
        }
        Ok(None)
    }

    /// The bytes of a record. Valid until more is received.
    pub(super) fn bytes(&self, payload: Range<usize>) -> &[u8] {
        self.buffer.as_ref().map_or(&[], |buffer| &buffer[payload])
    }

    /// Receives more; false when the connection has ended. What was opened is gone then.
    pub(super) fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        if self.closed {
            return Poll::Ready(Ok(false));
        }
        let mut buffer = self.make_room();
        let start = self.sealed.end;
        let room = buffer.len() - start;
        match poll_receive(&self.stream, cx, &mut [IoSliceMut::new(&mut buffer[start..])]) {
            Poll::Ready(received) => {
                let bytes = received?;
                if bytes == room {
                    self.wanted = self.wanted.larger();
                }
                self.sealed.end += bytes;
                self.buffer = Some(buffer);
                Poll::Ready(Ok(bytes > 0))
            }
            Poll::Pending => {
                if !self.sealed.is_empty() {
                    self.buffer = Some(buffer);
                }
                Poll::Pending
            }
        }
    }

    /// The socket.
    pub(super) fn socket(&self) -> &Arc<TcpStream> {
        &self.stream
    }

    /// Whether the peer has said that it closes the connection: nobody else can.
    pub(super) fn took_leave(&self) -> bool {
        self.closed
    }

    /// Gives the buffer up, if nothing waits in it.
    pub(super) fn release(&mut self) {
        if self.sealed.is_empty() {
            self.buffer = None;
        }
    }

    /// Whether nothing has come and the connection is open, as far as can be told without waiting.
    pub(super) fn quiet(&self) -> bool {
        let mut cx = Context::from_waker(Waker::noop());
        let mut byte = [0; 1];
        self.sealed.is_empty()
            && !self.closed
            && poll_receive(&self.stream, &mut cx, &mut [IoSliceMut::new(&mut byte)]).is_pending()
    }

    /// Waits for anything at all to come, where nothing may: the end of the connection, or an error.
    pub(super) fn poll_broken(stream: &TcpStream, cx: &mut Context<'_>) -> Poll<io::Error> {
        let mut byte = [0; 1];
        poll_receive(stream, cx, &mut [IoSliceMut::new(&mut byte)])
            .map(|received| received.err().unwrap_or_else(|| io::ErrorKind::ConnectionReset.into()))
    }

    /// A buffer with what is still sealed at its front, and room behind it.
    fn make_room(&mut self) -> Buffer {
        let left = self.sealed.clone();
        self.sealed = 0..left.len();
        match self.buffer.take() {
            Some(mut buffer) if buffer.size() == self.wanted => {
                buffer.copy_within(left, 0);
                buffer
            }
            Some(buffer) => {
                let mut larger = Buffer::take(self.wanted);
                larger[..left.len()].copy_from_slice(&buffer[left]);
                larger
            }
            None => Buffer::take(self.wanted),
        }
    }

    /// Puts aside what came before there was a reader.
    fn keep(&mut self, received: &[u8]) -> Result<(), Unusable> {
        if received.is_empty() {
            return Ok(());
        }
        while self.wanted.bytes() < received.len() && self.wanted != self.wanted.larger() {
            self.wanted = self.wanted.larger();
        }
        let mut buffer = Buffer::take(self.wanted);
        let place = buffer.get_mut(..received.len()).ok_or(Unusable::TooMuch(received.len()))?;
        place.copy_from_slice(received);
        self.sealed = 0..received.len();
        self.buffer = Some(buffer);
        Ok(())
    }

    /// Acts on the messages that have come whole.
    fn take_messages(&mut self) -> io::Result<()> {
        while let Some(&[kind, high, middle, low]) = self.message.first_chunk::<4>() {
            let end = 4 + usize::from(high) * 65_536 + usize::from(middle) * 256 + usize::from(low);
            if end > LARGEST_MESSAGE {
                return Err(record::invalid(format_args!("a message of {end} bytes after the handshake")));
            }
            let Some(body) = self.message.get(4..end) else { return Ok(()) };
            match (kind, body) {
                // Nothing is resumed.
                (NEW_SESSION_TICKET, _) => {}
                (KEY_UPDATE, [wanted @ (0 | 1)]) => {
                    self.opener = Opener::new(&self.keys.update(false)?).map_err(io::Error::other)?;
                    if *wanted == 1 {
                        self.keys.update_wanted.store(true, Ordering::Relaxed);
                    }
                }
                _ => return Err(record::invalid(format_args!("message {kind} after the handshake"))),
            }
            self.message.drain(..end);
        }
        Ok(())
    }
}

impl RecordWriter {
    /// Reads from `source` straight into records, no more than `largest` has, seals them and sends them. `head` makes what stands in front
    /// of each record's payload, from its length. Says how many bytes were read; 0 when the source has finished.
    pub(super) fn poll_move<const N: usize, S: Source>(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut S,
        largest: Size,
        head: impl Fn(usize) -> [u8; N],
    ) -> Poll<Result<usize, Fault>> {
        let size = self.wanted.min(largest);
        ready!(self.poll_ready(cx)).map_err(|_error| Fault::Sink)?;
        let mut buffer = Buffer::take(size);
        let (before, most) = (HEAD + N, LARGEST_PAYLOAD - N);
        let mut spaces = [const { None }; Size::Large.records()];
        for (space, slot) in spaces.iter_mut().zip(buffer.chunks_exact_mut(SLOT)) {
            *space = Some(IoSliceMut::new(&mut slot[before..before + most]));
        }
        let mut spaces = spaces.map(|space| space.unwrap_or_else(|| IoSliceMut::new(&mut [])));
        let records = size.records();
        let bytes = ready!(source.poll_read(cx, &mut spaces[..records])).map_err(|Broken(_)| Fault::Source)?;
        if bytes == records * most {
            self.wanted = self.wanted.larger();
        }
        let (mut left, mut end) = (bytes, 0);
        while left > 0 {
            let part = left.min(most);
            let record = &mut buffer[end..end + before + part + TAIL];
            record[HEAD..before].copy_from_slice(&head(part));
            self.sealer.seal(ContentType::ApplicationData, record).map_err(|_error| Fault::Sink)?;
            end += record.len();
            left -= part;
        }
        self.send(cx, buffer, end).map_err(|_error| Fault::Sink)?;
        Poll::Ready(Ok(bytes))
    }

    /// Takes some of the payload, and says how many bytes.
    pub(super) fn poll_write(&mut self, cx: &mut Context<'_>, payload: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.poll_ready(cx))?;
        let wanted = match payload.len() {
            ..=LARGEST_PAYLOAD => Size::Small,
            length if length <= 4 * LARGEST_PAYLOAD => Size::Medium,
            _ => Size::Large,
        };
        let mut buffer = Buffer::take(wanted);
        let (mut taken, mut end) = (0, 0);
        for part in payload.chunks(LARGEST_PAYLOAD).take(wanted.records()) {
            end += self.seal_into(&mut buffer[end..], ContentType::ApplicationData, &[part])?;
            taken += part.len();
        }
        self.send(cx, buffer, end)?;
        Poll::Ready(Ok(taken))
    }

    /// Takes all of the parts as one record, which they must fit.
    pub(super) fn poll_write_record(&mut self, cx: &mut Context<'_>, parts: &[&[u8]]) -> Poll<io::Result<()>> {
        ready!(self.poll_ready(cx))?;
        let mut buffer = Buffer::take(Size::Small);
        let end = self.seal_into(&mut buffer, ContentType::ApplicationData, parts)?;
        Poll::Ready(self.send(cx, buffer, end))
    }

    /// Tells the peer that the connection is closed, as far as the kernel takes it at once.
    pub(super) fn take_leave(&mut self) -> io::Result<()> {
        let mut cx = Context::from_waker(Waker::noop());
        match self.poll_flush(&mut cx) {
            Poll::Ready(flushed) => flushed.and_then(|()| self.send_close_notify(&mut cx)),
            Poll::Pending => Ok(()),
        }
    }

    fn send_close_notify(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        const CLOSE_NOTIFY: [u8; 2] = [1, 0];
        let mut buffer = Buffer::take(Size::Small);
        let end = self.seal_into(&mut buffer, ContentType::Alert, &[&CLOSE_NOTIFY])?;
        self.send(cx, buffer, end)
    }

    /// Waits until all that was taken has been sent.
    pub(super) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(buffer) = &self.buffer {
            let sent = ready!(poll_send(&self.stream, cx, &[IoSlice::new(&buffer[self.pending.clone()])]))?;
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.pending.start += sent;
            if self.pending.is_empty() {
                self.buffer = None;
            }
        }
        Poll::Ready(Ok(()))
    }

    /// The socket.
    pub(super) fn socket(&self) -> &Arc<TcpStream> {
        &self.stream
    }

    /// Whether something that was taken has not been sent.
    pub(super) fn holds(&self) -> bool {
        self.buffer.is_some()
    }

    /// Waits until nothing is pending, and changes the key if it is time.
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_flush(cx))?;
        if self.sealer.worn() || self.keys.update_wanted.load(Ordering::Relaxed) {
            self.keys.update_wanted.store(false, Ordering::Relaxed);
            let mut buffer = Buffer::take(Size::Small);
            let end = self.seal_into(&mut buffer, ContentType::Handshake, &[&[KEY_UPDATE, 0, 0, 1, 0]])?;
            self.sealer = Sealer::new(&self.keys.update(true)?).map_err(io::Error::other)?;
            self.send(cx, buffer, end)?;
            return self.poll_flush(cx);
        }
        Poll::Ready(Ok(()))
    }

    /// Makes a record of the parts at the front of `place`, and says how long it is.
    fn seal_into(&mut self, place: &mut [u8], content: ContentType, parts: &[&[u8]]) -> io::Result<usize> {
        let mut end = HEAD;
        for part in parts {
            place[end..end + part.len()].copy_from_slice(part);
            end += part.len();
        }
        let record = &mut place[..end + TAIL];
        self.sealer.seal(content, record)?;
        Ok(record.len())
    }

    /// Sends the first `end` bytes of `buffer`, at once as far as the kernel takes them.
    fn send(&mut self, cx: &mut Context<'_>, buffer: Buffer, end: usize) -> io::Result<()> {
        if end > 0 {
            (self.buffer, self.pending) = (Some(buffer), 0..end);
        }
        match self.poll_flush(cx) {
            Poll::Ready(result) => result,
            Poll::Pending => Ok(()),
        }
    }
}

impl Keys {
    /// The next secrets of one direction.
    fn update(&self, outgoing: bool) -> io::Result<(u64, ConnectionTrafficSecrets)> {
        // A panic in rustls leaves a connection whose next keys do not fit, which the peer refuses.
        let updated = match (&mut *self.kernel.lock().unwrap_or_else(PoisonError::into_inner), outgoing) {
            (Kernel::Client(kernel), true) => kernel.update_tx_secret(),
            (Kernel::Client(kernel), false) => kernel.update_rx_secret(),
            (Kernel::Server(kernel), true) => kernel.update_tx_secret(),
            (Kernel::Server(kernel), false) => kernel.update_rx_secret(),
        };
        updated.map_err(io::Error::other)
    }
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keys").field("update_wanted", &self.update_wanted).finish_non_exhaustive()
    }
}

impl AsyncRead for TlsStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        while this.payload.is_empty() {
            match this.reader.next_record()? {
                Some(payload) => this.payload = payload,
                None if ready!(this.reader.poll_more(cx))? => {}
                None if this.reader.closed => return Poll::Ready(Ok(())),
                // Whoever cuts the connection must not be able to end the stream.
                None => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
            }
        }
        let part = this.payload.len().min(out.remaining());
        out.put_slice(this.reader.bytes(this.payload.start..this.payload.start + part));
        this.payload.start += part;
        if this.payload.is_empty() {
            this.reader.release();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for TlsStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, payload: &[u8]) -> Poll<io::Result<usize>> {
        self.writer.poll_write(cx, payload)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.writer.poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.writer.poll_flush(cx))?;
        if !std::mem::replace(&mut self.closing, true) {
            self.writer.send_close_notify(cx)?;
            ready!(self.writer.poll_flush(cx))?;
        }
        Poll::Ready(socket2::SockRef::from(&**self.socket()).shutdown(std::net::Shutdown::Write))
    }
}

#[cfg(test)]
pub(super) mod tests;
