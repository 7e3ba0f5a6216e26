use std::io::Write;
use std::sync::mpsc;
use std::sync::{Arc, Mutex};

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::*;

/// Collects lines.
#[derive(Clone, Default)]
pub(crate) struct Lines(Arc<Mutex<Vec<u8>>>);

impl Lines {
    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.0.lock().expect("no panic").clone()).expect("UTF-8")
    }
}

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("no panic").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Lines {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

/// What is logged during `act`.
pub(crate) fn logged(format: LogFormat, filter: &str, act: impl FnOnce()) -> String {
    let lines = Lines::default();
    let filter = parse_filter(filter).expect("a filter");
    tracing::subscriber::with_default(subscriber(format, lines.clone(), filter, false), act);
    lines.text()
}

#[test]
fn a_json_line_is_one_object_with_the_fields_as_keys() {
    let line =
        logged(LogFormat::Json, "info", || tracing::info!(target: "unit", { src.addr = "10.0.0.1:1", count = 3 }, "hello"));
    let value: serde_json::Value = serde_json::from_str(&line).expect("one JSON object");
    assert_eq!((&value["src.addr"], &value["count"]), (&"10.0.0.1:1".into(), &3.into()));
    assert_eq!((&value["message"], &value["target"], &value["level"]), (&"hello".into(), &"unit".into(), &"INFO".into()));
}

#[test]
fn a_text_line_has_no_terminal_codes() {
    let line = logged(LogFormat::Text, "info", || tracing::warn!(target: "unit", count = 3, "hello"));
    assert!(line.ends_with("WARN unit: hello count=3\n"), "{line:?}");
    assert!(!line.contains('\u{1b}'));
}

#[test]
fn a_text_line_is_the_librarys_own() {
    let act = || {
        let _span = tracing::info_span!("outer", id = 7).entered();
        let _inner = tracing::info_span!("inner").entered();
        let (error, none) = (io::Error::other("no way"), None::<u8>);
        tracing::warn!(target: "unit", text = "a \"b\"", plain = "a 'b' c", count = 7u64, empty = "", %error, debug = ?Some(1), src.addr = "x", none, up = true, left = -3i64, "hello {}", 5);
    };
    let lines = Lines::default();
    let layer = tracing_subscriber::fmt::layer().with_writer(lines.clone()).with_ansi(false);
    tracing::subscriber::with_default(Registry::default().with(layer), act);
    let (theirs, ours) = (lines.text(), logged(LogFormat::Text, "info", act));
    let without_time = |line: &str| line.split_once(' ').map(|(_time, rest)| rest.to_owned()).expect("a time");
    assert_eq!(without_time(&ours), without_time(&theirs));
}

#[test]
fn a_line_begins_with_the_time_in_utc_to_the_microsecond() {
    let before = OffsetDateTime::now_utc();
    let lines = logged(LogFormat::Text, "info", || (0..3).for_each(|count| tracing::info!(target: "unit", count, "hello")));
    let after = OffsetDateTime::now_utc();
    let times: Vec<_> = lines.lines().map(|line| line.split_once(' ').expect("a time").0).collect();
    assert!(times.len() == 3 && times.iter().all(|time| time.len() == "2026-11-26T12:00:00.000000Z".len()), "{times:?}");
    let times = times.into_iter().map(|time| OffsetDateTime::parse(time, &Rfc3339).expect("a time"));
    // What is less than a microsecond is not written.
    let all: Vec<_> = [before.truncate_to_microsecond()].into_iter().chain(times).chain([after]).collect();
    assert!(all.is_sorted(), "{all:?}");
}

#[test]
fn a_value_can_not_begin_a_line_or_command_a_terminal() {
    let text = logged(LogFormat::Text, "info", || tracing::info!(value = %"a\nb\u{1b}[2Jc\u{9b}d é", "hello"));
    assert!(text.ends_with("hello value=a\\nb\\u{1b}[2Jc\\u{9b}d é\n"), "{text:?}");
}

#[test]
fn filters_pass_what_they_say() {
    let act = || {
        tracing::debug!(target: "culvert::tunnel", "ours");
        tracing::debug!(target: "h2::codec", "theirs");
        tracing::info!(target: "access", "line");
    };
    let check = |filter: &str, expected: [bool; 3]| {
        let text = logged(LogFormat::Text, filter, act);
        assert_eq!(["ours", "theirs", "line"].map(|word| text.contains(word)), expected, "{filter}");
    };
    check("info", [false, false, true]);
    check("debug", [true, false, true]);
    check("info,culvert::tunnel=debug", [true, false, true]);
    check("info,h2=debug", [false, true, true]);
    check("info,access=off", [false, false, false]);
    check("off", [false, false, false]);
}

#[test]
fn a_word_that_is_no_level_is_refused() {
    for filter in ["verbose", "", "info,nonsense", "culvert=loud", "info,"] {
        assert!(parse_filter(filter).is_err(), "{filter:?} was taken");
    }
    let error = parse_filter("verbose").expect_err("no level").to_string();
    assert!(error.starts_with("`verbose` is not a log level"), "{error}");
}

#[test]
fn formats_have_names() {
    for name in LogFormat::NAMES {
        assert_eq!(name.parse::<LogFormat>().expect("a format").to_string(), name);
    }
    assert!("xml".parse::<LogFormat>().is_err());
}

/// An output that takes nothing until it is released.
struct Stuck {
    entered: mpsc::Sender<()>,
    release: mpsc::Receiver<()>,
}

impl Write for Stuck {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.entered.send(()).map_err(|_gone| io::ErrorKind::BrokenPipe)?;
        self.release.recv().map_err(|_gone| io::ErrorKind::BrokenPipe)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_stuck_output_drops_and_counts_lines_and_blocks_nobody() {
    let (entered, entries) = mpsc::channel();
    let (release, released) = mpsc::channel();
    let (lines, writing) = queue(Stuck { entered, release: released }, 4 * b"line\n".len()).expect("a thread");
    (&lines).write_all(b"first\n").expect("queued");
    entries.recv().expect("the first line is being written");
    for _ in 0..10 {
        (&lines).write_all(b"line\n").expect("never blocks");
    }
    assert_eq!(lines.dropped(), 6);
    drop(release);
    drop(writing);
}

/// An output that keeps what each call wrote.
struct Kept(mpsc::Sender<Vec<u8>>);

impl Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.send(bytes.to_vec()).map_err(|_gone| io::ErrorKind::BrokenPipe)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn lines_that_come_together_are_written_together_and_the_last_are_not_lost() {
    let (kept, written) = mpsc::channel();
    let (lines, writing) = queue(Kept(kept), 1 << 20).expect("a thread");
    let all = (0..1000).map(|number| format!("line {number}\n")).collect::<Vec<_>>();
    for line in &all {
        (&lines).write_all(line.as_bytes()).expect("queued");
    }
    drop(writing);
    let calls = written.try_iter().collect::<Vec<_>>();
    assert_eq!(String::from_utf8(calls.concat()).expect("text"), all.concat());
    assert!(calls.len() < all.len() / 2, "{} calls", calls.len());
    assert_eq!(lines.dropped(), 0);
}
