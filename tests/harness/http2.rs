//! HTTP/2 by hand (RFC 9113): frames as they are wanted, right or wrong, and one gRPC call.

use std::io::{self, Read, Write};

/// What a client says first.
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Types of frames.
pub mod kind {
    /// Bytes of a stream.
    pub const DATA: u8 = 0;
    /// Begins a stream.
    pub const HEADERS: u8 = 1;
    /// Resets a stream.
    pub const RST_STREAM: u8 = 3;
    /// Settings of the connection.
    pub const SETTINGS: u8 = 4;
    /// Asks for an answer.
    pub const PING: u8 = 6;
    /// Ends the connection.
    pub const GOAWAY: u8 = 7;
    /// Gives flow-control credit.
    pub const WINDOW_UPDATE: u8 = 8;
    /// Goes on with headers.
    pub const CONTINUATION: u8 = 9;
}

/// The last frame of a stream's direction.
pub const END_STREAM: u8 = 1;
/// The last frame of a list of headers; and, of SETTINGS and PING, the answer.
pub const END_HEADERS: u8 = 4;
/// The answer to SETTINGS or PING.
pub const ACK: u8 = 1;

/// A frame; its length is told truly.
#[must_use]
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let [_, high, middle, low] = u32::try_from(payload.len()).unwrap_or(u32::MAX).to_be_bytes();
    let mut frame = vec![high, middle, low, kind, flags];
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// A list of headers, each a literal without indexing (RFC 7541, section 6.2.2).
#[must_use]
pub fn headers(list: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in list {
        block.push(0);
        text(&mut block, name.as_bytes());
        text(&mut block, value.as_bytes());
    }
    block
}

fn text(block: &mut Vec<u8>, text: &[u8]) {
    // A length is an integer with a prefix of 7 bits (RFC 7541, section 5.1).
    match text.len().checked_sub(127) {
        None => block.push(text.len() as u8),
        Some(mut rest) => {
            block.push(127);
            while rest >= 128 {
                block.push((rest % 128) as u8 | 128);
                rest /= 128;
            }
            block.push(rest as u8);
        }
    }
    block.extend(text);
}

/// A protobuf field of bytes.
#[must_use]
pub fn field(number: u8, value: &[u8]) -> Vec<u8> {
    let mut field = vec![number << 3 | 2];
    let mut length = value.len();
    while length >= 128 {
        field.push((length % 128) as u8 | 128);
        length /= 128;
    }
    field.push(length as u8);
    field.extend(value);
    field
}

/// The length of what precedes a gRPC message: whether it is compressed, and its length.
pub const MESSAGE_HEAD: usize = 5;

/// A gRPC message with its head.
#[must_use]
pub fn message(value: &[u8]) -> Vec<u8> {
    let mut message = vec![0];
    message.extend(u32::try_from(value.len()).unwrap_or(u32::MAX).to_be_bytes());
    message.extend(value);
    message
}

/// The head of a gRPC call, as a list of headers.
#[must_use]
pub fn call(path: &str, token: Option<&str>) -> Vec<u8> {
    let bearer = token.map(|token| format!("Bearer {token}")).unwrap_or_default();
    let mut list = vec![
        (":method", "POST"),
        (":scheme", "https"),
        (":path", path),
        (":authority", "controller"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ];
    if token.is_some() {
        list.push(("authorization", &bearer));
    }
    headers(&list)
}

/// Makes one gRPC call on a new connection, and gives the answer's message; none when there is none.
///
/// # Errors
/// The connection's.
pub fn unary(io: &mut (impl Read + Write), path: &str, token: Option<&str>, request: &[u8]) -> io::Result<Option<Vec<u8>>> {
    let mut all = PREFACE.to_vec();
    all.extend(frame(kind::SETTINGS, 0, 0, &[]));
    all.extend(frame(kind::HEADERS, END_HEADERS, 1, &call(path, token)));
    let request = message(request);
    for (number, part) in request.chunks(16_384).enumerate() {
        let last = (number + 1) * 16_384 >= request.len();
        all.extend(frame(kind::DATA, if last { END_STREAM } else { 0 }, 1, part));
    }
    io.write_all(&all)?;
    io.flush()?;
    let mut body = Vec::new();
    loop {
        let (head, payload) = next(io)?;
        match (head.kind, head.stream) {
            (kind::SETTINGS, 0) if head.flags & ACK == 0 => io.write_all(&frame(kind::SETTINGS, ACK, 0, &[]))?,
            (kind::GOAWAY, _) | (kind::RST_STREAM, 1) => return Ok(None),
            (kind::DATA | kind::HEADERS, 1) => {
                if head.kind == kind::DATA {
                    body.extend(payload);
                }
                if head.flags & END_STREAM != 0 {
                    return Ok(body.get(MESSAGE_HEAD..).map(<[u8]>::to_vec));
                }
            }
            _ => {}
        }
    }
}

/// Asks for a stream in a tunnel, whatever the peer has said of the tunnel's end before. Whether it is granted.
///
/// # Errors
/// The connection's.
pub fn tunnel_stream(io: &mut (impl Read + Write), stream: u32, authority: &str) -> io::Result<bool> {
    let wanted = headers(&[(":method", "CONNECT"), (":authority", authority)]);
    io.write_all(&frame(kind::HEADERS, END_HEADERS, stream, &wanted))?;
    io.flush()?;
    loop {
        let (head, payload) = next(io)?;
        match (head.kind, head.stream) {
            // `:status: 200` is an entry of the static table (RFC 7541, appendix A), and the first of its list (RFC 9113, section 8.3).
            (kind::HEADERS, number) if number == stream => return Ok(payload.first() == Some(&0x88)),
            (kind::RST_STREAM, number) if number == stream => return Ok(false),
            _ => {}
        }
    }
}

/// What the far end of a tunnel's stream says, until it has said all.
///
/// # Errors
/// The connection's.
pub fn tunnel_answer(io: &mut impl Read, stream: u32) -> io::Result<Vec<u8>> {
    let mut answer = Vec::new();
    loop {
        let (head, payload) = next(io)?;
        if (head.kind, head.stream) == (kind::DATA, stream) {
            answer.extend(payload);
            if head.flags & END_STREAM != 0 {
                return Ok(answer);
            }
        }
    }
}

/// A frame's head, without its length.
struct Head {
    kind: u8,
    flags: u8,
    stream: u32,
}

fn next(io: &mut impl Read) -> io::Result<(Head, Vec<u8>)> {
    let mut head = [0; 9];
    io.read_exact(&mut head)?;
    let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
    io.read_exact(&mut payload)?;
    let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
    Ok((Head { kind: head[3], flags: head[4], stream }, payload))
}
