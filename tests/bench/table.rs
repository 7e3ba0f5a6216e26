//! The results for people.

use std::fmt::Write as _;

use crate::facts::Facts;
use crate::results::{Measured, Spread};
use crate::rows::{Better, Bound, Figure};
use crate::topology::Path;

/// Of the first column, and of all.
const WIDTH: usize = 46;
const RULE: usize = 132;

/// The whole table.
pub(crate) fn render(facts: &Facts, measured: &[Measured]) -> String {
    let Facts { processors, processor, kernel, commit, .. } = facts;
    let mut table = format!("\nCulvert {commit} on {processors} × {processor}, Linux {kernel}\n");
    let mut group = "";
    for measured in measured {
        if measured.row.group != group {
            group = measured.row.group;
            let _infallible = write!(
                table,
                "\n{group:<WIDTH$} {:>24} {:>24} {:>17}   {:>8} {:>7}\n{:─<RULE$}\n",
                "direct", "culvert", "ratio", "target", "peer", ""
            );
        }
        for path in measured.paths() {
            table.extend(measured.row.figures.iter().filter_map(|figure| line(measured, figure, path)));
        }
    }
    table.push_str("\nMedian (least–most) of the rounds. A ratio (×) is that of a round to the direct path in the same round.\n");
    table.push_str(
        "✓ the target is reached, ✗ it is not. peer: a well-known peer doing the same job, as once measured on 2 cores.\n",
    );
    table
}

fn line(measured: &Measured, figure: &Figure, path: Path) -> Option<String> {
    let value = measured.spread(figure, path)?;
    let base = measured.row.base.and_then(|base| measured.spread(figure, base));
    if value.most == 0.0 && base.is_none_or(|base| base.most == 0.0) {
        return None;
    }
    let ratio = measured.ratio(figure, path);
    let mark = match figure.goal.and_then(|goal| measured.reached(figure, path, goal)) {
        Some(true) => "✓",
        Some(false) => "✗",
        None => " ",
    };
    let about = [path.about(), figure.unit].into_iter().filter(|word| !word.is_empty());
    let label = std::iter::once(figure.title).chain(about).collect::<Vec<_>>().join(", ");
    Some(format!(
        "{label:<WIDTH$} {:>24} {:>24} {:>17} {mark} {:>8} {:>7}\n",
        base.map_or_else(String::new, |spread| with_range(spread, number)),
        with_range(value, number),
        ratio.map_or_else(String::new, |spread| with_range(spread, ratio_number) + "×"),
        figure.goal.map_or_else(String::new, |bound| goal(figure, bound)),
        figure.peer.map_or_else(String::new, plain),
    ))
}

fn with_range(Spread { median, least, most }: Spread, show: impl Fn(f64) -> String) -> String {
    let (low, high) = (show(least), show(most));
    if low == high { show(median) } else { format!("{} ({low}–{high})", show(median)) }
}

fn goal(figure: &Figure, bound: Bound) -> String {
    let sign = if figure.better == Better::More { '≥' } else { '≤' };
    format!("{sign} {}", plain(bound))
}

/// A bound as it stands in the table: ratios have a cross.
pub(crate) fn plain(bound: Bound) -> String {
    match bound {
        Bound::Ratio(value) => ratio_number(value) + "×",
        Bound::Value(value) if value.fract() == 0.0 => format!("{value:.0}"),
        Bound::Value(value) => number(value),
    }
}

fn ratio_number(value: f64) -> String {
    if value < 10.0 { format!("{value:.2}") } else { number(value) }
}

/// Three digits that matter, and thousands apart.
pub(crate) fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 999.5 => {
            let digits = format!("{value:.0}");
            let (head, tail) = digits.split_at(digits.len() - 3);
            format!("{head},{tail}")
        }
        size if size >= 99.95 => format!("{value:.0}"),
        size if size >= 9.995 => format!("{value:.1}"),
        0.0 => "0".to_owned(),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits_or_thousands() {
        let shown = [0.0, 0.123, 9.999, 12.34, 99.96, 123.4, 999.6, 184_000.0].map(number);
        assert_eq!(shown, ["0", "0.12", "10.0", "12.3", "100", "123", "1,000", "184,000"]);
    }
}
