//! Which pods serve which services, by the `EndpointSlice`s.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::Hash;
use std::net::IpAddr;

use k8s_openapi::api::discovery::v1::EndpointSlice;

use super::ObjectName;

/// An `EndpointSlice`, reduced to what the mesh needs.
#[derive(Clone, Debug)]
pub(super) struct Slice {
    pub(super) service: ObjectName,
    /// TCP ports by the service port's name; none when the slice names no ports at all.
    pub(super) ports: Option<Vec<(String, Option<u16>)>>,
    endpoints: BTreeMap<Target, bool>,
}

/// Whom an endpoint means.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Target {
    Pod(ObjectName),
    Address(IpAddr),
}

/// All slices, found by service and by endpoint.
#[derive(Debug, Default)]
pub(super) struct Slices {
    slices: BTreeMap<ObjectName, Slice>,
    by_service: HashMap<ObjectName, BTreeSet<ObjectName>>,
    by_pod: HashMap<ObjectName, BTreeSet<ObjectName>>,
    by_address: HashMap<IpAddr, BTreeSet<ObjectName>>,
}

impl Slice {
    /// The record of a slice; none for one that belongs to no service or holds no addresses.
    pub(super) fn of(slice: &EndpointSlice, name: &ObjectName) -> Option<Self> {
        let labels = slice.metadata.labels.as_ref();
        let service = labels.and_then(|labels| labels.get("kubernetes.io/service-name"))?;
        if slice.address_type == "FQDN" {
            return None;
        }
        let ports = slice.ports.as_deref().filter(|ports| !ports.is_empty()).map(|ports| {
            let tcp = ports.iter().filter(|port| port.protocol.as_deref().unwrap_or("TCP") == "TCP");
            let number = |port: Option<i32>| port.and_then(|port| u16::try_from(port).ok());
            tcp.map(|port| (port.name.clone().unwrap_or_default(), number(port.port))).collect()
        });
        let mut endpoints = BTreeMap::new();
        for endpoint in slice.endpoints.iter().flatten() {
            let ready = endpoint.conditions.as_ref().and_then(|conditions| conditions.ready).unwrap_or(true);
            let pod = endpoint.target_ref.as_ref().filter(|target| target.kind.as_deref() == Some("Pod"));
            let pod = pod.and_then(|target| {
                let namespace = target.namespace.as_deref().unwrap_or(&name.namespace).into();
                Some(Target::Pod(ObjectName { namespace, name: target.name.as_deref()?.into() }))
            });
            let addresses = || endpoint.addresses.iter().filter_map(|text| text.parse::<IpAddr>().ok());
            let targets = match pod {
                Some(pod) => vec![pod],
                None => addresses().map(|address| Target::Address(address.to_canonical())).collect(),
            };
            for target in targets {
                // Not ready in one place is not ready.
                let known = endpoints.entry(target).or_insert(true);
                *known &= ready;
            }
        }
        let service = ObjectName { namespace: std::sync::Arc::clone(&name.namespace), name: service.as_str().into() };
        Some(Self { service, ports, endpoints })
    }
}

impl Slices {
    /// How many slices there are.
    pub(super) fn len(&self) -> usize {
        self.slices.len()
    }

    /// The slice of this name.
    pub(super) fn get(&self, name: &ObjectName) -> Option<&Slice> {
        self.slices.get(name)
    }

    /// Whether the service has any slice.
    pub(super) fn serves(&self, service: &ObjectName) -> bool {
        self.by_service.contains_key(service)
    }

    /// All endpoints of a service.
    pub(super) fn targets_of(&self, service: &ObjectName) -> BTreeSet<Target> {
        let slices = self.by_service.get(service).into_iter().flatten().filter_map(|name| self.slices.get(name));
        slices.flat_map(|slice| slice.endpoints.keys().cloned()).collect()
    }

    /// Adds, replaces or removes a slice. Gives the endpoints that this changes something for.
    pub(super) fn set(&mut self, name: &ObjectName, slice: Option<Slice>) -> BTreeSet<Target> {
        let before = self.slices.remove(name);
        if let Some(before) = &before {
            remove(&mut self.by_service, &before.service, name);
            for target in before.endpoints.keys() {
                match target {
                    Target::Pod(pod) => remove(&mut self.by_pod, pod, name),
                    Target::Address(address) => remove(&mut self.by_address, address, name),
                }
            }
        }
        let changed = differences(before.as_ref(), slice.as_ref());
        if let Some(slice) = slice {
            self.by_service.entry(slice.service.clone()).or_default().insert(name.clone());
            for target in slice.endpoints.keys() {
                match target {
                    Target::Pod(pod) => drop(self.by_pod.entry(pod.clone()).or_default().insert(name.clone())),
                    Target::Address(address) => drop(self.by_address.entry(*address).or_default().insert(name.clone())),
                }
            }
            self.slices.insert(name.clone(), slice);
        }
        changed
    }

    /// The slices of a service that have this address for an endpoint, and whether it is ready there.
    pub(super) fn of_address(&self, service: &ObjectName, address: IpAddr) -> Vec<(&Slice, bool)> {
        let found = self.at(address).filter(|slice| slice.service == *service);
        found.filter_map(|slice| Some((slice, *slice.endpoints.get(&Target::Address(address))?))).collect()
    }

    /// The services that have this address for an endpoint, some of them more than once.
    pub(super) fn services_at(&self, address: IpAddr) -> impl Iterator<Item = &ObjectName> {
        self.at(address).map(|slice| &slice.service)
    }

    /// All endpoints that are named by address alone, with their services.
    pub(super) fn addresses(&self) -> impl Iterator<Item = (&ObjectName, IpAddr)> {
        let slices = self.by_address.iter().flat_map(|(address, names)| names.iter().map(|name| (name, *address)));
        slices.filter_map(|(name, address)| Some((&self.slices.get(name)?.service, address)))
    }

    fn at(&self, address: IpAddr) -> impl Iterator<Item = &Slice> {
        self.by_address.get(&address).into_iter().flatten().filter_map(|name| self.slices.get(name))
    }

    /// The slices that a pod is an endpoint of, and whether it is ready there. `addresses` are those that the pod owns.
    pub(super) fn of_pod(&self, pod: &ObjectName, addresses: &[IpAddr]) -> Vec<(&Slice, bool)> {
        let named = self.by_pod.get(pod).into_iter().flatten().map(|name| (name, Target::Pod(pod.clone())));
        let addressed = addresses
            .iter()
            .flat_map(|address| self.by_address.get(address).into_iter().flatten().map(|name| (name, Target::Address(*address))));
        let found = named.chain(addressed).filter_map(|(name, target)| {
            let slice = self.slices.get(name)?;
            Some((slice, *slice.endpoints.get(&target)?))
        });
        found.collect()
    }
}

fn remove<K: Eq + Hash>(map: &mut HashMap<K, BTreeSet<ObjectName>>, key: &K, name: &ObjectName) {
    if let Some(names) = map.get_mut(key) {
        names.remove(name);
        if names.is_empty() {
            map.remove(key);
        }
    }
}

fn differences(before: Option<&Slice>, after: Option<&Slice>) -> BTreeSet<Target> {
    let alike = match (before, after) {
        (Some(before), Some(after)) => before.service == after.service && before.ports == after.ports,
        _ => false,
    };
    let endpoints = |slice: Option<&Slice>| slice.map(|slice| slice.endpoints.clone()).unwrap_or_default();
    let (before, after) = (endpoints(before), endpoints(after));
    let all: BTreeSet<_> = before.keys().chain(after.keys()).cloned().collect();
    all.into_iter().filter(|target| !alike || before.get(target) != after.get(target)).collect()
}
