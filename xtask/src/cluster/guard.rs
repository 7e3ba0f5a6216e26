//! A cluster that goes when whoever uses it does, in whatever way: a process of its own waits for the end of a pipe that the user alone
//! holds, and removes the cluster then. A user that is interrupted or killed has no say in it.

use std::fs::{self, File, TryLockError};
use std::io::{Read as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use super::{Cluster, processes};

/// What says that the cluster is to stay.
const KEEP: &[u8] = b"keep";
/// The variable by which the programs of a user are known to be of this cluster's.
pub(crate) const VARIABLE: &str = "CULVERT_CLUSTER";

/// The right to use a cluster, which one process at a time has. Dropped, it takes the cluster with it.
#[derive(Debug)]
pub(crate) struct Guard {
    cluster: Cluster,
    /// None: it has ended.
    child: Option<Child>,
}

impl Guard {
    /// Waits for the process that uses the cluster, if one does, and removes what one has left that was interrupted. What one has kept stays.
    ///
    /// # Errors
    /// When the guard does not start, or not all that was left can be removed.
    pub(crate) fn new(cluster: &Cluster) -> Result<Self> {
        let place = cluster.dir().with_extension("lock");
        fs::create_dir_all(place.parent().context("a cluster's directory is in another")?)?;
        let lock = File::create(&place).with_context(|| format!("making {}", place.display()))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                eprintln!("cluster {} is in use: waiting", cluster.name);
                lock.lock().context("waiting for who uses the cluster")?;
            }
            Err(TryLockError::Error(error)) => return Err(error).with_context(|| format!("locking {}", place.display())),
        }
        // The program that runs, whatever a build has put in its place.
        let mut command = Command::new("/proc/self/exe");
        command.arg0("xtask").args(["cluster", "--name", &cluster.name, "guard"]);
        // Out of reach of the terminal's interrupt. Its output is the lock, which is free when it has ended.
        command.stdin(Stdio::piped()).stdout(lock).process_group(0);
        let child = command.spawn().context("starting the cluster's guard")?;
        let guard = Self { cluster: cluster.clone(), child: Some(child) };
        if fs::remove_file(cluster.path("kept")).is_err() {
            cluster.down().context("removing what an interrupted run left")?;
        }
        Ok(guard)
    }

    /// Leaves the cluster as it is, for the next user.
    ///
    /// # Errors
    /// When it cannot be marked so.
    pub(crate) fn keep(mut self) -> Result<()> {
        if self.cluster.dir().is_dir() {
            fs::write(self.cluster.path("kept"), "")?;
        }
        let input = self.child.as_mut().and_then(|child| child.stdin.as_mut());
        input.context("a piped input")?.write_all(KEEP)?;
        self.end()
    }

    /// Removes the cluster.
    ///
    /// # Errors
    /// When not all of it can be removed; the guard has said what.
    pub(crate) fn remove(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        let Some(mut child) = self.child.take() else { return Ok(()) };
        // It closes the input first.
        let status = child.wait()?;
        ensure!(status.success(), "cluster {} was not removed: {status}", self.cluster.name);
        Ok(())
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            eprintln!("xtask: {error:#}");
        }
    }
}

/// Is the guard: waits for the end of the standard input, and removes the cluster unless it is to stay.
pub(super) fn run(cluster: &Cluster) -> Result<()> {
    let mut said = Vec::new();
    std::io::stdin().read_to_end(&mut said).context("waiting for who uses the cluster")?;
    if said == KEEP {
        return Ok(());
    }
    // Of a user that was killed alone: its programs would wait for a cluster that is gone.
    processes::end("the programs of who used the cluster", || processes::with_variable(VARIABLE, &cluster.name))?;
    cluster.down()
}
