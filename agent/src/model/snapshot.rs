//! The state of the mesh that one node acts on: immutable once published, and cheap to copy and to change.
//!
//! Enters: workloads, services and policies as discovery hears of them, in batches ([`Snapshot::edit`]). Leaves: answers about
//! an address, a service's endpoints, a workload's policies, and the table of [`Destination`]s that the kernel acts on. The maps
//! are persistent, so that a copy shares all but what changed, and two snapshots' destination tables are compared in a time
//! that grows with their difference.

mod policies;

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use self::policies::Policies;
use super::{Applicable, Authorization, Mode, PodUid, Service, TrustDomain, Workload};

/// The state of the mesh at one moment.
#[derive(Clone, Debug)]
pub struct Snapshot {
    node: Arc<str>,
    trust_domain: Option<TrustDomain>,
    default_deny: bool,
    cluster_ranges: Arc<[IpNet]>,
    synced: bool,
    of_every_pod: bool,
    workloads: imbl::OrdSet<ByUid>,
    workload_by_address: imbl::OrdMap<Octets, Arc<Workload>>,
    services: imbl::OrdMap<Arc<str>, Arc<Service>>,
    service_by_address: imbl::OrdMap<Octets, Arc<Service>>,
    endpoints: imbl::OrdMap<Arc<str>, Arc<Endpoints>>,
    members: imbl::OrdMap<Arc<str>, Members>,
    local: imbl::OrdMap<Arc<str>, Arc<Workload>>,
    /// The same by their pods, as far as it is known which these are.
    pods: imbl::OrdMap<Arc<PodUid>, Arc<Workload>>,
    policies: Policies,
    destinations: imbl::OrdMap<(IpAddr, u16), Destination>,
}

/// What the kernel does with a connection of an enrolled pod to an address and port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// Hands it to the agent.
    Capture,
    /// Lets it through untouched, although the address is captured on other ports.
    Pass,
    /// Refuses it at once: a service's port without a ready endpoint, or a port that the service does not have.
    Refuse,
}

/// The workloads that name a service, in the order of their UIDs.
type Members = Arc<Vec<Arc<Workload>>>;

/// The workloads behind a service.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Endpoints {
    /// Those that a new connection may go to: ready, unless the service takes others too, and on this node where it asks for that.
    /// In the order of their UIDs.
    pub ready: Members,
    /// Whether any of them, ready or not, is in the mesh.
    pub any_enrolled: bool,
    /// How many there are, ready or not.
    pub total: usize,
}

/// A batch of changes to a [`Snapshot`]. What depends on several objects is worked out once, at [`Edit::finish`].
#[derive(Debug)]
pub struct Edit {
    snapshot: Snapshot,
    stale_services: BTreeSet<Arc<str>>,
}

/// An address as a key: IPv4 mapped into IPv6, which no address of the mesh's is otherwise. Smaller than an [`IpAddr`].
type Octets = [u8; 16];

fn octets(address: IpAddr) -> Octets {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

/// A workload, found by its UID alone.
#[derive(Clone, Debug)]
struct ByUid(Arc<Workload>);

impl Borrow<str> for ByUid {
    fn borrow(&self) -> &str {
        &self.0.uid
    }
}

impl Ord for ByUid {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.uid.cmp(&other.0.uid)
    }
}

impl PartialOrd for ByUid {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for ByUid {
    fn eq(&self, other: &Self) -> bool {
        self.0.uid == other.0.uid
    }
}

impl Eq for ByUid {}

impl Snapshot {
    /// The state of a node that has heard nothing yet.
    #[must_use]
    pub fn empty(node: &str) -> Self {
        Self {
            node: node.into(),
            trust_domain: None,
            default_deny: false,
            cluster_ranges: Arc::default(),
            synced: false,
            of_every_pod: false,
            workloads: imbl::OrdSet::new(),
            workload_by_address: imbl::OrdMap::new(),
            services: imbl::OrdMap::new(),
            service_by_address: imbl::OrdMap::new(),
            endpoints: imbl::OrdMap::new(),
            members: imbl::OrdMap::new(),
            local: imbl::OrdMap::new(),
            pods: imbl::OrdMap::new(),
            policies: Policies::default(),
            destinations: imbl::OrdMap::new(),
        }
    }

    /// Starts a batch of changes on a copy of this state.
    #[must_use]
    pub fn edit(&self) -> Edit {
        Edit { snapshot: self.clone(), stale_services: BTreeSet::new() }
    }

    /// Whether the controller's first full answer has arrived.
    #[must_use]
    pub fn synced(&self) -> bool {
        self.synced
    }

    /// Whether the controller tells of every pod: one that it does not know is one that it does not know yet. Culvert's does; others'
    /// may leave out those that are no business of theirs.
    #[must_use]
    pub fn of_every_pod(&self) -> bool {
        self.of_every_pod
    }

    /// The node that this state is for.
    #[must_use]
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Whether a connection that no ALLOW policy covers is denied.
    #[must_use]
    pub fn default_deny(&self) -> bool {
        self.default_deny
    }

    /// The ranges of the cluster's pods and services: an address in them that is in no table is asked about before it is dialled.
    #[must_use]
    pub fn cluster_ranges(&self) -> &Arc<[IpNet]> {
        &self.cluster_ranges
    }

    /// The mesh's own trust domain, once the controller has named it.
    #[must_use]
    pub fn trust_domain(&self) -> Option<&TrustDomain> {
        self.trust_domain.as_ref()
    }

    /// The workload of this UID.
    #[must_use]
    pub fn workload(&self, uid: &str) -> Option<&Arc<Workload>> {
        self.workloads.get(uid).map(|ByUid(workload)| workload)
    }

    /// The workload at this address. Pods on the host's network are found by none.
    #[must_use]
    pub fn workload_at(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        self.workload_by_address.get(&octets(address))
    }

    /// The service at this virtual address.
    #[must_use]
    pub fn service_at(&self, address: IpAddr) -> Option<&Arc<Service>> {
        self.service_by_address.get(&octets(address))
    }

    /// The workloads behind the service of this key.
    #[must_use]
    pub fn endpoints(&self, service: &str) -> Option<&Arc<Endpoints>> {
        self.endpoints.get(service)
    }

    /// The workloads that run on this node, in the order of their UIDs.
    pub fn local_workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.local.values()
    }

    /// The workload of this node that is this pod.
    #[must_use]
    pub fn pod(&self, uid: &PodUid) -> Option<&Arc<Workload>> {
        self.pods.get(uid)
    }

    /// Whether a pod of this node's that belongs to the mesh has no address yet: the next new namespace may be its.
    #[must_use]
    pub fn awaits_address(&self) -> bool {
        self.local.values().any(|workload| workload.enrolled() && workload.addresses.is_empty())
    }

    /// All workloads, in no order.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.iter().map(|ByUid(workload)| workload)
    }

    /// All services, in no order.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    /// All authorization policies, in no order.
    pub fn policies(&self) -> impl Iterator<Item = &Arc<Authorization>> {
        self.policies.all().values()
    }

    /// The authorization policies that apply to `workload`. The second value names the policies that select it but have not
    /// arrived: until they do, no decision can be made.
    #[must_use]
    pub fn policies_for(&self, workload: &Workload) -> (Applicable, Vec<Arc<str>>) {
        self.policies.applying_to(workload)
    }

    /// Whether authorization is for every workload as it is in `other`, as far as can be told without looking at each policy.
    #[must_use]
    pub fn same_policies(&self, other: &Self) -> bool {
        self.default_deny == other.default_deny && self.policies.all().ptr_eq(other.policies.all())
    }

    /// What the kernel should do with each address and port; port 0 stands for every port without an entry of its own.
    #[must_use]
    pub fn destinations(&self) -> &imbl::OrdMap<(IpAddr, u16), Destination> {
        &self.destinations
    }
}

impl Edit {
    /// Notes that the controller's first full answer is in.
    pub fn mark_synced(&mut self) {
        self.snapshot.synced = true;
    }

    /// Notes that the controller tells of every pod.
    pub fn mark_of_every_pod(&mut self) {
        self.snapshot.of_every_pod = true;
    }

    /// Sets the mesh-wide settings.
    pub fn set_mesh(&mut self, trust_domain: TrustDomain, default_deny: bool, cluster_ranges: Arc<[IpNet]>) {
        self.snapshot.trust_domain = Some(trust_domain);
        self.snapshot.cluster_ranges = cluster_ranges;
        self.snapshot.default_deny = default_deny;
    }

    /// The workload of this UID, as the changes leave it.
    #[must_use]
    pub fn workload(&self, uid: &str) -> Option<&Arc<Workload>> {
        self.snapshot.workload(uid)
    }

    /// The mesh's own trust domain, as the changes leave it.
    #[must_use]
    pub fn trust_domain(&self) -> Option<&TrustDomain> {
        self.snapshot.trust_domain()
    }

    /// Adds a workload, or replaces the one of the same UID.
    pub fn upsert_workload(&mut self, workload: Workload) {
        let workload = Arc::new(workload);
        let uid = Arc::clone(&workload.uid);
        if let Some(ByUid(former)) = self.snapshot.workloads.insert(ByUid(Arc::clone(&workload))) {
            self.forget(&former);
        }
        let state = &mut self.snapshot;
        if !workload.host_network {
            for address in &workload.addresses {
                let former = state.workload_by_address.insert(octets(*address), Arc::clone(&workload));
                if let Some(former) = former.filter(|former| former.uid != uid) {
                    state.forget_destinations(&former, *address);
                }
            }
        }
        for (service, _) in workload.services.iter() {
            let members = Arc::make_mut(state.members.entry(Arc::clone(service)).or_default());
            match place_of(members, &uid) {
                Ok(place) => members[place] = Arc::clone(&workload),
                Err(place) => members.insert(place, Arc::clone(&workload)),
            }
            self.stale_services.insert(Arc::clone(service));
        }
        for (key, destination) in workload_destinations(&workload) {
            state.destinations.insert(key, destination);
        }
        if workload.node == state.node {
            state.policies.select(&workload);
            if let Some(pod) = &workload.pod {
                state.pods.insert(Arc::clone(pod), Arc::clone(&workload));
            }
            state.local.insert(uid, workload);
        }
    }

    /// Removes the workload of this UID, if there is one.
    pub fn remove_workload(&mut self, uid: &str) {
        if let Some(ByUid(workload)) = self.snapshot.workloads.remove(uid) {
            self.forget(&workload);
        }
    }

    /// Removes what is known of a workload elsewhere than in the set of all.
    fn forget(&mut self, workload: &Workload) {
        let (state, uid) = (&mut self.snapshot, &*workload.uid);
        if state.local.remove(uid).is_some() {
            state.policies.deselect(uid);
            if let Some(pod) = &workload.pod
                && state.pods.get(pod).is_some_and(|there| there.uid == workload.uid)
            {
                state.pods.remove(pod);
            }
        }
        for address in &workload.addresses {
            // Another workload may have taken the address over before this one was told to be gone.
            if state.workload_by_address.get(&octets(*address)).is_some_and(|owner| owner.uid == workload.uid) {
                state.workload_by_address.remove(&octets(*address));
                state.forget_destinations(workload, *address);
            }
        }
        for (service, _) in workload.services.iter() {
            if let Some(members) = state.members.get_mut(service)
                && let Ok(place) = place_of(members, uid)
            {
                Arc::make_mut(members).remove(place);
                if members.is_empty() {
                    state.members.remove(service);
                }
            }
            self.stale_services.insert(Arc::clone(service));
        }
    }

    /// Adds a service, or replaces the one of the same key.
    pub fn upsert_service(&mut self, service: Service) {
        let key = service.key();
        self.remove_service(&key);
        // One text for all that name the service.
        let key = self.snapshot.members.get_key_value(&key).map_or(key, |(named, _)| Arc::clone(named));
        let service = Arc::new(service);
        for address in &service.addresses {
            self.snapshot.service_by_address.insert(octets(*address), Arc::clone(&service));
        }
        self.snapshot.services.insert(Arc::clone(&key), service);
        self.stale_services.insert(key);
    }

    /// Removes the service of this key (`namespace/hostname`), if there is one.
    pub fn remove_service(&mut self, key: &str) {
        let state = &mut self.snapshot;
        let Some(service) = state.services.remove(key) else { return };
        for address in &service.addresses {
            if state.service_by_address.get(&octets(*address)).is_some_and(|owner| owner.key().as_ref() == key) {
                state.service_by_address.remove(&octets(*address));
                for (key, _) in service_ports(&service, *address) {
                    state.destinations.remove(&key);
                }
            }
        }
        state.endpoints.remove(key);
    }

    /// Adds an authorization policy, or replaces the one of the same key.
    pub fn upsert_policy(&mut self, policy: Authorization) {
        self.snapshot.policies.upsert(policy);
    }

    /// Removes the policy of this key (`namespace/name`), if there is one.
    pub fn remove_policy(&mut self, key: &str) {
        self.snapshot.policies.remove(key);
    }

    /// Works out what depends on several objects, and gives the new state.
    #[must_use]
    pub fn finish(self) -> Snapshot {
        let mut state = self.snapshot;
        for key in self.stale_services {
            let Some(service) = state.services.get(&key).cloned() else { continue };
            let endpoints = state.gather_endpoints(&service, &key);
            for address in &service.addresses {
                for (place, mapping) in service_ports(&service, *address) {
                    match endpoints.destination(mapping) {
                        Some(destination) => drop(state.destinations.insert(place, destination)),
                        None => drop(state.destinations.remove(&place)),
                    }
                }
            }
            state.endpoints.insert(key, Arc::new(endpoints));
        }
        state
    }
}

impl Snapshot {
    /// Removes what is said of an address because it is this workload's.
    fn forget_destinations(&mut self, workload: &Workload, address: IpAddr) {
        for (key, _) in workload_destinations(workload).filter(|(key, _)| key.0 == address) {
            self.destinations.remove(&key);
        }
    }

    /// In a time that grows with the service alone.
    fn gather_endpoints(&self, service: &Service, key: &str) -> Endpoints {
        let members = self.members.get(key).cloned().unwrap_or_default();
        let placed = || members.iter().filter(|workload| !workload.addresses.is_empty());
        let ready = |workload: &&Arc<Workload>| {
            (workload.healthy || service.unready_too) && (!service.node_local || workload.node == self.node)
        };
        let count = placed().filter(ready).count();
        Endpoints {
            ready: if count == members.len() {
                Arc::clone(&members)
            } else {
                Arc::new(placed().filter(ready).cloned().collect())
            },
            any_enrolled: placed().any(|workload| workload.enrolled()),
            total: placed().count(),
        }
    }
}

/// Where the workload of this UID is among others, or would be.
fn place_of(members: &[Arc<Workload>], uid: &str) -> Result<usize, usize> {
    members.binary_search_by(|member| (*member.uid).cmp(uid))
}

impl Endpoints {
    /// What the kernel does with the service's port, or with a port that it does not have. A service with no workload of the
    /// mesh behind it is left to the node's own service routing.
    fn destination(&self, served: bool) -> Option<Destination> {
        if self.total > 0 && !self.any_enrolled {
            return None;
        }
        Some(if served && !self.ready.is_empty() { Destination::Capture } else { Destination::Refuse })
    }
}

/// The places in the destination table of a service's address: each port that it serves, and 0 for those that it does not.
fn service_ports(service: &Service, address: IpAddr) -> impl Iterator<Item = ((IpAddr, u16), bool)> {
    let served = service.ports.iter().map(move |mapping| ((address, mapping.service_port), true));
    served.chain([((address, 0), false)])
}

/// The places of a workload's addresses in the destination table. One that takes no tunnels is named too: its address may be in one
/// of the cluster's ranges, where what is not named is asked about.
fn workload_destinations(workload: &Workload) -> impl Iterator<Item = ((IpAddr, u16), Destination)> {
    let modes = &workload.peer_authentication;
    let destination = |mode| if mode == Mode::Disable { Destination::Pass } else { Destination::Capture };
    let default = if workload.enrolled() { destination(modes.mode) } else { Destination::Pass };
    let ports = modes.ports.iter().map(move |(port, mode)| (*port, destination(*mode)));
    let ports = ports.filter(move |(_, destination)| workload.enrolled() && *destination != default);
    let addresses: &[IpAddr] = if workload.host_network { &[] } else { &workload.addresses };
    let places: Vec<_> = std::iter::once((0, default)).chain(ports).collect();
    addresses.iter().flat_map(move |address| places.clone().into_iter().map(move |(port, to)| ((*address, port), to)))
}

#[cfg(test)]
pub(crate) mod tests;
