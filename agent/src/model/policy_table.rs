//! Policies that apply to the same workloads, found by the connections that they can say something of.
//!
//! Enters: policies. Leaves: for a connection, the few whose rules its source or port may match: a mesh may have thousands of policies,
//! each for one client. What is left out matches the connection in none of its rules, and only counts as an ALLOW that applies.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Action, Authorization, Flow, Match, Rule, ServiceAccountMatch, StringMatch};

type Policies = imbl::OrdMap<Arc<str>, Arc<Authorization>>;
type ByText = imbl::HashMap<Arc<str>, Policies>;

/// Policies that apply to the same workloads. Cheap to copy and to change.
#[derive(Clone, Debug, Default)]
pub struct PolicyTable {
    by_principal: ByText,
    by_account: imbl::HashMap<(Arc<str>, Arc<str>), Policies>,
    by_namespace: ByText,
    by_port: imbl::HashMap<u16, Policies>,
    /// Those that may match whatever the connection, and those that are told of also where they do not match.
    rest: Policies,
    enforced_allows: usize,
    len: usize,
}

/// All policies that apply to one workload.
#[derive(Clone, Debug, Default)]
pub struct Applicable(Vec<Arc<PolicyTable>>);

/// What a connection must show for a rule to match.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Mark {
    Principal(Arc<str>),
    Account(Arc<str>, Arc<str>),
    Namespace(Arc<str>),
    Port(u16),
}

impl PolicyTable {
    /// Adds a policy that is not in it.
    pub fn insert(&mut self, policy: &Arc<Authorization>) {
        let key = policy.key();
        self.len += 1;
        self.enforced_allows += usize::from(enforced_allow(policy));
        let Some(marks) = marks_of(policy) else {
            self.rest.insert(key, Arc::clone(policy));
            return;
        };
        for mark in marks {
            let policies = match mark {
                Mark::Principal(text) => self.by_principal.entry(text).or_default(),
                Mark::Account(namespace, account) => self.by_account.entry((namespace, account)).or_default(),
                Mark::Namespace(text) => self.by_namespace.entry(text).or_default(),
                Mark::Port(port) => self.by_port.entry(port).or_default(),
            };
            policies.insert(Arc::clone(&key), Arc::clone(policy));
        }
    }

    /// Removes a policy that is in it.
    pub fn remove(&mut self, policy: &Authorization) {
        let key = policy.key();
        self.len -= 1;
        self.enforced_allows -= usize::from(enforced_allow(policy));
        let Some(marks) = marks_of(policy) else {
            self.rest.remove(&key);
            return;
        };
        for mark in marks {
            match mark {
                Mark::Principal(text) => remove(&mut self.by_principal, &text, &key),
                Mark::Account(namespace, account) => remove(&mut self.by_account, &(namespace, account), &key),
                Mark::Namespace(text) => remove(&mut self.by_namespace, &text, &key),
                Mark::Port(port) => remove(&mut self.by_port, &port, &key),
            }
        }
    }

    /// How many policies there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no policy in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The policies that may match `flow`, in the order of their keys.
    fn candidates(&self, flow: &Flow) -> Vec<&Arc<Authorization>> {
        let mut found = vec![&self.rest];
        if let Some(id) = &flow.source_identity {
            found.extend(self.by_principal.get(&*id.principal()));
            found.extend(self.by_namespace.get(id.namespace()));
            if !self.by_account.is_empty() {
                found.extend(self.by_account.get(&(id.namespace().into(), id.service_account().into())));
            }
        }
        found.extend(self.by_port.get(&flow.destination.port()));
        let found: BTreeMap<_, _> = found.into_iter().flatten().collect();
        found.into_values().collect()
    }
}

impl Applicable {
    /// The policies of these tables, each of which is in one of them.
    pub(super) fn of<'a>(tables: impl Iterator<Item = &'a Arc<PolicyTable>>) -> Self {
        Self(tables.filter(|table| !table.is_empty()).cloned().collect())
    }

    /// Whether no policy applies.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether an ALLOW that is enforced applies, be it for other connections.
    #[must_use]
    pub fn has_allow(&self) -> bool {
        self.0.iter().any(|table| table.enforced_allows > 0)
    }

    /// The policies that may match `flow`, or must be told of whether they do or not: in a time that grows with their own number,
    /// not with that of all that apply.
    #[must_use]
    pub fn candidates(&self, flow: &Flow) -> Vec<&Arc<Authorization>> {
        self.0.iter().flat_map(|table| table.candidates(flow)).collect()
    }
}

/// Policies that are judged in this order.
impl FromIterator<Arc<Authorization>> for Applicable {
    fn from_iter<I: IntoIterator<Item = Arc<Authorization>>>(policies: I) -> Self {
        let alone = |policy| {
            let mut table = PolicyTable::default();
            table.insert(&policy);
            Arc::new(table)
        };
        Self(policies.into_iter().map(alone).collect())
    }
}

fn remove<K: Clone + Eq + std::hash::Hash>(policies: &mut imbl::HashMap<K, Policies>, mark: &K, key: &str) {
    let Some(of_mark) = policies.get_mut(mark) else { return };
    of_mark.remove(key);
    if of_mark.is_empty() {
        policies.remove(mark);
    }
}

fn enforced_allow(policy: &Authorization) -> bool {
    policy.action == Action::Allow && !policy.dry_run
}

/// Of these a connection must show one for the policy to matter to it. None: it may matter to every connection.
fn marks_of(policy: &Authorization) -> Option<Vec<Mark>> {
    // What such a policy would have denied is told for each connection.
    if policy.action == Action::Allow && policy.dry_run {
        return None;
    }
    let mut marks: Vec<_> = policy.rules.iter().map(marks_of_rule).collect::<Option<Vec<_>>>()?.into_iter().flatten().collect();
    marks.sort_unstable();
    marks.dedup();
    Some(marks)
}

/// One clause's marks are enough, as all clauses must match. Ports are the same for many clients, and come last.
fn marks_of_rule(rule: &Rule) -> Option<Vec<Mark>> {
    let marks_by = |marks: fn(&Match) -> Option<Vec<Mark>>| {
        rule.clauses.iter().find_map(|clause| {
            let of_matches: Option<Vec<_>> = clause.matches.iter().map(marks).collect();
            of_matches.map(|marks| marks.into_iter().flatten().collect())
        })
    };
    marks_by(source_marks).or_else(|| marks_by(port_marks))
}

fn source_marks(part: &Match) -> Option<Vec<Mark>> {
    let mark = |one: &ServiceAccountMatch| Mark::Account(Arc::clone(&one.namespace), Arc::clone(&one.service_account));
    let accounts = || part.service_accounts.iter().map(mark);
    exact(&part.principals, Mark::Principal)
        .or_else(|| (!part.service_accounts.is_empty()).then(|| accounts().collect()))
        .or_else(|| exact(&part.namespaces, Mark::Namespace))
}

fn port_marks(part: &Match) -> Option<Vec<Mark>> {
    let ports = part.destination_ports.iter().map(|port| Mark::Port(*port));
    (!part.destination_ports.is_empty()).then(|| ports.collect())
}

fn exact(texts: &[StringMatch], mark: fn(Arc<str>) -> Mark) -> Option<Vec<Mark>> {
    let one = |text: &StringMatch| match text {
        StringMatch::Exact(text) => Some(mark(Arc::clone(text))),
        StringMatch::Prefix(_) | StringMatch::Suffix(_) | StringMatch::Presence => None,
    };
    if texts.is_empty() { None } else { texts.iter().map(one).collect() }
}
