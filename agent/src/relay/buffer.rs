//! The buffers that bytes pass through: lent to a connection while it moves bytes, and kept by the thread in between.
//!
//! A connection that waits holds none, so that an idle one costs no buffer, and a busy thread works in the same few, which stay in
//! its processor's cache and are zeroed once in their lives. Only what cannot be passed on at once (a slow reader, a record of
//! which the end is still to come) keeps its buffer while it waits.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

/// The most bytes that one TLS 1.3 record takes on the wire (RFC 8446, section 5.2): head, payload, and what encryption adds.
pub const RECORD: usize = 5 + 16_384 + 256;

/// How large a buffer is, in records. A connection starts with the smallest and takes a larger one once it has filled its own:
/// few bytes need no large buffer, many need few calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Size {
    /// One record.
    #[default]
    Small,
    /// Four records.
    Medium,
    /// Sixteen records.
    Large,
}

impl Size {
    /// How many records fit.
    #[must_use]
    pub const fn records(self) -> usize {
        match self {
            Self::Small => 1,
            Self::Medium => 4,
            Self::Large => 16,
        }
    }

    /// How many bytes fit.
    #[must_use]
    pub const fn bytes(self) -> usize {
        self.records() * RECORD
    }

    /// The size for somebody who has filled this one.
    #[must_use]
    pub const fn larger(self) -> Self {
        match self {
            Self::Small => Self::Medium,
            Self::Medium | Self::Large => Self::Large,
        }
    }

    /// How many buffers of this size a thread keeps when nobody uses them.
    const fn kept(self) -> usize {
        match self {
            Self::Small => 32,
            Self::Medium => 8,
            Self::Large => 4,
        }
    }
}

/// A buffer on loan. What it holds at first is left over from earlier use. Goes back to the thread that drops it.
#[derive(Debug)]
pub struct Buffer {
    bytes: Vec<u8>,
    size: Size,
}

thread_local! {
    static KEPT: [RefCell<Vec<Vec<u8>>>; 3] = const { [const { RefCell::new(Vec::new()) }; 3] };
}

impl Buffer {
    /// Lends a buffer of `size`.
    #[must_use]
    pub fn take(size: Size) -> Self {
        let kept = KEPT.with(|kept| kept[size as usize].borrow_mut().pop());
        Self { bytes: kept.unwrap_or_else(|| vec![0; size.bytes()]), size }
    }

    /// How large it is.
    #[must_use]
    pub fn size(&self) -> Size {
        self.size
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let (bytes, size) = (std::mem::take(&mut self.bytes), self.size);
        // A thread that is ending keeps nothing.
        let _ending = KEPT.try_with(|kept| {
            let mut kept = kept[size as usize].borrow_mut();
            if kept.len() < size.kept() {
                kept.push(bytes);
            }
        });
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_and_no_more_are_kept_than_the_bound() {
        let address = {
            let mut buffer = Buffer::take(Size::Small);
            buffer[0] = 7;
            buffer.as_ptr()
        };
        let again = Buffer::take(Size::Small);
        assert_eq!((again.as_ptr(), again[0]), (address, 7));
        drop(again);
        drop((0..100).map(|_| Buffer::take(Size::Large)).collect::<Vec<_>>());
        let kept = KEPT.with(|kept| kept[Size::Large as usize].borrow().len());
        assert_eq!(kept, Size::Large.kept());
    }

    #[test]
    fn sizes_grow_to_the_largest_and_hold_whole_records() {
        assert_eq!(Size::Small.larger(), Size::Medium);
        assert_eq!(Size::Large.larger(), Size::Large);
        assert_eq!(Buffer::take(Size::Medium).len(), 4 * RECORD);
    }
}
