//! Calling a connection off from outside: cheap to look at whenever the connection moves, and heard while it waits.

use std::sync::OnceLock;
use std::task::{Context, Poll};

use futures_util::task::AtomicWaker;

use crate::model::CloseReason;

/// Calls a connection off, once, with a reason.
#[derive(Debug, Default)]
pub struct Cancel {
    reason: OnceLock<CloseReason>,
    waker: AtomicWaker,
}

impl Cancel {
    /// Ends the connection. The first reason stands: false when there was one before.
    pub fn cancel(&self, reason: CloseReason) -> bool {
        let first = self.reason.set(reason).is_ok();
        self.waker.wake();
        first
    }

    /// Why the connection must end, if it must. Only the connection's own task may ask.
    pub fn poll(&self, cx: &mut Context<'_>) -> Poll<CloseReason> {
        if let Some(reason) = self.reason.get() {
            return Poll::Ready(*reason);
        }
        self.waker.register(cx.waker());
        self.reason.get().map_or(Poll::Pending, |reason| Poll::Ready(*reason))
    }

    /// Why the connection must end, if it must.
    #[must_use]
    pub fn reason(&self) -> Option<CloseReason> {
        self.reason.get().copied()
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::sync::Arc;

    use super::*;

    #[tokio::test]
    async fn who_waits_hears_of_it_and_the_first_reason_stands() {
        let cancel = Arc::new(Cancel::default());
        let heard = Arc::clone(&cancel);
        let waiting = tokio::spawn(async move { poll_fn(|cx| heard.poll(cx)).await });
        tokio::task::yield_now().await;
        assert!(cancel.cancel(CloseReason::PolicyChanged));
        assert!(!cancel.cancel(CloseReason::Draining));
        assert_eq!(waiting.await.expect("no panic"), CloseReason::PolicyChanged);
    }
}
