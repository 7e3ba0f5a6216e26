//! Lines on their way to the output: gathered where they are logged, written by a thread of their own, many at a time.
//!
//! The first line is written at once; while more come, the thread is woken once for all lines of [`GATHER`]. A busy agent ends
//! thousands of connections a second, and to wake a thread for each, and call the kernel for each, would cost more than to make the lines.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tracing_subscriber::fmt::MakeWriter;

/// How long lines are gathered that come soon after others were written.
const GATHER: Duration = Duration::from_millis(5);
/// How long the last lines may take.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Where lines are put. Clones are the same queue.
#[derive(Clone, Debug)]
pub(super) struct Lines(Arc<Shared>);

/// Keeps the writing thread. Dropping it writes out what waits, for a second at most.
#[derive(Debug)]
pub(super) struct Writing(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// The most bytes that wait.
    limit: usize,
    dropped: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    waiting: Vec<u8>,
    stopping: bool,
    stopped: bool,
}

/// A queue to `output`, in which at most `limit` bytes wait while `output` takes others. A line that finds no room is dropped and
/// counted; nobody is ever held up.
///
/// # Errors
/// When the system has no thread to give.
pub(super) fn queue(mut output: impl Write + Send + 'static, limit: usize) -> io::Result<(Lines, Writing)> {
    let shared = Arc::new(Shared { state: Mutex::default(), changed: Condvar::new(), limit, dropped: AtomicU64::new(0) });
    let writing = Arc::clone(&shared);
    std::thread::Builder::new().name("log".to_owned()).spawn(move || {
        let (mut taken, mut wait) = (Vec::new(), Instant::now());
        while writing.take(&mut taken, wait) {
            // There is nobody to tell.
            let _failed = output.write_all(&taken).and_then(|()| output.flush());
            wait = Instant::now() + GATHER;
        }
        writing.lock().stopped = true;
        writing.changed.notify_all();
    })?;
    Ok((Lines(Arc::clone(&shared)), Writing(shared)))
}

impl Lines {
    /// How many lines were dropped.
    pub(super) fn dropped(&self) -> u64 {
        self.0.dropped.load(Relaxed)
    }
}

impl Shared {
    /// Waits for lines, at least until `then`, and takes them all in place of those in `taken`; false when there will be no more.
    fn take(&self, taken: &mut Vec<u8>, then: Instant) -> bool {
        taken.clear();
        let nothing = |state: &mut State| state.waiting.is_empty() && !state.stopping;
        let state = self.changed.wait_while(self.lock(), nothing).unwrap_or_else(PoisonError::into_inner);
        let more = |state: &mut State| !state.stopping && state.waiting.len() < self.limit / 2;
        let left = then.saturating_duration_since(Instant::now());
        let waited = self.changed.wait_timeout_while(state, left, more).unwrap_or_else(PoisonError::into_inner);
        let mut state = waited.0;
        std::mem::swap(&mut state.waiting, taken);
        !taken.is_empty()
    }

    fn put(&self, line: &[u8]) {
        let mut state = self.lock();
        let (before, after) = (state.waiting.len(), state.waiting.len() + line.len());
        if after > self.limit {
            self.dropped.fetch_add(1, Relaxed);
            return;
        }
        state.waiting.extend_from_slice(line);
        drop(state);
        let half = self.limit / 2;
        if before == 0 || (before < half && after >= half) {
            self.changed.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change is one call: a panic cannot leave it half made.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = &'a Self;

    fn make_writer(&'a self) -> &'a Self {
        self
    }
}

/// Takes whole lines: one call, one line.
impl Write for &Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.put(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.stopping = true;
        self.0.changed.notify_all();
        let _timed = self.0.changed.wait_timeout_while(state, LAST_LINES, |state| !state.stopped);
    }
}
