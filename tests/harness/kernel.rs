//! What an agent holds: in the kernel, and of its own.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use aya::maps::{HashMap, Map, MapData, SockHash};

use crate::Mesh;

/// What an agent holds, by kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holdings {
    /// Entries of each of its maps that does not forget by itself; of namespaces those that are, or may be, its node's pods: all others of
    /// the machine are known as none, whosever they are.
    pub entries: BTreeMap<&'static str, usize>,
    /// Links pinned for pods.
    pub links: usize,
    /// Descriptors of its process.
    pub descriptors: usize,
}

/// What the agent of a node holds now.
///
/// # Panics
/// When it does not run.
#[must_use]
pub fn holdings(mesh: &Mesh, node: usize) -> Holdings {
    let (pins, process) = (mesh.pin_dir(node), mesh.agent_process(node).expect("the agent runs"));
    let map = |name: &str| MapData::from_pin(pins.join(name)).expect("a pinned map");
    let entries = [
        ("ADMISSIONS", hash::<20, 4>(map("ADMISSIONS"))),
        ("CONNECTIONS", hash::<40, 128>(map("CONNECTIONS"))),
        ("DESTINATIONS", hash::<20, 4>(map("DESTINATIONS"))),
        ("LISTENERS", sockets(map("LISTENERS"))),
        ("NAMESPACES", pods(map("NAMESPACES"))),
        ("UNTOLD", hash::<8, 128>(map("UNTOLD"))),
    ];
    Holdings {
        entries: entries.into(),
        links: fs::read_dir(pins.join("pods")).expect("a directory").count(),
        descriptors: fs::read_dir(format!("/proc/{process}/fd")).expect("the agent runs").count(),
    }
}

/// What the programs of a node do with an address and port, as one of their tables says: `DESTINATIONS` of those that pods dial
/// (0 lets pass, 1 captures), `ADMISSIONS` of plaintext that comes to pods (0 refuses, 1 lets in, 2 steers to the agent).
#[derive(Clone, Debug)]
pub struct Rulings(BTreeMap<(IpAddr, u16), u32>);

impl Rulings {
    /// What a table says now.
    ///
    /// # Panics
    /// When the agent has pinned no such table.
    #[must_use]
    pub fn read(mesh: &Mesh, node: usize, table: &str) -> Self {
        let data = MapData::from_pin(mesh.pin_dir(node).join(table)).expect("a pinned map");
        let map = HashMap::<_, [u8; 20], [u8; 4]>::try_from(Map::HashMap(data)).expect("a map of this layout");
        let place = |key: [u8; 20]| {
            let address: [u8; 16] = *key.first_chunk().expect("16 of 20 bytes");
            (Ipv6Addr::from(address).to_canonical(), u16::from_ne_bytes([key[16], key[17]]))
        };
        Self(map.iter().flatten().map(|(key, ruling)| (place(key), u32::from_ne_bytes(ruling))).collect())
    }

    /// What it says of a place: the port's own word, or that of the address.
    #[must_use]
    pub fn of(&self, place: SocketAddr) -> Option<u32> {
        self.0.get(&(place.ip(), place.port())).or_else(|| self.0.get(&(place.ip(), 0))).copied()
    }
}

fn hash<const KEY: usize, const VALUE: usize>(data: MapData) -> usize {
    HashMap::<_, [u8; KEY], [u8; VALUE]>::try_from(Map::HashMap(data)).expect("a map of this layout").keys().flatten().count()
}

/// How many namespaces are not exempt, whose state is 0.
fn pods(data: MapData) -> usize {
    let namespaces = HashMap::<_, [u8; 8], [u8; 48]>::try_from(Map::HashMap(data)).expect("a map of this layout");
    namespaces.iter().flatten().filter(|(_, namespace)| !namespace.starts_with(&[0; 4])).count()
}

fn sockets(data: MapData) -> usize {
    SockHash::<_, [u8; 20]>::try_from(Map::SockHash(data)).expect("a map of this layout").keys().flatten().count()
}
