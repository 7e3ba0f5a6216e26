use serde_json::value::RawValue;

use super::Ledger;
use crate::controller::source::{Change, Kind};
use crate::policy::compile::MeshContext;

fn ledger() -> Ledger {
    let trust_domain = "cluster.local".parse().unwrap();
    Ledger::new(Kind::Pod, MeshContext { root_namespace: "istio-system".to_owned(), trust_domain })
}

fn pod(name: &str, version: &str) -> Box<RawValue> {
    let text = format!(
        r#"{{"metadata":{{"name":"{name}","namespace":"shop","resourceVersion":"{version}"}},"spec":{{"containers":[]}}}}"#
    );
    RawValue::from_string(text).unwrap()
}

fn said(changes: impl IntoIterator<Item = Change>) -> Vec<String> {
    let text = |change| match change {
        Change::Applied { object, .. } => format!("+{}", object.key().name),
        Change::Removed(key) => format!("-{}", key.name),
        Change::Refused { key, .. } => format!("!{}", key.name),
    };
    changes.into_iter().map(text).collect()
}

#[test]
fn a_pod_that_was_looked_up_after_its_end_was_told_does_not_come_back() {
    let mut ledger = ledger();
    assert_eq!(said(ledger.changed(&pod("web", "10"))), ["+web"]);
    assert_eq!(said(ledger.removed(&pod("web", "12"))), ["-web"]);
    assert!(ledger.found(&pod("web", "10")).is_none());
}

#[test]
fn a_pod_that_was_looked_up_is_told_once_and_an_older_state_of_it_never() {
    let mut ledger = ledger();
    ledger.reach("10");
    assert_eq!(said(ledger.found(&pod("web", "15"))), ["+web"]);
    assert!(ledger.changed(&pod("web", "14")).is_none());
    assert!(ledger.changed(&pod("web", "15")).is_none());
    assert_eq!(said(ledger.changed(&pod("web", "16"))), ["+web"]);
}

#[test]
fn a_list_removes_what_it_does_not_have_but_not_what_is_younger_than_itself() {
    let mut ledger = ledger();
    assert_eq!(
        said([ledger.listed(&pod("old", "3")), ledger.listed(&pod("gone", "4"))].into_iter().flatten()),
        ["+old", "+gone"]
    );
    assert!(ledger.complete("5").is_empty());
    assert!(ledger.listed(&pod("old", "3")).is_none());
    assert_eq!(said(ledger.found(&pod("young", "9"))), ["+young"]);
    assert_eq!(said(ledger.complete("8")), ["-gone"]);
}

#[test]
fn a_list_also_removes_what_came_after_the_list_before() {
    let mut ledger = ledger();
    assert!(ledger.complete("5").is_empty());
    assert_eq!(said(ledger.changed(&pod("web", "6"))), ["+web"]);
    assert_eq!(said(ledger.complete("9")), ["-web"]);
}

#[test]
fn the_end_of_a_pod_that_was_made_anew_since_is_not_told() {
    let mut ledger = ledger();
    ledger.changed(&pod("web", "10"));
    assert_eq!(said(ledger.found(&pod("web", "20"))), ["+web"]);
    assert!(ledger.removed(&pod("web", "12")).is_none());
}

#[test]
fn versions_that_are_no_numbers_are_taken_as_they_come() {
    let mut ledger = ledger();
    assert_eq!(said(ledger.changed(&pod("web", "b"))), ["+web"]);
    assert!(ledger.changed(&pod("web", "b")).is_none());
    assert_eq!(said(ledger.changed(&pod("web", "a"))), ["+web"]);
    assert!(ledger.found(&pod("other", "c")).is_none());
    assert_eq!(said(ledger.complete("x")), ["-web"]);
}
