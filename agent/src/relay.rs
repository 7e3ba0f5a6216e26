//! The two-way copy that both sides share: bytes, ends of streams, resets and back-pressure, each passed on as what it is.
//!
//! Enters: two endpoints, each split into the half that gives bytes and the half that takes them. Leaves: how the relay ended.
//! A FIN in one direction leaves the other open; a reset of one endpoint resets the other; a chunk is read only when the last
//! one was taken, so a slow reader slows its writer. There is no idle timeout: connections live as long as their ends want.

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use tokio_util::sync::CancellationToken;

pub mod tcp;

/// The endpoint broke: its far end reset it, or the way to it failed.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Broken(#[from] pub std::io::Error);

/// The half of an endpoint that gives bytes.
pub trait Source: Send {
    /// The next bytes; none when the far end has finished. Cancel safe.
    fn chunk(&mut self) -> impl Future<Output = Result<Option<Bytes>, Broken>> + Send;

    /// Says that `bytes` bytes have been passed on, so that the far end may send as many again.
    fn passed_on(&mut self, bytes: usize);
}

/// The half of an endpoint that takes bytes.
pub trait Sink: Send {
    /// Takes all of the chunk; waits while the far end is slow.
    fn write(&mut self, chunk: Bytes) -> impl Future<Output = Result<(), Broken>> + Send;

    /// Waits until the endpoint breaks while nothing is written. May never end, and may leave the notice to the source half.
    fn broken(&mut self) -> impl Future<Output = Broken> + Send;

    /// Says that no more bytes come.
    fn finish(&mut self) -> impl Future<Output = Result<(), Broken>> + Send;

    /// Resets the endpoint, both halves of it.
    fn reset(&mut self);
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
    /// The relay was called off; both endpoints were reset.
    Cancelled,
}

/// Which half broke within one direction.
enum Fault {
    Source,
    Sink,
}

/// Copies between two endpoints until both directions have finished, one breaks, or `cancel` fires. `sent` counts the bytes from
/// near to far, `received` those from far to near, each as it has been handed on.
pub async fn relay<NS, NK, FS, FK>(
    (near_source, near_sink): (&mut NS, &mut NK),
    (far_source, far_sink): (&mut FS, &mut FK),
    (sent, received): (&AtomicU64, &AtomicU64),
    cancel: &CancellationToken,
) -> End
where
    NS: Source,
    NK: Sink,
    FS: Source,
    FK: Sink,
{
    let end = {
        let mut out = pin!(pump(near_source, far_sink, sent));
        let mut back = pin!(pump(far_source, near_sink, received));
        let (mut out_done, mut back_done) = (false, false);
        loop {
            tokio::select! {
                ended = &mut out, if !out_done => match ended {
                    Ok(()) => out_done = true,
                    Err(Fault::Source) => break End::NearBroke,
                    Err(Fault::Sink) => break End::FarBroke,
                },
                ended = &mut back, if !back_done => match ended {
                    Ok(()) => back_done = true,
                    Err(Fault::Source) => break End::FarBroke,
                    Err(Fault::Sink) => break End::NearBroke,
                },
                () = cancel.cancelled() => break End::Cancelled,
            }
            if out_done && back_done {
                break End::Finished;
            }
        }
    };
    match end {
        End::Finished => {}
        End::NearBroke => far_sink.reset(),
        End::FarBroke => near_sink.reset(),
        End::Cancelled => {
            near_sink.reset();
            far_sink.reset();
        }
    }
    end
}

/// One direction, to its end. When the source has finished, the sink's fate is still watched by the other direction's source.
async fn pump<S: Source, K: Sink>(source: &mut S, sink: &mut K, count: &AtomicU64) -> Result<(), Fault> {
    loop {
        let chunk = tokio::select! {
            biased;
            chunk = source.chunk() => chunk.map_err(|Broken(_)| Fault::Source)?,
            Broken(_) = sink.broken() => return Err(Fault::Sink),
        };
        let Some(chunk) = chunk else { break };
        let bytes = chunk.len();
        sink.write(chunk).await.map_err(|Broken(_)| Fault::Sink)?;
        source.passed_on(bytes);
        count.fetch_add(bytes as u64, Ordering::Relaxed);
    }
    sink.finish().await.map_err(|Broken(_)| Fault::Sink)
}

#[cfg(test)]
mod tests;
