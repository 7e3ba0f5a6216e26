use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{CONDITION, start};
use crate::controller::index::Finding;
use crate::controller::kubernetes::test_server::ApiServer;
use crate::controller::source::{Kind, ObjectKey};

const GROUP: &str = "security.istio.io";
const POLICY: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: web, namespace: shop}
spec: {rules: [{to: [{operation: {methods: [GET]}}]}]}
status: {conditions: [{type: Other, status: 'True'}]}
";

fn server() -> ApiServer {
    let server = ApiServer::with(POLICY);
    server.offer_policies("v1");
    server
}

fn replica(server: &ApiServer) -> (mpsc::UnboundedSender<Finding>, DropGuard) {
    let stop = CancellationToken::new();
    (start(server.client(), Arc::new(SystemTime::now), stop.clone()), stop.drop_guard())
}

fn finding(server: &ApiServer, problems: &[&str]) -> Finding {
    let policy = server.object(GROUP, "authorizationpolicies", "shop", "web").unwrap();
    Finding {
        policy: ObjectKey { kind: Kind::AuthorizationPolicy, namespace: "shop".to_owned(), name: "web".to_owned() },
        uid: policy["metadata"]["uid"].as_str().map(str::to_owned),
        generation: Some(3),
        problems: Some(problems.iter().map(ToString::to_string).collect()),
    }
}

fn conditions(server: &ApiServer) -> Vec<Value> {
    let policy = server.object(GROUP, "authorizationpolicies", "shop", "web").unwrap();
    policy["status"]["conditions"].as_array().unwrap().clone()
}

#[tokio::test(start_paused = true)]
async fn a_part_that_is_not_enforced_is_told_as_an_event_and_in_the_status() {
    let server = server();
    let (findings, _stop) = replica(&server);
    findings.send(finding(&server, &["rules[0]: needs HTTP", "spec.x: is odd"])).unwrap();
    server.until("the condition", |server| conditions(server).len() == 2).await;
    let events = server.all("events");
    assert_eq!(events.len(), 2);
    let mut told: Vec<_> = events.iter().map(|event| event["message"].as_str().unwrap()).collect();
    told.sort_unstable();
    assert_eq!(told, ["rules[0]: needs HTTP", "spec.x: is odd"]);
    let about = &events[0]["involvedObject"];
    let uid = finding(&server, &[]).uid;
    let wanted = json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "namespace": "shop", "name": "web", "uid": uid,
    });
    assert_eq!((about, events[0]["type"].as_str()), (&wanted, Some("Warning")));
    let own = conditions(&server).pop().unwrap();
    assert_eq!((&own["type"], &own["status"], &own["observedGeneration"]), (&json!(CONDITION), &json!("False"), &json!(3)));
    assert_eq!(own["message"], "rules[0]: needs HTTP\nspec.x: is odd");
    assert_eq!(conditions(&server)[0]["type"], "Other", "what others say stays");
}

#[tokio::test(start_paused = true)]
async fn a_policy_without_a_problem_is_not_written_to() {
    let server = server();
    let (findings, _stop) = replica(&server);
    findings.send(finding(&server, &[])).unwrap();
    tokio::time::sleep(Duration::from_secs(7200)).await;
    assert_eq!((server.all("events").len(), conditions(&server).len()), (0, 1));
    assert_eq!((server.requests("PUT"), server.requests("PATCH")), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_problem_that_was_mended_is_taken_back_also_by_a_replica_that_never_saw_it() {
    let server = server();
    let (findings, stop) = replica(&server);
    findings.send(finding(&server, &["spec.x: is odd"])).unwrap();
    server.until("the condition", |server| conditions(server).len() == 2).await;
    drop(stop);
    let (findings, _stop) = replica(&server);
    findings.send(finding(&server, &[])).unwrap();
    server.until("taken back", |server| conditions(server)[1]["status"] == "True").await;
}

#[tokio::test(start_paused = true)]
async fn several_replicas_tell_once_and_again_while_it_holds() {
    let server = server();
    let replicas = [replica(&server), replica(&server)];
    for (findings, _) in &replicas {
        findings.send(finding(&server, &["spec.x: is odd"])).unwrap();
    }
    server.until("the condition", |server| conditions(server).len() == 2).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!((server.all("events").len(), conditions(&server).len()), (1, 2));
    let written = server.requests("PUT");
    let name = server.all("events")[0]["metadata"]["name"].as_str().unwrap().to_owned();
    // The API server forgets Events after an hour.
    server.delete("", "events", "shop", &name);
    server.until("said again", |server| server.all("events").len() == 1).await;
    assert_eq!(server.requests("PUT"), written, "the status is as it should be");
}

#[tokio::test(start_paused = true)]
async fn without_a_status_of_its_own_a_policy_has_events_only_and_a_server_that_is_down_is_waited_for() {
    let server = ApiServer::with(POLICY);
    server.offer(GROUP, "v1beta1", &["authorizationpolicies"]);
    server.set_down(true);
    let (findings, _stop) = replica(&server);
    findings.send(finding(&server, &["spec.x: is odd"])).unwrap();
    tokio::time::sleep(Duration::from_secs(60)).await;
    server.set_down(false);
    server.until("the event", |server| server.all("events").len() == 1).await;
    assert_eq!(server.all("events")[0]["involvedObject"]["apiVersion"], "security.istio.io/v1beta1");
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(conditions(&server).len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_policy_made_anew_under_the_same_name_does_not_get_the_old_one_s_status() {
    let server = server();
    let before = finding(&server, &["spec.x: is odd"]);
    server.delete(GROUP, "authorizationpolicies", "shop", "web");
    server.put(POLICY);
    let (findings, _stop) = replica(&server);
    findings.send(before).unwrap();
    server.until("the event", |server| server.all("events").len() == 1).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(conditions(&server).len(), 1);
}
