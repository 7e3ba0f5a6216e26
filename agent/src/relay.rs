//! The two-way copy that both sides share: bytes, ends of streams, resets and back-pressure, each passed on as what it is.
//!
//! Enters: two endpoints, each split into the half that gives bytes and the half that takes them. Leaves: how the relay ended.
//! A FIN in one direction leaves the other open; a reset of one endpoint resets the other; bytes are read only when the last
//! ones were taken, so a slow reader slows its writer. There is no idle timeout: connections live as long as their ends want.
//!
//! Both directions run in the connection's one task, and nothing is allocated, locked or handed to another task to move bytes:
//! see [`buffer`] for where they pass through.

use std::future::{Future, poll_fn};
use std::io::{IoSlice, IoSliceMut};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::Sleep;

use crate::model::CloseReason;

pub mod buffer;
pub mod cancel;
pub mod tcp;

pub use cancel::Cancel;

/// How long what came before a reset of its source may wait for a slow sink; then the reset overtakes it, as it would without a relay.
/// Who reads gets it all in that time.
const GRACE: Duration = Duration::from_secs(1);

/// The endpoint broke: its far end reset it, or the way to it failed.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Broken(#[from] pub std::io::Error);

/// The half of an endpoint that gives bytes.
pub trait Source: Send {
    /// Waits until there are bytes to be given; none when the far end has finished.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<()>, Broken>>;

    /// The bytes that are there, or the first of them. Empty unless [`poll_fill`](Self::poll_fill) has just said otherwise.
    fn filled<'a>(&'a self, slices: &mut Slices<'a>);

    /// Takes away as many bytes as have been passed on; the far end may send as many again.
    fn consume(&mut self, bytes: usize);

    /// Whether there are bytes that have not been taken away.
    fn holds(&self) -> bool;

    /// Waits until the endpoint breaks while nothing is read. May never end, and may leave the notice to the sink half. What has
    /// come before can still be read.
    fn poll_broken(&mut self, cx: &mut Context<'_>) -> Poll<Broken>;

    /// Reads straight into `spaces`, which are not empty, and says how many bytes; 0 when the far end has finished.
    fn poll_read(&mut self, cx: &mut Context<'_>, spaces: &mut [IoSliceMut<'_>]) -> Poll<Result<usize, Broken>> {
        if ready!(self.poll_fill(cx))?.is_none() {
            return Poll::Ready(Ok(0));
        }
        let mut slices = Slices::default();
        self.filled(&mut slices);
        let read = copy(slices.as_slice(), spaces);
        self.consume(read);
        Poll::Ready(Ok(read))
    }
}

/// The half of an endpoint that takes bytes.
pub trait Sink: Send {
    /// Moves bytes from `source` into this sink, and says how many; 0 when the source has finished. Waits for bytes, and while the
    /// far end is slow.
    fn poll_move<S: Source>(&mut self, cx: &mut Context<'_>, source: &mut S) -> Poll<Result<usize, Fault>>;

    /// Whether bytes that were taken wait for the far end.
    fn holds(&self) -> bool;

    /// Says that no more bytes come, when all that were taken are on their way.
    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>>;

    /// Waits until the endpoint breaks while nothing is written. May never end, and may leave the notice to the source half.
    fn poll_broken(&mut self, cx: &mut Context<'_>) -> Poll<Broken>;

    /// Resets the endpoint, both halves of it.
    fn reset(&mut self);
}

/// Some of the bytes that a source has, in order.
#[derive(Debug)]
pub struct Slices<'a> {
    list: [IoSlice<'a>; Slices::<'static>::MOST],
    used: usize,
}

/// Which half broke within one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The half that gives.
    Source,
    /// The half that takes.
    Sink,
}

/// How a relay ended. `Near` is the first endpoint given to [`relay`], `Far` the second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Both directions finished.
    Finished,
    /// The first endpoint broke; the second was reset.
    NearBroke,
    /// The second endpoint broke; the first was reset.
    FarBroke,
    /// The relay was called off, with this reason; both endpoints were reset.
    Cancelled(CloseReason),
}

impl End {
    /// The word for logs and metrics, where the first endpoint is the source's side.
    #[must_use]
    pub fn reason(self) -> CloseReason {
        match self {
            Self::Finished => CloseReason::Finished,
            Self::NearBroke => CloseReason::SourceReset,
            Self::FarBroke => CloseReason::DestinationReset,
            Self::Cancelled(reason) => reason,
        }
    }
}

impl<'a> Slices<'a> {
    /// As many slices as are ever passed on in one call.
    pub const MOST: usize = 32;

    /// Adds one, if there is room.
    pub fn push(&mut self, bytes: &'a [u8]) {
        if let Some(place) = self.list.get_mut(self.used) {
            *place = IoSlice::new(bytes);
            self.used += 1;
        }
    }

    /// All of them.
    #[must_use]
    pub fn as_slice(&self) -> &[IoSlice<'a>] {
        &self.list[..self.used]
    }
}

impl Default for Slices<'_> {
    fn default() -> Self {
        Self { list: [IoSlice::new(&[]); Self::MOST], used: 0 }
    }
}

/// Copies as many bytes as there is room for.
fn copy(slices: &[IoSlice<'_>], spaces: &mut [IoSliceMut<'_>]) -> usize {
    let mut copied = 0;
    let mut rooms = spaces.iter_mut().map(|space| &mut **space).filter(|space| !space.is_empty());
    let mut room: &mut [u8] = &mut [];
    for mut bytes in slices.iter().map(|slice| &**slice) {
        while !bytes.is_empty() {
            if room.is_empty() {
                let Some(next) = rooms.next() else { return copied };
                room = next;
            }
            let part = bytes.len().min(room.len());
            let (place, rest) = std::mem::take(&mut room).split_at_mut(part);
            place.copy_from_slice(&bytes[..part]);
            (room, bytes) = (rest, &bytes[part..]);
            copied += part;
        }
    }
    copied
}

/// One direction of a relay.
#[derive(Debug, Default)]
struct Pump {
    /// The source has finished.
    finishing: bool,
    /// The sink knows.
    done: bool,
    /// The source has broken: until this ends, what came before goes first.
    grace: Option<Pin<Box<Sleep>>>,
}

impl Pump {
    /// Moves what can be moved; ready when the sink knows the source's end. While the source is silent, the sink is watched.
    fn poll<S: Source, K: Sink>(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut S,
        sink: &mut K,
        count: &AtomicU64,
    ) -> Poll<Result<(), Fault>> {
        while !self.finishing {
            match sink.poll_move(cx, source) {
                Poll::Ready(Ok(0)) => self.finishing = true,
                Poll::Ready(Ok(bytes)) => drop(count.fetch_add(bytes as u64, Ordering::Relaxed)),
                Poll::Ready(Err(fault)) => return Poll::Ready(Err(fault)),
                Poll::Pending if sink.poll_broken(cx).is_ready() => return Poll::Ready(Err(Fault::Sink)),
                Poll::Pending => return self.poll_overtaken(cx, source, sink),
            }
        }
        let finished = ready!(sink.poll_finish(cx));
        self.done = finished.is_ok();
        Poll::Ready(finished.map_err(|Broken(_)| Fault::Sink))
    }

    /// While the sink takes nothing nobody reads from the source, so that its reset does not show: then it is watched.
    fn poll_overtaken<S: Source, K: Sink>(&mut self, cx: &mut Context<'_>, source: &mut S, sink: &K) -> Poll<Result<(), Fault>> {
        if self.grace.is_none() {
            if !source.holds() && !sink.holds() {
                return Poll::Pending;
            }
            ready!(source.poll_broken(cx));
        }
        let grace = self.grace.get_or_insert_with(|| Box::pin(tokio::time::sleep(GRACE)));
        grace.as_mut().poll(cx).map(|()| Err(Fault::Source))
    }
}

/// Copies between two endpoints until both directions have finished, one breaks, or `cancel` calls it off. `sent` counts the bytes
/// from near to far, `received` those from far to near, each as it has been handed on.
pub async fn relay<NS, NK, FS, FK>(
    (near_source, near_sink): (&mut NS, &mut NK),
    (far_source, far_sink): (&mut FS, &mut FK),
    (sent, received): (&AtomicU64, &AtomicU64),
    cancel: &Cancel,
) -> End
where
    NS: Source,
    NK: Sink,
    FS: Source,
    FK: Sink,
{
    let (mut out, mut back) = (Pump::default(), Pump::default());
    let end = poll_fn(|cx| {
        loop {
            if let Poll::Ready(reason) = cancel.poll(cx) {
                return Poll::Ready(End::Cancelled(reason));
            }
            let before = (out.finishing, back.finishing);
            if !out.done
                && let Poll::Ready(Err(fault)) = out.poll(cx, near_source, far_sink, sent)
            {
                return Poll::Ready(if fault == Fault::Source { End::NearBroke } else { End::FarBroke });
            }
            if !back.done
                && let Poll::Ready(Err(fault)) = back.poll(cx, far_source, near_sink, received)
            {
                return Poll::Ready(if fault == Fault::Source { End::FarBroke } else { End::NearBroke });
            }
            if out.done && back.done {
                return Poll::Ready(End::Finished);
            }
            // An endpoint whose source has finished is watched by its sink from here on: that has to look now.
            if (out.finishing, back.finishing) == before {
                return Poll::Pending;
            }
        }
    })
    .await;
    match end {
        End::Finished => {}
        End::NearBroke => far_sink.reset(),
        End::FarBroke => near_sink.reset(),
        End::Cancelled(_) => {
            near_sink.reset();
            far_sink.reset();
        }
    }
    end
}

#[cfg(test)]
pub(crate) mod tests;
