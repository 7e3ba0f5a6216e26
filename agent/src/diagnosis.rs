//! What is wrong, and the way to mend it.
//!
//! Enters: a cluster's objects, or the node that this runs on. Leaves: findings, good and bad, each with what to do. Nothing is
//! changed. What may not be read is told as a warning, and never taken for good.

mod certificates;
mod clock;
pub mod cluster;
mod mesh;
pub mod node;
mod nodes;
mod workloads;

use std::fmt::Write as _;

use serde::Serialize;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// As it shall be.
    Ok,
    /// It works, but not as well as it could, or could not be looked at.
    Warning,
    /// Something does not work.
    Error,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Which check, by a word that stays the same: `kernel`, `bpffs`.
    pub check: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// What was found.
    pub message: String,
    /// What mends it; none where nothing is to be mended.
    pub remedy: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, message: impl Into<String>) -> Self {
        Self { check, severity: Severity::Ok, message: message.into(), remedy: None }
    }

    fn warning(check: &'static str, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check, severity: Severity::Warning, message: message.into(), remedy: Some(remedy.into()) }
    }

    fn error(check: &'static str, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check, severity: Severity::Error, message: message.into(), remedy: Some(remedy.into()) }
    }
}

/// The worst of all findings; [`Severity::Ok`] of none.
#[must_use]
pub fn worst(findings: &[Finding]) -> Severity {
    findings.iter().map(|finding| finding.severity).max().unwrap_or(Severity::Ok)
}

/// Findings for people: one each in a line, and below it what mends it.
#[must_use]
pub fn text(findings: &[Finding]) -> String {
    let mut text = String::new();
    for finding in findings {
        let mark = match finding.severity {
            Severity::Ok => "ok     ",
            Severity::Warning => "warning",
            Severity::Error => "ERROR  ",
        };
        let _written_to_memory = writeln!(text, "{mark} {:<13} {}", finding.check, finding.message);
        if let Some(remedy) = &finding.remedy {
            let _written_to_memory = writeln!(text, "{:>21} to mend it: {remedy}", "");
        }
    }
    let count = |severity| findings.iter().filter(|finding| finding.severity == severity).count();
    let (errors, warnings) = (count(Severity::Error), count(Severity::Warning));
    let _written_to_memory = match (errors, warnings) {
        (0, 0) => writeln!(text, "\nall is well"),
        _ => writeln!(text, "\n{errors} errors, {warnings} warnings"),
    };
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_has_a_line_for_each_finding_and_its_remedy() {
        let findings = [Finding::ok("kernel", "Linux 6.1"), Finding::error("bpffs", "not mounted", "mount it")];
        assert_eq!(worst(&findings), Severity::Error);
        assert_eq!(
            text(&findings),
            "ok      kernel        Linux 6.1\nERROR   bpffs         not mounted\n                      to mend it: mount it\n\n1 errors, 0 warnings\n"
        );
        assert_eq!(worst(&[]), Severity::Ok);
        assert!(text(&findings[..1]).ends_with("all is well\n"));
    }
}
