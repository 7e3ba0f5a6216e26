//! What connections between the same two pods have in common, made once for all of them.
//!
//! Enters: a connection that the programs told of, and the workloads at its ends as they are now. Leaves: the same for each that differs from
//! it in the source's port alone, until one of the workloads changes, or none came for a while. At thousands of short connections a second, who they
//! are between is soon the larger part of accounting for them.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use foldhash::fast::RandomState;

use crate::capture::SameNodeConnection;
use crate::model::Workload;
use crate::observe::{ConnectionInfo, CountedVerdicts, Direction, Observer, Recurring, Security};
use crate::policy::evaluate::Evaluation;

/// How many are kept. What finds no room is made again for each connection.
const LIMIT: usize = 4096;

/// The workloads at both ends, the source's first; none where it is not known any more.
pub(super) type Ends = [Option<Arc<Workload>>; 2];

/// What connections have in common that differ in the source's port alone.
#[derive(Debug)]
pub(super) struct Between {
    ends: Ends,
    outbound: ConnectionInfo,
    inbound: ConnectionInfo,
    pub(super) recurring: [Recurring; 2],
    /// What policies say; none when nobody can tell any more.
    pub(super) verdicts: Option<CountedVerdicts>,
}

/// Those that were asked for lately.
#[derive(Debug, Default)]
pub(super) struct Kept(HashMap<Key, Entry, RandomState>);

#[derive(Debug)]
struct Entry {
    between: Arc<Between>,
    used: bool,
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct Key {
    namespaces: [u64; 2],
    source: IpAddr,
    destination: SocketAddr,
    generation: u64,
}

impl Between {
    /// What this connection has in common with others.
    pub(super) fn new(connection: &SameNodeConnection, ends: Ends, evaluation: Option<&Evaluation>, observer: &Observer) -> Self {
        let [source, destination] = &ends;
        let identity = |end: &Option<Arc<Workload>>| end.as_ref().map(|workload| workload.identity.clone());
        let seen = |direction| ConnectionInfo {
            source_identity: identity(source),
            destination_identity: identity(destination),
            source: source.clone(),
            destination: destination.clone(),
            security: Security::Attested,
            ..ConnectionInfo::new(direction, connection.source, connection.destination)
        };
        let (outbound, inbound) = (seen(Direction::Outbound), seen(Direction::Inbound));
        let recurring = [&outbound, &inbound].map(|info| observer.recurring(info));
        let verdicts = evaluation.map(|evaluation| observer.metrics().verdicts_of(evaluation));
        Self { ends, outbound, inbound, recurring, verdicts }
    }

    /// The connection from this port of the source's, as the source's side tells of it, and as the destination's does.
    pub(super) fn infos(&self, source_port: u16) -> [ConnectionInfo; 2] {
        [&self.outbound, &self.inbound].map(|info| {
            let mut info = info.clone();
            info.source_addr.set_port(source_port);
            info
        })
    }

    fn is_between(&self, ends: &Ends) -> bool {
        let same = |a: &Option<Arc<Workload>>, b: &Option<Arc<Workload>>| match (a, b) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            (None, None) => true,
            _ => false,
        };
        self.ends.iter().zip(ends).all(|(known, now)| same(known, now))
    }
}

impl Kept {
    /// What was kept of connections like this one, if the workloads at its ends are still these.
    pub(super) fn get(&mut self, connection: &SameNodeConnection, ends: &Ends) -> Option<Arc<Between>> {
        let entry = self.0.get_mut(&Key::of(connection)).filter(|entry| entry.between.is_between(ends))?;
        entry.used = true;
        Some(Arc::clone(&entry.between))
    }

    /// Keeps it for others like this connection.
    pub(super) fn keep(&mut self, connection: &SameNodeConnection, between: &Arc<Between>) {
        let key = Key::of(connection);
        if self.0.len() < LIMIT || self.0.contains_key(&key) {
            self.0.insert(key, Entry { between: Arc::clone(between), used: true });
        }
    }

    /// Drops what has not been asked for since the last time.
    pub(super) fn drop_unused(&mut self) {
        self.0.retain(|_, entry| std::mem::take(&mut entry.used));
    }
}

impl Key {
    fn of(connection: &SameNodeConnection) -> Self {
        Self {
            namespaces: [connection.source_netns, connection.destination_netns],
            source: connection.source.ip(),
            destination: connection.destination,
            generation: connection.generation,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::connection::fixtures::workload;

    fn connection(port: u16, generation: u64) -> SameNodeConnection {
        SameNodeConnection {
            id: 1,
            source: SocketAddr::from(([10, 0, 0, 1], port)),
            destination: SocketAddr::from(([10, 0, 0, 2], 80)),
            source_netns: 1,
            destination_netns: 2,
            generation,
            steered: false,
            lasted: None,
            sent: 0,
            received: 0,
            ended: None,
        }
    }

    fn ends() -> Ends {
        [("shop", "cart", "10.0.0.1"), ("store", "stock", "10.0.0.2")]
            .map(|(namespace, name, address)| Some(Arc::new(workload(namespace, name, address))))
    }

    fn kept(connection: &SameNodeConnection, ends: &Ends) -> Kept {
        let mut kept = Kept::default();
        kept.keep(connection, &Arc::new(Between::new(connection, ends.clone(), None, &Observer::new("node-a"))));
        kept
    }

    #[test]
    fn connections_that_differ_in_the_sources_port_have_it_in_common_and_tell_their_own() {
        let ends = ends();
        let between = kept(&connection(4000, 7), &ends).get(&connection(4001, 7), &ends).expect("it was kept");
        let [outbound, inbound] = between.infos(4001);
        assert_eq!((outbound.source_addr.port(), inbound.source_addr.port()), (4001, 4001));
        assert_eq!((outbound.direction, inbound.direction), (Direction::Outbound, Direction::Inbound));
    }

    #[test]
    fn another_workload_or_generation_has_nothing_in_common() {
        let known = ends();
        let mut kept = kept(&connection(4000, 7), &known);
        assert!(kept.get(&connection(4000, 8), &known).is_none(), "another generation may be judged otherwise");
        let [source, _] = ends();
        let [_, destination] = known.clone();
        assert!(kept.get(&connection(4000, 7), &[source, destination]).is_none(), "the source has changed");
        assert!(kept.get(&connection(4000, 7), &[known[0].clone(), None]).is_none(), "the destination is gone");
    }

    #[test]
    fn what_nobody_asks_for_is_dropped() {
        let ends = ends();
        let mut kept = kept(&connection(4000, 7), &ends);
        kept.drop_unused();
        assert!(kept.get(&connection(4000, 7), &ends).is_some());
        kept.drop_unused();
        kept.drop_unused();
        assert!(kept.get(&connection(4000, 7), &ends).is_none());
    }
}
