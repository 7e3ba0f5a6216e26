//! TLS 1.3 records after the handshake (RFC 8446, section 5): sealed and opened where they lie, without I/O.
//!
//! rustls makes the connection and its keys; what it hands out then is used here with the same library's AES-GCM, because its own
//! record layer copies every byte twice. Enters: plaintext in the place where its record will be, or a record as it came. Leaves:
//! the record, or its plaintext in place. Keys are changed long before they are worn out.

use std::fmt;
use std::io;
use std::ops::Range;

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, Nonce, TlsProtocolId, TlsRecordOpeningKey, TlsRecordSealingKey};
use rustls::{AlertDescription, ConnectionTrafficSecrets, ContentType};

use crate::relay::buffer::RECORD;

/// A record's head: its type, version and length.
pub(super) const HEAD: usize = 5;
/// What stands behind a record's payload: the true type of its content, and the tag.
pub(super) const TAIL: usize = 1 + 16;
/// The most payload that one record carries (RFC 8446, section 5.1).
pub(super) const LARGEST_PAYLOAD: usize = 1 << 14;
/// After so many records a key is changed: AES-GCM's bound is 2^24.5 full records (RFC 8446, section 5.5). Soon, in tests.
const KEY_LIFE: u64 = if cfg!(test) { 50 } else { 1 << 23 };

const APPLICATION_DATA: u8 = 23;

/// Seals records, in order.
pub(super) struct Sealer {
    key: TlsRecordSealingKey,
    iv: [u8; 12],
    sequence: u64,
}

/// Opens records, in order.
pub(super) struct Opener {
    key: TlsRecordOpeningKey,
    iv: [u8; 12],
    sequence: u64,
}

/// A record that was opened.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Opened {
    pub(super) content: ContentType,
    /// Where its payload lies, from the record's start.
    pub(super) payload: Range<usize>,
}

/// The keys that were agreed on are of no kind that is offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the keys agreed on are not of AES-GCM, or not new")]
pub(super) struct UnusableKeys;

/// Why a connection cannot go on after its handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Unusable {
    #[error(transparent)]
    Keys(#[from] UnusableKeys),
    /// No peer of ours sends so much before it has been answered.
    #[error("{0} bytes have come behind the handshake, more than are kept")]
    TooMuch(usize),
}

impl Sealer {
    /// Seals with these keys, from their first record on.
    pub(super) fn new((sequence, secrets): &(u64, ConnectionTrafficSecrets)) -> Result<Self, UnusableKeys> {
        let (algorithm, key, iv) = parts(secrets).ok_or(UnusableKeys)?;
        if *sequence != 0 {
            return Err(UnusableKeys);
        }
        let key = TlsRecordSealingKey::new(algorithm, TlsProtocolId::TLS13, key).map_err(|_unspecified| UnusableKeys)?;
        Ok(Self { key, iv, sequence: 0 })
    }

    /// Makes a record of the `payload` bytes that lie behind the place of its head. `record` is exactly as long as the record.
    pub(super) fn seal(&mut self, content: ContentType, record: &mut [u8]) -> io::Result<()> {
        let body = record.len() - HEAD;
        let head = head(body);
        let (head_place, rest) = record.split_at_mut(HEAD);
        head_place.copy_from_slice(&head);
        let (plaintext, tag_place) = rest.split_at_mut(body - TAIL + 1);
        if let Some(last) = plaintext.last_mut() {
            *last = content.into();
        }
        let nonce = nonce(&self.iv, self.sequence);
        let tag = self.key.seal_in_place_separate_tag(nonce, Aad::from(head), plaintext);
        let tag = tag.map_err(|_unspecified| io::Error::other("the cipher refuses to seal: the key is worn out"))?;
        tag_place.copy_from_slice(tag.as_ref());
        self.sequence += 1;
        Ok(())
    }

    /// Whether the key has sealed as much as it should.
    pub(super) fn worn(&self) -> bool {
        self.sequence >= KEY_LIFE
    }
}

impl Opener {
    /// Opens with these keys.
    pub(super) fn new((sequence, secrets): &(u64, ConnectionTrafficSecrets)) -> Result<Self, UnusableKeys> {
        let (algorithm, key, iv) = parts(secrets).ok_or(UnusableKeys)?;
        let key = TlsRecordOpeningKey::new(algorithm, TlsProtocolId::TLS13, key).map_err(|_unspecified| UnusableKeys)?;
        Ok(Self { key, iv, sequence: *sequence })
    }

    /// Opens one whole record.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidData`] when it was not sealed by the peer, or is no legal record.
    pub(super) fn open(&mut self, record: &mut [u8]) -> io::Result<Opened> {
        let (head, body) = record.split_at_mut(HEAD);
        if head[0] != APPLICATION_DATA {
            return Err(invalid(format_args!("a record of type {} came where all are encrypted", head[0])));
        }
        let Ok(aad) = <[u8; HEAD]>::try_from(&*head) else { return Err(invalid(format_args!("a record without a head"))) };
        let plaintext = self.key.open_in_place(nonce(&self.iv, self.sequence), Aad::from(aad), body);
        let plaintext = plaintext.map_err(|_unspecified| invalid(format_args!("a record that does not verify")))?;
        self.sequence += 1;
        // The true type is the last byte that is not padding.
        let Some(end) = plaintext.iter().rposition(|byte| *byte != 0) else {
            return Err(invalid(format_args!("a record without a type")));
        };
        if end > LARGEST_PAYLOAD {
            return Err(invalid(format_args!("a record with {end} bytes of payload")));
        }
        Ok(Opened { content: ContentType::from(plaintext[end]), payload: HEAD..HEAD + end })
    }
}

/// The length of the record at the front of `bytes`, head included; none while its head has not come.
///
/// # Errors
/// [`io::ErrorKind::InvalidData`] for a length that no record has.
pub(super) fn length(bytes: &[u8]) -> io::Result<Option<usize>> {
    let Some(&[_, _, _, high, low]) = bytes.first_chunk::<HEAD>() else { return Ok(None) };
    let length = HEAD + usize::from(u16::from_be_bytes([high, low]));
    if length > RECORD {
        return Err(invalid(format_args!("a record of {length} bytes")));
    }
    Ok(Some(length))
}

/// What an alert of the peer's says, as an error that [`handshake_fault`](super::tls::handshake_fault) understands; none for the
/// notice that it closes.
pub(super) fn alert(payload: &[u8]) -> Option<io::Error> {
    let description = payload.get(1).map_or(AlertDescription::DecodeError, |byte| AlertDescription::from(*byte));
    (description != AlertDescription::CloseNotify)
        .then(|| io::Error::new(io::ErrorKind::InvalidData, rustls::Error::AlertReceived(description)))
}

pub(super) fn invalid(what: fmt::Arguments<'_>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_string())
}

#[expect(clippy::wildcard_enum_match_arm, reason = "the library's enum grows; no other kind is offered to a peer")]
fn parts(secrets: &ConnectionTrafficSecrets) -> Option<(&'static aws_lc_rs::aead::Algorithm, &[u8], [u8; 12])> {
    let (algorithm, key, iv) = match secrets {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
        ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
        _ => return None,
    };
    Some((algorithm, key.as_ref(), iv.as_ref().try_into().ok()?))
}

fn head(body: usize) -> [u8; HEAD] {
    let [.., high, low] = body.to_be_bytes();
    [APPLICATION_DATA, 3, 3, high, low]
}

/// The nonce of a record (RFC 8446, section 5.3).
fn nonce(iv: &[u8; 12], sequence: u64) -> Nonce {
    let mut nonce = *iv;
    for (byte, of_sequence) in nonce[4..].iter_mut().zip(sequence.to_be_bytes()) {
        *byte ^= of_sequence;
    }
    Nonce::assume_unique_for_key(nonce)
}

impl fmt::Debug for Sealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sealer").field("sequence", &self.sequence).finish_non_exhaustive()
    }
}

impl fmt::Debug for Opener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Opener").field("sequence", &self.sequence).finish_non_exhaustive()
    }
}
