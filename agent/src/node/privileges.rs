//! What the kernel lets this process do.
//!
//! Enters: `/proc/self/status`. Leaves: nothing, or the names of the capabilities that are missing, before a first step fails with
//! a word that says less.

use std::fs;

/// Capabilities without which no agent works: names and numbers (`linux/capability.h`).
const NEEDED: [(&str, u32); 2] = [("CAP_NET_ADMIN", 12), ("CAP_SYS_ADMIN", 21)];

/// The process may not do what an agent does.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the agent lacks {}, which loading eBPF programs and entering pods' network namespaces take: run it as root",
    missing.join(" and ")
)]
pub struct LacksCapabilities {
    missing: Vec<&'static str>,
}

/// Checks what the process may do.
///
/// # Errors
/// [`LacksCapabilities`]. A kernel that does not say is taken to allow everything: the steps themselves will tell.
pub fn check() -> Result<(), LacksCapabilities> {
    let effective = fs::read_to_string("/proc/self/status").ok().and_then(|status| effective(&status));
    effective.map_or(Ok(()), missing_of)
}

fn effective(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

fn missing_of(effective: u64) -> Result<(), LacksCapabilities> {
    let lacks = |number: u32| effective & (1 << number) == 0;
    let missing: Vec<_> = NEEDED.into_iter().filter(|(_, number)| lacks(*number)).map(|(name, _)| name).collect();
    if missing.is_empty() { Ok(()) } else { Err(LacksCapabilities { missing }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        assert_eq!(effective("Name:\tx\nCapEff:\t0000000000201000\n"), Some(1 << 12 | 1 << 21));
        assert_eq!(missing_of(1 << 12 | 1 << 21), Ok(()));
        let error = missing_of(0).expect_err("nothing is allowed").to_string();
        assert!(error.contains("CAP_NET_ADMIN and CAP_SYS_ADMIN") && error.contains("root"), "{error}");
    }
}
