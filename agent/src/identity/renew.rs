//! When SVIDs are asked for: at once when leased, again at half their life, and with growing patience after failures.
//!
//! Enters: the store's entries and the time. Leaves: attempts, at most [`IN_FLIGHT`] at a time, those that somebody waits for
//! first and the latest of these before the others; and reports, long before an SVID expires, that it is not being renewed.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use rand::Rng;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::SvidError;
use super::bundle::BundleError;
use super::clock::readable;
use super::request::{IssueError, Issuer, obtain};
use super::store::{Entry, RETRY_LEAST, RETRY_MOST, Reported, Shared};
use super::svid::Svid;
use crate::model::SpiffeId;

/// The most requests that are under way at one time.
const IN_FLIGHT: usize = 16;
/// The longest sleep, so that a clock that was set, or a machine that slept, is noticed.
const SLEEP_MOST: Duration = Duration::from_secs(30);
/// How often the root file is read when nothing else calls for it.
const ROOTS_INTERVAL: Duration = Duration::from_secs(10);
/// The longest wait between attempts while somebody waits for the SVID.
const WAITED_FOR_MOST: Duration = Duration::from_secs(1);
/// The failures to get a first SVID that are not worth a warning: the controller may hear of a new pod a moment after its agent.
const FIRST_PATIENCE: u32 = 4;
/// How long an attempt may take, whatever the issuer does.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(15);

/// Renews the store's SVIDs until `stop`.
pub(super) async fn run(shared: Arc<Shared>, issuer: Arc<dyn Issuer>, root_cert: PathBuf, stop: CancellationToken) {
    let mut roots = RootFile { path: root_cert, complaint: None };
    let mut attempts = FuturesUnordered::new();
    let mut roots_timer = tokio::time::interval(ROOTS_INTERVAL);
    roots_timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let (started, sleep) = plan(&shared, IN_FLIGHT - attempts.len());
        attempts.extend(started.into_iter().map(|id| attempt(&shared, &*issuer, id)));
        tokio::select! {
            () = stop.cancelled() => return,
            () = shared.wake.notified() => {}
            () = tokio::time::sleep(sleep) => {}
            _ = roots_timer.tick() => roots.read(&shared).await,
            Some((id, result)) = attempts.next(), if !attempts.is_empty() => {
                let renewed = result.is_ok();
                conclude(&shared, &id, result);
                if renewed {
                    roots.read(&shared).await;
                }
            }
        }
    }
}

/// Chooses up to `free` identities to ask for now, marks them, reports what is overdue, and says how long nothing else is due.
fn plan(shared: &Shared, free: usize) -> (Vec<SpiffeId>, Duration) {
    let now = shared.clock.now();
    let mut state = shared.state();
    let mut sleep = SLEEP_MOST;
    let mut due = Vec::new();
    for (id, entry) in &mut state.entries {
        entry.report(id, now);
        if let Some(milestone) = entry.next_report() {
            sleep = sleep.min(until(milestone, now));
        }
        match until(entry.next_attempt, now) {
            _ if entry.in_flight => {}
            Duration::ZERO => due.push((entry.waiting == 0, u64::MAX - entry.demand, entry.next_attempt, id.clone())),
            wait => sleep = sleep.min(wait),
        }
    }
    // Those not waited for go by their time alone: an old demand says nothing of them.
    due.sort_by_key(|(idle, demand, time, _)| (*idle, if *idle { 0 } else { *demand }, *time));
    let started: Vec<_> = due.into_iter().take(free).map(|(.., id)| id).collect();
    for id in &started {
        if let Some(entry) = state.entries.get_mut(id) {
            entry.in_flight = true;
            entry.last_attempt = Some(now);
        }
    }
    (started, sleep.max(Duration::from_millis(1)))
}

async fn attempt(shared: &Shared, issuer: &dyn Issuer, id: SpiffeId) -> (SpiffeId, Result<Svid, SvidError>) {
    let trusted = Arc::clone(&shared.bundle.borrow());
    let obtained = obtain(issuer, &id, &trusted, &*shared.clock);
    let result = tokio::time::timeout(ATTEMPT_TIMEOUT, obtained).await.unwrap_or_else(|_elapsed| {
        let cause = format!("no answer within {} s", ATTEMPT_TIMEOUT.as_secs()).into();
        Err(IssueError::Unreachable { cause }.into())
    });
    (id, result)
}

fn conclude(shared: &Shared, id: &SpiffeId, result: Result<Svid, SvidError>) {
    match result {
        Ok(svid) => {
            let next_attempt = renewal_of(&svid);
            debug!(%id, serial = svid.serial, not_after = readable(svid.not_after), "certificate obtained");
            shared.accept(svid, next_attempt);
        }
        Err(error) => {
            debug!(%id, %error, "no certificate");
            let now = shared.clock.now();
            if let Some(entry) = shared.state().entries.get_mut(id) {
                entry.failed(error, now);
                entry.report(id, now);
            }
        }
    }
}

/// Half of the life after its receipt, give or take a tenth of the life, so that a node's renewals spread.
fn renewal_of(svid: &Svid) -> SystemTime {
    svid.obtained + svid.life().mul_f64(rand::rng().random_range(0.4..=0.6))
}

impl Entry {
    fn failed(&mut self, error: SvidError, now: SystemTime) {
        self.in_flight = false;
        self.failures = self.failures.saturating_add(1);
        self.last_error = Some(error);
        // An eighth of the life: so that a short-lived SVID gets several attempts before it expires.
        let life = self.slot.load().as_ref().map_or(RETRY_MOST, |svid| svid.life() / 8);
        let bound = life.clamp(RETRY_LEAST, RETRY_MOST);
        let bound = if self.waiting > 0 { bound.min(WAITED_FOR_MOST) } else { bound };
        self.next_attempt = now + self.backoff.next_wait().min(bound);
    }

    /// The next moment at which a lack of success becomes worth a louder report.
    fn next_report(&self) -> Option<SystemTime> {
        let svid = self.slot.load();
        let svid = svid.as_ref()?;
        match self.reported {
            Reported::Nothing if self.failures > 0 => Some(svid.not_after - svid.life() / 4),
            Reported::Nothing | Reported::Warned => Some(svid.not_after),
            Reported::Expired => None,
        }
    }

    fn report(&mut self, id: &SpiffeId, now: SystemTime) {
        let cause = || self.last_error.as_ref().map_or_else(|| "no request was answered".to_owned(), ToString::to_string);
        let step = match self.slot.load().as_ref() {
            Some(svid) if svid.expired(now) => Reported::Expired,
            Some(svid) if self.failures > 0 && now >= svid.not_after - svid.life() / 4 => Reported::Warned,
            None if self.failures >= FIRST_PATIENCE => Reported::Warned,
            Some(_) | None => Reported::Nothing,
        };
        if step <= self.reported {
            return;
        }
        let not_after = self.slot.load().as_ref().map(|svid| readable(svid.not_after));
        match (step, not_after) {
            (Reported::Nothing, _) => {}
            (Reported::Warned, None) => warn!(%id, cause = cause(), "no certificate for a workload yet"),
            (Reported::Warned, Some(not_after)) => {
                warn!(%id, not_after, failures = self.failures, cause = cause(), "a certificate is close to its end and is not renewed");
            }
            (Reported::Expired, not_after) => {
                error!(%id, not_after, failures = self.failures, cause = cause(), "a certificate expired: its workload has no tunnels");
            }
        }
        self.reported = step;
    }
}

/// The file of roots, with what was last wrong with it.
struct RootFile {
    path: PathBuf,
    complaint: Option<String>,
}

impl RootFile {
    /// Takes the file's roots over. When it cannot, those from before stay, and it says so once.
    async fn read(&mut self, shared: &Shared) {
        match self.load(shared).await {
            Ok(changed) => {
                if changed || self.complaint.take().is_some() {
                    let fingerprint = Arc::clone(&shared.bundle.borrow().fingerprint);
                    info!(file = %self.path.display(), %fingerprint, "trusted roots read");
                }
            }
            Err(complaint) if self.complaint.as_ref() == Some(&complaint) => {}
            Err(complaint) => {
                warn!(file = %self.path.display(), cause = complaint, "the root file is unusable, the roots from before stay");
                self.complaint = Some(complaint);
            }
        }
    }

    async fn load(&self, shared: &Shared) -> Result<bool, String> {
        let path: &Path = &self.path;
        let pem = tokio::fs::read(path).await.map_err(|error| error.to_string())?;
        shared.take_file_roots(&pem).map_err(|error: BundleError| error.to_string())
    }
}

fn until(moment: SystemTime, now: SystemTime) -> Duration {
    moment.duration_since(now).unwrap_or_default()
}
