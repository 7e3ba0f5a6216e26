//! The labels of Istio's TCP metrics for one pair of workloads, packed into one text that serves as the table's key.
//!
//! Enters: what is known of a connection. Leaves: the packed text, and from it the label set of an exposed series. Values that
//! are not known read `unknown`. A value never breaks the exposition: what needs escaping is escaped, and it is cut at
//! `MAX_VALUE` bytes.

use std::borrow::Cow;
use std::fmt::{self, Write as _};

use prometheus_client::encoding::{EncodeLabel, EncodeLabelSet, EncodeLabelValue, LabelSetEncoder, LabelValueEncoder};

use super::can_be_quoted;
use super::connection::{ConnectionInfo, Direction, Security};
use crate::model::{SpiffeId, Workload};

/// The longest label value, in bytes: a SPIFFE ID of the longest trust domain, namespace and service account fits.
const MAX_VALUE: usize = 700;

/// Between two packed values. Escaping leaves no control character in a value.
const SEPARATOR: char = '\u{1f}';

const UNKNOWN: &str = "unknown";

/// The labels in the order they are packed. A pair of workload and version appears under two names each, as Istio has it.
const FIELDS: [&[&str]; 17] = [
    &["reporter"],
    &["source_workload"],
    &["source_canonical_service", "source_app"],
    &["source_canonical_revision", "source_version"],
    &["source_workload_namespace"],
    &["source_principal"],
    &["source_cluster"],
    &["destination_service"],
    &["destination_service_name"],
    &["destination_service_namespace"],
    &["destination_workload"],
    &["destination_canonical_service", "destination_app"],
    &["destination_canonical_revision", "destination_version"],
    &["destination_workload_namespace"],
    &["destination_principal"],
    &["destination_cluster"],
    &["connection_security_policy"],
];

/// Packs the labels of a connection.
pub(super) fn pack(info: &ConnectionInfo) -> String {
    let mut key = String::with_capacity(320);
    key.push_str(reporter(info.direction));
    push_workload(&mut key, info.source.as_deref(), info.source_identity.as_ref());
    match info.destination_service.as_deref() {
        Some(service) => [&service.hostname, &service.name, &service.namespace].map(|value| push(&mut key, value)),
        None => [(); 3].map(|()| push(&mut key, "")),
    };
    push_workload(&mut key, info.destination.as_deref(), info.destination_identity.as_ref());
    push(&mut key, security_policy(info.security));
    key
}

/// The labels for pairs that the table has no room for: only what has few values is kept.
pub(super) fn overflow(info: &ConnectionInfo) -> String {
    let mut key = String::from(reporter(info.direction));
    for _ in 2..FIELDS.len() {
        push(&mut key, "overflow");
    }
    push(&mut key, security_policy(info.security));
    key
}

fn reporter(direction: Direction) -> &'static str {
    match direction {
        Direction::Outbound => "source",
        Direction::Inbound => "destination",
    }
}

fn security_policy(security: Security) -> &'static str {
    match security {
        Security::MutualTls => "mutual_tls",
        Security::Attested => "attested",
        Security::None => "none",
    }
}

/// The principal is the verified identity only; the namespace may come from it when the workload itself is not known.
fn push_workload(key: &mut String, workload: Option<&Workload>, verified: Option<&SpiffeId>) {
    let field = |value: fn(&Workload) -> &str| workload.map_or("", value);
    push(key, field(|workload| workload.workload_name()));
    push(key, field(|workload| workload.canonical_name()));
    push(key, field(|workload| &workload.telemetry.canonical_revision));
    push(key, workload.map(|workload| &workload.identity).or(verified).map_or("", SpiffeId::namespace));
    key.push(SEPARATOR);
    match verified {
        // A SPIFFE ID has no character that needs escaping: its parser takes letters, digits and `._-/:` only.
        Some(identity) => identity.parts().into_iter().for_each(|part| key.push_str(part)),
        None => key.push_str(UNKNOWN),
    }
    push(key, field(Workload::cluster));
}

fn push(key: &mut String, value: &str) {
    key.push(SEPARATOR);
    if value.is_empty() {
        key.push_str(UNKNOWN);
    } else {
        key.push_str(&escaped(value));
    }
}

/// Cuts and escapes a label value for the text exposition, which the encoder itself does not do.
pub(super) fn escaped(value: &str) -> Cow<'_, str> {
    if value.len() <= MAX_VALUE && can_be_quoted(value) {
        return Cow::Borrowed(value);
    }
    let cut = value.floor_char_boundary(MAX_VALUE);
    let mut text = String::with_capacity(cut + 8);
    for c in value[..cut].chars() {
        match c {
            '"' => text.push_str("\\\""),
            '\\' => text.push_str("\\\\"),
            '\n' => text.push_str("\\n"),
            c if c.is_control() => text.push('?'),
            c => text.push(c),
        }
    }
    Cow::Owned(text)
}

/// One series' labels: the packed pair and the response flags.
#[derive(Debug)]
pub(super) struct SeriesLabels<'a> {
    /// As [`pack`] or [`overflow`] made it.
    pub(super) pair: &'a str,
    /// `-` for a connection that ended in order or still runs; otherwise the close reason's word.
    pub(super) response_flags: &'static str,
}

impl EncodeLabelSet for SeriesLabels<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), fmt::Error> {
        for (names, value) in FIELDS.iter().zip(self.pair.split(SEPARATOR)) {
            for name in *names {
                label(encoder, name, value)?;
            }
        }
        label(encoder, "request_protocol", "tcp")?;
        label(encoder, "response_flags", self.response_flags)
    }
}

fn label(encoder: &mut LabelSetEncoder<'_>, name: &str, value: &str) -> Result<(), fmt::Error> {
    EncodeLabel::encode(&(name, value), encoder.encode_label())
}

/// A label value from outside, escaped.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Escaped(String);

impl From<&str> for Escaped {
    fn from(value: &str) -> Self {
        Self(escaped(value).into_owned())
    }
}

impl EncodeLabelValue for Escaped {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), fmt::Error> {
        encoder.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::super::connection::fixtures::info;
    use super::*;

    #[test]
    fn a_value_can_not_break_out_of_its_quotes_or_its_line() {
        assert_eq!(escaped("a\"} 1\nfake{x=\"\\"), "a\\\"} 1\\nfake{x=\\\"\\\\");
        assert_eq!(escaped("tab\tand\u{1f}separator"), "tab?and?separator");
        assert_eq!(escaped("plain-name.1"), "plain-name.1");
    }

    #[test]
    fn a_long_value_is_cut_between_characters() {
        let long = "é".repeat(MAX_VALUE);
        let cut = escaped(&long);
        assert!(cut.len() <= MAX_VALUE && cut.chars().all(|c| c == 'é'));
    }

    #[test]
    fn every_packed_text_has_a_value_for_each_field() {
        let full = info();
        let mut empty = info();
        (empty.source, empty.destination, empty.destination_service) = (None, None, None);
        (empty.source_identity, empty.destination_identity) = (None, None);
        for packed in [pack(&full), pack(&empty), overflow(&full)] {
            assert_eq!(packed.split(SEPARATOR).count(), FIELDS.len(), "{packed:?}");
            assert!(packed.split(SEPARATOR).all(|value| !value.is_empty()));
        }
    }

    #[test]
    fn the_namespace_of_an_unknown_workload_comes_from_its_verified_identity() {
        let mut unknown = info();
        unknown.source = None;
        let packed = pack(&unknown);
        let values: Vec<_> = packed.split(SEPARATOR).collect();
        assert_eq!(values[1..7], ["unknown", "unknown", "unknown", "shop", "spiffe://cluster.local/ns/shop/sa/cart", "unknown"]);
    }
}
