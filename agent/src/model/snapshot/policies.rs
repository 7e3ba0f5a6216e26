//! The authorization policies of the mesh, arranged by the workloads that they apply to.
//!
//! Enters: policies, and the workloads of this node with the policies that they name. Leaves: what applies to one workload. Only this
//! node's workloads are judged here, so only for them is kept what selects them.

use std::sync::Arc;

use crate::model::policy_table::{Applicable, PolicyTable};
use crate::model::{Authorization, Scope, Workload};

/// All policies.
#[derive(Clone, Debug, Default)]
pub(super) struct Policies {
    by_key: imbl::HashMap<Arc<str>, Arc<Authorization>>,
    of_mesh: Arc<PolicyTable>,
    of_namespace: imbl::HashMap<Arc<str>, Arc<PolicyTable>>,
    /// What selects this node's workloads, by UID.
    of_workload: imbl::HashMap<Arc<str>, Arc<Selection>>,
    /// The UIDs of this node's workloads that name a policy, by its key.
    named_by: imbl::HashMap<Arc<str>, imbl::OrdSet<Arc<str>>>,
}

/// The policies that one workload names.
#[derive(Clone, Debug)]
struct Selection {
    names: Arc<Vec<Arc<str>>>,
    table: Arc<PolicyTable>,
}

impl Policies {
    pub(super) fn all(&self) -> &imbl::HashMap<Arc<str>, Arc<Authorization>> {
        &self.by_key
    }

    /// What applies to `workload`, and the keys of what does but has not arrived.
    pub(super) fn applying_to(&self, workload: &Workload) -> (Applicable, Vec<Arc<str>>) {
        let names = &workload.authorization_policies;
        let selection = self.of_workload.get(&workload.uid).filter(|selection| selection.names == *names);
        let selected = match selection {
            Some(selection) => Arc::clone(&selection.table),
            None => self.table_of(names),
        };
        let missing = match selected.len() == names.len() {
            true => Vec::new(),
            false => names.iter().filter(|key| !self.by_key.contains_key(*key)).cloned().collect(),
        };
        let in_namespace = self.of_namespace.get(workload.identity.namespace());
        let tables = [Some(&self.of_mesh), in_namespace, Some(&selected)];
        (Applicable::of(tables.into_iter().flatten()), missing)
    }

    /// Takes note of a workload of this node.
    pub(super) fn select(&mut self, workload: &Workload) {
        let names = &workload.authorization_policies;
        if names.is_empty() {
            return;
        }
        for key in names.iter() {
            self.named_by.entry(Arc::clone(key)).or_default().insert(Arc::clone(&workload.uid));
        }
        let selection = Selection { names: Arc::clone(names), table: self.table_of(names) };
        self.of_workload.insert(Arc::clone(&workload.uid), Arc::new(selection));
    }

    /// Forgets a workload.
    pub(super) fn deselect(&mut self, uid: &str) {
        let Some(selection) = self.of_workload.remove(uid) else { return };
        for key in selection.names.iter() {
            let Some(naming) = self.named_by.get_mut(key) else { continue };
            naming.remove(uid);
            if naming.is_empty() {
                self.named_by.remove(key);
            }
        }
    }

    pub(super) fn upsert(&mut self, policy: Authorization) {
        let key = policy.key();
        self.remove(&key);
        let policy = Arc::new(policy);
        if let Some(table) = self.table_of_scope(&policy) {
            table.insert(&policy);
        }
        self.for_each_naming(&key, |table| table.insert(&policy));
        self.by_key.insert(key, policy);
    }

    pub(super) fn remove(&mut self, key: &str) {
        let Some(policy) = self.by_key.remove(key) else { return };
        if let Some(table) = self.table_of_scope(&policy) {
            table.remove(&policy);
            if table.is_empty() && policy.scope == Scope::Namespace {
                self.of_namespace.remove(&policy.namespace);
            }
        }
        self.for_each_naming(key, |table| table.remove(&policy));
    }

    fn table_of_scope(&mut self, policy: &Authorization) -> Option<&mut PolicyTable> {
        let table = match policy.scope {
            Scope::Global => &mut self.of_mesh,
            Scope::Namespace => self.of_namespace.entry(Arc::clone(&policy.namespace)).or_default(),
            Scope::WorkloadSelector => return None,
        };
        Some(Arc::make_mut(table))
    }

    fn for_each_naming(&mut self, key: &str, change: impl Fn(&mut PolicyTable)) {
        for uid in self.named_by.get(key).into_iter().flatten() {
            if let Some(selection) = self.of_workload.get_mut(uid) {
                change(Arc::make_mut(&mut Arc::make_mut(selection).table));
            }
        }
    }

    fn table_of(&self, names: &[Arc<str>]) -> Arc<PolicyTable> {
        let mut table = PolicyTable::default();
        for policy in names.iter().filter_map(|key| self.by_key.get(key)) {
            table.insert(policy);
        }
        Arc::new(table)
    }
}
