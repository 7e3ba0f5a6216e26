//! Clocks: a certificate is worth nothing to who thinks that it is not valid yet, or no more.

use std::path::Path;
use std::time::{Duration, SystemTime};

use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::Finding;

/// Skew that nothing suffers from: certificates are dated back by more.
const TOLERATED: Duration = Duration::from_secs(10);
/// How often a kubelet renews its lease, with room for one that was missed.
const LEASE: Duration = Duration::from_secs(60);
const REMEDY: &str = "run a time service (chrony, systemd-timesyncd) there";

/// What time services leave while they keep a clock: systemd-timesyncd, chrony, ntpsec.
const SERVICES: [&str; 3] = ["/run/systemd/timesync/synchronized", "/run/chrony", "/run/ntpd.pid"];

/// Whether a time service keeps this machine's clock.
pub(super) fn of_this_machine() -> Finding {
    if SERVICES.iter().any(|path| Path::new(path).exists()) {
        Finding::ok("clock", "a time service keeps this machine's clock")
    } else {
        Finding::warning("clock", "no time service is known to keep this machine's clock", REMEDY)
    }
}

/// This machine's clock against the API server's, which answered at `api` when it was `here` here.
pub(super) fn of_the_asker(here: SystemTime, api: SystemTime) -> Finding {
    match skew(here, api) {
        (_, off) if off <= TOLERATED => Finding::ok("clock", "this machine and the API server agree on the time"),
        (word, off) => {
            Finding::warning("clock", format!("this machine's clock is {} s {word} the API server's", off.as_secs()), REMEDY)
        }
    }
}

/// A node's clock, as its lease shows it: the kubelet writes it every 10 seconds by the node's clock.
pub(super) fn of_node(name: &str, lease: &Value, api: SystemTime) -> Option<Finding> {
    let renewed = lease["spec"]["renewTime"].as_str()?;
    let renewed: SystemTime = OffsetDateTime::parse(renewed, &Rfc3339).ok()?.into();
    match skew(renewed, api) {
        ("ahead of", off) if off > TOLERATED => Some(Finding::error(
            "clock",
            format!("the clock of node {name} is {} s ahead of the API server's", off.as_secs()),
            REMEDY,
        )),
        ("behind", off) if off > LEASE => Some(Finding::warning(
            "clock",
            format!("node {name} last renewed its lease {} s ago: its clock is behind, or its kubelet is down", off.as_secs()),
            REMEDY,
        )),
        _ => None,
    }
}

fn skew(clock: SystemTime, reference: SystemTime) -> (&'static str, Duration) {
    match clock.duration_since(reference) {
        Ok(ahead) => ("ahead of", ahead),
        Err(behind) => ("behind", behind.duration()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::diagnosis::Severity;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn a_node_whose_lease_is_from_the_future_is_ahead() {
        let lease = json!({"spec": {"renewTime": "1970-01-01T00:01:40.000000Z"}});
        assert_eq!(of_node("a", &lease, at(100)), None);
        assert_eq!(of_node("a", &lease, at(95)), None);
        assert_eq!(of_node("a", &lease, at(155)), None);
        assert_eq!(of_node("a", &lease, at(80)).map(|finding| finding.severity), Some(Severity::Error));
        assert_eq!(of_node("a", &lease, at(400)).map(|finding| finding.severity), Some(Severity::Warning));
        assert_eq!(of_node("a", &json!({}), at(0)), None);
    }

    #[test]
    fn a_few_seconds_between_this_machine_and_the_api_are_nothing() {
        assert_eq!(of_the_asker(at(100), at(105)).severity, Severity::Ok);
        assert_eq!(of_the_asker(at(100), at(130)).severity, Severity::Warning);
    }
}
