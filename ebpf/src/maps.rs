//! Every map: its key, its value, who writes it and who reads it. All are pinned by the agent and outlive it.

use aya_ebpf::btf_maps::SkStorage;
use aya_ebpf::macros::{btf_map, map};
use aya_ebpf::maps::lpm_trie::{Key, LpmTrie};
use aya_ebpf::maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf, SockHash};
use culvert_ebpf_common::{
    CONNECTION_EVENTS_LENGTH, Connection, Endpoint, Event, Flow, ListenerKey, Namespace, Outcome, Settings, Socket, Verdict,
    VerdictKey,
};

const NO_PREALLOC: u32 = 1;

/// What the agent says of itself. Written by the agent.
#[map]
pub(crate) static SETTINGS: Array<Settings> = Array::with_max_entries(1, 0);

/// The agent's processes, by thread group, with the cgroup that they were in. Written by `connect`, from whoever knows the agent's mark; trimmed by the agent.
#[map]
pub(crate) static AGENT_PROCESSES: HashMap<u32, u64> = HashMap::with_max_entries(64, 0);

/// Network namespaces by cookie. Written by the agent.
#[map]
pub(crate) static NAMESPACES: HashMap<u64, Namespace> = HashMap::with_max_entries(65_536, NO_PREALLOC);

/// Namespaces that another agent on this kernel answers for, by cookie. Written by those agents.
#[map]
pub(crate) static CLAIMED: LruHashMap<u64, u32> = LruHashMap::with_max_entries(8192, 0);

/// Room for a mesh of 200,000 workloads and 20,000 services, each with two addresses, and the services with ten ports on each.
const MESH: u32 = 1_048_576;
const _: () = assert!(MESH >= 2 * 200_000 + 2 * 20_000 * (10 + 1));

/// The mesh's addresses, by address and port; port 0 stands for every other port. A `Dispatch`. Written by the agent.
#[map]
pub(crate) static DESTINATIONS: HashMap<Endpoint, u32> = HashMap::with_max_entries(MESH, NO_PREALLOC);

/// The ranges of the cluster's pods and services. Written by the agent.
#[map]
pub(crate) static CLUSTER_RANGES: LpmTrie<[u8; 16], u32> = LpmTrie::with_max_entries(16_384, NO_PREALLOC);

/// What is noted of a socket that connects, in the socket itself and for as long as it is there. Written by `connect`; read by `sock_ops`
/// and `getpeername`.
#[btf_map]
pub(crate) static SOCKETS: SkStorage<Socket> = SkStorage::new();

/// Captured connections by source: their original destination. Written by `sock_ops`; read by `sk_lookup`; read and removed by
/// the agent when it has accepted the connection.
#[map]
pub(crate) static CAPTURED: LruHashMap<Endpoint, Endpoint> = LruHashMap::with_max_entries(65_536, 0);

/// The agent's connections to applications in pods. Written and removed by `sock_ops`; read by `sk_lookup` for as
/// long as the handshake takes: which of those that are open are evicted does not matter.
#[map]
pub(crate) static DELIVERIES: LruHashMap<Flow, u32> = LruHashMap::with_max_entries(65_536, 0);

/// What the agent has decided on connections between pods of the node. Written by the agent; read by `connect`. What is evicted is
/// decided again.
#[map]
pub(crate) static VERDICTS: LruHashMap<VerdictKey, Verdict> = LruHashMap::with_max_entries(32_768, 0);

/// Connections between pods of the node that stay in the kernel: who opened each is known. Written and removed by `sock_ops`; read by
/// `sk_lookup` and the agent.
#[map]
pub(crate) static CONNECTIONS: HashMap<Flow, Connection> = HashMap::with_max_entries(262_144, NO_PREALLOC);

/// What happens to those connections. What finds no room is counted.
#[map]
pub(crate) static CONNECTION_EVENTS: RingBuf = RingBuf::with_byte_size(CONNECTION_EVENTS_LENGTH, 0);

/// Those of them whose end found no room among the events, by the cookie of the source's socket. Written by `sock_ops`; read and removed by
/// the agent.
#[map]
pub(crate) static UNTOLD: HashMap<u64, Connection> = HashMap::with_max_entries(262_144, NO_PREALLOC);

/// The names of kubelets' processes, as the kernel keeps them: 16 bytes, filled up with zeros. Written by the agent.
#[map]
pub(crate) static KUBELET_NAMES: HashMap<[u8; 16], u32> = HashMap::with_max_entries(16, 0);

/// The kubelet's sockets that connect, by cookie. Written by `kubelet`'s `connect`; removed by its `sock_ops`.
#[map]
pub(crate) static KUBELET_SOCKETS: LruHashMap<u64, u32> = LruHashMap::with_max_entries(1024, 0);

/// The kubelet's open connections. Written and removed by `kubelet`'s `sock_ops`; read by `sk_lookup`.
#[map]
pub(crate) static KUBELET_FLOWS: LruHashMap<Flow, u32> = LruHashMap::with_max_entries(16_384, 0);

/// What a pod's address and port take in plaintext; port 0 stands for every other port. An `Admission`. Written by the agent.
#[map]
pub(crate) static ADMISSIONS: HashMap<Endpoint, u32> = HashMap::with_max_entries(65_536, NO_PREALLOC);

/// The agent's listening sockets in pods. Written by the agent; an entry goes with its socket.
#[map]
pub(crate) static LISTENERS: SockHash<ListenerKey> = SockHash::with_max_entries(16_384, 0);

/// How often each outcome occurred. Read by the agent.
#[map]
pub(crate) static OUTCOMES: PerCpuArray<u64> = PerCpuArray::with_max_entries(Outcome::ALL.len() as u32, 0);

/// News for the agent. A full buffer loses news, never a decision.
#[map]
pub(crate) static EVENTS: RingBuf = RingBuf::with_byte_size(256 * 1024, 0);

/// Tells the agent.
#[inline(always)]
pub(crate) fn tell(event: &Event) {
    let _lost = EVENTS.output::<Event>(event, 0);
}

/// Whether an address is in one of the cluster's ranges.
#[inline(always)]
pub(crate) fn in_cluster(octets: [u8; 16]) -> bool {
    CLUSTER_RANGES.get(Key::new(128, octets)).is_some()
}
