//! A page that is sent while it is written, so that a piece of it is held at a time and never the whole.
//!
//! Enters: text, written on a thread for blocking work. Leaves: the body of an answer. Writing waits while the client does not read,
//! and fails once the client is gone; the writer holds no lock meanwhile that others need.

use std::fmt::{self, Write};
use std::mem;

use axum::body::{Body, Bytes};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// A piece is sent when it has this many bytes.
const PIECE: usize = 32 * 1024;

/// The page that is being written.
#[derive(Debug)]
pub(in crate::observe) struct Page {
    piece: String,
    pieces: mpsc::Sender<Result<Bytes, fmt::Error>>,
}

/// The body that `write` writes. A page that could not be written to its end breaks the connection: it must not pass for whole.
pub(super) fn body(write: impl FnOnce(&mut Page) -> fmt::Result + Send + 'static) -> Body {
    let (sender, pieces) = mpsc::channel(1);
    tokio::task::spawn_blocking(move || {
        let mut page = Page { piece: String::new(), pieces: sender };
        let written = write(&mut page).and_then(|()| page.send());
        if let Err(error) = written
            && page.pieces.blocking_send(Err(error)).is_ok()
        {
            tracing::warn!("a page of metrics is not complete: its writer failed");
        }
    });
    Body::from_stream(ReceiverStream::new(pieces))
}

impl Page {
    fn send(&mut self) -> fmt::Result {
        let piece = mem::take(&mut self.piece);
        self.pieces.blocking_send(Ok(piece.into())).map_err(|_gone| fmt::Error)
    }
}

impl Write for Page {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if self.piece.len() + text.len() > PIECE && !self.piece.is_empty() {
            self.send()?;
        }
        if self.piece.capacity() == 0 {
            self.piece.reserve(PIECE);
        }
        self.piece.push_str(text);
        Ok(())
    }
}
