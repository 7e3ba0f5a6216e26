//! One token for each node, in files: for a mesh without an API server.
//!
//! Enters: the nodes that exist, and the metadata of requests. Leaves: a token file for each node, and the node that a request
//! comes from. Tokens are random, kept as hashes in memory, and never logged. A request without a known token learns nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aws_lc_rs::{constant_time, digest};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use tokio::sync::watch;
use tonic::Status;
use tonic::metadata::MetadataMap;
use tracing::warn;

use super::{NodeAuth, NodeAuthError, Refusals, bearer};
use crate::controller::state_file::{self, StateFileError};

/// A token's length in bytes before it is encoded.
const TOKEN: usize = 32;

/// The tokens of the mesh's nodes.
#[derive(Debug)]
pub struct NodeTokens {
    directory: PathBuf,
    accepted: Mutex<BTreeMap<String, Hash>>,
    refusals: Refusals,
    changed: watch::Sender<()>,
}

/// Why a node has no token.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// A token file, or their directory, cannot be used.
    #[error(transparent)]
    File(#[from] StateFileError),
    /// The operating system gave no random bytes.
    #[error("no random bytes for the token of node {0}")]
    Random(String),
}

#[derive(Clone, Copy)]
struct Hash([u8; 32]);

impl NodeTokens {
    /// The tokens kept in `state_dir`. None is accepted before [`NodeTokens::set_nodes`].
    ///
    /// # Errors
    /// [`TokenError`] when the directory cannot be made.
    pub fn open(state_dir: &Path) -> Result<Self, TokenError> {
        let directory = state_dir.join("tokens");
        state_file::create_private_directory(&directory)?;
        Ok(Self { directory, accepted: Mutex::default(), refusals: Refusals::default(), changed: watch::Sender::new(()) })
    }

    fn token(&self, node: &str) -> Result<String, TokenError> {
        let path = self.directory.join(node);
        match fs::read_to_string(&path) {
            Ok(text) if is_token(text.trim()) => return Ok(text.trim().to_owned()),
            Ok(_) => warn!("{} holds no token: a new one is made, the agent on {node} must get it", path.display()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(StateFileError { action: "read", path, source }.into()),
        }
        let mut bytes = [0; TOKEN];
        aws_lc_rs::rand::fill(&mut bytes).map_err(|_unspecified| TokenError::Random(node.to_owned()))?;
        let token = URL_SAFE_NO_PAD.encode(bytes);
        state_file::write_atomically(&path, token.as_bytes(), 0o600)?;
        Ok(token)
    }

    fn remove_others(&self, nodes: &BTreeSet<String>) -> Vec<TokenError> {
        let failed = |action, path: &Path| {
            let path = path.to_owned();
            move |source| TokenError::from(StateFileError { action, path, source })
        };
        let entries = match fs::read_dir(&self.directory) {
            Ok(entries) => entries,
            Err(source) => return vec![failed("list", &self.directory)(source)],
        };
        let others = entries.flatten().filter(|entry| entry.file_name().to_str().is_none_or(|name| !nodes.contains(name)));
        others.filter_map(|entry| fs::remove_file(entry.path()).map_err(failed("remove", &entry.path())).err()).collect()
    }
}

#[tonic::async_trait]
impl NodeAuth for NodeTokens {
    /// Accepts exactly the tokens of `nodes`: makes those that are missing, and removes those of other nodes. Does all that it can,
    /// and gives what failed.
    fn set_nodes(&self, nodes: &BTreeSet<String>) -> Vec<NodeAuthError> {
        let mut failures = Vec::new();
        let mut accepted = BTreeMap::new();
        // Held while tokens are written: who reads one and shows it at once is answered when it is accepted.
        let mut in_force = lock(&self.accepted);
        for node in nodes {
            match self.token(node) {
                Ok(token) => drop(accepted.insert(node.clone(), Hash::of(token.as_bytes()))),
                Err(failure) => failures.push(failure),
            }
        }
        let before = std::mem::replace(&mut *in_force, accepted);
        drop(in_force);
        // No node at all since the start may only mean that the objects are yet to come.
        if !(nodes.is_empty() && before.is_empty()) {
            failures.extend(self.remove_others(nodes));
        }
        self.changed.send_replace(());
        failures.into_iter().map(NodeAuthError::from).collect()
    }

    async fn authenticate(&self, metadata: &MetadataMap) -> Result<Arc<str>, Status> {
        let Some(token) = bearer(metadata) else {
            self.refusals.note("without a token");
            return Err(Status::unauthenticated("no token: send the metadata `authorization: Bearer <the node's token>`"));
        };
        let hash = Hash::of(token);
        let mut found = None;
        for (node, known) in lock(&self.accepted).iter() {
            if constant_time::verify_slices_are_equal(&known.0, &hash.0).is_ok() {
                found = Some(Arc::from(node.as_str()));
            }
        }
        found.ok_or_else(|| {
            self.refusals.note("with an unknown token");
            Status::unauthenticated("the token is not that of any node: is it the one in the controller's state directory?")
        })
    }

    fn accepts(&self, node: &str) -> bool {
        lock(&self.accepted).contains_key(node)
    }

    fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }
}

impl Hash {
    fn of(token: &[u8]) -> Self {
        let mut hash = [0; 32];
        hash.copy_from_slice(digest::digest(&digest::SHA256, token).as_ref());
        Self(hash)
    }
}

impl std::fmt::Debug for Hash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hash(..)")
    }
}

fn is_token(text: &str) -> bool {
    URL_SAFE_NO_PAD.decode(text).is_ok_and(|bytes| bytes.len() == TOKEN)
}

/// Locks, also after a panic elsewhere: every change under these locks is a single assignment.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
