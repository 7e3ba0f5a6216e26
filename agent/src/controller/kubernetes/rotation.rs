//! The Secret of the mesh's own root, and the steps by which a root is exchanged without a moment in which anybody mistrusts
//! anybody.
//!
//! ```text
//! start:  both roots are published, the old key signs        agents take the new root
//! later:  both roots are published, the new key signs        certificates are renewed, as they always are
//! finish: the new root alone                                 nothing is left that the old key signed
//! ```
//!
//! Enters: the Secret and the time. Leaves: the Secret as it is after the step, or which step may be taken when. Pure: no I/O, but
//! for the randomness of a new key.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::controller::authority::material::{NewRoot, certificates};
use crate::controller::authority::{Material, MaterialError};

/// The Secret's name.
pub const SECRET: &str = "culvert-ca";
/// The Secret's type.
pub const SECRET_TYPE: &str = "culvert.dev/ca";
/// The key of the root's certificate.
pub const CERTIFICATE: &str = "ca-cert.pem";
/// The key of the root's private key.
pub const KEY: &str = "ca-key.pem";
/// The key of the certificate of the root before this one, while it is still trusted.
pub const PREVIOUS_CERTIFICATE: &str = "previous-root-cert.pem";
/// The key of that root's private key, which signs until [`SIGN_FROM`].
pub const PREVIOUS_KEY: &str = "previous-ca-key.pem";
/// The annotation that says when the new key begins to sign, in RFC 3339.
pub const SIGN_FROM: &str = "culvert.dev/sign-from";
/// The annotation that says when nothing is left that the old key signed, in RFC 3339.
pub const FINISH_FROM: &str = "culvert.dev/finish-from";

/// How long agents have for taking a new root: the kubelet renews a mounted ConfigMap within about two minutes, and agents read it
/// every ten seconds.
pub const OVERLAP: Duration = Duration::from_secs(600);

/// What the Secret says at a moment.
#[derive(Debug)]
pub struct Root {
    /// What signs.
    pub material: Material,
    /// All roots to trust.
    pub roots: Vec<CertificateDer<'static>>,
    /// When something else signs.
    pub changes_at: Option<SystemTime>,
}

/// Why a step cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum RotationError {
    /// A rotation has begun already.
    #[error(
        "a rotation is under way: the new root signs from {sign_from}; finish it with `culvert ca rotate --finish` after {finish_from}"
    )]
    UnderWay {
        /// When the new key begins to sign.
        sign_from: String,
        /// When the rotation may be finished.
        finish_from: String,
    },
    /// There is nothing to finish.
    #[error("no rotation is under way: begin one with `culvert ca rotate`")]
    NotUnderWay,
    /// Certificates of the old root are still valid.
    #[error(
        "certificates that the old root signed may be valid until {0}: finish after that, or, if a cut of those connections is \
         acceptable, with --danger-finish-now"
    )]
    TooEarly(String),
    /// The Secret cannot be used.
    #[error("the Secret {SECRET} cannot be used: {0}")]
    Material(#[from] MaterialError),
    /// No new root can be made.
    #[error("cannot make a new root")]
    Create(#[from] rcgen::Error),
}

/// A Secret with a new root.
///
/// # Errors
/// When the operating system gives no random bytes.
pub fn new_secret(namespace: &str, trust_domain: &str, now: SystemTime) -> Result<Secret, rcgen::Error> {
    let NewRoot { certificate, key, .. } = Material::new_root(trust_domain, now.into())?;
    let labels = BTreeMap::from([("app.kubernetes.io/part-of".to_owned(), "culvert".to_owned())]);
    let metadata = ObjectMeta {
        name: Some(SECRET.to_owned()),
        namespace: Some(namespace.to_owned()),
        labels: Some(labels),
        ..ObjectMeta::default()
    };
    let mut secret = Secret { metadata, type_: Some(SECRET_TYPE.to_owned()), ..Secret::default() };
    set(&mut secret, CERTIFICATE, Some(certificate));
    set(&mut secret, KEY, Some(key));
    Ok(secret)
}

/// What the Secret says at `now`.
///
/// # Errors
/// [`MaterialError`] with the key that cannot be used.
pub fn root(secret: &Secret, now: SystemTime) -> Result<Root, MaterialError> {
    let new = Material::root(&text(secret, KEY)?, &text(secret, CERTIFICATE)?, CERTIFICATE, now.into())?;
    let mut roots = new.trusted().to_vec();
    let Ok(previous) = text(secret, PREVIOUS_CERTIFICATE) else { return Ok(Root { material: new, roots, changes_at: None }) };
    roots.extend(certificates(PREVIOUS_CERTIFICATE, &previous)?);
    match moment(secret, SIGN_FROM).filter(|sign_from| now < *sign_from) {
        None => Ok(Root { material: new, roots, changes_at: None }),
        changes_at => {
            let material = Material::root(&text(secret, PREVIOUS_KEY)?, &previous, PREVIOUS_CERTIFICATE, now.into())?;
            Ok(Root { material, roots, changes_at })
        }
    }
}

/// Begins a rotation: a new root, which signs after `overlap`, beside the old one. Certificates live at most `longest`.
///
/// # Errors
/// [`RotationError`].
pub fn start(
    secret: &Secret,
    trust_domain: &str,
    overlap: Duration,
    longest: Duration,
    now: SystemTime,
) -> Result<Secret, RotationError> {
    if text(secret, PREVIOUS_CERTIFICATE).is_ok() {
        return Err(under_way(secret));
    }
    root(secret, now)?;
    let NewRoot { certificate, key, .. } = Material::new_root(trust_domain, now.into())?;
    let mut rotated = secret.clone();
    set(&mut rotated, PREVIOUS_CERTIFICATE, Some(text(secret, CERTIFICATE)?));
    set(&mut rotated, PREVIOUS_KEY, Some(text(secret, KEY)?));
    set(&mut rotated, CERTIFICATE, Some(certificate));
    set(&mut rotated, KEY, Some(key));
    let annotations = rotated.metadata.annotations.get_or_insert_default();
    let sign_from = now + overlap;
    annotations.insert(SIGN_FROM.to_owned(), written(sign_from));
    annotations.insert(FINISH_FROM.to_owned(), written(sign_from + longest));
    Ok(rotated)
}

/// Finishes a rotation: the old root is forgotten. Unless `danger_now`, not before its last certificate has ended.
///
/// # Errors
/// [`RotationError`].
pub fn finish(secret: &Secret, danger_now: bool, now: SystemTime) -> Result<Secret, RotationError> {
    if text(secret, PREVIOUS_CERTIFICATE).is_err() {
        return Err(RotationError::NotUnderWay);
    }
    if let Some(finish_from) = moment(secret, FINISH_FROM).filter(|finish_from| now < *finish_from && !danger_now) {
        return Err(RotationError::TooEarly(written(finish_from)));
    }
    let mut finished = secret.clone();
    set(&mut finished, PREVIOUS_CERTIFICATE, None);
    set(&mut finished, PREVIOUS_KEY, None);
    for annotation in [SIGN_FROM, FINISH_FROM] {
        finished.metadata.annotations.get_or_insert_default().remove(annotation);
    }
    Ok(finished)
}

/// The text under a key of a Secret.
///
/// # Errors
/// When it is missing or no text.
pub fn text(secret: &Secret, key: &'static str) -> Result<String, MaterialError> {
    let bad = |reason: &str| MaterialError { part: key, reason: reason.to_owned() };
    let bytes = secret.data.as_ref().and_then(|data| data.get(key)).ok_or_else(|| bad("is missing"))?;
    String::from_utf8(bytes.0.clone()).map_err(|_other| bad("is not text"))
}

/// The moments of a rotation that is under way: from when the new key signs, and from when it may be finished.
fn under_way(secret: &Secret) -> RotationError {
    let read = |annotation| moment(secret, annotation).map_or_else(|| "an unknown time".to_owned(), written);
    RotationError::UnderWay { sign_from: read(SIGN_FROM), finish_from: read(FINISH_FROM) }
}

fn moment(secret: &Secret, annotation: &str) -> Option<SystemTime> {
    let text = secret.metadata.annotations.as_ref()?.get(annotation)?;
    OffsetDateTime::parse(text, &Rfc3339).ok().map(SystemTime::from)
}

/// A moment in RFC 3339, whole seconds.
pub fn written(moment: SystemTime) -> String {
    let moment = OffsetDateTime::from(moment).truncate_to_second();
    moment.format(&Rfc3339).unwrap_or_else(|_outside| moment.to_string())
}

fn set(secret: &mut Secret, key: &str, text: Option<String>) {
    let data = secret.data.get_or_insert_default();
    match text {
        Some(text) => drop(data.insert(key.to_owned(), ByteString(text.into_bytes()))),
        None => drop(data.remove(key)),
    }
}
