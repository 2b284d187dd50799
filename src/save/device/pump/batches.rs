//! Enqueuing: one batch of copies of a job after the other, as far as the driver's queues have room.

use super::{Flight, Pump};
use crate::cuda::Event;
use crate::error::Result;
use crate::save::device::batch::{Batch, To};
use crate::sync::Arc;

impl Pump<'_> {
    /// Enqueues what there is room for, in buffers and in the driver's queues. True where something moved.
    pub(super) fn enqueue(&mut self, at: usize) -> Result<bool> {
        let mut moved = false;
        loop {
            moved |= self.enqueue_batch(at)?;
            if self.jobs[at].batch.is_some() || !self.next_batch(at)? {
                return Ok(moved);
            }
            moved = true;
        }
    }

    /// Makes a job's next batch of copies, where there can be one now. True where something moved.
    fn next_batch(&mut self, at: usize) -> Result<bool> {
        if self.jobs[at].lanes.is_empty() {
            return Ok(false);
        }
        let hashing = self.enqueue_hashing(at)?;
        let batch = match self.jobs[at].queues {
            true => self.next_for_ring(at)?,
            false => self.next_group(at)?,
        };
        Ok(hashing | batch)
    }

    /// Enqueues a job's batch, if it has one, on each device as far as there is room. True where something moved.
    fn enqueue_batch(&mut self, at: usize) -> Result<bool> {
        let job = &mut self.jobs[at];
        let Some(Batch { pieces, to, refused }) = &mut job.batch else { return Ok(false) };
        let (mut moved, mut left) = (false, false);
        for (pieces, &lane) in pieces.iter_mut().zip(&job.lanes) {
            let lane = &mut self.lanes[lane];
            while let Some(piece) = pieces.left.front() {
                let enqueued = match to {
                    To::Pool(flight) => lane.fetch(&piece.copies, flight).map(|end| flight.add(end)),
                    To::Spare(flight) => lane.snapshot(&piece.copies).map(|end| {
                        pieces.ends.extend(end.clone());
                        flight.add(end)
                    }),
                    To::Ring(_) => lane.fetch_to_ring(&piece.copies, piece.between, pieces.on).map(|on| {
                        pieces.on = on.or(pieces.on);
                        on.is_some()
                    }),
                };
                *refused |= enqueued.is_err();
                if !enqueued? {
                    left = true;
                    break;
                }
                pieces.left.pop_front();
                moved = true;
            }
        }
        if left {
            return Ok(moved);
        }
        self.is_enqueued(at)?;
        Ok(true)
    }

    /// All of a job's batch is enqueued.
    fn is_enqueued(&mut self, at: usize) -> Result<()> {
        let job = &mut self.jobs[at];
        let Some(Batch { pieces, to, .. }) = job.batch.take() else { return Ok(()) };
        match to {
            To::Pool(flight) => {
                job.flights += 1;
                self.flights.push_back(flight);
                if job.spares.is_empty() && job.peek().is_none() {
                    let ends = self.ends(at)?;
                    self.tell_enqueued(at, ends);
                }
            }
            To::Spare(flight) => {
                job.flights += 1;
                self.flights.push_back(flight);
                // What is enqueued later on a lane comes behind its copies.
                for (pieces, &lane) in pieces.iter().zip(&job.lanes) {
                    self.lanes[lane].wait(pieces.ends.iter().map(|end| &**end))?;
                }
                let ends = pieces.into_iter().flat_map(|pieces| pieces.ends).collect();
                self.tell_enqueued(at, ends);
            }
            To::Ring(group) => {
                let is_last = job.peek().is_none();
                if is_last {
                    // The ring has it until all has arrived, which is told when this comes.
                    job.source = None;
                }
                if let Some(ring) = &job.ring {
                    ring.comes(group);
                }
                if is_last {
                    let ends = self.end_ring(at)?;
                    self.tell_enqueued(at, ends);
                }
            }
        }
        Ok(())
    }

    /// A job has failed in the midst of a batch: what of it is enqueued may run.
    pub(super) fn end_batch(&mut self, at: usize) {
        let job = &mut self.jobs[at];
        let Some(Batch { to, refused, .. }) = job.batch.take() else { return };
        let (To::Pool(mut flight) | To::Spare(mut flight)) = to else { return };
        job.flights += 1;
        if refused {
            self.mark_when_idle(at, &mut flight);
        }
        self.flights.push_back(flight);
    }

    /// What tells that all is done that may be enqueued for a job, where no event could be recorded.
    pub(super) fn mark_when_idle(&self, at: usize, flight: &mut Flight) {
        let lanes = self.jobs[at].lanes.iter();
        flight.marks.extend(lanes.flat_map(|&lane| self.lanes[lane].when_idle()));
    }

    /// What is reached when all is done that was enqueued on a job's lanes.
    pub(super) fn ends(&mut self, at: usize) -> Result<Vec<Arc<Event>>> {
        let mut ends = Vec::new();
        for &lane in &self.jobs[at].lanes {
            ends.extend(self.lanes[lane].ends()?);
        }
        Ok(ends)
    }

    /// All copies out of the caller's memory are enqueued; streams of the program may wait for these.
    fn tell_enqueued(&self, at: usize, mut ends: Vec<Arc<Event>>) {
        if self.shared.faults.stream_waits_for_nothing() {
            ends.clear();
        }
        self.jobs[at].copies.all_enqueued(ends);
    }
}
