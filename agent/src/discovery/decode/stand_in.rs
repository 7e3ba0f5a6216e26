//! What stands in for a policy that cannot be read: the strictest that it may have meant.
//!
//! Enters: a resource that makes no sense to this version. Leaves: a policy under its name that opens nothing and closes at least what
//! the resource may have closed: an ALLOW that allows nobody, a DENY of everything; of all workloads, where it cannot be told which.

use prost::Message as _;

use crate::model::{Action, Authorization, Rule, Scope};
use crate::proto::discovery::Resource;
use crate::proto::security;

/// What stands in for a policy; none, where whatever it says could close nothing, or where its name is none.
pub(in crate::discovery) fn stand_in(resource: &Resource) -> Option<Authorization> {
    let (namespace, name) = resource.name.split_once('/')?;
    let read = resource.resource.as_ref().and_then(|any| security::Authorization::decode(&*any.value).ok());
    let said = read.unwrap_or(security::Authorization { action: security::Action::Deny.into(), ..Default::default() });
    let (action, rules) = match security::Action::try_from(said.action) {
        Ok(security::Action::Audit) => return None,
        Ok(security::Action::Allow) => (Action::Allow, Vec::new()),
        Ok(security::Action::Deny) | Err(_) => (Action::Deny, vec![Rule::default()]),
    };
    if said.dry_run {
        return None;
    }
    let scope = match security::Scope::try_from(said.scope) {
        Ok(security::Scope::Namespace) => Scope::Namespace,
        Ok(security::Scope::WorkloadSelector) => Scope::WorkloadSelector,
        Ok(security::Scope::Global) | Err(_) => Scope::Global,
    };
    Some(Authorization { namespace: namespace.into(), name: name.into(), scope, action, dry_run: false, rules })
}
