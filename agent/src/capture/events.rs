//! The ring buffer in which the programs tell what they refused.
//!
//! Enters: records from the kernel. Leaves: [`Report`]s, by a bounded channel. A reader that falls behind loses news, never a
//! decision: the programs have decided already.
#![expect(unsafe_code, reason = "records are bytes that are read as the structure that the programs wrote")]

use std::collections::HashSet;
use std::io;
use std::net::SocketAddr;

use aya::maps::{MapData, RingBuf};
use culvert_ebpf_common::{Event, EventKind};
use tokio::io::Interest;
use tokio::sync::mpsc;

use super::readiness;

/// What the programs told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Report {
    /// A connection was refused because its namespace is not classified.
    UnseenNamespace {
        /// The process, as the first PID namespace numbers it.
        process: u32,
        /// The namespace.
        cookie: u64,
    },
    /// A plaintext connection to an enrolled pod was refused.
    PlaintextRefused {
        /// Who dialled.
        source: SocketAddr,
        /// What was dialled.
        destination: SocketAddr,
    },
}

impl Report {
    /// The namespace that it is about, if it is about one as a whole.
    fn cookie(&self) -> Option<u64> {
        match self {
            Self::UnseenNamespace { cookie, .. } => Some(*cookie),
            Self::PlaintextRefused { .. } => None,
        }
    }
}

/// Reads reports until the receiver is gone.
///
/// # Errors
/// When the ring buffer cannot be waited for.
pub(super) async fn read(events: RingBuf<MapData>, reports: mpsc::Sender<Report>) -> io::Result<()> {
    let mut events = readiness::register(events, Interest::READABLE)?;
    loop {
        let mut ready = tokio::select! {
            ready = events.readable_mut() => ready?,
            () = reports.closed() => return Ok(()),
        };
        let ring = ready.get_inner_mut();
        // A pod that waits tries again and again: it is told of once in each round.
        let mut told = HashSet::new();
        while let Some(record) = ring.next() {
            if let Some(report) = decode(&record)
                && report.cookie().is_none_or(|cookie| told.insert(cookie))
            {
                let _lost_when_full = reports.try_send(report);
            }
        }
        ready.clear_ready();
    }
}

fn decode(record: &[u8]) -> Option<Report> {
    if record.len() != size_of::<Event>() {
        return None;
    }
    // SAFETY: the record is as long as an `Event`, which is `repr(C)` and of integers only, so that any bytes are one.
    let event = unsafe { record.as_ptr().cast::<Event>().read_unaligned() };
    match event.kind() {
        EventKind::UnseenNamespace => Some(Report::UnseenNamespace { process: event.pid, cookie: event.netns_cookie }),
        EventKind::PlaintextRefused => {
            Some(Report::PlaintextRefused { source: event.flow.source.into(), destination: event.flow.destination.into() })
        }
        EventKind::Unknown => None,
    }
}

#[cfg(test)]
mod tests {
    use culvert_ebpf_common::{Endpoint, Flow};

    use super::*;

    fn bytes(event: &Event) -> Vec<u8> {
        // SAFETY: an `Event` is `repr(C)` without padding, so that all of its bytes are initialised.
        unsafe { std::slice::from_raw_parts(std::ptr::from_ref(event).cast::<u8>(), size_of::<Event>()) }.to_vec()
    }

    #[test]
    fn records_become_reports() {
        let unseen = Event::unseen_namespace(7, 9, Flow::default());
        assert_eq!(decode(&bytes(&unseen)), Some(Report::UnseenNamespace { process: 7, cookie: 9 }));
        let source: SocketAddr = "10.0.0.1:1000".parse().expect("an address");
        let destination: SocketAddr = "[fd00::1]:80".parse().expect("an address");
        let flow = Flow { source: Endpoint::from(source), destination: Endpoint::from(destination) };
        assert_eq!(decode(&bytes(&Event::plaintext_refused(flow))), Some(Report::PlaintextRefused { source, destination }));
    }

    #[test]
    fn records_of_another_length_or_kind_are_left_out() {
        let event = bytes(&Event::unseen_namespace(7, 9, Flow::default()));
        assert_eq!(decode(&event[1..]), None);
        assert_eq!(decode(&[0; size_of::<Event>()]), None);
    }
}
