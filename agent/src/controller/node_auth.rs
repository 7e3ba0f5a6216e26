//! Who may ask: which node a request comes from, by the token that it carries.
//!
//! Enters: the nodes that exist, and the metadata of requests. Leaves: the node that a request comes from. A request without a
//! good token learns nothing, and tokens are never logged. [`tokens`] has files of its own making; [`review`] asks an API server.

pub mod review;
pub mod tokens;

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tonic::Status;
use tonic::metadata::MetadataMap;
use tracing::warn;

pub use review::TokenReviews;
pub use tokens::{NodeTokens, TokenError};

/// The longest `authorization` value that is looked at, in bytes: a ServiceAccount's token has one or two thousand.
const LONGEST: usize = 16 * 1024;
/// At most one message on refused requests in this time.
const REFUSALS: Duration = Duration::from_secs(10);

/// Tells which node a request comes from.
#[tonic::async_trait]
pub trait NodeAuth: Debug + Send + Sync + 'static {
    /// The node whose token a request carries.
    ///
    /// # Errors
    /// UNAUTHENTICATED without a good token; UNAVAILABLE when that cannot be told now.
    async fn authenticate(&self, metadata: &MetadataMap) -> Result<Arc<str>, Status>;

    /// From now on exactly these nodes are part of the mesh. Gives what could not be done for them.
    fn set_nodes(&self, nodes: &BTreeSet<String>) -> Vec<NodeAuthError>;

    /// Whether the node is part of the mesh still.
    fn accepts(&self, node: &str) -> bool;

    /// Tells when the set of nodes changes.
    fn changes(&self) -> watch::Receiver<()>;
}

/// What could not be done for a node.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct NodeAuthError(#[from] TokenError);

/// Messages on refused requests, not too many.
#[derive(Debug, Default)]
struct Refusals(Mutex<Refused>);

#[derive(Debug, Default)]
struct Refused {
    told: Option<Instant>,
    untold: u64,
}

impl Refusals {
    fn note(&self, how: &str) {
        let mut refused = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if refused.told.is_some_and(|told| now.duration_since(told) < REFUSALS) {
            refused.untold += 1;
            return;
        }
        warn!(unreported = refused.untold, "a request {how} was refused: is an agent's --token-file out of date?");
        *refused = Refused { told: Some(now), untold: 0 };
    }
}

/// The token of a request's `authorization: Bearer` metadata.
fn bearer(metadata: &MetadataMap) -> Option<&[u8]> {
    let value = metadata.get("authorization")?.as_bytes();
    let (scheme, token) = value.split_at_checked(7).filter(|_| value.len() <= LONGEST)?;
    Some(token.trim_ascii()).filter(|token| scheme.eq_ignore_ascii_case(b"bearer ") && !token.is_empty())
}
