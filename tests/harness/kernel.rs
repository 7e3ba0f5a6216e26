//! What an agent holds: in the kernel, and of its own.

use std::collections::BTreeMap;
use std::fs;

use aya::maps::{HashMap, Map, MapData, SockHash};

use crate::Mesh;

/// What an agent holds, by kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holdings {
    /// Entries of each of its maps that does not forget by itself.
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
        ("DESTINATIONS", hash::<20, 4>(map("DESTINATIONS"))),
        ("LISTENERS", sockets(map("LISTENERS"))),
        ("NAMESPACES", hash::<8, 40>(map("NAMESPACES"))),
    ];
    Holdings {
        entries: entries.into(),
        links: fs::read_dir(pins.join("pods")).expect("a directory").count(),
        descriptors: fs::read_dir(format!("/proc/{process}/fd")).expect("the agent runs").count(),
    }
}

fn hash<const KEY: usize, const VALUE: usize>(data: MapData) -> usize {
    HashMap::<_, [u8; KEY], [u8; VALUE]>::try_from(Map::HashMap(data)).expect("a map of this layout").keys().flatten().count()
}

fn sockets(data: MapData) -> usize {
    SockHash::<_, [u8; 20]>::try_from(Map::SockHash(data)).expect("a map of this layout").keys().flatten().count()
}
