//! What is transferred while certificates are rotated, and checked as it comes.

use anyhow::{Context as _, Result};

use crate::lab::Lab;

/// How many bytes.
pub(crate) const TRANSFER: usize = 32 << 20;

/// Bytes that follow a rule, so that each can be checked as it comes (Marsaglia's xorshift).
#[derive(Debug)]
pub(crate) struct Payload {
    state: u64,
    left: u32,
}

impl Default for Payload {
    fn default() -> Self {
        Self { state: 0x9e37_79b9_7f4a_7c15, left: 0 }
    }
}

impl Payload {
    /// The next one.
    pub(crate) fn next_byte(&mut self) -> u8 {
        if self.left == 0 {
            self.state ^= self.state << 13;
            self.state ^= self.state >> 7;
            self.state ^= self.state << 17;
            self.left = 8;
        }
        self.left -= 1;
        self.state.to_le_bytes()[self.left as usize]
    }
}

/// Writes them to where nginx serves files from.
pub(crate) fn write(lab: &Lab) -> Result<()> {
    let files = lab.path("files");
    std::fs::create_dir_all(&files)?;
    let mut payload = Payload::default();
    let bytes: Vec<u8> = (0..TRANSFER).map(|_| payload.next_byte()).collect();
    std::fs::write(files.join("payload"), bytes).context("writing what will be transferred")
}
