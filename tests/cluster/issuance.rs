//! Promise: an agent gets certificates for the pods of its own node, nobody else gets any, and what was stolen serves until its end only.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use harness::attacker::{DISCOVERY, ask};
use harness::cluster::{CULVERT, ENROLLED, PodSpec};
use harness::forge::Credentials;
use harness::peer::Refused;
use harness::{Cluster, eventually_within, peer};
use serde_json::json;

const CONTROLLER: &str = "culvert-controller.culvert-system.svc.cluster.local";
const AUDIENCE: &str = "culvert-controller";
const AGENT: &str = "culvert-agent";
/// Statuses of gRPC.
const PERMISSION_DENIED: &str = "7";
const UNAUTHENTICATED: &str = "16";

/// A pod that runs as the account of its name.
fn pod<'a>(cluster: Cluster, namespace: &'a str, name: &'a str, node: &'a str) -> PodSpec<'a> {
    cluster.account(namespace, name);
    let mut pod = PodSpec::new(namespace, name, node);
    pod.more = json!({"serviceAccountName": name});
    pod
}

fn identity(namespace: &str, account: &str) -> String {
    format!("spiffe://cluster.local/ns/{namespace}/sa/{account}")
}

/// The token of a node's agent, as its pod has it.
fn agent_token(cluster: Cluster, node: &str) -> String {
    cluster.token(CULVERT, AGENT, Some(&cluster.agent(node)), AUDIENCE)
}

#[test]
fn an_agent_gets_certificates_for_pods_of_its_node_and_a_pod_gets_none() {
    let cluster = Cluster;
    let nodes = cluster.nodes();
    let mesh = cluster.namespace("issued", &[ENROLLED]);
    let outside = cluster.namespace("issued-outside", &[]);
    cluster.pods(&[
        pod(cluster, mesh.name(), "here", &nodes[0]),
        pod(cluster, mesh.name(), "there", &nodes[1]),
        pod(cluster, outside.name(), "thief", &nodes[0]),
    ]);
    let controller = cluster.way_from(outside.name(), "thief", CONTROLLER, 15012);
    let answer = |token: Option<&str>, namespace: &str, account: &str| {
        ask(controller, token, &identity(namespace, account), 0).map(|credentials| credentials.chain.len())
    };
    let agents = [agent_token(cluster, &nodes[0]), agent_token(cluster, &nodes[1])];
    for (agent, account, other) in [(&agents[0], "here", "there"), (&agents[1], "there", "here")] {
        assert_eq!(answer(Some(agent), mesh.name(), account), Ok(2), "{account}: a leaf and a root");
        let refused = Err(PERMISSION_DENIED.to_owned());
        assert_eq!(answer(Some(agent), mesh.name(), other), refused, "{other} is a pod of another node");
        assert_eq!(answer(Some(agent), outside.name(), "thief"), refused, "the thief is not in the mesh");
        assert_eq!(answer(Some(agent), mesh.name(), "nobody"), refused, "nobody runs as nobody");
        assert_eq!(answer(Some(agent), CULVERT, "culvert-controller"), refused, "the controller is no workload of the mesh");
    }

    let mounted = "/var/run/secrets/kubernetes.io/serviceaccount/token";
    let mounted = cluster.exec(mesh.name(), "here", &["cat", mounted]).expect("a pod has a token");
    for (what, token) in [
        ("a pod's own, as it is mounted", mounted),
        ("a pod's own, for the controller", cluster.token(mesh.name(), "here", Some("here"), AUDIENCE)),
        ("an agent's, for the API server", cluster.token(CULVERT, AGENT, Some(&cluster.agent(&nodes[0])), "api")),
        ("the agents', bound to no pod", cluster.token(CULVERT, AGENT, None, AUDIENCE)),
        ("the controller's", cluster.token(CULVERT, "culvert-controller", None, AUDIENCE)),
        ("an agent's with another signature", format!("{}AAAA", &agents[0][..agents[0].len() - 4])),
    ] {
        let refused = Err(UNAUTHENTICATED.to_owned());
        assert_eq!(answer(Some(&token), mesh.name(), "here"), refused, "{what}");
        let configuration = peer::request(controller, DISCOVERY, Some(&token), &[]).expect("an answer");
        assert_eq!(configuration.status, UNAUTHENTICATED, "{what} opens the mesh's configuration");
    }
    assert_eq!(answer(None, mesh.name(), "here"), Err(UNAUTHENTICATED.to_owned()), "no token");
    assert_eq!(answer(Some(&agents[0]), mesh.name(), "here"), Ok(2), "the agent after all of these");
}

#[test]
fn a_stolen_certificate_serves_its_thief_until_its_end_and_no_longer() {
    const LIFE: u8 = 45;
    let cluster = Cluster;
    let nodes = cluster.nodes();
    let mesh = cluster.namespace("stolen", &[ENROLLED]);
    let outside = cluster.namespace("stolen-outside", &[]);
    cluster.mode(mesh.name(), "STRICT");
    let addresses = cluster.pods(&[
        pod(cluster, mesh.name(), "server", &nodes[1]),
        pod(cluster, mesh.name(), "owner", &nodes[0]),
        pod(cluster, outside.name(), "thief", &nodes[0]),
    ]);
    let server: SocketAddr = format!("{}:8080", addresses[0]).parse().expect("an address");
    let controller = cluster.way_from(outside.name(), "thief", CONTROLLER, 15012);
    let tunnels = cluster.way_from(outside.name(), "thief", &addresses[0], 15008);
    let dial = |credentials: Option<&Credentials>| peer::dial_by(tunnels, credentials.cloned(), server, "let me in");
    let asked = Instant::now();
    let stolen = ask(controller, Some(&agent_token(cluster, &nodes[0])), &identity(mesh.name(), "owner"), LIFE);
    let stolen = stolen.expect("a certificate for a pod of the agent's node");
    assert!(dial(Some(&stolen)).expect("the certificate is good still").ends_with("\nlet me in"));
    dial(None).expect_err("without a certificate there is nothing to be had");
    dial(Some(&Credentials::self_signed(&identity(mesh.name(), "owner")))).expect_err("nor with one of the thief's own");
    // Another failure is one of the thief's way there.
    let is_refused =
        |answer: Result<String, Refused>| matches!(answer, Err(Refused::Connection(words)) if words.contains("alert"));
    eventually_within(Duration::from_secs(180), "the certificate is worth nothing", || is_refused(dial(Some(&stolen))));
    // Counted from before it was signed, to the second that certificates count in.
    let served = asked.elapsed();
    assert!(served + Duration::from_secs(1) >= Duration::from_secs(LIFE.into()), "it was refused after {served:?}");
    let told = |line: &serde_json::Value| {
        line["reason"] == "peer_not_authenticated"
            && line["error"].as_str().is_some_and(|error| error.contains("it is expired since"))
    };
    let log = cluster.agent_log(&nodes[1]);
    assert!(log.iter().any(told), "the agent does not say why: {:#?}", &log[log.len().saturating_sub(4)..]);
    // The owner's own was renewed by its agent, or is another.
    assert_eq!(
        cluster.converse(mesh.name(), "owner", &server.to_string(), "it is me").expect("the owner is served").answer,
        "it is me"
    );
}
