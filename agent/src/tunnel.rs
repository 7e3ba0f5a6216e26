//! Tunnels between agents.

pub mod tls;
pub mod verify;
