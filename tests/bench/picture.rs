//! The results as a picture for the README: what is left of a direct connection's speed, what it costs beside a peer, and what a large
//! mesh costs beside what it may.

use std::fmt::Write as _;

use crate::facts::Facts;
use crate::results::Measured;
use crate::rows::{Better, Bound, Figure};
use crate::table::{number, plain};
use crate::topology::Path;

const WIDTH: f64 = 980.0;
/// Where bars begin, how long one of the value 1 is and how long one may be, and where its text begins.
const LEFT: f64 = 310.0;
const UNIT: f64 = 380.0;
const LONGEST: f64 = UNIT * 1.12;
const TEXT: f64 = LEFT + LONGEST + 12.0;
const BAR: f64 = 16.0;
const STEP: f64 = 27.0;

/// One bar.
#[derive(Debug)]
struct Bar {
    label: String,
    /// Its length, as a share of the unit; and where the marks of goal and peer stand.
    share: f64,
    goal: Option<f64>,
    peer: Option<f64>,
    text: String,
}

/// The whole picture, in SVG. It goes with a light page and with a dark one.
pub(crate) fn render(facts: &Facts, measured: &[Measured]) -> String {
    let speed = bars(measured, speed_bar);
    let cost = bars(measured, cost_bar);
    let scale = bars(measured, scale_bar);
    let mut body = String::new();
    let mut y = 34.0;
    text(&mut body, 16.0, y, "title", &format!("Culvert {}: {} × {}", facts.commit, facts.processors, facts.processor));
    if !speed.is_empty() {
        y = panel(&mut body, y + 32.0, "Speed, as a share of a direct connection's: more is better", "direct", &speed);
    }
    if !cost.is_empty() {
        y = panel(&mut body, y + 36.0, "Cost, as a share of a well-known peer's: less is better", "peer", &cost);
    }
    if !scale.is_empty() {
        y = panel(&mut body, y + 36.0, "A large mesh, as a share of the target: less is better", "target", &scale);
    }
    legend(&mut body, y + 22.0);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" \
         font-family=\"system-ui, sans-serif\" font-size=\"13\">\n<style>{STYLE}</style>\n\
         <rect class=\"page\" width=\"{WIDTH}\" height=\"{height}\" rx=\"8\"/>\n{body}</svg>\n",
        height = y + 40.0,
    )
}

const STYLE: &str = ".page{fill:#fff}text{fill:#1f2328}.title{font-weight:600;font-size:15px}.head{font-weight:600}\
    .value,.legend{fill:#59636e}.rail{fill:#eef1f4}.bar{fill:#2f7d5b}.goal{stroke:#1f2328;stroke-width:2}\
    .peer{stroke:#c4662d;stroke-width:2;stroke-dasharray:3 2}.one{stroke:#b7bfc8}\
    @media (prefers-color-scheme:dark){.page{fill:#0d1117}text{fill:#e6edf3}.value,.legend{fill:#9198a1}.rail{fill:#1c2229}\
    .bar{fill:#4fae85}.goal{stroke:#e6edf3}.peer{stroke:#f0883e}.one{stroke:#3d444d}}";

fn bars(measured: &[Measured], bar: impl Fn(&Measured, &Figure, Path) -> Option<Bar>) -> Vec<Bar> {
    let mut bars = Vec::new();
    for measured in measured {
        for path in measured.paths() {
            bars.extend(measured.row.figures.iter().filter_map(|figure| bar(measured, figure, path)));
        }
    }
    bars
}

/// Figures of which more is better, beside direct.
fn speed_bar(measured: &Measured, figure: &Figure, path: Path) -> Option<Bar> {
    let wanted = figure.better == Better::More && matches!(figure.goal, Some(Bound::Ratio(_)));
    let ratio = measured.ratio(figure, path).filter(|_| wanted)?.median;
    let mark = |bound| match bound {
        Some(Bound::Ratio(ratio)) => Some(ratio),
        Some(Bound::Value(_)) | None => None,
    };
    let value = number(measured.spread(figure, path)?.median);
    Some(Bar {
        label: label(measured, figure, path),
        share: ratio,
        goal: mark(figure.goal),
        peer: mark(figure.peer),
        text: format!("{ratio:.2} · {value} {}", figure.unit),
    })
}

/// Figures of which less is better, beside the peer's.
fn cost_bar(measured: &Measured, figure: &Figure, path: Path) -> Option<Bar> {
    let (Some(Bound::Value(goal)), Some(Bound::Value(peer)), Better::Less) = (figure.goal, figure.peer, figure.better) else {
        return None;
    };
    let value = measured.spread(figure, path)?.median;
    Some(Bar {
        label: label(measured, figure, path),
        share: value / peer,
        goal: Some(goal / peer),
        peer: None,
        text: format!("{:.2} · {} {}, peer {}", value / peer, number(value), figure.unit, plain(Bound::Value(peer))),
    })
}

/// Figures of which less is better that no peer's are known of, beside the goal.
fn scale_bar(measured: &Measured, figure: &Figure, path: Path) -> Option<Bar> {
    let (Some(Bound::Value(goal)), None, Better::Less) = (figure.goal, figure.peer, figure.better) else { return None };
    let value = measured.spread(figure, path)?.median;
    Some(Bar {
        label: label(measured, figure, path),
        share: value / goal,
        goal: None,
        peer: None,
        text: format!("{:.2} · {} {}, target {}", value / goal, number(value), figure.unit, plain(Bound::Value(goal))),
    })
}

fn label(measured: &Measured, figure: &Figure, path: Path) -> String {
    // What is indented in the table belongs to the line above it that is not.
    let up_to = measured.row.figures.iter().take_while(|other| other.key != figure.key);
    let above = up_to.filter(|other| !other.title.starts_with(' ')).last().filter(|_| figure.title.starts_with(' '));
    let above = above.map(|above| above.title);
    let place = if measured.row.base == Some(Path::DirectSameNode) { "same node" } else { path.about() };
    let words = [above.unwrap_or_default(), figure.title.trim(), place];
    words.into_iter().filter(|words| !words.is_empty()).collect::<Vec<_>>().join(", ")
}

/// A heading and its bars; gives the place below them.
fn panel(body: &mut String, top: f64, heading: &str, unit: &str, bars: &[Bar]) -> f64 {
    text(body, 16.0, top, "head", heading);
    let (first, one) = (top + 26.0, LEFT + UNIT);
    let last = first + STEP * bars.len() as f64;
    let _infallible = write!(
        body,
        "<line class=\"one\" x1=\"{one}\" x2=\"{one}\" y1=\"{first}\" y2=\"{}\"/>\n\
         <text class=\"legend\" x=\"{one}\" y=\"{}\" text-anchor=\"middle\">{unit} = 1</text>\n",
        last - STEP + BAR + 4.0,
        first - 6.0,
    );
    for (number, bar) in bars.iter().enumerate() {
        let y = first + STEP * number as f64;
        let middle = y + BAR / 2.0 + 4.5;
        // What is longer is cut; its text says how long it is.
        let length = (bar.share * UNIT).clamp(1.0, LONGEST);
        let _infallible = write!(
            body,
            "<text x=\"{}\" y=\"{middle}\" text-anchor=\"end\">{}</text>\
             <rect class=\"rail\" x=\"{LEFT}\" y=\"{y}\" width=\"{UNIT}\" height=\"{BAR}\"/>\
             <rect class=\"bar\" x=\"{LEFT}\" y=\"{y}\" width=\"{length:.1}\" height=\"{BAR}\"/>",
            LEFT - 10.0,
            escaped(&bar.label),
        );
        mark(body, "goal", bar.goal, y);
        mark(body, "peer", bar.peer, y);
        text(body, TEXT, middle, "value", &bar.text);
    }
    last
}

fn mark(body: &mut String, class: &str, share: Option<f64>, y: f64) {
    let Some(x) = share.map(|share| LEFT + share * UNIT) else { return };
    let _infallible =
        write!(body, "<line class=\"{class}\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{}\" y2=\"{}\"/>", y - 3.0, y + BAR + 3.0);
}

fn legend(body: &mut String, y: f64) {
    for (x, class, meaning) in [(LEFT, "goal", "target"), (LEFT + 90.0, "peer", "a well-known peer doing the same job")] {
        let _infallible = write!(body, "<line class=\"{class}\" x1=\"{x}\" x2=\"{x}\" y1=\"{}\" y2=\"{}\"/>", y - 12.0, y + 2.0);
        text(body, x + 8.0, y, "legend", meaning);
    }
}

fn text(body: &mut String, x: f64, y: f64, class: &str, text: &str) {
    let _infallible = writeln!(body, "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\">{}</text>", escaped(text));
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::Sample;
    use crate::rows::ROWS;

    fn measured(row: &str, values: &[(&'static str, [f64; 2])]) -> Measured {
        let row = ROWS.iter().find(|known| known.name == row).expect("a row");
        let paths = row.base.into_iter().chain([row.paths[0]]).zip(if row.base.is_some() { [0, 1] } else { [1, 0] });
        let sample = |(path, at): (Path, usize)| Sample {
            path,
            round: 0,
            values: values.iter().map(|(key, both)| (*key, both[at])).collect(),
        };
        Measured { row, samples: paths.map(sample).collect() }
    }

    #[test]
    fn each_kind_of_figure_has_a_bar_of_its_share() {
        let all = [
            measured("stream-1-up", &[("rate", [40.0, 20.0]), ("agents_cpu", [0.0, 0.475])]),
            measured("mesh-size", &[("held_200000", [0.0, 75.0]), ("peak_200000", [0.0, 90.0])]),
            measured("memory", &[("each_of_most_a", [0.0, 3.5])]),
        ];
        let svg = render(&Facts::collect(), &all);
        for text in
            ["0.50 · 20.0 Gbit/s", "0.50 · 0.47 s/GB, peer 0.95", "0.50 · 75.0 MB, target 150", "0.50 · 3.50 KiB each, peer 7"]
        {
            assert!(svg.contains(text), "{text} is not in {svg}");
        }
        assert_eq!(svg.matches("class=\"bar\"").count(), 4, "what has neither a ratio nor a bound has no bar");
        assert_eq!(svg.matches(&format!("width=\"{:.1}\"", UNIT / 2.0)).count(), 4);
        assert!(svg.contains(">1 stream to the server, both agents' CPU<"), "what is below a line is named after it");
    }

    #[test]
    fn a_bar_that_is_too_long_is_cut_and_text_cannot_break_the_picture() {
        let svg = render(&Facts::collect(), &[measured("stream-1-up", &[("rate", [1.0, 9.0])])]);
        assert!(svg.contains(&format!("width=\"{LONGEST:.1}\"")) && svg.contains("9.00 · 9.00 Gbit/s"));
        assert_eq!(escaped("a < b & c"), "a &lt; b &amp; c");
    }
}
