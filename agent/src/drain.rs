//! Graceful stop: the signal, the wait for open connections, and the end of those that don't end in time.
//!
//! Enters: SIGTERM or SIGINT ([`Drain::on_signal`]) or a call ([`Drain::start`]), and every connection's task ([`Drain::spawn`]).
//! Leaves: first "take nothing new" ([`Drain::started`]); then, past the deadline or on a second signal, the tasks are dropped where
//! they stand, and with them their connections, which are reset. The process may end when [`Drain::finish`] returns.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::{AbortHandle, Id};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// What connections that are dropped get to write their last words: a reset, an access-log line.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// The stop of one agent. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Drain {
    started: CancellationToken,
    forced: CancellationToken,
    connections: TaskTracker,
    tasks: Arc<Mutex<HashMap<Id, AbortHandle>>>,
}

/// How a drain ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drained {
    /// Every connection ended by itself.
    Clean,
    /// This many connections were told to end at the deadline or by a second signal.
    Forced(usize),
}

/// The signals that stop the agent.
#[derive(Debug)]
pub struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignals {
    /// Takes over SIGTERM and SIGINT; from now on they don't end the process by themselves.
    ///
    /// # Errors
    /// When the kernel refuses the handlers.
    pub fn install() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// Waits for one of the signals, and gives its name.
    ///
    /// # Cancel safety
    /// A signal that comes between two calls is kept for the next.
    pub async fn recv(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

impl Drain {
    /// A stop that has not begun.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Begins the stop at the first signal and forces it at the second. Runs until then: spawn it.
    pub async fn on_signal(self, mut signals: StopSignals) {
        let name = signals.recv().await;
        tracing::info!(signal = name, open = self.open(), "stopping");
        self.start();
        let name = signals.recv().await;
        tracing::warn!(signal = name, open = self.open(), "stopping at once");
        self.force();
    }

    /// Begins the stop: nothing new is taken.
    pub fn start(&self) {
        self.started.cancel();
    }

    /// Ends every open connection now.
    pub fn force(&self) {
        self.started.cancel();
        let tasks = self.lock();
        self.forced.cancel();
        tasks.values().for_each(AbortHandle::abort);
    }

    /// Waits until the stop has begun.
    pub async fn started(&self) {
        self.started.cancelled().await;
    }

    /// Whether the stop has begun.
    #[must_use]
    pub fn is_started(&self) -> bool {
        self.started.is_cancelled()
    }

    /// Runs a connection, which counts as open until `task` ends; `held` is kept until then, too. Forced, both are dropped.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static, held: impl Send + 'static) {
        // In a box, since a task would have room for it twice.
        let mut task = Box::pin(task);
        // Held until the task is entered: it may end before this function does.
        let mut tasks = self.lock();
        let drain = self.clone();
        let spawned = self.connections.spawn(async move {
            task.as_mut().await;
            drop((task, held));
            drain.lock().remove(&tokio::task::id());
        });
        if self.forced.is_cancelled() {
            spawned.abort();
        } else {
            tasks.insert(spawned.id(), spawned.abort_handle());
        }
    }

    /// How many connections are open.
    #[must_use]
    pub fn open(&self) -> usize {
        self.connections.len()
    }

    /// Begins the stop if it has not begun, waits for connections to end, and forces them after `timeout`. Returns when all guards
    /// are gone, or a second after those that remain were forced.
    pub async fn finish(&self, timeout: Duration) -> Drained {
        self.start();
        self.connections.close();
        tokio::select! {
            biased;
            () = self.connections.wait() => return Drained::Clean,
            () = self.forced.cancelled() => {}
            () = tokio::time::sleep(timeout) => {}
        }
        let left = self.open();
        self.force();
        if tokio::time::timeout(LAST_WORDS, self.connections.wait()).await.is_err() {
            tracing::warn!(open = self.open(), "connections did not end when they were told to");
        }
        if left == 0 { Drained::Clean } else { Drained::Forced(left) }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Id, AbortHandle>> {
        // Every change of the table is one call: a panic cannot leave it half changed.
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(3600);

    #[tokio::test(start_paused = true)]
    async fn a_stop_without_connections_ends_at_once() {
        let drain = Drain::new();
        assert_eq!(drain.finish(LONG).await, Drained::Clean);
        assert!(drain.is_started());
    }

    #[tokio::test(start_paused = true)]
    async fn a_stop_waits_for_connections_that_end_by_themselves() {
        let drain = Drain::new();
        let stop = drain.clone();
        let connection = async move {
            stop.started().await;
            tokio::time::sleep(Duration::from_secs(5)).await;
        };
        drain.spawn(connection, ());
        assert_eq!(drain.open(), 1);
        assert_eq!(drain.finish(LONG).await, Drained::Clean);
        assert_eq!((drain.open(), drain.lock().len()), (0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn connections_are_forced_at_the_deadline_and_not_before() {
        let drain = Drain::new();
        let began = tokio::time::Instant::now();
        let (dropped, mut heard) = tokio::sync::mpsc::channel::<()>(1);
        drain.spawn(std::future::pending(), dropped);
        assert_eq!(drain.finish(Duration::from_secs(10)).await, Drained::Forced(1));
        assert_eq!(heard.recv().await, None);
        assert!((Duration::from_secs(10)..Duration::from_secs(11)).contains(&began.elapsed()));
    }

    #[tokio::test]
    async fn a_connection_that_comes_after_the_end_is_dropped() {
        let drain = Drain::new();
        drain.force();
        drain.spawn(std::future::pending(), ());
        drain.finish(LONG).await;
        assert_eq!(drain.open(), 0);
    }

    #[tokio::test]
    async fn the_first_signal_starts_and_the_second_forces() {
        let drain = Drain::new();
        drain.spawn(std::future::pending(), ());
        let watcher = tokio::spawn(drain.clone().on_signal(StopSignals::install().expect("handlers")));
        let raise = || nix::sys::signal::raise(nix::sys::signal::Signal::SIGTERM).expect("a signal");
        raise();
        drain.started().await;
        assert!(!drain.forced.is_cancelled());
        raise();
        watcher.await.expect("no panic");
        drain.finish(LONG).await;
        assert_eq!(drain.open(), 0);
    }
}
