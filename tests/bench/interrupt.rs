//! The wish to stop, from the terminal or from whoever started this. It is a mark that every loop looks at, so that there is one way
//! out of the benchmark and it cleans up.

use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::signal_name;

static WANTED: AtomicBool = AtomicBool::new(false);
/// The program that is being waited for; 0 without one.
static RUNNING: AtomicI32 = AtomicI32::new(0);

/// Takes over the signals that ask a program to end. Programs that are started have them as they were: a mask they would inherit.
pub(crate) fn listen() -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("taking over the signals")?;
    std::thread::spawn(move || {
        for signal in signals.forever() {
            eprintln!("\n{}: cleaning up", signal_name(signal).unwrap_or("a signal"));
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
