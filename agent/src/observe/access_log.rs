//! The access log: one line for each connection, when it has ended.
//!
//! Enters: a connection's participants and its end. Leaves: a `tracing` event of target `access`, at level info when the
//! connection ended as its ends wanted, or because its pod or the agent went away; at warn otherwise. This is the only place that
//! writes users' addresses and names above debug.
//!
//! The event brings its fields as they are to be written, in one: what connections between the same two pods have in common is
//! made once for all of them, and to hand over fifteen fields one by one costs more than to write them.
//!
//! Bytes are told from the agent's own pod's point of view, in both directions: `bytes_sent` is what that pod sent. A field that
//! is not known is left out. A detail may quote a peer: it is kept to one line and `MAX_DETAIL` bytes.

use std::fmt::{self, Write as _};
use std::net::SocketAddr;
use std::ops::Range;
use std::time::Duration;

use super::can_be_quoted;
use super::connection::ConnectionInfo;
use crate::model::{CloseReason, Workload};

/// The target of the events, for filters (`CULVERT_LOG=info,access=off`).
pub const TARGET: &str = "access";

/// The field of the events: the message and all fields as text, or, in its alternate form, as members of a JSON object.
pub(super) const LINE: &str = "line";

/// The longest detail or error, in bytes.
const MAX_DETAIL: usize = 512;

/// More than most lines have, in bytes.
const LINE_CAPACITY: usize = 640;

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

/// What the lines of connections have in common that differ in the source's port alone.
#[derive(Debug)]
pub(super) struct Participants {
    text: (String, Range<usize>),
    json: (String, Range<usize>),
}

impl Participants {
    /// Those of this connection, and of others from and to the same.
    pub(super) fn new(info: &ConnectionInfo) -> Self {
        let of = |form| {
            let mut fields = Fields { form, out: String::with_capacity(LINE_CAPACITY) };
            let port = fields.participants(info);
            (fields.out, port)
        };
        Self { text: of(Form::Text), json: of(Form::Json) }
    }
}

/// Writes the line of a connection that was open.
pub(super) fn closed(info: &ConnectionInfo, ended: &Ended<'_>) {
    log_closed(Who::One(info), ended);
}

/// The same, of one of those that have this in common, from this port of the source's.
pub(super) fn closed_between(participants: &Participants, source_port: u16, ended: &Ended<'_>) {
    log_closed(Who::OneOf(participants, source_port), ended);
}

/// Writes the line of a connection that never opened.
pub(super) fn failed(info: &ConnectionInfo, reason: CloseReason, detail: &dyn fmt::Display) {
    let ended = Ended { bytes_sent: 0, bytes_received: 0, duration: Duration::ZERO, reason, detail: Some(detail) };
    let line = Line { message: "connection failed", who: Who::One(info), ended: &ended, detail: "error" };
    tracing::warn!(target: TARGET, parent: None, line = %line);
}

fn log_closed(who: Who<'_>, ended: &Ended<'_>) {
    let line = Line { message: "connection closed", who, ended, detail: "detail" };
    // `tracing` needs the level to be a constant of the call site.
    if ended.reason.is_orderly() || matches!(ended.reason, CloseReason::Draining | CloseReason::PodGone) {
        tracing::info!(target: TARGET, parent: None, line = %line);
    } else {
        tracing::warn!(target: TARGET, parent: None, line = %line);
    }
}

enum Who<'a> {
    One(&'a ConnectionInfo),
    OneOf(&'a Participants, u16),
}

struct Line<'a> {
    message: &'static str,
    who: Who<'a>,
    ended: &'a Ended<'a>,
    /// The name of the field for the end's detail.
    detail: &'static str,
}

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let form = if f.alternate() { Form::Json } else { Form::Text };
        let mut fields = Fields { form, out: String::with_capacity(LINE_CAPACITY) };
        fields.message(self.message);
        match self.who {
            Who::One(info) => drop(fields.participants(info)),
            Who::OneOf(participants, port) => {
                let (text, place) = match form {
                    Form::Text => &participants.text,
                    Form::Json => &participants.json,
                };
                let mut number = itoa::Buffer::new();
                fields.out.extend([&text[..place.start], number.format(port), &text[place.end..]]);
            }
        }
        fields.end(self.ended, self.detail);
        f.write_str(&fields.out)
    }
}

/// How fields are written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    /// As the log's other lines of text: behind each other, words between quotes.
    Text,
    /// As members of a JSON object.
    Json,
}

/// Fields, behind each other.
struct Fields {
    form: Form,
    out: String,
}

impl Fields {
    fn message(&mut self, message: &str) {
        match self.form {
            Form::Text => self.out.push_str(message),
            Form::Json => self.out.extend(["\"message\":\"", message, "\""]),
        }
    }

    /// Who takes part. Returns where the source's port is.
    fn participants(&mut self, info: &ConnectionInfo) -> Range<usize> {
        let port = self.address("src.addr", info.source_addr);
        self.workload(["src.workload", "src.namespace"], info.source.as_deref());
        if let Some(identity) = &info.source_identity {
            self.plain("src.identity", &identity.parts().concat());
        }
        self.address("dst.addr", info.destination_addr);
        if let Some(dialled) = info.original_dst.filter(|dialled| *dialled != info.destination_addr) {
            self.address("dst.original_addr", dialled);
        }
        if let Some(service) = &info.destination_service {
            self.word("dst.service", &service.hostname);
        }
        self.workload(["dst.workload", "dst.namespace"], info.destination.as_deref());
        if let Some(identity) = &info.destination_identity {
            self.plain("dst.identity", &identity.parts().concat());
        }
        self.word("direction", info.direction.as_str());
        self.word("security", info.security.as_str());
        port
    }

    fn workload(&mut self, [name, namespace]: [&str; 2], workload: Option<&Workload>) {
        if let Some(workload) = workload {
            self.word(name, &workload.name);
            self.word(namespace, workload.identity.namespace());
        }
    }

    fn end(&mut self, ended: &Ended<'_>, detail: &str) {
        self.number("bytes_sent", ended.bytes_sent);
        self.number("bytes_recv", ended.bytes_received);
        self.number("duration_ms", u64::try_from(ended.duration.as_millis()).unwrap_or(u64::MAX));
        self.word("reason", ended.reason.as_str());
        if let Some(text) = ended.detail {
            self.plain(detail, &one_line(text));
        }
    }

    fn name(&mut self, name: &str) {
        match self.form {
            Form::Text => self.out.extend([" ", name, "="]),
            Form::Json => self.out.extend([",\"", name, "\":"]),
        }
    }

    /// A word from outside, which stands between quotes.
    fn word(&mut self, name: &str, value: &str) {
        self.name(name);
        if can_be_quoted(value) {
            self.out.extend(["\"", value, "\""]);
        } else {
            self.quoted(value);
        }
    }

    /// A text that stands without quotes where that is possible.
    fn plain(&mut self, name: &str, value: &str) {
        match self.form {
            Form::Text => {
                self.name(name);
                self.out.push_str(value);
            }
            Form::Json => self.word(name, value),
        }
    }

    /// A text with what would end its quotes written out.
    fn quoted(&mut self, value: &str) {
        match self.form {
            // A string takes it all.
            Form::Text => drop(write!(self.out, "{value:?}")),
            Form::Json => self.out.push_str(&serde_json::Value::from(value).to_string()),
        }
    }

    fn number(&mut self, name: &str, value: u64) {
        self.name(name);
        self.out.push_str(itoa::Buffer::new().format(value));
    }

    /// An address and a port, as the library writes them. Returns where the port is.
    fn address(&mut self, name: &str, address: SocketAddr) -> Range<usize> {
        self.name(name);
        let mut number = itoa::Buffer::new();
        let quote = if self.form == Form::Json { "\"" } else { "" };
        self.out.push_str(quote);
        match address {
            // In one piece: that takes half of the time.
            SocketAddr::V4(address) => {
                for (octet, after) in address.ip().octets().into_iter().zip([".", ".", ".", ":"]) {
                    self.out.extend([number.format(octet), after]);
                }
            }
            SocketAddr::V6(address) => {
                let text = address.to_string();
                let port = text.rfind(':').map_or(text.len(), |colon| colon + 1);
                self.out.push_str(&text[..port]);
            }
        }
        let start = self.out.len();
        self.out.push_str(number.format(address.port()));
        let port = start..self.out.len();
        self.out.push_str(quote);
        port
    }
}

/// A text without its control characters, and not too much of it.
fn one_line(text: &dyn fmt::Display) -> String {
    let mut line = Bounded { out: String::new(), left: MAX_DETAIL };
    // A string takes it all.
    let _whole = write!(line, "{text}");
    line.out
}

struct Bounded {
    out: String,
    left: usize,
}

impl fmt::Write for Bounded {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars() {
            let Some(left) = self.left.checked_sub(c.len_utf8()) else {
                self.left = 0;
                return Ok(());
            };
            self.left = left;
            self.out.push(if c.is_control() { ' ' } else { c });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
