//! The wish to stop, from the terminal or from whoever started this. It is a mark that every loop looks at, so that there is one way
//! out of the benchmark and it cleans up.

use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, pthread_sigmask};
use nix::unistd::Pid;

static WANTED: AtomicBool = AtomicBool::new(false);
/// The program that is being waited for; 0 without one.
static RUNNING: AtomicI32 = AtomicI32::new(0);

/// Takes over the signals that ask a program to end. Call it before any thread is started.
pub(crate) fn listen() -> Result<()> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        signals.add(signal);
    }
    // Threads inherit the mask; programs that are started do not.
    pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&signals), None).context("blocking signals")?;
    std::thread::spawn(move || {
        while let Ok(signal) = signals.wait() {
            eprintln!("\n{signal}: cleaning up");
            WANTED.store(true, Ordering::SeqCst);
            let running = RUNNING.load(Ordering::SeqCst);
            if running > 0 {
                // It may have ended by itself just now.
                let _gone = kill(Pid::from_raw(running), Signal::SIGKILL);
            }
        }
    });
    Ok(())
}

/// Whether somebody wants an end.
pub(crate) fn wanted() -> bool {
    WANTED.load(Ordering::Relaxed)
}

/// An error when somebody wants an end.
pub(crate) fn check() -> Result<()> {
    if wanted() { bail!("interrupted") } else { Ok(()) }
}

/// Says which program is being waited for, so that it ends when an end is wanted.
pub(crate) fn waiting_for(program: Option<u32>) {
    RUNNING.store(program.and_then(|pid| i32::try_from(pid).ok()).unwrap_or_default(), Ordering::SeqCst);
}
