//! The addresses of network namespaces, and who has which.
//!
//! Enters: what the kernel tells of changes in each namespace. Leaves: the namespace's set of addresses, and the namespaces that hold each.

use std::collections::BTreeSet;
use std::net::IpAddr;

use tokio::io::Interest;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::{Enroller, Message};
use crate::capture::netns::AddressWatch;
use crate::capture::readiness;

/// Tells of changes of a namespace's addresses until it is stopped.
pub(super) fn watch(cookie: u64, watch: AddressWatch, messages: mpsc::Sender<Message>) -> AbortHandle {
    let follow = async move {
        let watch = readiness::register(watch, Interest::READABLE)?;
        loop {
            watch.readable().await?.clear_ready();
            watch.get_ref().drain();
            let addresses = watch.get_ref().addresses()?;
            if messages.send(Message::Addresses { cookie, addresses }).await.is_err() {
                return Ok::<(), std::io::Error>(());
            }
        }
    };
    let task = tokio::spawn(async move {
        if let Err(error) = follow.await {
            tracing::warn!(%error, cookie, "cannot follow a network namespace's addresses any more: what changes there is not seen");
        }
    });
    task.abort_handle()
}

impl Enroller {
    /// Notes a namespace's addresses.
    pub(super) fn set_addresses(&mut self, cookie: u64, addresses: BTreeSet<IpAddr>) {
        let Some(tracked) = self.tracked.get_mut(&cookie) else { return };
        for address in tracked.addresses.difference(&addresses) {
            if let Some(holders) = self.holders.get_mut(address) {
                holders.remove(&cookie);
                if holders.is_empty() {
                    self.holders.remove(address);
                }
            }
        }
        for address in &addresses {
            self.holders.entry(*address).or_default().insert(cookie);
        }
        tracked.unknown.retain(|address| addresses.contains(address));
        if tracked.addresses != addresses {
            tracked.settled = Instant::now();
        }
        tracked.addresses = addresses;
    }
}
