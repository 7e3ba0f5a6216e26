//! What is held, told to a new stream in Culvert's packed form, and what the answers leave.

use super::super::super::fixture::{mesh_resource, pod, pod_resource, response, uid};
use super::*;

const VERSIONS: [&str; 4] = [
    "00000000000000000000000000000000",
    "11111111111111111111111111111111",
    "22222222222222222222222222222222",
    "33333333333333333333333333333333",
];

#[test]
fn versions_are_told_packed_to_culverts_own_controllers_and_by_name_to_others() {
    let mut mirror = mirror();
    apply(&mut mirror, Kind::Address, vec![of_version(0, "a"), of_version(1, "b")], &[]);
    assert_eq!(mirror.tell(Kind::Address), [(uid("a"), VERSIONS[0].to_owned()), (uid("b"), VERSIONS[1].to_owned())].into());
    apply(&mut mirror, Kind::Mesh, vec![mesh_resource("td", &[])], &[]);
    let told = mirror.tell(Kind::Address);
    let packed = packed::unpack(&told[packed::NAME]).expect("of the form");
    assert_eq!((told.len(), packed), (1, [0, 1].map(digest).into()));
    // A version that is no digest has no place in it.
    apply(&mut mirror, Kind::Address, vec![pod_resource(pod("c", [10, 0, 0, 3]))], &[]);
    assert_eq!(mirror.tell(Kind::Address).len(), 3);
}

#[test]
fn what_an_answer_names_by_its_digest_is_gone_and_what_came_in_its_place_is_not() {
    let mut mirror = resuming();
    // `a` is as it was, `b` has changed, `c` is gone.
    let gone = [1, 2].map(|number| packed::name_of(digest(number)));
    let gone = gone.each_ref().map(String::as_str);
    let applied = apply(&mut mirror, Kind::Address, vec![of_version(3, "b")], &gone);
    assert_eq!(names(&mirror), [uid("a"), uid("b")]);
    assert_eq!(applied.gone(), 1);
    let news = applied.news(response(ADDRESS_TYPE, vec![of_version(3, "b")], &gone));
    assert_eq!((news.resources.len(), news.removed_resources), (1, vec![uid("c")]));
}

#[test]
fn a_controller_that_does_not_know_the_form_says_all_that_there_is() {
    let mut mirror = resuming();
    let mut part = response(ADDRESS_TYPE, vec![of_version(0, "a")], &[]);
    part.system_version_info = PARTIAL.to_owned();
    mirror.apply(Kind::Address, &part, |_| false);
    let applied = apply(&mut mirror, Kind::Address, vec![of_version(3, "b")], &[packed::NAME]);
    assert_eq!(names(&mirror), [uid("a"), uid("b")]);
    assert_eq!(applied.gone(), 1);
}

#[test]
fn such_names_mean_nothing_where_nothing_was_told() {
    let gone = packed::name_of(digest(0));
    for removed in [packed::NAME, &gone] {
        let mut mirror = resuming();
        apply(&mut mirror, Kind::Address, vec![], &[]);
        apply(&mut mirror, Kind::Address, vec![], &[removed]);
        assert_eq!(names(&mirror).len(), 3, "the first answer was over");
        let mut mirror = resuming();
        mirror.begin_stream();
        apply(&mut mirror, Kind::Address, vec![], &[removed]);
        assert_eq!(names(&mirror).len(), 3, "it was told on another stream");
    }
}

/// A mirror of three pods that has told a new stream what it holds.
fn resuming() -> Mirror {
    let mut mirror = mirror();
    apply(&mut mirror, Kind::Mesh, vec![mesh_resource("td", &[])], &[]);
    apply(&mut mirror, Kind::Authorization, vec![], &[]);
    let pods = ["a", "b", "c"].into_iter().enumerate().map(|(number, name)| of_version(number, name)).collect();
    apply(&mut mirror, Kind::Address, pods, &[]);
    mirror.begin_stream();
    assert_eq!(mirror.tell(Kind::Address).len(), 1);
    mirror
}

fn of_version(number: usize, name: &str) -> Resource {
    Resource { version: VERSIONS[number].to_owned(), ..pod_resource(pod(name, [10, 0, 0, number as u8 + 1])) }
}

fn digest(number: usize) -> packed::Digest {
    packed::digest_of(VERSIONS[number]).expect("a digest")
}

fn names(mirror: &Mirror) -> Vec<String> {
    let mut names: Vec<_> = mirror.snapshot().workloads().map(|workload| workload.uid.to_string()).collect();
    names.sort();
    names
}
