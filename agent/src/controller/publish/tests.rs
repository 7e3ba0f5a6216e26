use std::sync::Arc;
use std::time::Instant;

use super::{MeshState, Publisher};
use crate::controller::index::{Resource, ResourceKind, Update};

fn resource(name: &str, version: &str, address: &str) -> Resource {
    Resource {
        name: name.into(),
        addresses: vec![address.parse().unwrap()],
        node: None,
        home: None,
        version: version.into(),
        value: version.as_bytes().to_vec(),
    }
}

fn set(publisher: &mut Publisher, changes: &[(&str, Option<Resource>)]) {
    let resources = changes.iter().map(|(name, resource)| (ResourceKind::Address, Arc::from(*name), resource.clone()));
    publisher.publish(Update { resources: resources.collect(), ..Update::default() }, Instant::now());
}

fn changed(state: &MeshState, since: u64) -> Vec<(String, bool)> {
    changed_for(state, since, "n1")
}

fn changed_for(state: &MeshState, since: u64, node: &str) -> Vec<(String, bool)> {
    state.changes(ResourceKind::Address, since, node).map(|(name, resource)| (name.to_string(), resource.is_some())).collect()
}

#[test]
fn a_name_that_changes_often_is_told_once_to_who_was_away() {
    let (mut publisher, states) = Publisher::new();
    set(&mut publisher, &[("a", Some(resource("a", "1", "10.0.0.1"))), ("b", Some(resource("b", "1", "10.0.0.2")))]);
    let before = states.borrow().sequence();
    for version in 2..100 {
        set(&mut publisher, &[("a", Some(resource("a", &version.to_string(), "10.0.0.1")))]);
    }
    assert_eq!(changed(&states.borrow(), before), [("a".to_owned(), true)]);
}

#[test]
fn what_stays_the_same_is_no_change() {
    let (mut publisher, states) = Publisher::new();
    set(&mut publisher, &[("a", Some(resource("a", "1", "10.0.0.1"))), ("never-there", None)]);
    let before = states.borrow().sequence();
    set(&mut publisher, &[("a", Some(resource("a", "1", "10.0.0.1"))), ("never-there", None)]);
    assert_eq!(states.borrow().sequence(), before);
}

#[test]
fn an_address_leads_to_its_present_owner() {
    let (mut publisher, states) = Publisher::new();
    let address = "10.0.0.1".parse().unwrap();
    let owner = || states.borrow().at_address(address).map(|resource| resource.name.to_string());
    set(&mut publisher, &[("a", Some(resource("a", "1", "10.0.0.1")))]);
    assert_eq!(owner().as_deref(), Some("a"));
    set(&mut publisher, &[("b", Some(resource("b", "1", "10.0.0.1"))), ("a", None)]);
    assert_eq!(owner().as_deref(), Some("b"));
    set(&mut publisher, &[("b", Some(resource("b", "2", "10.0.0.2")))]);
    assert_eq!(owner(), None);
}

#[test]
fn old_removals_are_forgotten_and_who_has_not_heard_of_them_is_known() {
    let (mut publisher, states) = Publisher::new();
    publisher.kept = 2;
    set(&mut publisher, &[("stays", Some(resource("stays", "1", "10.0.0.9")))]);
    let early = states.borrow().sequence();
    for name in ["a", "b", "c"] {
        set(&mut publisher, &[(name, Some(resource(name, "1", "10.0.0.1")))]);
        set(&mut publisher, &[(name, None)]);
    }
    let state = states.borrow();
    assert!(!state.remembers(early));
    assert!(state.remembers(early + 2));
    assert_eq!(changed(&state, early + 2), [("b".to_owned(), false), ("c".to_owned(), false)]);
    assert_eq!(state.entries.len(), 3);
    assert_eq!(state.resources(ResourceKind::Address).count(), 1);
}

#[test]
fn what_is_for_one_node_is_told_there_and_others_hear_that_what_they_had_is_gone() {
    let (mut publisher, states) = Publisher::new();
    let sequence = || states.borrow().sequence();
    let seen = |since: u64| ["n1", "n2"].map(|node| changed_for(&states.borrow(), since, node));
    let told = |there: bool| vec![("a".to_owned(), there)];
    let only = |node: &str| Some(Resource { node: Some(node.into()), ..resource("a", node, "10.0.0.1") });
    let nothing = sequence();
    set(&mut publisher, &[("a", only("n1"))]);
    assert_eq!(seen(nothing), [told(true), vec![]]);
    let placed = sequence();
    set(&mut publisher, &[("a", Some(resource("a", "2", "10.0.0.1")))]);
    assert_eq!(seen(placed), [told(true), told(true)]);
    let by_all = sequence();
    set(&mut publisher, &[("a", only("n2"))]);
    assert_eq!(seen(by_all), [told(false), told(true)]);
    set(&mut publisher, &[("a", Some(resource("a", "3", "10.0.0.1")))]);
    let again = sequence();
    // Made anew under its name, for another node: who has heard of the end in between needs no second word of it.
    set(&mut publisher, &[("a", None)]);
    let ended = sequence();
    set(&mut publisher, &[("a", only("n2"))]);
    assert_eq!(seen(again), [told(false), told(true)]);
    assert_eq!(seen(ended), [vec![], told(true)]);
}
