//! What one client wants of one type of resource, and what it must be told.
//!
//! Enters: the client's requests and the mesh's states. Leaves: items to send. Pure.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use crate::controller::index::{Resource, ResourceKind};
use crate::controller::publish::MeshState;
use crate::proto::packed;

/// The most names that one client may follow by name, of one type.
pub(super) const MAX_NAMES: usize = 65_536;

/// A client's interest in one type of resource.
#[derive(Debug)]
pub(super) struct Subscription {
    kind: ResourceKind,
    /// The client's node: of some resources only one is told.
    node: Arc<str>,
    wildcard: bool,
    /// Names, and addresses in place of their aliases, followed one by one.
    names: BTreeSet<Wanted>,
    /// The names of resources that a client which follows single ones was told of.
    held: BTreeSet<Arc<str>>,
    /// The state's sequence number up to which the client was told everything; none before its first request.
    told: Option<u64>,
}

/// A resource to send, or the name of one that is not there.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Item {
    /// Under which other name it was asked for, if any.
    Present(Arc<Resource>, Option<String>),
    /// The name, as the client knows it.
    Absent(String),
}

/// The client is so far behind that removals it has not heard of are forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TooFarBehind;

/// A client wants to follow too many names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TooManyNames;

/// What a name stands for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Wanted {
    Address(IpAddr),
    Name(Arc<str>),
}

impl Subscription {
    pub(super) fn new(kind: ResourceKind, node: &Arc<str>) -> Self {
        let node = Arc::clone(node);
        Self { kind, node, wildcard: false, names: BTreeSet::new(), held: BTreeSet::new(), told: None }
    }

    /// Whether nothing was asked yet.
    pub(super) fn is_new(&self) -> bool {
        self.told.is_none()
    }

    /// Stops following names.
    pub(super) fn unsubscribe(&mut self, names: &[String]) {
        for name in names {
            if name == "*" {
                self.wildcard = false;
            } else {
                self.names.remove(&Wanted::of(name));
            }
        }
    }

    /// Starts following everything. Gives what differs from what the client holds; none if it follows everything already.
    pub(super) fn follow_all(&mut self, state: &MeshState, held: &HashMap<String, String>) -> Option<Vec<Item>> {
        if std::mem::replace(&mut self.wildcard, true) {
            return None;
        }
        self.told = Some(state.sequence());
        self.names.clear();
        self.held.clear();
        let mut packed = held.get(packed::NAME).and_then(|value| packed::unpack(value));
        let mut holds = |resource: &Resource| {
            let named = held.get(&*resource.name).map(String::as_str) == Some(&*resource.version);
            // What is left of these in the end is no more.
            named || packed.as_mut().zip(packed::digest_of(&resource.version)).is_some_and(|(all, digest)| all.remove(&digest))
        };
        let told = state.resources(self.kind).filter(|resource| resource.is_for(&self.node) && !holds(resource));
        let mut items: Vec<_> = told.map(Item::present).collect();
        let understood = packed.is_some();
        items.extend(
            self.gone(state, held).into_iter().filter(|item| !understood || *item != Item::Absent(packed::NAME.to_owned())),
        );
        items.extend(packed.into_iter().flatten().map(|digest| Item::Absent(packed::name_of(digest))));
        Some(items)
    }

    /// Takes up what a client that follows single names holds from before. Gives what differs.
    pub(super) fn resume(&mut self, state: &MeshState, held: &HashMap<String, String>) -> Result<Vec<Item>, TooManyNames> {
        if held.len() > MAX_NAMES {
            return Err(TooManyNames);
        }
        self.told = Some(state.sequence());
        self.held = held.keys().map(|name| Arc::from(name.as_str())).collect();
        let present = held.iter().filter_map(|(name, version)| {
            self.resource(state, name).filter(|resource| *resource.version != **version).map(Item::present)
        });
        Ok(present.chain(self.gone(state, held)).collect())
    }

    /// Starts following names. Gives an answer to each.
    pub(super) fn follow(&mut self, state: &MeshState, names: &[String]) -> Result<Vec<Item>, TooManyNames> {
        // What changed since is told as well: a client that has asked before must not miss it.
        self.told.get_or_insert(state.sequence());
        let mut items = Vec::new();
        for name in names.iter().filter(|name| *name != "*") {
            let wanted = Wanted::of(name);
            let found = match &wanted {
                Wanted::Address(address) if self.kind == ResourceKind::Address => state.at_address(*address),
                Wanted::Address(_) => None,
                Wanted::Name(name) => self.resource(state, name),
            };
            if !self.wildcard {
                self.names.insert(wanted);
                self.held.extend(found.map(|resource| Arc::clone(&resource.name)));
            }
            items.push(match found {
                Some(resource) => Item::Present(Arc::clone(resource), (*resource.name != **name).then(|| name.clone())),
                None => Item::Absent(name.clone()),
            });
        }
        if self.names.len() > MAX_NAMES { Err(TooManyNames) } else { Ok(items) }
    }

    /// When the first change was read that the client has not been told of.
    pub(super) fn waits_since(&self, state: &MeshState) -> Option<Instant> {
        state.oldest_change(self.kind, self.told?)
    }

    /// What changed since the client was last told.
    pub(super) fn catch_up(&mut self, state: &MeshState) -> Result<Vec<Item>, TooFarBehind> {
        let Some(told) = self.told else { return Ok(Vec::new()) };
        if !state.remembers(told) {
            return Err(TooFarBehind);
        }
        self.told = Some(state.sequence());
        let mut items = Vec::new();
        for (name, resource) in state.changes(self.kind, told, &self.node) {
            if !self.wants(name, resource) {
                continue;
            }
            match resource {
                Some(resource) => {
                    if !self.wildcard {
                        self.held.insert(Arc::clone(name));
                    }
                    items.push(Item::present(resource));
                }
                None => {
                    self.held.remove(name);
                    items.push(Item::Absent(name.to_string()));
                }
            }
        }
        Ok(items)
    }

    fn wants(&self, name: &Arc<str>, resource: Option<&Arc<Resource>>) -> bool {
        let mut addresses = resource.into_iter().flat_map(|resource| &resource.addresses);
        self.wildcard
            || self.held.contains(name)
            || self.names.contains(&Wanted::Name(Arc::clone(name)))
            || addresses.any(|address| self.names.contains(&Wanted::Address(*address)))
    }

    fn gone(&self, state: &MeshState, held: &HashMap<String, String>) -> Vec<Item> {
        let gone = held.keys().filter(|name| self.resource(state, name).is_none());
        gone.map(|name| Item::Absent(name.clone())).collect()
    }

    /// The resource of this name, if the client is told of it.
    fn resource<'a>(&self, state: &'a MeshState, name: &str) -> Option<&'a Arc<Resource>> {
        state.resource(self.kind, name).filter(|resource| resource.is_for(&self.node))
    }
}

impl Item {
    fn present(resource: &Arc<Resource>) -> Self {
        Self::Present(Arc::clone(resource), None)
    }
}

impl Wanted {
    fn of(name: &str) -> Self {
        match address_in(name) {
            Some(address) => Self::Address(address),
            None => Self::Name(name.into()),
        }
    }
}

/// `/10.0.0.1` and `network/10.0.0.1` stand for an address; there is only one network.
pub(super) fn address_in(name: &str) -> Option<IpAddr> {
    let (_, address) = name.rsplit_once('/')?;
    address.parse::<IpAddr>().ok().map(|address| address.to_canonical())
}
