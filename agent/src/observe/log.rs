//! Where log lines go: standard output, without ever holding up whoever logs.
//!
//! Enters: `tracing` events of the whole process. Leaves: lines of text or JSON, written by a thread of their own. When the output
//! doesn't keep up and the queue is full, lines are dropped and counted; a slow log never slows a connection.
//!
//! The filter comes from `CULVERT_LOG` (`info` by default; `tracing-subscriber`'s directives) and can be changed while the agent runs.

use std::fmt;
use std::io::{self, IsTerminal as _};
use std::str::FromStr;
use std::sync::OnceLock;

use tracing::Subscriber;
use tracing::metadata::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::{EnvFilter, Layer, Registry, reload};

mod queue;
mod text;

use queue::{Lines, Writing, queue};
use text::{PlainText, WithAccessLog};

/// The environment variable with the filter.
pub const FILTER_VARIABLE: &str = "CULVERT_LOG";

const DEFAULT_FILTER: &str = "info";

/// Libraries that say much at debug and trace, and nothing about the mesh. A filter of directives can still name them.
const QUIET: &str = "h2=info,hyper=info,hyper_util=info,rustls=info,tower=info,tonic=info";

/// Bytes of lines that may wait for the output: some 8,000 lines.
const QUEUE: usize = 4 << 20;

static OUTPUT: OnceLock<Output> = OnceLock::new();

struct Output {
    lines: Lines,
    filter: reload::Handle<EnvFilter, Registry>,
}

/// How a line is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line, fields as keys.
    Json,
}

impl LogFormat {
    /// The names of all formats.
    pub const NAMES: [&str; 2] = ["text", "json"];
}

impl FromStr for LogFormat {
    type Err = LogError;

    fn from_str(text: &str) -> Result<Self, LogError> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(LogError::Format(text.to_owned())),
        }
    }
}

impl fmt::Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Text => "text",
            Self::Json => "json",
        })
    }
}

/// Why logging could not be set as asked.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The format has another name.
    #[error("`{0}` is not a log format: use text or json")]
    Format(String),
    /// A part of the filter is neither a level nor a directive.
    #[error("`{0}` is not a log level: use error, warn, info, debug, trace or off, or directives such as info,access=off")]
    Level(String),
    /// The filter does not parse.
    #[error("`{filter}` is not a log filter: use a level or directives such as info,access=off")]
    Filter {
        /// What was asked for.
        filter: String,
        /// What the parser said.
        #[source]
        source: tracing_subscriber::filter::ParseError,
    },
    /// Logging has not been set up in this process.
    #[error("logging is not set up in this process")]
    NotRunning,
}

/// Keeps the writing thread. Dropping it writes out what waits, for a second at most.
#[derive(Debug)]
#[must_use = "lines are lost when this is dropped before the process ends"]
pub struct LogGuard(#[expect(dead_code, reason = "held for its drop")] Option<Writing>);

/// Sends this process's log lines to standard output. A filter in `CULVERT_LOG` that doesn't parse is reported and `info` used:
/// a wrong word in the environment must not keep a node's pods offline. A second call in one process changes nothing.
pub fn init(format: LogFormat) -> LogGuard {
    let set = std::env::var(FILTER_VARIABLE).ok().filter(|filter| !filter.is_empty());
    let wanted = set.unwrap_or_else(|| DEFAULT_FILTER.to_owned());
    let (filter, problem) = match parse_filter(&wanted) {
        Ok(filter) => (filter, None),
        Err(error) => (EnvFilter::new(DEFAULT_FILTER), Some(error)),
    };
    let Ok((lines, writing)) = queue(io::stdout(), QUEUE) else { return LogGuard(None) };
    let (filter, handle) = reload::Layer::new(filter);
    let ansi = format == LogFormat::Text && io::stdout().is_terminal();
    if tracing::subscriber::set_global_default(subscriber(format, lines.clone(), filter, ansi)).is_err() {
        return LogGuard(None);
    }
    OUTPUT.get_or_init(|| Output { lines, filter: handle });
    if let Some(error) = problem {
        tracing::warn!("{FILTER_VARIABLE}: {error}; using {DEFAULT_FILTER}");
    }
    LogGuard(Some(writing))
}

/// How many lines were dropped since the start because the output did not keep up.
#[must_use]
pub fn dropped_lines() -> u64 {
    OUTPUT.get().map_or(0, |output| output.lines.dropped())
}

/// Changes the filter of the running process: a level, or directives. Leaves it as it was on error.
///
/// # Errors
/// [`LogError::Level`] or [`LogError::Filter`] when it does not parse, [`LogError::NotRunning`] before [`init`].
pub fn set_filter(filter: &str) -> Result<(), LogError> {
    let parsed = parse_filter(filter)?;
    let output = OUTPUT.get().ok_or(LogError::NotRunning)?;
    output.filter.reload(parsed).map_err(|_gone| LogError::NotRunning)
}

/// The filter in force; none before [`init`].
#[must_use]
pub fn current_filter() -> Option<String> {
    OUTPUT.get().and_then(|output| output.filter.with_current(ToString::to_string).ok())
}

/// A bare level also keeps `QUIET` libraries quiet. A bare word that is no level would be taken for a module's name by the
/// parser, and silence everything else: it is refused.
fn parse_filter(text: &str) -> Result<EnvFilter, LogError> {
    let level = |word: &str| LevelFilter::from_str(word.trim());
    let strange = |part: &&str| !part.contains(['=', '[', ']']) && (part.is_empty() || level(part).is_err());
    if let Some(part) = text.split(',').find(strange) {
        return Err(LogError::Level(part.to_owned()));
    }
    let parsed = match level(text) {
        Ok(level) if level > LevelFilter::INFO => EnvFilter::builder().parse(format!("{text},{QUIET}")),
        Ok(_) | Err(_) => EnvFilter::builder().parse(text),
    };
    parsed.map_err(|source| LogError::Filter { filter: text.to_owned(), source })
}

/// Lines in `format` to `writer`.
pub(super) fn subscriber<W>(
    format: LogFormat,
    writer: W,
    filter: impl Layer<Registry> + Send + Sync,
    ansi: bool,
) -> impl Subscriber + Send + Sync
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let lines = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(ansi);
    let lines = match format {
        LogFormat::Text if ansi => lines.map_event_format(|others| WithAccessLog { format, others }).boxed(),
        LogFormat::Text => lines.event_format(WithAccessLog { format, others: PlainText }).boxed(),
        LogFormat::Json => {
            let lines = lines.json().flatten_event(true).with_current_span(false).with_span_list(true);
            lines.map_event_format(|others| WithAccessLog { format, others }).boxed()
        }
    };
    Registry::default().with(filter).with(lines)
}

#[cfg(test)]
pub(super) mod tests;
