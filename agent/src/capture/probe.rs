//! Whether this machine has what capture needs, asked without changing anything.
//!
//! Enters: the operator's choice of directories. Leaves: what is there and what is missing. Each question is put to the kernel
//! itself: distributions bring features to older versions, and leave them out of newer ones.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use aya::maps::MapType;
use aya::programs::ProgramType;
use aya::sys::{BpfHelper, is_helper_supported, is_map_supported, is_program_supported};

use super::cgroup::{CgroupError, CgroupRoot};
use super::{Netns, bpffs};

/// A feature of the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Feature {
    /// What it is.
    pub name: &'static str,
    /// The first version of Linux that has it.
    pub since: &'static str,
    /// Whether it is there; an error when the kernel would not say, as it does to who may not ask.
    pub present: Result<bool, String>,
}

/// All features that the programs, and the agent beside them, need.
#[must_use]
pub fn features() -> Vec<Feature> {
    let program = |name, since, kind| Feature { name, since, present: said(is_program_supported(kind)) };
    let map = |name, since, kind| Feature { name, since, present: said(is_map_supported(kind)) };
    let helper = |name, since, kind, helper| Feature { name, since, present: said(is_helper_supported(kind, helper)) };
    vec![
        program("cgroup programs at connect() and getpeername()", "5.8", ProgramType::CgroupSockAddr),
        program("sock_ops programs", "4.13", ProgramType::SockOps),
        program("sk_lookup programs", "5.9", ProgramType::SkLookup),
        map("ring buffers", "5.8", MapType::RingBuf),
        map("tables of sockets", "4.18", MapType::SockHash),
        map("tables that forget the oldest entry", "4.10", MapType::LruHash),
        helper(
            "network namespaces' cookies in programs",
            "5.7",
            ProgramType::CgroupSockAddr,
            BpfHelper::BPF_FUNC_get_netns_cookie,
        ),
        Feature { name: "network namespaces' cookies of sockets", since: "5.14", present: answered(Netns::current().map(drop)) },
    ]
}

/// What of `features` the kernel says it has not, for people. Empty: there is all, as far as the kernel would say.
pub(super) fn missing(features: &[Feature]) -> Vec<String> {
    let missing = features.iter().filter(|feature| feature.present == Ok(false));
    missing.map(|Feature { name, since, .. }| format!("{name} (Linux {since} and newer can have them)")).collect()
}

/// The kernel's version, as it names it, such as `6.1.0-18-amd64`. Empty without `/proc`.
#[must_use]
pub fn release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned()
}

/// The cgroup v2 directory that programs would be attached to.
///
/// # Errors
/// [`CgroupError`]: there is none.
pub fn cgroup_root(chosen: Option<&Path>) -> Result<PathBuf, CgroupError> {
    CgroupRoot::open(chosen).map(|root| root.path().to_owned())
}

/// The path by which `directory` is, or would be made, on a bpffs. None: no bpffs is mounted there.
#[must_use]
pub fn bpffs(directory: &Path) -> Option<PathBuf> {
    bpffs::find(directory)
}

/// An option of sockets that the kernel does not know is a feature that it has not; other errors tell nothing of it.
fn answered(asked: io::Result<()>) -> Result<bool, String> {
    match asked {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => Ok(false),
        Err(error) => Err(error.to_string()),
    }
}

fn said<E: std::error::Error>(answer: Result<bool, E>) -> Result<bool, String> {
    answer.map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_feature_is_asked_for_once() {
        let mut names: Vec<_> = features().into_iter().map(|feature| feature.name).collect();
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all);
    }

    #[test]
    fn what_the_kernel_says_it_has_not_is_missing_and_what_it_will_not_say_is_not() {
        let feature = |name, present| Feature { name, since: "5.14", present };
        let refused = |number| answered(Err(io::Error::from_raw_os_error(number)));
        let features = [
            feature("rings", Ok(true)),
            feature("cookies", refused(libc::ENOPROTOOPT)),
            feature("tables", refused(libc::EPERM)),
            feature("namespaces", answered(Ok(()))),
        ];
        assert_eq!(missing(&features), ["cookies (Linux 5.14 and newer can have them)"]);
        assert!(features[2].present.as_ref().is_err_and(|error| error.contains("not permitted")));
    }
}
