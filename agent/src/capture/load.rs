//! Loads the programs, attaches them, and takes over from a predecessor.
//!
//! Enters: the embedded object and the operator's choice of directories. Leaves: attached programs whose links and maps are pinned,
//! so that they stay in force when the agent is gone. The new programs are attached before the old ones are detached, and
//! both decide from the same maps: there is never a moment without programs.

use std::fs::{self, File};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use aya::maps::{MapData, MapInfo, RingBuf};
use aya::programs::links::FdLink;
use aya::programs::{CgroupAttachMode, CgroupSockAddr, Program, ProgramError, SkLookup, SockOps};
use aya::util::KernelVersion;
use aya::{Ebpf, EbpfLoader};
use culvert_ebpf_common::LAYOUT;
use futures_util::future::BoxFuture;
use tokio::io::Interest;

use super::cgroup::CgroupRoot;
use super::maps::Maps;
use super::{CaptureError, LoadConfig, Netns, SameNodeEvents, SameNodeMaps, bpffs, mounts, others, probe, readiness, routing};

/// The programs, as `agent/build.rs` compiled them. Empty in a build without a compiler for them.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/culvert-ebpf"));

const PINNED_MAPS: [&str; 20] = [
    "SETTINGS",
    "AGENT_PROCESSES",
    "NAMESPACES",
    others::CLAIMED,
    "DESTINATIONS",
    "CLUSTER_RANGES",
    "SOCKETS",
    "CAPTURED",
    "DELIVERIES",
    "VERDICTS",
    "CONNECTIONS",
    "CONNECTION_EVENTS",
    "UNTOLD",
    "KUBELET_NAMES",
    "KUBELET_SOCKETS",
    "KUBELET_FLOWS",
    "ADMISSIONS",
    "LISTENERS",
    "OUTCOMES",
    "EVENTS",
];
const CGROUP_PROGRAMS: [&str; 5] = ["connect4", "connect6", "getpeername4", "getpeername6", "sock_ops"];
/// What knows the kubelet, at the root of the node's tree.
const NODE_PROGRAMS: [&str; 3] = ["kubelet_connect4", "kubelet_connect6", "kubelet_sock_ops"];
const LOOKUP_PROGRAM: &str = "socket_lookup";
/// Links of pods, by the cookie of their network namespace.
const PODS: &str = "pods";
/// The name under which a link is pinned until it takes its predecessor's place.
const NEXT: &str = "-next";
/// Where the agent's own socket connects to be noted: the discard port, which need not be open.
const NOWHERE: ([u8; 4], u16) = ([127, 0, 0, 1], 9);

/// What is loaded and attached.
pub(super) struct Loaded {
    pub(super) maps: Maps,
    pub(super) lookup: LookupProgram,
    pub(super) events: RingBuf<MapData>,
    pub(super) same_node: SameNodeMaps,
    pub(super) same_node_events: Option<SameNodeEvents>,
    /// Writes what the programs log to the agent's log, for ever.
    pub(super) program_log: BoxFuture<'static, ()>,
    /// The agent's own namespace.
    pub(super) own: Netns,
    /// The number of the map in which it is told of other agents' pods.
    pub(super) claimed_id: u32,
    /// Whether unseen namespaces are refused for ever, without the agent's doing.
    pub(super) dedicated: bool,
    /// The cgroup that a kubelet keeps pods in, and nothing else.
    pub(super) pods_cgroup: Option<PathBuf>,
}

/// The `sk_lookup` program, to be attached to each pod.
#[derive(Clone)]
pub(super) struct LookupProgram {
    ebpf: Arc<Mutex<Ebpf>>,
    pins: PathBuf,
}

/// Loads and attaches everything; see the module's documentation.
pub(super) fn load(config: &LoadConfig) -> Result<Loaded, CaptureError> {
    if OBJECT.is_empty() {
        return Err(CaptureError::NoPrograms);
    }
    let missing = probe::missing(&probe::features());
    if !missing.is_empty() {
        return Err(CaptureError::Kernel { release: probe::release(), missing });
    }
    let own = Netns::current().map_err(CaptureError::OwnNetns)?;
    let cgroup = CgroupRoot::open(config.cgroup_root.as_deref())?;
    let pins = prepare_pins(&config.bpf_dir.join(directory_of(&config.node)))
        .map_err(|source| CaptureError::Pins { path: config.bpf_dir.clone(), source })?;
    let mut ebpf = load_object(&pins, cgroup.node.as_ref().map_or(0, |node| node.pods))?;
    let maps = Maps::take(&mut ebpf)?;
    let events = take_events(&mut ebpf)?;
    let same_node = SameNodeMaps::take(&mut ebpf)?;
    let same_node_events = Some(SameNodeEvents::take(&mut ebpf)?);
    let claimed_id = MapInfo::from_pin(pins.join(others::CLAIMED)).map(|map| map.id());
    let claimed_id = claimed_id.map_err(|source| CaptureError::Map { map: others::CLAIMED, source })?;
    initialise(&maps, &own, cgroup.dedicated)?;
    succeed_other_layouts(&maps, &pins).map_err(|source| CaptureError::Pins { path: pins.clone(), source })?;
    for name in CGROUP_PROGRAMS {
        attach(&mut ebpf, name, &cgroup.directory, &pins)?;
    }
    attach_to_node(&mut ebpf, &maps, &cgroup, config, &pins)?;
    tracing::info!(cgroup = %cgroup.path().display(), dedicated = cgroup.dedicated, kubelet = cgroup.node.is_some(), "programs attached");
    lookup_program(&mut ebpf)?.load().map_err(refused(LOOKUP_PROGRAM))?;
    note_this_process(&maps, &cgroup, &config.node)?;
    // Only now: the logger takes a map that the programs name until they are loaded.
    let program_log = program_log(&mut ebpf);
    let lookup = LookupProgram { ebpf: Arc::new(Mutex::new(ebpf)), pins: pins.join(PODS) };
    let pods_cgroup = cgroup.node.is_some().then(|| cgroup.path().to_owned());
    Ok(Loaded {
        maps,
        lookup,
        events,
        same_node,
        same_node_events,
        program_log,
        own,
        claimed_id,
        dedicated: cgroup.dedicated,
        pods_cgroup,
    })
}

fn program_log(ebpf: &mut Ebpf) -> BoxFuture<'static, ()> {
    let logger = aya_log::EbpfLogger::init(ebpf);
    Box::pin(async move {
        let logger = logger.map_err(io::Error::other);
        let Ok(mut logger) = logger.and_then(|logger| readiness::register(logger, Interest::READABLE)) else {
            tracing::debug!("the programs' own log is not read");
            return std::future::pending().await;
        };
        while let Ok(mut ready) = logger.readable_mut().await {
            ready.get_inner_mut().flush();
            ready.clear_ready();
        }
    })
}

/// The name of a node's directory: bpffs takes no dots.
fn directory_of(node: &str) -> String {
    node.replace('.', "_")
}

fn prepare_pins(directory: &Path) -> io::Result<PathBuf> {
    let pins = bpffs::prepare(directory)?.join(format!("v{LAYOUT}"));
    fs::create_dir_all(pins.join(PODS))?;
    Ok(pins)
}

/// Takes over what an agent of another layout has left attached: two layouts beside each other would each take the other's connections for
/// strangers'. Its links get this layout's names, under which they are replaced as any predecessor's; its pods are closed until they are
/// enrolled anew; its maps go.
fn succeed_other_layouts(maps: &Maps, pins: &Path) -> io::Result<()> {
    let layouts = fs::read_dir(pins.parent().unwrap_or(pins))?.collect::<Result<Vec<_>, _>>()?;
    // The root of a bpffs has files of the kernel's own.
    for layout in layouts.into_iter().map(|entry| entry.path()).filter(|layout| layout != pins && layout.join(PODS).is_dir()) {
        for pod in fs::read_dir(layout.join(PODS)).into_iter().flatten().flatten() {
            if let Some(cookie) = pod.file_name().to_str().and_then(|name| name.parse().ok()) {
                maps.close_unknown_namespace(cookie).map_err(io::Error::other)?;
            }
            fs::rename(pod.path(), pins.join(PODS).join(pod.file_name()))?;
        }
        for name in CGROUP_PROGRAMS.iter().chain(&NODE_PROGRAMS) {
            unless_missing(fs::rename(layout.join(name), pins.join(name)))?;
        }
        fs::remove_dir_all(&layout)?;
        tracing::info!(layout = %layout.display(), "taken over from an agent of another version");
    }
    Ok(())
}

/// Has the kubelet's connections known, where there is one.
fn attach_to_node(
    ebpf: &mut Ebpf,
    maps: &Maps,
    cgroup: &CgroupRoot,
    config: &LoadConfig,
    pins: &Path,
) -> Result<(), CaptureError> {
    let Some(node) = &cgroup.node else {
        // A predecessor may have known one.
        let removed = NODE_PROGRAMS.iter().try_for_each(|name| remove_pin(&pins.join(name)));
        return removed.map_err(|source| CaptureError::Pins { path: pins.to_owned(), source });
    };
    let failed = |source| CaptureError::Map { map: "KUBELET_NAMES", source };
    maps.set_kubelet_names(&config.kubelet_names).map_err(failed)?;
    NODE_PROGRAMS.into_iter().try_for_each(|name| attach(ebpf, name, &node.directory, pins))
}

fn load_object(pins: &Path, pods_cgroup: u64) -> Result<Ebpf, CaptureError> {
    let has_set_retval = u32::from(KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(5, 18, 0)));
    let mut loader = EbpfLoader::new();
    loader.override_global("HAS_SET_RETVAL", &has_set_retval, true);
    loader.override_global("PODS_CGROUP", &pods_cgroup, true);
    for name in PINNED_MAPS {
        loader.map_pin_path(name, pins.join(name));
    }
    Ok(loader.load(OBJECT)?)
}

fn take_events(ebpf: &mut Ebpf) -> Result<RingBuf<MapData>, CaptureError> {
    let map = ebpf.take_map("EVENTS").ok_or(CaptureError::NoMap { map: "EVENTS" })?;
    RingBuf::try_from(map).map_err(|source| CaptureError::Map { map: "EVENTS", source })
}

/// What the programs must know before they are attached. On a tree of its own, what was not seen is refused from the start.
fn initialise(maps: &Maps, own: &Netns, dedicated: bool) -> Result<(), CaptureError> {
    let first = Netns::open(Path::new("/proc/1/ns/net")).ok().flatten();
    let change = |settings: &mut culvert_ebpf_common::Settings| {
        settings.host_cookies = [first.map_or(own.cookie(), |netns| netns.cookie()), own.cookie()];
        settings.agent_mark = 0;
        if dedicated {
            settings.refuse_unseen_until_ns = u64::MAX;
        }
    };
    maps.set(change).map_err(|source| CaptureError::Map { map: "SETTINGS", source })
}

/// Attaches a program to the cgroup, and puts its link in the place of the predecessor's, which detaches that.
fn attach(ebpf: &mut Ebpf, name: &'static str, cgroup: &File, pins: &Path) -> Result<(), CaptureError> {
    let program = ebpf.program_mut(name).ok_or(CaptureError::NoProgram { program: name })?;
    // A link takes no flags: programs that are attached by links always run beside each other.
    let mode = CgroupAttachMode::Single;
    let link: FdLink = if let Program::SockOps(program) = program {
        let program: &mut SockOps = program;
        program.load().map_err(refused(name))?;
        let id = program.attach(cgroup, mode).map_err(refused(name))?;
        let link = program.take_link(id).map_err(refused(name))?;
        link.try_into().map_err(|source| CaptureError::Link { program: name, source })?
    } else {
        let program: &mut CgroupSockAddr = program.try_into().map_err(refused(name))?;
        program.load().map_err(refused(name))?;
        let id = program.attach(cgroup, mode).map_err(refused(name))?;
        let link = program.take_link(id).map_err(refused(name))?;
        link.try_into().map_err(|source| CaptureError::Link { program: name, source })?
    };
    pin(link, pins, name).map_err(|source| CaptureError::Pins { path: pins.join(name), source })
}

/// Pins a link under `name`. One that is there is replaced, and so detached, without a moment in which neither is attached.
fn pin(link: FdLink, directory: &Path, name: &str) -> io::Result<()> {
    let next = directory.join(format!("{name}{NEXT}"));
    match fs::remove_file(&next) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    link.pin(&next).map_err(io::Error::other)?;
    fs::rename(&next, directory.join(name))
}

fn lookup_program(ebpf: &mut Ebpf) -> Result<&mut SkLookup, CaptureError> {
    let program = ebpf.program_mut(LOOKUP_PROGRAM).ok_or(CaptureError::NoProgram { program: LOOKUP_PROGRAM })?;
    program.try_into().map_err(refused(LOOKUP_PROGRAM))
}

fn refused(program: &'static str) -> impl Fn(ProgramError) -> CaptureError {
    move |source| CaptureError::Program { program, source }
}

/// Has the programs note this process as the agent. They alone know its number as the kernel counts; and only who can read the
/// settings map knows the mark by which they tell it.
fn note_this_process(maps: &Maps, cgroup: &CgroupRoot, node: &str) -> Result<(), CaptureError> {
    let table = |map| move |source| CaptureError::Map { map, source };
    maps.age_agents().map_err(table("AGENT_PROCESSES"))?;
    let mark = rand::random_range(1..=u32::MAX);
    maps.set(|settings| settings.agent_mark = mark).map_err(table("SETTINGS"))?;
    let noted = connect_marked(mark).map_err(CaptureError::Mark).and_then(|()| match maps.noted_agent() {
        Some(process) => Ok(process),
        None => {
            // The hooks do not run for this process: it is outside of the cgroup that they are attached to.
            cgroup.adopt_self(&format!("culvert-agent-{node}"))?;
            connect_marked(mark).map_err(CaptureError::Mark)?;
            maps.noted_agent().ok_or(CaptureError::NotNoted)
        }
    });
    maps.set(|settings| settings.agent_mark = 0).map_err(table("SETTINGS"))?;
    maps.forget_former_agents(noted?).map_err(table("AGENT_PROCESSES"))
}

/// Only has the programs run: whether there is somebody to connect to does not matter.
fn connect_marked(mark: u32) -> io::Result<()> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM.nonblocking(), None)?;
    socket.set_mark(mark)?;
    let _refused_or_in_progress = socket.connect(&SocketAddr::from(NOWHERE).into());
    Ok(())
}

impl LookupProgram {
    /// Attaches the program to a pod's namespace; the link stays when the agent is gone.
    pub(super) fn attach(&self, netns: &Netns) -> Result<(), CaptureError> {
        let mut ebpf = self.ebpf.lock().unwrap_or_else(PoisonError::into_inner);
        let program = lookup_program(&mut ebpf)?;
        let id = program.attach(netns).map_err(refused(LOOKUP_PROGRAM))?;
        let link = program.take_link(id).map_err(refused(LOOKUP_PROGRAM))?;
        drop(ebpf);
        let name = netns.cookie().to_string();
        pin(link.into(), &self.pins, &name).map_err(|source| CaptureError::Pins { path: self.pins.join(name), source })
    }

    /// Detaches the program from a pod's namespace.
    pub(super) fn detach(&self, cookie: u64) -> io::Result<()> {
        match fs::remove_file(self.pins.join(cookie.to_string())) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// The cookies of the namespaces that a link is pinned for.
    pub(super) fn attached(&self) -> Vec<u64> {
        let entries = fs::read_dir(&self.pins).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
    }
}

/// Takes everything of the agent of `node` below `bpf_dir` out of the kernel: programs, maps, and the routing in pods. For a node
/// that leaves the mesh; connections that the agent carries must have ended.
///
/// # Errors
/// All steps are tried; the failures, each with its path, are in the error.
pub fn remove(bpf_dir: &Path, node: &str) -> Result<(), CaptureError> {
    let mut failures = Vec::new();
    let Some(found) = bpffs::find(&bpf_dir.join(directory_of(node))) else { return Ok(()) };
    let layouts = match fs::read_dir(&found) {
        Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => {
            failures.push(format!("{}: {error}", found.display()));
            Vec::new()
        }
    };
    let mut attempt = |path: &Path, result: io::Result<()>| {
        if let Err(error) = result {
            failures.push(format!("{}: {error}", path.display()));
        }
    };
    for layout in layouts {
        // Capture first: what is let through then still meets its destination's rules.
        for name in CGROUP_PROGRAMS.iter().chain(&NODE_PROGRAMS) {
            attempt(&layout.join(name), remove_pin(&layout.join(name)));
        }
        attempt(&layout, fs::remove_dir_all(&layout));
    }
    attempt(&found, remove_directory(&found));
    // Agents of other nodes on this kernel may still have theirs.
    if let Some(parent) = found.parent()
        && parent.file_name() == bpf_dir.file_name()
    {
        let _not_empty = fs::remove_dir(parent);
    }
    for mount in mounts::read(Path::new(mounts::OWN)).unwrap_or_default() {
        if mount.netns_inode().is_some()
            && let Ok(Some(netns)) = Netns::open(&mount.point)
        {
            attempt(&mount.point, netns.enter(routing::leave_here));
        }
    }
    if failures.is_empty() { Ok(()) } else { Err(CaptureError::Remove { failures }) }
}

fn remove_pin(path: &Path) -> io::Result<()> {
    unless_missing(fs::remove_file(path))
}

fn remove_directory(path: &Path) -> io::Result<()> {
    unless_missing(fs::remove_dir(path))
}

/// What is not there need not be removed.
fn unless_missing(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
