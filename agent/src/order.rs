//! The order of connections: whoever connects twice finds both in the server's queue in that order.
//!
//! Without a mesh TCP gives that for nothing, and programs rest on it: `iperf3 --bidir` tells by it which of its connections goes which
//! way. With one, a client is connected as soon as its own agent has taken the connection, and what carries the two is not one queue. So
//! the source's side sends them off in order, and says of each whether the one before it to the same destination is still on its way
//! ([`Departures`]); the destination's side delivers it after that one ([`Arrivals`]). Nobody waits for a round trip, nor for long: one that
//! is held up for 2 s is overtaken. Between a service's endpoints there is no order, as there is none without a mesh.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher as _, RandomState};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{SetOnce, oneshot};
use tokio::time::{Instant, timeout, timeout_at};

/// How long a connection waits for the one before it to be sent, and then to arrive: it may have been lost on its way. A server with a full
/// queue answers the second SYN, a second later.
const PATIENCE: Duration = Duration::from_secs(2);
/// Of how many connections it is known at the most that they have arrived, twice over: for as long as a successor may still come that names
/// one of them, and not for so long that its port is used again.
const REMEMBERED: usize = 32_768;
/// After how many connections without a pause it counts as one that others have come since.
const TRAIN: u32 = 64;

/// The connections that are on their way, by the source's address and by what was dialled.
#[derive(Debug, Default)]
pub struct Departures(Mutex<HashMap<(IpAddr, SocketAddr), Arc<Departure>>>);

/// A connection's place among those on their way; given up when dropped.
#[derive(Debug)]
pub struct Turn {
    departures: Arc<Departures>,
    key: (IpAddr, SocketAddr),
    own: Arc<Departure>,
    before: Option<Arc<Departure>>,
    waited: AtomicBool,
}

#[derive(Debug)]
struct Departure {
    source_port: u16,
    /// How many came before it without a pause.
    followed: u32,
    /// When it came.
    since: Instant,
    /// Where it leads; none when nobody has to arrive there after it.
    target: SetOnce<Option<SocketAddr>>,
    /// It has been sent off, or never will be.
    sent: SetOnce<()>,
    over: AtomicBool,
}

impl Departures {
    /// The place of a connection behind those that have been entered before. To be called in the order in which connections came.
    #[must_use]
    pub fn enter(self: &Arc<Self>, source: SocketAddr, dialled: SocketAddr) -> Turn {
        let key = (source.ip(), dialled);
        let mut departures = self.lock();
        let followed = departures.get(&key).map_or(0, |before| before.followed + 1);
        let (target, sent, over) = (SetOnce::new(), SetOnce::new(), AtomicBool::new(false));
        let (source_port, since) = (source.port(), Instant::now());
        let own = Arc::new(Departure { source_port, followed, since, target, sent, over });
        let before = departures.insert(key, Arc::clone(&own));
        drop(departures);
        Turn { departures: Arc::clone(self), key, own, before, waited: AtomicBool::new(false) }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(IpAddr, SocketAddr), Arc<Departure>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Turn {
    /// Says where the connection leads, as soon as that is known: others there wait for it. None, and nobody does.
    pub fn leads_to(&self, target: Option<SocketAddr>) {
        let _said_once = self.own.target.set(target);
    }

    /// Waits until the connection may be sent off: the one before it has been, if that leads to the same. Waits no more than once.
    pub async fn ready(&self) {
        if let Some(before) = &self.before
            && !self.waited.swap(true, Ordering::Relaxed)
        {
            let sent = async {
                if self.leads_where(before.target.wait().await) {
                    before.sent.wait().await;
                }
            };
            let _held_up = timeout_at(before.since + PATIENCE, sent).await;
        }
    }

    /// Notes that the connection is sent off now, and gives the source port of the one before it, if that is still on its way.
    #[must_use]
    pub fn depart(&self) -> Option<u16> {
        let _sent_again = self.own.sent.set(());
        let before = self.before.as_ref().filter(|before| before.sent.initialized() && !before.is_over())?;
        let follows = before.target.get().is_some_and(|target| self.leads_where(target));
        // A client may use a port again before the connection that had it is open.
        (follows && before.source_port != self.own.source_port).then_some(before.source_port)
    }

    fn leads_where(&self, another: &Option<SocketAddr>) -> bool {
        another.is_some() && self.own.target.get() == Some(another)
    }

    /// Whether no other has come since that dialled the same, or so many that there may never be a pause.
    #[must_use]
    pub fn is_last(&self) -> bool {
        let departures = self.departures.lock();
        self.own.followed >= TRAIN || departures.get(&self.key).is_some_and(|last| Arc::ptr_eq(last, &self.own))
    }
}

impl Departure {
    /// Whether nobody has to come after it any more.
    fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire) || self.since.elapsed() >= PATIENCE
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.own.over.store(true, Ordering::Release);
        let _unless_said = (self.own.target.set(None), self.own.sent.set(()));
        let mut departures = self.departures.lock();
        if departures.get(&self.key).is_some_and(|last| Arc::ptr_eq(last, &self.own)) {
            // Whoever comes next is behind the one before, which may be on its way yet.
            match self.before.take().filter(|before| !before.is_over()) {
                Some(before) => departures.insert(self.key, before),
                None => departures.remove(&self.key),
            };
        }
    }
}

/// The connections that have arrived of late, and those that are waited for.
#[derive(Debug)]
pub struct Arrivals {
    hasher: RandomState,
    known: Mutex<Known>,
}

/// A connection that is arriving; it has when this is dropped, delivered or refused.
#[derive(Debug)]
pub struct Arrival<'a> {
    arrivals: &'a Arrivals,
    source: SocketAddr,
    destination: SocketAddr,
    connection: u64,
}

/// By the hash of source and destination.
#[derive(Debug)]
struct Known {
    young: HashSet<u64>,
    old: HashSet<u64>,
    /// When the first of the young ones arrived, or before.
    since: Instant,
    /// Who waits for a connection: of several the latest.
    awaited: HashMap<u64, oneshot::Sender<()>>,
}

impl Default for Arrivals {
    fn default() -> Self {
        let known = Known { young: HashSet::new(), old: HashSet::new(), since: Instant::now(), awaited: HashMap::new() };
        Self { hasher: RandomState::new(), known: Mutex::new(known) }
    }
}

impl Arrivals {
    /// A connection that arrives now.
    #[must_use]
    pub fn arriving(&self, source: SocketAddr, destination: SocketAddr) -> Arrival<'_> {
        let connection = self.hasher.hash_one((source, destination));
        self.lock().forget(connection);
        Arrival { arrivals: self, source, destination, connection }
    }

    async fn wait(&self, connection: u64) {
        let arrived = {
            let mut known = self.lock();
            if known.has(connection) {
                return;
            }
            let (tell, arrived) = oneshot::channel();
            known.awaited.insert(connection, tell);
            arrived
        };
        let mut waiting = Waiting { arrivals: self, connection, arrived };
        let _lost_on_its_way = timeout(PATIENCE, &mut waiting.arrived).await;
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    /// The port is used again.
    fn forget(&mut self, connection: u64) {
        self.young.remove(&connection);
        self.old.remove(&connection);
    }

    fn has(&mut self, connection: u64) -> bool {
        self.age();
        self.young.contains(&connection) || self.old.contains(&connection)
    }

    fn insert(&mut self, connection: u64) {
        self.age();
        self.young.insert(connection);
    }

    fn age(&mut self) {
        let now = Instant::now();
        let age = now.saturating_duration_since(self.since);
        if age >= PATIENCE || self.young.len() >= REMEMBERED {
            self.old = std::mem::take(&mut self.young);
            self.since = now;
        }
        if age >= 2 * PATIENCE {
            self.old = HashSet::new();
        }
    }
}

impl Arrival<'_> {
    /// Waits for the connection from the same address and the source port `after`, if one is given.
    pub async fn after(&self, after: Option<u16>) {
        if let Some(port) = after {
            let before = (SocketAddr::new(self.source.ip(), port), self.destination);
            self.arrivals.wait(self.arrivals.hasher.hash_one(before)).await;
        }
    }
}

impl Drop for Arrival<'_> {
    fn drop(&mut self) {
        let mut known = self.arrivals.lock();
        known.insert(self.connection);
        if let Some(tell) = known.awaited.remove(&self.connection) {
            let _gone_meanwhile = tell.send(());
        }
    }
}

/// Somebody who waits for a connection, until dropped.
struct Waiting<'a> {
    arrivals: &'a Arrivals,
    connection: u64,
    arrived: oneshot::Receiver<()>,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.arrived.close();
        let mut known = self.arrivals.lock();
        if known.awaited.get(&self.connection).is_some_and(oneshot::Sender::is_closed) {
            known.awaited.remove(&self.connection);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::*;

    fn client(port: u16) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, 1], port))
    }

    fn server() -> SocketAddr {
        SocketAddr::from(([10, 0, 0, 2], 80))
    }

    /// Sends a connection off, and gives which it follows; none when it has to wait.
    fn sent(turn: &Turn) -> Option<Option<u16>> {
        now(turn.ready()).map(|()| turn.depart())
    }

    fn now<T>(future: impl Future<Output = T>) -> Option<T> {
        match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(value) => Some(value),
            Poll::Pending => None,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_is_behind_the_one_that_came_before_it_for_as_long_as_that_is_on_its_way() {
        let departures = Arc::<Departures>::default();
        let [first, second, third] = [1, 2, 3].map(|port| departures.enter(client(port), server()));
        let elsewhere = departures.enter(client(4), "10.0.0.2:81".parse().unwrap());
        let another = departures.enter("10.0.0.9:4".parse().unwrap(), server());
        for turn in [&first, &second, &third, &elsewhere, &another] {
            turn.leads_to(Some(server()));
        }
        assert_eq!([&elsewhere, &another].map(sent), [Some(None); 2], "another destination, another source");
        {
            let mut waiting = pin!(second.ready());
            assert_eq!(now(waiting.as_mut()), None, "the first has not been sent");
            assert_eq!(sent(&first), Some(None));
            now(waiting).expect("the first has been sent");
        }
        assert_eq!((second.depart(), sent(&third)), (Some(1), Some(Some(2))));
        drop(first);
        assert_eq!([&second, &third].map(sent), [Some(None), Some(Some(2))], "sent once more");
        drop(third);
        let fifth = departures.enter(client(5), server());
        fifth.leads_to(Some(server()));
        assert_eq!(sent(&fifth), Some(Some(2)), "the last has arrived before the one before it");
        drop(second);
        assert_eq!(sent(&fifth), Some(None));
        drop((fifth, elsewhere, another));
        assert!(departures.lock().is_empty(), "nothing is kept");
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_one_that_leads_elsewhere() {
        let departures = Arc::<Departures>::default();
        let [first, second, third] = [1, 2, 3].map(|port| departures.enter(client(port), server()));
        second.leads_to(Some(server()));
        let mut waiting = pin!(second.ready());
        assert_eq!(now(waiting.as_mut()), None, "the first may lead to the same");
        first.leads_to(Some("10.0.0.3:80".parse().unwrap()));
        now(waiting).expect("the first leads elsewhere");
        assert_eq!(second.depart(), None);
        // Nor for one that is dropped before it has said anything, or that leads where nobody has to be after it.
        let [fourth, fifth] = [4, 5].map(|port| departures.enter(client(port), server()));
        drop(third);
        fourth.leads_to(Some(server()));
        assert_eq!(sent(&fourth), Some(None));
        let sixth = departures.enter(client(6), server());
        fifth.leads_to(None);
        sixth.leads_to(Some(server()));
        assert_eq!(sent(&sixth), Some(None));
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_is_held_up_is_overtaken_after_a_while() {
        let departures = Arc::<Departures>::default();
        let (started, silent) = (Instant::now(), departures.enter(client(1), server()));
        tokio::time::advance(PATIENCE / 2).await;
        let [second, third] = [2, 3].map(|port| departures.enter(client(port), server()));
        for turn in [&second, &third] {
            turn.leads_to(Some(server()));
        }
        second.ready().await;
        assert_eq!(started.elapsed().as_secs(), PATIENCE.as_secs());
        assert_eq!((second.depart(), sent(&third)), (None, Some(Some(2))));
        now(second.ready()).expect("waits no second time");
        drop((second, third));
        let fourth = departures.enter(client(4), server());
        fourth.leads_to(Some(server()));
        assert_eq!(sent(&fourth), Some(None), "nobody else waits for the silent one");
        drop(silent);
    }

    #[test]
    fn the_last_is_the_last_unless_there_is_no_end_to_them() {
        let departures = Arc::<Departures>::default();
        let [first, second] = [1, 2].map(|port| departures.enter(client(port), server()));
        assert_eq!([&first, &second].map(Turn::is_last), [false, true]);
        drop(second);
        assert!(first.is_last(), "the other is not on its way any more");
        drop(first);
        let many: Vec<_> = (0..=TRAIN).map(|port| departures.enter(client(port as u16), server())).collect();
        assert!(!many[0].is_last() && !many[TRAIN as usize - 1].is_last());
        let _one_more = departures.enter(client(9), server());
        assert!(many[TRAIN as usize].is_last());
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_arrives_after_the_one_before_it_in_whatever_order_they_come() {
        let arrivals = Arrivals::default();
        let [first, second, third] = [1, 2, 3].map(|port| arrivals.arriving(client(port), server()));
        let mut waiting = pin!(second.after(Some(1)));
        assert!(now(waiting.as_mut()).is_none(), "the first is not there");
        now(third.after(None)).expect("waits for nobody");
        drop(first);
        now(waiting).expect("the first is there");
        now(third.after(Some(1))).expect("the first has been there");
        // The port is used again.
        let again = arrivals.arriving(client(1), server());
        assert!(now(third.after(Some(1))).is_none());
        drop(again);
        assert!(arrivals.lock().awaited.is_empty(), "who has gone waits no more");
        // Long after, nobody is remembered whose port may be another's by now.
        tokio::time::advance(2 * PATIENCE).await;
        assert!(now(third.after(Some(1))).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_is_lost_is_not_waited_for_any_longer_and_by_one_alone() {
        let (arrivals, started) = (Arrivals::default(), Instant::now());
        let [second, third] = [2, 3].map(|port| arrivals.arriving(client(port), server()));
        let mut waiting = pin!(second.after(Some(1)));
        assert!(now(waiting.as_mut()).is_none());
        assert!(now(third.after(Some(1))).is_none() && now(waiting).is_some(), "a newer one has taken its place");
        assert!(arrivals.lock().awaited.is_empty());
        third.after(Some(1)).await;
        assert_eq!(started.elapsed().as_secs(), PATIENCE.as_secs());
        assert!(arrivals.lock().awaited.is_empty());
        drop(third);
        now(arrivals.arriving(client(4), server()).after(Some(3))).expect("has arrived late, but has");
    }

    #[tokio::test(start_paused = true)]
    async fn memory_is_bounded_and_the_latest_are_remembered() {
        let arrivals = Arrivals::default();
        let address = |number: usize| SocketAddr::from(([10, 0, 0, (number >> 15) as u8], (number & 0x7fff) as u16));
        (0..3 * REMEMBERED).for_each(|number| drop(arrivals.arriving(address(number), server())));
        let [young, old] = {
            let known = arrivals.lock();
            [known.young.len(), known.old.len()]
        };
        assert!(young <= REMEMBERED && old <= REMEMBERED, "{young} and {old}");
        for number in [2 * REMEMBERED, 3 * REMEMBERED - 1] {
            let last = address(number);
            now(arrivals.arriving(SocketAddr::new(last.ip(), 0x8000), server()).after(Some(last.port()))).expect("is remembered");
        }
    }
}
