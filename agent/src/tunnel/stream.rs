//! One captured connection in a tunnel, whatever the tunnel's form.

use std::sync::Weak;
use std::task::{Context, Poll};

use super::pool::{self, Slot};
use super::{hbone, single};
use crate::relay::{Broken, Fault, Sink, Slices, Source};

/// A stream that is open.
#[derive(Debug)]
pub struct Stream {
    /// The half that gives bytes.
    pub source: StreamSource,
    /// The half that takes them.
    pub sink: StreamSink,
    pub(super) home: Option<Weak<Slot>>,
}

/// The half of a stream that gives bytes.
#[derive(Debug)]
pub enum StreamSource {
    /// In an HBONE tunnel.
    Hbone(hbone::HboneSource),
    /// In a tunnel of its own.
    Single(single::SingleSource),
}

/// The half of a stream that takes bytes.
#[derive(Debug)]
pub enum StreamSink {
    /// In an HBONE tunnel.
    Hbone(hbone::HboneSink),
    /// In a tunnel of its own.
    Single(single::SingleSink),
}

impl Stream {
    pub(super) fn hbone((source, sink): (hbone::HboneSource, hbone::HboneSink)) -> Self {
        Self { source: StreamSource::Hbone(source), sink: StreamSink::Hbone(sink), home: None }
    }

    /// Gives the tunnel back when the stream has ended in order; else the tunnel ends with it.
    pub fn end(self) {
        if let (Some(home), StreamSource::Single(source), StreamSink::Single(sink)) = (self.home, self.source, self.sink) {
            pool::give_back(&home, source, sink);
        }
    }
}

impl Source for StreamSource {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<()>, Broken>> {
        match self {
            Self::Hbone(source) => source.poll_fill(cx),
            Self::Single(source) => source.poll_fill(cx),
        }
    }

    fn filled<'a>(&'a self, slices: &mut Slices<'a>) {
        match self {
            Self::Hbone(source) => source.filled(slices),
            Self::Single(source) => source.filled(slices),
        }
    }

    fn consume(&mut self, bytes: usize) {
        match self {
            Self::Hbone(source) => source.consume(bytes),
            Self::Single(source) => source.consume(bytes),
        }
    }

    fn holds(&self) -> bool {
        match self {
            Self::Hbone(source) => source.holds(),
            Self::Single(source) => source.holds(),
        }
    }

    fn poll_broken(&mut self, cx: &mut Context<'_>) -> Poll<Broken> {
        match self {
            Self::Hbone(source) => source.poll_broken(cx),
            Self::Single(source) => source.poll_broken(cx),
        }
    }
}

impl Sink for StreamSink {
    fn poll_move<S: Source>(&mut self, cx: &mut Context<'_>, source: &mut S) -> Poll<Result<usize, Fault>> {
        match self {
            Self::Hbone(sink) => sink.poll_move(cx, source),
            Self::Single(sink) => sink.poll_move(cx, source),
        }
    }

    fn holds(&self) -> bool {
        match self {
            Self::Hbone(sink) => sink.holds(),
            Self::Single(sink) => sink.holds(),
        }
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        match self {
            Self::Hbone(sink) => sink.poll_finish(cx),
            Self::Single(sink) => sink.poll_finish(cx),
        }
    }

    fn poll_broken(&mut self, cx: &mut Context<'_>) -> Poll<Broken> {
        match self {
            Self::Hbone(sink) => sink.poll_broken(cx),
            Self::Single(sink) => sink.poll_broken(cx),
        }
    }

    fn reset(&mut self) {
        match self {
            Self::Hbone(sink) => sink.reset(),
            Self::Single(sink) => sink.reset(),
        }
    }
}
