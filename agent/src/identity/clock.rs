//! The wall clock, as a trait so that tests can let certificates age without waiting.

use std::time::SystemTime;

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Tells the time of day. Waiting is tokio's, so that a test's paused runtime moves both.
pub trait Clock: Send + Sync + 'static {
    /// The present time.
    fn now(&self) -> SystemTime;
}

/// The machine's clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> SystemTime {
        SystemTime::now()
    }
}

/// `time` as people read it: RFC 3339, in UTC, whole seconds.
#[must_use]
pub fn readable(time: SystemTime) -> String {
    let time = OffsetDateTime::from(time).replace_nanosecond(0);
    match time.map(|time| time.format(&Rfc3339)) {
        Ok(Ok(text)) => text,
        _ => "a time beyond the calendar".to_owned(),
    }
}

/// A clock that moves with tokio's, paused or not, from a moment that the test chooses.
#[cfg(test)]
#[derive(Debug)]
pub(crate) struct TestClock {
    base: SystemTime,
    start: tokio::time::Instant,
}

#[cfg(test)]
impl TestClock {
    pub(crate) fn starting_at(base: SystemTime) -> Self {
        Self { base, start: tokio::time::Instant::now() }
    }
}

#[cfg(test)]
impl Clock for TestClock {
    fn now(&self) -> SystemTime {
        self.base + self.start.elapsed()
    }
}
