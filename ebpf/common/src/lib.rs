//! The binary interface between Culvert's eBPF programs and its agent: the keys and values of the maps that both touch.
//!
//! Every type is `repr(C)` without hidden padding, and its size is asserted at compile time. Addresses are 16 bytes in
//! network order with IPv4 mapped into IPv6; ports are in host order. With the feature `user` the types can be used in the
//! agent's map handles.
#![no_std]

pub mod address;
pub mod event;
pub mod namespace;
pub mod outcome;
pub mod ruling;
pub mod same_node;
pub mod settings;
pub mod socket;

pub use address::{Address, Endpoint, Flow};
pub use event::{Event, EventKind};
pub use namespace::{Namespace, NamespaceState};
pub use outcome::Outcome;
pub use ruling::{Admission, Dispatch, ListenerKey, ListenerRole};
pub use same_node::{CONNECTION_EVENTS_LENGTH, Connection, Stage, Verdict, VerdictKey};
pub use settings::Settings;
pub use socket::{Socket, SocketKind};

/// The port that captured connections are redirected to, on the pod's own address.
pub const OUTBOUND_PORT: u16 = 15001;
/// The port of the plaintext listener; connections are steered to it and keep the port they were dialled on.
pub const PLAINTEXT_PORT: u16 = 15006;
/// The port that peers' tunnels dial, on the pod's address.
pub const HBONE_PORT: u16 = 15008;

/// The version of the maps' layout. Agents share pinned maps only with agents of the same layout.
pub const LAYOUT: u32 = 4;

#[cfg(feature = "user")]
mod user {
    #![expect(unsafe_code, reason = "aya asks for this promise of every type that is copied to and from the kernel")]

    macro_rules! pod {
        ($($name:ty),+ $(,)?) => {
            $(
                // SAFETY: `repr(C)`, `Copy`, no padding bytes, and every bit pattern of its integer fields is valid.
                unsafe impl aya::Pod for $name {}
            )+
        };
    }
    pod!(crate::Address, crate::Endpoint, crate::Flow, crate::Namespace, crate::ListenerKey, crate::Settings, crate::Socket);
    pod!(crate::VerdictKey, crate::Verdict, crate::Connection);
}
