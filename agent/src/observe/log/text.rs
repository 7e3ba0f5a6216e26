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
use std::time::{Duration, UNIX_EPOCH};

use time::OffsetDateTime;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, FormattedFields};
use tracing_subscriber::registry::LookupSpan;

use super::LogFormat;
use crate::observe::{access_log, can_be_quoted};

thread_local! {
    /// Where a thread makes its lines.
    static LINE: RefCell<String> = const { RefCell::new(String::new()) };
    /// The second of the last line.
    static SECOND: RefCell<Second> = const { RefCell::new(Second { number: 0, text: String::new() }) };
}

/// A second, since 1970, and how a time in it begins.
#[derive(Default)]
struct Second {
    number: u64,
    text: String,
}

/// Formats events so.
#[derive(Clone, Copy, Debug)]
pub(super) struct PlainText;

/// Formats the access log's events, which bring their fields as they are to be written, and leaves all others to `F`.
#[derive(Clone, Copy, Debug)]
pub(super) struct WithAccessLog<F> {
    pub(super) format: LogFormat,
    pub(super) others: F,
}

impl<S, N> FormatEvent<S, N> for PlainText
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        write_line(writer, |line| {
            push_time(line)?;
            line.push_str(padded(*event.metadata().level()));
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
            let mut fields = Fields { line, result: Ok(()) };
            event.record(&mut fields);
            fields.result?;
            // Without an early end, so that the compiler looks at many at a time.
            if line.bytes().fold(false, |strange, byte| strange | !matches!(byte, b' '..=b'~')) {
                *line = without_controls(line);
            }
            line.push('\n');
            Ok(())
        })
    }
}

impl<S, N, F> FormatEvent<S, N> for WithAccessLog<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let metadata = event.metadata();
        if metadata.target() != access_log::TARGET || metadata.fields().field(access_log::LINE).is_none() {
            return self.others.format_event(context, writer, event);
        }
        write_line(writer, |line| {
            match self.format {
                LogFormat::Text => {
                    push_time(line)?;
                    line.extend([padded(*metadata.level()), access_log::TARGET, ": "]);
                }
                LogFormat::Json => {
                    line.push_str("{\"timestamp\":\"");
                    push_time(line)?;
                    line.extend(["\",\"level\":\"", metadata.level().as_str(), "\","]);
                }
            }
            let mut whole = Whole { line, format: self.format, result: Ok(()) };
            event.record(&mut whole);
            whole.result?;
            match self.format {
                LogFormat::Text => line.push('\n'),
                LogFormat::Json => line.extend([",\"target\":\"", access_log::TARGET, "\"}\n"]),
            }
            Ok(())
        })
    }
}

/// Has a line made where the thread makes its lines, and writes it.
fn write_line(mut writer: Writer<'_>, make: impl FnOnce(&mut String) -> fmt::Result) -> fmt::Result {
    // A value that logs while it is written gets a line of its own.
    let mut line = LINE.with(RefCell::take);
    line.clear();
    let written = make(&mut line).and_then(|()| writer.write_str(&line));
    LINE.set(line);
    written
}

/// Takes over what the access log has written.
struct Whole<'a> {
    line: &'a mut String,
    format: LogFormat,
    result: fmt::Result,
}

impl Visit for Whole<'_> {
    fn record_debug(&mut self, _line: &Field, value: &dyn fmt::Debug) {
        self.result = match self.format {
            LogFormat::Text => write!(self.line, "{value:?}"),
            LogFormat::Json => write!(self.line, "{value:#?}"),
        };
    }
}

/// The level's name as it stands in a line of text.
fn padded(level: Level) -> &'static str {
    match level {
        Level::ERROR => " ERROR ",
        Level::WARN => "  WARN ",
        Level::INFO => "  INFO ",
        Level::DEBUG => " DEBUG ",
        Level::TRACE => " TRACE ",
    }
}

/// Adds the time as the library writes it: in UTC, to the microsecond. Its date is made once a second.
fn push_time(line: &mut String) -> fmt::Result {
    let now = std::time::SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut second = SECOND.with(RefCell::take);
    if second.number != now.as_secs() || second.text.is_empty() {
        second.text.clear();
        let whole = UNIX_EPOCH + Duration::from_secs(now.as_secs());
        let whole: OffsetDateTime = whole.into();
        write!(second.text, "{:04}-{:02}-{:02}", whole.year(), u8::from(whole.month()), whole.day())?;
        write!(second.text, "T{:02}:{:02}:{:02}.", whole.hour(), whole.minute(), whole.second())?;
        second.number = now.as_secs();
    }
    line.push_str(&second.text);
    SECOND.set(second);
    // Six digits, whatever they begin with.
    line.push_str(&itoa::Buffer::new().format(1_000_000 + now.subsec_micros())[1..]);
    line.push('Z');
    Ok(())
}

/// Writes an event's fields behind each other.
struct Fields<'a> {
    line: &'a mut String,
    result: fmt::Result,
}

impl Fields<'_> {
    fn name(&mut self, field: &Field) {
        self.line.push(' ');
        if field.name() != "message" {
            self.line.push_str(field.name());
            self.line.push('=');
        }
    }
}

impl Visit for Fields<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.name(field);
        if field.name() == "message" {
            self.line.push_str(value);
        } else if can_be_quoted(value) {
            self.line.extend(["\"", value, "\""]);
        } else {
            self.result = self.result.and_then(|()| write!(self.line, "{value:?}"));
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.name(field);
        self.line.push_str(itoa::Buffer::new().format(value));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.name(field);
        self.result = self.result.and_then(|()| write!(self.line, "{value:?}"));
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
