//! What counts in the place of a policy that makes no sense and never did.

use std::sync::Arc;

use tracing::warn;

use super::super::decode::{self, quote};
use super::{Held, Kind, Mirror, Object};
use crate::model::Action;
use crate::model::snapshot::Edit;
use crate::proto::discovery::Resource;

impl Mirror {
    /// What a policy may have closed that makes no sense is closed until it does, unless it did before.
    pub(super) fn close_for(&mut self, resource: &Resource, edit: &mut Edit) {
        let held = self.held.entry(Kind::Authorization).or_default();
        if held.get(&*resource.name).is_some_and(|held| held.object != Object::StandIn) {
            return;
        }
        let stand_in = decode::stand_in(resource);
        let effect = stand_in.as_ref().map_or("none", |policy| match policy.action {
            Action::Allow => "it allows nobody",
            Action::Deny | Action::Audit => "it denies everything",
        });
        warn!(
            policy = quote(&resource.name),
            effect, "a policy makes no sense and never did: it counts as the strictest that it may mean"
        );
        let Some(policy) = stand_in else { return };
        let name = Arc::from(&*resource.name);
        // Without a version the controller sends it again to whoever says that it holds this.
        held.insert(name, Held { version: "".into(), object: Object::StandIn, bytes: 0 });
        edit.upsert_policy(policy);
    }
}
