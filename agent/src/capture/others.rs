//! The other agents on this kernel, where several nodes share one: in tests, in a demo.
//!
//! Enters: the maps that are loaded. Leaves: which namespaces are nodes' own, and word to the others of the pods that are this
//! node's. Each agent refuses what it does not know, so that without that word a pod would wait for every agent to find out that it
//! is none of theirs; and one with the address of a pod of theirs, as pods of another mesh may have, for ever. A pod is on one node:
//! that it is ours is all that the others need to know, and what they have found out by themselves gives way to it. Only who may make
//! maps can pass for an agent here.

use aya::maps::{Array, HashMap, Map, MapData};
use culvert_ebpf_common::Settings;

/// The map in which an agent is told of others' pods.
pub(super) const CLAIMED: &str = "CLAIMED";

/// What is known of the agents on this kernel.
#[derive(Default)]
pub(super) struct Agents {
    /// The cookies of their own namespaces, this agent's included: they are nodes, not pods.
    nodes: Vec<u64>,
    /// What each of the others was told of.
    others: Vec<HashMap<MapData, u64, u32>>,
}

impl Agents {
    /// Finds them all. `own` is the number of this agent's own map of what it was told of.
    pub(super) fn find(own: u32) -> Self {
        let mut agents = Self::default();
        for map in aya::maps::loaded_maps().flatten() {
            let Some(name) = map.name_as_str() else { continue };
            if !matches!(name, "SETTINGS" | CLAIMED) || map.id() == own {
                continue;
            }
            let Ok(data) = MapData::from_id(map.id()) else { continue };
            if name == "SETTINGS" {
                let settings = Array::<_, Settings>::try_from(Map::Array(data)).and_then(|table| table.get(&0, 0));
                let cookies = settings.map_or([0; 2], |settings| settings.host_cookies);
                agents.nodes.extend(cookies.into_iter().filter(|cookie| *cookie != 0));
            } else if let Ok(claimed) = HashMap::try_from(Map::LruHashMap(data)) {
                agents.others.push(claimed);
            }
        }
        agents
    }

    /// Whether a namespace is a node's own.
    pub(super) fn has_node(&self, cookie: u64) -> bool {
        self.nodes.contains(&cookie)
    }

    /// Tells the others that a namespace is a pod of this node's.
    pub(super) fn claim(&mut self, cookie: u64) {
        for claimed in &mut self.others {
            let _it_has_ended = claimed.insert(cookie, 1, 0);
        }
    }

    /// Tells the others that a namespace is gone.
    pub(super) fn disclaim(&mut self, cookie: u64) {
        for claimed in &mut self.others {
            let _unknown_already = claimed.remove(&cookie);
        }
    }
}
