//! One captured connection in a tunnel, whatever the tunnel's form.

use std::sync::Weak;

use bytes::Bytes;

use super::pool::{self, Slot};
use super::{hbone, single};
use crate::relay::{Broken, Sink, Source};

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
    async fn chunk(&mut self) -> Result<Option<Bytes>, Broken> {
        match self {
            Self::Hbone(source) => source.chunk().await,
            Self::Single(source) => source.chunk().await,
        }
    }

    fn passed_on(&mut self, bytes: usize) {
        match self {
            Self::Hbone(source) => source.passed_on(bytes),
            Self::Single(source) => source.passed_on(bytes),
        }
    }
}

impl Sink for StreamSink {
    async fn write(&mut self, chunk: Bytes) -> Result<(), Broken> {
        match self {
            Self::Hbone(sink) => sink.write(chunk).await,
            Self::Single(sink) => sink.write(chunk).await,
        }
    }

    async fn broken(&mut self) -> Broken {
        match self {
            Self::Hbone(sink) => sink.broken().await,
            Self::Single(sink) => sink.broken().await,
        }
    }

    async fn finish(&mut self) -> Result<(), Broken> {
        match self {
            Self::Hbone(sink) => sink.finish().await,
            Self::Single(sink) => sink.finish().await,
        }
    }

    fn reset(&mut self) {
        match self {
            Self::Hbone(sink) => sink.reset(),
            Self::Single(sink) => sink.reset(),
        }
    }
}
