//! Responses applied one after the other, and the state that they make.

mod recalled;
mod resuming;
mod scale;

use super::super::fixture::{mesh_resource, pod, pod_resource, policy_resource, response, service, service_resource, uid};
use super::*;
use crate::proto::security;

#[test]
fn the_state_is_synced_when_the_last_part_of_every_type_is_in() {
    let mut mirror = mirror();
    apply(&mut mirror, Kind::Mesh, vec![mesh_resource("td", &["10.0.0.0/8"])], &[]);
    apply(&mut mirror, Kind::Authorization, vec![], &[]);
    let mut part = response(ADDRESS_TYPE, vec![pod_resource(pod("a", [10, 0, 0, 1]))], &[]);
    part.system_version_info = PARTIAL.to_owned();
    mirror.apply(Kind::Address, &part, |_| false);
    assert!(mirror.snapshot().workload(&uid("a")).is_none() && !mirror.snapshot().synced());
    apply(&mut mirror, Kind::Address, vec![pod_resource(pod("b", [10, 0, 0, 2]))], &[]);
    assert!(mirror.snapshot().synced() && mirror.snapshot().default_deny());
    assert_eq!(mirror.snapshot().workloads().count(), 2);
}

#[test]
fn workloads_wait_for_the_mesh_to_name_its_trust_domain() {
    let mut mirror = mirror();
    let explicit = crate::proto::workload::Workload { trust_domain: "other".to_owned(), ..pod("b", [10, 0, 0, 2]) };
    let resources = vec![pod_resource(pod("a", [10, 0, 0, 1])), pod_resource(explicit)];
    apply(&mut mirror, Kind::Address, resources, &[]);
    assert!(mirror.snapshot().workload(&uid("a")).is_none() && mirror.snapshot().workload(&uid("b")).is_some());
    apply(&mut mirror, Kind::Mesh, vec![mesh_resource("td", &[])], &[]);
    assert_eq!(domain_of(&mirror, "a"), "td");
    apply(&mut mirror, Kind::Mesh, vec![mesh_resource("renamed", &[])], &[]);
    assert_eq!((&*domain_of(&mirror, "a"), &*domain_of(&mirror, "b")), ("renamed", "other"));
}

#[test]
fn a_control_plane_without_mesh_settings_gets_the_defaults_only_when_it_said_nothing_of_them() {
    let mut mirror = mirror();
    apply(&mut mirror, Kind::Authorization, vec![], &[]);
    assert!(!mirror.only_mesh_is_missing());
    apply(&mut mirror, Kind::Address, vec![pod_resource(pod("a", [10, 0, 0, 1]))], &[]);
    assert!(mirror.only_mesh_is_missing() && !mirror.snapshot().synced());
    apply(&mut mirror, Kind::Mesh, vec![mesh_resource("NOT LEGAL", &[])], &[]);
    assert!(!mirror.only_mesh_is_missing(), "settings that make no sense are not replaced by lax ones");
    apply(&mut mirror, Kind::Mesh, vec![], &[]);
    assert!(mirror.only_mesh_is_missing());
    mirror.assume_mesh();
    assert!(mirror.snapshot().synced() && !mirror.snapshot().default_deny() && !mirror.only_mesh_is_missing());
    assert_eq!(domain_of(&mirror, "a"), "cluster.local");
}

#[test]
fn a_bad_resource_leaves_the_last_good_one_and_the_rest_of_its_response_counts() {
    let mut mirror = mirror();
    apply(&mut mirror, Kind::Mesh, vec![mesh_resource("td", &[])], &[]);
    apply(&mut mirror, Kind::Address, vec![pod_resource(pod("a", [10, 0, 0, 1]))], &[]);
    let mut bad = pod_resource(crate::proto::workload::Workload { status: 9, ..pod("a", [10, 0, 0, 3]) });
    bad.version = "2".to_owned();
    let applied = apply(&mut mirror, Kind::Address, vec![bad, pod_resource(pod("b", [10, 0, 0, 2]))], &[]);
    assert_eq!(applied.refused.len(), 1);
    assert!(mirror.snapshot().workload_at(IpAddr::from([10, 0, 0, 1])).is_some());
    assert!(mirror.snapshot().workload_at(IpAddr::from([10, 0, 0, 2])).is_some());
    assert_eq!(mirror.versions(Kind::Address).get(&uid("a")).map(String::as_str), Some("1"));
}

#[test]
fn a_policy_that_never_made_sense_closes_what_it_may_close_until_it_does() {
    use crate::model::{Action, Scope};
    use crate::proto::security::{Action as Does, Authorization as Message, Scope as Where};

    let policy = |action: i32, scope: i32, spoilt: bool, version: &str| {
        let extensions = if spoilt { vec![vec![10, 1, b'x']] } else { vec![] };
        let (name, namespace) = ("rule".to_owned(), "shop".to_owned());
        let message = Message { name, namespace, action, scope, extensions, ..Message::default() };
        Resource { version: version.to_owned(), ..policy_resource(message) }
    };
    let (deny, allow, audit) = (Does::Deny as i32, Does::Allow as i32, Does::Audit as i32);
    for (action, scope, wanted) in [
        (deny, Where::Namespace as i32, Some((Action::Deny, Scope::Namespace, 1))),
        (allow, Where::WorkloadSelector as i32, Some((Action::Allow, Scope::WorkloadSelector, 0))),
        (77, 77, Some((Action::Deny, Scope::Global, 1))),
        (audit, Where::Global as i32, None),
    ] {
        let mut mirror = mirror();
        apply(&mut mirror, Kind::Mesh, vec![mesh_resource("td", &[])], &[]);
        let shown =
            |mirror: &Mirror| mirror.snapshot().policies().next().map(|policy| (policy.action, policy.scope, policy.rules.len()));
        let applied = apply(&mut mirror, Kind::Authorization, vec![policy(action, scope, true, "1")], &[]);
        assert_eq!((applied.refused.len(), shown(&mirror)), (1, wanted));
        assert_eq!(mirror.versions(Kind::Authorization).get("shop/rule").map(String::as_str), wanted.map(|_| ""));
        // It is told again, and another way of being wrong; then it makes sense, and what makes none after that changes nothing.
        apply(&mut mirror, Kind::Authorization, vec![policy(deny, 0, true, "2")], &[]);
        assert_eq!(shown(&mirror), Some((Action::Deny, Scope::Global, 1)));
        apply(&mut mirror, Kind::Authorization, vec![policy(allow, 1, false, "3")], &[]);
        apply(&mut mirror, Kind::Authorization, vec![policy(deny, 0, true, "4")], &[]);
        assert_eq!(shown(&mirror), Some((Action::Allow, Scope::Namespace, 0)));
        assert_eq!(mirror.versions(Kind::Authorization).get("shop/rule").map(String::as_str), Some("3"));
        apply(&mut mirror, Kind::Authorization, vec![], &["shop/rule"]);
        assert_eq!(shown(&mirror), None);
    }
    let mut mirror = mirror();
    let unreadable = Resource { resource: None, ..policy(allow, 0, false, "1") };
    apply(&mut mirror, Kind::Authorization, vec![unreadable, Resource { name: "noname".to_owned(), ..Resource::default() }], &[]);
    assert_eq!(mirror.snapshot().policies().map(|policy| policy.action).collect::<Vec<_>>(), [Action::Deny]);
    assert_eq!(mirror.size(), 1);
}

#[test]
fn versions_are_told_as_they_came() {
    let digest = "00112233445566778899aabbccddeeff";
    for text in [digest, &digest.to_uppercase(), &digest[1..], "+0112233445566778899aabbccddeeff", "7", "", "2024-01-01/7"] {
        assert_eq!(Version::from(text).to_string(), text);
    }
    assert_eq!(size_of_val(&Version::from(digest)), 24);
    assert!(matches!(Version::from(digest), Version::Digest(_)));
}

#[test]
fn what_is_removed_goes_and_so_does_what_another_object_replaces_under_its_name() {
    let mut mirror = mirror();
    apply(&mut mirror, Kind::Mesh, vec![mesh_resource("td", &[])], &[]);
    let policy = security::Authorization { name: "p".to_owned(), namespace: "shop".to_owned(), ..Default::default() };
    apply(&mut mirror, Kind::Authorization, vec![policy_resource(policy)], &[]);
    let key = "shop/web.shop.svc.cluster.local";
    let web = service_resource(service("web", [10, 96, 0, 1]));
    apply(&mut mirror, Kind::Address, vec![web, pod_resource(pod("a", [10, 0, 0, 1]))], &[]);
    let usurper = crate::proto::workload::Workload { uid: key.to_owned(), ..pod("b", [10, 0, 0, 2]) };
    apply(&mut mirror, Kind::Address, vec![pod_resource(usurper)], &[&uid("a")]);
    assert!(mirror.snapshot().service_at(IpAddr::from([10, 96, 0, 1])).is_none());
    assert!(mirror.snapshot().workload(key).is_some() && mirror.snapshot().workload(&uid("a")).is_none());
    apply(&mut mirror, Kind::Authorization, vec![], &["shop/p", "shop/never-known"]);
    assert_eq!(mirror.snapshot().policies().count(), 0);
    apply(&mut mirror, Kind::Mesh, vec![], &["mesh"]);
    assert!(mirror.snapshot().default_deny(), "settings do not vanish");
}

#[test]
fn an_address_asked_about_is_answered_by_its_owner_its_alias_or_its_absence() {
    let mut mirror = mirror();
    let mut aliased = pod_resource(pod("a", [10, 0, 0, 1]));
    aliased.aliases = vec!["/10.0.0.8".to_owned()];
    let response = response(ADDRESS_TYPE, vec![aliased, pod_resource(pod("b", [10, 0, 0, 2]))], &["/10.0.0.9", "/fd00::9"]);
    let asked = [[10, 0, 0, 1], [10, 0, 0, 8], [10, 0, 0, 9]].map(IpAddr::from);
    let mut answered = mirror.apply(Kind::Address, &response, |address| asked.contains(&address)).answered;
    answered.sort();
    assert_eq!(answered, asked);
}

fn mirror() -> Mirror {
    Mirror::new("node", "cluster.local".parse().expect("legal"))
}

fn apply(mirror: &mut Mirror, kind: Kind, resources: Vec<Resource>, removed: &[&str]) -> Applied {
    mirror.apply(kind, &response(kind.type_url(), resources, removed), |_| false)
}

fn domain_of(mirror: &Mirror, name: &str) -> String {
    mirror.snapshot().workload(&uid(name)).expect("known").identity.trust_domain().to_string()
}
