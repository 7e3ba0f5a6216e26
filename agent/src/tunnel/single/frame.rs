//! The frames of `culvert/1`: pure parsing and building, without I/O.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};

use crate::model::CloseReason;

const HEAD: usize = 4;
const DATA: u8 = 0;
const OPEN: u8 = 1;
const ANSWER: u8 = 2;
const FIN: u8 = 3;
/// The fixed part of an OPEN's payload, in bytes.
const OPEN_FIXED: usize = 36;
/// The most bytes of trace context in an OPEN.
const LARGEST_TRACE: usize = 512;

/// A dialler's wish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Open {
    /// The address and port to reach.
    pub destination: SocketAddr,
    /// Who dialled.
    pub source: SocketAddr,
    /// W3C trace context, or empty.
    pub trace: Bytes,
}

/// What a reader of frames finds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    Open(Open),
    Answer(Option<CloseReason>),
    /// Bytes of the stream: a frame's, or as much of it as has come. Never empty.
    Data(Bytes),
    Fin,
}

/// Finds frames in bytes as they come. DATA is passed on as it comes, without waiting for the frame's end.
#[derive(Debug, Default)]
pub(super) struct Frames {
    data_left: usize,
}

impl Frames {
    /// The next piece in `buffer`, which it is taken from; none when more bytes are needed.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidData`] for what is no frame.
    pub(super) fn next(&mut self, buffer: &mut BytesMut) -> io::Result<Option<Piece>> {
        loop {
            if self.data_left > 0 {
                if buffer.is_empty() {
                    return Ok(None);
                }
                let part = buffer.split_to(self.data_left.min(buffer.len())).freeze();
                self.data_left -= part.len();
                return Ok(Some(Piece::Data(part)));
            }
            let Some(&[kind, high, middle, low]) = buffer.first_chunk::<HEAD>() else { return Ok(None) };
            let length = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
            match kind {
                DATA => {
                    buffer.advance(HEAD);
                    self.data_left = length;
                }
                OPEN if (OPEN_FIXED..=OPEN_FIXED + LARGEST_TRACE).contains(&length) => {
                    return Ok(payload(buffer, length).map(|payload| Piece::Open(open(payload))));
                }
                ANSWER if length == 1 => {
                    let Some(mut payload) = payload(buffer, length) else { return Ok(None) };
                    return Ok(Some(Piece::Answer(reason(payload.get_u8())?)));
                }
                FIN if length == 0 => {
                    buffer.advance(HEAD);
                    return Ok(Some(Piece::Fin));
                }
                _ => return Err(invalid(format!("kind {kind} with {length} bytes is no frame"))),
            }
        }
    }

    /// Whether no DATA frame is half read.
    pub(super) fn between(&self) -> bool {
        self.data_left == 0
    }
}

impl Open {
    pub(super) fn encode(&self) -> BytesMut {
        let trace = &self.trace[..self.trace.len().min(LARGEST_TRACE)];
        let mut frame = head(OPEN, OPEN_FIXED + trace.len());
        for end in [self.destination, self.source] {
            frame.put_u16(end.port());
            let address = match end.ip() {
                IpAddr::V4(address) => address.to_ipv6_mapped(),
                IpAddr::V6(address) => address,
            };
            frame.put_slice(&address.octets());
        }
        frame.put_slice(trace);
        frame
    }
}

/// The head of a DATA frame of `length` bytes, which must fit 24 bits.
pub(super) fn data_head(length: usize) -> [u8; HEAD] {
    let [.., high, middle, low] = length.to_be_bytes();
    [DATA, high, middle, low]
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

/// The payload of the frame at the buffer's front, once all of it has come.
fn payload(buffer: &mut BytesMut, length: usize) -> Option<BytesMut> {
    if buffer.len() < HEAD + length {
        return None;
    }
    buffer.advance(HEAD);
    Some(buffer.split_to(length))
}

fn open(mut payload: BytesMut) -> Open {
    let mut end = || {
        let port = payload.get_u16();
        SocketAddr::new(Ipv6Addr::from(payload.get_u128()).to_canonical(), port)
    };
    let (destination, source) = (end(), end());
    Open { destination, source, trace: payload.freeze() }
}

/// The number of an answer on the wire. Numbers are never given twice.
fn code(refused: Option<CloseReason>) -> u8 {
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pieces(frames: &mut Frames, buffer: &mut BytesMut) -> io::Result<Vec<Piece>> {
        std::iter::from_fn(|| frames.next(buffer).transpose()).collect()
    }

    #[test]
    fn an_open_survives_the_wire() {
        let open = Open {
            destination: "10.0.0.1:80".parse().unwrap(),
            source: "[fd00::7]:4711".parse().unwrap(),
            trace: Bytes::from_static(b"00-abc"),
        };
        let found = pieces(&mut Frames::default(), &mut open.encode()).unwrap();
        assert_eq!(found, [Piece::Open(open)]);
    }

    #[test]
    fn every_refusal_survives_the_wire_or_reads_as_a_failed_tunnel() {
        for reason in CloseReason::ALL {
            let found = pieces(&mut Frames::default(), &mut answer(Some(reason))).unwrap();
            assert!(
                found == [Piece::Answer(Some(reason))] || found == [Piece::Answer(Some(CloseReason::TunnelFailed))],
                "{reason}"
            );
        }
        assert_eq!(pieces(&mut Frames::default(), &mut answer(None)).unwrap(), [Piece::Answer(None)]);
    }

    #[test]
    fn what_is_no_frame_is_refused() {
        for bytes in [[4, 0, 0, 0, 0], [1, 0, 0, 1, 0], [2, 0, 0, 2, 0], [3, 0, 0, 1, 0], [2, 0, 0, 1, 99]] {
            assert!(pieces(&mut Frames::default(), &mut BytesMut::from(&bytes[..])).is_err(), "{bytes:?}");
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
            let (mut frames, mut buffer, mut seen, mut fins) = (Frames::default(), BytesMut::new(), Vec::new(), 0);
            let mut cuts = cuts.into_iter().cycle();
            while !wire.is_empty() {
                let cut = cuts.next().expect("a cycle").min(wire.len());
                buffer.unsplit(wire.split_to(cut));
                for piece in pieces(&mut frames, &mut buffer).expect("legal frames") {
                    match piece {
                        Piece::Data(bytes) => { prop_assert!(!bytes.is_empty()); seen.extend_from_slice(&bytes) }
                        Piece::Fin => fins += 1,
                        other => prop_assert!(false, "{other:?}"),
                    }
                }
            }
            prop_assert_eq!(seen, chunks.concat());
            prop_assert_eq!((fins, frames.between()), (1, true));
        }

        #[test]
        fn foreign_bytes_never_panic_and_never_grow_the_buffer(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            let mut buffer = BytesMut::from(&bytes[..]);
            let _answer = pieces(&mut Frames::default(), &mut buffer);
            prop_assert!(buffer.len() <= bytes.len());
        }
    }
}
