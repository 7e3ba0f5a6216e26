use std::sync::Arc;
use std::time::{Duration, SystemTime};

use k8s_openapi::api::core::v1::Secret;
use rustls_pki_types::CertificateDer;
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{OVERLAP, SECRET, Settings, USERS_SECRET, open, rotation};
use crate::controller::authority::tests::{Texts, UsersRoot};
use crate::controller::authority::{Authority, fingerprint};
use crate::controller::kubernetes::test_server::ApiServer;
use crate::model::SpiffeId;
use crate::observe::Readiness;

const NAMESPACE: &str = "culvert-system";
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// One controller's authority.
struct Replica {
    authority: Option<Arc<Authority>>,
    opening: Option<tokio::sync::oneshot::Receiver<Arc<Authority>>>,
    readiness: Readiness,
    _stop: DropGuard,
}

/// A clock that runs with the runtime's.
fn clock() -> super::Now {
    let (wall, start) = (SystemTime::now(), Instant::now());
    Arc::new(move || wall + start.elapsed())
}

fn replica(server: &ApiServer, now: &super::Now) -> Replica {
    let (stop, readiness) = (CancellationToken::new(), Readiness::new());
    let settings = Settings {
        namespace: NAMESPACE.to_owned(),
        trust_domain: "cluster.local".to_owned(),
        longest: LONGEST,
        now: Arc::clone(now),
    };
    let opening = open(server.client(), settings, readiness.condition("authority"), stop.clone());
    Replica { authority: None, opening: Some(opening), readiness, _stop: stop.drop_guard() }
}

impl Replica {
    async fn open(mut self) -> Self {
        self.authority = Some(self.opening.take().unwrap().await.unwrap());
        self
    }

    fn authority(&self) -> &Authority {
        self.authority.as_ref().unwrap()
    }

    /// The chain that a workload gets now: the issuer's place and the root.
    fn chain(&self, now: &super::Now) -> Vec<CertificateDer<'static>> {
        let key = rcgen::KeyPair::generate().unwrap();
        let request = rcgen::CertificateParams::default().serialize_request(&key).unwrap().pem().unwrap();
        let identity: SpiffeId = "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap();
        self.authority().sign(&request, &identity, None, now()).unwrap().der
    }

    fn trusted(&self) -> Vec<String> {
        self.authority().roots().borrow().iter().map(|root| fingerprint(root)).collect()
    }

    /// Waits until as many roots are trusted.
    async fn trusts(&self, count: usize) {
        self.authority().roots().wait_for(|roots| roots.len() == count).await.unwrap();
    }
}

fn users_secret(texts: &Texts) -> String {
    let data = json!({
        "ca-cert.pem": &texts.certificate,
        "ca-key.pem": &texts.key,
        "cert-chain.pem": &texts.chain,
        "root-cert.pem": &texts.roots,
    });
    secret(USERS_SECRET, &data)
}

fn secret(name: &str, data: &Value) -> String {
    use base64::Engine as _;
    let encode = |value: &Value| base64::engine::general_purpose::STANDARD.encode(value.as_str().unwrap());
    let data: serde_json::Map<_, _> =
        data.as_object().unwrap().iter().map(|(key, value)| (key.clone(), encode(value).into())).collect();
    json!({ "apiVersion": "v1", "kind": "Secret", "metadata": { "name": name, "namespace": NAMESPACE }, "data": data })
        .to_string()
}

fn stored(server: &ApiServer) -> Secret {
    serde_json::from_value(server.object("", "secrets", NAMESPACE, SECRET).unwrap()).unwrap()
}

fn store(server: &ApiServer, secret: &Secret) {
    server.put(&json!(secret).to_string());
}

#[tokio::test(start_paused = true)]
async fn two_replicas_that_start_at_once_make_one_root() {
    let (server, now) = (ApiServer::new(), clock());
    let (one, other) = (replica(&server, &now), replica(&server, &now));
    let (one, other) = (one.open().await, other.open().await);
    assert_eq!(server.requests("POST /api/v1/namespaces/culvert-system/secrets"), 2, "there was a race");
    assert_eq!(one.authority().fingerprint(), other.authority().fingerprint());
    let late = replica(&server, &now).open().await;
    assert_eq!((late.trusted(), late.readiness.is_ready()), (one.trusted(), true));
    assert_eq!(server.all("secrets").len(), 1);
    assert_eq!(stored(&server).type_.as_deref(), Some("culvert.dev/ca"));
}

#[tokio::test(start_paused = true)]
async fn a_root_that_is_there_is_used_and_a_damaged_one_is_neither_used_nor_replaced() {
    let (server, now) = (ApiServer::new(), clock());
    let first = replica(&server, &now).open().await;
    let good = stored(&server);
    let mut bad = good.clone();
    let other = rotation::new_secret(NAMESPACE, "cluster.local", now()).unwrap();
    bad.data.as_mut().unwrap().insert("ca-key.pem".to_owned(), other.data.unwrap()["ca-key.pem"].clone());
    store(&server, &bad);
    let waiting = replica(&server, &now);
    tokio::time::sleep(Duration::from_secs(120)).await;
    let missing = waiting.readiness.missing().join("\n");
    assert!(
        missing.contains("culvert-system/culvert-ca cannot be used: ca-cert.pem is not the certificate of the key"),
        "{missing}"
    );
    let chain = first.chain(&now);
    assert_eq!(fingerprint(&chain[1]), first.authority().fingerprint(), "what signed before goes on");
    store(&server, &good);
    assert_eq!(waiting.open().await.trusted(), first.trusted());
}

#[tokio::test(start_paused = true)]
async fn the_user_s_own_authority_is_preferred_and_followed() {
    let (server, now) = (ApiServer::new(), clock());
    let root = UsersRoot::new("users");
    server.put(&users_secret(&root.intermediate("one")));
    let replica = replica(&server, &now).open().await;
    assert!(server.object("", "secrets", NAMESPACE, SECRET).is_none(), "no root is made that is not needed");
    let before = replica.chain(&now);
    assert_eq!(before.len(), 3);
    server.put(&users_secret(&root.intermediate("two")));
    while replica.chain(&now)[1] == before[1] {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!((replica.chain(&now)[2].clone(), replica.trusted().len()), (before[2].clone(), 1));
}

#[tokio::test(start_paused = true)]
async fn a_bad_authority_of_the_user_s_is_refused_and_the_last_good_one_kept() {
    let (server, now) = (ApiServer::new(), clock());
    let root = UsersRoot::new("users");
    let good = root.intermediate("one");
    server.put(&users_secret(&good));
    let running = replica(&server, &now).open().await;
    let before = running.chain(&now)[1].clone();
    server.put(&users_secret(&Texts { key: root.intermediate("two").key, ..good.clone() }));
    let starting = replica(&server, &now);
    tokio::time::sleep(Duration::from_secs(300)).await;
    assert_eq!(running.chain(&now)[1], before);
    let missing = starting.readiness.missing().join("\n");
    assert!(
        missing.contains("culvert-system/cacerts cannot be used: ca-cert.pem is not the certificate of the key"),
        "{missing}"
    );
    assert!(server.object("", "secrets", NAMESPACE, SECRET).is_none(), "no root is made in its place");
    server.delete("", "secrets", NAMESPACE, USERS_SECRET);
    tokio::time::sleep(Duration::from_secs(300)).await;
    assert_eq!(running.chain(&now)[1], before, "also when it is gone");
}

#[tokio::test(start_paused = true)]
async fn another_root_is_trusted_before_it_signs_and_the_old_one_while_something_of_it_lives() {
    let (server, now) = (ApiServer::new(), clock());
    let replica = replica(&server, &now).open().await;
    let own = replica.trusted();
    let root = UsersRoot::new("users");
    server.put(&users_secret(&root.intermediate("one")));
    replica.trusts(2).await;
    tokio::time::sleep(OVERLAP - Duration::from_secs(60)).await;
    assert_eq!(fingerprint(replica.chain(&now).last().unwrap()), own[0], "agents have not all taken the new root");
    tokio::time::sleep(Duration::from_secs(180)).await;
    assert_ne!(fingerprint(replica.chain(&now).last().unwrap()), own[0]);
    server.delete("", "secrets", NAMESPACE, SECRET);
    tokio::time::sleep(LONGEST - Duration::from_secs(600)).await;
    assert_eq!(replica.trusted().len(), 2, "certificates of the old root live");
    tokio::time::sleep(Duration::from_secs(1200)).await;
    assert_eq!(replica.trusted().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_rotation_publishes_both_roots_then_signs_with_the_new_one_then_forgets_the_old_one() {
    let (server, now) = (ApiServer::new(), clock());
    let (one, other) = (replica(&server, &now).open().await, replica(&server, &now).open().await);
    let old = one.authority().fingerprint();
    let rotated = rotation::start(&stored(&server), "cluster.local", OVERLAP, LONGEST, now()).unwrap();
    store(&server, &rotated);
    for replica in [&one, &other] {
        replica.trusts(2).await;
        assert_eq!(fingerprint(&replica.chain(&now)[1]), old);
    }
    tokio::time::sleep(OVERLAP - Duration::from_secs(60)).await;
    let late = replica(&server, &now).open().await;
    assert_eq!((fingerprint(&late.chain(&now)[1]), late.trusted().len()), (old.clone(), 2), "also for a replica that starts");
    tokio::time::sleep(Duration::from_secs(121)).await;
    let new = fingerprint(&one.chain(&now)[1]);
    assert_ne!(new, old);
    for replica in [&one, &other, &late] {
        assert_eq!((fingerprint(&replica.chain(&now)[1]), replica.trusted().len()), (new.clone(), 2));
    }
    assert!(rotation::start(&stored(&server), "cluster.local", OVERLAP, LONGEST, now()).is_err(), "one at a time");
    let early = rotation::finish(&stored(&server), false, now()).unwrap_err().to_string();
    assert!(early.contains("may be valid until"), "{early}");
    tokio::time::sleep(LONGEST).await;
    store(&server, &rotation::finish(&stored(&server), false, now()).unwrap());
    for replica in [&one, &other, &late] {
        replica.trusts(1).await;
        assert_eq!(replica.trusted(), std::slice::from_ref(&new));
    }
    let keys: Vec<_> = stored(&server).data.unwrap().into_keys().collect();
    assert_eq!(keys, ["ca-cert.pem", "ca-key.pem"], "the old key is gone");
    assert!(rotation::finish(&stored(&server), false, now()).is_err());
}

#[tokio::test(start_paused = true)]
async fn an_api_server_that_is_down_is_waited_for_at_the_start_and_missed_by_nobody_later() {
    let (server, now) = (ApiServer::new(), clock());
    server.set_down(true);
    let starting = replica(&server, &now);
    tokio::time::sleep(Duration::from_secs(60)).await;
    let missing = starting.readiness.missing().join("\n");
    assert!(missing.contains("the API server did not answer"), "{missing}");
    server.set_down(false);
    let running = starting.open().await;
    let before = running.trusted();
    server.set_down(true);
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert_eq!((running.chain(&now).len(), running.trusted()), (2, before));
}
