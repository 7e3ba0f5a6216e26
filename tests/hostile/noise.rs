//! Bytes that are wrong in ways that parsers trip over.

use rand::Rng as _;
use rand::rngs::StdRng;

use harness::http2::{self, kind};

/// Between 1 and `longest` random bytes, short ones as likely as long ones.
pub(super) fn bytes(random: &mut StdRng, longest: usize) -> Vec<u8> {
    let bound = 1 << random.random_range(0..=longest.ilog2());
    let mut bytes = vec![0; random.random_range(1..=bound)];
    random.fill(&mut bytes[..]);
    bytes
}

/// The same with some of its bits turned, and some of its bytes doubled or gone.
pub(super) fn mutated(random: &mut StdRng, honest: &[u8]) -> Vec<u8> {
    let mut bytes = honest.to_vec();
    for _ in 0..random.random_range(1..=8) {
        if bytes.is_empty() {
            break;
        }
        let at = random.random_range(0..bytes.len());
        match random.random_range(0..6) {
            0 => drop(bytes.remove(at)),
            1 => bytes.insert(at, random.random()),
            2 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][random.random_range(0..5)],
            _ => bytes[at] ^= 1 << random.random_range(0..8),
        }
    }
    bytes
}

/// What stands where a TLS client begins: `hello` is an honest one.
pub(super) fn handshake(random: &mut StdRng, hello: &[u8]) -> Vec<u8> {
    match random.random_range(0..6) {
        0 => bytes(random, 1 << 15),
        1 => hello[..random.random_range(0..hello.len())].to_vec(),
        2 => mutated(random, hello),
        3 => {
            // A record that lies about its length.
            let mut record = vec![random.random_range(20..=24), 3, 3];
            record.extend(random.random::<u16>().to_be_bytes());
            record.extend(bytes(random, 1 << 12));
            record
        }
        4 => [hello, &bytes(random, 1 << 12)].concat(),
        // The same in records of one byte each.
        _ => hello[5..].iter().flat_map(|byte| [22, 3, 1, 0, 1, *byte]).collect(),
    }
}

/// An HTTP/2 connection from its preface on, most frames of it wrong in some way.
pub(super) fn http2(random: &mut StdRng, honest: &[u8]) -> Vec<u8> {
    let mut all = http2::PREFACE.to_vec();
    if random.random_ratio(1, 16) {
        all = mutated(random, &all);
    }
    all.extend(http2::frame(kind::SETTINGS, 0, 0, &[]));
    for _ in 0..random.random_range(1..30) {
        let stream = [0, 1, 1, 3, 2, 0x7fff_ffff, random.random()][random.random_range(0..7)];
        let flags = if random.random() { random.random() } else { http2::END_HEADERS };
        let mut frame = match random.random_range(0..8) {
            0 => http2::frame(random.random(), flags, stream, &bytes(random, 1 << 10)),
            1 => http2::frame(kind::HEADERS, flags, stream, &bytes(random, 1 << 10)),
            2 => http2::frame(kind::DATA, flags, stream, &bytes(random, 1 << 14)),
            3 => http2::frame(kind::WINDOW_UPDATE, 0, stream, &random.random::<u32>().to_be_bytes()),
            4 => http2::frame(kind::SETTINGS, 0, 0, &settings(random)),
            5 => http2::frame(kind::RST_STREAM, 0, stream, &random.random::<u32>().to_be_bytes()),
            6 => http2::frame(kind::CONTINUATION, flags, stream, honest),
            _ => http2::frame(kind::HEADERS, flags, stream | 1, honest),
        };
        if random.random_ratio(1, 8) {
            frame = mutated(random, &frame);
        }
        all.extend(frame);
    }
    all
}

fn settings(random: &mut StdRng) -> Vec<u8> {
    let one = |random: &mut StdRng| {
        let mut setting = random.random_range(0_u16..9).to_be_bytes().to_vec();
        setting.extend([0, 1, 0x7fff_ffff, u32::MAX, random.random()][random.random_range(0..5)].to_be_bytes());
        setting
    };
    (0..random.random_range(0..20)).flat_map(|_| one(random)).collect()
}

/// Frames of `culvert/1`, most of them wrong in some way; `open` is an honest OPEN.
pub(super) fn single(random: &mut StdRng, open: &[u8]) -> Vec<u8> {
    let mut all = Vec::new();
    if random.random_ratio(2, 3) {
        all.extend(open);
    }
    for _ in 0..random.random_range(0..12) {
        match random.random_range(0..7) {
            0 => all.extend(bytes(random, 1 << 10)),
            1 => all.extend(mutated(random, open)),
            2 => all.extend(open),
            3 => all.extend([2, 0, 0, 1, random.random()]),
            4 => all.extend([3, 0, 0, 0]),
            // DATA that says it is longer than what comes.
            5 => {
                all.extend([0, random.random(), random.random(), random.random()]);
                all.extend(bytes(random, 1 << 12));
            }
            _ => {
                let data = bytes(random, 1 << 10);
                let [.., high, low] = data.len().to_be_bytes();
                all.extend([0, 0, high, low]);
                all.extend(data);
            }
        }
    }
    all
}

/// A protobuf message of fields that may or may not be there.
pub(super) fn protobuf(random: &mut StdRng) -> Vec<u8> {
    let mut all = Vec::new();
    for _ in 0..random.random_range(0..20) {
        match random.random_range(0..4) {
            0 => all.extend(bytes(random, 64)),
            1 => all.extend(http2::field(random.random_range(1..10), &bytes(random, 1 << 12))),
            2 => all.extend([random.random_range(1_u8..10) << 3, random.random()]),
            _ => {
                let nested = http2::field(random.random_range(1..6), &bytes(random, 256));
                all.extend(http2::field(random.random_range(1..10), &nested));
            }
        }
    }
    all
}
