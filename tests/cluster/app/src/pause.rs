//! A sandbox's first process: it holds the pod's namespaces, and waits for processes that others have left it.

use anyhow::Result;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

/// The signals that ask a container to end.
const END: [Signal; 2] = [Signal::SIGTERM, Signal::SIGINT];

/// Ends when it is told to.
pub(crate) fn run() -> Result<()> {
    let mut signals = blocked();
    signals.add(Signal::SIGCHLD);
    signals.thread_block()?;
    while signals.wait()? == Signal::SIGCHLD {
        while !matches!(waitpid(None, Some(WaitPidFlag::WNOHANG)), Ok(WaitStatus::StillAlive) | Err(_)) {}
    }
    Ok(())
}

/// Keeps the signals that ask for the end from this thread and those that it will start, so that somebody can wait for them: the kernel
/// drops a signal for the first process of a PID namespace that has no handler for it.
pub(crate) fn block_end() -> Result<SigSet> {
    let signals = blocked();
    signals.thread_block()?;
    Ok(signals)
}

fn blocked() -> SigSet {
    END.into_iter().collect()
}
