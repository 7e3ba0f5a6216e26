//! The SVIDs of the node's workloads: who needs one, and which is current.
//!
//! Enters: leases on identities, and the checked answers of the renewal task. Leaves: current SVIDs, the trust bundle, and word of
//! changes. An SVID is fetched and renewed while a lease lives, kept until it expires when renewal fails, and never given out
//! after that.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwapOption;
use rustls_pki_types::CertificateDer;
use tokio::sync::{Notify, watch};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::TrustBundle;
use super::bundle::{BundleError, certificates_in};
use super::clock::{Clock, readable};
use super::renew;
use super::request::{IssueError, Issuer};
use super::svid::{Svid, SvidFault};
use crate::backoff::Backoff;
use crate::model::SpiffeId;

/// The wait after a first failure.
pub(super) const RETRY_LEAST: Duration = Duration::from_millis(200);
/// The longest wait after repeated failures.
pub(super) const RETRY_MOST: Duration = Duration::from_secs(30);

/// What a [`SvidStore`] needs to know.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// The file of roots to trust beside those that come with SVIDs; read again every 10 s and at each renewal.
    pub root_cert: PathBuf,
}

/// The node's SVIDs. Copies share the same state; renewal stops with the last of them.
#[derive(Clone)]
pub struct SvidStore {
    shared: Arc<Shared>,
    _renewal: Arc<DropGuard>,
}

/// Keeps the SVID of one identity fetched and renewed for as long as it lives.
pub struct SvidLease {
    shared: Arc<Shared>,
    id: SpiffeId,
    slot: Slot,
}

/// Why there is no SVID.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SvidError {
    /// The issuer gave none.
    #[error(transparent)]
    Issuer(#[from] IssueError),
    /// The issuer's answer is unusable.
    #[error("the controller's answer is unusable: {0}")]
    Unusable(Arc<SvidFault>),
    /// The key or the request for it could not be made.
    #[error("the key could not be made: {0}")]
    Key(Arc<str>),
    /// The last one expired and the issuer gave no new one.
    #[error("the certificate expired at {at} and was not renewed: {cause}")]
    Expired {
        /// When, RFC 3339.
        at: Arc<str>,
        /// Why there is no new one, in words.
        cause: Arc<str>,
    },
    /// The first request is not answered yet.
    #[error("no certificate within {} ms: the controller has not answered yet", waited.as_millis())]
    Pending {
        /// How long it was waited for.
        waited: Duration,
    },
}

/// One identity's state, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SvidStatus {
    /// The identity.
    pub id: SpiffeId,
    /// How many leases there are.
    pub leases: usize,
    /// The SVID's serial number, if there is one.
    pub serial: Option<String>,
    /// The SVID's first moment.
    pub not_before: Option<SystemTime>,
    /// The SVID's last moment. It may have passed.
    pub not_after: Option<SystemTime>,
    /// When the next attempt is due.
    pub next_attempt: SystemTime,
    /// How many attempts have failed since the last success.
    pub failures: u32,
    /// Why the last attempt failed, if it did.
    pub last_error: Option<String>,
}

type Slot = Arc<ArcSwapOption<Svid>>;

/// What the store and its renewal task share.
pub(super) struct Shared {
    state: Mutex<State>,
    pub(super) wake: Notify,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) bundle: watch::Sender<Arc<TrustBundle>>,
    generation: watch::Sender<u64>,
}

#[derive(Default)]
pub(super) struct State {
    pub(super) entries: BTreeMap<SpiffeId, Entry>,
    file_roots: Vec<CertificateDer<'static>>,
    demands: u64,
}

/// One identity that is leased.
pub(super) struct Entry {
    pub(super) slot: Slot,
    leases: usize,
    /// How many wait for it now.
    pub(super) waiting: usize,
    /// The larger, the later somebody began to wait for it.
    pub(super) demand: u64,
    pub(super) next_attempt: SystemTime,
    pub(super) last_attempt: Option<SystemTime>,
    pub(super) in_flight: bool,
    pub(super) backoff: Backoff,
    pub(super) failures: u32,
    pub(super) last_error: Option<SvidError>,
    /// How loudly the present lack of success has been reported.
    pub(super) reported: Reported,
}

/// The steps of reporting that an SVID is not renewed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Reported {
    Nothing,
    /// A quarter of the life is left, or there never was an SVID.
    Warned,
    Expired,
}

impl SvidStore {
    /// Starts the store, and on the present tokio runtime its renewal. The first bundle is that of the root file, if it can be
    /// read; until it can, it trusts nobody.
    #[must_use]
    pub fn start(config: StoreConfig, issuer: Arc<dyn Issuer>, clock: Arc<dyn Clock>) -> Self {
        let stop = CancellationToken::new();
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            wake: Notify::new(),
            clock,
            bundle: watch::Sender::new(Arc::new(TrustBundle::empty())),
            generation: watch::Sender::new(0),
        });
        if let Ok(pem) = std::fs::read(&config.root_cert) {
            // The renewal task reads the file again at once, and reports what is wrong with it.
            let _reported_later = shared.take_file_roots(&pem);
        }
        tokio::spawn(renew::run(Arc::clone(&shared), issuer, config.root_cert, stop.clone()));
        Self { shared, _renewal: Arc::new(stop.drop_guard()) }
    }

    /// Has the SVID of `id` fetched, and renewed for as long as the lease, or another on the same identity, lives.
    #[must_use]
    pub fn lease(&self, id: &SpiffeId) -> SvidLease {
        let now = self.shared.clock.now();
        let mut state = self.shared.state();
        let entry = state.entries.entry(id.clone()).or_insert_with(|| Entry::new(now));
        entry.leases += 1;
        let slot = Arc::clone(&entry.slot);
        drop(state);
        self.shared.wake.notify_one();
        SvidLease { shared: Arc::clone(&self.shared), id: id.clone(), slot }
    }

    /// The SVID of `id`, if it is leased, was fetched and has not expired.
    #[must_use]
    pub fn current(&self, id: &SpiffeId) -> Option<Arc<Svid>> {
        let slot = Arc::clone(&self.shared.state().entries.get(id)?.slot);
        current(&slot, &*self.shared.clock)
    }

    /// The SVID of `id` as soon as there is one, within `deadline`; those waited for are fetched before others. Leases it
    /// meanwhile.
    ///
    /// # Errors
    /// At the deadline, why there is none: what the last attempt met, or [`SvidError::Pending`] if none has ended.
    ///
    /// # Cancel safety
    /// Dropping the future loses nothing but the place in the queue.
    pub async fn wait(&self, id: &SpiffeId, deadline: Duration) -> Result<Arc<Svid>, SvidError> {
        self.lease(id).wait(deadline).await
    }

    /// The trust bundle and its changes.
    #[must_use]
    pub fn bundle(&self) -> watch::Receiver<Arc<TrustBundle>> {
        self.shared.bundle.subscribe()
    }

    /// The generation of the newest SVID; it changes with each SVID that is fetched or renewed. That one is dropped is told, too.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.shared.generation.subscribe()
    }

    /// Tries at once whatever waits for its next attempt after a failure. For when the controller is known to be back.
    pub fn retry(&self) {
        let now = self.shared.clock.now();
        for entry in self.shared.state().entries.values_mut().filter(|entry| entry.failures > 0) {
            entry.backoff.reset();
            entry.next_attempt = now;
        }
        self.shared.wake.notify_one();
    }

    /// All leased identities, in order.
    #[must_use]
    pub fn list(&self) -> Vec<SvidStatus> {
        self.shared.state().entries.iter().map(|(id, entry)| entry.status(id)).collect()
    }
}

impl SvidLease {
    /// The identity.
    #[must_use]
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// The SVID, if it was fetched and has not expired. Takes no lock.
    #[must_use]
    pub fn current(&self) -> Option<Arc<Svid>> {
        current(&self.slot, &*self.shared.clock)
    }

    /// The SVID as soon as there is one, within `deadline`; those waited for are fetched before others.
    ///
    /// # Errors
    /// As [`SvidStore::wait`].
    ///
    /// # Cancel safety
    /// As [`SvidStore::wait`].
    pub async fn wait(&self, deadline: Duration) -> Result<Arc<Svid>, SvidError> {
        if let Some(svid) = self.current() {
            return Ok(svid);
        }
        let mut changes = self.shared.generation.subscribe();
        let _waiting = Waiting::begin(&self.shared, &self.id);
        let arrival = async {
            loop {
                if let Some(svid) = self.current() {
                    return Some(svid);
                }
                changes.changed().await.ok()?;
            }
        };
        match tokio::time::timeout(deadline, arrival).await {
            Ok(Some(svid)) => Ok(svid),
            Ok(None) | Err(_) => Err(self.why_none(deadline)),
        }
    }

    fn why_none(&self, waited: Duration) -> SvidError {
        let last_error = self.shared.state().entries.get(&self.id).and_then(|entry| entry.last_error.clone());
        match (self.slot.load_full(), last_error) {
            (Some(expired), cause) => SvidError::Expired {
                at: readable(expired.not_after).into(),
                cause: cause.map_or_else(|| "no request was answered".into(), |cause| cause.to_string().into()),
            },
            (None, Some(error)) => error,
            (None, None) => SvidError::Pending { waited },
        }
    }
}

impl Drop for SvidLease {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        let Some(entry) = state.entries.get_mut(&self.id) else { return };
        entry.leases -= 1;
        if entry.leases == 0 {
            state.entries.remove(&self.id);
            self.shared.publish_bundle(&state);
            // The number stays: there is no newer one.
            self.shared.generation.send_modify(|_newest| ());
        }
    }
}

impl std::fmt::Debug for SvidStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SvidStore").finish_non_exhaustive()
    }
}

impl std::fmt::Debug for SvidLease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SvidLease").field("id", &self.id).finish_non_exhaustive()
    }
}

/// Somebody who waits for an SVID; counted, so that it is fetched first.
struct Waiting<'a> {
    shared: &'a Shared,
    id: &'a SpiffeId,
}

impl<'a> Waiting<'a> {
    fn begin(shared: &'a Shared, id: &'a SpiffeId) -> Self {
        let mut state = shared.state();
        state.demands += 1;
        let demand = state.demands;
        if let Some(entry) = state.entries.get_mut(id) {
            entry.waiting += 1;
            entry.demand = demand;
            entry.hasten();
        }
        drop(state);
        shared.wake.notify_one();
        Self { shared, id }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if let Some(entry) = self.shared.state().entries.get_mut(self.id) {
            entry.waiting -= 1;
        }
    }
}

impl Shared {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        // Every change under the lock is complete before anything that could panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes `svid` the current one of its identity, if it is still leased.
    pub(super) fn accept(&self, mut svid: Svid, next_attempt: SystemTime) {
        let mut state = self.state();
        let Some(entry) = state.entries.get_mut(&svid.id) else { return };
        let generation = *self.generation.borrow() + 1;
        svid.generation = generation;
        entry.slot.store(Some(Arc::new(svid)));
        entry.next_attempt = next_attempt;
        entry.succeeded();
        // The bundle goes first: whoever hears of the SVID already trusts its root.
        self.publish_bundle(&state);
        self.generation.send_replace(generation);
    }

    /// Takes over the roots of the root file. Says whether they changed the bundle.
    pub(super) fn take_file_roots(&self, pem: &[u8]) -> Result<bool, BundleError> {
        let roots = certificates_in(pem)?;
        TrustBundle::new(roots.iter().cloned())?;
        let mut state = self.state();
        state.file_roots = roots;
        Ok(self.publish_bundle(&state))
    }

    fn publish_bundle(&self, state: &State) -> bool {
        let held = state.entries.values().filter_map(|entry| entry.slot.load().as_ref().and_then(|svid| svid.root.clone()));
        let Ok(bundle) = TrustBundle::new(state.file_roots.iter().cloned().chain(held)) else {
            // Each root was checked when it was taken.
            return false;
        };
        self.bundle.send_if_modified(|current| {
            let changed = current.fingerprint != bundle.fingerprint;
            if changed {
                *current = Arc::new(bundle);
            }
            changed
        })
    }
}

impl Entry {
    fn new(now: SystemTime) -> Self {
        Self {
            slot: Slot::default(),
            leases: 0,
            waiting: 0,
            demand: 0,
            next_attempt: now,
            last_attempt: None,
            in_flight: false,
            backoff: Backoff::new(RETRY_LEAST, RETRY_MOST),
            failures: 0,
            last_error: None,
            reported: Reported::Nothing,
        }
    }

    /// Brings the next attempt forward for somebody who waits, but never to less than a second after the last.
    pub(super) fn hasten(&mut self) {
        if self.slot.load().is_none() || self.failures > 0 {
            let soonest = self.last_attempt.map_or(self.next_attempt, |last| last + Duration::from_secs(1));
            self.next_attempt = self.next_attempt.min(soonest);
        }
    }

    fn succeeded(&mut self) {
        self.in_flight = false;
        self.failures = 0;
        self.last_error = None;
        self.reported = Reported::Nothing;
        self.backoff.reset();
    }

    fn status(&self, id: &SpiffeId) -> SvidStatus {
        let svid = self.slot.load_full();
        SvidStatus {
            id: id.clone(),
            leases: self.leases,
            serial: svid.as_ref().map(|svid| svid.serial.clone()),
            not_before: svid.as_ref().map(|svid| svid.not_before),
            not_after: svid.as_ref().map(|svid| svid.not_after),
            next_attempt: self.next_attempt,
            failures: self.failures,
            last_error: self.last_error.as_ref().map(ToString::to_string),
        }
    }
}

fn current(slot: &Slot, clock: &dyn Clock) -> Option<Arc<Svid>> {
    slot.load_full().filter(|svid| !svid.expired(clock.now()))
}

#[cfg(test)]
mod tests;
