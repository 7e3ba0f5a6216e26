//! A tunnel's handshake as a table, made from what was captured and what both agents recorded.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::tls::{self, Hello, Kind, Record};
use crate::wire::{Direction, Streams};

/// The port of tunnels.
pub(crate) const TUNNEL_PORT: u16 = 15008;

/// A tunnel as it was captured.
#[derive(Debug)]
pub(crate) struct Tunnel {
    pub(crate) client: SocketAddrV4,
    pub(crate) server: SocketAddrV4,
    pub(crate) hello: Hello,
    pub(crate) choice: Hello,
    up: Side,
    down: Side,
}

/// One direction, with the records in it.
#[derive(Debug)]
struct Side {
    stream: Direction,
    records: Vec<Record>,
}

/// What the agents and the application recorded of the connection that the tunnel was made for.
#[derive(Debug)]
pub(crate) struct Recorded {
    pub(crate) dialled: String,
    pub(crate) captured: u64,
    pub(crate) client_handshakes: u64,
    pub(crate) server_handshakes: u64,
    /// The identity of the server that the client's agent logged, and the reverse.
    pub(crate) server_identity: String,
    pub(crate) client_identity: String,
    pub(crate) client_serial: String,
    pub(crate) server_serial: String,
    pub(crate) allowed: u64,
    pub(crate) delivered: u64,
    pub(crate) application_saw: String,
    pub(crate) status: u16,
}

/// The tunnels between two pods, the earliest first.
///
/// # Errors
///
/// If one is not TLS from its first byte to the last that was kept.
pub(crate) fn tunnels(streams: &Streams, client: Ipv4Addr, server: Ipv4Addr) -> Result<Vec<Tunnel>> {
    let server = SocketAddrV4::new(server, TUNNEL_PORT);
    let ups = streams.iter().filter(|((source, destination), _)| *source.ip() == client && *destination == server);
    let mut tunnels = Vec::new();
    for ((source, _), up) in ups {
        let down = streams.get(&(server, *source)).with_context(|| format!("nothing came back from {server} to {source}"))?;
        let (up, down) = (Side::read(up)?, Side::read(down)?);
        let hello = tls::client_hello(&up.stream.text()).with_context(|| format!("the first bytes from {source} to {server}"))?;
        let choice =
            tls::server_hello(&down.stream.text()).with_context(|| format!("the first bytes from {server} to {source}"))?;
        tunnels.push(Tunnel { client: *source, server, hello, choice, up, down });
    }
    tunnels.sort_by_key(|tunnel| tunnel.up.stream.opened);
    Ok(tunnels)
}

impl Side {
    fn read(stream: &Direction) -> Result<Self> {
        let records = tls::records(&stream.text())?;
        let hellos = records.iter().take_while(|record| record.kind == Kind::Handshake).count();
        let readable = records.iter().skip(hellos).find(|record| !matches!(record.kind, Kind::Sealed | Kind::ChangeCipherSpec));
        ensure!(readable.is_none(), "a record after the hello is not sealed: {readable:?}");
        Ok(Self { stream: stream.clone(), records })
    }

    /// When the last byte of a record passed.
    fn time_of(&self, record: &Record) -> Option<Duration> {
        self.stream.time_of(record.content.end.checked_sub(1)?)
    }

    fn sealed(&self) -> impl Iterator<Item = (Duration, &Record)> {
        let sealed = self.records.iter().filter(|record| record.kind == Kind::Sealed);
        sealed.filter_map(|record| Some((self.time_of(record)?, record)))
    }
}

impl Tunnel {
    /// In words: what both agreed on.
    pub(crate) fn agreed(&self) -> String {
        [&self.choice.versions, &self.choice.suites, &self.choice.key_shares].map(|words| words.join(" ")).join(", ")
    }

    /// Bytes on the wire and sealed records, both directions together.
    pub(crate) fn volume(&self) -> (u64, usize) {
        (self.up.stream.bytes + self.down.stream.bytes, self.up.sealed().count() + self.down.sealed().count())
    }

    /// The table, with its head. States are those of RFC 8446, appendix A, that the messages before lead to.
    pub(crate) fn table(&self, recorded: &Recorded, (client_agent, server_agent): (&str, &str)) -> Result<Vec<Vec<String>>> {
        let opened = self.up.stream.opened.context("the capture has no SYN")?;
        let first_up = self.up.sealed().next().context("the client sent nothing sealed")?.0;
        let server_flight: Vec<_> = self.down.sealed().take_while(|(time, _)| *time <= first_up).collect();
        let answered = self.down.sealed().map(|(time, _)| time).find(|time| *time > first_up);
        let client_flight: Vec<_> =
            self.up.sealed().take_while(|(time, _)| answered.is_none_or(|answered| *time < answered)).collect();
        let hello_at = self.up.stream.time_of(0);
        let choice_at = self.down.stream.time_of(0);
        let at = |time: Option<Duration>| {
            time.map_or_else(String::new, |time| format!("{:.1}", (time.as_secs_f64() - opened.as_secs_f64()) * 1000.0))
        };
        let sealed = |flight: &[(Duration, &Record)]| {
            let bytes: usize = flight.iter().map(|(_, record)| record.content.len()).sum();
            let plural = if flight.len() == 1 { "" } else { "s" };
            format!("{} sealed record{plural}, {bytes} bytes", flight.len())
        };
        let hello = &self.hello;
        let server_name = if hello.names_server { "a server name" } else { "no server name" };
        let mut rows = Rows::new(["ms", "from", "what", "known from", "client", "server"]);
        rows.add(["", "application", &format!("connect() to {}", recorded.dialled), "curl", "", ""]);
        rows.add([
            "",
            "kernel",
            &format!("connect4 hands it to {client_agent} ({} captured)", recorded.captured),
            "metrics",
            "START",
            "START",
        ]);
        rows.add([&at(Some(opened)), client_agent, &format!("TCP SYN {} to {}", self.client, self.server), "wire", "", ""]);
        rows.add([&at(self.down.stream.opened), server_agent, "TCP SYN+ACK, in the destination pod's namespace", "wire", "", ""]);
        rows.add([
            &at(hello_at),
            client_agent,
            &format!("ClientHello: {} only, {server_name}", hello.versions.join(" ")),
            "wire",
            "WAIT_SH",
            "",
        ]);
        rows.add(["", "", &format!("key shares {}", hello.key_shares.join(", ")), "wire", "", ""]);
        rows.add(["", "", &format!("protocols {}", hello.protocols.join(", ")), "wire", "", ""]);
        rows.add([&at(choice_at), server_agent, &format!("ServerHello: {}", self.agreed()), "wire", "WAIT_EE", "NEGOTIATED"]);
        rows.add([
            &at(server_flight.last().map(|(time, _)| *time)),
            server_agent,
            &sealed(&server_flight),
            "wire",
            "",
            "WAIT_CERT",
        ]);
        rows.add(["", "", &format!("its certificate has serial {}", short(&recorded.server_serial)), "admin", "", ""]);
        rows.add(["", client_agent, &format!("verifies: {}", recorded.server_identity), "access log", "", ""]);
        let handshakes = format!("its handshake is complete ({} ok)", recorded.client_handshakes);
        rows.add(["", "", &handshakes, "metrics", "CONNECTED", ""]);
        rows.add([&at(Some(first_up)), client_agent, &sealed(&client_flight), "wire", "", ""]);
        rows.add(["", "", &format!("its certificate has serial {}", short(&recorded.client_serial)), "admin", "", ""]);
        rows.add(["", server_agent, &format!("verifies: {}", recorded.client_identity), "access log", "", ""]);
        let handshakes = format!("its handshake is complete ({} ok)", recorded.server_handshakes);
        rows.add(["", "", &handshakes, "metrics", "", "CONNECTED"]);
        rows.add([
            "",
            server_agent,
            &format!("policy: {} allowed; {} delivered to the pod", recorded.allowed, recorded.delivered),
            "metrics",
            "",
            "",
        ]);
        rows.add([&at(answered), "application", &format!("sees {}", recorded.application_saw), "nginx's log", "", ""]);
        rows.add(["", "result", &format!("status {}", recorded.status), "curl", "CONNECTED", "CONNECTED"]);
        Ok(rows.0)
    }
}

/// A table in the making.
struct Rows(Vec<Vec<String>>);

impl Rows {
    fn new(head: [&str; 6]) -> Self {
        Self(vec![head.map(str::to_owned).to_vec()])
    }

    fn add(&mut self, row: [&str; 6]) {
        self.0.push(row.map(str::to_owned).to_vec());
    }
}

/// Enough of a serial number to tell it from another.
pub(crate) fn short(serial: &str) -> &str {
    serial.get(..12).unwrap_or(serial)
}
