//! Tunnels in use and tunnels kept warm, by who speaks to whom.
//!
//! A tunnel belongs to one source workload under one certificate and to one destination workload, so that no stream ever travels
//! under another's identity. Looking one up costs the same however many there are. Which form a destination speaks is learnt from
//! the first tunnel to it; then streams of HBONE share tunnels, and streams of the single form get one each, used again after.

use std::collections::HashMap;
use std::future::Future;
use std::hash::Hash;
use std::io;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::{Notify, Semaphore};

use super::dial::Dialled;
use super::single::{Idle, Open, Unopened};
use super::stream::{Home, Stream};
use super::{Tunnel, TunnelError, hbone};
use crate::identity::clock::{Clock as _, SystemClock};
use crate::model::CloseReason;
use crate::relay::Broken;
use crate::relay::tcp::TcpSource;

/// How long a tunnel without streams is kept.
const IDLE: Duration = Duration::from_secs(90);
/// How many idle tunnels of the single form are kept for one key.
const IDLE_PER_KEY: usize = 256;
/// A tunnel that has carried a stream as recently as this is taken to be whole: a stream's first bytes need not wait for an answer.
const FRESH: Duration = Duration::from_secs(1);
/// How many tunnels are made at once for one key. A burst of connections waits for these, or for a tunnel that is given back: made all at
/// once, its tunnels would crowd out each other, and everybody else's, where the peer's agent keeps those that have not shown who they are.
const HANDSHAKES: usize = 64;
/// How many pooled tunnels are tried before a new one is made: each may have broken unseen.
const TRIES: usize = 4;

/// The tunnels of a node, by a key that says who speaks to whom. `S` is what the tunnels of one key are set up with, all of them alike.
#[derive(Debug)]
pub struct Pool<K, S> {
    slots: Mutex<HashMap<K, (Arc<Slot>, S)>>,
}

/// The tunnels of one key.
#[derive(Debug)]
pub(super) struct Slot {
    tunnels: Mutex<Tunnels>,
    /// Held while the first tunnel, or one more of HBONE, is being made: others wait for it rather than make one each. Never while a
    /// stream is being opened, which takes as long as its destination likes.
    dialling: tokio::sync::Mutex<()>,
    /// Room for tunnels of the single form that are being made.
    handshakes: Semaphore,
    /// A tunnel was given back.
    returned: Notify,
}

impl Default for Slot {
    fn default() -> Self {
        Self {
            tunnels: Mutex::default(),
            dialling: tokio::sync::Mutex::default(),
            handshakes: Semaphore::new(HANDSHAKES),
            returned: Notify::new(),
        }
    }
}

#[derive(Debug, Default)]
struct Tunnels {
    shared: Vec<Warm<Arc<hbone::Outbound>>>,
    idle: Vec<Warm<Idle>>,
    /// The destination spoke the single form last.
    single: bool,
    retired: bool,
}

#[derive(Debug)]
struct Warm<T> {
    tunnel: T,
    /// When the peer's certificate ends. No stream may be opened after that: the peer has to show one again.
    expires: SystemTime,
    last_used: Instant,
}

impl<T> Warm<T> {
    fn new(tunnel: T, expires: SystemTime) -> Self {
        Self { tunnel, expires, last_used: Instant::now() }
    }

    fn expired(&self) -> bool {
        SystemClock.now() >= self.expires
    }
}

impl<K: Eq + Hash + Clone, S: Clone> Pool<K, S> {
    /// No tunnels.
    #[must_use]
    pub fn new() -> Self {
        Self { slots: Mutex::new(HashMap::new()) }
    }

    /// Opens a stream, in a tunnel that is there or else in one that `dial` makes from what `setup` gave for the key's first. Before it is
    /// sent, `ready` is waited for; `wish` says what it is when it is. A pooled tunnel that turns out broken is replaced, as long as nothing
    /// of the application's may have been acted upon. What `first` has, the stream's bytes, goes along with the question where the tunnel
    /// is known to be whole and its peer to have accepted us; it stays in `first`, for the stream's sink to take when it first moves bytes
    /// from there.
    ///
    /// # Errors
    /// What `setup` and `dial` say, [`TunnelError::Refused`] or [`TunnelError::Lost`].
    pub async fn open<F, R>(
        &self,
        key: &K,
        (ready, wish): (impl Fn() -> R, impl Fn() -> Open),
        first: &mut TcpSource,
        setup: impl FnOnce() -> Result<S, TunnelError>,
        dial: impl Fn(S) -> F,
    ) -> Result<Stream, TunnelError>
    where
        F: Future<Output = Result<Dialled, TunnelError>>,
        R: Future<Output = ()>,
    {
        let (slot, setup) = self.slot(key, setup)?;
        let dial = || dial(setup.clone());
        // Whoever has to wait does so with empty hands, where there is a tunnel; while one is being made there is time for it.
        if slot.has_any() {
            ready().await;
        }
        for _ in 0..TRIES {
            let (tunnel, new) = match slot.usable() {
                Some(tunnel) => (tunnel, false),
                None => slot.wait_or_dial(&dial).await?,
            };
            ready().await;
            match slot.open_in(tunnel, &wish, first).await {
                Err(TunnelError::Broken(_) | TunnelError::Cut(_)) if !new => {}
                opened => return opened,
            }
        }
        let tunnel = {
            let _room = slot.handshakes.acquire().await;
            slot.make(&dial).await?
        };
        ready().await;
        slot.open_in(tunnel, &wish, first).await
    }

    fn slot(&self, key: &K, setup: impl FnOnce() -> Result<S, TunnelError>) -> Result<(Arc<Slot>, S), TunnelError> {
        let mut slots = lock(&self.slots);
        if let Some(found) = slots.get(key) {
            return Ok(found.clone());
        }
        let new = (Arc::<Slot>::default(), setup()?);
        slots.insert(key.clone(), new.clone());
        Ok(new)
    }

    /// Drops the tunnels that are broken, and those that have carried nothing for long. Streams that are open go on.
    pub fn sweep(&self, now: Instant) {
        lock(&self.slots).retain(|_, (slot, _)| {
            let mut tunnels = slot.lock();
            tunnels.shared.retain_mut(|warm| {
                if warm.tunnel.streams() > 0 {
                    warm.last_used = now;
                }
                !warm.expired() && !warm.tunnel.closed() && now.saturating_duration_since(warm.last_used) < IDLE
            });
            tunnels
                .idle
                .retain(|warm| !warm.expired() && now.saturating_duration_since(warm.last_used) < IDLE && warm.tunnel.quiet());
            // A slot that somebody holds is about to be filled.
            !tunnels.shared.is_empty() || !tunnels.idle.is_empty() || Arc::strong_count(slot) + Arc::weak_count(slot) > 1
        });
    }

    /// Forgets the tunnels whose key `retired` says so. Streams that are open go on until they end.
    pub fn retire(&self, retired: impl Fn(&K) -> bool) {
        lock(&self.slots).retain(|key, (slot, _)| {
            let keep = !retired(key);
            if !keep {
                let mut tunnels = slot.lock();
                tunnels.retired = true;
                tunnels.idle.clear();
            }
            keep
        });
    }

    /// How many tunnels there are that are shared or idle.
    #[must_use]
    pub fn len(&self) -> usize {
        let count = |(slot, _): &(Arc<Slot>, S)| {
            let tunnels = slot.lock();
            tunnels.shared.len() + tunnels.idle.len()
        };
        lock(&self.slots).values().map(count).sum()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<K: Eq + Hash + Clone, S: Clone> Default for Pool<K, S> {
    fn default() -> Self {
        Self::new()
    }
}

impl Slot {
    /// A tunnel that others have made meanwhile, or else a new one, and whether it is that.
    async fn wait_or_dial<F>(&self, dial: &impl Fn() -> F) -> Result<(Pooled, bool), TunnelError>
    where
        F: Future<Output = Result<Dialled, TunnelError>>,
    {
        // Whoever needs a tunnel of his own has nothing to wait for.
        if !self.lock().single {
            let _dialling = self.dialling.lock().await;
            if let Some(tunnel) = self.usable() {
                return Ok((tunnel, false));
            }
            if !self.lock().single {
                return Ok((self.make(dial).await?, true));
            }
        }
        let mut room = pin!(self.handshakes.acquire());
        loop {
            tokio::select! {
                biased;
                // The semaphore is never closed.
                _room = &mut room => {
                    return match self.usable() {
                        Some(tunnel) => Ok((tunnel, false)),
                        None => Ok((self.make(dial).await?, true)),
                    };
                }
                () = self.returned.notified() => if let Some(tunnel) = self.usable() {
                    return Ok((tunnel, false));
                },
            }
        }
    }

    /// A new tunnel, whatever there is.
    async fn make<F>(&self, dial: &impl Fn() -> F) -> Result<Pooled, TunnelError>
    where
        F: Future<Output = Result<Dialled, TunnelError>>,
    {
        self.add(Box::pin(dial()).await?)
    }

    /// Takes in a tunnel that has just been made, and picks it for a first stream. It is in nobody else's sight before that has its
    /// place.
    fn add(&self, Dialled { expires, tunnel }: Dialled) -> Result<Pooled, TunnelError> {
        let mut tunnels = self.lock();
        match tunnel {
            Tunnel::Single(idle) => {
                tunnels.single = true;
                Ok(Pooled::Idle { warm: Warm::new(idle, expires), new: true })
            }
            Tunnel::Hbone(tunnel) => {
                tunnels.single = false;
                // A peer that lets nobody open a stream, or has gone at once.
                let place = tunnel.place().ok_or(TunnelError::Refused { reason: CloseReason::TunnelFailed })?;
                let tunnel = Arc::new(tunnel);
                tunnels.shared.push(Warm::new(Arc::clone(&tunnel), expires));
                Ok(Pooled::Shared(tunnel, place))
            }
        }
    }

    async fn open_in(
        self: &Arc<Self>,
        tunnel: Pooled,
        wish: &impl Fn() -> Open,
        first: &mut TcpSource,
    ) -> Result<Stream, TunnelError> {
        match tunnel {
            Pooled::Idle { warm, new: false } if warm.expired() => {
                Err(TunnelError::Cut(io::Error::other("the peer's certificate has ended")))
            }
            Pooled::Idle { warm, new } => {
                let fresh = !new && warm.last_used.elapsed() < FRESH;
                if fresh && let Err(Broken(error)) = first.fill_at_once() {
                    self.put_back(warm);
                    return Err(TunnelError::Abandoned(error));
                }
                self.open_single(warm.tunnel, warm.expires, &wish(), if fresh { first.held() } else { &[] }).await
            }
            Pooled::Shared(tunnel, place) => Ok(Stream::Hbone(Box::new(tunnel.open(place, &wish()).await?))),
        }
    }

    async fn open_single(
        self: &Arc<Self>,
        idle: Idle,
        expires: SystemTime,
        open: &Open,
        first: &[u8],
    ) -> Result<Stream, TunnelError> {
        match idle.open(open, first).await {
            Ok(stream) => Ok(Stream::Single(stream, Home { slot: Arc::downgrade(self), expires })),
            Err(Unopened::Refused(reason, idle)) => {
                self.put(idle, expires);
                Err(TunnelError::Refused { reason })
            }
            Err(Unopened::Cut(error)) => Err(TunnelError::Cut(error)),
            Err(Unopened::Lost(error)) => Err(TunnelError::Lost(error)),
        }
    }

    /// Keeps a tunnel for the next stream.
    pub(super) fn put(&self, idle: Idle, expires: SystemTime) {
        self.put_back(Warm::new(idle, expires));
    }

    /// Keeps a tunnel that has carried nothing since it was picked.
    fn put_back(&self, warm: Warm<Idle>) {
        let mut tunnels = self.lock();
        if !tunnels.retired && tunnels.idle.len() < IDLE_PER_KEY {
            tunnels.idle.push(warm);
            drop(tunnels);
            self.returned.notify_one();
        }
    }

    /// Whether a tunnel is there.
    fn has_any(&self) -> bool {
        let tunnels = self.lock();
        !tunnels.idle.is_empty() || !tunnels.shared.is_empty()
    }

    /// A tunnel that is there, with a place in it for one stream more.
    fn usable(&self) -> Option<Pooled> {
        let mut tunnels = self.lock();
        // The one used last is the likeliest to be there still.
        while let Some(warm) = tunnels.idle.pop() {
            if !warm.expired() && warm.tunnel.quiet() {
                return Some(Pooled::Idle { warm, new: false });
            }
        }
        tunnels.shared.retain(|warm| !warm.expired() && !warm.tunnel.closed());
        // All streams get their places under this lock; that one ends meanwhile does no harm.
        let warm = tunnels.shared.iter_mut().min_by_key(|warm| warm.tunnel.streams())?;
        let place = warm.tunnel.place()?;
        warm.last_used = Instant::now();
        Some(Pooled::Shared(Arc::clone(&warm.tunnel), place))
    }

    fn lock(&self) -> MutexGuard<'_, Tunnels> {
        lock(&self.tunnels)
    }
}

enum Pooled {
    Idle { warm: Warm<Idle>, new: bool },
    Shared(Arc<hbone::Outbound>, hbone::Place),
}

/// A panic while the lock was held cannot have left the tables half changed: every change is one call.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
