//! What the agent tells about itself: metrics, access log, diagnostics, readiness and the admin interface.
//!
//! Enters: each connection's participants when it opens or fails ([`Observer::open`], [`Observer::fail`]), byte counts while it
//! runs, the reason when it ends; facts about handshakes, certificates, verdicts and programs ([`Metrics`]); named conditions of
//! readiness. Leaves: an OpenMetrics page, one log line per connection, JSON for operators, and a readiness answer.
//!
//! It must never slow the path of a byte: byte counts are plain atomics that are read when somebody asks, logging drops lines
//! (and counts them) before it blocks, and everything that is held is bounded.

pub mod access_log;
pub mod admin;
pub mod connection;
pub mod control_plane;
pub mod http;
mod labels;
pub mod log;
pub mod metrics;
pub mod readiness;
mod received;
mod traffic;

pub use admin::AdminSources;
pub use connection::{ByteCounts, ConnectionInfo, Direction, Observer, OpenConnection, Recurring, Security};
pub use control_plane::ControllerMetrics;
pub use log::{LogFormat, LogGuard};
pub use metrics::{CountedTunnel, CountedVerdicts, Metrics, Side};
pub use readiness::{Condition, Readiness};
pub use received::XdsReceived;

/// Whether a text can stand between quotes as it is. Others may, too, and are looked at more closely.
fn can_be_quoted(text: &str) -> bool {
    // Without an early end, so that the compiler looks at many bytes at a time.
    text.bytes().fold(true, |so_far, byte| so_far & matches!(byte, b' '..=b'~') & (byte != b'"') & (byte != b'\\'))
}
