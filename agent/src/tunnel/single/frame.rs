//! The frames of `culvert/1`: pure parsing and building, without I/O.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::ops::Range;

use bytes::{Buf as _, BufMut as _, BytesMut};

use crate::model::CloseReason;

/// The length of a frame's head, in bytes.
pub(super) const HEAD: usize = 4;
const DATA: u8 = 0;
const OPEN: u8 = 1;
const ANSWER: u8 = 2;
const FIN: u8 = 3;
/// The fixed part of an OPEN's payload, in bytes.
const OPEN_FIXED: usize = 36;
/// The most bytes in an OPEN behind that.
const LARGEST_REST: usize = 512;

/// A dialler's wish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Open {
    /// The address and port to reach.
    pub destination: SocketAddr,
    /// Who dialled.
    pub source: SocketAddr,
    /// The source port of the stream from the same address to the same destination that is to be delivered first.
    pub after: Option<u16>,
}

/// What a reader of frames finds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    Open(Open),
    Answer(Option<CloseReason>),
    /// Bytes of the stream, by where they lie: a frame's, or as much of it as has come. Never empty.
    Data(Range<usize>),
    Fin,
}

/// Finds frames in bytes as they come. DATA is passed on as it comes, without waiting for the frame's end, and never copied.
#[derive(Debug, Default)]
pub(super) struct Frames {
    data_left: usize,
    /// The beginning of a frame, other than DATA's payload.
    begun: Vec<u8>,
}

impl Frames {
    /// The next piece in `bytes`; none when more are needed. Also says how many bytes are spent.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidData`] for what is no frame.
    pub(super) fn next(&mut self, bytes: &[u8]) -> io::Result<(usize, Option<Piece>)> {
        let mut spent = 0;
        loop {
            if self.data_left > 0 && spent < bytes.len() {
                let data = spent..bytes.len().min(spent + self.data_left);
                self.data_left -= data.len();
                return Ok((data.end, Some(Piece::Data(data))));
            }
            let wanted = match self.begun.first_chunk::<HEAD>() {
                None => HEAD,
                Some(head) => HEAD + payload_length(*head)?,
            };
            let part = (wanted - self.begun.len()).min(bytes.len() - spent);
            self.begun.extend_from_slice(&bytes[spent..spent + part]);
            spent += part;
            let Some(&[kind, high, middle, low]) = self.begun.first_chunk::<HEAD>() else { return Ok((spent, None)) };
            if kind == DATA {
                self.begun.clear();
                self.data_left = length(high, middle, low);
                continue;
            }
            if self.begun.len() < HEAD + payload_length([kind, high, middle, low])? {
                if spent == bytes.len() {
                    return Ok((spent, None));
                }
                continue;
            }
            let payload = &self.begun[HEAD..];
            let piece = match kind {
                OPEN => Piece::Open(open(payload)),
                ANSWER => Piece::Answer(reason(payload[0])?),
                _ => Piece::Fin,
            };
            // An OPEN is long, and comes once in a stream.
            self.begun = Vec::new();
            return Ok((spent, Some(piece)));
        }
    }

    /// Whether no frame is half read.
    pub(super) fn between(&self) -> bool {
        self.data_left == 0 && self.begun.is_empty()
    }
}

/// The length of the payload that has to come whole behind this head: none of it, for DATA.
fn payload_length([kind, high, middle, low]: [u8; HEAD]) -> io::Result<usize> {
    match (kind, length(high, middle, low)) {
        (DATA, _) => Ok(0),
        (OPEN, length) if (OPEN_FIXED..=OPEN_FIXED + LARGEST_REST).contains(&length) => Ok(length),
        (ANSWER, 1) => Ok(1),
        (FIN, 0) => Ok(0),
        (kind, length) => Err(invalid(format!("kind {kind} with {length} bytes is no frame"))),
    }
}

fn length(high: u8, middle: u8, low: u8) -> usize {
    usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low)
}

impl Open {
    pub(super) fn encode(&self) -> BytesMut {
        let mut frame = head(OPEN, OPEN_FIXED + self.after.map_or(0, |port| size_of_val(&port)));
        for end in [self.destination, self.source] {
            frame.put_u16(end.port());
            let address = match end.ip() {
                IpAddr::V4(address) => address.to_ipv6_mapped(),
                IpAddr::V6(address) => address,
            };
            frame.put_slice(&address.octets());
        }
        if let Some(port) = self.after {
            frame.put_u16(port);
        }
        frame
    }
}

/// The head of a DATA frame of `length` bytes, which must fit 24 bits.
pub(super) fn data_head(length: usize) -> [u8; HEAD] {
    let [.., high, middle, low] = length.to_be_bytes();
    [DATA, high, middle, low]
}

/// An answer that the destination is connected, and behind it the head of a DATA frame of `length` bytes.
pub(super) fn connected_and_data_head(length: usize) -> [u8; HEAD + 1 + HEAD] {
    let [kind, high, middle, low] = data_head(length);
    [ANSWER, 0, 0, 1, code(None), kind, high, middle, low]
}

pub(super) fn answer(refused: Option<CloseReason>) -> BytesMut {
    let mut frame = head(ANSWER, 1);
    frame.put_u8(code(refused));
    frame
}

pub(super) fn fin() -> BytesMut {
    head(FIN, 0)
}

fn head(kind: u8, length: usize) -> BytesMut {
    let mut frame = BytesMut::with_capacity(HEAD + length);
    let [_, high, middle, low] = data_head(length);
    frame.put_slice(&[kind, high, middle, low]);
    frame
}

fn open(mut payload: &[u8]) -> Open {
    let mut end = || {
        let port = payload.get_u16();
        SocketAddr::new(Ipv6Addr::from(payload.get_u128()).to_canonical(), port)
    };
    let (destination, source) = (end(), end());
    Open { destination, source, after: payload.try_get_u16().ok() }
}

/// The number of an answer on the wire. Numbers are never given twice.
const fn code(refused: Option<CloseReason>) -> u8 {
    match refused {
        None => 0,
        Some(CloseReason::DestinationRefused) => 1,
        Some(CloseReason::DestinationUnreachable) => 2,
        Some(CloseReason::NoEndpoint) => 3,
        Some(CloseReason::PolicyDenied) => 4,
        Some(CloseReason::BadRequest) => 5,
        Some(CloseReason::Overloaded) => 6,
        Some(CloseReason::Draining) => 7,
        Some(CloseReason::PodGone) => 8,
        Some(CloseReason::PlaintextRefused) => 9,
        Some(CloseReason::PolicyChanged) => 10,
        Some(
            CloseReason::Finished
            | CloseReason::SourceReset
            | CloseReason::DestinationReset
            | CloseReason::PeerNotAuthenticated
            | CloseReason::TunnelFailed
            | CloseReason::NoIdentity
            | CloseReason::NoOriginalDst,
        ) => 255,
    }
}

/// What an answer's number means. One that is not known is a failure of the tunnel's other end.
fn reason(code: u8) -> io::Result<Option<CloseReason>> {
    Ok(match code {
        0 => None,
        1 => Some(CloseReason::DestinationRefused),
        2 => Some(CloseReason::DestinationUnreachable),
        3 => Some(CloseReason::NoEndpoint),
        4 => Some(CloseReason::PolicyDenied),
        5 => Some(CloseReason::BadRequest),
        6 => Some(CloseReason::Overloaded),
        7 => Some(CloseReason::Draining),
        8 => Some(CloseReason::PodGone),
        9 => Some(CloseReason::PlaintextRefused),
        10 => Some(CloseReason::PolicyChanged),
        255 => Some(CloseReason::TunnelFailed),
        _ => return Err(invalid(format!("{code} is no answer"))),
    })
}

fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Takes foreign bytes for frames, as they come in one piece and byte by byte: both must find the same.
///
/// # Panics
/// When they do not.
#[cfg(any(test, feature = "fuzz"))]
pub fn fuzz(bytes: &[u8]) {
    let mut whole = Found::default();
    whole.read(bytes);
    let mut parts = Found::default();
    for byte in bytes.chunks(1) {
        parts.read(byte);
        assert!(parts.frames.begun.len() <= HEAD + OPEN_FIXED + LARGEST_REST, "more is kept than a frame can have");
    }
    assert_eq!((whole.pieces, whole.ended), (parts.pieces, parts.ended), "how bytes are cut shows");
}

/// What was found in foreign bytes: DATA that follows DATA is one.
#[cfg(any(test, feature = "fuzz"))]
#[derive(Default)]
struct Found {
    frames: Frames,
    pieces: Vec<(Option<Piece>, Vec<u8>)>,
    ended: bool,
}

#[cfg(any(test, feature = "fuzz"))]
impl Found {
    fn read(&mut self, mut bytes: &[u8]) {
        while !self.ended {
            let (spent, piece) = match self.frames.next(bytes) {
                Ok((spent, Some(piece))) => (spent, piece),
                Ok((spent, None)) => return assert_eq!(spent, bytes.len(), "bytes are left over"),
                Err(_no_frame) => return self.ended = true,
            };
            match (piece, self.pieces.last_mut()) {
                (Piece::Data(data), Some((None, before))) => before.extend(&bytes[data]),
                (Piece::Data(data), _) => self.pieces.push((None, bytes[data].to_vec())),
                (piece, _) => self.pieces.push((Some(piece), Vec::new())),
            }
            bytes = &bytes[spent..];
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pieces(frames: &mut Frames, mut bytes: &[u8]) -> io::Result<Vec<(Piece, Vec<u8>)>> {
        let mut found = Vec::new();
        loop {
            let (spent, piece) = frames.next(bytes)?;
            let Some(piece) = piece else {
                assert_eq!(spent, bytes.len(), "all bytes are looked at");
                return Ok(found);
            };
            let data = if let Piece::Data(data) = &piece { bytes[data.clone()].to_vec() } else { Vec::new() };
            found.push((piece, data));
            bytes = &bytes[spent..];
        }
    }

    fn one(bytes: &[u8]) -> Piece {
        let mut found = pieces(&mut Frames::default(), bytes).unwrap();
        assert_eq!(found.len(), 1);
        found.remove(0).0
    }

    #[test]
    fn an_open_survives_the_wire() {
        let first = Open::new("[fd00::7]:4711".parse().unwrap(), "10.0.0.1:80".parse().unwrap());
        let open = Open { after: Some(4710), ..first.clone() };
        assert_eq!((one(&first.encode()), one(&open.encode())), (Piece::Open(first.clone()), Piece::Open(open.clone())));
        // Of what a later version may say behind that, nothing is understood and nothing taken amiss.
        let mut later = head(OPEN, OPEN_FIXED + 5);
        later.put_slice(&open.encode()[HEAD..]);
        later.put_slice(b"new");
        assert_eq!(one(&later), Piece::Open(open.clone()));
        let (mut frames, wire) = (Frames::default(), open.encode());
        let found: Vec<_> = wire.chunks(1).flat_map(|byte| pieces(&mut frames, byte).unwrap()).collect();
        assert_eq!(found, [(Piece::Open(open), Vec::new())], "also byte by byte");
    }

    #[test]
    fn every_refusal_survives_the_wire_or_reads_as_a_failed_tunnel() {
        for reason in CloseReason::ALL {
            let found = one(&answer(Some(reason)));
            assert!(found == Piece::Answer(Some(reason)) || found == Piece::Answer(Some(CloseReason::TunnelFailed)), "{reason}");
        }
        assert_eq!(one(&answer(None)), Piece::Answer(None));
    }

    #[test]
    fn what_is_no_frame_is_refused() {
        for bytes in [[4, 0, 0, 0, 0], [1, 0, 0, 1, 0], [2, 0, 0, 2, 0], [3, 0, 0, 1, 0], [2, 0, 0, 1, 99]] {
            assert!(pieces(&mut Frames::default(), &bytes).is_err(), "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn data_is_the_same_however_it_is_cut(
            chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..8),
            cuts in prop::collection::vec(1_usize..40, 1..100),
        ) {
            let mut wire = BytesMut::new();
            for chunk in &chunks {
                wire.put_slice(&data_head(chunk.len()));
                wire.put_slice(chunk);
            }
            wire.put_slice(&fin());
            let (mut frames, mut seen, mut fins) = (Frames::default(), Vec::new(), 0);
            let mut cuts = cuts.into_iter().cycle();
            while !wire.is_empty() {
                let cut = cuts.next().expect("a cycle").min(wire.len());
                for (piece, data) in pieces(&mut frames, &wire.split_to(cut)).expect("legal frames") {
                    match piece {
                        Piece::Data(_) => { prop_assert!(!data.is_empty()); seen.extend_from_slice(&data) }
                        Piece::Fin => fins += 1,
                        Piece::Open(_) | Piece::Answer(_) => prop_assert!(false, "{piece:?}"),
                    }
                }
            }
            prop_assert_eq!(seen, chunks.concat());
            prop_assert_eq!((fins, frames.between()), (1, true));
        }

        #[test]
        fn foreign_bytes_never_panic_and_little_of_them_is_kept(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            let mut frames = Frames::default();
            let _answer = pieces(&mut frames, &bytes);
            prop_assert!(frames.begun.len() <= HEAD + OPEN_FIXED + LARGEST_REST);
        }
    }
}
