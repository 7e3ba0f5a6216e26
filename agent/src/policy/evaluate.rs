//! Verdicts on connections.
//!
//! Enter: a connection as the destination sees it, and the policies that apply to the destination. Leaves: one verdict, why, and
//! what policies that are not enforced would have said. DENY goes before ALLOW; where a policy has not arrived, the answer is no.

use std::net::IpAddr;
use std::sync::Arc;

use crate::model::{
    Action, Applicable, Clause, Flow, IpBlock, Match, Rule, ServiceAccountMatch, Snapshot, StringMatch, Verdict, Workload,
};

/// A verdict with its reason and its side effects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Evaluation {
    /// Whether the connection may pass.
    pub verdict: Verdict,
    /// Why.
    pub cause: Cause,
    /// What each dry-run policy would have done to this connection. [`Action::Deny`]: a DENY that matches, or an ALLOW while no
    /// ALLOW, enforced or dry-run, matches. [`Action::Allow`]: an ALLOW that matches. [`Action::Audit`]: an AUDIT that matches.
    pub dry_run: Vec<(Arc<str>, Action)>,
    /// The AUDIT policies that match.
    pub audited: Vec<Arc<str>>,
}

/// Why a verdict is what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cause {
    /// Denied: a policy that applies has not been received.
    PolicyNotReceived,
    /// Denied: a DENY policy matches.
    DenyMatched,
    /// Allowed: an ALLOW policy matches, and no DENY does.
    AllowMatched,
    /// Denied: ALLOW policies apply, and none matches.
    NoAllowMatched,
    /// Denied: no ALLOW policy applies, and the mesh denies by default.
    DeniedByDefault,
    /// Allowed: no ALLOW policy applies, and the mesh allows by default.
    AllowedByDefault,
}

/// What the policies that apply to `destination` say of a connection to it.
#[must_use]
pub fn judge(snapshot: &Snapshot, destination: &Workload, flow: &Flow) -> Evaluation {
    let (policies, missing) = snapshot.policies_for(destination);
    evaluate(flow, &policies, &missing, snapshot.default_deny())
}

/// Rules on `flow` by the `policies` that apply to its destination.
///
/// `missing` names policies that apply too but have not been received. `default_deny` decides where no ALLOW policy applies.
#[must_use]
pub fn evaluate(flow: &Flow, policies: &Applicable, missing: &[Arc<str>], default_deny: bool) -> Evaluation {
    let source = Source::of(flow);
    let (mut denied, mut allowed) = (None, None);
    let (mut dry_run, mut dry_allows, mut audited) = (Vec::new(), Vec::new(), Vec::new());
    for policy in policies.candidates(flow) {
        let matches = policy.rules.iter().any(|rule| rule.matches(&source));
        match (policy.action, policy.dry_run) {
            (Action::Deny, false) if matches && denied.is_none() => denied = Some(policy.key()),
            (Action::Allow, false) if matches && allowed.is_none() => allowed = Some(policy.key()),
            (Action::Audit, false) if matches => audited.push(policy.key()),
            (Action::Allow, true) => dry_allows.push((policy, matches)),
            (Action::Deny | Action::Audit, true) if matches => dry_run.push((policy.key(), policy.action)),
            (Action::Deny | Action::Allow | Action::Audit, _) => {}
        }
    }
    let some_allow = allowed.is_some() || dry_allows.iter().any(|(_, matches)| *matches);
    dry_run.extend(dry_allows.into_iter().filter_map(|(policy, matches)| match (matches, some_allow) {
        (true, _) => Some((policy.key(), Action::Allow)),
        (false, true) => None,
        (false, false) => Some((policy.key(), Action::Deny)),
    }));
    let (cause, verdict) = match (missing.first(), denied, allowed) {
        (Some(key), _, _) => (Cause::PolicyNotReceived, Verdict::Deny { by: Some(Arc::clone(key)) }),
        (None, Some(key), _) => (Cause::DenyMatched, Verdict::Deny { by: Some(key) }),
        (None, None, Some(key)) => (Cause::AllowMatched, Verdict::Allow { by: Some(key) }),
        (None, None, None) if policies.has_allow() => (Cause::NoAllowMatched, Verdict::Deny { by: None }),
        (None, None, None) if default_deny => (Cause::DeniedByDefault, Verdict::Deny { by: None }),
        (None, None, None) => (Cause::AllowedByDefault, Verdict::Allow { by: None }),
    };
    Evaluation { verdict, cause, dry_run, audited }
}

/// What rules look at, worked out once for all of them.
struct Source<'a> {
    flow: &'a Flow,
    namespace: Option<&'a str>,
    service_account: Option<(&'a str, &'a str)>,
    principal: Option<String>,
}

impl<'a> Source<'a> {
    fn of(flow: &'a Flow) -> Self {
        let identity = flow.source_identity.as_ref();
        Self {
            flow,
            namespace: identity.map(|id| id.namespace()),
            service_account: identity.map(|id| (id.namespace(), id.service_account())),
            principal: identity.map(|id| id.principal()),
        }
    }
}

impl Rule {
    fn matches(&self, source: &Source<'_>) -> bool {
        self.clauses.iter().all(|clause| clause.matches(source))
    }
}

impl Clause {
    fn matches(&self, source: &Source<'_>) -> bool {
        self.matches.iter().any(|part| part.holds(source))
    }
}

impl Match {
    /// Without an identity, no name of an identity is matched: what asks for one fails, and what rules one out holds.
    fn holds(&self, source: &Source<'_>) -> bool {
        let namespace = |matcher: &StringMatch| source.namespace.is_some_and(|text| matcher.matches(text));
        let principal = |matcher: &StringMatch| source.principal.as_deref().is_some_and(|text| matcher.matches(text));
        let account = |matcher: &ServiceAccountMatch| {
            source.service_account.is_some_and(|account| account == (&*matcher.namespace, &*matcher.service_account))
        };
        let within = |address: IpAddr| move |block: &IpBlock| block.contains(address);
        let (from, to) = (source.flow.source.ip(), source.flow.destination.ip());
        let port = |port: &u16| *port == source.flow.destination.port();
        constraint(&self.namespaces, &self.not_namespaces, namespace)
            && constraint(&self.service_accounts, &self.not_service_accounts, account)
            && constraint(&self.principals, &self.not_principals, principal)
            && constraint(&self.source_ips, &self.not_source_ips, within(from))
            && constraint(&self.destination_ips, &self.not_destination_ips, within(to))
            && constraint(&self.destination_ports, &self.not_destination_ports, port)
    }
}

/// Whether one of the `wanted` matches, if there are any, and none of the `unwanted`.
fn constraint<T>(wanted: &[T], unwanted: &[T], matches: impl Fn(&T) -> bool) -> bool {
    (wanted.is_empty() || wanted.iter().any(&matches)) && !unwanted.iter().any(&matches)
}

impl StringMatch {
    fn matches(&self, text: &str) -> bool {
        match self {
            Self::Exact(expected) => **expected == *text,
            Self::Prefix(prefix) => text.starts_with(&**prefix),
            Self::Suffix(suffix) => text.ends_with(&**suffix),
            Self::Presence => !text.is_empty(),
        }
    }
}

impl IpBlock {
    /// Addresses of the other family are never within. A length beyond the family's is taken for the whole address.
    fn contains(&self, address: IpAddr) -> bool {
        let length = u32::from(self.length);
        match (self.address, address) {
            (IpAddr::V4(block), IpAddr::V4(address)) => {
                let differ = block.to_bits() ^ address.to_bits();
                differ.leading_zeros() >= length.min(u32::BITS)
            }
            (IpAddr::V6(block), IpAddr::V6(address)) => {
                let differ = block.to_bits() ^ address.to_bits();
                differ.leading_zeros() >= length.min(u128::BITS)
            }
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
        }
    }
}

#[cfg(test)]
mod tests;
