use super::super::connection::fixtures::{info, service, workload};
use super::super::http::tests::{Serving, ask, serve};
use super::*;
use crate::model::{Action, Authorization, CloseReason, Scope};

async fn admin(observer: Observer) -> Serving {
    let mut edit = Snapshot::empty("node-a").edit();
    let mut stock = workload("store", "stock", "10.1.1.2");
    stock.services = Arc::new([(service().key(), service().ports.into())].into_iter().collect());
    edit.upsert_workload(stock);
    edit.upsert_workload(workload("shop", "cart", "10.1.0.1"));
    edit.upsert_service(service());
    edit.upsert_policy(Authorization {
        namespace: "store".into(),
        name: "deny-all".into(),
        scope: Scope::Namespace,
        action: Action::Deny,
        dry_run: false,
        rules: vec![],
    });
    let (_, snapshot) = watch::channel(Arc::new(edit.finish()));
    #[derive(Serialize)]
    struct Certificate {
        identity: &'static str,
        expires: u64,
    }
    let certificates = source(|| vec![Certificate { identity: "spiffe://td/ns/a/sa/b", expires: 7 }]);
    let pods = source(|| vec![json!({ "name": "cart-0", "enrolled": true })]);
    serve(router(AdminSources { node: "node-a".into(), snapshot, certificates, pods, observer })).await
}

async fn json_of(serving: &Serving, path: &str) -> Value {
    let (status, head, body) = ask(serving.addr, "GET", path).await;
    assert_eq!(status, 200, "{path}: {body}");
    assert!(head.contains("content-type: application/json"), "{head}");
    serde_json::from_str(&body).expect("JSON")
}

#[tokio::test]
async fn the_help_page_names_every_page_and_each_answers() {
    let serving = admin(Observer::new("node-a")).await;
    let (status, _, help) = ask(serving.addr, "GET", "/").await;
    assert_eq!(status, 200);
    for (path, _) in PAGES {
        assert!(help.contains(path));
        json_of(&serving, path).await;
    }
    assert_eq!(ask(serving.addr, "GET", "/nowhere").await.0, 404);
}

#[tokio::test]
async fn the_snapshot_is_shown_in_order() {
    let serving = admin(Observer::new("node-a")).await;
    let workloads = json_of(&serving, "/workloads").await;
    let uids: Vec<_> = workloads.as_array().expect("a list").iter().map(|workload| workload["uid"].clone()).collect();
    assert_eq!(uids, ["Kubernetes//Pod/shop/cart-0", "Kubernetes//Pod/store/stock-0"]);
    let services = json_of(&serving, "/services").await;
    assert_eq!(services[0]["ready_endpoints"], json!(["Kubernetes//Pod/store/stock-0"]));
    let policies = json_of(&serving, "/policies").await;
    assert_eq!((&policies[0]["name"], &policies[0]["action"]), (&json!("deny-all"), &json!("DENY")));
    let dump = json_of(&serving, "/config_dump").await;
    assert_eq!((&dump["workloads"], &dump["mesh"]["node"]), (&workloads, &json!("node-a")));
    assert_eq!(dump["certificates"], json!([{ "identity": "spiffe://td/ns/a/sa/b", "expires": 7 }]));
}

#[tokio::test]
async fn connections_are_shown_while_they_are_open() {
    let observer = Observer::new("node-a");
    let (first, second) = (observer.open(info()), observer.open(info()));
    let serving = admin(observer).await;
    let page = json_of(&serving, "/connections?limit=1").await;
    assert_eq!((&page["total"], page["connections"].as_array().map(Vec::len)), (&json!(2), Some(1)));
    assert_eq!(page["connections"][0]["source"]["workload"], "Kubernetes//Pod/shop/cart-0");
    first.close(CloseReason::Finished, None);
    second.close(CloseReason::Finished, None);
    assert_eq!(json_of(&serving, "/connections").await, json!({ "total": 0, "connections": [] }));
    assert_eq!(ask(serving.addr, "GET", "/connections?limit=many").await.0, 400);
}

#[tokio::test]
async fn a_log_level_that_is_none_is_refused_with_the_words_that_are() {
    let serving = admin(Observer::new("node-a")).await;
    let (status, _, body) = ask(serving.addr, "POST", "/log?level=loud").await;
    assert_eq!(status, 400);
    assert!(body.contains("`loud` is not a log level: use error, warn, info"), "{body}");
    assert_eq!(ask(serving.addr, "POST", "/log").await.0, 400);
    assert_eq!(ask(serving.addr, "GET", "/log?level=debug").await.0, 200, "a GET changes nothing, and shows the filter");
}
