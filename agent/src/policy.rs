//! Policy: from the objects that users write to verdicts on connections.
//!
//! Enter: `security.istio.io` objects as text ([`objects`]), and connections as a [`Flow`](crate::model::Flow). Leave: compiled
//! policies ([`compile`]), the modes of a workload's ports ([`peer_authentication`]), verdicts ([`evaluate`]) and their reasons in
//! words ([`explain`]). Pure: no sockets, tasks or clock. Nothing here may widen what a user wrote: what cannot be enforced on
//! a TCP connection makes an ALLOW allow less and a DENY deny more, and is reported as a [`Problem`].

use std::fmt;

pub mod compile;
pub mod evaluate;
pub mod explain;
mod field;
pub mod objects;
pub mod peer_authentication;
pub mod stand_in;

/// Something in a policy object that does not do what it says. The rest of the object stays in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The path of the field in the object, such as `spec.rules[0].to[0].operation.methods`.
    pub field: String,
    /// What stands there.
    pub value: String,
    /// Why it is not enforced as written, and what to write instead.
    pub message: String,
    /// What the object does now.
    pub effect: &'static str,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: `{}` {}; {}", self.field, self.value, self.message, self.effect)
    }
}

/// Takes foreign bytes for the specification of either policy, compiles and evaluates it.
#[cfg(any(test, feature = "fuzz"))]
pub fn fuzz(bytes: &[u8]) {
    use crate::model::{Flow, SpiffeId};

    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(trust_domain) = "cluster.local".parse() else { return };
    let mesh = compile::MeshContext { root_namespace: "istio-system".to_owned(), trust_domain };
    let whole = format!("metadata: {{name: p, namespace: shop}}\nspec:\n{text}");
    let read = || serde_yaml_ng::Deserializer::from_str(&whole);
    if let Ok(policy) = objects::parse::<objects::PeerAuthenticationSpec, _>(read()) {
        drop(peer_authentication::check(&policy, &mesh.root_namespace));
        drop(peer_authentication::resolve([&policy], "shop", &std::collections::BTreeMap::new(), &mesh.root_namespace));
    }
    let Ok(policy) = objects::parse::<objects::AuthorizationPolicySpec, _>(read()) else { return };
    let Ok(compiled) = compile::authorization(&policy, &mesh) else { return };
    let Some(authorization) = compiled.authorization.map(std::sync::Arc::new) else { return };
    let identities = [None, SpiffeId::new(mesh.trust_domain.clone(), "shop", "cart").ok()];
    for (source_identity, family) in identities.into_iter().flat_map(|identity| [(identity.clone(), false), (identity, true)]) {
        let address = |last: u8| match family {
            false => std::net::SocketAddr::from(([10, 0, 0, last], 80)),
            true => std::net::SocketAddr::from(([0xfd00, 0, 0, 0, 0, 0, 0, u16::from(last)], 80)),
        };
        let flow = Flow { source_identity, source: address(1), destination: address(2) };
        let evaluation = evaluate::evaluate(&flow, &[std::sync::Arc::clone(&authorization)].into_iter().collect(), &[], true);
        drop(explain::explain(&flow, &evaluation));
    }
}
