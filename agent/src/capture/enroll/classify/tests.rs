use super::*;
use crate::model::snapshot::Edit;
use crate::model::snapshot::tests::pod;
use crate::model::{Action, Authorization, PeerAuthentication, PodAddresses, Rule, Scope, TunnelProtocol};

const NODE: &str = "node-a";

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn workload(name: &str, addresses: &[&str]) -> Workload {
    let mut own = PodAddresses::default();
    addresses.iter().for_each(|text| own.add(ip(text)).expect("one a family"));
    Workload { addresses: own, node: NODE.into(), ..pod(name, "10.0.0.1") }
}

fn snapshot(change: impl FnOnce(&mut Edit)) -> Snapshot {
    let mut edit = Snapshot::empty(NODE).edit();
    edit.mark_synced();
    change(&mut edit);
    edit.finish()
}

fn step(phase: &Phase, addresses: &[&str], snapshot: &Snapshot, unknown: &[&str]) -> Step {
    let set = |texts: &[&str]| texts.iter().map(|text| ip(text)).collect();
    next(phase, classify(&set(addresses), phase, snapshot, &set(unknown)))
}

fn enrolled(workload: &Workload) -> Phase {
    Phase::Enrolled(Arc::new(workload.clone()))
}

#[test]
fn nothing_changes_before_the_controller_has_spoken() {
    let snapshot = Snapshot::empty(NODE);
    for phase in [Phase::Pending, Phase::Exempt, Phase::Inherited, enrolled(&workload("a", &["10.0.0.1"]))] {
        assert_eq!(step(&phase, &["10.0.0.1"], &snapshot, &[]), Step::Stay);
        assert_eq!(step(&phase, &[], &snapshot, &[]), Step::Stay);
    }
}

#[test]
fn a_pod_in_the_mesh_is_enrolled_by_any_of_its_addresses() {
    let pod = workload("a", &["10.0.0.1", "fd00::1"]);
    let snapshot = snapshot(|edit| edit.upsert_workload(pod.clone()));
    for phase in [Phase::Pending, Phase::Exempt, Phase::Inherited] {
        assert_eq!(step(&phase, &["fd00::1"], &snapshot, &[]), Step::Enrol(Arc::new(pod.clone())));
        assert_eq!(step(&phase, &["192.0.2.1", "10.0.0.1"], &snapshot, &[]), Step::Enrol(Arc::new(pod.clone())));
    }
}

#[test]
fn pods_outside_the_mesh_and_of_other_nodes_are_left_alone() {
    let outside = Workload { protocol: TunnelProtocol::None, ..workload("a", &["10.0.0.1"]) };
    let elsewhere = Workload { node: "node-b".into(), ..workload("b", &["10.0.0.2"]) };
    let snapshot = snapshot(|edit| {
        edit.upsert_workload(outside);
        edit.upsert_workload(elsewhere);
    });
    for address in ["10.0.0.1", "10.0.0.2"] {
        assert_eq!(step(&Phase::Pending, &[address], &snapshot, &[]), Step::Exempt);
        assert_eq!(step(&Phase::Inherited, &[address], &snapshot, &[]), Step::Exempt);
        assert_eq!(step(&Phase::Exempt, &[address], &snapshot, &[]), Step::Stay);
    }
}

#[test]
fn an_unknown_address_is_asked_about_until_the_controller_disowns_it() {
    let snapshot = snapshot(|_| ());
    assert_eq!(step(&Phase::Pending, &["10.0.0.1"], &snapshot, &[]), Step::Ask(ip("10.0.0.1")));
    assert_eq!(step(&Phase::Pending, &["10.0.0.1", "10.0.0.2"], &snapshot, &["10.0.0.1"]), Step::Ask(ip("10.0.0.2")));
    assert_eq!(step(&Phase::Pending, &["10.0.0.1"], &snapshot, &["10.0.0.1"]), Step::Exempt);
}

#[test]
fn a_namespace_without_addresses_is_closed() {
    let snapshot = snapshot(|_| ());
    assert_eq!(step(&Phase::Pending, &[], &snapshot, &[]), Step::Stay);
    assert_eq!(step(&Phase::Exempt, &[], &snapshot, &[]), Step::Close);
    assert_eq!(step(&enrolled(&workload("a", &["10.0.0.1"])), &[], &snapshot, &[]), Step::Close);
}

#[test]
fn a_change_of_label_releases_and_leaves_alone() {
    let pod = workload("a", &["10.0.0.1"]);
    let left = Workload { protocol: TunnelProtocol::None, ..pod.clone() };
    let snapshot = snapshot(|edit| edit.upsert_workload(left));
    assert_eq!(step(&enrolled(&pod), &["10.0.0.1"], &snapshot, &[]), Step::Exempt);
}

#[test]
fn a_change_of_mode_updates_and_a_change_of_identity_enrols_anew() {
    let pod = workload("a", &["10.0.0.1"]);
    let mut strict = pod.clone();
    Arc::make_mut(&mut strict.peer_authentication).mode = Mode::Strict;
    let with = |pod: Workload| snapshot(|edit| edit.upsert_workload(pod));
    assert_eq!(step(&enrolled(&pod), &["10.0.0.1"], &with(strict.clone()), &[]), Step::Update(Arc::new(strict)));
    let other = Workload { identity: workload("z", &[]).identity, ..pod.clone() };
    assert_eq!(step(&enrolled(&pod), &["10.0.0.1"], &with(other.clone()), &[]), Step::Reenrol(Arc::new(other)));
    let wider = workload("a", &["10.0.0.1", "fd00::1"]);
    assert_eq!(step(&enrolled(&pod), &["10.0.0.1"], &with(wider.clone()), &[]), Step::Reenrol(Arc::new(wider)));
}

#[test]
fn a_pod_that_another_replaced_at_its_address_is_enrolled_anew() {
    let (old, new) = (workload("old", &["10.0.0.1"]), workload("new", &["10.0.0.1"]));
    let replaced = snapshot(|edit| edit.upsert_workload(new.clone()));
    assert_eq!(step(&enrolled(&old), &["10.0.0.1"], &replaced, &[]), Step::Reenrol(Arc::new(new.clone())));
    let both = snapshot(|edit| {
        edit.upsert_workload(old.clone());
        edit.upsert_workload(new);
    });
    assert_eq!(step(&enrolled(&old), &["10.0.0.1"], &both, &[]), Step::Update(Arc::new(old)));
}

#[test]
fn a_pod_whose_object_is_gone_stays_enrolled_while_it_runs() {
    let pod = workload("a", &["10.0.0.1"]);
    assert_eq!(step(&enrolled(&pod), &["10.0.0.1"], &snapshot(|_| ()), &["10.0.0.1"]), Step::Update(Arc::new(pod)));
}

#[test]
fn an_enrolled_pod_that_lost_its_addresses_is_closed() {
    let pod = workload("a", &["10.0.0.1"]);
    let snapshot = snapshot(|edit| edit.upsert_workload(pod.clone()));
    assert_eq!(step(&enrolled(&pod), &["10.0.0.9"], &snapshot, &[]), Step::Close);
}

fn policy(scope: Scope) -> Authorization {
    Authorization {
        namespace: "a".into(),
        name: "p".into(),
        scope,
        action: Action::Allow,
        dry_run: false,
        rules: vec![Rule::default()],
    }
}

fn admitted(mode: Mode, ports: &[(u16, Mode)], change: impl FnOnce(&mut Edit, &mut Workload)) -> Vec<(u16, Admission)> {
    let mut pod = workload("a", &["10.0.0.1"]);
    pod.peer_authentication = PeerAuthentication { mode, ports: ports.iter().copied().collect() }.into();
    let snapshot = snapshot(|edit| change(edit, &mut pod));
    admissions(&pod, &snapshot).into_iter().collect()
}

#[test]
fn modes_without_policies_are_ruled_by_the_kernel_alone() {
    assert_eq!(admitted(Mode::Permissive, &[], |_, _| ()), [(0, Admission::Pass)]);
    assert_eq!(admitted(Mode::Disable, &[], |_, _| ()), [(0, Admission::Pass)]);
    assert_eq!(admitted(Mode::Strict, &[], |_, _| ()), [(0, Admission::Drop)]);
}

#[test]
fn only_ports_that_differ_have_entries_of_their_own() {
    let ports = [(80, Mode::Permissive), (81, Mode::Strict), (82, Mode::Disable)];
    assert_eq!(admitted(Mode::Strict, &ports, |_, _| ()), [(0, Admission::Drop), (80, Admission::Pass), (82, Admission::Pass)]);
    assert_eq!(admitted(Mode::Permissive, &ports, |_, _| ()), [(0, Admission::Pass), (81, Admission::Drop)]);
}

#[test]
fn plaintext_that_a_policy_judges_goes_to_the_agent() {
    let steered = [(0, Admission::Steer)];
    assert_eq!(admitted(Mode::Permissive, &[], |edit, _| edit.upsert_policy(policy(Scope::Global))), steered);
    assert_eq!(admitted(Mode::Permissive, &[], |edit, _| edit.upsert_policy(policy(Scope::Namespace))), steered);
    assert_eq!(
        admitted(Mode::Permissive, &[], |edit, _| edit.upsert_policy(policy(Scope::WorkloadSelector))),
        [(0, Admission::Pass)]
    );
    let named = |pod: &mut Workload| pod.authorization_policies = vec!["a/p".into()].into();
    assert_eq!(admitted(Mode::Disable, &[], |_, pod| named(pod)), steered);
    let deny = |edit: &mut Edit, _: &mut Workload| edit.set_mesh("td".parse().expect("a trust domain"), true, Arc::default());
    assert_eq!(admitted(Mode::Permissive, &[], deny), steered);
    assert_eq!(admitted(Mode::Strict, &[], deny), [(0, Admission::Drop)]);
}
