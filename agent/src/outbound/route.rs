//! Where a captured connection goes: pure, from the snapshot alone.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::model::{CloseReason, OriginalDst, Service, Snapshot, Workload};

/// Where a captured connection goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// Through a tunnel to `workload`, whose agent reaches `target` for us.
    Tunnel {
        /// The destination.
        workload: Arc<Workload>,
        /// The destination's address and the port that its application listens on.
        target: SocketAddr,
        /// The service that was dialled, if one was.
        service: Option<Arc<Service>>,
    },
    /// Straight to an application in the source pod itself.
    Local {
        /// The pod's own address and the port that its application listens on.
        target: SocketAddr,
        /// The service that was dialled, if one was.
        service: Option<Arc<Service>>,
    },
    /// To a destination that takes no tunnels.
    Passthrough {
        /// The address and port.
        target: SocketAddr,
        /// The destination, if it is a workload that is known.
        workload: Option<Arc<Workload>>,
        /// The service that was dialled, if one was.
        service: Option<Arc<Service>>,
    },
}

/// Whose turn it is among a service's endpoints.
#[derive(Debug, Default)]
pub struct RoundRobin(Mutex<HashMap<Arc<str>, Arc<AtomicUsize>>>);

impl RoundRobin {
    /// The number of the service's next turn.
    fn turn(&self, service: &Arc<str>) -> usize {
        let counter = {
            let mut counters = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(counters.entry(Arc::clone(service)).or_default())
        };
        counter.fetch_add(1, Ordering::Relaxed)
    }

    /// Forgets services that are gone.
    pub fn sweep(&self, snapshot: &Snapshot) {
        let mut counters = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        counters.retain(|service, _| snapshot.endpoints(service).is_some());
    }
}

/// Where a connection of `source` to `original_dst` goes; none when nobody has told us of that address.
///
/// # Errors
/// [`CloseReason::NoEndpoint`] when the service that was dialled has no ready endpoint on that port.
pub fn route(
    snapshot: &Snapshot,
    source: &Workload,
    OriginalDst(dialled): OriginalDst,
    robin: &RoundRobin,
) -> Result<Option<Route>, CloseReason> {
    if let Some(service) = snapshot.service_at(dialled.ip()) {
        return through_service(snapshot, source, dialled, service, robin).map(Some);
    }
    let workload = snapshot.workload_at(dialled.ip());
    Ok(workload.map(|workload| to_workload(source, Arc::clone(workload), dialled, None)))
}

fn through_service(
    snapshot: &Snapshot,
    source: &Workload,
    dialled: SocketAddr,
    service: &Arc<Service>,
    robin: &RoundRobin,
) -> Result<Route, CloseReason> {
    let key = service.key();
    let endpoints = snapshot.endpoints(&key).ok_or(CloseReason::NoEndpoint)?;
    let ready = &endpoints.ready;
    let turn = robin.turn(&key);
    // Every endpoint in turn; those that lack the address family or the port are passed over.
    for step in 0..ready.len() {
        let workload = &ready[(turn + step) % ready.len()];
        let (Some(address), Some(port)) = (workload.address_like(dialled.ip()), workload.target_port(&key, dialled.port()))
        else {
            continue;
        };
        let target = SocketAddr::new(address, port);
        return Ok(to_workload(source, Arc::clone(workload), target, Some(Arc::clone(service))));
    }
    Err(CloseReason::NoEndpoint)
}

fn to_workload(source: &Workload, workload: Arc<Workload>, target: SocketAddr, service: Option<Arc<Service>>) -> Route {
    if workload.uid == source.uid {
        Route::Local { target, service }
    } else if workload.tunnelled(target.port()) {
        Route::Tunnel { workload, target, service }
    } else {
        Route::Passthrough { target, workload: Some(workload), service }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::snapshot::tests::{backend, pod, web, with};
    use crate::model::{Mode, PeerAuthentication, TunnelProtocol};

    fn routed(snapshot: &Snapshot, dialled: &str) -> Result<Option<Route>, CloseReason> {
        route(snapshot, &pod("me", "10.0.0.9"), OriginalDst(dialled.parse().unwrap()), &RoundRobin::default())
    }

    fn target(route: Result<Option<Route>, CloseReason>) -> (&'static str, String) {
        match route.unwrap().unwrap() {
            Route::Tunnel { target, .. } => ("tunnel", target.to_string()),
            Route::Local { target, .. } => ("local", target.to_string()),
            Route::Passthrough { target, .. } => ("passthrough", target.to_string()),
        }
    }

    #[test]
    fn a_pod_of_the_mesh_is_tunnelled_to_and_a_disabled_port_is_not() {
        let modes = PeerAuthentication { mode: Mode::Permissive, ports: [(81, Mode::Disable)].into() };
        let snapshot = with([Workload { peer_authentication: modes.into(), ..pod("you", "10.0.0.1") }], []);
        assert_eq!(target(routed(&snapshot, "10.0.0.1:80")), ("tunnel", "10.0.0.1:80".into()));
        assert_eq!(target(routed(&snapshot, "10.0.0.1:81")), ("passthrough", "10.0.0.1:81".into()));
    }

    #[test]
    fn a_service_leads_to_its_target_port_in_turn() {
        let snapshot = with([backend("one", "10.0.0.1"), backend("two", "10.0.0.2")], [web()]);
        let (me, robin) = (pod("me", "10.0.0.9"), RoundRobin::default());
        let dialled = OriginalDst("10.96.0.1:80".parse().unwrap());
        let targets: Vec<_> = (0..4).map(|_| target(route(&snapshot, &me, dialled, &robin)).1).collect();
        assert_eq!(targets, ["10.0.0.1:8080", "10.0.0.2:8080", "10.0.0.1:8080", "10.0.0.2:8080"]);
    }

    #[test]
    fn a_service_that_leads_back_to_the_pod_stays_in_it() {
        let snapshot = with([backend("me", "10.0.0.9")], [web()]);
        assert_eq!(target(routed(&snapshot, "10.96.0.1:80")), ("local", "10.0.0.9:8080".into()));
    }

    #[test]
    fn an_endpoint_outside_the_mesh_is_passed_through_to() {
        let outside = Workload { protocol: TunnelProtocol::None, ..backend("out", "10.0.0.1") };
        let snapshot = with([outside], [web()]);
        assert_eq!(target(routed(&snapshot, "10.96.0.1:80")), ("passthrough", "10.0.0.1:8080".into()));
    }

    #[test]
    fn without_an_endpoint_for_the_port_or_family_there_is_no_route() {
        let snapshot = with([backend("six", "fd00::1")], [web()]);
        assert_eq!(routed(&snapshot, "10.96.0.1:80"), Err(CloseReason::NoEndpoint));
        assert_eq!(routed(&with([backend("one", "10.0.0.1")], [web()]), "10.96.0.1:81"), Err(CloseReason::NoEndpoint));
    }

    #[test]
    fn an_address_that_nobody_told_us_of_has_no_answer() {
        assert_eq!(routed(&with([], []), "10.0.0.1:80"), Ok(None));
    }
}
