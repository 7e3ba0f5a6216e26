use std::sync::Arc;
use std::time::Instant;

use super::{MeshState, Publisher};
use crate::controller::index::{Resource, ResourceKind, Update};

fn resource(name: &str, version: &str, address: &str) -> Resource {
    Resource {
        name: name.into(),
        addresses: vec![address.parse().unwrap()],
        version: version.into(),
        value: version.as_bytes().to_vec(),
    }
}

fn set(publisher: &mut Publisher, changes: &[(&str, Option<Resource>)]) {
    let resources = changes.iter().map(|(name, resource)| (ResourceKind::Address, Arc::from(*name), resource.clone()));
    publisher.publish(Update { resources: resources.collect(), ..Update::default() }, Instant::now());
}

fn changed(state: &MeshState, since: u64) -> Vec<(String, bool)> {
    state.changes(ResourceKind::Address, since).map(|(name, resource)| (name.to_string(), resource.is_some())).collect()
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
