//! What a client holds, told in few bytes: Culvert's own form of `initial_resource_versions`.
//!
//! Names and versions of a whole mesh are a megabyte for 10,000 pods, and all agents tell them at once when a controller is new. The
//! versions of Culvert's controllers are digests of contents, names included, so that a part of each is enough: one entry [`NAME`] holds
//! them all, and the answer names those that are no more as `#` and their digits among the removed resources. A controller that does not
//! know this form finds no resource of such a name, says that [`NAME`] is no more, and sends everything: the client then knows that
//! nothing else of what it held is left.

use std::collections::HashSet;
use std::fmt::Write as _;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;

/// The name of the entry whose value holds the digests. No resource's name begins so.
pub const NAME: &str = "#versions";
/// How many bytes of a version are told: of a million, two are alike once in 2^57 meshes.
const BYTES: usize = 12;

/// A part of a version, which stands for a resource in one state.
pub type Digest = [u8; BYTES];

/// The part of a version that is told. None of one that is not a digest: 32 hexadecimal digits, in lower case.
#[must_use]
pub fn digest_of(version: &str) -> Option<Digest> {
    (version.len() == 32).then(|| digits(version.get(..2 * BYTES)?)).flatten()
}

/// The value of the entry.
pub fn pack(digests: impl Iterator<Item = Digest>) -> String {
    let bytes: Vec<u8> = digests.flatten().collect();
    STANDARD_NO_PAD.encode(bytes)
}

/// The digests in the value of the entry; none if it is not of the form.
#[must_use]
pub fn unpack(value: &str) -> Option<HashSet<Digest>> {
    let bytes = STANDARD_NO_PAD.decode(value).ok()?;
    let (digests, []) = bytes.as_chunks::<BYTES>() else { return None };
    Some(digests.iter().copied().collect())
}

/// How an answer names what is no more.
#[must_use]
pub fn name_of(digest: Digest) -> String {
    digest.iter().fold("#".to_owned(), |mut name, byte| {
        let _infallible = write!(name, "{byte:02x}");
        name
    })
}

/// What an answer names so.
#[must_use]
pub fn digest_in(name: &str) -> Option<Digest> {
    let text = name.strip_prefix('#')?;
    (text.len() == 2 * BYTES).then(|| digits(text)).flatten()
}

fn digits(text: &str) -> Option<Digest> {
    let mut digest = [0; BYTES];
    for (byte, pair) in digest.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        let digit = |letter: u8| match letter {
            b'0'..=b'9' => Some(letter - b'0'),
            b'a'..=b'f' => Some(letter - b'a' + 10),
            _ => None,
        };
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(digest)
}

#[cfg(test)]
mod tests {
    use super::*;

    const VERSION: &str = "00112233445566778899aabbccddeeff";

    #[test]
    fn what_is_packed_is_there_again() {
        let digests = [VERSION, "ffffffffffffffffffffffffffffffff"].map(|version| digest_of(version).expect("a digest"));
        assert_eq!(unpack(&pack(digests.into_iter())), Some(digests.into()));
        assert_eq!(unpack(&pack(std::iter::empty())), Some(HashSet::new()));
        assert_eq!(digests.map(|digest| digest_in(&name_of(digest))), digests.map(Some));
        assert_eq!(name_of(digests[0]), "#00112233445566778899aabb");
    }

    #[test]
    fn what_is_of_another_form_is_nothing() {
        for version in [
            "",
            "1",
            "00112233445566778899AABBCCDDEEFF",
            "00112233445566778899aabbccddeef",
            "0011223344556677889\u{e9}abbccddeef",
        ] {
            assert_eq!(digest_of(version), None, "{version}");
        }
        for value in ["A", "AAAA", "no base64!", "====", &"A".repeat(17)] {
            assert_eq!(unpack(value), None, "{value}");
        }
        for name in [NAME, "#", "00112233445566778899aabb", "#0011", "#00112233445566778899aabg", "Kubernetes//Pod/shop/web"] {
            assert_eq!(digest_in(name), None, "{name}");
        }
    }
}
