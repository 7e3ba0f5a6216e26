//! What the controller has told so far, and the snapshot that it makes.
//!
//! Enters: responses of the discovery stream, one at a time. Leaves: after each, one new [`Snapshot`]; what was refused in it; and
//! which addresses it answers. A resource that is refused leaves what was held under its name as it was.

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use super::decode::{self, DecodeError, Decoded};
use super::questions::address_in;
use super::shared::Shared;
use crate::model::snapshot::Edit;
use crate::model::{Snapshot, TrustDomain, Workload};
use crate::proto::discovery::{DeltaDiscoveryResponse, Resource};
use crate::proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE, MESH_TYPE};

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
    /// The types other than the mesh's settings whose initial set is in.
    complete: Vec<Kind>,
    mesh_known: bool,
    /// The controller answered with mesh settings that made no sense: nothing may be assumed in their place.
    mesh_refused: bool,
    /// Workloads that leave their trust domain to the mesh, while that is not known.
    parked: HashMap<Arc<str>, Box<Workload>>,
}

/// What one response led to.
#[derive(Debug, Default)]
pub(super) struct Applied {
    /// The resources that were not taken.
    pub(super) refused: Vec<DecodeError>,
    /// Addresses asked about of which it says what, or that nothing, is there.
    pub(super) answered: Vec<IpAddr>,
}

/// One resource that the controller gave.
#[derive(Debug)]
struct Held {
    version: Version,
    object: Object,
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
    Workload { implicit_domain: bool },
    Service,
    Policy,
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
            complete: Vec::new(),
            mesh_known: false,
            mesh_refused: false,
            parked: HashMap::new(),
        }
    }

    /// The present state.
    pub(super) fn snapshot(&self) -> &Arc<Snapshot> {
        &self.snapshot
    }

    /// The versions of all that is held of a kind, by name.
    pub(super) fn versions(&self, kind: Kind) -> HashMap<String, String> {
        let held = self.held.get(&kind).into_iter().flatten();
        held.map(|(name, held)| (name.to_string(), held.version.to_string())).collect()
    }

    /// Takes one response over. `asked` says whether somebody asks about an address.
    pub(super) fn apply(&mut self, kind: Kind, response: &DeltaDiscoveryResponse, asked: impl Fn(IpAddr) -> bool) -> Applied {
        let mut applied = Applied::default();
        let mut edit = self.edit();
        for name in &response.removed_resources {
            self.remove(kind, name, &mut edit);
            applied.answered.extend(address_in(name).filter(|address| asked(*address)));
        }
        for resource in &response.resources {
            match self.decode(kind, resource, &edit) {
                Ok(decoded) => {
                    let names = resource.aliases.iter().filter_map(|alias| address_in(alias));
                    applied
                        .answered
                        .extend(addresses_of(&decoded).iter().copied().chain(names).filter(|address| asked(*address)));
                    self.take(kind, resource, decoded, &mut edit);
                }
                Err(error) => applied.refused.push(error),
            }
        }
        let partial = response.system_version_info == PARTIAL;
        if kind == Kind::Mesh {
            self.mesh_refused = !applied.refused.is_empty();
        } else if !partial && !self.complete.contains(&kind) {
            self.complete.push(kind);
        }
        if partial && !self.snapshot.synced() && applied.answered.is_empty() {
            self.unpublished = Some(edit);
        } else {
            self.publish(edit);
        }
        applied
    }

    /// Whether all but the mesh's settings has been answered, and of these nothing heard.
    pub(super) fn only_mesh_is_missing(&self) -> bool {
        !self.mesh_known && !self.mesh_refused && self.rest_complete()
    }

    /// Acts without mesh settings: the control plane has none, so it is not Culvert's, and its policies come as objects.
    pub(super) fn assume_mesh(&mut self) {
        let mut edit = self.edit();
        let mesh =
            decode::Mesh { trust_domain: self.default_trust_domain.clone(), default_deny: false, cluster_ranges: Arc::default() };
        self.take_mesh(mesh, &mut edit);
        self.publish(edit);
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
        let held = self.held.entry(kind).or_default();
        let former = held.insert(Arc::clone(&name), Held { version: resource.version.as_str().into(), object });
        if let Some(former) = former.filter(|former| !same_table(former.object, object)) {
            self.drop_object(former.object, &resource.name, edit);
        }
        match decoded {
            Decoded::Mesh(mesh) => self.take_mesh(mesh, edit),
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

    fn remove(&mut self, kind: Kind, name: &str, edit: &mut Edit) {
        let held = self.held.get_mut(&kind).and_then(|held| held.remove(name));
        if let Some(held) = held {
            self.drop_object(held.object, name, edit);
        }
    }

    fn drop_object(&mut self, object: Object, name: &str, edit: &mut Edit) {
        match object {
            // There is no mesh without settings: the last ones stay.
            Object::Mesh => {}
            Object::Workload { .. } => {
                self.parked.remove(name);
                edit.remove_workload(name);
            }
            Object::Service => edit.remove_service(name),
            Object::Policy => edit.remove_policy(name),
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
        self.complete.len() == Kind::ALL.len() - 1
    }
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
