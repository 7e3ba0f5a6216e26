//! The results for programs: every value of every round.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::facts::Facts;
use crate::results::{Measured, Spread};
use crate::rows::{Better, Bound};
use crate::topology::Path;

/// Everything as one object.
pub(crate) fn document(facts: &Facts, measured: &[Measured]) -> Value {
    json!({ "machine": facts.to_json(), "rows": measured.iter().map(row).collect::<Vec<_>>() })
}

fn row(measured: &Measured) -> Value {
    let figures = measured.row.figures.iter().map(|figure| {
        let path = |path: &Path| {
            let values = json!({
                "values": measured.values(figure, *path),
                "spread": measured.spread(figure, *path).map(spread),
                "ratio": measured.ratio(figure, *path).map(spread),
                "reached": figure.goal.and_then(|goal| measured.reached(figure, *path, goal)),
            });
            (path.name().to_owned(), values)
        };
        let paths: serde_json::Map<String, Value> = measured.row.base.iter().chain(&measured.paths()).map(path).collect();
        json!({
            "key": figure.key,
            "title": figure.title.trim(),
            "unit": figure.unit,
            "better": match figure.better { Better::More => "more", Better::Less => "less" },
            "goal": figure.goal.map(bound),
            "peer": figure.peer.map(bound),
            "paths": paths,
        })
    });
    let samples = measured.samples.iter().map(|sample| {
        let mut values: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
        for (key, value) in &sample.values {
            values.entry(key).or_default().push(*value);
        }
        json!({ "path": sample.path.name(), "round": sample.round, "values": values })
    });
    json!({
        "name": measured.row.name,
        "group": measured.row.group,
        "base": measured.row.base.map(Path::name),
        "figures": figures.collect::<Vec<_>>(),
        "rounds": samples.collect::<Vec<_>>(),
    })
}

fn spread(spread: Spread) -> Value {
    json!({ "median": spread.median, "least": spread.least, "most": spread.most })
}

fn bound(bound: Bound) -> Value {
    match bound {
        Bound::Ratio(ratio) => json!({ "ratio": ratio }),
        Bound::Value(value) => json!({ "value": value }),
    }
}
