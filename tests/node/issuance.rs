//! Promise: an agent gets certificates for the enrolled pods of its own node, and for nobody else.

use std::sync::Arc;

use culvert::identity::{ControllerEndpoint, ControllerIssuer, IssueError, Issuer as _};
use harness::forge::signing_request;
use harness::{Mesh, PodSpec, eventually, peer};

const CONTROLLER: &str = "https://10.77.0.1:15012";

/// Asks as the agent of a node would, with the token in this file below the state directory.
fn ask(mesh: &Mesh, token: &str, account: &str) -> Result<Vec<String>, IssueError> {
    let state = mesh.directory().join("state");
    let (root, token) = (state.join("root-cert.pem"), state.join(token));
    let id = format!("spiffe://cluster.local/ns/shop/sa/{account}").parse().expect("an identity");
    mesh.node(0).run(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let endpoint = ControllerEndpoint::new(CONTROLLER, &root, &token).expect("an address");
            let issuer = Arc::new(ControllerIssuer::new(endpoint, std::time::Duration::from_secs(3600)));
            issuer.issue(id, signing_request()).await
        })
    })
}

fn refusal(answer: Result<Vec<String>, IssueError>) -> String {
    match answer {
        Err(IssueError::Refused { message }) => message.to_string(),
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn a_node_gets_its_own_workloads_certificates_and_no_others() {
    let mut mesh = Mesh::start();
    let _pods = [("here", 0, true), ("there", 1, true), ("outsider", 0, false)]
        .map(|(name, node, enrolled)| mesh.pod(PodSpec { name, namespace: "shop", node, enrolled }));
    for (token, account) in [("tokens/a", "here"), ("tokens/b", "there")] {
        let chain = ask(&mesh, token, account).expect("a workload of that node");
        assert_eq!(chain.len(), 2, "a leaf and a root");
    }
    for (token, account, why) in [
        ("tokens/a", "there", "a workload of another node"),
        ("tokens/b", "here", "a workload of another node"),
        ("tokens/a", "outsider", "a pod of its own that is not in the mesh"),
        ("tokens/a", "nobody", "an account without a pod"),
    ] {
        let words = refusal(ask(&mesh, token, account));
        let wanted = format!("sa/{account} is not the identity of an enrolled pod on node");
        assert!(words.contains(&wanted), "{why}: {words}");
    }
}

#[test]
fn without_the_token_of_a_node_there_is_nothing_to_be_had() {
    let mut mesh = Mesh::start();
    let _here = mesh.pod(PodSpec { name: "here", namespace: "shop", node: 0, enrolled: true });
    let state = mesh.directory().join("state");
    let own = std::fs::read_to_string(state.join("tokens/a")).expect("the controller keeps it there");
    let mut other: Vec<u8> = own.clone().into_bytes();
    other[0] = if other[0] == b'A' { b'B' } else { b'A' };
    let other = String::from_utf8(other).expect("text");
    for (name, content) in [("almost", other.as_str()), ("short", &own[..own.len() - 1]), ("text", "let me in")] {
        std::fs::write(state.join(name), content).expect("a file");
        let words = refusal(ask(&mesh, name, "here"));
        assert!(words.contains("the token is not that of any node"), "{name}: {words}");
    }
    eventually("the refusal is logged", || mesh.log("controller").contains("with an unknown token was refused"));

    let controller = ([10, 77, 0, 1], 15012).into();
    for path in [
        "/istio.v1.auth.IstioCertificateService/CreateCertificate",
        "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources",
    ] {
        const UNAUTHENTICATED: &str = "16";
        assert_eq!(peer::call(mesh.node(0), controller, path, None), Ok(UNAUTHENTICATED.to_owned()), "{path}");
        assert_eq!(peer::call(mesh.node(0), controller, path, Some(other.clone())), Ok(UNAUTHENTICATED.to_owned()), "{path}");
        let known = peer::call(mesh.node(0), controller, path, Some(own.clone()));
        assert!(known.as_ref().is_ok_and(|status| status != UNAUTHENTICATED), "{path}: {known:?}");
    }

    assert!(ask(&mesh, "tokens/a", "here").is_ok());
    std::fs::copy(state.join("tokens/a"), state.join("kept")).expect("a copy");
    mesh.delete("node-a");
    eventually("the token goes with its node", || ask(&mesh, "kept", "here").is_err());
    assert!(refusal(ask(&mesh, "kept", "here")).contains("the token is not that of any node"));
}
