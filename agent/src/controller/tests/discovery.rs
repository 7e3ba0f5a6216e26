use std::fmt::Write as _;

use super::{Mesh, names, pod, workload};
use crate::proto::culvert;
use crate::proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE, MESH_TYPE, packed};
use prost::Message;

const WEB: &str = "Kubernetes//Pod/shop/web";

const SERVICE: &str = "
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {clusterIP: 10.96.0.1, selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
";

const POLICY: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: nobody, namespace: shop}
spec: {}
";

#[tokio::test(flavor = "multi_thread")]
async fn the_first_answer_holds_everything() {
    let mesh = Mesh::start(&[
        ("web.yaml", pod("web", "node-a", "10.1.0.2")),
        ("service.yaml", SERVICE.to_owned()),
        ("policy.yaml", POLICY.to_owned()),
    ])
    .await;
    let mut stream = mesh.discovery("node-a").await;
    let (addresses, _) = stream.all(ADDRESS_TYPE, &[]).await;
    assert_eq!(names(&addresses), [WEB, "shop/web.shop.svc.cluster.local"]);
    assert_eq!(addresses[0].aliases, ["/10.1.0.2"]);
    assert_eq!(addresses[1].aliases, ["/10.96.0.1"]);
    let (policies, _) = stream.all(AUTHORIZATION_TYPE, &[]).await;
    assert_eq!(names(&policies), ["shop/nobody"]);
    let (settings, _) = stream.all(MESH_TYPE, &[]).await;
    let settings = culvert::Mesh::decode(settings[0].resource.as_ref().unwrap().value.as_slice()).unwrap();
    assert_eq!(settings.trust_domain, "cluster.local");
    assert_eq!(settings.cluster_ranges, ["10.1.0.0/24", "10.2.0.0/24", "fd00:1::/64"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_type_without_resources_is_answered_too() {
    let mesh = Mesh::start(&[]).await;
    let mut stream = mesh.discovery("node-a").await;
    assert!(stream.all(AUTHORIZATION_TYPE, &[]).await.0.is_empty());
    assert!(stream.all("type.googleapis.com/envoy.config.cluster.v3.Cluster", &[]).await.0.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn after_the_first_answer_only_what_changes_is_sent() {
    let mesh = Mesh::start(&[("web.yaml", pod("web", "node-a", "10.1.0.2")), ("db.yaml", pod("db", "node-b", "10.2.0.2"))]).await;
    let mut stream = mesh.discovery("node-a").await;
    assert_eq!(stream.all(ADDRESS_TYPE, &[]).await.0.len(), 2);
    mesh.write("web.yaml", &pod("web", "node-a", "10.1.0.3"));
    let change = stream.next().await.unwrap();
    assert_eq!(names(&change.resources), [WEB]);
    assert_eq!(workload(&change.resources[0]).addresses, [vec![10, 1, 0, 3]]);
    mesh.remove("db.yaml");
    let change = stream.next().await.unwrap();
    assert_eq!((change.resources.len(), change.removed_resources), (0, vec!["Kubernetes//Pod/shop/db".to_owned()]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_comes_before_the_workload_that_names_it_and_goes_after() {
    let mesh = Mesh::start(&[("web.yaml", pod("web", "node-a", "10.1.0.2"))]).await;
    let mut stream = mesh.discovery("node-a").await;
    stream.all(ADDRESS_TYPE, &[]).await;
    stream.all(AUTHORIZATION_TYPE, &[]).await;
    let selecting = POLICY.replace("spec: {}", "spec: {selector: {matchLabels: {app: web}}}");
    mesh.write("policy.yaml", &selecting);
    assert_eq!(names(&stream.next().await.unwrap().resources), ["shop/nobody"]);
    let change = stream.next().await.unwrap();
    assert_eq!(workload(&change.resources[0]).authorization_policies, ["shop/nobody"]);
    mesh.remove("policy.yaml");
    assert_eq!(names(&stream.next().await.unwrap().resources), [WEB]);
    assert_eq!(stream.next().await.unwrap().removed_resources, ["shop/nobody"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_written_before_the_question_is_in_the_answer() {
    let mesh = Mesh::start(&[]).await;
    let mut stream = mesh.discovery("node-a").await;
    stream.all(ADDRESS_TYPE, &[]).await;
    for round in 2..30 {
        mesh.write("web.yaml", &pod("web", "node-a", &format!("10.1.0.{round}")));
        let alias = format!("/10.1.0.{round}");
        stream.ask(ADDRESS_TYPE, &[&alias], &[]).await;
        // The change itself is told as well, before the answer or after it.
        loop {
            let answer = stream.next().await.unwrap();
            assert!(answer.removed_resources.is_empty(), "round {round}: {:?}", answer.removed_resources);
            if workload(&answer.resources[0]).addresses == [vec![10, 1, 0, round]] {
                break;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_name_is_answered_by_its_absence() {
    let mesh = Mesh::start(&[]).await;
    let mut stream = mesh.discovery("node-a").await;
    stream.all(ADDRESS_TYPE, &[]).await;
    stream.ask(ADDRESS_TYPE, &["/10.1.0.77", "no/such.name"], &[]).await;
    assert_eq!(stream.next().await.unwrap().removed_resources, ["/10.1.0.77", "no/such.name"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_without_a_wildcard_hears_of_what_it_named_only() {
    let mesh = Mesh::start(&[("web.yaml", pod("web", "node-a", "10.1.0.2"))]).await;
    let mut stream = mesh.discovery("node-b").await;
    stream.ask(ADDRESS_TYPE, &["network/10.1.0.2", "/10.2.0.2"], &[]).await;
    let answer = stream.next().await.unwrap();
    assert_eq!(names(&answer.resources), [WEB]);
    assert_eq!(answer.resources[0].aliases, ["/10.1.0.2", "network/10.1.0.2"]);
    assert_eq!(answer.removed_resources, ["/10.2.0.2"]);
    mesh.write("other.yaml", &pod("other", "node-a", "10.1.0.9"));
    mesh.write("db.yaml", &pod("db", "node-b", "10.2.0.2"));
    assert_eq!(names(&stream.next().await.unwrap().resources), ["Kubernetes//Pod/shop/db"]);
    mesh.remove("web.yaml");
    assert_eq!(stream.next().await.unwrap().removed_resources, [WEB]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_comes_back_hears_only_what_differs_also_from_a_new_controller() {
    let mut files = vec![("web.yaml", pod("web", "node-a", "10.1.0.2")), ("service.yaml", SERVICE.to_owned())];
    files.push(("db.yaml", pod("db", "node-b", "10.2.0.2")));
    let mut mesh = Mesh::start(&files).await;
    let mut stream = mesh.discovery("node-a").await;
    let (resources, _) = stream.all(ADDRESS_TYPE, &[]).await;
    let held: Vec<_> = resources.iter().map(|resource| (resource.name.clone(), resource.version.clone())).collect();
    drop(stream);
    mesh.restart().await;
    let mut stream = mesh.discovery("node-a").await;
    assert_eq!(stream.all(ADDRESS_TYPE, &held).await, (vec![], vec![]));
    drop(stream);
    mesh.write("web.yaml", &pod("web", "node-a", "10.1.0.9"));
    mesh.remove("db.yaml");
    mesh.restart().await;
    let mut stream = mesh.discovery("node-a").await;
    let (resources, removed) = stream.all(ADDRESS_TYPE, &held).await;
    assert_eq!((names(&resources), removed), (vec![WEB], vec!["Kubernetes//Pod/shop/db".to_owned()]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_may_tell_what_it_holds_packed_and_is_told_what_differs() {
    let pods = [("web.yaml", pod("web", "node-a", "10.1.0.1")), ("db.yaml", pod("db", "node-a", "10.1.0.2"))];
    let mesh = Mesh::start(&pods).await;
    let mut stream = mesh.discovery("node-a").await;
    let (resources, _) = stream.all(ADDRESS_TYPE, &[]).await;
    let digests: Vec<_> = resources.iter().map(|resource| packed::digest_of(&resource.version).unwrap()).collect();
    let all = packed::pack(digests.iter().copied());
    let mut stream = mesh.discovery("node-a").await;
    let held = |packed: &str| [(packed::NAME.to_owned(), packed.to_owned())];
    let nothing = (Vec::new(), Vec::new());
    assert_eq!(stream.all(ADDRESS_TYPE, &held(&all)).await, nothing);
    let some = packed::pack(digests[..1].iter().copied().chain([[7; 12]]));
    let mut stream = mesh.discovery("node-a").await;
    let (told, removed) = stream.all(ADDRESS_TYPE, &held(&some)).await;
    assert_eq!((names(&told), removed), (names(&resources[1..]), vec![packed::name_of([7; 12])]));
    // What is not of the form counts for nothing held.
    let mut stream = mesh.discovery("node-a").await;
    let (told, removed) = stream.all(ADDRESS_TYPE, &held("?")).await;
    assert_eq!((told.len(), removed), (resources.len(), vec![packed::NAME.to_owned()]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_first_answer_comes_in_parts_and_its_end_can_be_told() {
    let mut pods = String::new();
    for number in 0..2500 {
        let ip = format!("10.1.{}.{}", number / 200, number % 200 + 1);
        write!(pods, "---\n{}", pod(&format!("pod-{number}"), "node-a", &ip)).unwrap();
    }
    let mesh = Mesh::start(&[("pods.yaml", pods)]).await;
    let mut stream = mesh.discovery("node-a").await;
    stream.ask(ADDRESS_TYPE, &[], &[]).await;
    let (mut told, mut parts, mut partial) = (0, 0, true);
    while partial {
        let part = stream.next().await.unwrap();
        partial = part.system_version_info == "partial";
        // What a stream's buffer must hold, and keeps.
        assert!(part.encoded_len() < 100 << 10, "a part of {} bytes", part.encoded_len());
        told += part.resources.len();
        parts += 1;
    }
    assert_eq!(told, 2500);
    assert!(parts > 3, "{parts} parts");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_removed_loses_its_stream() {
    let mesh = Mesh::start(&[]).await;
    let mut stream = mesh.discovery("node-b").await;
    stream.all(ADDRESS_TYPE, &[]).await;
    let token = mesh.state.path().join("tokens/node-b");
    assert!(token.exists());
    let (first, rest) = super::NODES.split_once("---").unwrap();
    let (_, last) = rest.split_once("---").unwrap();
    mesh.write("nodes.yaml", &format!("{first}---{last}"));
    let refused = stream.next().await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Unauthenticated, "{refused}");
    assert!(!token.exists());
}

/// A pod of `node-a` whose address the kubelet has not told yet.
fn unplaced(name: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, uid: uid-of-{name}}}\n\
         spec: {{nodeName: node-a, containers: []}}\n"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_agent_of_its_node_is_told_of_a_pod_without_an_address() {
    let mesh = Mesh::start(&[("web.yaml", unplaced("web"))]).await;
    let (mut own, mut others) = (mesh.discovery("node-a").await, mesh.discovery("node-b").await);
    assert_eq!(names(&own.all(ADDRESS_TYPE, &[]).await.0), [WEB]);
    assert!(others.all(ADDRESS_TYPE, &[]).await.0.is_empty());
    // Nor by its name, to one who asks for nothing else.
    let mut curious = mesh.discovery("node-b").await;
    curious.ask(ADDRESS_TYPE, &[WEB], &[]).await;
    let answer = curious.next().await.unwrap();
    assert_eq!((answer.resources.len(), answer.removed_resources), (0, vec![WEB.to_owned()]));
    mesh.write("web.yaml", &pod("web", "node-a", "10.1.0.2"));
    for stream in [&mut own, &mut others, &mut curious] {
        let change = stream.next().await.unwrap();
        assert_eq!(names(&change.resources), [WEB]);
    }
    // Made anew under its name: its former self is gone for everybody.
    mesh.write("web.yaml", &unplaced("web"));
    assert_eq!(names(&own.next().await.unwrap().resources), [WEB]);
    for stream in [&mut others, &mut curious] {
        let change = stream.next().await.unwrap();
        assert_eq!((change.resources.len(), change.removed_resources), (0, vec![WEB.to_owned()]));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_connects_again_is_told_that_what_it_held_is_another_nodes_now() {
    let mesh = Mesh::start(&[("web.yaml", pod("web", "node-b", "10.2.0.2"))]).await;
    let mut own = mesh.discovery("node-a").await;
    let (held, _) = own.all(ADDRESS_TYPE, &[]).await;
    mesh.write("web.yaml", &unplaced("web"));
    assert!(workload(&own.next().await.unwrap().resources[0]).addresses.is_empty());
    let mut again = mesh.discovery("node-b").await;
    let versions = [(held[0].name.clone(), held[0].version.clone())];
    let (resources, removed) = again.all(ADDRESS_TYPE, &versions).await;
    assert_eq!((resources.len(), removed), (0, vec![WEB.to_owned()]));
}
