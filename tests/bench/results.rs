//! What was measured, and what it comes to: medians, ranges and ratios.

use crate::measure::Values;
use crate::rows::{Better, Bound, Figure, Row};
use crate::topology::Path;

/// All values of a row.
#[derive(Debug)]
pub(crate) struct Measured {
    pub(crate) row: &'static Row,
    pub(crate) samples: Vec<Sample>,
}

/// One round on one path.
#[derive(Debug)]
pub(crate) struct Sample {
    pub(crate) path: Path,
    pub(crate) round: usize,
    pub(crate) values: Values,
}

/// The middle of several values and how far they lie apart.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) least: f64,
    pub(crate) most: f64,
}

impl Spread {
    /// Of values in any order; none of none.
    pub(crate) fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (least, most) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 { values[middle] } else { f64::midpoint(values[middle - 1], values[middle]) };
        Some(Self { median, least, most })
    }
}

impl Measured {
    /// The paths that were measured beside the base, in the order in which they were.
    pub(crate) fn paths(&self) -> Vec<Path> {
        let mut paths = Vec::new();
        for sample in self.samples.iter().filter(|sample| Some(sample.path) != self.row.base) {
            if !paths.contains(&sample.path) {
                paths.push(sample.path);
            }
        }
        paths
    }

    /// The values of a figure on a path, by round.
    pub(crate) fn values(&self, figure: &Figure, path: Path) -> Vec<f64> {
        let of_path = self.samples.iter().filter(|sample| sample.path == path);
        of_path.flat_map(|sample| &sample.values).filter(|(key, _)| *key == figure.key).map(|(_, value)| *value).collect()
    }

    /// The same, condensed.
    pub(crate) fn spread(&self, figure: &Figure, path: Path) -> Option<Spread> {
        Spread::of(self.values(figure, path))
    }

    /// A path's values in relation to its base's, each to that of the same round: what slows the machine for a while slows both.
    pub(crate) fn ratio(&self, figure: &Figure, path: Path) -> Option<Spread> {
        let base = self.values(figure, self.row.base?);
        let pairs = self.values(figure, path).into_iter().zip(base).filter(|(_, base)| *base > 0.0);
        Spread::of(pairs.map(|(value, base)| value / base).collect())
    }

    /// Whether a path has reached a bound; none if it cannot be told.
    pub(crate) fn reached(&self, figure: &Figure, path: Path, bound: Bound) -> Option<bool> {
        let (found, wanted) = match bound {
            Bound::Ratio(wanted) => (self.ratio(figure, path)?.median, wanted),
            Bound::Value(wanted) => (self.spread(figure, path)?.median, wanted),
        };
        Some(match figure.better {
            Better::More => found >= wanted,
            Better::Less => found <= wanted,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_or_between_the_two_in_the_middle() {
        let median = |values: &[f64]| Spread::of(values.to_vec()).map(|spread| spread.median);
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }
}
