//! How many discovery streams each node may hold.
//!
//! Enters: the node that opens a stream. Leaves: its place, or a refusal. What a stream keeps is bounded; this bounds the streams.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tonic::Status;

/// An agent holds one stream, and a second while it reconnects.
const STREAMS: usize = 8;

/// Streams by node.
#[derive(Clone, Debug, Default)]
pub(super) struct Quota(Arc<Mutex<HashMap<Arc<str>, usize>>>);

/// A node's place for one stream, given back when dropped.
#[derive(Debug)]
pub(super) struct Held {
    quota: Quota,
    node: Arc<str>,
}

impl Quota {
    /// Takes a place for a stream of `node`.
    ///
    /// # Errors
    /// RESOURCE_EXHAUSTED when the node holds as many as it may.
    pub(super) fn take(&self, node: &Arc<str>) -> Result<Held, Status> {
        let mut streams = self.lock();
        let held = streams.entry(Arc::clone(node)).or_default();
        if *held >= STREAMS {
            let message = format!("node {node} holds {STREAMS} discovery streams already: is its token in use elsewhere?");
            return Err(Status::resource_exhausted(message));
        }
        *held += 1;
        Ok(Held { quota: self.clone(), node: Arc::clone(node) })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Arc<str>, usize>> {
        // Every change under the lock is complete in itself.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut streams = self.quota.lock();
        if let Some(held) = streams.get_mut(&self.node) {
            *held -= 1;
            if *held == 0 {
                streams.remove(&self.node);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_holds_all_its_streams_is_refused_until_one_ends_and_others_are_not() {
        let (quota, node, other) = (Quota::default(), Arc::from("a"), Arc::from("b"));
        let mut held: Vec<_> = (0..STREAMS).map(|_| quota.take(&node).expect("a place")).collect();
        assert_eq!(quota.take(&node).expect_err("no place").code(), tonic::Code::ResourceExhausted);
        drop(quota.take(&other).expect("a place of its own"));
        held.pop();
        held.push(quota.take(&node).expect("the place that was given back"));
        held.clear();
        assert!(quota.lock().is_empty());
    }
}
