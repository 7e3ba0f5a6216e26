//! TLS as somebody on the wire can read it: records, and the two hellos (RFC 8446, sections 4.1 and 5.1). All else is sealed.

use std::ops::Range;

use anyhow::{Context as _, Result, bail, ensure};

/// A record of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) kind: Kind,
    /// Where its content is in the stream.
    pub(crate) content: Range<usize>,
}

/// What a record says that it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// For middleboxes of old; it means nothing.
    ChangeCipherSpec,
    Alert,
    /// A hello: all later messages of a handshake are sealed.
    Handshake,
    /// Anything, sealed.
    Sealed,
}

/// What a ClientHello offers, or a ServerHello chooses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Hello {
    pub(crate) versions: Vec<String>,
    pub(crate) suites: Vec<String>,
    pub(crate) key_shares: Vec<String>,
    pub(crate) protocols: Vec<String>,
    pub(crate) names_server: bool,
}

/// The records of a stream, the last of which may be cut off by the end of the capture.
///
/// # Errors
///
/// If the stream is anything but TLS records.
pub(crate) fn records(stream: &[u8]) -> Result<Vec<Record>> {
    let mut records = Vec::new();
    let mut at = 0;
    while let Some(header) = stream.get(at..at + 5) {
        let kind = match header[0] {
            20 => Kind::ChangeCipherSpec,
            21 => Kind::Alert,
            22 => Kind::Handshake,
            23 => Kind::Sealed,
            other => bail!("byte {at} of the stream begins no TLS record: {other:#04x}"),
        };
        ensure!(header[1] == 3 && matches!(header[2], 1 | 3), "byte {at} of the stream begins no TLS record: {header:02x?}");
        let content = at + 5..at + 5 + usize::from(u16::from_be_bytes([header[3], header[4]]));
        ensure!(content.len() <= (1 << 14) + 256, "byte {at} of the stream begins a TLS record of {} bytes", content.len());
        at = content.end;
        records.push(Record { kind, content });
    }
    Ok(records)
}

/// Reads the ClientHello that a stream begins with.
pub(crate) fn client_hello(stream: &[u8]) -> Result<Hello> {
    let mut message = hello(stream, 1)?;
    let _version_and_random = message.take(34)?;
    let _session = message.list(1)?;
    let mut suites = message.list(2)?;
    let mut hello = Hello { suites: suites.numbers(suite)?, ..Hello::default() };
    let _compression = message.list(1)?;
    message.extensions(|kind, mut body| {
        match kind {
            0 => hello.names_server = true,
            16 => {
                let mut names = body.list(2)?;
                while !names.0.is_empty() {
                    hello.protocols.push(String::from_utf8_lossy(names.list(1)?.0).into_owned());
                }
            }
            43 => hello.versions = body.list(1)?.numbers(version)?,
            51 => {
                let mut shares = body.list(2)?;
                while !shares.0.is_empty() {
                    hello.key_shares.push(group(shares.number()?));
                    let _key = shares.list(2)?;
                }
            }
            _ => {}
        }
        Ok(())
    })?;
    Ok(hello)
}

/// Reads the ServerHello that a stream begins with.
pub(crate) fn server_hello(stream: &[u8]) -> Result<Hello> {
    let mut message = hello(stream, 2)?;
    let _version_and_random = message.take(34)?;
    let _session = message.list(1)?;
    let mut hello = Hello { suites: vec![suite(message.number()?)], ..Hello::default() };
    let _compression = message.take(1)?;
    message.extensions(|kind, mut body| {
        match kind {
            43 => hello.versions.push(version(body.number()?)),
            51 => hello.key_shares.push(group(body.number()?)),
            _ => {}
        }
        Ok(())
    })?;
    Ok(hello)
}

/// The first message of a stream, if it is of this type. A hello may take more than one record.
fn hello(stream: &[u8], kind: u8) -> Result<Bytes<'_>> {
    let first = records(stream)?.into_iter().next().context("the stream is empty")?;
    ensure!(first.kind == Kind::Handshake, "the stream does not begin with a handshake");
    let mut message = Bytes(stream.get(first.content).context("the hello was cut off")?);
    let found = message.take(1)?[0];
    ensure!(found == kind, "the first message is of type {found}, not {kind}");
    message.list(3)
}

/// What is left to read.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length).context("a message ends early")?;
        self.0 = rest;
        Ok(taken)
    }

    fn number(&mut self) -> Result<u16> {
        let bytes = self.take(2)?;
        Ok(u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    /// What follows its own length, which takes so many bytes.
    fn list(&mut self, width: usize) -> Result<Self> {
        let length = self.take(width)?.iter().fold(0, |length, byte| length << 8 | usize::from(*byte));
        Ok(Self(self.take(length)?))
    }

    fn numbers(&mut self, name: fn(u16) -> String) -> Result<Vec<String>> {
        let mut names = Vec::new();
        while !self.0.is_empty() {
            names.push(name(self.number()?));
        }
        Ok(names)
    }

    fn extensions(&mut self, mut each: impl FnMut(u16, Self) -> Result<()>) -> Result<()> {
        let mut all = self.list(2)?;
        while !all.0.is_empty() {
            let kind = all.number()?;
            each(kind, all.list(2)?)?;
        }
        Ok(())
    }
}

fn version(number: u16) -> String {
    match number {
        0x0303 => "TLS 1.2".into(),
        0x0304 => "TLS 1.3".into(),
        other => format!("version {other:#06x}"),
    }
}

fn suite(number: u16) -> String {
    match number {
        0x00ff => "renegotiation marker".into(),
        0x1301 => "AES_128_GCM_SHA256".into(),
        0x1302 => "AES_256_GCM_SHA384".into(),
        0x1303 => "CHACHA20_POLY1305_SHA256".into(),
        other => format!("suite {other:#06x}"),
    }
}

fn group(number: u16) -> String {
    match number {
        0x0017 => "secp256r1".into(),
        0x0018 => "secp384r1".into(),
        0x001d => "X25519".into(),
        0x11eb => "SecP256r1MLKEM768".into(),
        0x11ec => "X25519MLKEM768".into(),
        other => format!("group {other:#06x}"),
    }
}
