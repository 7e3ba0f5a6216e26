//! The load generator: a server and clients that cost as little as can be, because they share the machine with what is measured. Each is
//! one thread that serves all of its connections without blocking.

pub(crate) mod client;
pub(crate) mod server;

/// Bytes of a request.
pub(crate) const REQUEST: usize = 128;
/// Bytes of an answer.
pub(crate) const ANSWER: usize = 1024;

/// Where the server answers every request that comes.
pub(crate) const LASTING: u16 = 9000;
/// Where the server answers one request and closes.
pub(crate) const CLOSING: u16 = 9001;

/// How many events are fetched at once.
const EVENTS: usize = 256;
