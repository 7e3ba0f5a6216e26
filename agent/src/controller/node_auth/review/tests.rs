use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};
use tonic::metadata::MetadataMap;
use tonic::{Code, Status};

use super::{KEPT, NodeAuth, TokenReviews};
use crate::controller::kubernetes::test_server::ApiServer;

const AGENT: &str = "system:serviceaccount:culvert-system:culvert-agent";
const PODS: &str = "
{apiVersion: v1, kind: Pod, metadata: {name: agent-a, namespace: culvert-system, uid: uid-a}, spec: {nodeName: node-a}}
---
{apiVersion: v1, kind: Pod, metadata: {name: agent-b, namespace: culvert-system, uid: uid-b}, spec: {nodeName: node-b}}
---
{apiVersion: v1, kind: Pod, metadata: {name: agent-c, namespace: culvert-system, uid: uid-c}, spec: {}}
";
const REVIEWS: &str = "POST /apis/authentication.k8s.io/v1/tokenreviews";

/// What a token says, and what the API server says of it.
#[derive(Clone)]
struct Token {
    audiences: Vec<&'static str>,
    subject: &'static str,
    lives: i64,
    user: &'static str,
    reviewed_for: Vec<&'static str>,
    extra: Value,
}

fn bound(pod: &str, uid: &str) -> Value {
    json!({ "authentication.kubernetes.io/pod-name": [pod], "authentication.kubernetes.io/pod-uid": [uid] })
}

/// The token of the agent on node-a.
fn good() -> Token {
    Token {
        audiences: vec!["culvert-controller"],
        subject: AGENT,
        lives: 3600,
        user: AGENT,
        reviewed_for: vec!["culvert-controller"],
        extra: bound("agent-a", "uid-a"),
    }
}

impl Token {
    /// The token's text, which the server knows from now on.
    fn on(&self, server: &ApiServer) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let claims = json!({ "aud": self.audiences, "sub": self.subject, "exp": now.checked_add_signed(self.lives).unwrap() });
        let signature = URL_SAFE_NO_PAD.encode(self.extra.to_string() + self.user);
        let text = format!("e30.{}.{signature}", URL_SAFE_NO_PAD.encode(claims.to_string()));
        let user = json!({ "username": self.user, "extra": self.extra });
        server.answer_review(&text, json!({ "authenticated": true, "audiences": self.reviewed_for, "user": user }));
        text
    }
}

fn reviews(server: &ApiServer) -> TokenReviews {
    let reviews = TokenReviews::new(server.client(), "culvert-system");
    let nodes = ["node-a", "node-b"].map(str::to_owned).into();
    assert!(reviews.set_nodes(&nodes).is_empty());
    reviews
}

async fn ask(reviews: &TokenReviews, token: &str) -> Result<String, Status> {
    let mut metadata = MetadataMap::new();
    metadata.insert("authorization", format!("Bearer {token}").parse().unwrap());
    reviews.authenticate(&metadata).await.map(|node| node.to_string())
}

async fn refused(token: &Token, code: Code, why: &str) {
    let server = ApiServer::with(PODS);
    let status = ask(&reviews(&server), &token.on(&server)).await.unwrap_err();
    assert!(status.code() == code && status.message().contains(why), "{status}, not {why}");
}

#[tokio::test(start_paused = true)]
async fn an_agent_s_token_tells_its_node() {
    let server = ApiServer::with(PODS);
    let reviews = reviews(&server);
    assert_eq!(ask(&reviews, &good().on(&server)).await.unwrap(), "node-a");
    let other = Token { extra: bound("agent-b", "uid-b"), ..good() };
    assert_eq!(ask(&reviews, &other.on(&server)).await.unwrap(), "node-b", "by the API's word, whatever the agent says");
}

#[tokio::test(start_paused = true)]
async fn a_token_for_another_audience_is_refused_by_its_claims_and_by_the_api_server() {
    refused(&Token { audiences: vec!["https://kubernetes.default.svc"], ..good() }, Code::Unauthenticated, "not for").await;
    refused(&Token { reviewed_for: vec![], ..good() }, Code::Unauthenticated, "not for `culvert-controller`").await;
    let other = vec!["https://kubernetes.default.svc"];
    refused(&Token { reviewed_for: other, ..good() }, Code::Unauthenticated, "not for `culvert-controller`").await;
}

#[tokio::test(start_paused = true)]
async fn a_token_of_another_account_is_refused_by_its_claims_and_by_the_api_server() {
    let pod = "system:serviceaccount:shop:web";
    refused(&Token { subject: pod, user: pod, ..good() }, Code::Unauthenticated, "only agents may ask").await;
    // Claims are not believed.
    refused(&Token { user: pod, ..good() }, Code::Unauthenticated, "only agents may ask").await;
    let twin = "system:serviceaccount:shop:culvert-agent";
    refused(&Token { subject: twin, user: twin, ..good() }, Code::Unauthenticated, "only agents may ask").await;
}

#[tokio::test(start_paused = true)]
async fn a_token_that_has_ended_or_is_none_is_refused_without_asking() {
    let server = ApiServer::with(PODS);
    let reviews = reviews(&server);
    let expired = Token { lives: -5, ..good() }.on(&server);
    assert!(ask(&reviews, &expired).await.unwrap_err().message().contains("ended 5 s ago"));
    for none in ["x", "a.b", "a.b.c", "e30.e30.x", "a.b.c.d"] {
        assert_eq!(ask(&reviews, none).await.unwrap_err().code(), Code::Unauthenticated, "{none}");
    }
    assert_eq!(reviews.authenticate(&MetadataMap::new()).await.unwrap_err().code(), Code::Unauthenticated);
    assert_eq!(server.requests(REVIEWS), 0);
}

#[tokio::test(start_paused = true)]
async fn a_token_that_the_api_server_does_not_know_is_refused() {
    let (server, forger) = (ApiServer::with(PODS), ApiServer::new());
    let status = ask(&reviews(&server), &good().on(&forger)).await.unwrap_err();
    assert!(status.message().contains("does not accept the token: unknown token"), "{status}");
}

#[tokio::test(start_paused = true)]
async fn a_token_that_is_not_bound_to_a_live_pod_on_a_known_node_is_refused() {
    refused(&Token { extra: json!({}), ..good() }, Code::Unauthenticated, "not bound to a pod").await;
    refused(&Token { extra: bound("agent-x", "uid-x"), ..good() }, Code::Unauthenticated, "is no more").await;
    refused(&Token { extra: bound("agent-a", "uid-of-before"), ..good() }, Code::Unauthenticated, "is no more").await;
    refused(&Token { extra: bound("agent-c", "uid-c"), ..good() }, Code::Unauthenticated, "on no node yet").await;
    let server = ApiServer::with(PODS);
    let reviews = reviews(&server);
    reviews.set_nodes(&["node-b".to_owned()].into());
    let status = ask(&reviews, &good().on(&server)).await.unwrap_err();
    assert!(status.message().contains("node node-a is not known"), "{status}");
    assert!(reviews.accepts("node-b") && !reviews.accepts("node-a"));
}

#[tokio::test(start_paused = true)]
async fn an_answer_counts_for_a_while_and_no_longer() {
    let server = ApiServer::with(PODS);
    let (reviews, token) = (reviews(&server), good().on(&server));
    for _ in 0..100 {
        ask(&reviews, &token).await.unwrap();
    }
    assert_eq!(server.requests(REVIEWS), 1);
    server.answer_review(&token, json!({ "authenticated": false, "error": "revoked" }));
    tokio::time::sleep(Duration::from_secs(61)).await;
    assert!(ask(&reviews, &token).await.unwrap_err().message().contains("revoked"));
    good().on(&server);
    tokio::time::sleep(Duration::from_secs(6)).await;
    ask(&reviews, &token).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn answers_take_a_bounded_room_and_good_ones_are_kept_over_bad_ones() {
    let server = ApiServer::with(PODS);
    let (reviews, token) = (reviews(&server), good().on(&server));
    ask(&reviews, &token).await.unwrap();
    for number in 0..KEPT + 10 {
        let strange = format!("{token}{number}");
        ask(&reviews, &strange).await.unwrap_err();
    }
    assert!(super::lock(&reviews.answers).len() <= KEPT);
    let asked = server.requests(REVIEWS);
    ask(&reviews, &token).await.unwrap();
    assert_eq!(server.requests(REVIEWS), asked);
}

#[tokio::test(start_paused = true)]
async fn while_the_api_server_is_down_known_agents_go_on_and_unknown_ones_wait() {
    let server = ApiServer::with(PODS);
    let (reviews, known) = (reviews(&server), good().on(&server));
    let unknown = Token { extra: bound("agent-b", "uid-b"), ..good() }.on(&server);
    ask(&reviews, &known).await.unwrap();
    server.set_down(true);
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert_eq!(ask(&reviews, &known).await.unwrap(), "node-a");
    assert_eq!(ask(&reviews, &unknown).await.unwrap_err().code(), Code::Unavailable);
    server.set_down(false);
    ask(&reviews, &unknown).await.unwrap();
}
