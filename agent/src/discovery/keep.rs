//! What the controller told, kept across the agent's restart, so that a successor is sent only what has changed meanwhile.
//!
//! Enters: what each response brought anew; at the start, what a predecessor kept. Leaves: a [`Mirror`] that holds it, with nothing in
//! force before the controller has confirmed all of it. It runs on a thread of its own: a disk that is slow, full or gone holds
//! nothing up, and costs the next agent a transfer. Nothing that is found on the disk keeps an agent from starting.
//!
//! Answers to questions about addresses count for those only that asked, so questions are not kept; the resources that came with them
//! are, like any others.

mod file;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use std::{fs, io};

use aws_lc_rs::digest;
use tokio::sync::mpsc::{self, error::SendTimeoutError};
use tracing::{debug, info, warn};

use self::file::{Binding, MeshFile, Unusable};
use super::DiscoveryConfig;
use super::mirror::Mirror;
use crate::identity::ControllerEndpoint;
use crate::identity::bundle::{BundleError, certificates_in};
use crate::proto::discovery::DeltaDiscoveryResponse;

/// What the names of such files end in.
const EXTENSION: &str = "mesh";
/// What those end in that were of no use.
const ASIDE: &str = "aside";
/// Notes that the disk has not taken yet. A note is at most a response.
const BACKLOG: usize = 16;
/// How long a first answer waits for the disk: whatever it brings is of no use before its last part.
const PATIENCE: Duration = Duration::from_secs(1);
/// A file is written anew once it is twice as long as what it holds is worth, and this much longer.
const SLACK: u64 = 4 << 20;

/// Where a node's mesh is kept, and whose it is.
#[derive(Clone, Debug)]
pub(super) struct Place {
    directory: PathBuf,
    node: Arc<str>,
    endpoint: ControllerEndpoint,
}

/// Takes note of what the controller tells.
#[derive(Debug)]
pub(super) struct Keeper {
    notes: mpsc::Sender<Note>,
    /// The disk did not keep up once: it is not waited for again.
    late: bool,
    #[cfg(test)]
    thread: std::thread::JoinHandle<()>,
}

/// Why something is not kept.
#[derive(Debug, thiserror::Error)]
enum KeepError {
    #[error(transparent)]
    File(#[from] io::Error),
    #[error(transparent)]
    Place(#[from] Unusable),
    #[error("the root certificate file: {0}")]
    Roots(#[from] BundleError),
    #[error("it takes more than the {} bytes that are read again", file::FILE_MOST)]
    TooLarge,
}

/// What is to be kept.
#[derive(Debug)]
enum Note {
    /// What a response brought, and the size of all that is held by now.
    News(DeltaDiscoveryResponse, u64),
    /// The controller was connected to: its roots may be others than before.
    Connected,
    /// All that there is is another control plane's.
    Foreign,
}

/// Gives what a predecessor kept to a mirror that holds nothing yet, and whoever keeps it from now on; none if that cannot be.
/// Takes as long as decoding takes.
pub(super) fn recall(place: Place, empty: impl Fn() -> Mirror) -> (Mirror, Option<Keeper>) {
    let path = path_of(&place.directory, &place.node);
    let not_kept = |reason: &dyn std::fmt::Display| {
        let file = path.display();
        warn!(%file, %reason, "what the controller tells is not kept: an agent that starts anew fetches all of it");
    };
    let binding = match file::prepare(&place.directory).map_err(KeepError::from).and_then(|()| place.binding()) {
        Ok(binding) => binding,
        Err(error) => {
            not_kept(&error);
            return (empty(), None);
        }
    };
    let mut mirror = empty();
    let file = match file::read(&path, &binding, |response| mirror.recall(response)) {
        Ok(None) => MeshFile::create(&path, binding),
        Ok(Some(found)) => {
            info!(
                resources = mirror.size(),
                cut = found.cut,
                "the mesh is known from before, and counts once the controller says so"
            );
            MeshFile::go_on(&path, found).and_then(|file| rebound(file, binding))
        }
        Err(reason) => {
            mirror = empty();
            put_aside(&path, &reason);
            MeshFile::create(&path, binding)
        }
    };
    let keeper = file.map_err(KeepError::from).and_then(|file| Keeper::start(file, place));
    (mirror, keeper.map_err(|error| not_kept(&error)).ok())
}

/// Removes what was kept for a node, and the directory with the last node's.
///
/// # Errors
/// The first file that cannot be removed.
pub(super) fn forget(directory: &Path, node: &str) -> io::Result<()> {
    let path = path_of(directory, node);
    for file in [path.clone(), file::beside(&path, ASIDE), file::beside(&path, file::DRAFT)] {
        match fs::remove_file(&file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
    }
    // In a pod it is a mount of the node's directory, and it is that one which can be removed.
    let outside = Path::new("/proc/1/root").join(directory.strip_prefix("/").unwrap_or(directory));
    if fs::remove_dir(directory).is_err_and(|error| error.kind() == io::ErrorKind::ResourceBusy) {
        let _not_empty = fs::remove_dir(outside);
    }
    Ok(())
}

fn path_of(directory: &Path, node: &str) -> PathBuf {
    directory.join(format!("{node}.{EXTENSION}"))
}

fn put_aside(path: &Path, reason: &Unusable) {
    let aside = file::beside(path, ASIDE);
    let file = path.display();
    match fs::rename(path, &aside) {
        Ok(()) => {
            let aside = aside.display();
            warn!(%file, %reason, %aside, "what was kept of the mesh is not used and put aside: all is fetched again");
        }
        Err(error) => warn!(%file, %reason, %error, "what was kept of the mesh is not used: all is fetched again"),
    }
}

/// The file for this binding. Roots are rotated, and what is kept must outlive the last one that it was bound to.
fn rebound(mut file: MeshFile, binding: Binding) -> io::Result<MeshFile> {
    if *file.binding() != binding {
        file.rewrite(binding)?;
    }
    Ok(file)
}

impl Place {
    /// The place of an agent's.
    pub(super) fn of(config: &DiscoveryConfig) -> Self {
        Self { directory: config.state_dir.clone(), node: Arc::clone(&config.node), endpoint: config.endpoint.clone() }
    }

    fn binding(&self) -> Result<Binding, KeepError> {
        let roots = certificates_in(&fs::read(self.endpoint.root_cert())?)?;
        let mut roots: Vec<_> = roots.iter().map(|root| digest::digest(&digest::SHA256, root).as_ref().to_vec()).collect();
        roots.sort();
        Ok(Binding { node: self.node.to_string(), controller: self.endpoint.address(), roots })
    }
}

impl Keeper {
    fn start(mut file: MeshFile, place: Place) -> Result<Self, KeepError> {
        let (notes, mut incoming) = mpsc::channel(BACKLOG);
        let thread = std::thread::Builder::new().name("keep".to_owned()).spawn(move || {
            while let Some(note) = incoming.blocking_recv() {
                if let Err(error) = take_down(&mut file, &place, note) {
                    let path = path_of(&place.directory, &place.node);
                    warn!(file = %path.display(), %error, "the mesh is not kept any longer: an agent that starts anew fetches what has changed since");
                    return;
                }
            }
        })?;
        #[cfg(not(test))]
        drop(thread);
        Ok(Self {
            notes,
            late: false,
            #[cfg(test)]
            thread,
        })
    }

    /// Has what a response brought kept, unless the disk is behind. `held` is the size of all that is held by now; `first`: the
    /// response is part of a first answer, which waits a moment for the disk.
    ///
    /// # Cancel safety
    /// What is given is not kept if this is dropped.
    pub(super) async fn keep(&mut self, news: DeltaDiscoveryResponse, held: u64, first: bool) {
        if news.resources.is_empty() && news.removed_resources.is_empty() {
            return;
        }
        let patience = if first && !self.late { PATIENCE } else { Duration::ZERO };
        if let Err(SendTimeoutError::Timeout(_)) = self.notes.send_timeout(Note::News(news, held), patience).await {
            self.late = true;
            debug!("the disk is behind: what came just now is not kept");
        }
    }

    /// Notes that the controller was connected to.
    pub(super) fn connected(&self) {
        if self.notes.try_send(Note::Connected).is_err() {
            debug!("the disk is behind: whether the controller has new roots is looked at another time");
        }
    }

    /// Has nothing of what was kept until now kept any longer.
    pub(super) fn forget(&self) {
        if self.notes.try_send(Note::Foreign).is_err() {
            debug!("the disk is behind: what is of another control plane is found again");
        }
    }
}

fn take_down(file: &mut MeshFile, place: &Place, note: Note) -> Result<(), KeepError> {
    match note {
        Note::News(news, held) => {
            file.append(news)?;
            if file.length() > held * 2 + SLACK {
                let binding = file.binding().clone();
                file.rewrite(binding)?;
            }
            if file.length() > file::FILE_MOST {
                return Err(KeepError::TooLarge);
            }
        }
        Note::Foreign => *file = MeshFile::create(&path_of(&place.directory, &place.node), place.binding()?)?,
        Note::Connected => {
            let binding = place.binding()?;
            if *file.binding() != binding {
                file.rewrite(binding)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
