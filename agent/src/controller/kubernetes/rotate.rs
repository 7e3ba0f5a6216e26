//! Takes a step of a rotation on the Secret in the API.
//!
//! Enters: the step that the operator wants. Leaves: the Secret after it, written only if nobody else has changed it since it was
//! read, and what comes next in words.

use std::time::{Duration, SystemTime};

use k8s_openapi::api::core::v1::Secret;
use kube::Client;
use serde_json::json;

use super::api::{self, ApiError};
use super::ca::USERS_SECRET;
use super::rotation::{self, RotationError, SECRET, written};
use crate::model::TrustDomain;

/// What the operator wants.
#[derive(Clone, Debug)]
pub enum RotationStep {
    /// A new root beside the old one.
    Start {
        /// Whom it is named after.
        trust_domain: TrustDomain,
        /// How long agents have for taking it before it signs.
        overlap: Duration,
        /// The longest life of a certificate.
        longest: Duration,
    },
    /// The old root forgotten.
    Finish {
        /// Even though certificates of it may be valid.
        danger_now: bool,
    },
}

/// Why the step was not taken.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// The authority is not the mesh's own.
    #[error(
        "the authority is the user's own, in the Secret {0}/{USERS_SECRET}: to rotate it, first put both roots into its \
         root-cert.pem, and the new authority beside them once agents have taken them"
    )]
    UsersOwn(String),
    /// There is no root yet.
    #[error("there is no Secret {0}/{SECRET}: is a controller installed in this namespace?")]
    NoSecret(String),
    /// Somebody else was quicker.
    #[error("the Secret {0}/{SECRET} has changed meanwhile: look at it, and try again")]
    Changed(String),
    /// The step does not fit.
    #[error(transparent)]
    Rotation(#[from] RotationError),
    /// The API server refused or did not answer.
    #[error(transparent)]
    Api(#[from] ApiError),
}

/// Takes a step. Gives what comes next, in lines for the operator.
///
/// # Errors
/// [`StepError`]; nothing has changed then.
pub async fn take(client: &Client, namespace: &str, step: &RotationStep, now: SystemTime) -> Result<String, StepError> {
    let collection = format!("/api/v1/namespaces/{namespace}/secrets");
    match api::get::<Secret>(client, &format!("{collection}/{USERS_SECRET}")).await {
        Ok(_) => return Err(StepError::UsersOwn(namespace.to_owned())),
        Err(error) if error.is_absent() => {}
        Err(error) => return Err(error.into()),
    }
    let path = format!("{collection}/{SECRET}");
    let secret: Secret = match api::get(client, &path).await {
        Err(error) if error.is_absent() => return Err(StepError::NoSecret(namespace.to_owned())),
        secret => secret?,
    };
    let (next, told) = match step {
        RotationStep::Start { trust_domain, overlap, longest } => {
            let signs = now + *overlap;
            let told = format!(
                "a new root is published beside the old one\nit signs from {}\nfinish with `culvert ca rotate --finish` after {}",
                written(signs),
                written(signs + *longest)
            );
            (rotation::start(&secret, trust_domain.as_str(), *overlap, *longest, now)?, told)
        }
        RotationStep::Finish { danger_now } => {
            let told = "the rotation is finished: the old root is forgotten".to_owned();
            (rotation::finish(&secret, *danger_now, now)?, told)
        }
    };
    // It names the version that was read: of two that rotate at once, one is refused.
    match api::replace::<Secret>(client, &path, &json!(next)).await {
        Ok(_) => Ok(told),
        Err(error) if error.is_conflict() => Err(StepError::Changed(namespace.to_owned())),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::kubernetes::test_server::ApiServer;

    const NAMESPACE: &str = "culvert-system";

    fn start() -> RotationStep {
        let trust_domain = "cluster.local".parse().unwrap();
        RotationStep::Start { trust_domain, overlap: Duration::from_secs(600), longest: Duration::from_secs(3600) }
    }

    fn server(now: SystemTime) -> ApiServer {
        ApiServer::with(&json!(rotation::new_secret(NAMESPACE, "cluster.local", now).unwrap()).to_string())
    }

    async fn refused(server: &ApiServer, step: &RotationStep, now: SystemTime) -> String {
        take(&server.client(), NAMESPACE, step, now).await.unwrap_err().to_string()
    }

    #[tokio::test]
    async fn a_root_is_rotated_in_two_steps_and_told_what_comes_next() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let server = server(now);
        let told = take(&server.client(), NAMESPACE, &start(), now).await.unwrap();
        assert!(told.contains("signs from 2027-01-15T08:10:00Z") && told.ends_with("after 2027-01-15T09:10:00Z"), "{told}");
        assert!(refused(&server, &start(), now).await.contains("the new root signs from 2027-01-15T08:10:00Z"));
        let finish = RotationStep::Finish { danger_now: false };
        assert!(refused(&server, &finish, now).await.contains("until 2027-01-15T09:10:00Z"));
        take(&server.client(), NAMESPACE, &finish, now + Duration::from_secs(4200)).await.unwrap();
        assert!(refused(&server, &finish, now).await.contains("no rotation is under way"));
        take(&server.client(), NAMESPACE, &start(), now).await.unwrap();
        take(&server.client(), NAMESPACE, &RotationStep::Finish { danger_now: true }, now).await.unwrap();
    }

    #[tokio::test]
    async fn nothing_is_rotated_that_is_not_the_mesh_s_own() {
        let (now, server) = (SystemTime::now(), ApiServer::new());
        assert!(refused(&server, &start(), now).await.contains("is a controller installed"));
        server.put("{apiVersion: v1, kind: Secret, metadata: {name: cacerts, namespace: culvert-system}}");
        assert!(refused(&server, &start(), now).await.contains("user's own"));
        server.set_down(true);
        assert!(refused(&server, &start(), now).await.contains("did not answer"));
    }
}
