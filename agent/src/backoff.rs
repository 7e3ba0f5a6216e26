//! How long to wait before trying again: doubling, bounded and with jitter, so that a fleet does not return in step.

use std::time::Duration;

use rand::Rng;

/// A series of waits. Each is between half and all of a step that doubles from `least` to `most`.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    least: Duration,
    most: Duration,
    step: Duration,
}

impl Backoff {
    /// A series that starts at `least` and ends at `most`.
    #[must_use]
    pub fn new(least: Duration, most: Duration) -> Self {
        Self { least, most, step: least }
    }

    /// The next wait.
    pub fn next_wait(&mut self) -> Duration {
        let step = self.step.min(self.most);
        self.step = (step * 2).min(self.most);
        step.mul_f64(rand::rng().random_range(0.5..=1.0))
    }

    /// Starts the series anew, after a success.
    pub fn reset(&mut self) {
        self.step = self.least;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_bound_and_start_anew_after_a_reset() {
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(1));
        for step in [200, 400, 800, 1000, 1000] {
            let wait = backoff.next_wait();
            assert!(wait >= Duration::from_millis(step / 2) && wait <= Duration::from_millis(step), "{wait:?} at {step}");
        }
        backoff.reset();
        assert!(backoff.next_wait() <= Duration::from_millis(200));
    }
}
