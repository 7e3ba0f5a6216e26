//! Certificates: how long those that all others rest on, and those that agents hold, are still good for.

use std::time::{Duration, SystemTime};

use x509_parser::pem::Pem;

use super::Finding;

const DAY: Duration = Duration::from_secs(24 * 3600);
/// An authority's certificate takes people to replace.
const AUTHORITY_WARNING: Duration = Duration::from_secs(30 * 24 * 3600);
const REMEDY: &str = "culvert ca rotate; for an intermediate of your own, put a new one into the Secret cacerts";

/// The certificates of an authority, in PEM; `what` names them.
pub(super) fn authority(what: &str, pem: &[u8], now: SystemTime) -> Vec<Finding> {
    let certificates: Vec<_> = Pem::iter_from_buffer(pem).collect();
    if certificates.is_empty() {
        return vec![Finding::error("certificates", format!("{what} has no certificate in it"), REMEDY)];
    }
    certificates.into_iter().map(|certificate| expiry(what, certificate.ok().as_ref(), now)).collect()
}

fn expiry(what: &str, pem: Option<&Pem>, now: SystemTime) -> Finding {
    let ends = pem.and_then(|pem| Some(pem.parse_x509().ok()?.validity().not_after.timestamp()));
    let Some(ends) = ends.and_then(|seconds| u64::try_from(seconds).ok()) else {
        return Finding::error("certificates", format!("a certificate in {what} cannot be read"), REMEDY);
    };
    match (SystemTime::UNIX_EPOCH + Duration::from_secs(ends)).duration_since(now) {
        Err(_) => Finding::error("certificates", format!("{what} has expired"), REMEDY),
        Ok(left) if left < AUTHORITY_WARNING => {
            Finding::warning("certificates", format!("{what} expires in {}", lasting(left)), REMEDY)
        }
        Ok(left) => Finding::ok("certificates", format!("{what} is good for {}", lasting(left))),
    }
}

/// The next of an agent's certificates to expire, by its metrics. They are renewed at half of their life.
pub(super) fn held(node: &str, next_expiry: Option<u64>, now: SystemTime) -> Option<Finding> {
    let ends = SystemTime::UNIX_EPOCH + Duration::from_secs(next_expiry?);
    let remedy = "see the agent's log: does it reach the controller, and does that sign?";
    match ends.duration_since(now) {
        Err(_) => {
            Some(Finding::error("certificates", format!("the agent on {node} holds a certificate that has expired"), remedy))
        }
        Ok(left) if left < Duration::from_secs(3600) => {
            let message = format!("a certificate of the agent on {node} expires in {} and is not renewed yet", lasting(left));
            Some(Finding::warning("certificates", message, remedy))
        }
        Ok(_) => None,
    }
}

fn lasting(time: Duration) -> String {
    if time < DAY { format!("{} min", time.as_secs() / 60) } else { format!("{} days", time.as_secs() / DAY.as_secs()) }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair};

    use super::*;
    use crate::diagnosis::{Severity, worst};

    #[test]
    fn a_root_is_warned_of_a_month_before_its_end_and_an_error_after_it() {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.not_after = time::OffsetDateTime::from_unix_timestamp(1_000 * 86_400).expect("a date");
        let pem = params.self_signed(&key).expect("a certificate").pem();
        let on_day = |day: u32| worst(&authority("the root", pem.as_bytes(), SystemTime::UNIX_EPOCH + DAY * day));
        assert_eq!(on_day(960), Severity::Ok);
        assert_eq!(on_day(980), Severity::Warning);
        assert_eq!(on_day(1001), Severity::Error);
        assert_eq!(worst(&authority("the root", b"no PEM", SystemTime::UNIX_EPOCH)), Severity::Error);
    }

    #[test]
    fn a_workloads_certificate_that_is_not_renewed_is_told_of() {
        let now = SystemTime::UNIX_EPOCH + DAY;
        let check = |ends: u64| held("a", Some(ends), now).map(|finding| finding.severity);
        assert_eq!(check(86_400 * 2), None);
        assert_eq!(check(86_400 + 600), Some(Severity::Warning));
        assert_eq!(check(86_000), Some(Severity::Error));
        assert_eq!(held("a", None, now), None);
    }
}
