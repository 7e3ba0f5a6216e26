//! Verdicts in words, for logs and the command line.
//!
//! Enters: a connection and its [`Evaluation`]. Leaves: one sentence. It names addresses and identities: keep it out of logs above
//! debug level, save the access log.

use super::evaluate::{Cause, Evaluation};
use crate::model::{Flow, Verdict};

/// Says who connects to what, whether it may, and why.
#[must_use]
pub fn explain(flow: &Flow, evaluation: &Evaluation) -> String {
    let who = flow.source_identity.as_ref().map_or_else(|| "no identity".to_owned(), |id| id.principal());
    let (verb, by) = match &evaluation.verdict {
        Verdict::Allow { by } => ("allowed", by),
        Verdict::Deny { by } => ("denied", by),
    };
    let policy = by.as_deref().unwrap_or("(unnamed)");
    let why = match evaluation.cause {
        Cause::PolicyNotReceived => format!("because policy {policy}, which applies, has not been received yet"),
        Cause::DenyMatched => format!("by DENY policy {policy}"),
        Cause::AllowMatched => format!("by ALLOW policy {policy}"),
        Cause::NoAllowMatched => "because ALLOW policies apply and none of them matches".to_owned(),
        Cause::DeniedByDefault => "because no ALLOW policy applies and the mesh denies by default".to_owned(),
        Cause::AllowedByDefault => "because no policy forbids it".to_owned(),
    };
    format!("connection from {} ({who}) to {} is {verb} {why}", flow.source, flow.destination)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn sentence(identity: Option<&str>, verdict: Verdict, cause: Cause) -> String {
        let flow = Flow {
            source_identity: identity.map(|id| id.parse().unwrap()),
            source: "10.0.0.1:4711".parse().unwrap(),
            destination: "10.0.0.2:80".parse().unwrap(),
        };
        explain(&flow, &Evaluation { verdict, cause, dry_run: Vec::new(), audited: Vec::new() })
    }

    #[test]
    fn each_verdict_is_told_with_its_policy_or_its_reason() {
        let by = |name: &str| Some(Arc::from(name));
        let deny = |by| Verdict::Deny { by };
        let allow = |by| Verdict::Allow { by };
        for (verdict, cause, expected) in [
            (allow(by("shop/web")), Cause::AllowMatched, "is allowed by ALLOW policy shop/web"),
            (allow(None), Cause::AllowedByDefault, "is allowed because no policy forbids it"),
            (deny(by("shop/no")), Cause::DenyMatched, "is denied by DENY policy shop/no"),
            (deny(None), Cause::NoAllowMatched, "is denied because ALLOW policies apply and none of them matches"),
            (deny(None), Cause::DeniedByDefault, "is denied because no ALLOW policy applies and the mesh denies by default"),
            (
                deny(by("shop/late")),
                Cause::PolicyNotReceived,
                "is denied because policy shop/late, which applies, has not been received yet",
            ),
        ] {
            let who = "connection from 10.0.0.1:4711 (cluster.local/ns/shop/sa/cart) to 10.0.0.2:80";
            assert_eq!(sentence(Some("spiffe://cluster.local/ns/shop/sa/cart"), verdict, cause), format!("{who} {expected}"));
        }
    }

    #[test]
    fn a_plaintext_client_is_told_to_have_no_identity() {
        let text = sentence(None, Verdict::Deny { by: None }, Cause::DeniedByDefault);
        assert!(text.starts_with("connection from 10.0.0.1:4711 (no identity) to 10.0.0.2:80 is denied"), "{text}");
    }
}
