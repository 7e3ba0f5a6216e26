//! The results for people.

use std::fmt::Write as _;

use crate::facts::Facts;
use crate::results::{Measured, Spread};
use crate::rows::{Better, Bound, Figure};
use crate::topology::Path;

/// Of the first column, and of all.
const WIDTH: usize = 44;
const RULE: usize = 132;

/// The whole table.
pub(crate) fn render(facts: &Facts, measured: &[Measured]) -> String {
    let Facts { processors, processor, kernel, commit, .. } = facts;
    let mut table = format!("\n{processors} × {processor}, Linux {kernel}, commit {commit}\n");
    let mut group = "";
    for measured in measured {
        if measured.row.group != group {
            group = measured.row.group;
            let _infallible = write!(
                table,
                "\n{group:<WIDTH$} {:>24} {:>24} {:>18}   {:>8} {:>8}\n{:─<RULE$}\n",
                "direct", "culvert", "ratio", "target", "peer", ""
            );
        }
        for path in measured.row.paths {
            let figures = measured.row.figures.iter();
            table.extend(figures.filter_map(|figure| line(measured, figure, *path)));
        }
    }
    table.push_str("\nMedian (range) of the rounds; a ratio is that of a round to the direct path in the same round.\n");
    table.push_str("✓ reached, ✗ not. peer: a well-known peer doing the same job, measured elsewhere.\n");
    table
}

fn line(measured: &Measured, figure: &Figure, path: Path) -> Option<String> {
    let value = measured.spread(figure, path)?;
    let base = measured.row.base.and_then(|base| measured.spread(figure, base));
    let ratio = measured.ratio(figure, path);
    let mark = match figure.goal.and_then(|goal| measured.reached(figure, path, goal)) {
        Some(true) => "✓",
        Some(false) => "✗",
        None => " ",
    };
    let label = format!("{}, {}", figure.title, figure.unit);
    let cell = |spread: Option<Spread>| spread.map_or_else(String::new, with_range);
    let bound = |bound: Option<Bound>| bound.map_or_else(String::new, |bound| show_bound(figure, bound));
    Some(format!(
        "{label:<WIDTH$} {:>24} {:>24} {:>18} {mark} {:>8} {:>8}\n",
        cell(base),
        with_range(value),
        cell(ratio),
        bound(figure.goal),
        figure.peer.map_or_else(String::new, plain_bound),
    ))
}

fn with_range(Spread { median, least, most }: Spread) -> String {
    if least == most {
        return number(median);
    }
    format!("{} ({}–{})", number(median), number(least), number(most))
}

fn show_bound(figure: &Figure, bound: Bound) -> String {
    let sign = if figure.better == Better::More { '≥' } else { '≤' };
    format!("{sign} {}", plain_bound(bound))
}

fn plain_bound(bound: Bound) -> String {
    match bound {
        Bound::Ratio(value) => format!("{value:.2}"),
        Bound::Value(value) => number(value),
    }
}

/// Three digits that matter, and thousands apart.
fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 1000.0 => {
            let digits = format!("{value:.0}");
            let (head, tail) = digits.split_at(digits.len() - 3);
            format!("{head},{tail}")
        }
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}
