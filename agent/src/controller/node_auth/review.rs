//! The agents' own ServiceAccount tokens, reviewed by the API server.
//!
//! Enters: projected tokens, bound to the agent's pod. Leaves: the node of that pod, by the API server's word: it says whose token
//! it is and which pod it is bound to, and the pod's `spec.nodeName` is set once and for all by the scheduler. Answers are kept for
//! a while, so that an agent's many requests cost one review. While the API server is down, what it said before counts on until
//! the token itself ends.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::digest;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use k8s_openapi::api::authentication::v1::{TokenReviewStatus, UserInfo};
use k8s_openapi::api::core::v1::Pod;
use kube::Client;
use serde::Deserialize;
use serde_json::json;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use tonic::Status;
use tonic::metadata::MetadataMap;
use tracing::{debug, warn};

use super::{NodeAuth, NodeAuthError, Refusals, bearer};
use crate::controller::kubernetes::api::{self, ApiError};

/// Whom an agent's token is for.
pub const AUDIENCE: &str = "culvert-controller";
/// The ServiceAccount of agents.
pub const AGENT_ACCOUNT: &str = "culvert-agent";

/// How long a good answer counts without asking again.
const GOOD: Duration = Duration::from_secs(60);
/// How long a bad one does.
const BAD: Duration = Duration::from_secs(5);
/// Answers kept.
const KEPT: usize = 4096;
/// Reviews under way.
const UNDER_WAY: usize = 32;
/// What a token is bound to, in the user's extra fields (Kubernetes, "Service account token claims").
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";

/// Reviews tokens.
pub struct TokenReviews {
    client: Client,
    namespace: String,
    user: String,
    answers: Mutex<HashMap<[u8; 32], Answer>>,
    nodes: Mutex<Option<BTreeSet<String>>>,
    under_way: Semaphore,
    refusals: Refusals,
    changed: watch::Sender<()>,
}

#[derive(Clone)]
struct Answer {
    node: Result<Arc<str>, Refused>,
    /// Asked again from then on.
    until: Instant,
    /// Worth nothing from then on.
    ends: SystemTime,
}

/// Why a token is not an agent's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
enum Refused {
    #[error("the token is not that of a ServiceAccount of Kubernetes")]
    Form,
    #[error("the token ended {0} s ago: does the kubelet still renew it?")]
    Expired(u64),
    #[error("the token is not for `{AUDIENCE}`: project it with that audience")]
    Audience,
    #[error("the API server does not accept the token: {0}")]
    NotAuthenticated(String),
    #[error("the token is of {0}, and only agents may ask")]
    Account(String),
    #[error("the token is not bound to a pod: agents must use a projected token, not one from a Secret")]
    Unbound,
    #[error("the token is bound to pod {0}, which is no more")]
    PodGone(String),
    #[error("the token is bound to pod {0}, which is on no node yet")]
    PodUnscheduled(String),
}

/// The part of a token's claims that saves a review. None of it is believed.
#[derive(Deserialize)]
struct Claims {
    aud: Audiences,
    exp: u64,
    sub: String,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Audiences {
    One(String),
    Several(Vec<String>),
}

impl TokenReviews {
    /// Reviews by the API server that `client` speaks to. Agents run in `namespace`.
    #[must_use]
    pub fn new(client: Client, namespace: &str) -> Self {
        Self {
            client,
            namespace: namespace.to_owned(),
            user: format!("system:serviceaccount:{namespace}:{AGENT_ACCOUNT}"),
            answers: Mutex::default(),
            nodes: Mutex::default(),
            under_way: Semaphore::new(UNDER_WAY),
            refusals: Refusals::default(),
            changed: watch::Sender::new(()),
        }
    }

    async fn node_of(&self, token: &[u8]) -> Result<Arc<str>, Status> {
        let refuse = |refused: &Refused| {
            self.refusals.note("with a token that is not an agent's");
            debug!(%refused, "refused a token");
            Status::unauthenticated(refused.to_string())
        };
        let claims = claims(token).map_err(|refused| refuse(&refused))?;
        let now = SystemTime::now();
        self.look_at(&claims, now).map_err(|refused| refuse(&refused))?;
        let hash = hash(token);
        let known = lock(&self.answers).get(&hash).filter(|answer| now < answer.ends).cloned();
        if let Some(answer) = known.as_ref().filter(|answer| Instant::now() < answer.until) {
            return answer.node.clone().map_err(|refused| refuse(&refused));
        }
        let text = String::from_utf8_lossy(token);
        let reviewed = {
            let _place = self.under_way.acquire().await.map_err(|_closed| Status::unavailable("the controller is stopping"))?;
            self.review(&text).await
        };
        match reviewed {
            Ok(node) => {
                let lasts = if node.is_ok() { GOOD } else { BAD };
                self.keep(hash, Answer { node: node.clone(), until: Instant::now() + lasts, ends: claims.ends() });
                node.map_err(|refused| refuse(&refused))
            }
            Err(error) => {
                if let Some(Ok(node)) = known.map(|answer| answer.node) {
                    debug!(%error, %node, "a token cannot be reviewed now: the last answer counts on");
                    return Ok(node);
                }
                warn!("a token cannot be reviewed: {error}");
                Err(Status::unavailable("the token cannot be reviewed now: the API server does not answer the controller"))
            }
        }
    }

    /// Refuses without asking what the API server would refuse anyway.
    fn look_at(&self, claims: &Claims, now: SystemTime) -> Result<(), Refused> {
        if let Ok(since) = now.duration_since(claims.ends()) {
            return Err(Refused::Expired(since.as_secs()));
        }
        let for_us = match &claims.aud {
            Audiences::One(audience) => audience == AUDIENCE,
            Audiences::Several(audiences) => audiences.iter().any(|audience| audience == AUDIENCE),
        };
        if !for_us {
            return Err(Refused::Audience);
        }
        if claims.sub != self.user {
            return Err(Refused::Account(claims.sub.chars().take(256).collect()));
        }
        Ok(())
    }

    async fn review(&self, token: &str) -> Result<Result<Arc<str>, Refused>, ApiError> {
        #[derive(Deserialize)]
        struct Reviewed {
            status: TokenReviewStatus,
        }
        let review = json!({
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": { "token": token, "audiences": [AUDIENCE] },
        });
        let Reviewed { status } = api::create(&self.client, "/apis/authentication.k8s.io/v1/tokenreviews", &review).await?;
        if status.authenticated != Some(true) {
            return Ok(Err(Refused::NotAuthenticated(status.error.unwrap_or_else(|| "no reason given".to_owned()))));
        }
        // A server that knows nothing of audiences names none.
        if !status.audiences.iter().flatten().any(|audience| audience == AUDIENCE) {
            return Ok(Err(Refused::Audience));
        }
        let UserInfo { username, extra, .. } = status.user.unwrap_or_default();
        let username = username.unwrap_or_default();
        if username != self.user {
            return Ok(Err(Refused::Account(username)));
        }
        let bound = |key: &str| extra.as_ref().and_then(|extra| extra.get(key)).and_then(|values| values.first()).cloned();
        match (bound(POD_NAME), bound(POD_UID)) {
            (Some(pod), Some(uid)) => self.node_of_pod(&pod, &uid).await,
            _ => Ok(Err(Refused::Unbound)),
        }
    }

    async fn node_of_pod(&self, name: &str, uid: &str) -> Result<Result<Arc<str>, Refused>, ApiError> {
        let path = format!("/api/v1/namespaces/{}/pods/{name}", self.namespace);
        let pod: Pod = match api::get(&self.client, &path).await {
            Ok(pod) => pod,
            Err(error) if error.is_absent() => return Ok(Err(Refused::PodGone(name.to_owned()))),
            Err(error) => return Err(error),
        };
        if pod.metadata.uid.as_deref() != Some(uid) {
            return Ok(Err(Refused::PodGone(name.to_owned())));
        }
        let node = pod.spec.and_then(|spec| spec.node_name).filter(|node| !node.is_empty());
        Ok(node.map(Arc::from).ok_or_else(|| Refused::PodUnscheduled(name.to_owned())))
    }

    fn keep(&self, hash: [u8; 32], answer: Answer) {
        let mut answers = lock(&self.answers);
        if answers.len() >= KEPT {
            let now = SystemTime::now();
            answers.retain(|_, answer| now < answer.ends && answer.node.is_ok());
        }
        if answers.len() >= KEPT {
            answers.clear();
        }
        answers.insert(hash, answer);
    }
}

#[tonic::async_trait]
impl NodeAuth for TokenReviews {
    async fn authenticate(&self, metadata: &MetadataMap) -> Result<Arc<str>, Status> {
        let Some(token) = bearer(metadata) else {
            self.refusals.note("without a token");
            return Err(Status::unauthenticated("no token: send the metadata `authorization: Bearer <the agent's token>`"));
        };
        let node = self.node_of(token).await?;
        if self.accepts(&node) {
            return Ok(node);
        }
        Err(Status::unauthenticated(format!("node {node} is not known to the API server, or not yet to this controller")))
    }

    fn set_nodes(&self, nodes: &BTreeSet<String>) -> Vec<NodeAuthError> {
        *lock(&self.nodes) = Some(nodes.clone());
        self.changed.send_replace(());
        Vec::new()
    }

    fn accepts(&self, node: &str) -> bool {
        lock(&self.nodes).as_ref().is_none_or(|nodes| nodes.contains(node))
    }

    fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }
}

impl std::fmt::Debug for TokenReviews {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenReviews").field("user", &self.user).finish_non_exhaustive()
    }
}

impl Claims {
    fn ends(&self) -> SystemTime {
        UNIX_EPOCH.checked_add(Duration::from_secs(self.exp)).unwrap_or(UNIX_EPOCH)
    }
}

/// Reads a token's claims (RFC 7519). Its signature is the API server's to check.
fn claims(token: &[u8]) -> Result<Claims, Refused> {
    let text = std::str::from_utf8(token).map_err(|_other| Refused::Form)?;
    let mut parts = text.split('.');
    let (Some(_header), Some(payload), Some(_signature), None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
        return Err(Refused::Form);
    };
    let payload = URL_SAFE_NO_PAD.decode(payload).map_err(|_other| Refused::Form)?;
    serde_json::from_slice(&payload).map_err(|_other| Refused::Form)
}

fn hash(token: &[u8]) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest::digest(&digest::SHA256, token).as_ref());
    hash
}

/// Locks, also after a panic elsewhere: every change under these locks is a single call.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
