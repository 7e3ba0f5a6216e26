//! How long a pod waits for the first answer of another, to which no tunnel is there yet; and for the next one's.

use anyhow::Result;

use crate::load::requests::first_answer;
use crate::measure::{Scale, Values};
use crate::topology::{Path, Topology};

pub(super) fn measure(topology: &mut Topology, path: Path, scale: Scale) -> Result<Values> {
    let mut values = Vec::new();
    for _ in 0..scale.newcomers {
        let newcomer = if path == Path::Culvert { Some(topology.newcomer()?) } else { None };
        let (from, to) = topology.ends(path)?;
        let from = &newcomer.as_ref().unwrap_or(from).netns;
        for key in ["first", "next"] {
            values.push((key, first_answer(from, to.v4)?.as_secs_f64() * 1e3));
        }
    }
    Ok(values)
}
