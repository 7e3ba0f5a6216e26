//! Single requests to the API server, each with a deadline, and what goes wrong with them in words.
//!
//! Enters: paths and JSON. Leaves: typed objects, or an [`ApiError`] that tells a refusal from a server that cannot be reached.
//! What an answer holds is never logged: it may be a Secret.

use std::time::Duration;

use http::{Method, Request, header};
use kube::Client;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// How long one request may take.
const DEADLINE: Duration = Duration::from_secs(30);
/// Who writes, for the server's book-keeping of fields.
pub const FIELD_MANAGER: &str = "culvert-controller";

/// Why a request to the API server gave nothing.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The server answered, and said no.
    #[error("the API server refused {request} ({code} {reason}): {message}")]
    Refused {
        /// Method and path.
        request: String,
        /// The HTTP status.
        code: u16,
        /// The reason in one word, such as `Forbidden`.
        reason: String,
        /// The server's own words.
        message: String,
    },
    /// The server cannot be reached, or broke off.
    #[error("the API server did not answer {request}: {cause}")]
    Unreachable {
        /// Method and path.
        request: String,
        /// The causes, in words.
        cause: String,
    },
    /// The server took too long.
    #[error("the API server did not answer {0} within {DEADLINE:?}")]
    Late(String),
    /// The answer is not what was asked for.
    #[error("the API server's answer to {request} is not understood: {cause}")]
    Malformed {
        /// Method and path.
        request: String,
        /// What the parser says.
        cause: serde_json::Error,
    },
    /// The request itself cannot be written.
    #[error("the request {request} cannot be written: {cause}")]
    Request {
        /// Method and path.
        request: String,
        /// Why.
        cause: String,
    },
}

impl ApiError {
    /// Whether there is nothing at the path.
    #[must_use]
    pub fn is_absent(&self) -> bool {
        self.code() == Some(404)
    }

    /// Whether the object is there already, or is no longer as it was read.
    #[must_use]
    pub fn is_conflict(&self) -> bool {
        self.code() == Some(409)
    }

    /// The status, if the server answered with one.
    #[must_use]
    pub fn code(&self) -> Option<u16> {
        match self {
            Self::Refused { code, .. } => Some(*code),
            Self::Unreachable { .. } | Self::Late(_) | Self::Malformed { .. } | Self::Request { .. } => None,
        }
    }

    pub(super) fn of(error: &kube::Error, request: &str) -> Self {
        let request = request.to_owned();
        if let kube::Error::Api(status) = error {
            let (reason, message) = (status.reason.clone(), status.message.clone());
            return Self::Refused { request, code: status.code, reason, message };
        }
        // Not the alternate form of the error, whose causes it repeats.
        let mut cause = error.to_string();
        let mut inner = std::error::Error::source(error);
        while let Some(source) = inner {
            let text = source.to_string();
            if !cause.contains(&text) {
                cause = format!("{cause}: {text}");
            }
            inner = source.source();
        }
        Self::Unreachable { request, cause }
    }
}

/// Reads what is at a path, which may have a query.
///
/// # Errors
/// [`ApiError`].
pub async fn get<T: DeserializeOwned>(client: &Client, path: &str) -> Result<T, ApiError> {
    send(client, Method::GET, path, None).await
}

/// Makes an object in a collection.
///
/// # Errors
/// [`ApiError`]; a conflict if there is one of that name.
pub async fn create<T: DeserializeOwned>(client: &Client, collection: &str, object: &Value) -> Result<T, ApiError> {
    let path = format!("{collection}?fieldManager={FIELD_MANAGER}");
    send(client, Method::POST, &path, Some(("application/json", object))).await
}

/// Replaces an object. If it names its `resourceVersion`, only that version of it.
///
/// # Errors
/// [`ApiError`]; a conflict if it is of another version.
pub async fn replace<T: DeserializeOwned>(client: &Client, path: &str, object: &Value) -> Result<T, ApiError> {
    let path = format!("{path}?fieldManager={FIELD_MANAGER}");
    send(client, Method::PUT, &path, Some(("application/json", object))).await
}

/// Makes sure that an object exists and has these fields (server-side apply): doing it twice, or from two replicas, is doing it
/// once.
///
/// # Errors
/// [`ApiError`].
pub async fn apply(client: &Client, path: &str, object: &Value) -> Result<(), ApiError> {
    let path = format!("{path}?fieldManager={FIELD_MANAGER}&force=true");
    let applied: Result<Value, _> = send(client, Method::PATCH, &path, Some(("application/apply-patch+yaml", object))).await;
    applied.map(drop)
}

/// What is at a path, as text.
pub(super) async fn text(client: &Client, path: &str) -> Result<String, ApiError> {
    request_text(client, Method::GET, path, None).await
}

/// A request that reads.
pub(super) fn reading(path: &str) -> Result<Request<Vec<u8>>, ApiError> {
    build(Method::GET, path, None)
}

async fn send<T: DeserializeOwned>(
    client: &Client,
    method: Method,
    path: &str,
    body: Option<(&'static str, &Value)>,
) -> Result<T, ApiError> {
    let text = request_text(client, method.clone(), path, body).await?;
    serde_json::from_str(&text).map_err(|cause| ApiError::Malformed { request: format!("{method} {path}"), cause })
}

async fn request_text(
    client: &Client,
    method: Method,
    path: &str,
    body: Option<(&'static str, &Value)>,
) -> Result<String, ApiError> {
    let subject = format!("{method} {path}");
    let request = build(method, path, body)?;
    match tokio::time::timeout(DEADLINE, client.request_text(request)).await {
        Ok(Ok(text)) => Ok(text),
        Ok(Err(error)) => Err(ApiError::of(&error, &subject)),
        Err(_elapsed) => Err(ApiError::Late(subject)),
    }
}

fn build(method: Method, path: &str, body: Option<(&'static str, &Value)>) -> Result<Request<Vec<u8>>, ApiError> {
    let subject = format!("{method} {path}");
    let mut builder = Request::builder().method(method).uri(path);
    let mut bytes = Vec::new();
    if let Some((media_type, value)) = body {
        builder = builder.header(header::CONTENT_TYPE, media_type);
        bytes = value.to_string().into_bytes();
    }
    builder.body(bytes).map_err(|cause| ApiError::Request { request: subject, cause: cause.to_string() })
}
