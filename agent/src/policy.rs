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
