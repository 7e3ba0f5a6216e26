//! Typed handles of the maps that the programs decide from.
//!
//! Enters: what the agent has decided, in the model's words. Leaves: entries in the kernel's, and what the programs have noted. The
//! maps outlive the agent, so each table is compared with what the kernel holds, never assumed to be empty. Changes are
//! applied in an order that never shows a weaker state than the old or the new one.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::AsRawFd as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aya::Ebpf;
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, SockHash};
use culvert_ebpf_common::{Address, Admission, Dispatch, Endpoint, ListenerKey, ListenerRole, Namespace, Outcome, Settings};
use imbl::ordmap::DiffItem;
use ipnet::IpNet;

use super::{CaptureError, ListenerKind};
use crate::model::{Destination, OriginalDst};

type Destinations = imbl::OrdMap<(IpAddr, u16), Destination>;
/// A map, and what is known to be in it.
type Mirrored<T, H> = Mutex<(T, H)>;
type Prefix = (u32, [u8; 16]);

/// The maps, shared by all threads.
#[derive(Clone)]
pub struct Maps(Arc<Tables>);

struct Tables {
    settings: Mirrored<Array<MapData, Settings>, Settings>,
    agent_processes: Mutex<HashMap<MapData, u32, u64>>,
    namespaces: Mutex<HashMap<MapData, u64, Namespace>>,
    destinations: Mirrored<HashMap<MapData, Endpoint, u32>, Destinations>,
    cluster_ranges: Mirrored<LpmTrie<MapData, [u8; 16], u32>, BTreeSet<Prefix>>,
    kubelet_names: Mutex<HashMap<MapData, [u8; 16], u32>>,
    captured: Mutex<HashMap<MapData, Endpoint, Endpoint>>,
    admissions: Mirrored<HashMap<MapData, Endpoint, u32>, BTreeMap<IpAddr, PortAdmissions>>,
    listeners: Mutex<SockHash<MapData, ListenerKey>>,
    outcomes: Mutex<PerCpuArray<MapData, u64>>,
}

/// What the ports of one address take in plaintext; port 0 stands for those without an entry.
pub(super) type PortAdmissions = BTreeMap<u16, Admission>;

impl Maps {
    /// Takes the maps out of the loaded object, and reads what a predecessor left in them.
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, CaptureError> {
        let settings: Array<_, Settings> = table(ebpf, "SETTINGS")?;
        let current = settings.get(&0, 0).map_err(failed("SETTINGS"))?;
        let destinations = table(ebpf, "DESTINATIONS")?;
        let held_destinations = held_destinations(&destinations).map_err(failed("DESTINATIONS"))?;
        let ranges: LpmTrie<_, [u8; 16], u32> = table(ebpf, "CLUSTER_RANGES")?;
        let held_ranges = ranges.keys().map(|key| key.map(|key| (key.prefix_len(), key.data()))).collect::<Result<_, _>>();
        let held_ranges = held_ranges.map_err(failed("CLUSTER_RANGES"))?;
        let admissions = table(ebpf, "ADMISSIONS")?;
        let held_admissions = held_admissions(&admissions).map_err(failed("ADMISSIONS"))?;
        Ok(Self(Arc::new(Tables {
            settings: Mutex::new((settings, current)),
            agent_processes: Mutex::new(table(ebpf, "AGENT_PROCESSES")?),
            namespaces: Mutex::new(table(ebpf, "NAMESPACES")?),
            destinations: Mutex::new((destinations, held_destinations)),
            cluster_ranges: Mutex::new((ranges, held_ranges)),
            kubelet_names: Mutex::new(table(ebpf, "KUBELET_NAMES")?),
            captured: Mutex::new(table(ebpf, "CAPTURED")?),
            admissions: Mutex::new((admissions, held_admissions)),
            listeners: Mutex::new(table(ebpf, "LISTENERS")?),
            outcomes: Mutex::new(table(ebpf, "OUTCOMES")?),
        })))
    }

    /// The address that the captured connection from `source` was dialled to. The entry is removed: a second call knows nothing.
    #[must_use]
    pub fn original_dst(&self, source: SocketAddr) -> Option<OriginalDst> {
        let mut captured = lock(&self.0.captured);
        let source = Endpoint::from(source);
        let destination = captured.get(&source, 0).ok()?;
        let _evicted_already = captured.remove(&source);
        Some(OriginalDst(destination.into()))
    }

    /// How often the programs ended in each way, since the maps were made.
    #[must_use]
    pub fn outcomes(&self) -> Vec<(&'static str, u64)> {
        let counters = lock(&self.0.outcomes);
        let count = |outcome: Outcome| counters.get(&(outcome as u32), 0).map_or(0, |values| values.iter().sum());
        Outcome::ALL.iter().map(|outcome| (outcome.as_str(), count(*outcome))).collect()
    }

    /// Changes the settings.
    pub(super) fn set(&self, change: impl FnOnce(&mut Settings)) -> Result<(), MapError> {
        let mut settings = lock(&self.0.settings);
        change(&mut settings.1);
        let changed = settings.1;
        settings.0.set(0, changed, 0)
    }

    /// Tells the programs by what names a kubelet runs. Of a longer one the kernel keeps the beginning.
    pub(super) fn set_kubelet_names(&self, names: &[String]) -> Result<(), MapError> {
        let wanted: BTreeSet<[u8; 16]> = names.iter().map(|name| process_name(name)).collect();
        let mut known = lock(&self.0.kubelet_names);
        for former in known.keys().collect::<Result<Vec<_>, _>>()? {
            if !wanted.contains(&former) {
                known.remove(&former)?;
            }
        }
        wanted.into_iter().try_for_each(|name| known.insert(name, 1, 0))
    }

    /// Says of all agents in the table that they are former ones.
    pub(super) fn age_agents(&self) -> Result<(), MapError> {
        let mut processes = lock(&self.0.agent_processes);
        for process in processes.keys().collect::<Result<Vec<_>, _>>()? {
            processes.insert(process, 0, 0)?;
        }
        Ok(())
    }

    /// The process that was noted since [`age_agents`](Self::age_agents).
    pub(super) fn noted_agent(&self) -> Option<u32> {
        lock(&self.0.agent_processes).iter().flatten().find(|(_, new)| *new != 0).map(|(process, _)| process)
    }

    /// Removes all agents but `process`: the number of one that is gone may become an application's.
    pub(super) fn forget_former_agents(&self, process: u32) -> Result<(), MapError> {
        let mut processes = lock(&self.0.agent_processes);
        for former in processes.keys().collect::<Result<Vec<_>, _>>()? {
            if former != process {
                processes.remove(&former)?;
            }
        }
        Ok(())
    }

    /// What the programs hold a namespace for.
    pub(super) fn namespace(&self, cookie: u64) -> Option<Namespace> {
        lock(&self.0.namespaces).get(&cookie, 0).ok()
    }

    /// The cookies of all namespaces that the programs know.
    pub(super) fn namespaces(&self) -> Vec<u64> {
        lock(&self.0.namespaces).keys().flatten().collect()
    }

    /// Tells the programs what a namespace is.
    pub(super) fn set_namespace(&self, cookie: u64, namespace: Namespace) -> Result<(), MapError> {
        lock(&self.0.namespaces).insert(cookie, namespace, 0)
    }

    /// Closes a namespace unless the programs know it already, and gives what they knew. The two are one step: it may be enrolled
    /// meanwhile, and must stay so.
    pub(super) fn close_unknown_namespace(&self, cookie: u64) -> Result<Option<Namespace>, MapError> {
        let mut namespaces = lock(&self.0.namespaces);
        let known = namespaces.get(&cookie, 0).ok();
        if known.is_none() {
            namespaces.insert(cookie, Namespace::pending(), 0)?;
        }
        Ok(known)
    }

    /// Makes the programs forget a namespace that is gone.
    pub(super) fn forget_namespace(&self, cookie: u64) {
        let _unknown_already = lock(&self.0.namespaces).remove(&cookie);
    }

    /// Brings the destinations in the kernel to `wanted`, in a time that grows with the difference.
    ///
    /// # Errors
    /// The first entry that the kernel refused; the others are applied all the same.
    pub(super) fn sync_destinations(&self, wanted: &Destinations) -> Result<(), MapError> {
        let mut destinations = lock(&self.0.destinations);
        let (table, held) = &mut *destinations;
        let (mut result, mut refused) = (Ok(()), Vec::new());
        // Ports of their own before the rest of an address, when they come and when they go.
        for rest in [false, true] {
            for item in held.diff(wanted) {
                let (DiffItem::Add(key, destination) | DiffItem::Update { new: (key, destination), .. }) = item else { continue };
                if (key.1 == 0) != rest {
                    continue;
                }
                if let Err(error) = table.insert(Endpoint::new(key.0.into(), key.1), dispatch(*destination) as u32, 0) {
                    result = result.and(Err(error));
                    refused.push(*key);
                }
            }
        }
        for rest in [false, true] {
            for item in held.diff(wanted) {
                let DiffItem::Remove(key, _) = item else { continue };
                if (key.1 == 0) != rest {
                    continue;
                }
                match table.remove(&Endpoint::new(key.0.into(), key.1)) {
                    Ok(()) | Err(MapError::KeyNotFound) => {}
                    Err(error) => {
                        result = result.and(Err(error));
                        refused.push(*key);
                    }
                }
            }
        }
        *held = applied(held, wanted, &refused);
        result
    }

    /// Brings the cluster's ranges in the kernel to `wanted`.
    ///
    /// # Errors
    /// The first entry that the kernel refused.
    pub(super) fn sync_cluster_ranges(&self, wanted: &[IpNet]) -> Result<(), MapError> {
        let mut ranges = lock(&self.0.cluster_ranges);
        let (trie, held) = &mut *ranges;
        let wanted: BTreeSet<Prefix> = wanted.iter().map(prefix).collect();
        for new in wanted.difference(&held.clone()) {
            trie.insert(&Key::new(new.0, new.1), 1, 0)?;
            held.insert(*new);
        }
        for old in held.clone().difference(&wanted) {
            trie.remove(&Key::new(old.0, old.1))?;
            held.remove(old);
        }
        Ok(())
    }

    /// Brings what `address` takes in plaintext to `wanted`; nothing wanted refuses everything.
    ///
    /// # Errors
    /// The first entry that the kernel refused. What was not applied is refused or as it was.
    pub(super) fn set_admissions(&self, address: IpAddr, wanted: &PortAdmissions) -> Result<(), MapError> {
        let mut admissions = lock(&self.0.admissions);
        let (table, held) = &mut *admissions;
        let held = held.entry(address).or_default();
        for (port, admission) in admission_changes(held, wanted) {
            let endpoint = Endpoint::new(address.into(), port);
            match admission {
                Some(admission) => {
                    table.insert(endpoint, admission as u32, 0)?;
                    held.insert(port, admission);
                }
                None => {
                    let _evicted_already = table.remove(&endpoint);
                    held.remove(&port);
                }
            }
        }
        Ok(())
    }

    /// The addresses that plaintext is ruled on for.
    pub(super) fn admitted_addresses(&self) -> Vec<IpAddr> {
        lock(&self.0.admissions).1.keys().copied().collect()
    }

    /// Forgets an address altogether.
    pub(super) fn forget_admissions(&self, address: IpAddr) {
        let _refused_all_the_same = self.set_admissions(address, &PortAdmissions::new());
        lock(&self.0.admissions).1.remove(&address);
    }

    /// Steers the connections of `kind` to `address` to a listening socket.
    pub(super) fn set_listener(&self, address: IpAddr, kind: ListenerKind, socket: &TcpListener) -> Result<(), MapError> {
        lock(&self.0.listeners).insert(key(address, kind), socket.as_raw_fd(), 0)
    }

    /// Steers nothing to `address` any more.
    pub(super) fn forget_listeners(&self, address: IpAddr) {
        let mut listeners = lock(&self.0.listeners);
        for kind in ListenerKind::ALL {
            let _gone_with_its_socket = listeners.remove(&key(address, kind));
        }
    }
}

/// What is in the kernel when all of `wanted` was applied to `held` but some entries. It shares its parts with `wanted`, so that it
/// costs next to nothing beside it, and what comes to differ is found without looking at the rest.
fn applied(held: &Destinations, wanted: &Destinations, refused: &[(IpAddr, u16)]) -> Destinations {
    let mut applied = wanted.clone();
    for key in refused {
        match held.get(key) {
            Some(former) => drop(applied.insert(*key, *former)),
            None => drop(applied.remove(key)),
        }
    }
    applied
}

/// The changes from `held` to `wanted`, in an order in which no port is ever ruled on by anything but its old or its new entry.
fn admission_changes(held: &PortAdmissions, wanted: &PortAdmissions) -> Vec<(u16, Option<Admission>)> {
    let changed = |port: &u16, admission: &Admission| held.get(port) != Some(admission);
    let new = wanted.iter().filter(|(port, admission)| changed(port, admission)).map(|(port, new)| (*port, Some(*new)));
    let (rest, own): (Vec<_>, Vec<_>) = new.partition(|(port, _)| *port == 0);
    let gone = held.keys().filter(|port| !wanted.contains_key(port)).map(|port| (*port, None));
    own.into_iter().chain(rest).chain(gone).collect()
}

fn dispatch(destination: Destination) -> Dispatch {
    match destination {
        Destination::Capture => Dispatch::Capture,
        Destination::Pass => Dispatch::Pass,
        Destination::Refuse => Dispatch::Refuse,
    }
}

fn key(address: IpAddr, kind: ListenerKind) -> ListenerKey {
    let role = match kind {
        ListenerKind::Outbound => ListenerRole::Outbound,
        ListenerKind::Plaintext => ListenerRole::Plaintext,
        ListenerKind::Hbone => ListenerRole::Hbone,
    };
    ListenerKey::new(address.into(), role)
}

fn prefix(range: &IpNet) -> Prefix {
    let mapped = if range.network().is_ipv4() { 96 } else { 0 };
    (mapped + u32::from(range.prefix_len()), Address::from(range.network()).octets())
}

fn held_destinations(table: &HashMap<MapData, Endpoint, u32>) -> Result<Destinations, MapError> {
    let entry = |(endpoint, dispatch): (Endpoint, u32)| {
        let destination = match Dispatch::from_u32(dispatch) {
            Dispatch::Pass => Destination::Pass,
            Dispatch::Capture => Destination::Capture,
            Dispatch::Refuse => Destination::Refuse,
        };
        ((endpoint.address().into(), endpoint.port()), destination)
    };
    table.iter().map(|item| item.map(entry)).collect()
}

fn held_admissions(table: &HashMap<MapData, Endpoint, u32>) -> Result<BTreeMap<IpAddr, PortAdmissions>, MapError> {
    let mut held = BTreeMap::<_, PortAdmissions>::new();
    for item in table.iter() {
        let (endpoint, admission) = item?;
        held.entry(endpoint.address().into()).or_default().insert(endpoint.port(), Admission::from_u32(admission));
    }
    Ok(held)
}

pub(super) fn table<T: TryFrom<Map, Error = MapError>>(ebpf: &mut Ebpf, name: &'static str) -> Result<T, CaptureError> {
    let map = ebpf.take_map(name).ok_or(CaptureError::NoMap { map: name })?;
    T::try_from(map).map_err(failed(name))
}

pub(super) fn failed(map: &'static str) -> impl Fn(MapError) -> CaptureError {
    move |source| CaptureError::Map { map, source }
}

/// The tables are valid after every single step, also after one that panicked.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `CLOCK_MONOTONIC` in ns, as the programs read it.
pub(super) fn monotonic() -> io::Result<u64> {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)?;
    Ok(now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64)
}

/// A process's name as the kernel keeps it: 15 bytes at most, filled up with zeros to 16.
fn process_name(name: &str) -> [u8; 16] {
    let mut kept = [0; 16];
    kept.iter_mut().zip(name.bytes().take(15)).for_each(|(kept, byte)| *kept = byte);
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    fn effective(entries: &PortAdmissions, port: u16) -> Admission {
        entries.get(&port).or_else(|| entries.get(&0)).copied().unwrap_or(Admission::Drop)
    }

    #[test]
    fn a_process_name_is_what_the_kernel_keeps_of_it() {
        assert_eq!(&process_name("kubelet"), b"kubelet\0\0\0\0\0\0\0\0\0");
        assert_eq!(&process_name("a-kubelet-of-a-long-name"), b"a-kubelet-of-a-\0");
    }

    #[test]
    fn no_step_of_a_change_rules_on_a_port_as_neither_before_nor_after() {
        let choices = [None, Some(Admission::Drop), Some(Admission::Pass), Some(Admission::Steer)];
        let tables: Vec<PortAdmissions> = (0..64)
            .map(|n: usize| {
                let entry = |port: u16, choice: usize| choices[choice % 4].map(|admission| (port, admission));
                [entry(0, n), entry(80, n / 4), entry(81, n / 16)].into_iter().flatten().collect()
            })
            .collect();
        for old in &tables {
            for new in &tables {
                let mut now = old.clone();
                for (port, admission) in admission_changes(old, new) {
                    match admission {
                        Some(admission) => drop(now.insert(port, admission)),
                        None => drop(now.remove(&port)),
                    }
                    for port in [80, 81, 82] {
                        let seen = effective(&now, port);
                        assert!(
                            seen == effective(old, port) || seen == effective(new, port) || seen == Admission::Drop,
                            "{old:?} -> {new:?}: port {port} was {seen:?}"
                        );
                    }
                }
                assert_eq!(&now, new);
            }
        }
    }

    #[test]
    fn an_ipv4_range_is_kept_as_a_mapped_one() {
        let (length, octets) = prefix(&"10.2.3.4/16".parse::<IpNet>().expect("a range"));
        assert_eq!(length, 112);
        assert_eq!(
            IpAddr::from(std::net::Ipv6Addr::from(octets)).to_canonical(),
            "10.2.0.0".parse::<IpAddr>().expect("an address")
        );
        assert_eq!(prefix(&"fd00::/8".parse().expect("a range")).0, 8);
    }
}
