//! What a piece of a test takes from the allocator, counted on its own thread: the same in every run, whatever other tests do.
#![expect(unsafe_code, reason = "an allocator has no safe form")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

#[global_allocator]
static COUNTING: Counting = Counting;

struct Counting;

/// Bytes that one thread took from the allocator, as glibc's gives them: a header, and 16 bytes at a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Taken {
    /// In all.
    pub(crate) bytes: usize,
    /// Of these, what was not given back.
    pub(crate) kept: isize,
}

thread_local! {
    static TAKEN: Cell<Taken> = const { Cell::new(Taken { bytes: 0, kept: 0 }) };
}

/// Runs `work`, and tells what this thread took meanwhile.
pub(crate) fn taken_by<T>(work: impl FnOnce() -> T) -> (T, Taken) {
    let before = TAKEN.get();
    let done = work();
    let after = TAKEN.get();
    (done, Taken { bytes: after.bytes - before.bytes, kept: after.kept - before.kept })
}

fn charged(layout: Layout) -> usize {
    (layout.size() + size_of::<usize>()).next_multiple_of(16).max(32)
}

// SAFETY: the system's allocator does the work; counting touches a thread-local cell that needs neither allocation nor destruction.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let bytes = charged(layout);
        let Taken { bytes: all, kept } = TAKEN.get();
        TAKEN.set(Taken { bytes: all + bytes, kept: kept + bytes as isize });
        // SAFETY: the caller keeps the contract of this very function.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        let Taken { bytes, kept } = TAKEN.get();
        TAKEN.set(Taken { bytes, kept: kept - charged(layout) as isize });
        // SAFETY: the caller keeps the contract of this very function.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[test]
fn what_is_taken_and_what_is_kept_are_told_apart() {
    let (kept, taken) = taken_by(|| {
        drop(Vec::<u8>::with_capacity(1000));
        Vec::<u8>::with_capacity(100)
    });
    assert_eq!((taken, kept.capacity()), (Taken { bytes: 1008 + 112, kept: 112 }, 100));
}
