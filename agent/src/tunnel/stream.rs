//! One captured connection in a tunnel, in the tunnel's form.

use std::sync::Weak;
use std::time::SystemTime;

use super::hbone::{HboneSink, HboneSource};
use super::pool::Slot;
use super::single::SingleStream;

/// A stream that is open.
#[derive(Debug)]
pub enum Stream {
    /// One of those that share an HBONE tunnel.
    Hbone(Box<(HboneSource, HboneSink)>),
    /// The one stream of a tunnel, which goes back to its pool afterwards.
    Single(Box<SingleStream>, Home),
}

/// Where a tunnel of the single form goes when its stream has ended.
#[derive(Debug)]
pub struct Home {
    pub(super) slot: Weak<Slot>,
    /// When the peer's certificate ends.
    pub(super) expires: SystemTime,
}

impl Home {
    /// Takes the tunnel back, if its stream has ended in order and the pool still wants it; else the tunnel ends here.
    pub fn take_back(&self, stream: Box<SingleStream>) {
        if let (Some(slot), Some(idle)) = (self.slot.upgrade(), stream.end()) {
            slot.put(idle, self.expires);
        }
    }
}
