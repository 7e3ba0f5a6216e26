//! What stands in for a policy that cannot be read: the strictest that it may have meant.
//!
//! Enters: an object whose kind is known, as a value, and of which something else makes no sense. Leaves: a policy under its name
//! that opens nothing and closes at least what the object may have closed: an ALLOW that allows nobody, a DENY of everything, STRICT.
//! What it selects is taken from the object where that can be read, and is the whole namespace where it cannot. None, where it
//! cannot even be told whose policy it is, or where whatever it says could close nothing.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::objects::{
    AuthorizationPolicy, AuthorizationPolicySpec, MutualTls, MutualTlsMode, Object, PeerAuthenticationPolicy,
    PeerAuthenticationSpec, PolicyAction, Rule, Selector,
};

/// The fields of an `AuthorizationPolicy`'s specification.
const FIELDS: [&str; 6] = ["selector", "targetRef", "targetRefs", "action", "provider", "rules"];

/// What stands in for an `AuthorizationPolicy`.
#[must_use]
pub fn authorization(object: &Value) -> Option<AuthorizationPolicy> {
    let selector = selector(object);
    let for_waypoint = ["/spec/targetRef", "/spec/targetRefs/0"].iter().any(|field| object.pointer(field).is_some_and(is_set));
    if for_waypoint && selector.is_none() {
        return None;
    }
    let (action, rules) = match action(object) {
        PolicyAction::Audit => return None,
        PolicyAction::Allow => (PolicyAction::Allow, Vec::new()),
        PolicyAction::Deny | PolicyAction::Custom => (PolicyAction::Deny, vec![Rule::default()]),
    };
    let spec = AuthorizationPolicySpec { selector, action, rules, ..AuthorizationPolicySpec::default() };
    Some(Object { api_version: None, kind: None, metadata: metadata(object)?, spec: Some(spec) })
}

/// What stands in for a `PeerAuthentication`.
#[must_use]
pub fn peer_authentication(object: &Value) -> Option<PeerAuthenticationPolicy> {
    let selector = selector(object);
    let spec = PeerAuthenticationSpec {
        stands_in: selector.is_none() && object.pointer("/spec/selector").is_some_and(is_set),
        selector,
        mtls: Some(MutualTls { mode: MutualTlsMode::Strict }),
        ..PeerAuthenticationSpec::default()
    };
    Some(Object { api_version: None, kind: None, metadata: metadata(object)?, spec: Some(spec) })
}

/// Its action; one that cannot be told is a denial.
fn action(object: &Value) -> PolicyAction {
    let spec = object.get("spec").filter(|spec| is_set(spec));
    let Some(said) = spec.and_then(|spec| spec.get("action")).filter(|action| is_set(action)) else {
        // The default, unless it is said somewhere that we do not understand.
        let understood = match spec {
            None => true,
            Some(Value::Object(spec)) => spec.keys().all(|field| FIELDS.contains(&field.as_str())),
            Some(_) => false,
        };
        return if understood { PolicyAction::Allow } else { PolicyAction::Deny };
    };
    read(said).unwrap_or(PolicyAction::Deny)
}

/// What it selects; none is the whole namespace.
fn selector(object: &Value) -> Option<Selector> {
    let selector: Selector = read(object.pointer("/spec/selector").filter(|selector| is_set(selector))?)?;
    let literal = |text: &String| !text.contains('*');
    let legal = selector.match_labels.iter().all(|(key, value)| !key.is_empty() && literal(key) && literal(value));
    legal.then_some(selector)
}

/// Name, namespace, age and annotations, as far as they can be read; none without a name.
fn metadata(object: &Value) -> Option<ObjectMeta> {
    let metadata = object.get("metadata")?;
    let field = |name| metadata.get(name).filter(|value| is_set(value));
    Some(ObjectMeta {
        name: Some(field("name")?.as_str()?.to_owned()),
        namespace: match field("namespace") {
            Some(namespace) => Some(namespace.as_str()?.to_owned()),
            None => None,
        },
        creation_timestamp: field("creationTimestamp").and_then(read),
        annotations: field("annotations").and_then(read),
        ..ObjectMeta::default()
    })
}

fn is_set(value: &Value) -> bool {
    !value.is_null()
}

fn read<T: DeserializeOwned>(value: &Value) -> Option<T> {
    T::deserialize(value).ok()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn policy(spec: Value) -> Value {
        json!({"metadata": {"name": "rule", "namespace": "shop"}, "spec": spec})
    }

    #[test]
    fn an_authorization_policy_closes_at_least_what_it_may_have_closed() {
        use PolicyAction::{Allow, Deny};
        let everything = vec![Rule::default()];
        for (spec, wanted) in [
            (json!({"rules": 7}), Some((Allow, vec![]))),
            (json!({"action": "ALLOW", "rules": [{"frm": []}]}), Some((Allow, vec![]))),
            (json!({"action": "DENY", "rules": [{"frm": []}]}), Some((Deny, everything.clone()))),
            (json!({"action": "DENNY", "rules": [{}]}), Some((Deny, everything.clone()))),
            (json!({"action": 7}), Some((Deny, everything.clone()))),
            (json!({"acton": "DENY", "rules": [{}]}), Some((Deny, everything.clone()))),
            (json!({"action": "CUSTOM", "provider": 1}), Some((Deny, everything.clone()))),
            (json!([]), Some((Deny, everything))),
            (json!({"action": "AUDIT", "rules": 7}), None),
            (json!({"targetRefs": [{"kind": "Gateway", "name": 7}]}), None),
        ] {
            let found = authorization(&policy(spec.clone())).and_then(|policy| policy.spec);
            assert_eq!(found.map(|spec| (spec.action, spec.rules)), wanted, "{spec}");
        }
    }

    #[test]
    fn what_it_selects_is_kept_where_it_can_be_read_and_is_all_where_not() {
        let labels = json!({"matchLabels": {"app": "server"}});
        for (selector, kept) in [
            (labels, true),
            (json!({"matchLabel": {"app": "server"}}), false),
            (json!({"matchLabels": {"app": 7}}), false),
            (json!({"matchLabels": {"app": "ser*"}}), false),
            (json!(null), false),
        ] {
            let object =
                policy(json!({"selector": selector.clone(), "action": "DENY", "rules": 7, "mtls": {"mode": "STRICTLY"}}));
            let authorization = authorization(&object).and_then(|policy| policy.spec).expect("a stand-in");
            let peer_authentication = peer_authentication(&object).and_then(|policy| policy.spec).expect("a stand-in");
            assert_eq!(authorization.selector.is_some(), kept, "{object}");
            assert_eq!(peer_authentication.selector, authorization.selector);
            assert_eq!(peer_authentication.stands_in, !kept && !selector.is_null(), "{object}");
            assert_eq!(peer_authentication.mtls.map(|mtls| mtls.mode), Some(MutualTlsMode::Strict));
        }
    }

    #[test]
    fn without_a_name_nobody_can_tell_which_policy_it_is() {
        for metadata in [json!({"namespace": "shop"}), json!({"name": 7}), json!({"name": "rule", "namespace": []}), json!(7)] {
            assert_eq!(authorization(&json!({"metadata": metadata, "spec": {"action": "DENY"}})), None);
            assert_eq!(peer_authentication(&json!({"metadata": metadata})), None);
        }
    }
}
