//! What the demo prints: steps, what was seen in each, and whether each thing holds that a step says.

use std::fmt::Display;
use std::io::IsTerminal as _;

use anyhow::Error;

/// What is shown, and how much of it held.
#[derive(Debug)]
pub(crate) struct Report {
    held: usize,
    failed: usize,
    colours: bool,
}

impl Report {
    pub(crate) fn new() -> Self {
        Self { held: 0, failed: 0, colours: std::io::stdout().is_terminal() }
    }

    /// Begins a step.
    pub(crate) fn step(&self, number: u32, title: &str) {
        self.line(&format!("\n{}", self.paint("1", &format!("({number}) {title}"))));
    }

    /// Something that is to be read.
    pub(crate) fn text(&self, text: &str) {
        for line in text.lines() {
            self.line(&format!("    {line}"));
        }
    }

    /// A table, its columns as wide as what is in them. The first row is its head.
    pub(crate) fn table(&self, rows: &[Vec<String>]) {
        let columns = rows.iter().map(Vec::len).max().unwrap_or_default();
        let cell = |row: &Vec<String>, column: usize| row.get(column).map_or(0, |cell| cell.chars().count());
        let widths: Vec<usize> =
            (0..columns).map(|column| rows.iter().map(|row| cell(row, column)).max().unwrap_or_default()).collect();
        for (index, row) in rows.iter().enumerate() {
            let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
            let line = cells.join("  ");
            self.text(&if index == 0 { self.paint("4", line.trim_end()) } else { line.trim_end().to_owned() });
        }
    }

    /// Something that must hold. `seen` is told where it does not.
    pub(crate) fn check(&mut self, holds: bool, what: impl Display, seen: impl Display) {
        if holds {
            self.held += 1;
            self.line(&format!("  {} {what}", self.paint("32", "ok")));
        } else {
            self.failed += 1;
            self.line(&format!("  {} {what}\n     seen: {seen}", self.paint("31", "NOT SO:")));
        }
    }

    /// Something that must be equal to something else.
    pub(crate) fn check_equal<T: PartialEq + std::fmt::Debug>(&mut self, seen: &T, wanted: &T, what: impl Display) {
        self.check(seen == wanted, what, format_args!("{seen:?}, not {wanted:?}"));
    }

    /// A step could not go on.
    pub(crate) fn broken(&mut self, error: &Error) {
        self.failed += 1;
        self.line(&format!("  {} {error:#}", self.paint("31", "NOT SO:")));
    }

    /// Says how it went, and whether all held.
    pub(crate) fn finish(&self) -> bool {
        let passed = self.failed == 0 && self.held > 0;
        let words = if passed {
            format!("all {} checks hold", self.held)
        } else {
            format!("{} of {} checks failed", self.failed, self.held + self.failed)
        };
        self.line(&format!("\n{}", self.paint(if passed { "32" } else { "31" }, &words)));
        passed
    }

    fn line(&self, line: &str) {
        #[expect(clippy::print_stdout, reason = "showing is what this program is for")]
        {
            println!("{line}");
        }
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colours { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}
