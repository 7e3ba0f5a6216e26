//! The work of enrolment that blocks: entering namespaces, making sockets, attaching programs.
//!
//! Runs on threads that may block, a few at a time. Each piece either completes or leaves the namespace closed.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aya::maps::MapError;
use culvert_ebpf_common::{Address, Namespace, NamespaceState};

use super::classify::admissions;
use crate::capture::load::LookupProgram;
use crate::capture::netns::{self, AddressWatch, Netns};
use crate::capture::routing::{Routing, RoutingLease};
use crate::capture::{CaptureError, ListenerKind, Maps};
use crate::model::{Snapshot, Workload};

/// Why a namespace could not be opened or enrolled.
#[derive(Debug, thiserror::Error)]
pub(super) enum SetupError {
    /// The namespace cannot be opened or entered.
    #[error("network namespace {}: {source}", path.display())]
    Open { path: PathBuf, source: io::Error },
    /// The namespace's routing cannot be set up.
    #[error("routing for deliveries: {0}; CAP_NET_ADMIN and a writable /proc/sys/net are needed")]
    Routing(#[source] io::Error),
    /// A listener cannot be made.
    #[error("listener inside of the pod: {0}")]
    Listener(#[source] io::Error),
    /// The kernel refused an entry of a map.
    #[error("the kernel's tables: {0}; are there more pods on the node than they hold?")]
    Map(#[from] MapError),
    /// The program cannot be attached.
    #[error(transparent)]
    Attach(#[from] CaptureError),
}

/// A namespace that was opened.
pub(super) struct Opened {
    pub(super) netns: Netns,
    pub(super) watch: AddressWatch,
    pub(super) addresses: BTreeSet<IpAddr>,
    /// What the programs held it for before.
    pub(super) former: Option<NamespaceState>,
}

/// Opens a namespace. One that the programs do not know is closed at once, if so asked. None: it is no namespace.
pub(super) fn open(path: &Path, maps: &Maps, close: bool) -> Result<Option<Opened>, SetupError> {
    let failed = |source| SetupError::Open { path: path.to_owned(), source };
    let Some(netns) = Netns::open(path).map_err(failed)? else { return Ok(None) };
    let known = if close { maps.close_unknown_namespace(netns.cookie())? } else { maps.namespace(netns.cookie()) };
    let former = known.map(|namespace| namespace.state());
    let watch = netns.enter(AddressWatch::open_here).map_err(failed)?;
    let addresses = watch.addresses().map_err(failed)?;
    Ok(Some(Opened { netns, watch, addresses, former }))
}

/// Listening sockets, each with what is steered to it and the pod's address that it serves.
type Sockets = Vec<(ListenerKind, IpAddr, TcpListener)>;

/// What an enrolment has made.
pub(super) struct Enrolled {
    pub(super) generation: u64,
    pub(super) routing: RoutingLease,
    pub(super) listeners: Sockets,
}

/// All that enrolling takes.
pub(super) struct Enrolment {
    pub(super) netns: Netns,
    pub(super) workload: Arc<Workload>,
    pub(super) snapshot: Arc<Snapshot>,
    pub(super) routing: Routing,
    pub(super) maps: Maps,
    pub(super) generation: u64,
    pub(super) lookup: LookupProgram,
    pub(super) runtime: tokio::runtime::Handle,
}

impl Enrolment {
    /// Enrols the pod. Its connections are let go only when all else is in place.
    pub(super) fn run(&self) -> Result<Enrolled, SetupError> {
        let addresses = &self.workload.addresses;
        let (routing, listeners) = self.enter()?;
        let wanted = admissions(&self.workload, &self.snapshot);
        for (kind, address, socket) in &listeners {
            self.maps.set_listener(*address, *kind, socket)?;
        }
        for address in addresses {
            self.maps.set_admissions(*address, &wanted)?;
        }
        self.lookup.attach(&self.netns)?;
        self.maps.set_namespace(self.netns.cookie(), enrolled(addresses, self.generation))?;
        Ok(Enrolled { generation: self.generation, routing, listeners })
    }

    fn enter(&self) -> Result<(RoutingLease, Sockets), SetupError> {
        let inside = self.netns.enter(|| {
            let routing = self.routing.set_up_here(&self.netns, &self.workload.addresses, &self.runtime);
            let routing = match routing {
                Ok(routing) => routing,
                Err(error) => return Ok(Err(SetupError::Routing(error))),
            };
            let pairs = self.workload.addresses.iter().flat_map(|address| ListenerKind::ALL.map(|kind| (kind, *address)));
            let listeners = pairs.map(|(kind, address)| Ok((kind, address, netns::listen_here(address.is_ipv4())?)));
            Ok(listeners.collect::<io::Result<_>>().map(|listeners| (routing, listeners)).map_err(SetupError::Listener))
        });
        inside.map_err(|source| SetupError::Open { path: format!("inode {}", self.netns.inode()).into(), source })?
    }
}

/// What the programs are told of the namespace of a pod with these addresses.
pub(super) fn enrolled(addresses: &[IpAddr], generation: u64) -> Namespace {
    let own = |v4: bool| {
        let address = addresses.iter().find(|address| address.is_ipv4() == v4);
        address.map_or(Address::UNSPECIFIED, |address| Address::from(*address))
    };
    Namespace::enrolled(own(true), own(false), generation)
}
