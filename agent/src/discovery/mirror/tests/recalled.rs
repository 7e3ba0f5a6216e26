//! What a predecessor kept: held, told to the controller, and in force when it has been confirmed.

use super::super::super::fixture::{mesh_resource, pod, pod_resource, policy_resource, response, uid};
use super::*;
use crate::proto::security;

#[test]
fn nothing_is_in_force_before_the_controller_has_answered_for_every_type() {
    for last in Kind::ALL {
        let mut mirror = recalled();
        for kind in Kind::ALL.into_iter().filter(|kind| *kind != last) {
            apply(&mut mirror, kind, vec![], &[]);
            assert_nothing_in_force(&mirror);
        }
        apply(&mut mirror, last, vec![], &[]);
        let snapshot = mirror.snapshot();
        assert!(snapshot.synced() && snapshot.default_deny(), "{last:?} came last");
        assert_eq!((snapshot.workloads().count(), snapshot.policies().count()), (2, 1));
        assert_eq!(domain_of(&mirror, "a"), "td");
    }
}

#[test]
fn what_has_changed_meanwhile_is_as_the_controller_says() {
    let mut mirror = recalled();
    apply(&mut mirror, Kind::Mesh, vec![mesh_resource("renamed", &[])], &[]);
    apply(&mut mirror, Kind::Authorization, vec![], &["shop/deny"]);
    apply(&mut mirror, Kind::Address, vec![changed(pod_resource(pod("a", [10, 0, 0, 9])))], &[&uid("b")]);
    let snapshot = mirror.snapshot();
    assert_eq!((snapshot.workloads().count(), snapshot.policies().count()), (1, 0));
    assert!(
        snapshot.workload_at(IpAddr::from([10, 0, 0, 9])).is_some()
            && snapshot.workload_at(IpAddr::from([10, 0, 0, 1])).is_none()
    );
    assert_eq!(domain_of(&mirror, "a"), "renamed");
    assert_eq!(mirror.versions(Kind::Address), [(uid("a"), "2".to_owned())].into());
}

#[test]
fn a_first_answer_in_parts_counts_with_its_last() {
    let mut mirror = recalled();
    apply(&mut mirror, Kind::Mesh, vec![], &[]);
    apply(&mut mirror, Kind::Authorization, vec![], &[]);
    let mut part = response(ADDRESS_TYPE, vec![changed(pod_resource(pod("a", [10, 0, 0, 9])))], &[]);
    part.system_version_info = PARTIAL.to_owned();
    // Not even for who asks about an address in it.
    let applied = mirror.apply(Kind::Address, &part, |_| true);
    assert!(applied.answered.is_empty());
    assert_nothing_in_force(&mirror);
    apply(&mut mirror, Kind::Address, vec![], &[&uid("b")]);
    assert_eq!(mirror.snapshot().workloads().count(), 1);
}

#[test]
fn a_new_stream_must_confirm_all_of_it_again() {
    let mut mirror = recalled();
    apply(&mut mirror, Kind::Mesh, vec![], &[]);
    apply(&mut mirror, Kind::Authorization, vec![], &[]);
    mirror.begin_stream();
    apply(&mut mirror, Kind::Address, vec![], &[]);
    assert_nothing_in_force(&mirror);
    apply(&mut mirror, Kind::Mesh, vec![], &[]);
    apply(&mut mirror, Kind::Authorization, vec![], &["shop/deny"]);
    assert!(mirror.snapshot().synced() && mirror.snapshot().policies().next().is_none());
    // What has been in force stays so.
    mirror.begin_stream();
    apply(&mut mirror, Kind::Address, vec![], &[&uid("b")]);
    assert_eq!(mirror.snapshot().workloads().count(), 1);
}

#[test]
fn settings_that_are_refused_or_gone_do_not_count_for_having_been_kept() {
    let rest = |mirror: &mut Mirror| [Kind::Authorization, Kind::Address].map(|kind| apply(mirror, kind, vec![], &[]));
    let mut mirror = recalled();
    apply(&mut mirror, Kind::Mesh, vec![changed(mesh_resource("NOT LEGAL", &[]))], &[]);
    rest(&mut mirror);
    assert!(!mirror.only_mesh_is_missing());
    assert_nothing_in_force(&mirror);
    let mut mirror = recalled();
    apply(&mut mirror, Kind::Mesh, vec![], &["mesh"]);
    rest(&mut mirror);
    assert!(mirror.only_mesh_is_missing());
    assert_nothing_in_force(&mirror);
}

#[test]
fn kept_settings_are_no_answer() {
    let mut mirror = recalled();
    apply(&mut mirror, Kind::Authorization, vec![], &[]);
    assert!(!mirror.only_mesh_is_missing());
    apply(&mut mirror, Kind::Address, vec![], &[]);
    assert!(mirror.only_mesh_is_missing() && mirror.is_recalled());
    assert_nothing_in_force(&mirror);
}

#[test]
fn only_what_is_new_is_worth_keeping() {
    let mut mirror = recalled();
    let held = |name, version: &str| Resource { version: version.to_owned(), ..pod_resource(pod(name, [10, 0, 0, 7])) };
    let all = vec![held("a", "1"), held("b", "2"), held("c", "1"), held("d", "")];
    let news = response(ADDRESS_TYPE, all, &[&uid("a"), &uid("never-known"), "/10.0.0.9"]);
    let news = mirror.apply(Kind::Address, &news, |_| false).news(news);
    let names: Vec<_> = news.resources.iter().map(|resource| resource.name.clone()).collect();
    // It was removed before it came again.
    assert_eq!(names, [uid("a"), uid("b"), uid("c")]);
    assert_eq!(news.removed_resources, [uid("a")]);
    let again = response(ADDRESS_TYPE, vec![held("a", "1"), held("b", "2")], &[]);
    assert!(mirror.apply(Kind::Address, &again, |_| false).news(again).resources.is_empty());
}

#[test]
fn the_size_of_what_is_held_follows_it() {
    let mut mirror = mirror();
    assert_eq!(mirror.bytes(), 0);
    apply(&mut mirror, Kind::Address, vec![pod_resource(pod("a", [10, 0, 0, 1]))], &[]);
    let one = mirror.bytes();
    apply(&mut mirror, Kind::Address, vec![changed(pod_resource(pod("a", [10, 0, 0, 2])))], &[]);
    assert_eq!(mirror.bytes(), one);
    apply(&mut mirror, Kind::Address, vec![pod_resource(pod("b", [10, 0, 0, 1]))], &[]);
    assert_eq!(mirror.bytes(), 2 * one);
    apply(&mut mirror, Kind::Address, vec![], &[&uid("a"), &uid("b"), &uid("never-known")]);
    assert_eq!(mirror.bytes(), 0);
}

/// A mirror with a mesh of two pods and a policy that a predecessor kept.
fn recalled() -> Mirror {
    let mut mirror = mirror();
    let deny = security::Authorization { name: "deny".to_owned(), namespace: "shop".to_owned(), ..Default::default() };
    let pods = [("a", [10, 0, 0, 1]), ("b", [10, 0, 0, 2])].map(|(name, address)| pod_resource(pod(name, address)));
    mirror.recall(response(MESH_TYPE, vec![mesh_resource("td", &[])], &[]));
    mirror.recall(response(AUTHORIZATION_TYPE, vec![policy_resource(deny)], &[]));
    mirror.recall(response(ADDRESS_TYPE, pods.into(), &[]));
    assert_nothing_in_force(&mirror);
    mirror
}

fn assert_nothing_in_force(mirror: &Mirror) {
    let snapshot = mirror.snapshot();
    assert!(!snapshot.synced() && snapshot.trust_domain().is_none() && !snapshot.default_deny());
    assert!(snapshot.workloads().next().is_none() && snapshot.policies().next().is_none() && snapshot.destinations().is_empty());
}

fn changed(resource: Resource) -> Resource {
    Resource { version: "2".to_owned(), ..resource }
}
