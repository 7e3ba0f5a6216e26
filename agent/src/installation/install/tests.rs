use http::Method;

use super::*;
use crate::installation::chart::NAMESPACE;
use crate::installation::fake_api::FakeApi;

fn installation(sets: &[&str]) -> Installation {
    let sets: Vec<String> = ["namespace.create=true"].iter().chain(sets).map(ToString::to_string).collect();
    let values = Values::merge(&[], &sets).expect("values");
    Installation { values, namespace: NAMESPACE.to_owned(), definitions: true, limit: Duration::from_secs(30) }
}

async fn run(api: &FakeApi, installation: &Installation) -> (Vec<Step>, Result<(), InstallError>) {
    let mut steps = Vec::new();
    let result = install(&api.cluster().await, installation, |step| steps.push(step)).await;
    (steps, result)
}

fn changes(steps: &[Step], wanted: Change) -> usize {
    steps.iter().filter(|step| matches!(step, Step::Object(_, change) if *change == wanted)).count()
}

#[tokio::test(start_paused = true)]
async fn everything_is_made_and_agents_come_last() {
    let api = FakeApi::default();
    let (steps, result) = run(&api, &installation(&[])).await;
    result.expect("installed");
    let places = |kind: &str| {
        let is = |step: &Step| matches!(step, Step::Object(object, Change::Made) if object.kind == kind);
        steps.iter().position(is).unwrap_or_else(|| panic!("no {kind} in {steps:?}"))
    };
    let served = steps
        .iter()
        .position(|step| matches!(step, Step::Rollout(object, progress) if object.kind == "Deployment" && progress.done));
    assert!(places("Namespace") < places("ServiceAccount"));
    assert!(places("Deployment") < served.expect("the controller was waited for"));
    assert!(served.expect("waited for") < places("DaemonSet"));
    assert!(matches!(steps.last(), Some(Step::Rollout(object, progress)) if object.kind == "DaemonSet" && progress.done));
    // What the API offers decides.
    assert!(
        api.object("PodDisruptionBudget", "culvert-controller").is_some_and(|object| object["apiVersion"] == "policy/v1beta1")
    );
}

#[tokio::test(start_paused = true)]
async fn installing_twice_changes_nothing_and_another_value_only_what_it_is_of() {
    let api = FakeApi::default();
    run(&api, &installation(&[])).await.1.expect("installed");
    let (steps, result) = run(&api, &installation(&[])).await;
    result.expect("installed again");
    assert_eq!((changes(&steps, Change::Made), changes(&steps, Change::Changed)), (0, 0), "{steps:?}");
    let (steps, result) = run(&api, &installation(&["controller.replicas=3"])).await;
    result.expect("changed");
    assert_eq!(changes(&steps, Change::Changed), 1, "{steps:?}");
}

#[tokio::test(start_paused = true)]
async fn definitions_that_are_there_are_left_alone() {
    let api = FakeApi::default();
    run(&api, &Installation { definitions: false, ..installation(&[]) }).await.1.expect("installed");
    assert_eq!(api.object("CustomResourceDefinition", "peerauthentications.security.istio.io"), None);
    let istios = serde_json::json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "peerauthentications.security.istio.io", "labels": {"app": "istio-pilot"}},
    });
    let api = FakeApi::with(&[istios]);
    let (steps, result) = run(&api, &installation(&[])).await;
    result.expect("installed");
    assert_eq!(changes(&steps, Change::Kept), 1);
    let definition = api.object("CustomResourceDefinition", "peerauthentications.security.istio.io").expect("there");
    assert_eq!(definition["metadata"]["labels"]["app"], "istio-pilot");
}

#[tokio::test(start_paused = true)]
async fn a_controller_that_does_not_start_is_told_with_its_pods_words_and_no_agent_is_made() {
    let pod = serde_json::json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "c-1", "namespace": NAMESPACE, "labels": {"app.kubernetes.io/name": "culvert-controller"}},
        "status": {"containerStatuses": [{"ready": false, "state": {"waiting": {"reason": "ErrImagePull", "message": "no such image"}}}]},
    });
    let api = FakeApi::with(&[pod]);
    api.get_stuck();
    let error = run(&api, &installation(&[])).await.1.expect_err("it is late").to_string();
    assert!(error.starts_with("Deployment culvert-system/culvert-controller is not rolled out after 30 s"), "{error}");
    assert!(error.contains("c-1: ErrImagePull: no such image"), "{error}");
    assert_eq!(api.object("DaemonSet", "culvert-agent"), None);
}

#[tokio::test(start_paused = true)]
async fn a_refusal_of_the_api_names_the_object() {
    let api = FakeApi::default();
    api.forbid("/apis/rbac.authorization.k8s.io/v1/clusterroles/culvert-controller");
    let error = run(&api, &installation(&[])).await.1.expect_err("refused").to_string();
    assert!(error.starts_with("reading ClusterRole culvert-controller:") && error.contains("is forbidden"), "{error}");
    assert!(api.take_changes().iter().all(|(method, path)| *method == Method::POST || !path.contains("deployments")));
}
