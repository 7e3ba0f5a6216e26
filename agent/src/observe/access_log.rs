//! The access log: one line for each connection, when it has ended.
//!
//! Enters: a connection's participants and its end. Leaves: a `tracing` event of target `access`, at level info when the
//! connection ended as its ends wanted, or because its pod or the agent went away; at warn otherwise. This is the only place that
//! writes users' addresses and names above debug.
//!
//! Bytes are told from the agent's own pod's point of view, in both directions: `bytes_sent` is what that pod sent. A field that
//! is not known is left out. A detail may quote a peer: it is kept to one line and `MAX_DETAIL` bytes.

use std::fmt::{self, Write as _};
use std::net::SocketAddr;
use std::time::Duration;

use super::connection::ConnectionInfo;
use crate::model::CloseReason;

/// The target of the events, for filters (`CULVERT_LOG=info,access=off`).
pub const TARGET: &str = "access";

/// The longest detail or error, in bytes.
const MAX_DETAIL: usize = 512;

/// How a connection ended.
pub(super) struct Ended<'a> {
    /// Bytes that the agent's pod sent.
    pub(super) bytes_sent: u64,
    /// Bytes that the agent's pod received.
    pub(super) bytes_received: u64,
    /// How long it was open.
    pub(super) duration: Duration,
    /// Why it ended.
    pub(super) reason: CloseReason,
    /// More about it, in words.
    pub(super) detail: Option<&'a dyn fmt::Display>,
}

/// The fields are the same in all lines; `tracing` needs the level to be a constant of the call site.
macro_rules! line {
    ($level:ident, $info:expr, $message:literal, $($more:tt)*) => {
        tracing::event!(
            target: TARGET,
            parent: None,
            tracing::Level::$level,
            src.addr = %Address($info.source_addr),
            src.workload = $info.source.as_ref().map(|workload| &*workload.name),
            src.namespace = $info.source.as_ref().map(|workload| workload.identity.namespace()),
            src.identity = $info.source_identity.as_ref().map(display),
            dst.addr = %Address($info.destination_addr),
            dst.original_addr = $info.original_dst.filter(|dialled| *dialled != $info.destination_addr).map(Address).map(display),
            dst.service = $info.destination_service.as_ref().map(|service| &*service.hostname),
            dst.workload = $info.destination.as_ref().map(|workload| &*workload.name),
            dst.namespace = $info.destination.as_ref().map(|workload| workload.identity.namespace()),
            dst.identity = $info.destination_identity.as_ref().map(display),
            direction = $info.direction.as_str(),
            security = $info.security.as_str(),
            $($more)*
            $message
        )
    };
}

macro_rules! closed {
    ($level:ident, $info:expr, $ended:expr) => {
        line!(
            $level,
            $info,
            "connection closed",
            bytes_sent = $ended.bytes_sent,
            bytes_recv = $ended.bytes_received,
            duration_ms = u64::try_from($ended.duration.as_millis()).unwrap_or(u64::MAX),
            reason = $ended.reason.as_str(),
            detail = $ended.detail.map(|detail| display(OneLine(detail))),
        )
    };
}

/// Writes the line of a connection that was open.
pub(super) fn closed(info: &ConnectionInfo, ended: &Ended<'_>) {
    if ended.reason.is_orderly() || matches!(ended.reason, CloseReason::Draining | CloseReason::PodGone) {
        closed!(INFO, info, ended);
    } else {
        closed!(WARN, info, ended);
    }
}

/// Writes the line of a connection that never opened.
pub(super) fn failed(info: &ConnectionInfo, reason: CloseReason, detail: &dyn fmt::Display) {
    line!(
        WARN,
        info,
        "connection failed",
        bytes_sent = 0u64,
        bytes_recv = 0u64,
        duration_ms = 0u64,
        reason = reason.as_str(),
        error = %OneLine(detail),
    );
}

/// Writes an address as the library does, in one piece: that takes half of the time.
struct Address(SocketAddr);

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let SocketAddr::V4(address) = self.0 else { return self.0.fmt(f) };
        let mut number = itoa::Buffer::new();
        let mut text = String::with_capacity("255.255.255.255:65535".len());
        for (octet, before) in address.ip().octets().into_iter().zip(["", ".", ".", "."]) {
            text.push_str(before);
            text.push_str(number.format(octet));
        }
        text.push(':');
        text.push_str(number.format(address.port()));
        f.write_str(&text)
    }
}

/// Writes a text without its control characters, and not too much of it.
struct OneLine<'a>(&'a dyn fmt::Display);

impl fmt::Display for OneLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = Bounded { out: f, left: MAX_DETAIL };
        write!(line, "{}", self.0)
    }
}

struct Bounded<'a, 'b> {
    out: &'a mut fmt::Formatter<'b>,
    left: usize,
}

impl fmt::Write for Bounded<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars() {
            let Some(left) = self.left.checked_sub(c.len_utf8()) else {
                self.left = 0;
                return Ok(());
            };
            self.left = left;
            self.out.write_char(if c.is_control() { ' ' } else { c })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
