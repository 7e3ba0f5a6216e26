//! The accept loop that all of the agent's listeners in pods share: accept, permit, spawn, and count for the drain.

use std::future::Future;
use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::capture::{Accepted, Listener, LocalPod};
use crate::drain::Drain;
use crate::relay::tcp;

/// How many connections the agent holds at once, over all its pods. Each costs two to four descriptors.
#[derive(Clone, Debug)]
pub struct Permits(Arc<Semaphore>);

impl Permits {
    /// As many connections as `descriptors`, the process's limit of open files, allow.
    #[must_use]
    pub fn for_descriptors(descriptors: u64) -> Self {
        let connections = usize::try_from(descriptors / 4).unwrap_or(usize::MAX).clamp(64, Semaphore::MAX_PERMITS);
        Self(Arc::new(Semaphore::new(connections)))
    }

    /// Room for one connection more, given back when dropped; none past the bound.
    #[must_use]
    pub fn take(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.0).try_acquire_owned().ok()
    }

    /// For how many more connections there is room.
    #[must_use]
    pub fn free(&self) -> usize {
        self.0.available_permits()
    }
}

/// Hands each connection that arrives at `listener` to `handle`, in a task of its own, until the pod leaves the mesh or the agent
/// stops. Past the bound a connection is reset at once, and `overloaded` is told.
pub async fn serve<F>(
    listener: Listener,
    pod: Arc<LocalPod>,
    drain: Drain,
    permits: Permits,
    handle: impl Fn(Accepted) -> F,
    overloaded: impl Fn(&Accepted),
) where
    F: Future<Output = ()> + Send + 'static,
{
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = pod.released.cancelled() => return,
            () = drain.started() => return,
        };
        let Some(permit) = permits.take() else {
            overloaded(&accepted);
            tcp::reset_on_close(&accepted.stream);
            continue;
        };
        drain.spawn(handle(accepted), permit);
    }
}
