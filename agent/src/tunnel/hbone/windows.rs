//! How many bytes a peer may have on their way in an HBONE tunnel while nobody takes them: windows are the agent's memory.
//!
//! A tunnel begins with a small window and gets a larger one once so much has flowed that its readers have shown to keep up, as far
//! as the agent's [`Budget`] lets it. A stream may have a part of it: the more streams there are that stand still, the smaller is the
//! part of every stream. The parts are such that those cannot fill the tunnel's window together; for what was on its way before the
//! peer was told, the tunnel gets a larger window, of the same budget. So no stream waits for another's reader.

use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use h2::{client, server};

use crate::tunnel::tls_stream::TlsStream;

/// What every tunnel has in HTTP/2, whatever the agent would like (RFC 9113, section 6.9.2). It is all that a tunnel gets when the
/// budget is spent.
const LEAST: u32 = 65_535;
/// A new tunnel's window.
const START: u32 = 512 << 10;
/// The largest. One stream alone gets an eighth of it, 4 MiB: enough for 10 Gbit/s over 3 ms.
const MOST: u32 = 32 << 20;
/// What part of the tunnel's window a stream may have while one other stands still at most.
const PART: u32 = 8;
/// A window is doubled when so many times its bytes have been taken since it was last.
const PROOF: u64 = 2;

/// All that the agent's tunnels may have beyond the least.
static AGENT: Budget = Budget::new(256 << 20);

/// Bytes that may be given to tunnels.
#[derive(Debug)]
pub(super) struct Budget {
    free: AtomicUsize,
}

/// The windows of one tunnel, and what it has of the budget.
#[derive(Debug)]
pub(super) struct Windows {
    budget: &'static Budget,
    tunnel: u32,
    /// What the streams' parts are of: the tunnel's window, but for what it got beyond.
    shared: u32,
    /// Each stream's, as the peer has been told.
    stream: u32,
    /// The bytes that had been taken when it was last seen whether the readers keep up.
    proved: u64,
}

/// The streams of a tunnel that hold bytes which nobody takes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Still {
    pub(super) streams: usize,
    pub(super) bytes: usize,
}

/// A tunnel's windows as HTTP/2 keeps them.
pub(super) trait Flow {
    fn set_tunnel(&mut self, bytes: u32);

    /// Sets the windows of all streams, those that are open included. False when the peer has not yet confirmed what it was told
    /// last: then nothing is changed.
    fn set_streams(&mut self, bytes: u32) -> bool;
}

impl Budget {
    const fn new(bytes: usize) -> Self {
        Self { free: AtomicUsize::new(bytes) }
    }

    /// Takes some, if it is at most a quarter of what is there: large windows leave room for small ones.
    fn take(&self, bytes: u32) -> bool {
        let bytes = bytes as usize;
        let taken = |free: usize| (free / 4 >= bytes).then(|| free - bytes);
        self.free.fetch_update(Ordering::Relaxed, Ordering::Relaxed, taken).is_ok()
    }
}

impl Windows {
    /// Those of a new tunnel.
    pub(super) fn new() -> Self {
        Self::within(&AGENT)
    }

    fn within(budget: &'static Budget) -> Self {
        let tunnel = if budget.take(START) { START } else { LEAST };
        Self { budget, tunnel, shared: tunnel, stream: part(tunnel, 0), proved: 0 }
    }

    /// The tunnel's, in bytes.
    pub(super) fn tunnel(&self) -> u32 {
        self.tunnel
    }

    /// Each stream's, in bytes.
    pub(super) fn stream(&self) -> u32 {
        self.stream
    }

    /// Sets the windows of a tunnel in which these stand still, and of which so many bytes have been taken. Says whether the peer must
    /// be told something.
    pub(super) fn adapt(&mut self, still: Still, taken: u64, flow: &mut impl Flow) -> bool {
        let before = (self.tunnel, self.shared);
        self.grow(still.bytes, taken);
        if self.tunnel != before.0 {
            flow.set_tunnel(self.tunnel);
        }
        let wanted = part(self.shared, still.streams);
        // One reader that stops and goes on does not change the windows of all each time.
        let raised = self.shared != before.1 || part(self.shared, 2 * still.streams + 1) > self.stream;
        let told = (wanted < self.stream || wanted > self.stream && raised) && flow.set_streams(wanted);
        if told {
            self.stream = wanted;
        }
        told || self.tunnel != before.0
    }

    fn grow(&mut self, still: usize, taken: u64) {
        let next = |window: u32| if window == LEAST { START } else { MOST.min(2 * window) };
        if self.shared < MOST && taken - self.proved >= PROOF * u64::from(self.shared) {
            self.proved = taken;
            if self.reach(next(self.shared)) {
                self.shared = next(self.shared);
            }
        }
        if 2 * still > self.tunnel as usize {
            self.reach(next(self.tunnel));
        }
    }

    /// Makes the tunnel's window as large as that, if there is room in the budget.
    fn reach(&mut self, window: u32) -> bool {
        if window > self.tunnel && self.budget.take(window - self.of_budget()) {
            self.tunnel = window;
        }
        self.tunnel >= window
    }

    /// What it has of the budget.
    fn of_budget(&self) -> u32 {
        if self.tunnel == LEAST { 0 } else { self.tunnel }
    }
}

impl Drop for Windows {
    fn drop(&mut self) {
        self.budget.free.fetch_add(self.of_budget() as usize, Ordering::Relaxed);
    }
}

/// A stream's part of a tunnel's window, beside so many that stand still.
fn part(tunnel: u32, still: usize) -> u32 {
    let share = u32::try_from((still + 1).max(2).next_power_of_two() / 2).unwrap_or(u32::MAX);
    (tunnel / PART / share).max(1)
}

/// Both sides' types have the same methods, but share no trait.
macro_rules! flow {
    ($connection:ty) => {
        impl Flow for $connection {
            fn set_tunnel(&mut self, bytes: u32) {
                self.set_target_window_size(bytes);
            }

            fn set_streams(&mut self, bytes: u32) -> bool {
                self.set_initial_window_size(bytes).is_ok()
            }
        }
    };
}
flow!(client::Connection<TlsStream, Bytes>);
flow!(server::Connection<TlsStream, Bytes>);

#[cfg(test)]
mod tests {
    use super::*;

    /// A peer that confirms what it is told, or does not.
    struct Peer {
        confirms: bool,
    }

    impl Flow for Peer {
        fn set_tunnel(&mut self, _bytes: u32) {}

        fn set_streams(&mut self, _bytes: u32) -> bool {
            self.confirms
        }
    }

    const PEER: Peer = Peer { confirms: true };

    fn budget(bytes: u32) -> &'static Budget {
        Box::leak(Box::new(Budget::new(bytes as usize)))
    }

    /// The windows of a tunnel whose readers have kept up for long.
    fn grown(budget: &'static Budget) -> Windows {
        let mut windows = Windows::within(budget);
        for round in 0..100 {
            windows.adapt(Still::default(), round << 30, &mut { PEER });
        }
        windows
    }

    #[test]
    fn streams_that_stand_still_cannot_fill_the_tunnel() {
        for tunnel in [LEAST, START, MOST] {
            // Each had so many before it at least when it got the last of what it holds.
            let held: u32 = (0..100).map(|still| part(tunnel, still)).sum();
            assert!(held < tunnel, "{held} of {tunnel}");
            assert!(100 * part(tunnel, 99) > tunnel / 6, "it is not given away either");
        }
    }

    #[test]
    fn a_tunnel_whose_readers_keep_up_gets_the_largest_windows_and_others_none() {
        let budget = budget(1 << 30);
        let mut windows = Windows::within(budget);
        assert_eq!((windows.tunnel(), windows.stream()), (START, 64 << 10));
        assert!(!windows.adapt(Still::default(), 0, &mut { PEER }) && !windows.adapt(Still::default(), 1 << 19, &mut { PEER }));
        assert_eq!(windows.tunnel(), START);
        assert!(windows.adapt(Still::default(), 1 << 20, &mut { PEER }));
        assert_eq!((windows.tunnel(), windows.stream()), (2 * START, 128 << 10));
        let windows = grown(budget);
        assert_eq!((windows.tunnel(), windows.stream()), (MOST, 4 << 20));
    }

    #[test]
    fn a_tunnel_that_is_filled_gets_room_for_others_and_those_who_fill_it_get_none() {
        let mut windows = Windows::within(budget(1 << 30));
        let still = |bytes| Still { streams: 99, bytes };
        windows.adapt(still(0), 0, &mut { PEER });
        assert_eq!((windows.tunnel(), windows.stream()), (START, 1 << 10));
        assert!(windows.adapt(still(400 << 10), 0, &mut { PEER }));
        assert_eq!((windows.tunnel(), windows.stream()), (2 * START, 1 << 10));
        assert!(!windows.adapt(still(400 << 10), 0, &mut { PEER }));
        (0..100).for_each(|_| assert!(!windows.adapt(still(1 << 30), 0, &mut { PEER }) || windows.tunnel() <= MOST));
        assert_eq!((windows.tunnel(), windows.stream()), (MOST, 1 << 10));
    }

    #[test]
    fn the_budget_is_shared_kept_to_and_given_back() {
        let all = 256 << 20;
        let budget = budget(all);
        let large: Vec<_> = (0..100).map(|_| grown(budget)).collect();
        let given: u32 = large.iter().map(Windows::of_budget).sum();
        assert!((all / 4 * 3..all).contains(&given), "{given} of {all}");
        let small = (0..10_000).map(|_| Windows::within(budget)).collect::<Vec<_>>();
        assert_eq!(small.last().map(Windows::tunnel), Some(LEAST));
        drop(large);
        assert_eq!(grown(budget).tunnel(), MOST, "what was given back is there for others");
        drop(small);
        assert_eq!(budget.free.load(Ordering::Relaxed), all as usize);
    }

    #[test]
    fn windows_follow_those_who_stand_still_and_wait_for_the_peers_word() {
        let mut windows = grown(budget(1 << 30));
        let mut beside = |still, confirms| {
            let still = Still { streams: still, bytes: 0 };
            windows.adapt(still, 100 << 30, &mut Peer { confirms });
            windows.stream() >> 10
        };
        assert_eq!(beside(1, true), 4096);
        assert_eq!((beside(2, false), beside(2, true)), (4096, 2048), "only once the peer has confirmed the last");
        assert_eq!((beside(1, true), beside(0, true)), (2048, 4096), "not to and fro with one reader");
        assert_eq!((beside(99, true), beside(32, true), beside(0, true)), (64, 64, 4096));
    }
}
