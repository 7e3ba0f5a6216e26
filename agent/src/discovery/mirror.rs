//! What the controller has told so far, and the snapshot that it makes.
//!
//! Enters: responses of the discovery stream, one at a time. Leaves: after each, one new [`Snapshot`]; what was refused in it; and
//! which addresses it answers. A resource that is refused leaves what was held under its name as it was; a policy under whose name
//! nothing was is the strictest that it may have meant.

mod stand_in;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use tracing::debug;

use super::decode::{self, DecodeError, Decoded};
use super::questions::address_in;
use super::shared::Shared;
use crate::model::snapshot::Edit;
use crate::model::{Snapshot, TrustDomain, Workload};
use crate::proto::discovery::{DeltaDiscoveryResponse, Resource};
use crate::proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE, MESH_TYPE, packed};

/// The mark on a response that is not the last of its type's initial set.
const PARTIAL: &str = "partial";

/// The types of resources that an agent subscribes to, in the order of subscription: what others depend on goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    Mesh,
    Authorization,
    Address,
}

/// The state that the controller's resources make.
#[derive(Debug)]
pub(super) struct Mirror {
    snapshot: Arc<Snapshot>,
    /// What parts of a first answer have changed. While nothing can be decided from a part, no snapshot is made of it.
    unpublished: Option<Edit>,
    shared: Shared,
    default_trust_domain: TrustDomain,
    held: HashMap<Kind, HashMap<Arc<str>, Held>>,
    /// What all that is held would take if it were kept, in bytes.
    bytes: u64,
    /// The types whose initial set is in.
    complete: Vec<Kind>,
    mesh_known: bool,
    /// The controller answered with mesh settings that made no sense: nothing may be assumed in their place.
    mesh_refused: bool,
    /// Workloads that leave their trust domain to the mesh, while that is not known.
    parked: HashMap<Arc<str>, Box<Workload>>,
    /// The types of which it was told on this stream, in the packed form, what is held, until they are answered; with the names that
    /// came since.
    resuming: HashMap<Kind, HashSet<Arc<str>>>,
    /// Something is held that a predecessor kept, and for some type the controller has not said yet what of it holds. Until then
    /// nothing is published: a policy that is no more must not decide.
    recalled: bool,
}

/// What one response led to.
#[derive(Debug, Default)]
pub(super) struct Applied {
    /// The resources that were not taken.
    pub(super) refused: Vec<DecodeError>,
    /// Addresses asked about of which it says what, or that nothing, is there.
    pub(super) answered: Vec<IpAddr>,
    /// Which of its resources were not held before in their versions, by their places, in order.
    new: Vec<usize>,
    /// The names of what it removes that was held.
    gone: Vec<String>,
}

/// One resource that the controller gave.
#[derive(Debug)]
struct Held {
    version: Version,
    object: Object,
    /// What it takes where it is kept.
    bytes: u32,
}

/// A resource's version. Culvert's own are 16 bytes, written as 32 hexadecimal digits: there are as many as there are workloads.
#[derive(Debug, PartialEq, Eq)]
enum Version {
    Digest([u8; 16]),
    Text(Box<str>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Object {
    Mesh,
    Workload {
        implicit_domain: bool,
    },
    Service,
    Policy,
    /// In the place of a policy that makes no sense and never did.
    StandIn,
}

impl Kind {
    pub(super) const ALL: [Self; 3] = [Self::Mesh, Self::Authorization, Self::Address];

    pub(super) fn type_url(self) -> &'static str {
        match self {
            Self::Mesh => MESH_TYPE,
            Self::Authorization => AUTHORIZATION_TYPE,
            Self::Address => ADDRESS_TYPE,
        }
    }

    /// The word for a label.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Mesh => "mesh",
            Self::Authorization => "authorization",
            Self::Address => "address",
        }
    }

    pub(super) fn of(type_url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.type_url() == type_url)
    }
}

impl Mirror {
    pub(super) fn new(node: &str, default_trust_domain: TrustDomain) -> Self {
        Self {
            snapshot: Arc::new(Snapshot::empty(node)),
            unpublished: None,
            shared: Shared::default(),
            default_trust_domain,
            held: HashMap::new(),
            bytes: 0,
            complete: Vec::new(),
            mesh_known: false,
            mesh_refused: false,
            parked: HashMap::new(),
            resuming: HashMap::new(),
            recalled: false,
        }
    }

    /// The present state.
    pub(super) fn snapshot(&self) -> &Arc<Snapshot> {
        &self.snapshot
    }

    /// What a new stream is told of a kind that is held: the versions by name, or packed where the controller is Culvert's.
    pub(super) fn tell(&mut self, kind: Kind) -> HashMap<String, String> {
        let culverts = self.held.get(&Kind::Mesh).is_some_and(|settings| !settings.is_empty());
        let all_digests = || self.held.get(&kind).is_some_and(|held| held.values().all(|held| held.version.digest().is_some()));
        if !culverts || !all_digests() {
            return self.versions(kind);
        }
        let digests = self.held.get(&kind).into_iter().flatten().filter_map(|(_, held)| held.version.digest());
        let told = [(packed::NAME.to_owned(), packed::pack(digests))].into();
        self.resuming.insert(kind, HashSet::new());
        told
    }

    /// The versions of all that is held of a kind, by name.
    pub(super) fn versions(&self, kind: Kind) -> HashMap<String, String> {
        let held = self.held.get(&kind).into_iter().flatten();
        held.map(|(name, held)| (name.to_string(), held.version.to_string())).collect()
    }

    /// How many resources are held.
    pub(super) fn size(&self) -> usize {
        self.held.values().map(HashMap::len).sum()
    }

    /// What all that is held takes where it is kept, in bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Takes up what a predecessor kept of a response. It is told to the controller, and counts when that has answered for all types.
    pub(super) fn recall(&mut self, mut response: DeltaDiscoveryResponse) {
        let Some(kind) = Kind::of(&response.type_url) else { return };
        let mut edit = self.edit();
        for name in &response.removed_resources {
            self.remove(kind, name, &mut edit);
        }
        for resource in &mut response.resources {
            // The type was left out, being the response's.
            if let Some(any) = &mut resource.resource {
                kind.type_url().clone_into(&mut any.type_url);
            }
            match self.decode(kind, resource, &edit) {
                Ok(decoded) => self.take(kind, resource, decoded, &mut edit),
                // It is not told to the controller then, which sends it again.
                Err(error) => debug!(%error, "a resource that was kept makes no sense to this version"),
            }
        }
        self.recalled = true;
        self.unpublished = Some(edit);
    }

    /// Whether something is held that has not been in force yet.
    pub(super) fn is_recalled(&self) -> bool {
        self.recalled
    }

    /// Notes that what comes next is on a new stream: what the last one confirmed of the kept state may have changed since.
    pub(super) fn begin_stream(&mut self) {
        self.resuming.clear();
        if self.recalled {
            self.complete.clear();
        }
    }

    /// Takes one response over. `asked` says whether somebody asks about an address.
    pub(super) fn apply(&mut self, kind: Kind, response: &DeltaDiscoveryResponse, asked: impl Fn(IpAddr) -> bool) -> Applied {
        let mut applied = Applied::default();
        let mut edit = self.edit();
        if let Some(came) = self.resuming.get_mut(&kind) {
            came.extend(response.resources.iter().map(|resource| Arc::from(resource.name.as_str())));
        }
        for name in self.gone_unnamed(kind, &response.removed_resources) {
            self.remove(kind, &name, &mut edit);
            applied.gone.push(name.to_string());
        }
        for name in &response.removed_resources {
            if self.remove(kind, name, &mut edit) {
                applied.gone.push(name.clone());
            }
            applied.answered.extend(address_in(name).filter(|address| asked(*address)));
        }
        for (place, resource) in response.resources.iter().enumerate() {
            match self.decode(kind, resource, &edit) {
                Ok(decoded) => {
                    let names = resource.aliases.iter().filter_map(|alias| address_in(alias));
                    applied
                        .answered
                        .extend(addresses_of(&decoded).iter().copied().chain(names).filter(|address| asked(*address)));
                    if self.is_news(kind, resource) {
                        applied.new.push(place);
                    }
                    self.take(kind, resource, decoded, &mut edit);
                }
                Err(error) => {
                    if kind == Kind::Authorization {
                        self.close_for(resource, &mut edit);
                    }
                    applied.refused.push(error);
                }
            }
        }
        let partial = response.system_version_info == PARTIAL;
        if !partial {
            self.resuming.remove(&kind);
        }
        if kind == Kind::Mesh {
            self.mesh_refused = !applied.refused.is_empty();
        }
        let refused = kind == Kind::Mesh && self.mesh_refused;
        if !partial && !refused && !self.complete.contains(&kind) {
            self.complete.push(kind);
        }
        self.recalled &= !(self.mesh_known && self.complete.len() == Kind::ALL.len());
        if self.recalled {
            self.unpublished = Some(edit);
            // No state that could be shown holds the answer. A question's own comes after the first ones.
            applied.answered.clear();
        } else if partial && !self.snapshot.synced() && applied.answered.is_empty() {
            self.unpublished = Some(edit);
        } else {
            self.publish(edit);
        }
        applied
    }

    /// Whether all but the mesh's settings has been answered, and of these nothing heard.
    pub(super) fn only_mesh_is_missing(&self) -> bool {
        let known = self.mesh_known && (!self.recalled || self.complete.contains(&Kind::Mesh));
        !known && !self.mesh_refused && self.rest_complete()
    }

    /// Acts without mesh settings: the control plane has none, so it is not Culvert's, and its policies come as objects.
    pub(super) fn assume_mesh(&mut self) {
        let mut edit = self.edit();
        let mesh =
            decode::Mesh { trust_domain: self.default_trust_domain.clone(), default_deny: false, cluster_ranges: Arc::default() };
        self.take_mesh(mesh, &mut edit);
        self.publish(edit);
    }

    /// What is gone by an answer to the packed form. What has come since is not, whatever it replaced.
    fn gone_unnamed(&self, kind: Kind, removed: &[String]) -> Vec<Arc<str>> {
        let (Some(came), Some(held)) = (self.resuming.get(&kind), self.held.get(&kind)) else { return Vec::new() };
        // A controller that does not know the form sends all that there is, and this at its end.
        let all = removed.iter().any(|name| name == packed::NAME);
        let digests: HashSet<_> = removed.iter().filter_map(|name| packed::digest_in(name)).collect();
        if !all && digests.is_empty() {
            return Vec::new();
        }
        let gone = |held: &Held| all || held.version.digest().is_some_and(|digest| digests.contains(&digest));
        held.iter().filter(|(name, held)| gone(held) && !came.contains(*name)).map(|(name, _)| Arc::clone(name)).collect()
    }

    /// Whether the resource was not held in this version. Without a version no controller could say that it still holds.
    fn is_news(&self, kind: Kind, resource: &Resource) -> bool {
        let held = self.held.get(&kind).and_then(|held| held.get(&*resource.name));
        !resource.version.is_empty() && held.is_none_or(|held| held.version != resource.version.as_str().into())
    }

    fn edit(&mut self) -> Edit {
        self.unpublished.take().unwrap_or_else(|| self.snapshot.edit())
    }

    fn decode(&mut self, kind: Kind, resource: &Resource, edit: &Edit) -> Result<Decoded, DecodeError> {
        match kind {
            Kind::Mesh => decode::mesh(resource, kind.type_url()),
            Kind::Authorization => decode::authorization(resource, kind.type_url()),
            Kind::Address => {
                let trust_domain = edit.trust_domain().unwrap_or(&self.default_trust_domain);
                decode::address(resource, kind.type_url(), trust_domain, &mut self.shared)
            }
        }
    }

    fn take(&mut self, kind: Kind, resource: &Resource, decoded: Decoded, edit: &mut Edit) {
        let object = object_of(&decoded);
        let name = match &decoded {
            Decoded::Workload { workload, .. } => Arc::clone(&workload.uid),
            Decoded::Mesh(_) | Decoded::Service(_) | Decoded::Policy(_) => self.shared.texts.text(&resource.name),
        };
        let bytes = size(resource);
        let held = self.held.entry(kind).or_default();
        let former = held.insert(Arc::clone(&name), Held { version: resource.version.as_str().into(), object, bytes });
        self.bytes += u64::from(bytes);
        self.bytes -= former.as_ref().map_or(0, |former| u64::from(former.bytes));
        if let Some(former) = former.filter(|former| !same_table(former.object, object)) {
            self.drop_object(former.object, &resource.name, edit);
        }
        match decoded {
            Decoded::Mesh(mesh) => {
                self.take_mesh(mesh, edit);
                // Only Culvert's controller has such settings.
                edit.mark_of_every_pod();
            }
            Decoded::Workload { workload, implicit_domain } => {
                if implicit_domain && !self.mesh_known {
                    edit.remove_workload(&workload.uid);
                    self.parked.insert(name, workload);
                } else {
                    self.parked.remove(&name);
                    edit.upsert_workload(*workload);
                }
            }
            Decoded::Service(service) => edit.upsert_service(service),
            Decoded::Policy(policy) => edit.upsert_policy(policy),
        }
    }

    fn take_mesh(&mut self, mesh: decode::Mesh, edit: &mut Edit) {
        for (_, workload) in self.parked.drain() {
            edit.upsert_workload(in_domain(*workload, &mesh.trust_domain, &mut self.shared));
        }
        if edit.trust_domain().is_some_and(|former| *former != mesh.trust_domain) {
            for (name, held) in self.held.get(&Kind::Address).into_iter().flatten() {
                if held.object == (Object::Workload { implicit_domain: true })
                    && let Some(workload) = edit.workload(name).cloned()
                {
                    edit.upsert_workload(in_domain(Arc::unwrap_or_clone(workload), &mesh.trust_domain, &mut self.shared));
                }
            }
        }
        self.mesh_known = true;
        edit.set_mesh(mesh.trust_domain, mesh.default_deny, mesh.cluster_ranges);
    }

    /// Says whether it was held.
    fn remove(&mut self, kind: Kind, name: &str, edit: &mut Edit) -> bool {
        let Some(held) = self.held.get_mut(&kind).and_then(|held| held.remove(name)) else { return false };
        self.bytes -= u64::from(held.bytes);
        self.drop_object(held.object, name, edit);
        true
    }

    fn drop_object(&mut self, object: Object, name: &str, edit: &mut Edit) {
        match object {
            // There is no mesh without settings: the last ones stay, unless they have not been in force yet.
            Object::Mesh => self.mesh_known &= !self.recalled,
            Object::Workload { .. } => {
                self.parked.remove(name);
                edit.remove_workload(name);
            }
            Object::Service => edit.remove_service(name),
            Object::Policy | Object::StandIn => edit.remove_policy(name),
        }
    }

    fn publish(&mut self, mut edit: Edit) {
        if self.mesh_known && self.rest_complete() {
            edit.mark_synced();
        }
        self.snapshot = Arc::new(edit.finish());
    }

    /// Whether the initial sets of all types but the mesh's settings are in.
    fn rest_complete(&self) -> bool {
        Kind::ALL.iter().all(|kind| *kind == Kind::Mesh || self.complete.contains(kind))
    }
}

impl Applied {
    /// What of the response there was not before, and can be told by its version: what is worth keeping.
    pub(super) fn news(&self, mut response: DeltaDiscoveryResponse) -> DeltaDiscoveryResponse {
        let mut wanted = self.new.iter().copied().peekable();
        let mut place = 0;
        response.resources.retain(|_| {
            place += 1;
            wanted.next_if_eq(&(place - 1)).is_some()
        });
        response.removed_resources.clone_from(&self.gone);
        response
    }

    /// How many resources were held that are no more.
    pub(super) fn gone(&self) -> usize {
        self.gone.len()
    }
}

fn size(resource: &Resource) -> u32 {
    let value = resource.resource.as_ref().map_or(0, |any| any.value.len());
    u32::try_from(resource.name.len() + resource.version.len() + value).unwrap_or(u32::MAX)
}

fn object_of(decoded: &Decoded) -> Object {
    match decoded {
        Decoded::Mesh(_) => Object::Mesh,
        Decoded::Workload { implicit_domain, .. } => Object::Workload { implicit_domain: *implicit_domain },
        Decoded::Service(_) => Object::Service,
        Decoded::Policy(_) => Object::Policy,
    }
}

/// Whether an object that replaces another of its name does so in the snapshot's own table.
fn same_table(one: Object, other: Object) -> bool {
    std::mem::discriminant(&one) == std::mem::discriminant(&other)
}

fn addresses_of(decoded: &Decoded) -> &[IpAddr] {
    match decoded {
        Decoded::Workload { workload, .. } => &workload.addresses,
        Decoded::Service(service) => &service.addresses,
        Decoded::Mesh(_) | Decoded::Policy(_) => &[],
    }
}

fn in_domain(mut workload: Workload, trust_domain: &TrustDomain, shared: &mut Shared) -> Workload {
    let (namespace, service_account) = (workload.identity.namespace(), workload.identity.service_account());
    let identity = shared.identity(trust_domain.clone(), namespace, service_account);
    workload.identity = identity.expect("the parts come from an identity, where they were legal");
    workload
}

impl Version {
    /// What stands for it in the packed form.
    fn digest(&self) -> Option<packed::Digest> {
        match self {
            Self::Digest(bytes) => bytes.first_chunk().copied(),
            Self::Text(_) => None,
        }
    }
}

impl From<&str> for Version {
    fn from(text: &str) -> Self {
        // What would be written otherwise than it came is kept as it came.
        let digits = text.len() == 32 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        let digest = digits.then(|| u128::from_str_radix(text, 16).ok()).flatten();
        digest.map_or_else(|| Self::Text(text.into()), |digest| Self::Digest(digest.to_be_bytes()))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Digest(bytes) => write!(f, "{:032x}", u128::from_be_bytes(*bytes)),
            Self::Text(text) => f.write_str(text),
        }
    }
}

#[cfg(test)]
mod tests;
