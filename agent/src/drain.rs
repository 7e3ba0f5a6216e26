//! Graceful stop: the signal, the wait for open connections, and the end of those that don't end in time.
//!
//! Enters: SIGTERM or SIGINT ([`Drain::on_signal`]) or a call ([`Drain::start`]), and a [`DrainGuard`] for each connection. Leaves:
//! first "take nothing new" ([`Drain::started`]), then, past the deadline or on a second signal, "end now"
//! ([`DrainGuard::forced`]). The process may end when [`Drain::finish`] returns.

use std::io;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

/// What forced connections get to write their last words: a reset, an access-log line.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// The stop of one agent. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Drain {
    started: CancellationToken,
    forced: CancellationToken,
    connections: TaskTracker,
}

/// Held by a connection while it is open.
#[derive(Debug)]
pub struct DrainGuard {
    started: CancellationToken,
    forced: CancellationToken,
    _open: TaskTrackerToken,
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
        self.forced.cancel();
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

    /// The token of "end now", for what takes a token.
    #[must_use]
    pub fn forced_token(&self) -> &CancellationToken {
        &self.forced
    }

    /// The token of "take nothing new", for what takes a token.
    #[must_use]
    pub fn token(&self) -> &CancellationToken {
        &self.started
    }

    /// Counts a connection as open until the guard is dropped.
    #[must_use = "the connection is waited for only while this is held"]
    pub fn guard(&self) -> DrainGuard {
        DrainGuard { started: self.started.clone(), forced: self.forced.clone(), _open: self.connections.token() }
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
}

impl DrainGuard {
    /// Waits until the stop has begun: a connection that can end in order may do so.
    pub async fn started(&self) {
        self.started.cancelled().await;
    }

    /// Waits until the connection must end.
    pub async fn forced(&self) {
        self.forced.cancelled().await;
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
        let guard = drain.guard();
        let connection = tokio::spawn(async move {
            guard.started().await;
            tokio::time::sleep(Duration::from_secs(5)).await;
        });
        assert_eq!(drain.finish(LONG).await, Drained::Clean);
        connection.await.expect("no panic");
        assert_eq!(drain.open(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn connections_are_forced_at_the_deadline_and_not_before() {
        let drain = Drain::new();
        let guard = drain.guard();
        let began = tokio::time::Instant::now();
        let connection = tokio::spawn(async move {
            guard.forced().await;
            began.elapsed()
        });
        assert_eq!(drain.finish(Duration::from_secs(10)).await, Drained::Forced(1));
        let forced_after = connection.await.expect("no panic");
        assert!((Duration::from_secs(10)..Duration::from_secs(11)).contains(&forced_after), "{forced_after:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_ignores_the_end_does_not_hold_up_the_stop() {
        let drain = Drain::new();
        let _guard = drain.guard();
        assert_eq!(drain.finish(Duration::from_secs(1)).await, Drained::Forced(1));
    }

    #[tokio::test]
    async fn the_first_signal_starts_and_the_second_forces() {
        let drain = Drain::new();
        let guard = drain.guard();
        let watcher = tokio::spawn(drain.clone().on_signal(StopSignals::install().expect("handlers")));
        let raise = || nix::sys::signal::raise(nix::sys::signal::Signal::SIGTERM).expect("a signal");
        raise();
        drain.started().await;
        assert!(!drain.forced.is_cancelled());
        raise();
        guard.forced().await;
        watcher.await.expect("no panic");
        assert_eq!(drain.finish(LONG).await, Drained::Forced(1));
    }
}
