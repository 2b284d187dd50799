//! A stream of the engine, and how much is enqueued on it.
//!
//! The driver's queues have an end (of about a thousand each): a call for which one has no room waits inside the driver until the GPU has come
//! so far, and holds up the program's calls meanwhile. So nothing large is enqueued for which there may be none.

use std::collections::VecDeque;

use crate::cuda::{Device, Event, Stream};
use crate::error::Result;
use crate::sync::Arc;

/// So much is enqueued on a stream, and a few events more.
const LENGTH_MAX: usize = 900;

pub(super) struct Backlog {
    pub stream: Arc<Stream>,
    /// Oldest first: when one is reached, so much more has been done than at the one before.
    ends: VecDeque<(Arc<Event>, usize)>,
    /// What is enqueued, and has not been seen to be done; and what of that is behind the last end.
    length: usize,
    behind: usize,
    most: usize,
}

impl Backlog {
    pub fn new(device: &Arc<Device>) -> Result<Backlog> {
        let stream = Arc::new(Stream::new(device)?);
        // A queue that all streams share is the other's, too.
        let most = if device.has_one_queue() { LENGTH_MAX / 2 } else { LENGTH_MAX };
        Ok(Backlog { stream, ends: VecDeque::new(), length: 0, behind: 0, most })
    }

    /// Whether it takes so many operations more. What is too much for any queue never has room.
    pub fn has_room(&mut self, operations: usize) -> Result<bool> {
        // Asks the driver only where it must.
        while self.length + operations > self.most {
            match self.ends.front() {
                Some((end, done)) if end.reached()? => self.length -= done,
                // Of something that failed half-way no end was recorded.
                None if self.behind > 0 => {
                    self.mark()?;
                    continue;
                }
                _ => return Ok(false),
            }
            self.ends.pop_front();
        }
        Ok(true)
    }

    /// To be called before so many operations are enqueued.
    pub fn grow(&mut self, operations: usize) {
        self.length += operations;
        self.behind += operations;
    }

    /// An event that is reached when all that was enqueued is done.
    pub fn mark(&mut self) -> Result<Arc<Event>> {
        let event = Arc::new(Event::new(self.stream.device())?);
        self.grow(1);
        event.record(&self.stream)?;
        self.ends.push_back((event.clone(), std::mem::take(&mut self.behind)));
        Ok(event)
    }
}
