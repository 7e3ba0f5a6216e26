//! Namespaces as they appear and vanish: in the node's directory, elsewhere on the machine, or nowhere but in a process.
//!
//! Enters: news of the directory and the mount table, and processes that the programs refused. Leaves: jobs that open what is new,
//! and names that are gone. What is not in the directory is another's business: it is exempt as soon as it is seen.

use std::collections::{BTreeMap, HashSet};
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use culvert_ebpf_common::Namespace;
use tokio::time::Instant;

use super::watch::{MountTable, News, Place};
use super::{Enroller, FIRST_RETRY, Message, setup};
use crate::capture::{Netns, load};

/// Namespaces that are mounted nowhere, of which the end cannot be told: so many are remembered.
const UNMOUNTED: usize = 4096;

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
        self.looked = Instant::now();
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
        self.catch_up();
    }

    pub(super) fn look_again(&mut self, after: Duration) {
        let at = Instant::now() + after;
        self.look_at = Some(self.look_at.map_or(at, |planned| planned.min(at)));
    }

    pub(super) fn read_agents(&mut self) {
        self.agents_read = Instant::now();
        self.agents = load::agents_netns().into_iter().collect();
    }

    /// Namespaces that are mounted, but not in the directory, are another's business.
    fn look_elsewhere(&mut self, mounted: BTreeMap<u64, PathBuf>) {
        let ours: HashSet<u64> = self.names.values().copied().chain([self.own.inode()]).collect();
        for (inode, netns) in self.foreign.extract_if(|inode, _| !mounted.contains_key(inode)) {
            if let Some(netns) = netns
                && !ours.contains(&inode)
            {
                self.maps.forget_namespace(netns.cookie());
            }
        }
        for (inode, path) in mounted {
            if ours.contains(&inode) || self.foreign.contains_key(&inode) {
                continue;
            }
            self.foreign.insert(inode, None);
            self.work(move |_| Message::Foreign { inode, result: Netns::open(&path) });
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
        if before.is_some_and(|inode| place == Place::Namespace(inode)) {
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
            Place::Unripe => drop(self.unripe.insert(name)),
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
                self.work(move |_| Message::Opened { name, result: setup::open(&path, &maps) });
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

    pub(super) fn exempt_foreign(&mut self, inode: u64, result: io::Result<Option<Netns>>) {
        if self.names.values().any(|ours| *ours == inode) {
            self.foreign.remove(&inode);
            return;
        }
        match result {
            Ok(Some(netns)) if netns.inode() == inode => {
                if !self.tracked.contains_key(&netns.cookie()) {
                    self.mark(netns.cookie(), Namespace::exempt());
                    self.foreign.insert(inode, Some(netns));
                }
            }
            // Unmounted, or out of reach under another mount: what connects from it tells of itself.
            Ok(_) | Err(_) => drop(self.foreign.remove(&inode)),
        }
    }

    pub(super) fn exempt_unmounted(&mut self, netns: Option<Netns>) {
        let Some(netns) = netns else { return };
        let cookie = netns.cookie();
        if self.names.values().any(|inode| *inode == netns.inode()) || self.tracked.contains_key(&cookie) {
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
            Message::Unmounted { netns: netns.filter(|netns| netns.cookie() == cookie) }
        });
    }
}
