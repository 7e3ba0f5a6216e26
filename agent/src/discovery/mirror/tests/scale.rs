//! What the mesh's size costs an agent, in bytes taken from the allocator: no clocks, so that the figures are the same everywhere.

use super::super::super::fixture::{mesh_resource, modes, pod, pod_resource, response, service, service_resource};
use super::super::*;
use crate::proto::workload::{PortList, WorkloadType};
use crate::test_memory::{Taken, taken_by};

/// Workloads of each service, as many as a usual Deployment has pods.
const A_SERVICE: usize = 10;

/// The promise is 150 MB for 200,000 workloads and 20,000 services, of which 10 MB are what an agent holds without any and some is what
/// the allocator cannot use: 700 bytes each would be too many. It is held to what it is.
const A_WORKLOAD: usize = 625;

#[test]
fn two_hundred_thousand_workloads_fit_into_an_agent() {
    let size = 20_000;
    let (mirror, taken) = taken_by(|| mesh(size));
    assert_eq!(mirror.snapshot().workloads().count(), size);
    let each = usize::try_from(taken.kept).expect("something is kept") / size;
    println!("{each} bytes a workload");
    assert!(each <= A_WORKLOAD, "{each} bytes a workload and its share of a service");
}

#[test]
fn one_change_costs_as_much_in_a_large_mesh_as_in_a_small_one() {
    let (small, large) = (change_in(500), change_in(32_000));
    println!("{small:?} {large:?}");
    // A tree with sixty times the leaves is two levels higher.
    assert!(large.bytes < small.bytes * 2, "{small:?} in a mesh of 500 workloads, {large:?} in one of 32,000");
}

/// What it takes when one pod is not ready any more.
fn change_in(size: usize) -> Taken {
    let mut mirror = mesh(size);
    // Somebody acts on the state that there was.
    let former = Arc::clone(mirror.snapshot());
    let mut unready = workload(size / 2);
    unready.status = crate::proto::workload::WorkloadStatus::Unhealthy as i32;
    let news = response(ADDRESS_TYPE, vec![resource_of(unready)], &[]);
    let taken = taken_by(|| drop(mirror.apply(Kind::Address, &news, |_| false))).1;
    let ready = |snapshot: &Snapshot| snapshot.endpoints(&service_key(size / 2)).map(|endpoints| endpoints.ready.len());
    assert_eq!((ready(&former), ready(mirror.snapshot())), (Some(A_SERVICE), Some(A_SERVICE - 1)));
    taken
}

/// All of a mesh, as a controller tells it: in parts, and in the order of names.
fn mesh(size: usize) -> Mirror {
    let mut mirror = Mirror::new("node-0", "cluster.local".parse().expect("legal"));
    mirror.apply(Kind::Mesh, &response(MESH_TYPE, vec![mesh_resource("td", &[])], &[]), |_| false);
    mirror.apply(Kind::Authorization, &response(AUTHORIZATION_TYPE, Vec::new(), &[]), |_| false);
    let mut numbers: Vec<_> = (0..size).collect();
    numbers.sort_by_cached_key(|number| workload(*number).uid);
    for part in numbers.chunks(1000) {
        let resources = part.iter().map(|number| resource_of(workload(*number))).collect();
        let mut part = response(ADDRESS_TYPE, resources, &[]);
        part.system_version_info = PARTIAL.to_owned();
        mirror.apply(Kind::Address, &part, |_| false);
    }
    let services = (0..size / A_SERVICE).map(|group| service_resource(service_of(group))).collect();
    mirror.apply(Kind::Address, &response(ADDRESS_TYPE, services, &[]), |_| false);
    assert!(mirror.snapshot().synced());
    mirror
}

/// Pods of services all over some namespaces and nodes. Nothing made them, so that their names for telemetry are their own, too.
fn workload(number: usize) -> crate::proto::workload::Workload {
    let group = number / A_SERVICE;
    let (name, namespace) = (format!("app-{group}-{number}"), namespace_of(group));
    let ports = PortList { ports: vec![crate::proto::workload::Port { service_port: 80, target_port: 8080 }] };
    crate::proto::workload::Workload {
        uid: format!("Kubernetes//Pod/{namespace}/{name}"),
        name: name.clone(),
        namespace,
        service_account: format!("app-{group}"),
        node: format!("node-{}", number % 1000),
        workload_name: name.clone(),
        workload_type: WorkloadType::Pod as i32,
        canonical_name: format!("app-{group}"),
        canonical_revision: "latest".to_owned(),
        services: [(service_key(number), ports)].into(),
        extensions: vec![modes(1, &[])],
        addresses: vec![(0x0a64_0000 + number as u32).to_be_bytes().to_vec()],
        ..pod(&name, [0; 4])
    }
}

fn service_of(group: usize) -> crate::proto::workload::Service {
    let [_, second, third, fourth] = (group as u32).to_be_bytes();
    let (name, namespace) = (format!("app-{group}"), namespace_of(group));
    crate::proto::workload::Service {
        hostname: format!("{name}.{namespace}.svc.cluster.local"),
        namespace,
        ..service(&name, [10, 200 + second, third, fourth])
    }
}

fn namespace_of(group: usize) -> String {
    format!("team-{}", group % 100)
}

fn service_key(number: usize) -> String {
    let service = service_of(number / A_SERVICE);
    format!("{}/{}", service.namespace, service.hostname)
}

fn resource_of(message: crate::proto::workload::Workload) -> Resource {
    // As Culvert's controller gives versions.
    Resource { version: "0123456789abcdef0123456789abcdef".to_owned(), ..pod_resource(message) }
}
