use super::*;
use crate::model::snapshot::Edit;
use crate::model::snapshot::tests::pod;
use crate::model::{Action, Authorization, PeerAuthentication, PodAddresses, PodUid, Rule, Scope, Service, TunnelProtocol};

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
    next(phase, classify(&set(addresses), None, phase, snapshot, &set(unknown)))
}

fn set(texts: &[&str]) -> BTreeSet<IpAddr> {
    texts.iter().map(|text| ip(text)).collect()
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

const UID: &str = "37182395";

/// The pod of this name, by the API's word, while it has no address.
fn unplaced(name: &str, uid: &str) -> Workload {
    Workload { pod: Some(Arc::new(uid.into())), ..workload(name, &[]) }
}

/// The pod `UID`, by the API's word, at these addresses.
fn placed(name: &str, addresses: &[&str]) -> Workload {
    Workload { pod: Some(Arc::new(UID.into())), ..workload(name, addresses) }
}

/// What is next with a namespace that is the pod `UID`, which was `known` as a workload before.
fn step_of_pod(phase: &Phase, addresses: &[&str], snapshot: &Snapshot, known: Option<&str>) -> Step {
    let workload = known.map(|name| workload(name, &[]).uid);
    let owner = Owner { uid: PodUid::from(UID), workload };
    next(phase, classify(&set(addresses), Some(&owner), phase, snapshot, &set(addresses)))
}

#[test]
fn a_pod_is_enrolled_with_its_namespaces_addresses_before_the_controller_knows_them() {
    let snapshot = snapshot(|edit| edit.upsert_workload(unplaced("a", UID)));
    let placed = placed("a", &["10.0.0.1", "fd00::1"]);
    for phase in [Phase::Pending, Phase::Exempt, Phase::Inherited] {
        assert_eq!(step_of_pod(&phase, &["10.0.0.1", "fd00::1"], &snapshot, None), Step::Enrol(Arc::new(placed.clone())));
    }
    assert_eq!(step_of_pod(&Phase::Pending, &[], &snapshot, None), Step::Stay, "it has no network yet");
    assert_eq!(step_of_pod(&Phase::Pending, &["10.0.0.1", "10.0.0.2"], &snapshot, None), Step::Stay, "either may be its own");
}

#[test]
fn a_namespace_is_not_the_pod_of_another_uid_or_node() {
    let other = snapshot(|edit| edit.upsert_workload(unplaced("a", "another")));
    // Nobody is known by the address: as without a word of the node's, it is nobody's.
    assert_eq!(step_of_pod(&Phase::Pending, &["10.0.0.1"], &other, None), Step::Exempt);
    let elsewhere = snapshot(|edit| edit.upsert_workload(Workload { node: "node-b".into(), ..unplaced("a", UID) }));
    assert_eq!(step_of_pod(&Phase::Pending, &["10.0.0.1"], &elsewhere, None), Step::Exempt);
    let on_the_node = snapshot(|edit| edit.upsert_workload(Workload { host_network: true, ..unplaced("a", UID) }));
    assert_eq!(step_of_pod(&Phase::Pending, &["10.0.0.1"], &on_the_node, None), Step::Stay);
}

#[test]
fn nothing_is_torn_down_when_the_controller_tells_a_pods_addresses() {
    let enrolled = enrolled(&placed("a", &["10.0.0.1", "fd00::1"]));
    let addresses = ["10.0.0.1", "fd00::1"];
    let before = snapshot(|edit| edit.upsert_workload(unplaced("a", UID)));
    let Phase::Enrolled(current) = &enrolled else { panic!("enrolled") };
    let Step::Update(same) = step_of_pod(&enrolled, &addresses, &before, Some("a")) else { panic!("it stays enrolled") };
    assert!(Arc::ptr_eq(&same, current), "nothing has changed");
    let told = workload("a", &addresses);
    let after = snapshot(|edit| edit.upsert_workload(told.clone()));
    assert_eq!(step_of_pod(&enrolled, &addresses, &after, Some("a")), Step::Update(Arc::new(told)));
    let others = workload("a", &["10.0.0.1"]);
    let after = snapshot(|edit| edit.upsert_workload(others.clone()));
    assert_eq!(step_of_pod(&enrolled, &addresses, &after, Some("a")), Step::Reenrol(Arc::new(others)));
    assert_eq!(step_of_pod(&enrolled, &addresses, &snapshot(|_| ()), Some("a")), Step::Update(Arc::clone(current)));
}

#[test]
fn a_pod_outside_of_the_mesh_is_left_alone_before_the_controller_knows_its_address() {
    let outside = Workload { protocol: TunnelProtocol::None, ..unplaced("a", UID) };
    let snapshot = snapshot(|edit| edit.upsert_workload(outside));
    assert_eq!(step_of_pod(&Phase::Pending, &["10.0.0.1"], &snapshot, None), Step::Exempt);
    assert_eq!(step_of_pod(&Phase::Exempt, &["10.0.0.1"], &snapshot, Some("a")), Step::Stay);
    assert_eq!(step_of_pod(&Phase::Pending, &[], &snapshot, None), Step::Stay);
}

#[test]
fn a_pod_at_an_address_that_the_controller_knows_as_anothers_stays_closed() {
    let placed = placed("a", &["10.0.0.1"]);
    for outside in [false, true] {
        let protocol = if outside { TunnelProtocol::None } else { TunnelProtocol::Hbone };
        for stale in ["node-a", "node-b"] {
            let of_another = snapshot(|edit| {
                edit.upsert_workload(Workload { protocol, ..unplaced("a", UID) });
                edit.upsert_workload(Workload { node: stale.into(), ..workload("old", &["10.0.0.1"]) });
            });
            for phase in [Phase::Pending, Phase::Inherited] {
                assert_eq!(step_of_pod(&phase, &["10.0.0.1"], &of_another, None), Step::Stay);
            }
            let as_another = enrolled(&workload("old", &["10.0.0.1"]));
            assert_eq!(step_of_pod(&as_another, &["10.0.0.1"], &of_another, None), Step::Close);
            if !outside {
                assert_eq!(step_of_pod(&enrolled(&placed), &["10.0.0.1"], &of_another, None), Step::Close);
            }
        }
    }
    let of_a_service = snapshot(|edit| {
        edit.upsert_workload(unplaced("a", UID));
        edit.upsert_service(Service { addresses: vec![ip("10.0.0.1")], ..crate::model::snapshot::tests::web() });
    });
    assert_eq!(step_of_pod(&Phase::Pending, &["10.0.0.1"], &of_a_service, None), Step::Stay);
}

#[test]
fn a_sandbox_that_is_made_anew_is_its_own_pod_whatever_the_api_still_says_of_its_address() {
    let outside = |pod: Workload| Workload { protocol: TunnelProtocol::None, ..pod };
    let own = placed("a", &["10.0.0.1"]);
    for other in [workload("b", &["10.0.0.2"]), outside(workload("b", &["10.0.0.2"]))] {
        let stale = snapshot(|edit| [own.clone(), other.clone()].into_iter().for_each(|pod| edit.upsert_workload(pod)));
        assert_eq!(step_of_pod(&Phase::Pending, &["10.0.0.1"], &stale, None), Step::Enrol(Arc::new(own.clone())));
        for phase in [Phase::Pending, Phase::Inherited] {
            assert_eq!(step_of_pod(&phase, &["10.0.0.2"], &stale, None), Step::Stay, "it is not the pod that had the address");
        }
        for phase in [Phase::Exempt, enrolled(&other)] {
            assert_eq!(step_of_pod(&phase, &["10.0.0.2"], &stale, None), Step::Close, "nor if it was taken for that");
        }
        let new = Step::Enrol(Arc::new(placed("a", &["10.0.0.3"])));
        assert_eq!(step_of_pod(&Phase::Pending, &["10.0.0.3"], &stale, None), new, "a new address is its own");
    }
    let stranger = outside(own.clone());
    let stale = snapshot(|edit| [stranger, workload("b", &["10.0.0.2"])].into_iter().for_each(|pod| edit.upsert_workload(pod)));
    assert_eq!(step_of_pod(&Phase::Pending, &["10.0.0.1"], &stale, None), Step::Exempt);
    assert_eq!(step_of_pod(&Phase::Pending, &["10.0.0.2"], &stale, None), Step::Stay, "who is outside gets no identity by it");
}

#[test]
fn a_pod_that_the_controller_has_not_told_of_is_not_taken_for_another_that_it_has() {
    let other = Workload { pod: Some(Arc::new("of-the-other".into())), ..workload("b", &["10.0.0.1"]) };
    for every in [true, false] {
        let stale = snapshot(|edit| {
            edit.upsert_workload(other.clone());
            if every {
                edit.mark_of_every_pod();
            }
        });
        let step = step_of_pod(&Phase::Pending, &["10.0.0.1"], &stale, None);
        assert_eq!(
            step,
            if every { Step::Stay } else { Step::Enrol(Arc::new(other.clone())) },
            "is it told of every pod: {every}"
        );
    }
    // A static pod is known by its address: the API server has it under another UID.
    let stale = snapshot(|edit| {
        edit.upsert_workload(other.clone());
        edit.mark_of_every_pod();
    });
    let owner = Owner { uid: "0123456789abcdef0123456789abcdef".into(), workload: None };
    let standing = classify(&set(&["10.0.0.1"]), Some(&owner), &Phase::Pending, &stale, &set(&[]));
    assert_eq!(standing, Standing::Member(Arc::new(other)));
}

#[test]
fn a_namespace_whose_pod_was_known_never_becomes_another_by_its_address() {
    let old = snapshot(|edit| edit.upsert_workload(workload("old", &["10.0.0.1"])));
    let outside =
        snapshot(|edit| edit.upsert_workload(Workload { protocol: TunnelProtocol::None, ..workload("old", &["10.0.0.1"]) }));
    for snapshot in [&old, &outside] {
        assert_eq!(step_of_pod(&Phase::Pending, &["10.0.0.1"], snapshot, Some("a")), Step::Stay);
    }
    let own = workload("a", &["10.0.0.1"]);
    let told = snapshot(|edit| edit.upsert_workload(own.clone()));
    assert_eq!(step_of_pod(&Phase::Pending, &["10.0.0.1"], &told, Some("a")), Step::Enrol(Arc::new(own)));
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
