//! The open connections of this node's pods, so that each can be called off: those to a pod that a change of policy denies, and all
//! of a pod that is gone.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::model::{CloseReason, Flow};
use crate::relay::Cancel;

/// Open connections by pod.
#[derive(Debug, Default)]
pub struct OpenConnections {
    pods: Mutex<HashMap<Arc<str>, Entries>>,
    next: AtomicU64,
}

/// The open connections of one pod.
#[derive(Debug, Default)]
struct Entries {
    by_id: HashMap<u64, Entry>,
    plaintext: HashSet<(SocketAddr, SocketAddr)>,
}

#[derive(Debug)]
struct Entry {
    flow: Arc<Flow>,
    in_the_clear: bool,
    cancel: Arc<Cancel>,
}

/// A connection's entry among the open ones; dropping it removes it.
#[derive(Debug)]
pub struct Registered {
    open: Arc<OpenConnections>,
    pod: Arc<str>,
    id: u64,
    /// Fires when the connection must end.
    pub cancel: Arc<Cancel>,
}

impl OpenConnections {
    /// Enters a connection of the pod of this UID. To be done before its verdict is asked for, so that no change of policy falls
    /// between the two.
    #[must_use]
    pub fn register(self: &Arc<Self>, pod: &Arc<str>, flow: Arc<Flow>) -> Registered {
        self.enter(pod, flow, false)
    }

    /// The same for a connection without a tunnel: its ends are those of a socket in the pod's namespace.
    #[must_use]
    pub fn register_in_the_clear(self: &Arc<Self>, pod: &Arc<str>, flow: Arc<Flow>) -> Registered {
        self.enter(pod, flow, true)
    }

    fn enter(self: &Arc<Self>, pod: &Arc<str>, flow: Arc<Flow>, in_the_clear: bool) -> Registered {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let cancel = Arc::new(Cancel::default());
        let mut pods = self.lock();
        let entries = pods.entry(Arc::clone(pod)).or_default();
        if in_the_clear {
            entries.plaintext.insert((flow.source, flow.destination));
        }
        entries.by_id.insert(id, Entry { flow, in_the_clear, cancel: Arc::clone(&cancel) });
        drop(pods);
        Registered { open: Arc::clone(self), pod: Arc::clone(pod), id, cancel }
    }

    /// Ends the connections to a pod that `denied` says so, with [`CloseReason::PolicyChanged`]. Returns how many, without those that
    /// are ending already.
    pub fn close_denied(&self, pod: &str, denied: impl Fn(&Flow) -> bool) -> usize {
        let mut closed = 0;
        for entry in self.lock().get(pod).into_iter().flat_map(|entries| entries.by_id.values()) {
            if denied(&entry.flow) && entry.cancel.cancel(CloseReason::PolicyChanged) {
                closed += 1;
            }
        }
        closed
    }

    /// Ends all connections of a pod.
    pub fn close_all(&self, pod: &str, reason: CloseReason) {
        for entry in self.lock().get(pod).into_iter().flat_map(|entries| entries.by_id.values()) {
            entry.cancel.cancel(reason);
        }
    }

    /// Whether the agent holds a plaintext connection from exactly this address and port to `destination`. A delivery must not take
    /// the same pair: in the pod's namespace the kernel could not tell the two apart.
    #[must_use]
    pub fn holds_plaintext(&self, pod: &str, source: SocketAddr, destination: SocketAddr) -> bool {
        self.lock().get(pod).is_some_and(|entries| entries.plaintext.contains(&(source, destination)))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Arc<str>, Entries>> {
        // A panic while the lock was held cannot have left the table half changed: every change is one call.
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let mut pods = self.open.lock();
        let Some(entries) = pods.get_mut(&self.pod) else { return };
        // A stream's source port is the peer's word: it must not free what a plaintext connection holds.
        if let Some(Entry { flow, in_the_clear: true, .. }) = entries.by_id.remove(&self.id) {
            entries.plaintext.remove(&(flow.source, flow.destination));
        }
        if entries.by_id.is_empty() {
            pods.remove(&self.pod);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(identity: Option<&str>) -> Arc<Flow> {
        let (source, destination) = ("10.0.0.1:4000".parse().unwrap(), "10.0.0.2:80".parse().unwrap());
        Arc::new(Flow { source_identity: identity.map(|id| id.parse().unwrap()), source, destination })
    }

    #[test]
    fn a_plaintext_connection_holds_its_addresses_whatever_tunnels_claim_to_come_from_there() {
        let (open, pod) = (Arc::new(OpenConnections::default()), Arc::<str>::from("uid"));
        let held = || {
            let Flow { source, destination, .. } = *flow(None);
            open.holds_plaintext(&pod, source, destination)
        };
        let tunnelled = || open.register(&pod, flow(Some("spiffe://cluster.local/ns/shop/sa/cart")));
        let lasting = tunnelled();
        assert!(!held(), "a stream is no plaintext connection");
        let plaintext = open.register_in_the_clear(&pod, flow(None));
        drop(tunnelled());
        assert!(held(), "the end of a stream has freed the addresses of a plaintext connection");
        drop(plaintext);
        assert!(!held());
        drop(lasting);
        assert!(open.lock().is_empty());
    }
}
