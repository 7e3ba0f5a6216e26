//! The policies in force, and which workloads they select.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{MeshSettings, ObjectName};
use crate::model::{Authorization, PeerAuthentication, Scope};
use crate::policy::Problem;
pub(super) use crate::policy::compile::Compiled;
use crate::policy::compile::{self, CompileError, MeshContext};
use crate::policy::objects::{AuthorizationPolicy, PeerAuthenticationPolicy};
use crate::policy::peer_authentication::{self, Overruled, PeerAuthenticationIndex};

/// Workloads that a policy names by their labels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Selection {
    /// Where they are; none: in all namespaces.
    pub(super) namespace: Option<Arc<str>>,
    /// The labels that they all have.
    pub(super) labels: BTreeMap<String, String>,
}

/// All policies.
#[derive(Debug)]
pub(super) struct Policies {
    mesh: MeshContext,
    peer_authentications: BTreeMap<ObjectName, PeerAuthenticationPolicy>,
    modes: PeerAuthenticationIndex,
    overruled: Vec<Overruled>,
    authorizations: BTreeMap<ObjectName, Compiled>,
}

impl Policies {
    pub(super) fn new(settings: &MeshSettings) -> Self {
        Self {
            mesh: settings.context(),
            peer_authentications: BTreeMap::new(),
            modes: PeerAuthenticationIndex::default(),
            overruled: Vec::new(),
            authorizations: BTreeMap::new(),
        }
    }

    pub(super) fn compile(&self, policy: &AuthorizationPolicy) -> Result<Compiled, CompileError> {
        compile::authorization(policy, &self.mesh)
    }

    /// The policy of this name, if there is anything in it that agents enforce.
    pub(super) fn authorization(&self, name: &ObjectName) -> Option<&Authorization> {
        self.authorizations.get(name)?.authorization.as_ref()
    }

    /// Adds, replaces or removes a policy. Gives the selections of workloads whose lists of policies this changes.
    pub(super) fn set_authorization(&mut self, name: &ObjectName, compiled: Option<Compiled>) -> Vec<Selection> {
        let after = compiled.as_ref().and_then(|compiled| self.selection(name, compiled));
        let before = match compiled {
            Some(compiled) => self.authorizations.insert(name.clone(), compiled),
            None => self.authorizations.remove(name),
        };
        let before = before.as_ref().and_then(|compiled| self.selection(name, compiled));
        if before == after { Vec::new() } else { before.into_iter().chain(after).collect() }
    }

    /// The keys of the policies that select a workload by its labels.
    pub(super) fn selecting(&self, namespace: &Arc<str>, labels: &BTreeMap<String, String>) -> Vec<String> {
        let root: Arc<str> = self.mesh.root_namespace.as_str().into();
        let mut namespaces = vec![&root];
        if *namespace != root {
            namespaces.push(namespace);
        }
        let policies = namespaces.into_iter().flat_map(|namespace| {
            let first = ObjectName { namespace: Arc::clone(namespace), name: "".into() };
            self.authorizations.range(first..).take_while(move |(name, _)| name.namespace == *namespace)
        });
        let selecting = policies.filter(|(_, compiled)| compiled.selects(&self.mesh, namespace, labels));
        selecting.map(|(name, _)| name.to_string()).collect()
    }

    /// Adds, replaces or removes a `PeerAuthentication`; [`Policies::arrange`] then makes it count. Gives the namespace whose
    /// workloads it bears on, or none for all.
    pub(super) fn set_peer_authentication(
        &mut self,
        name: &ObjectName,
        policy: Option<PeerAuthenticationPolicy>,
    ) -> Option<Arc<str>> {
        match policy {
            Some(policy) => drop(self.peer_authentications.insert(name.clone(), policy)),
            None => drop(self.peer_authentications.remove(name)),
        }
        (*name.namespace != *self.mesh.root_namespace).then(|| Arc::clone(&name.namespace))
    }

    /// Weighs all `PeerAuthentication`s against each other. Gives messages on those that newly have no effect.
    pub(super) fn arrange(&mut self) -> Vec<String> {
        self.modes = PeerAuthenticationIndex::new(self.peer_authentications.values(), &self.mesh.root_namespace);
        let overruled = self.modes.overruled().to_vec();
        let new = overruled.iter().filter(|overruled| !self.overruled.contains(overruled)).map(|Overruled { policy, by }| {
            format!("PeerAuthentication {policy} has no effect: {by} is older and has the same scope; remove one of them")
        });
        let messages = new.collect();
        self.overruled = overruled;
        messages
    }

    /// The `PeerAuthentication`s that have no effect beside an older one.
    pub(super) fn overruled(&self) -> &[Overruled] {
        &self.overruled
    }

    /// How many `PeerAuthentication`s and `AuthorizationPolicy`s there are.
    pub(super) fn counts(&self) -> (usize, usize) {
        (self.peer_authentications.len(), self.authorizations.len())
    }

    /// What in a `PeerAuthentication` has no effect.
    pub(super) fn problems(&self, policy: &PeerAuthenticationPolicy) -> Vec<Problem> {
        peer_authentication::check(policy, &self.mesh.root_namespace)
    }

    /// The modes of a workload.
    pub(super) fn modes(&self, namespace: &str, labels: &BTreeMap<String, String>) -> PeerAuthentication {
        self.modes.resolve(namespace, labels)
    }

    fn selection(&self, name: &ObjectName, compiled: &Compiled) -> Option<Selection> {
        let namespace = (*name.namespace != *self.mesh.root_namespace).then(|| Arc::clone(&name.namespace));
        by_selector(compiled).then(|| Selection { namespace, labels: compiled.selector.clone() })
    }
}

fn by_selector(compiled: &Compiled) -> bool {
    compiled.authorization.as_ref().is_some_and(|policy| policy.scope == Scope::WorkloadSelector)
}

impl MeshSettings {
    /// What policies are compiled against.
    #[must_use]
    pub fn context(&self) -> MeshContext {
        MeshContext { root_namespace: self.root_namespace.clone(), trust_domain: self.trust_domain.clone() }
    }
}
