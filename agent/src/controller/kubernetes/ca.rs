//! The authority's key in a Secret, shared by all replicas and followed as it changes.
//!
//! Enters: the Secrets `cacerts` (the user's own authority, with Istio's keys) and `culvert-ca` (a root of the mesh's own, made here
//! when neither is there), and the time. Leaves: an [`Authority`] that signs with what they say. A Secret that cannot be used is
//! complained of and changes nothing. A root that agents cannot know yet is published before anything is signed under it, and
//! one that no longer signs stays published until its last certificate has ended.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use k8s_openapi::api::core::v1::Secret;
use kube::Client;
use rustls_pki_types::CertificateDer;
use serde_json::value::RawValue;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::api::{self, ApiError};
use super::follow::{self, Collection, Event};
use super::resource::Resource;
use super::rotation::{self, OVERLAP, SECRET, text};
use super::{Now, rotation::Root};
use crate::backoff::Backoff;
use crate::controller::authority::material::IntermediateTexts;
use crate::controller::authority::{Authority, Material, MaterialError, fingerprint};
use crate::observe::Condition;

/// The Secret of the user's own authority.
pub const USERS_SECRET: &str = "cacerts";
/// The longest time between two looks at the clock.
const LOOK_AT_CLOCK: Duration = Duration::from_secs(60);

/// What an authority in Secrets is told at its start.
#[derive(Clone)]
pub struct Settings {
    /// Where the Secrets are.
    pub namespace: String,
    /// Whom a new root is named after.
    pub trust_domain: String,
    /// The longest life of a certificate.
    pub longest: Duration,
    /// Tells the time.
    pub now: Now,
}

impl std::fmt::Debug for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Settings").field("namespace", &self.namespace).finish_non_exhaustive()
    }
}

/// Opens the authority, and keeps it up with the Secrets until `stop` is cancelled. `condition` tells why it is not open yet.
///
/// The authority arrives once there is one, which takes an API server that answers.
#[must_use]
pub fn open(
    client: Client,
    settings: Settings,
    condition: Condition,
    stop: CancellationToken,
) -> oneshot::Receiver<Arc<Authority>> {
    let (opened, receiver) = oneshot::channel();
    let follow = |name: &str| {
        let (namespace, fields) = (Some(settings.namespace.clone()), Some(format!("metadata.name={name}")));
        follow::start(client.clone(), Collection { resource: Resource::core("secrets"), namespace, fields })
    };
    let (own, users) = (Followed::new(follow(SECRET)), Followed::new(follow(USERS_SECRET)));
    let keeper = Keeper {
        client,
        settings,
        condition,
        own,
        users,
        opened: Some(opened),
        authority: None,
        pending: None,
        retiring: Vec::new(),
        refused: None,
        retry: Backoff::new(Duration::from_millis(200), Duration::from_secs(10)),
    };
    tokio::spawn(async move {
        tokio::select! {
            () = stop.cancelled() => {}
            () = keeper.run() => {}
        }
    });
    receiver
}

struct Keeper {
    client: Client,
    settings: Settings,
    condition: Condition,
    own: Followed,
    users: Followed,
    opened: Option<oneshot::Sender<Arc<Authority>>>,
    authority: Option<Arc<Authority>>,
    /// Signs once agents have had the time to take its root.
    pending: Option<(Fingerprint, SystemTime)>,
    /// Roots that no longer sign, and until when something that they signed may live.
    retiring: Vec<(CertificateDer<'static>, SystemTime)>,
    /// What was last complained of.
    refused: Option<String>,
    retry: Backoff,
}

type Fingerprint = String;

/// One Secret.
struct Followed {
    events: mpsc::Receiver<Event>,
    /// Whether it is known by now that there is one, or none.
    known: bool,
    secret: Option<Box<Secret>>,
    /// What a list has brought so far.
    listed: Option<Box<Secret>>,
}

impl Keeper {
    async fn run(mut self) {
        loop {
            let wait = match self.settle().await {
                Ok(wait) => wait,
                Err(wait) => wait,
            };
            let heard = tokio::select! {
                heard = self.own.hear() => heard,
                heard = self.users.hear() => heard,
                () = tokio::time::sleep(wait) => Ok(()),
            };
            match heard {
                Ok(()) => {}
                Err(Some(failure)) if self.authority.is_none() => self.condition.missing(format!("{failure}")),
                Err(Some(_)) => {}
                Err(None) => return,
            }
            if self.opened.as_ref().is_some_and(oneshot::Sender::is_closed) {
                return;
            }
        }
    }

    /// Brings the authority up with the Secrets. Gives how long that lasts; as an error, when to try again.
    async fn settle(&mut self) -> Result<Duration, Duration> {
        if !self.own.known || !self.users.known {
            return Ok(LOOK_AT_CLOCK);
        }
        let now = (self.settings.now)();
        let wanted = match self.wanted(now) {
            Ok(Some(wanted)) => wanted,
            Ok(None) if self.authority.is_some() => {
                self.complain(format!(
                    "the Secrets {SECRET} and {USERS_SECRET} are gone from {}: what signed before goes on; restore one of them before \
                     this controller restarts",
                    self.settings.namespace
                ));
                return Ok(LOOK_AT_CLOCK);
            }
            Ok(None) => return self.create(now).await,
            Err((secret, error)) => {
                self.complain(format!("the Secret {}/{secret} cannot be used: {error}", self.settings.namespace));
                return Ok(LOOK_AT_CLOCK);
            }
        };
        self.refused = None;
        Ok(self.adopt(wanted, now))
    }

    /// What the Secrets ask for: the user's own authority, if there is one.
    fn wanted(&self, now: SystemTime) -> Result<Option<Root>, (&'static str, MaterialError)> {
        let own = |secret: &Secret| rotation::root(secret, now).map_err(|error| (SECRET, error));
        let Some(users) = &self.users.secret else { return self.own.secret.as_deref().map(own).transpose() };
        let material = users_material(users, now).map_err(|error| (USERS_SECRET, error))?;
        let mut roots = material.trusted().to_vec();
        // What the mesh's own root signed before lives on for a while.
        if let Some(Ok(own)) = self.own.secret.as_deref().map(own) {
            roots.extend(own.roots);
        }
        Ok(Some(Root { material, roots, changes_at: None }))
    }

    /// Signs with what is wanted, as soon as agents can know its root. Gives when to look again.
    fn adopt(&mut self, wanted: Root, now: SystemTime) -> Duration {
        let Root { material, roots, changes_at } = wanted;
        let Some(authority) = self.authority.clone() else {
            self.start(material, roots);
            return until(changes_at, now);
        };
        let current = authority.issuer();
        let (root, issuer) = (fingerprint(material.anchor()), fingerprint(material.issuer()));
        let trusted = authority.roots().borrow().to_vec();
        let known = trusted.contains(material.anchor());
        let ready = match &self.pending {
            Some((pending, from)) if *pending == root => now >= *from,
            _ => known,
        };
        if !ready && self.pending.as_ref().is_none_or(|(pending, _)| *pending != root) {
            warn!(
                root_sha256 = root,
                "another root: it is published now, and signs in {OVERLAP:?}. Certificates of the old root end with their lives; \
                 other meshes and clients that trust it must be given the new one"
            );
            self.pending = Some((root, now + OVERLAP));
        }
        let mut wait = until(changes_at, now);
        if ready {
            self.pending = None;
            if fingerprint(&current) != issuer {
                let before = authority.anchor();
                if before != *material.anchor() {
                    self.retiring.push((before, now + self.settings.longest));
                }
                info!(root_sha256 = fingerprint(material.anchor()), issuer_sha256 = issuer, "signing with another key");
                authority.sign_with(material);
            }
        } else {
            wait = wait.min(until(self.pending.as_ref().map(|(_, from)| *from), now));
        }
        self.retiring.retain(|(_, until)| now < *until);
        authority.trust(together([
            roots,
            vec![authority.anchor()],
            self.retiring.iter().map(|(root, _)| root.clone()).collect(),
        ]));
        wait
    }

    fn start(&mut self, material: Material, roots: Vec<CertificateDer<'static>>) {
        let authority = Arc::new(Authority::new(material, self.settings.longest));
        authority.trust(together([roots]));
        self.condition.met();
        if let Some(opened) = self.opened.take() {
            // Whoever wanted it may have given up.
            drop(opened.send(Arc::clone(&authority)));
        }
        self.authority = Some(authority);
    }

    /// Makes the mesh's own root, unless another replica was quicker.
    async fn create(&mut self, now: SystemTime) -> Result<Duration, Duration> {
        let Settings { namespace, trust_domain, .. } = &self.settings;
        let secret = match rotation::new_secret(namespace, trust_domain, now) {
            Ok(secret) => serde_json::json!(secret),
            Err(failure) => {
                self.complain(format!("cannot make a new root: {failure}"));
                return Err(self.retry.next_wait());
            }
        };
        let collection = format!("/api/v1/namespaces/{namespace}/secrets");
        let created: Result<Secret, ApiError> = api::create(&self.client, &collection, &secret).await;
        match created {
            Ok(secret) => {
                info!("made a new root: it is kept in the Secret {namespace}/{SECRET}");
                self.own.secret = Some(Box::new(secret));
                Err(Duration::ZERO)
            }
            Err(error) if error.is_conflict() => {
                info!("another replica made the root: using that one");
                match api::get::<Secret>(&self.client, &format!("{collection}/{SECRET}")).await {
                    Ok(secret) => {
                        self.own.secret = Some(Box::new(secret));
                        Err(Duration::ZERO)
                    }
                    Err(_gone_or_down) => Err(self.retry.next_wait()),
                }
            }
            Err(error) => {
                self.complain(format!("cannot keep a new root in the Secret {namespace}/{SECRET}: {error}"));
                Err(self.retry.next_wait())
            }
        }
    }

    fn complain(&mut self, complaint: String) {
        if self.refused.as_ref() == Some(&complaint) {
            return;
        }
        if self.authority.is_some() {
            error!("{complaint}; what signed before goes on");
        } else {
            error!("{complaint}; nothing can be signed until that is mended");
            self.condition.missing(complaint.clone());
        }
        self.refused = Some(complaint);
    }
}

impl Followed {
    fn new(events: mpsc::Receiver<Event>) -> Self {
        Self { events, known: false, secret: None, listed: None }
    }

    /// Waits for news. An error is why there is none, or nothing when there will never be any.
    async fn hear(&mut self) -> Result<(), Option<ApiError>> {
        match self.events.recv().await.ok_or(None)? {
            Event::Listed(objects) => self.listed = objects.first().and_then(|object| read(object)).or(self.listed.take()),
            Event::Complete(_) => {
                self.secret = self.listed.take();
                self.known = true;
            }
            Event::Changed(object) => self.secret = read(&object),
            Event::Removed(_) | Event::Absent => self.secret = None,
            Event::Reached(_) => {}
            Event::Failed(error) => return Err(Some(error)),
        }
        Ok(())
    }
}

fn read(object: &RawValue) -> Option<Box<Secret>> {
    // The text is a secret: only that it does not parse is told.
    serde_json::from_str(object.get()).inspect_err(|_| error!("the API server sent a Secret that is not understood")).ok()
}

fn users_material(secret: &Secret, now: SystemTime) -> Result<Material, MaterialError> {
    let (certificate, key) = (text(secret, "ca-cert.pem")?, text(secret, "ca-key.pem")?);
    let (chain, roots) = (text(secret, "cert-chain.pem")?, text(secret, "root-cert.pem")?);
    let texts = IntermediateTexts { certificate: &certificate, key: &key, chain: &chain, roots: &roots };
    Material::intermediate(&texts, now.into())
}

/// All of these roots, each once.
fn together(lists: impl IntoIterator<Item = Vec<CertificateDer<'static>>>) -> Vec<CertificateDer<'static>> {
    let mut all = Vec::new();
    for root in lists.into_iter().flatten() {
        if !all.contains(&root) {
            all.push(root);
        }
    }
    all
}

/// How long until then, within bounds: clocks are set now and then.
fn until(moment: Option<SystemTime>, now: SystemTime) -> Duration {
    let left = moment.map_or(LOOK_AT_CLOCK, |moment| moment.duration_since(now).unwrap_or_default());
    left.clamp(Duration::from_millis(10), LOOK_AT_CLOCK)
}

#[cfg(test)]
mod tests;
