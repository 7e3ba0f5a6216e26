//! Authorization as it travels from controller to agent: the shape of `istio.security.Authorization`.
//!
//! Rules are OR-ed; a rule's clauses are AND-ed (its `from`, `to` and `when`); a clause's matches are OR-ed; the kinds of
//! fields in one match are AND-ed, and the values of one kind OR-ed.

use std::net::IpAddr;
use std::sync::Arc;

/// One authorization policy, compiled to what can be told of a TCP connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authorization {
    /// The policy's namespace.
    pub namespace: Arc<str>,
    /// The policy's name.
    pub name: Arc<str>,
    /// Which workloads it applies to.
    pub scope: Scope,
    /// What a match means.
    pub action: Action,
    /// Evaluate and count, but do not enforce.
    pub dry_run: bool,
    /// Any of these matches. None at all: the policy never matches (an ALLOW of that kind denies everything).
    pub rules: Vec<Rule>,
}

/// Which workloads an [`Authorization`] applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Every workload of the mesh.
    Global,
    /// Every workload of the policy's namespace.
    Namespace,
    /// The workloads that name it in their `authorization_policies`.
    WorkloadSelector,
}

/// What a match of an [`Authorization`] means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Lets the connection through, unless a DENY matches as well.
    Allow,
    /// Refuses the connection.
    Deny,
    /// Only counts and logs.
    Audit,
}

/// One rule. With no clause it matches every connection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// All of these must match.
    pub clauses: Vec<Clause>,
}

/// One of a rule's `from`, `to` or `when` parts. With no match it matches nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Clause {
    /// Any of these must match.
    pub matches: Vec<Match>,
}

/// The conditions on one connection. Fields that are empty do not constrain; with all of them empty it matches every connection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Match {
    /// The source's namespace, from its verified identity.
    pub namespaces: Vec<StringMatch>,
    /// None of these is the source's namespace.
    pub not_namespaces: Vec<StringMatch>,
    /// The source's service account, from its verified identity.
    pub service_accounts: Vec<ServiceAccountMatch>,
    /// None of these is the source's service account.
    pub not_service_accounts: Vec<ServiceAccountMatch>,
    /// The source's principal: its SPIFFE ID without `spiffe://`.
    pub principals: Vec<StringMatch>,
    /// None of these is the source's principal.
    pub not_principals: Vec<StringMatch>,
    /// The source's address.
    pub source_ips: Vec<IpBlock>,
    /// None of these holds the source's address.
    pub not_source_ips: Vec<IpBlock>,
    /// The destination's address.
    pub destination_ips: Vec<IpBlock>,
    /// None of these holds the destination's address.
    pub not_destination_ips: Vec<IpBlock>,
    /// The destination's port, as the application listens on it.
    pub destination_ports: Vec<u16>,
    /// None of these is the destination's port.
    pub not_destination_ports: Vec<u16>,
}

/// How a text is compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StringMatch {
    /// Equal to this.
    Exact(Arc<str>),
    /// Begins with this (`text*`).
    Prefix(Arc<str>),
    /// Ends with this (`*text`).
    Suffix(Arc<str>),
    /// Any text that is not empty (`*`). Without an identity there is no text to match.
    Presence,
}

/// A service account in a namespace, both exact.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceAccountMatch {
    /// The namespace.
    pub namespace: Arc<str>,
    /// The service account's name.
    pub service_account: Arc<str>,
}

/// A range of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpBlock {
    /// Any address in the block.
    pub address: IpAddr,
    /// The prefix's length in bits: at most 32 or 128, by the address's family.
    pub length: u8,
}

impl Authorization {
    /// `namespace/name`, the key that workloads name it by.
    #[must_use]
    pub fn key(&self) -> Arc<str> {
        format!("{}/{}", self.namespace, self.name).into()
    }
}
