//! Waiting for descriptors that are no sockets of the runtime's own: ring buffers, netlink sockets, the mount table.
#![expect(unsafe_code, reason = "tokio asks for the promise that a descriptor stays open and the same")]

use std::io;
use std::os::fd::AsRawFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Something that owns one descriptor, which stays open and the same for as long as the value lives.
pub(super) trait OwnsDescriptor: AsRawFd {}

impl OwnsDescriptor for std::fs::File {}
impl OwnsDescriptor for super::netns::AddressWatch {}
impl OwnsDescriptor for aya::maps::RingBuf<aya::maps::MapData> {}
impl<T> OwnsDescriptor for aya_log::EbpfLogger<T> {}

/// Has the runtime wait for a descriptor.
///
/// # Errors
/// When the descriptor cannot be polled.
pub(super) fn register<T: OwnsDescriptor>(owner: T, interest: Interest) -> io::Result<AsyncFd<T>> {
    // SAFETY: the trait's promise; the `AsyncFd` owns the value, and hands out no more than references to it.
    unsafe { AsyncFd::register_with_interest(owner, interest) }.map_err(Into::into)
}
