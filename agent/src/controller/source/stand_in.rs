//! What stands in for a policy that cannot be read, as an object like any other, and what it does.

use serde_json::Value;

use super::{Kind, Object};
use crate::policy::compile::MeshContext;
use crate::policy::objects::PolicyAction;
use crate::policy::stand_in;

/// What stands in for `policy`, an object of this kind; none where it cannot be told whose it is or where nothing need be closed, and for
/// what is no policy.
pub(super) fn of(kind: Kind, policy: &Value, mesh: &MeshContext) -> Option<Object> {
    let object = match kind {
        Kind::PeerAuthentication => Object::PeerAuthentication(Box::new(stand_in::peer_authentication(policy)?)),
        Kind::AuthorizationPolicy => Object::AuthorizationPolicy(Box::new(stand_in::authorization(policy)?)),
        Kind::Node | Kind::Namespace | Kind::Pod | Kind::ServiceAccount | Kind::Service | Kind::EndpointSlice => return None,
    };
    object.check(mesh).is_ok().then_some(object)
}

/// What it does, in words.
pub(in crate::controller) fn effect_of(object: &Object) -> &'static str {
    let Object::AuthorizationPolicy(policy) = object else { return "what it selects takes mutual TLS only" };
    if policy.spec.as_ref().is_none_or(|spec| spec.action == PolicyAction::Allow) {
        "it allows nobody, and what it selects is open only to those whom other policies allow"
    } else {
        "what it selects is closed to everybody"
    }
}
