//! Memory that is given back when a rush is over.
//!
//! All objects are read at the start, and all agents of a cluster come at once when a controller is new: what that took for a moment is
//! many times what stays, and the allocator keeps it.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::footprint;

/// How long nothing must have happened.
const QUIET: Duration = Duration::from_secs(2);

/// Gives free memory back to the kernel a moment after the last call of [`Relief::wanted`].
#[derive(Clone, Debug)]
pub(super) struct Relief(mpsc::Sender<()>);

impl Relief {
    /// Starts with the wish for it. Needs a tokio runtime; ends with the last copy.
    pub(super) fn start() -> Self {
        let (wishes, mut heard) = mpsc::channel(1);
        let relief = Self(wishes);
        relief.wanted();
        tokio::spawn(async move {
            while heard.recv().await.is_some() {
                while let Ok(again) = timeout(QUIET, heard.recv()).await {
                    if again.is_none() {
                        return;
                    }
                }
                // It takes some milliseconds, and the allocator's locks.
                drop(tokio::task::spawn_blocking(footprint::release_free).await);
            }
        });
        relief
    }

    /// Something has taken memory that it does not need any more.
    pub(super) fn wanted(&self) {
        // One wish is as good as several.
        let _there_is_one = self.0.try_send(());
    }
}
