//! The accept loop that all of the agent's listeners in pods share: accept, permit, spawn, and count for the drain.

use std::fmt;
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

/// Why a connection finds no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    /// The agent has none.
    Agent,
    /// Its pod has as much as is left for all others.
    Pod,
}

impl fmt::Display for Full {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Agent => "the agent holds as many connections as its descriptors allow",
            Self::Pod => "this pod holds as many of the agent's connections as are left for all others",
        })
    }
}

/// Hands each connection that arrives at `listener` to `handle`, in a task of its own, until the pod leaves the mesh or the agent
/// stops. Past the bound a connection is reset at once, and `overloaded` is told. One listener alone gets half of what there is, and
/// several as much each as they leave for the next.
pub async fn serve<F>(
    listener: Listener,
    pod: Arc<LocalPod>,
    drain: Drain,
    permits: Permits,
    handle: impl Fn(Accepted) -> F,
    overloaded: impl Fn(&Accepted, Full),
) where
    F: Future<Output = ()> + Send + 'static,
{
    // Its owners are this loop and each connection that is open.
    let held = Arc::new(());
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = pod.released.cancelled() => return,
            () = drain.started() => return,
        };
        let room =
            if Arc::strong_count(&held) > permits.free().max(1) { Err(Full::Pod) } else { permits.take().ok_or(Full::Agent) };
        match room {
            Ok(permit) => drain.spawn(handle(accepted), (permit, Arc::clone(&held))),
            Err(full) => {
                overloaded(&accepted, full);
                tcp::reset_on_close(&accepted.stream);
            }
        }
    }
}
