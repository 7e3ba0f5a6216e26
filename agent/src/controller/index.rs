//! Cluster objects into the mesh's resources, step by step: what depends on a changed object is worked out anew, and no more.
//!
//! Enters: [`Change`]s, in order. Leaves: an [`Update`] with the resources that may have changed, who runs where, and what the
//! operator should know. Pure: no I/O, no clock. Objects that contradict each other never break it, and never lend one workload
//! another's address or identity.

mod clashes;
mod endpoints;
mod findings;
mod pod;
mod podless;
mod policies;
mod refused;
mod residents;
mod resource;
mod same_node;
mod service;
#[cfg(test)]
pub(super) mod tests;
mod workload;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use tracing::{debug, info};

use self::endpoints::{Slice, Slices, Target};
pub use self::findings::Finding;
use self::findings::Findings;
use self::pod::{PodRecord, enrolment};
use self::podless::Podless;
use self::policies::Policies;
pub use self::residents::Residents;
pub use self::resource::{Resource, ResourceKind};
use self::same_node::SameNodeLabels;
use self::service::ServiceRecord;
use super::source::{Change, Kind, Object, ObjectKey};
use crate::model::{SameNode, SpiffeId, TrustDomain};

/// Mesh-wide settings, fixed while the controller runs.
#[derive(Clone, Debug)]
pub struct MeshSettings {
    /// The mesh's trust domain.
    pub trust_domain: TrustDomain,
    /// Policies of this namespace apply to the whole mesh.
    pub root_namespace: String,
    /// The domain that services' names end in.
    pub cluster_domain: String,
    /// Deny what no ALLOW policy covers.
    pub default_deny: bool,
    /// How pods of one node speak to each other where no label says so.
    pub same_node: SameNode,
    /// Ranges of the cluster's addresses beside those that nodes declare.
    pub cluster_ranges: Vec<IpNet>,
    /// Namespaces whose pods are never in the mesh, whatever labels say.
    pub excluded_namespaces: BTreeSet<String>,
    /// All namespaces are told of: a pod whose namespace is not known yet is one of which nothing can be said.
    pub namespaces_told: bool,
}

/// What a batch of changes led to.
#[derive(Debug, Default)]
pub struct Update {
    /// Resources that are new, changed, or perhaps still the same; none for one that is not there (any more).
    pub resources: Vec<(ResourceKind, Arc<str>, Option<Resource>)>,
    /// The nodes that exist, if that changed.
    pub nodes: Option<BTreeSet<String>>,
    /// Who may ask for which identity.
    pub residents: Residents,
    /// Messages for the operator, each said once.
    pub warnings: Vec<String>,
    /// What is to be said of policies that are new or have changed, or of which something else is to be said now.
    pub findings: Vec<Finding>,
    /// The namespaces with enrolled pods, if they changed.
    pub namespaces: Option<BTreeSet<Arc<str>>>,
}

/// A namespaced object's name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct ObjectName {
    namespace: Arc<str>,
    name: Arc<str>,
}

/// All that is known of the cluster.
#[derive(Debug)]
pub struct Index {
    settings: MeshSettings,
    namespaces: HashMap<Arc<str>, bool>,
    same_node: SameNodeLabels,
    pods: BTreeMap<ObjectName, PodRecord>,
    claims: HashMap<IpAddr, BTreeSet<ObjectName>>,
    accounts: BTreeSet<ObjectName>,
    services: BTreeMap<ObjectName, ServiceRecord>,
    slices: Slices,
    /// The endpoints without a pod that have a resource.
    served_podless: BTreeSet<Podless>,
    policies: Policies,
    nodes: BTreeMap<String, Vec<IpNet>>,
    residents: Residents,
    residence: HashMap<ObjectName, (Arc<str>, SpiffeId)>,
    /// How many enrolled pods each namespace has.
    enrolled: BTreeMap<Arc<str>, i64>,
    findings: Findings,
    conflicts: BTreeSet<(ObjectName, ObjectName)>,
    /// Enrolled pods on nodes that there are no objects of.
    strays: BTreeSet<ObjectName>,
    stale: Stale,
}

/// What the changes of one batch touch.
#[derive(Debug, Default)]
struct Stale {
    pods: BTreeSet<ObjectName>,
    podless: BTreeSet<Podless>,
    services: BTreeSet<ObjectName>,
    policies: BTreeSet<ObjectName>,
    modes: bool,
    mesh: bool,
    nodes: bool,
    namespaces: bool,
}

impl Index {
    /// An index that knows nothing yet. Its first [`Index::apply`] gives the mesh's settings, too.
    #[must_use]
    pub fn new(settings: MeshSettings) -> Self {
        Self {
            policies: Policies::new(&settings),
            settings,
            namespaces: HashMap::new(),
            same_node: SameNodeLabels::default(),
            pods: BTreeMap::new(),
            claims: HashMap::new(),
            accounts: BTreeSet::new(),
            services: BTreeMap::new(),
            slices: Slices::default(),
            served_podless: BTreeSet::new(),
            nodes: BTreeMap::new(),
            residents: Residents::default(),
            residence: HashMap::new(),
            enrolled: BTreeMap::new(),
            findings: Findings::default(),
            conflicts: BTreeSet::new(),
            strays: BTreeSet::new(),
            stale: Stale { mesh: true, nodes: true, namespaces: true, ..Stale::default() },
        }
    }

    /// How many objects are known that the mesh is made of: nodes, pods and services.
    #[must_use]
    pub fn objects(&self) -> usize {
        self.nodes.len() + self.pods.len() + self.services.len()
    }

    /// How many objects are known, by kind. Of namespaces only those are counted that are enrolled.
    #[must_use]
    pub fn counts(&self) -> [(Kind, usize); 8] {
        let (modes, authorizations) = self.policies.counts();
        [
            (Kind::Node, self.nodes.len()),
            (Kind::Namespace, self.namespaces.values().filter(|enrolled| **enrolled).count()),
            (Kind::Pod, self.pods.len()),
            (Kind::ServiceAccount, self.accounts.len()),
            (Kind::Service, self.services.len()),
            (Kind::EndpointSlice, self.slices.len()),
            (Kind::PeerAuthentication, modes),
            (Kind::AuthorizationPolicy, authorizations),
        ]
    }

    /// Applies changes in order, and works out what they lead to.
    pub fn apply(&mut self, changes: &[Change]) -> Update {
        let mut update = Update::default();
        for change in changes {
            match change {
                Change::Applied { object, origin } => self.apply_object(object, origin, &mut update.warnings),
                Change::Removed(key) => self.remove_object(key),
                Change::Refused { key, uid, error, stand_in } => {
                    update.warnings.push(self.refuse(key, uid.as_ref(), error, stand_in.as_deref()));
                }
            }
        }
        let stale = std::mem::take(&mut self.stale);
        if stale.modes {
            update.warnings.extend(self.policies.arrange());
            self.findings.overrule(self.policies.overruled());
        }
        for name in &stale.policies {
            let authorization = self.policies.authorization(name);
            let resource = authorization.map(resource::authorization);
            update.resources.push((ResourceKind::Authorization, name.to_string().into(), resource));
        }
        for name in &stale.services {
            let resource = self.services.get(name).map(|service| service.resource(name));
            update.resources.push((ResourceKind::Address, self.service_key(name), resource));
        }
        for name in &stale.pods {
            self.settle_residence(name);
            self.note_conflicts(name, &mut update.warnings);
            update.resources.push((ResourceKind::Address, resource::uid(name), self.workload(name)));
        }
        for endpoint in &stale.podless {
            let resource = self.podless(endpoint);
            let was_served = match resource {
                Some(_) => !self.served_podless.insert(endpoint.clone()),
                None => self.served_podless.remove(endpoint),
            };
            if was_served || resource.is_some() {
                update.resources.push((ResourceKind::Address, endpoint.uid(), resource));
            }
        }
        // With other nodes, every pod may have become a stray or ceased to be one.
        let perhaps_stray = if stale.nodes { self.pods.keys().cloned().collect() } else { stale.pods };
        for name in &perhaps_stray {
            self.note_stray(name, &mut update.warnings);
        }
        if stale.mesh {
            update.resources.push((ResourceKind::Mesh, "mesh".into(), Some(self.mesh())));
        }
        update.nodes = stale.nodes.then(|| self.nodes.keys().cloned().collect());
        update.residents = self.residents.clone();
        update.findings = self.findings.take();
        // Settling the pods found out.
        let namespaces = std::mem::take(&mut self.stale.namespaces) || stale.namespaces;
        update.namespaces = namespaces.then(|| self.enrolled.keys().cloned().collect());
        update
    }

    fn apply_object(&mut self, object: &Object, origin: &str, warnings: &mut Vec<String>) {
        let key = object.key();
        let name = ObjectName::of(&key);
        match object {
            Object::Node(node) => self.set_node(key.name, Some(pod::node_ranges(node))),
            Object::Namespace(namespace) => {
                let labels = namespace.metadata.labels.as_ref();
                self.set_namespace(&name.name, Some(labels.and_then(enrolment).unwrap_or(false)));
                self.set_namespace_way(&key, labels, origin, warnings);
            }
            Object::Pod(pod) => {
                self.note_way(&key, pod.metadata.labels.as_ref(), origin, warnings);
                self.set_pod(name, Some(PodRecord::of(pod)));
            }
            Object::ServiceAccount(_) => drop(self.accounts.insert(name)),
            Object::Service(service) => {
                let record = ServiceRecord::of(service, &name, &self.settings.cluster_domain);
                self.set_service(name, record);
            }
            Object::EndpointSlice(slice) => self.set_slice(&name, Slice::of(slice, &name)),
            Object::PeerAuthentication(policy) => {
                let problems = self.policies.problems(policy);
                warnings.extend(problems.iter().map(|problem| format!("{origin}: {key}: {problem}")));
                self.findings.note(&key, &policy.metadata, &problems);
                let namespace = self.policies.set_peer_authentication(&name, Some((**policy).clone()));
                self.touch_namespace(namespace);
                self.stale.modes = true;
            }
            Object::AuthorizationPolicy(policy) => match self.policies.compile(policy) {
                Ok(compiled) => {
                    warnings.extend(compiled.problems.iter().map(|problem| format!("{origin}: {key}: {problem}")));
                    self.findings.note(&key, &policy.metadata, &compiled.problems);
                    self.set_authorization(name, Some(compiled));
                }
                // Sources check policies before they hand them on; what was in force stays so.
                Err(error) => warnings.push(format!("{origin}: {key}: {error}")),
            },
        }
    }

    fn remove_object(&mut self, key: &ObjectKey) {
        let name = ObjectName::of(key);
        self.findings.forget(key);
        self.forget_way(key);
        match key.kind {
            Kind::Node => self.set_node(key.name.clone(), None),
            Kind::Namespace => self.set_namespace(&name.name, None),
            Kind::Pod => self.set_pod(name, None),
            Kind::ServiceAccount => drop(self.accounts.remove(&name)),
            Kind::Service => self.set_service(name, None),
            Kind::EndpointSlice => self.set_slice(&name, None),
            Kind::PeerAuthentication => {
                let namespace = self.policies.set_peer_authentication(&name, None);
                self.touch_namespace(namespace);
                self.stale.modes = true;
            }
            Kind::AuthorizationPolicy => self.set_authorization(name, None),
        }
    }

    fn set_node(&mut self, name: String, ranges: Option<Vec<IpNet>>) {
        self.stale.nodes |= self.nodes.contains_key(&name) != ranges.is_some();
        let before = match ranges.clone() {
            Some(ranges) => self.nodes.insert(name, ranges),
            None => self.nodes.remove(&name),
        };
        if before.unwrap_or_default() != ranges.unwrap_or_default() {
            self.stale.mesh = true;
            // Whether an address that no pod has may be a pod's depends on the ranges.
            self.stale
                .podless
                .extend(self.slices.addresses().map(|(service, address)| Podless { service: service.clone(), address }));
        }
    }

    fn set_namespace(&mut self, name: &Arc<str>, enrolled: Option<bool>) {
        let before = match enrolled {
            Some(enrolled) => self.namespaces.insert(Arc::clone(name), enrolled),
            None => self.namespaces.remove(name),
        };
        if before != enrolled {
            self.touch_namespace(Some(Arc::clone(name)));
        }
    }

    fn set_pod(&mut self, name: ObjectName, record: Option<PodRecord>) {
        let before = match record.clone() {
            Some(record) => self.pods.insert(name.clone(), record),
            None => self.pods.remove(&name),
        };
        for address in before.iter().flat_map(PodRecord::claimed) {
            self.touch_claimants(*address);
            self.touch_podless(*address);
            if let Some(claimants) = self.claims.get_mut(address) {
                claimants.remove(&name);
                if claimants.is_empty() {
                    self.claims.remove(address);
                }
            }
        }
        for address in record.iter().flat_map(PodRecord::claimed) {
            self.touch_claimants(*address);
            self.touch_podless(*address);
            self.claims.entry(*address).or_default().insert(name.clone());
        }
        self.stale.pods.insert(name);
    }

    fn set_service(&mut self, name: ObjectName, record: Option<ServiceRecord>) {
        let before = match record.clone() {
            Some(record) => self.services.insert(name.clone(), record),
            None => self.services.remove(&name),
        };
        for record in before.iter().chain(&record) {
            self.touch_selected(&name, record);
        }
        self.touch_targets(&name, self.slices.targets_of(&name));
        self.stale.services.insert(name);
    }

    fn set_slice(&mut self, name: &ObjectName, slice: Option<Slice>) {
        let services: BTreeSet<_> = self
            .slices
            .get(name)
            .into_iter()
            .chain(&slice)
            .map(|slice| (slice.service.clone(), self.slices.serves(&slice.service)))
            .collect();
        let orphan = slice.as_ref().map(|slice| &slice.service).filter(|service| !self.services.contains_key(*service));
        orphan
            .inspect(|service| info!("EndpointSlice {name} is for the Service {service}, which there is not: it has no effect"));
        let targets = self.slices.set(name, slice);
        for (service, served) in services {
            self.touch_targets(&service, targets.clone());
            // With its first slice a service's selector no longer counts, and with its last one gone it counts again.
            if self.slices.serves(&service) != served
                && let Some(record) = self.services.get(&service).cloned()
            {
                self.touch_selected(&service, &record);
            }
        }
    }

    fn set_authorization(&mut self, name: ObjectName, compiled: Option<policies::Compiled>) {
        for selection in self.policies.set_authorization(&name, compiled) {
            let selected =
                self.pods_in(selection.namespace.as_ref()).filter(|(_, pod)| service::selects(&selection.labels, &pod.labels));
            let selected: Vec<_> = selected.map(|(name, _)| name.clone()).collect();
            self.stale.pods.extend(selected);
        }
        self.stale.policies.insert(name);
    }

    /// The pods of a namespace, or of all.
    fn pods_in(&self, namespace: Option<&Arc<str>>) -> impl Iterator<Item = (&ObjectName, &PodRecord)> {
        let first = namespace.map(|namespace| ObjectName { namespace: Arc::clone(namespace), name: "".into() });
        let range = match first {
            Some(first) => self.pods.range(first..),
            None => self.pods.range::<ObjectName, _>(..),
        };
        range.take_while(move |(name, _)| namespace.is_none_or(|namespace| name.namespace == *namespace))
    }

    fn touch_namespace(&mut self, namespace: Option<Arc<str>>) {
        let names: Vec<_> = self.pods_in(namespace.as_ref()).map(|(name, _)| name.clone()).collect();
        self.stale.pods.extend(names);
    }

    fn touch_selected(&mut self, service: &ObjectName, record: &ServiceRecord) {
        if record.selector.is_empty() {
            return;
        }
        let selected = self.pods_in(Some(&service.namespace)).filter(|(_, pod)| service::selects(&record.selector, &pod.labels));
        let selected: Vec<_> = selected.map(|(name, _)| name.clone()).collect();
        self.stale.pods.extend(selected);
    }

    fn touch_targets(&mut self, service: &ObjectName, targets: BTreeSet<Target>) {
        for target in targets {
            match target {
                Target::Pod(name) if self.pods.contains_key(&name) => drop(self.stale.pods.insert(name)),
                Target::Pod(name) => {
                    info!("an EndpointSlice names the Pod {name}, which there is not: that endpoint is left out");
                }
                Target::Address(address) => {
                    self.touch_claimants(address);
                    self.stale.podless.insert(Podless { service: service.clone(), address });
                }
            }
        }
    }

    /// A pod with this address comes or goes: the endpoints that only have the address are no longer, or again, no pods.
    fn touch_podless(&mut self, address: IpAddr) {
        let services = self.slices.services_at(address);
        self.stale.podless.extend(services.map(|service| Podless { service: service.clone(), address }));
    }

    fn touch_claimants(&mut self, address: IpAddr) {
        self.stale.pods.extend(self.claims.get(&address).into_iter().flatten().cloned());
    }

    /// The pod that has this address: of several, the oldest.
    fn owner(&self, address: IpAddr) -> Option<&ObjectName> {
        let claimants = self.claims.get(&address)?;
        // A pod that does not say when it was made counts as the newest.
        claimants.iter().min_by_key(|name| {
            let created = self.pods.get(*name).and_then(|pod| pod.created);
            (created.is_none(), created, *name)
        })
    }

    /// Whether pods of this record's kind are in the mesh.
    fn enrolled(&self, name: &ObjectName, pod: &PodRecord) -> bool {
        let namespace = || self.namespaces.get(&name.namespace).copied().unwrap_or(false);
        let excluded = || self.settings.excluded_namespaces.contains(&*name.namespace);
        pod.live && !pod.host_network && pod.enrolment.unwrap_or_else(namespace) && !excluded()
    }

    fn settle_residence(&mut self, name: &ObjectName) {
        let now = self.pods.get(name).filter(|pod| self.enrolled(name, pod)).and_then(|pod| {
            let trust_domain = self.settings.trust_domain.clone();
            Some((Arc::clone(&pod.node), SpiffeId::new(trust_domain, &name.namespace, &pod.service_account).ok()?))
        });
        if self.residence.get(name) == now.as_ref() {
            return;
        }
        let before = match now.clone() {
            Some(now) => self.residence.insert(name.clone(), now),
            None => self.residence.remove(name),
        };
        let change = i64::from(now.is_some()) - i64::from(before.is_some());
        self.stale.namespaces |= self.count_enrolled(&name.namespace, change);
        if let Some(now) = now {
            let account = ObjectName { namespace: Arc::clone(&name.namespace), name: now.1.service_account().into() };
            if !self.accounts.contains(&account) && &*account.name != "default" {
                debug!(pod = %name, %account, "the pod's service account is not known");
            }
            self.residents.enter(now);
        }
        if let Some(before) = before {
            self.residents.leave(&before);
        }
    }

    /// Notes that a namespace has this many enrolled pods more, or less. Gives whether it has come to have any, or none.
    fn count_enrolled(&mut self, namespace: &Arc<str>, change: i64) -> bool {
        let before = self.enrolled.get(namespace).copied().unwrap_or(0);
        let now = before + change;
        match now {
            0 => drop(self.enrolled.remove(namespace)),
            _ => drop(self.enrolled.insert(Arc::clone(namespace), now)),
        }
        (before == 0) != (now == 0)
    }
}

impl ObjectName {
    fn of(key: &ObjectKey) -> Self {
        Self { namespace: key.namespace.as_str().into(), name: key.name.as_str().into() }
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}
