//! What a process bounds itself to: open files, connections whose peers have not shown who they are, and what one peer may hold.
//!
//! Enters: the kernel's limits, and each new connection. Leaves: how many descriptors there are, and who has to go. A stranger
//! costs a place in an [`Antechamber`] and never one of an authenticated peer's; a peer leaves others their [`Shares`].

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tracing::warn;

/// How many descriptors there are where the kernel does not say.
const DESCRIPTORS: u64 = 1024;
/// How many that wait in an [`Antechamber`] are looked at, past its bound, for one that has to go: when all of these wait for us, none goes.
const LOOKS: usize = 8;
/// How many times its bound an [`Antechamber`] holds when all wait for us.
const PATIENTLY: usize = 4;

/// Raises the limit of open files as far as it goes: every connection costs descriptors. Returns how many that is.
#[must_use]
pub fn raise_descriptors() -> u64 {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
        Ok(hard)
    });
    raised.unwrap_or_else(|error| {
        warn!(%error, "the limit of open files stays as it is");
        DESCRIPTORS
    })
}

/// Where connections wait that have not shown who they are. Past the bound the one that has waited longest goes, so that a flood of
/// silent peers does not keep those out that need a moment only. Whoever has said something that was not read yet waits for us, not we
/// for him: he counts as the one that came last, and goes only when there are several times as many.
#[derive(Debug)]
pub struct Antechamber {
    most: usize,
    waiting: Mutex<Queue>,
}

#[derive(Debug, Default)]
struct Queue {
    next: u64,
    by_age: BTreeMap<u64, Arc<Place>>,
}

#[derive(Debug)]
struct Place {
    /// Where it is in the queue.
    number: AtomicU64,
    peer: Weak<TcpStream>,
    evicted: CancellationToken,
}

impl Place {
    /// Whether the peer has said something that waits to be read.
    fn waits_for_us(&self) -> bool {
        self.peer
            .upgrade()
            .is_some_and(|peer| SockRef::from(&*peer).peek(&mut [MaybeUninit::uninit()]).is_ok_and(|said| said > 0))
    }
}

impl Queue {
    fn append(&mut self, place: Arc<Place>) {
        place.number.store(self.next, Ordering::Relaxed);
        self.by_age.insert(self.next, place);
        self.next += 1;
    }
}

/// A connection's place in the [`Antechamber`]; dropping it gives the place back.
#[derive(Debug)]
pub struct Waiting {
    room: Arc<Antechamber>,
    place: Arc<Place>,
}

impl Antechamber {
    /// Room for `most` connections, at least one.
    #[must_use]
    pub fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most: most.max(1), waiting: Mutex::default() })
    }

    /// Takes a place, if need be from the one that has had it longest. Of a `peer` without a socket it is never known that it waits for us.
    #[must_use]
    pub fn enter(self: &Arc<Self>, peer: Weak<TcpStream>) -> Waiting {
        let place = Arc::new(Place { number: AtomicU64::new(0), peer, evicted: CancellationToken::new() });
        let mut queue = self.lock();
        for _ in 0..LOOKS {
            if queue.by_age.len() < self.most {
                break;
            }
            let patient = queue.by_age.len() < PATIENTLY * self.most;
            let Some((_, oldest)) = queue.by_age.pop_first() else { break };
            if patient && oldest.waits_for_us() {
                queue.append(oldest);
            } else {
                oldest.evicted.cancel();
            }
        }
        queue.append(Arc::clone(&place));
        drop(queue);
        Waiting { room: Arc::clone(self), place }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Every change under the lock is complete in itself.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    /// Ends when the place was given to another connection.
    pub fn evicted(&self) -> WaitForCancellationFutureOwned {
        self.place.evicted.clone().cancelled_owned()
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let mut queue = self.room.lock();
        // One that was evicted is not there, and nobody else has its number.
        queue.by_age.remove(&self.place.number.load(Ordering::Relaxed));
    }
}

/// What each peer holds of something of which there is a bounded number.
#[derive(Debug)]
pub struct Shares<K> {
    held: Mutex<HashMap<K, usize>>,
}

/// One of what a peer holds; dropping it gives it back.
#[derive(Debug)]
pub struct Share<K: Eq + Hash> {
    shares: Arc<Shares<K>>,
    peer: K,
}

impl<K: Eq + Hash + Clone> Shares<K> {
    /// Nobody holds anything.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::new(Self { held: Mutex::default() })
    }

    /// Gives one more to `peer`, unless it holds as many as are `free`: one peer alone gets half of all, and several as much each as
    /// they leave for the next.
    #[must_use]
    pub fn take(self: &Arc<Self>, peer: &K, free: usize) -> Option<Share<K>> {
        let mut held = self.lock();
        let count = held.entry(peer.clone()).or_default();
        if *count >= free.max(1) {
            return None;
        }
        *count += 1;
        Some(Share { shares: Arc::clone(self), peer: peer.clone() })
    }
}

impl<K: Eq + Hash> Shares<K> {
    fn lock(&self) -> MutexGuard<'_, HashMap<K, usize>> {
        // Every change under the lock is complete in itself.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Eq + Hash> Drop for Share<K> {
    fn drop(&mut self) {
        let mut held = self.shares.lock();
        if let Some(count) = held.get_mut(&self.peer) {
            *count -= 1;
            if *count == 0 {
                held.remove(&self.peer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[test]
    fn a_peer_gets_half_of_all_and_each_further_one_as_much_as_it_leaves() {
        let shares = Shares::new();
        let mut taken: Vec<Share<&str>> = Vec::new();
        for (peer, gets) in [("one", 60), ("other", 30), ("third", 15)] {
            while let Some(share) = shares.take(&peer, 120 - taken.len()) {
                taken.push(share);
            }
            assert_eq!(shares.lock()[peer], gets);
        }
        assert!(shares.take(&"one", 15).is_none());
        taken.truncate(60);
        drop(shares.take(&"other", 1).expect("the last goes to who has nothing"));
        taken.clear();
        assert!(shares.lock().is_empty());
    }

    fn silent(room: &Arc<Antechamber>) -> Waiting {
        room.enter(Weak::new())
    }

    #[test]
    fn the_oldest_goes_when_there_is_no_room() {
        let room = Antechamber::new(2);
        let (first, second) = (silent(&room), silent(&room));
        assert!(!first.place.evicted.is_cancelled());
        let third = silent(&room);
        assert!(first.place.evicted.is_cancelled() && !second.place.evicted.is_cancelled());
        drop(second);
        let fourth = silent(&room);
        assert!(!third.place.evicted.is_cancelled() && !fourth.place.evicted.is_cancelled(), "a place that was left is free");
        drop((first, third, fourth));
        assert!(room.lock().by_age.is_empty());
    }

    #[tokio::test]
    async fn whoever_waits_for_us_does_not_go() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let (client, accepted) = tokio::join!(TcpStream::connect(listener.local_addr().expect("bound")), listener.accept());
        let (client, server) = (client.expect("a connection"), Arc::new(accepted.expect("a connection").0));
        let room = Antechamber::new(2);
        let spoke = room.enter(Arc::downgrade(&server));
        client.writable().await.expect("open");
        client.try_write(b"hello").expect("room for it");
        server.readable().await.expect("open");
        let second = silent(&room);
        let third = silent(&room);
        assert!(second.place.evicted.is_cancelled() && !spoke.place.evicted.is_cancelled());
        drop((second, third));
        assert_eq!(room.lock().by_age.len(), 1, "its place is found where it is by now");

        let mut all: Vec<_> = (0..7).map(|_| room.enter(Arc::downgrade(&server))).collect();
        assert!(all.iter().all(|waiting| !waiting.place.evicted.is_cancelled()), "none is to blame");
        all.extend([spoke, room.enter(Arc::downgrade(&server))]);
        let evicted = || all.iter().filter(|waiting| waiting.place.evicted.is_cancelled()).count();
        assert_eq!(evicted(), 1, "there is an end to it");
        server.try_read(&mut [0; 5]).expect("it has come");
        let _last = room.enter(Arc::downgrade(&server));
        assert_eq!(evicted(), 8, "what was read counts no more");
    }
}
