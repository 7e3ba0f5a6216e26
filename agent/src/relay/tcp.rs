//! A TCP connection as an endpoint of a relay.

use std::fmt;
use std::future::Future;
use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::uio::{readv, writev};
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::buffer::{Buffer, Size};
use super::{Broken, Fault, Sink, Slices, Source, copy};

/// The half that reads.
#[derive(Debug)]
pub struct TcpSource {
    stream: Arc<TcpStream>,
    /// The far end has finished.
    finished: Arc<AtomicBool>,
    held: Option<Buffer>,
    filled: Range<usize>,
    wanted: Size,
    watch: Watch,
}

/// Waits for an error of a connection while nobody reads from it; made when it is first needed, which is never for most.
#[derive(Default)]
pub(crate) struct Watch(Option<Pin<Box<dyn Future<Output = ()> + Send>>>);

/// The half that writes. Dropped before it has finished, it resets the connection.
#[derive(Debug)]
pub struct TcpSink {
    stream: Arc<TcpStream>,
    /// The far end has finished.
    read_finished: Arc<AtomicBool>,
    watch: Watch,
    end: ResetOnDrop,
}

/// Resets a connection when it is dropped, unless it has been disarmed: an end that nobody meant is no end in order.
#[derive(Debug)]
pub(crate) struct ResetOnDrop {
    stream: Arc<TcpStream>,
    end: Ending,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    Armed,
    Disarmed,
    Reset,
}

/// Splits a connection into its halves. Urgent data is read as what it is beside: the next byte in order.
#[must_use]
pub fn split(stream: TcpStream) -> (TcpSource, TcpSink) {
    // Out of line a byte would be lost: nobody asks for it.
    let _gone = SockRef::from(&stream).set_out_of_band_inline(true);
    let (stream, finished) = (Arc::new(stream), Arc::new(AtomicBool::new(false)));
    let (read_finished, end) = (Arc::clone(&finished), ResetOnDrop::new(&stream));
    let source = TcpSource {
        stream: Arc::clone(&stream),
        finished,
        held: None,
        filled: 0..0,
        wanted: Size::default(),
        watch: Watch::default(),
    };
    (source, TcpSink { stream, read_finished, watch: Watch::default(), end })
}

/// Makes the coming close of a connection a reset, not an end of file.
pub fn reset_on_close(stream: &TcpStream) {
    // Only a socket that is already gone refuses this, and its far end has its answer.
    let _gone = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

/// Reads what has come, and says how many bytes; 0 at the end. A read that leaves room has taken all that there was: the next call
/// waits for more without asking the kernel.
pub(crate) fn poll_receive(stream: &TcpStream, cx: &mut Context<'_>, spaces: &mut [IoSliceMut<'_>]) -> Poll<io::Result<usize>> {
    let room = spaces.iter().map(|space| space.len()).sum();
    poll_transfer(stream, cx, Interest::READABLE, room, || readv(stream, spaces))
}

/// Writes what the kernel takes, and says how many bytes. A write that leaves some has filled the kernel: the next call waits.
pub(crate) fn poll_send(stream: &TcpStream, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
    let wanted = slices.iter().map(|slice| slice.len()).sum();
    poll_transfer(stream, cx, Interest::WRITABLE, wanted, || writev(stream, slices))
}

/// Makes the call once the connection is ready for it, and says how many bytes it has moved. When that is some, but less than
/// `wanted`, the connection is not ready any more.
fn poll_transfer(
    stream: &TcpStream,
    cx: &mut Context<'_>,
    interest: Interest,
    wanted: usize,
    mut call: impl FnMut() -> nix::Result<usize>,
) -> Poll<io::Result<usize>> {
    loop {
        ready!(if interest.is_readable() { stream.poll_read_ready(cx) } else { stream.poll_write_ready(cx) })?;
        let mut moved = None;
        let tried = stream.try_io(interest, || {
            let bytes = call()?;
            moved = Some(bytes);
            if bytes > 0 && bytes < wanted { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
        });
        match (moved, tried) {
            (Some(bytes), _) => return Poll::Ready(Ok(bytes)),
            (None, Err(error)) if error.kind() == io::ErrorKind::WouldBlock => {}
            (None, Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            (None, tried) => return Poll::Ready(tried.map(|()| 0)),
        }
    }
}

impl TcpSource {
    /// Takes in what has come by now, without waiting; also what the runtime has not been told of yet.
    ///
    /// # Errors
    /// [`Broken`] when the far end has reset the connection.
    pub fn fill_at_once(&mut self) -> Result<(), Broken> {
        if !self.filled.is_empty() {
            return Ok(());
        }
        let mut buffer = Buffer::take(self.wanted);
        match readv(&self.stream, &mut [IoSliceMut::new(&mut buffer)]) {
            // An end of file is told again.
            Ok(0) | Err(Errno::EAGAIN | Errno::EINTR) => Ok(()),
            Ok(bytes) => {
                self.filled = 0..bytes;
                self.held = Some(buffer);
                Ok(())
            }
            Err(error) => Err(Broken(error.into())),
        }
    }

    /// What was taken in and not passed on.
    #[must_use]
    pub fn held(&self) -> &[u8] {
        self.held.as_ref().map_or(&[], |buffer| &buffer[self.filled.clone()])
    }
}

impl Source for TcpSource {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<()>, Broken>> {
        if !self.filled.is_empty() {
            return Poll::Ready(Ok(Some(())));
        }
        let mut buffer = Buffer::take(self.wanted);
        let bytes = ready!(self.poll_read(cx, &mut [IoSliceMut::new(&mut buffer)]))?;
        if bytes == buffer.len() {
            self.wanted = self.wanted.larger();
        }
        self.filled = 0..bytes;
        self.held = Some(buffer);
        Poll::Ready(Ok((bytes > 0).then_some(())))
    }

    fn filled<'a>(&'a self, slices: &mut Slices<'a>) {
        if self.holds() {
            slices.push(self.held());
        }
    }

    fn consume(&mut self, bytes: usize) {
        self.filled.start += bytes;
        if self.filled.is_empty() {
            self.held = None;
        }
    }

    fn holds(&self) -> bool {
        !self.filled.is_empty()
    }

    fn poll_broken(&mut self, cx: &mut Context<'_>) -> Poll<Broken> {
        self.watch.poll(&self.stream, cx)
    }

    fn poll_read(&mut self, cx: &mut Context<'_>, spaces: &mut [IoSliceMut<'_>]) -> Poll<Result<usize, Broken>> {
        if self.holds() {
            let read = copy(&[IoSlice::new(self.held())], spaces);
            self.consume(read);
            return Poll::Ready(Ok(read));
        }
        let bytes = ready!(poll_receive(&self.stream, cx, spaces))?;
        if bytes == 0 {
            self.finished.store(true, Ordering::Relaxed);
        }
        Poll::Ready(Ok(bytes))
    }
}

impl Sink for TcpSink {
    fn poll_move<S: Source>(&mut self, cx: &mut Context<'_>, source: &mut S) -> Poll<Result<usize, Fault>> {
        if ready!(source.poll_fill(cx)).map_err(|Broken(_)| Fault::Source)?.is_none() {
            return Poll::Ready(Ok(0));
        }
        let mut slices = Slices::default();
        source.filled(&mut slices);
        let sent = ready!(poll_send(&self.stream, cx, slices.as_slice())).map_err(|_error| Fault::Sink)?;
        source.consume(sent);
        Poll::Ready(Ok(sent))
    }

    /// What is not sent at once stays with the source.
    fn holds(&self) -> bool {
        false
    }

    fn poll_finish(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        self.end.disarm();
        Poll::Ready(SockRef::from(&*self.stream).shutdown(std::net::Shutdown::Write).map_err(Broken))
    }

    /// While the connection is read from, a reset shows there; afterwards it shows here.
    fn poll_broken(&mut self, cx: &mut Context<'_>) -> Poll<Broken> {
        if !self.read_finished.load(Ordering::Relaxed) {
            return Poll::Pending;
        }
        self.watch.poll(&self.stream, cx)
    }

    fn reset(&mut self) {
        self.end.reset();
    }
}

impl Watch {
    /// Waits until the kernel says that the connection has broken. The error itself is left for whoever reads.
    pub(crate) fn poll(&mut self, stream: &Arc<TcpStream>, cx: &mut Context<'_>) -> Poll<Broken> {
        let watch = self.0.get_or_insert_with(|| {
            let stream = Arc::clone(stream);
            Box::pin(async move {
                let _broken_either_way = stream.ready(Interest::ERROR).await;
            })
        });
        ready!(watch.as_mut().poll(cx));
        self.0 = None;
        Poll::Ready(Broken(io::ErrorKind::ConnectionReset.into()))
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Watch").field(&self.0.is_some()).finish()
    }
}

impl ResetOnDrop {
    pub(crate) fn new(stream: &Arc<TcpStream>) -> Self {
        Self { stream: Arc::clone(stream), end: Ending::Armed }
    }

    /// What comes next may be cut short. A connection that was reset stays so.
    pub(crate) fn arm(&mut self) {
        if self.end == Ending::Disarmed {
            self.end = Ending::Armed;
        }
    }

    /// The connection has ended in order, as far as this half goes. One that was reset stays so.
    pub(crate) fn disarm(&mut self) {
        if self.end == Ending::Armed {
            self.end = Ending::Disarmed;
        }
    }

    pub(crate) fn is_disarmed(&self) -> bool {
        self.end == Ending::Disarmed
    }

    /// Makes the connection's close a reset.
    pub(crate) fn reset(&mut self) {
        self.end = Ending::Reset;
        reset_on_close(&self.stream);
    }
}

impl Drop for ResetOnDrop {
    fn drop(&mut self) {
        if self.end == Ending::Armed {
            self.reset();
        }
    }
}
