//! Connections between pods of the node that stay in the kernel: the agent's verdicts, and what the programs tell of them.
//!
//! Enters: a verdict, with the generations of both pods by which it was reached. Leaves: connections as they open and end. A verdict holds
//! for as long as both pods are of those generations, and never longer than the agent that wrote it listens in the source's pod. The ring
//! buffer is read in rounds: many short connections cost few wake-ups, and none that lasts waits long to be told of.
#![expect(unsafe_code, reason = "records are bytes that are read as the structure that the programs wrote")]

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use aya::Ebpf;
use aya::maps::{HashMap, MapData, MapError, RingBuf};
use culvert_ebpf_common::{CONNECTION_EVENTS_LENGTH, Connection, Endpoint, Flow, Outcome, Stage, Verdict, VerdictKey};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::maps::{failed, lock, monotonic, table};
use super::{CaptureError, LocalPod, readiness};
use crate::model::CloseReason;

/// How long records are gathered after the first of a round: the longest that an open connection waits to be seen.
const ROUND: Duration = Duration::from_millis(10);
/// How many records are taken up at a time. Others of the task's thread come to their turn between.
const AT_ONCE: usize = 1024;
/// No more records than these are in the ring buffer at a time.
const ROOM: usize = CONNECTION_EVENTS_LENGTH as usize / size_of::<Connection>();

/// The maps of these connections, shared by all threads.
#[derive(Clone)]
pub struct SameNodeMaps(Arc<Tables>);

struct Tables {
    verdicts: std::sync::Mutex<HashMap<MapData, VerdictKey, Verdict>>,
    connections: std::sync::Mutex<HashMap<MapData, Flow, Connection>>,
    untold: std::sync::Mutex<HashMap<MapData, u64, Connection>>,
    /// The generation that was given last.
    generation: AtomicU64,
}

/// A connection that stays in the kernel, as far as it has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SameNodeConnection {
    /// A number that no other connection of this kernel has.
    pub id: u64,
    /// The source's address. Never IPv4-mapped.
    pub source: SocketAddr,
    /// The destination's address. Never IPv4-mapped.
    pub destination: SocketAddr,
    /// The cookie of the source's network namespace.
    pub source_netns: u64,
    /// The cookie of the destination's network namespace.
    pub destination_netns: u64,
    /// The destination's generation by which it was let go.
    pub generation: u64,
    /// The destination had changed meanwhile, and its end is the agent.
    pub steered: bool,
    /// How long it was open; none if it never was, or still is.
    pub lasted: Option<Duration>,
    /// Bytes from the source to the destination, when it has ended.
    pub sent: u64,
    /// Bytes from the destination to the source, when it has ended.
    pub received: u64,
    /// Why it ended, if it has.
    pub ended: Option<CloseReason>,
}

/// The ring buffer in which the programs tell of these connections.
pub struct SameNodeEvents {
    ring: AsyncFd<RingBuf<MapData>>,
}

impl SameNodeMaps {
    /// Takes the maps out of the loaded object. What a predecessor decided is void from here on.
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, CaptureError> {
        let mut verdicts: HashMap<_, VerdictKey, Verdict> = table(ebpf, "VERDICTS")?;
        void(&mut verdicts).map_err(failed("VERDICTS"))?;
        // Never one that a predecessor gave: the clock goes on while no agent runs, and generations are given less often than it ticks.
        let first = monotonic().map_err(CaptureError::OwnNetns)?;
        Ok(Self(Arc::new(Tables {
            verdicts: verdicts.into(),
            connections: table::<HashMap<_, _, _>>(ebpf, "CONNECTIONS")?.into(),
            untold: table::<HashMap<_, _, _>>(ebpf, "UNTOLD")?.into(),
            generation: AtomicU64::new(first),
        })))
    }

    /// A generation that no pod has had yet.
    pub(super) fn next_generation(&self) -> u64 {
        self.0.generation.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Lets connections of `source` to `destination`, an address and port of the pod `to`, go straight there for a time and while the pods are
    /// of these generations, which the caller read before the state that it decided by. What the programs have tried in vain stays with the
    /// agent until a pod changes.
    pub fn allow(
        &self,
        source: &LocalPod,
        to: &LocalPod,
        destination: SocketAddr,
        [source_generation, destination_generation]: [u64; 2],
        lasting: Duration,
    ) {
        let Ok(now) = monotonic() else { return };
        let key = VerdictKey::new(source.netns.cookie(), destination.into());
        let expires_ns = now.saturating_add(u64::try_from(lasting.as_nanos()).unwrap_or(u64::MAX));
        let verdict = Verdict { source_generation, destination: to.netns.cookie(), destination_generation, expires_ns };
        let mut verdicts = lock(&self.0.verdicts);
        let in_vain = |held: Verdict| held.destination_generation == 0 && held.source_generation == source_generation;
        if verdicts.get(&key, 0).is_ok_and(in_vain) {
            return;
        }
        let _decided_again_next_time = verdicts.insert(key, verdict, 0);
    }

    /// Voids all verdicts.
    ///
    /// # Errors
    /// When the kernel does not give one up.
    pub fn void_all(&self) -> io::Result<()> {
        void(&mut lock(&self.0.verdicts)).map_err(io::Error::other)
    }

    /// The connection between these ends, if it stays in the kernel.
    #[must_use]
    pub fn find(&self, source: SocketAddr, destination: SocketAddr) -> Option<SameNodeConnection> {
        let flow = Flow { source: Endpoint::from(source), destination: Endpoint::from(destination) };
        lock(&self.0.connections).get(&flow, 0).ok().as_ref().map(told)
    }

    /// All of them. Takes a system call for each.
    #[must_use]
    pub fn all(&self) -> Vec<SameNodeConnection> {
        lock(&self.0.connections).iter().flatten().map(|(_, connection)| told(&connection)).collect()
    }

    /// Takes out those that have ended and whose end could not be told when it came.
    #[must_use]
    pub fn take_untold(&self) -> Vec<SameNodeConnection> {
        let mut untold = lock(&self.0.untold);
        let found: Vec<_> = untold.iter().flatten().collect();
        for (socket, _) in &found {
            let _taken_already = untold.remove(socket);
        }
        found.iter().map(|(_, connection)| told(connection)).collect()
    }

    /// The word of the outcome that is counted when something could not be told.
    #[must_use]
    pub fn delayed() -> &'static str {
        Outcome::DelayedTelling.as_str()
    }
}

impl SameNodeEvents {
    /// Takes the ring buffer out of the loaded object. Must be called within a tokio runtime.
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, CaptureError> {
        let ring: RingBuf<_> = table(ebpf, "CONNECTION_EVENTS")?;
        let ring = readiness::register(ring, Interest::READABLE);
        let ring = ring.map_err(|error| failed("CONNECTION_EVENTS")(MapError::IoError(error)))?;
        Ok(Self { ring })
    }

    /// Waits for connections that opened or ended, and adds them to `news`, in the order in which that happened to each.
    ///
    /// # Errors
    /// When the ring buffer cannot be waited for.
    ///
    /// # Cancel safety
    /// Records that were not added are there at the next call.
    pub async fn next(&mut self, news: &mut Vec<SameNodeConnection>) -> io::Result<()> {
        loop {
            let mut ready = self.ring.readable_mut().await?;
            // The kernel wakes who has read all: who reads late is woken seldom.
            tokio::time::sleep(ROUND).await;
            let ring = ready.get_inner_mut();
            while news.len() < AT_ONCE {
                let Some(record) = ring.next() else {
                    ready.clear_ready();
                    break;
                };
                news.extend(decode(&record));
            }
            if !news.is_empty() {
                return Ok(());
            }
        }
    }

    /// Adds what has been told so far to `news`, without waiting.
    pub fn rest(&mut self, news: &mut Vec<SameNodeConnection>) {
        let ring = self.ring.get_mut();
        for _ in 0..ROOM {
            let Some(record) = ring.next() else { return };
            news.extend(decode(&record));
        }
    }
}

fn void(verdicts: &mut HashMap<MapData, VerdictKey, Verdict>) -> Result<(), MapError> {
    for key in verdicts.keys().collect::<Result<Vec<_>, _>>()? {
        match verdicts.remove(&key) {
            Ok(()) | Err(MapError::KeyNotFound) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn decode(record: &[u8]) -> Option<SameNodeConnection> {
    if record.len() != size_of::<Connection>() {
        return None;
    }
    // SAFETY: the record is as long as a `Connection`, which is `repr(C)` and of integers only, so that any bytes are one.
    let connection = unsafe { record.as_ptr().cast::<Connection>().read_unaligned() };
    Some(told(&connection))
}

fn told(connection: &Connection) -> SameNodeConnection {
    let stage = connection.stage();
    let was_open = !matches!(stage, Stage::Connecting | Stage::Open | Stage::Refused | Stage::Unanswered);
    SameNodeConnection {
        id: connection.socket,
        source: connection.flow.source.into(),
        destination: connection.flow.destination.into(),
        source_netns: connection.source,
        destination_netns: connection.destination,
        generation: connection.generation,
        steered: connection.steered != 0,
        lasted: was_open.then(|| Duration::from_nanos(connection.open_ns)),
        sent: connection.sent,
        received: connection.received,
        ended: match stage {
            Stage::Connecting | Stage::Open => None,
            Stage::Finished => Some(CloseReason::Finished),
            Stage::SourceReset => Some(CloseReason::SourceReset),
            Stage::DestinationReset => Some(CloseReason::DestinationReset),
            Stage::Refused => Some(CloseReason::DestinationRefused),
            Stage::Unanswered => Some(CloseReason::DestinationUnreachable),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(connection: &Connection) -> Vec<u8> {
        // SAFETY: a `Connection` is `repr(C)` without padding, so that all of its bytes are initialised.
        unsafe { std::slice::from_raw_parts(std::ptr::from_ref(connection).cast::<u8>(), size_of::<Connection>()) }.to_vec()
    }

    fn record(stage: Stage) -> Connection {
        let end = |text: &str| Endpoint::from(text.parse::<SocketAddr>().expect("an address"));
        let flow = Flow { source: end("10.0.0.1:4000"), destination: end("10.0.0.2:80") };
        let mut connection = Connection::new(flow, 5, 7, 8, 9);
        (connection.open_ns, connection.sent, connection.received) = (1_500, 3, 4);
        connection.set_stage(stage);
        connection
    }

    #[test]
    fn a_record_becomes_the_connection_that_it_tells_of() {
        let told = decode(&bytes(&record(Stage::Finished))).expect("a connection");
        assert_eq!((told.id, told.source_netns, told.destination_netns, told.generation), (5, 7, 8, 9));
        assert_eq!((told.source.to_string(), told.destination.to_string()), ("10.0.0.1:4000".into(), "10.0.0.2:80".into()));
        assert_eq!((told.sent, told.received, told.lasted), (3, 4, Some(Duration::from_nanos(1_500))));
    }

    #[test]
    fn each_stage_is_an_end_or_none_and_only_what_was_open_has_lasted() {
        for (stage, ended, lasted) in [
            (Stage::Connecting, None, false),
            (Stage::Open, None, false),
            (Stage::Finished, Some(CloseReason::Finished), true),
            (Stage::SourceReset, Some(CloseReason::SourceReset), true),
            (Stage::DestinationReset, Some(CloseReason::DestinationReset), true),
            (Stage::Refused, Some(CloseReason::DestinationRefused), false),
            (Stage::Unanswered, Some(CloseReason::DestinationUnreachable), false),
        ] {
            let told = decode(&bytes(&record(stage))).expect("a connection");
            assert_eq!((told.ended, told.lasted.is_some()), (ended, lasted), "{stage:?}");
        }
    }

    #[test]
    fn records_of_another_length_are_left_out() {
        assert_eq!(decode(&bytes(&record(Stage::Open))[1..]), None);
    }
}
