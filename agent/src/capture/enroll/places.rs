//! Namespaces as they appear and vanish: in the node's directory, elsewhere on the machine, or nowhere but in a process.
//!
//! Enters: news of the directory and the mount table, and processes that the programs refused. Leaves: jobs that open what is new,
//! and names that are gone. What is not in the directory is another's business: it is exempt as soon as it is seen.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use culvert_ebpf_common::Namespace;
use tokio::time::Instant;

use super::watch::{MountTable, News, Place};
use super::{AGENTS_READ, Enroller, FIRST_RETRY, Message, setup};
use crate::capture::Netns;
use crate::capture::netns::AddressWatch;
use crate::capture::others::Agents;

/// Namespaces that are mounted nowhere, of which the end cannot be told: so many are remembered.
const UNMOUNTED: usize = 4096;
/// So many namespaces of pods that are gone are remembered.
const LEFT: usize = 4096;

impl Enroller {
    /// The directory has news.
    pub(super) fn hear(&mut self, news: News) {
        match news {
            News::Name(name) => self.visit(name),
            News::All => self.look(),
        }
    }

    /// Looks at everything there is.
    pub(super) fn look(&mut self) {
        self.look_at = None;
        let begin = Instant::now();
        for (cookie, process) in self.reported.drain() {
            self.unresolved.insert(cookie, process);
        }
        if let Err(error) = self.directory.renew() {
            tracing::warn!(%error, dir = %self.config.netns_dir.display(), "cannot watch the directory of network namespaces");
        }
        match self.directory.places() {
            Ok(places) => {
                let gone: Vec<_> =
                    self.names.keys().chain(&self.unripe).filter(|name| !places.contains_key(*name)).cloned().collect();
                for name in gone {
                    self.settle(name, Place::Missing);
                }
                for (name, place) in places {
                    self.settle(name, place);
                }
            }
            Err(error) => {
                tracing::warn!(%error, dir = %self.config.netns_dir.display(), "cannot read the directory of network namespaces");
            }
        }
        self.read_agents();
        match MountTable::namespaces() {
            Ok(mounted) => self.look_elsewhere(mounted),
            Err(error) => tracing::warn!(%error, "cannot read the mount table"),
        }
        self.looked = Instant::now();
        self.look_took = self.looked - begin;
        self.catch_up();
    }

    pub(super) fn look_again(&mut self, after: Duration) {
        let at = Instant::now() + after;
        self.look_at = Some(self.look_at.map_or(at, |planned| planned.min(at)));
    }

    /// Learns of other agents on this kernel, unless that was done just now. Gives whether it was not.
    pub(super) fn read_agents(&mut self) -> bool {
        let due = self.agents_read.is_none_or(|read| read.elapsed() > AGENTS_READ);
        if due {
            self.agents_read = Some(Instant::now());
            self.agents = Agents::find(self.claimed_id);
        }
        due
    }

    /// Tells all other agents that a namespace is a pod of this node's, those too that have started since the last look.
    pub(super) fn claim_from_others(&mut self, cookie: u64) {
        self.read_agents();
        self.agents.claim(cookie);
    }

    /// Remembers the namespace of a pod that is gone.
    pub(super) fn leave(&mut self, cookie: u64) {
        self.left.push_back(cookie);
        if self.left.len() > LEFT {
            self.left.pop_front();
        }
    }

    /// The mount table has changed: names that had no namespace may have one now.
    pub(super) fn ripen(&mut self) {
        for name in self.unripe.clone() {
            self.visit(name);
        }
    }

    pub(super) fn visit(&mut self, name: OsString) {
        let place = self.directory.place(&name);
        self.settle(name, place);
    }

    /// Notes what is at a name.
    fn settle(&mut self, name: OsString, place: Place) {
        let before = self.names.get(&name).copied();
        // What could not be looked at is what it was.
        if before.is_some_and(|inode| place == Place::Namespace(inode) || place == Place::Unreadable) {
            return;
        }
        if let Some(inode) = before {
            self.names.remove(&name);
            if let Some(tracked) = self.cookies.get(&inode).and_then(|cookie| self.tracked.get_mut(cookie)) {
                tracked.names.remove(&name);
                self.vanished.insert(tracked.netns.cookie());
            }
        }
        match place {
            Place::Missing => drop(self.unripe.remove(&name)),
            Place::Unripe | Place::Unreadable => drop(self.unripe.insert(name)),
            Place::Namespace(inode) => {
                self.unripe.remove(&name);
                self.names.insert(name.clone(), inode);
                if inode == self.own.inode() {
                    return;
                }
                if let Some(tracked) = self.cookies.get(&inode).and_then(|cookie| self.tracked.get_mut(cookie)) {
                    tracked.names.insert(name);
                    return;
                }
                let (path, maps) = (self.directory.path(&name), self.maps.clone());
                self.work(move |_| Message::Opened { name, result: setup::open(&path, &maps, true) });
            }
        }
    }

    /// A name turned out to have no namespace: it is looked at again when mounts change.
    pub(super) fn unsettle(&mut self, name: &OsString) {
        if self.names.remove(name).is_some() {
            self.unripe.insert(name.clone());
            self.look_again(FIRST_RETRY);
        }
    }

    pub(super) fn exempt_unmounted(&mut self, netns: Option<Netns>, addresses: &BTreeSet<IpAddr>) {
        let Some(netns) = netns else { return };
        let cookie = netns.cookie();
        let known = self.names.values().any(|inode| *inode == netns.inode()) || self.tracked.contains_key(&cookie);
        // With the address of a pod it is one, of which the runtime has not said so yet.
        if known || self.left.contains(&cookie) || self.has_member_address(addresses) {
            return;
        }
        self.mark(cookie, Namespace::exempt());
        self.unmounted.push_back(cookie);
        if self.unmounted.len() > UNMOUNTED
            && let Some(oldest) = self.unmounted.pop_front()
        {
            self.maps.forget_namespace(oldest);
        }
    }

    /// Finds the namespace of a process that was refused. All that is in the directory or mounted is known by now.
    pub(super) fn resolve(&mut self, process: u32, cookie: u64) {
        if process == 0 || self.maps.namespace(cookie).is_some() {
            return;
        }
        self.work(move |_| {
            let netns = Netns::open(Path::new(&format!("/proc/{process}/ns/net"))).ok().flatten();
            // In another PID namespace the number is another process's.
            let netns = netns.filter(|netns| netns.cookie() == cookie);
            let addresses = netns.as_ref().and_then(|netns| netns.enter(|| AddressWatch::open_here()?.addresses()).ok());
            Message::Unmounted { netns, addresses: addresses.unwrap_or_default() }
        });
    }
}
