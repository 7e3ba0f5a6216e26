//! Where the cluster's objects come from: the seam between a manifests directory, an API server, and the index.
//!
//! Enters: whatever the source reads. Leaves: a [`Feed`] of [`Batch`]es of typed objects that passed [`Object::check`]; the first
//! that is marked so completes the source's whole content. A source never hands on an object that it could not read: what it said
//! last stays in force.

pub mod kubernetes;
pub mod manifests;
mod object;
pub(super) mod stand_in;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

pub use object::{FieldError, Kind, Object, ObjectKey};

/// How long [`Barrier::pass`] waits for a source that hangs.
const BARRIER_DEADLINE: Duration = Duration::from_secs(5);
/// Batches under way between a source and the index.
const BATCHES: usize = 16;
/// Barrier requests under way.
const BARRIERS: usize = 1024;

/// One object added, replaced or removed.
#[derive(Clone, Debug)]
pub enum Change {
    /// The object is new or has changed.
    Applied {
        /// The object as it is now.
        object: Arc<Object>,
        /// Where it was read, for messages: a file and document, say.
        origin: Arc<str>,
    },
    /// The object is gone.
    Removed(ObjectKey),
    /// The object is there, but cannot be used as it is now.
    Refused {
        /// Which one.
        key: ObjectKey,
        /// The object's own UID, if it has one.
        uid: Option<String>,
        /// What is wrong with it.
        error: FieldError,
        /// What stands in for it where it said nothing good before: of a policy the strictest that it may mean, if that can be told.
        stand_in: Option<Arc<Object>>,
    },
}

/// Changes that belong together, in order. Whoever applies them then calls [`Batch::passed`].
#[derive(Debug)]
pub struct Batch {
    /// What changed. Empty when only a barrier passes.
    pub changes: Vec<Change>,
    /// Whether the source's whole content has been handed on, with this batch.
    pub complete: bool,
    /// When the changes were read.
    pub read_at: Instant,
    barriers: Vec<Waiting>,
}

/// What a source gives the controller.
#[derive(Debug)]
pub struct Feed {
    /// The changes, in order; the first complete batch ends the whole content. Ends with the source.
    pub batches: mpsc::Receiver<Batch>,
    /// Asks whether the index has caught up.
    pub barrier: Barrier,
}

/// A source's own ends of its [`Feed`].
#[derive(Debug)]
pub struct FeedWriter {
    batches: mpsc::Sender<Batch>,
    barriers: mpsc::Receiver<Waiting>,
}

/// Makes sure that what was written before is in the index.
#[derive(Clone, Debug)]
pub struct Barrier(mpsc::Sender<Waiting>);

/// Somebody at the barrier.
#[derive(Debug)]
pub struct Waiting {
    /// What must be in the index.
    pub about: About,
    passed: oneshot::Sender<()>,
}

/// What somebody at the barrier asks about: a source that cannot be sure of all looks this up.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum About {
    /// Pods of a namespace on a node.
    Pods {
        /// The namespace.
        namespace: String,
        /// The node.
        node: String,
    },
    /// Whoever has an address.
    Address(IpAddr),
    /// Something else.
    Other,
}

/// A source of the cluster's objects.
pub trait Source {
    /// Why the source could not start.
    type Error: std::error::Error + Send + Sync + 'static;

    /// Starts reading. The feed ends when `stop` is cancelled. Must be called on a Tokio runtime.
    ///
    /// # Errors
    /// When the source cannot be read or followed at all.
    fn start(self, stop: tokio_util::sync::CancellationToken) -> Result<Feed, Self::Error>;
}

/// The two halves of a feed.
#[must_use]
pub fn feed() -> (FeedWriter, Feed) {
    let (batches, batch_reader) = mpsc::channel(BATCHES);
    let (barrier, barriers) = mpsc::channel(BARRIERS);
    (FeedWriter { batches, barriers }, Feed { batches: batch_reader, barrier: Barrier(barrier) })
}

impl Batch {
    /// A batch that no barrier waits for.
    #[must_use]
    pub fn of(changes: Vec<Change>) -> Self {
        Self { changes, complete: true, read_at: Instant::now(), barriers: Vec::new() }
    }

    /// Tells those that wait at a barrier that all up to and including this batch is in the index.
    pub fn passed(self) {
        for waiting in self.barriers {
            // One that stopped waiting has dropped its end.
            let _gone = waiting.passed.send(());
        }
    }
}

impl FeedWriter {
    /// Waits for someone at the barrier, and gives all that wait by then. Never ends while the feed's barrier is held.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub async fn at_barrier(&mut self) -> Vec<Waiting> {
        let mut waiting = Vec::new();
        if self.barriers.recv_many(&mut waiting, BARRIERS).await == 0 {
            std::future::pending::<()>().await;
        }
        waiting
    }

    /// Hands on a batch, after which the source's whole content is handed on. Returns whether anyone still reads.
    pub async fn send(&self, changes: Vec<Change>, barriers: Vec<Waiting>) -> bool {
        self.batches.send(Batch { barriers, ..Batch::of(changes) }).await.is_ok()
    }

    /// Hands on a part of the whole content. Returns whether anyone still reads.
    pub async fn send_part(&self, changes: Vec<Change>) -> bool {
        self.batches.send(Batch { complete: false, ..Batch::of(changes) }).await.is_ok()
    }
}

impl Barrier {
    /// Returns once everything of what it is about that was written to the source before this call is in the index. Returns false
    /// when the source has stopped, hangs or cannot tell, so that the index may be behind.
    pub async fn pass(&self, about: About) -> bool {
        let (passed, receiver) = oneshot::channel();
        let passed = async { self.0.send(Waiting { about, passed }).await.is_ok() && receiver.await.is_ok() };
        tokio::time::timeout(BARRIER_DEADLINE, passed).await.unwrap_or(false)
    }
}
