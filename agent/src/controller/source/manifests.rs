//! Objects from a directory of manifests, followed as they change.
//!
//! Enters: `*.yaml`, `*.yml` and `*.json` files anywhere under the directory, with any number of documents, and what inotify
//! tells of them. Leaves: a [`Feed`]. A file that cannot be used is told of once, and what it said before stays in force. Nothing
//! in the directory is ever written.

mod ledger;
mod parse;
#[cfg(test)]
mod tests;
mod tree;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use inotify::{Inotify, Watches};
use tokio::io::unix::AsyncFd;
use tokio::task::spawn_blocking;
use tokio_util::sync::CancellationToken;
use tracing::error;

use self::tree::Tree;
use super::{Feed, FeedWriter, Source, Waiting, feed};
use crate::policy::compile::MeshContext;

/// How long after an event more of the same write are waited for.
const DEBOUNCE: Duration = Duration::from_millis(3);
/// How often what no event tells is looked for.
const LOOK_AROUND: Duration = Duration::from_secs(1);
/// The same while the directory does not exist.
const LOOK_FOR_DIRECTORY: Duration = Duration::from_millis(50);
/// Room for the events of one read, in bytes.
const EVENTS: usize = 64 * 1024;

/// A directory of manifests.
#[derive(Debug)]
pub struct Manifests {
    directory: PathBuf,
    mesh: MeshContext,
}

/// Why the directory cannot be followed.
#[derive(Debug, thiserror::Error)]
#[error("cannot follow {directory} with inotify (is fs.inotify.max_user_instances too low?)", directory = directory.display())]
pub struct FollowError {
    directory: PathBuf,
    #[source]
    source: io::Error,
}

impl Manifests {
    /// The manifests in `directory`, which need not exist yet. Policies are checked against `mesh`.
    #[must_use]
    pub fn new(directory: PathBuf, mesh: MeshContext) -> Self {
        Self { directory, mesh }
    }
}

impl Source for Manifests {
    type Error = FollowError;

    fn start(self, stop: CancellationToken) -> Result<Feed, FollowError> {
        let (inotify, watches) = open().map_err(|source| FollowError { directory: self.directory.clone(), source })?;
        let tree = Tree::new(self.directory, self.mesh, watches);
        let (writer, feed) = feed();
        tokio::spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = follow(inotify, tree, writer) => {}
            }
        });
        Ok(feed)
    }
}

/// An inotify instance that the runtime wakes for, and the handle to add watches with.
#[expect(deprecated, reason = "the replacement is unsafe; an `Inotify` owns its descriptor, which is all that it asks for")]
fn open() -> io::Result<(AsyncFd<Inotify>, Watches)> {
    let inotify = Inotify::init()?;
    let watches = inotify.watches();
    Ok((AsyncFd::new(inotify)?, watches))
}

/// Hands on the directory's whole content, then what changes, until nobody reads the feed.
async fn follow(mut inotify: AsyncFd<Inotify>, mut tree: Tree, mut writer: FeedWriter) {
    let mut buffer = vec![0; EVENTS];
    let mut barriers = Vec::new();
    let mut first = true;
    loop {
        drain(&mut inotify, &mut buffer, &mut tree);
        if tree.is_stale() {
            let settled = spawn_blocking(move || {
                tree.settle();
                tree
            });
            tree = match settled.await {
                Ok(tree) => tree,
                Err(failure) => return error!(%failure, "reading the manifests failed: changes are no longer followed"),
            };
        }
        let changes = tree.ledger.take_changes();
        if (first || !changes.is_empty() || !barriers.is_empty()) && !writer.send(changes, std::mem::take(&mut barriers)).await {
            return;
        }
        first = false;
        barriers = wait(&mut inotify, &mut tree, &mut writer).await;
    }
}

/// Waits for something to do, and gives those that wait at the barrier.
async fn wait(inotify: &mut AsyncFd<Inotify>, tree: &mut Tree, writer: &mut FeedWriter) -> Vec<Waiting> {
    if tree.is_stale() {
        return Vec::new();
    }
    let pause = if tree.exists() { LOOK_AROUND } else { LOOK_FOR_DIRECTORY };
    tokio::select! {
        waiting = writer.at_barrier() => {
            tree.look_for_directory();
            waiting
        }
        ready = inotify.readable_mut() => {
            if let Ok(mut ready) = ready {
                ready.clear_ready();
            }
            tokio::time::sleep(DEBOUNCE).await;
            Vec::new()
        }
        () = tokio::time::sleep(pause) => {
            tree.look_around();
            Vec::new()
        }
    }
}

/// Takes all events that the kernel holds.
fn drain(inotify: &mut AsyncFd<Inotify>, buffer: &mut [u8], tree: &mut Tree) {
    // Ends with `WouldBlock`; any other failure shows again at the next event, and the tree is looked at every second.
    while let Ok(events) = inotify.get_mut().read_events(buffer) {
        for event in events {
            tree.note(&event);
        }
    }
}

/// Takes foreign bytes for a manifest, in both forms.
#[cfg(any(test, feature = "fuzz"))]
pub fn fuzz(bytes: &[u8]) {
    let Ok(trust_domain) = "cluster.local".parse() else { return };
    let mesh = MeshContext { root_namespace: "istio-system".to_owned(), trust_domain };
    for name in ["fuzz.yaml", "fuzz.json"] {
        let mut ledger = ledger::Ledger::default();
        let path = std::path::Path::new(name);
        ledger.file_read(path, [0; 32], parse::parse(path, bytes, &mesh));
        let changes = ledger.take_changes();
        let mut index = crate::controller::index::Index::new(crate::controller::index::MeshSettings {
            trust_domain: mesh.trust_domain.clone(),
            root_namespace: mesh.root_namespace.clone(),
            cluster_domain: "cluster.local".to_owned(),
            default_deny: false,
            same_node: crate::model::SameNode::Kernel,
            cluster_ranges: Vec::new(),
            excluded_namespaces: std::collections::BTreeSet::new(),
            namespaces_told: false,
        });
        drop(index.apply(&changes));
    }
}

/// The objects of a YAML text, all of which must be good.
#[cfg(test)]
pub(in crate::controller) fn objects(text: &str, mesh: &MeshContext) -> Vec<super::Object> {
    let items = parse::parse(std::path::Path::new("test.yaml"), text.as_bytes(), mesh).unwrap();
    items.into_iter().map(|item| item.object.unwrap().0).collect()
}
