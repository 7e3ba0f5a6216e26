//! Foreign bytes into every parser that is pure, for `cargo xtask fuzz`; a corpus of them is replayed with the unit tests.
//!
//! Enters: any bytes. Leaves: nothing. A parser may refuse what it is given; it must not panic, nor take more than the bytes are worth,
//! and what it accepts must mean the same when it is written and read again.

pub use crate::controller::source::manifests::fuzz as manifests;
pub use crate::discovery::fuzz as discovery;
pub use crate::policy::fuzz as policies;
pub use crate::tunnel::single::fuzz as frames;

/// A SPIFFE ID that is accepted is written as it was read.
///
/// # Panics
/// When it is not.
pub fn spiffe_id(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(id) = text.parse::<crate::model::SpiffeId>() {
        assert_eq!(id.to_string(), text, "a SPIFFE ID changes its form");
        assert_eq!(format!("spiffe://{}", id.principal()), text, "a principal is the SPIFFE ID without its scheme");
    }
}

/// A target's name and its function.
pub type Target = (&'static str, fn(&[u8]));

/// All targets. Each has a directory in `tests/fuzz/corpus` and a file in `tests/fuzz/fuzz_targets`.
pub const TARGETS: [Target; 5] =
    [("frames", frames), ("manifests", manifests), ("policies", policies), ("spiffe_id", spiffe_id), ("discovery", discovery)];

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use rand::rngs::StdRng;
    use rand::{Rng as _, SeedableRng as _};

    use super::*;

    /// How many variants of each of the corpus's texts are tried.
    const VARIANTS: usize = 200;

    fn variant(random: &mut StdRng, bytes: &[u8], other: &[u8]) -> Vec<u8> {
        let mut variant = bytes.to_vec();
        for _ in 0..random.random_range(1..6) {
            let at = random.random_range(0..=variant.len());
            let end = random.random_range(at..=variant.len());
            match random.random_range(0..5) {
                0 => drop(variant.drain(at..end)),
                1 => variant.extend_from_within(at..end),
                2 if at < variant.len() => variant[at] ^= 1 << random.random_range(0..8),
                3 => variant.insert(at, random.random()),
                _ => {
                    let from = random.random_range(0..=other.len());
                    variant.truncate(at);
                    variant.extend(&other[from..]);
                }
            }
        }
        variant
    }

    #[test]
    fn the_corpus_and_its_variants_harm_no_parser() {
        let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz");
        for (name, target) in TARGETS {
            assert!(fuzz.join(format!("fuzz_targets/{name}.rs")).is_file(), "{name} has no file of its own");
            let files = fs::read_dir(fuzz.join("corpus").join(name)).unwrap();
            let mut corpus: Vec<_> = files.map(|file| fs::read(file.unwrap().path()).unwrap()).collect();
            corpus.sort();
            assert!(corpus.len() >= 3, "{name} has a corpus");
            let mut random = StdRng::seed_from_u64(1);
            for bytes in &corpus {
                target(bytes);
                for _ in 0..VARIANTS {
                    let other = &corpus[random.random_range(0..corpus.len())];
                    target(&variant(&mut random, bytes, other));
                }
            }
        }
    }
}
