//! A log line as text without colours.
//!
//! ```text
//! 2026-11-26T12:00:00.000000Z  INFO access: connection closed src.addr=10.0.0.1:40000 bytes_sent=5 reason="finished"
//! ```
//!
//! The same line as the library's own, made in a fraction of the time: there is one for each connection's end. Whatever a value holds,
//! a line stays one line, and no terminal takes it for anything else.

use std::cell::RefCell;
use std::fmt::{self, Write as _};

use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime as _, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, FormattedFields};
use tracing_subscriber::registry::LookupSpan;

thread_local! {
    /// Where a thread makes its lines.
    static LINE: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Formats events so.
#[derive(Clone, Copy, Debug)]
pub(super) struct PlainText;

impl<S, N> FormatEvent<S, N> for PlainText
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        // A value that logs while it is written gets a line of its own.
        let mut line = LINE.with(RefCell::take);
        line.clear();
        SystemTime.format_time(&mut Writer::new(&mut line))?;
        write!(line, " {:>5} ", event.metadata().level())?;
        let start = line.len();
        for span in context.event_scope().into_iter().flat_map(|scope| scope.from_root()) {
            line.push_str(span.name());
            if let Some(fields) = span.extensions().get::<FormattedFields<N>>().filter(|fields| !fields.is_empty()) {
                write!(line, "{{{fields}}}")?;
            }
            line.push(':');
        }
        if line.len() > start {
            line.push(' ');
        }
        line.push_str(event.metadata().target());
        line.push(':');
        let mut fields = Fields { line: &mut line, result: Ok(()) };
        event.record(&mut fields);
        fields.result?;
        if line.bytes().any(|byte| byte.is_ascii_control()) || !line.is_ascii() {
            line = without_controls(&line);
        }
        line.push('\n');
        let written = writer.write_str(&line);
        LINE.set(line);
        written
    }
}

/// Writes an event's fields behind each other.
struct Fields<'a> {
    line: &'a mut String,
    result: fmt::Result,
}

impl Fields<'_> {
    fn field(&mut self, field: &Field, value: fmt::Arguments<'_>) {
        self.line.push(' ');
        if field.name() != "message" {
            self.line.push_str(field.name());
            self.line.push('=');
        }
        self.result = self.result.and_then(|()| self.line.write_fmt(value));
    }
}

impl Visit for Fields<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.field(field, format_args!("{value}"));
        } else {
            self.field(field, format_args!("{value:?}"));
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.field(field, format_args!("{value:?}"));
    }
}

/// The text with its control characters written out.
fn without_controls(text: &str) -> String {
    let mut clean = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if c.is_control() { clean.extend(c.escape_default()) } else { clean.push(c) }
    }
    clean
}
