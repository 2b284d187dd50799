//! Copies that were enqueued together, and the staging buffers that are lent to them meanwhile.

use std::time::{Duration, Instant};

use super::direct::Hashing;
use super::ring::Ring;
use crate::cuda::{Event, Stream};
use crate::error::{Error, Result};
use crate::staging::StagingBuffer;
use crate::sync::Arc;

/// A device that reports nothing but errors for so long has stopped copying.
const LOST_AFTER: Duration = Duration::from_secs(1);

/// By what it is known that copies are done.
pub(super) enum Mark {
    /// This is reached.
    Event(Arc<Event>),
    /// This is idle: an event could not be recorded.
    Idle(Arc<Stream>),
}

impl Mark {
    fn reached(&self) -> Result<bool> {
        match self {
            Mark::Event(event) => event.reached(),
            Mark::Idle(stream) => stream.idle(),
        }
    }
}

/// Chunks and the buffers that they go to.
pub(super) type Chunks = Vec<(u64, StagingBuffer)>;

/// What leaves the caller's memory.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Leaving {
    pub chunks: u64,
    pub bytes: u64,
}

/// A group of chunks on its way, or a snapshot into spare memory, which has no buffers.
pub(super) struct Flight {
    /// Number of the job that it belongs to.
    pub job: u64,
    /// Its copies are done when all are reached.
    pub marks: Vec<Mark>,
    /// Lent to the copies.
    pub chunks: Chunks,
    /// What leaves the caller's memory with it.
    pub leaving: Leaving,
    /// It brings no chunk but the hashes of these, in its one buffer.
    pub hashing: Option<Hashing>,
    /// All copies to a ring, which is over when they are done.
    pub ring: Option<Arc<Ring>>,
    /// The device has reported nothing but errors since.
    lost_since: Option<Instant>,
}

/// How far a flight is.
pub(super) enum Arrival {
    /// Not all copies are done.
    Pending,
    /// All are.
    Reached,
    /// The device has failed. Whether it still copies is not known.
    Failing(Error),
    /// It has failed, and stopped.
    Lost(Error),
}

impl Flight {
    pub fn new(job: u64, marks: Vec<Mark>, chunks: Chunks, leaving: Leaving) -> Self {
        Flight { job, marks, chunks, leaving, hashing: None, ring: None, lost_since: None }
    }

    /// Some of its copies are done with this event; none: they were not enqueued. True where they were.
    pub fn add(&mut self, end: Option<Arc<Event>>) -> bool {
        let is_some = end.is_some();
        self.marks.extend(end.map(Mark::Event));
        is_some
    }

    pub fn look(&mut self) -> Arrival {
        let (mut pending, mut failure) = (false, None);
        for mark in &self.marks {
            match mark.reached() {
                Ok(reached) => pending |= !reached,
                Err(error) => {
                    failure.get_or_insert(error);
                }
            }
        }
        if let Some(error) = failure {
            let since = self.lost_since.get_or_insert_with(Instant::now);
            // Another device that brings parts of it may go on.
            return match pending || since.elapsed() < LOST_AFTER {
                true => Arrival::Failing(error),
                false => Arrival::Lost(error),
            };
        }
        self.lost_since = None;
        match pending || self.ring.as_ref().is_some_and(|ring| !ring.may_end()) {
            true => Arrival::Pending,
            false => Arrival::Reached,
        }
    }

    /// Its copies are done: the buffers are nobody's but the caller's.
    pub fn land(mut self) -> Chunks {
        if let Some(ring) = self.ring.take() {
            ring.end();
        }
        std::mem::take(&mut self.chunks)
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        // The device may still write to them: better lost than given to somebody else.
        std::mem::forget((std::mem::take(&mut self.chunks), self.ring.take()));
    }
}
