//! The thread that enqueues copies and looks at how far they are. Which groups of chunks are brought is in `groups`, what goes to spare memory
//! first in `spares`, what goes past host memory in `direct`, what is enqueued all at once in `queue`; how any of it is enqueued in `batches`.

mod batches;
mod direct;
mod groups;
mod queue;
mod spares;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::direct::{DirectFile, DirectStorage};
use super::flight::{Arrival, Flight, Leaving, Mark};
use super::job::{late, Job};
use super::landing::Pace;
use super::lane::Lane;
use super::spare::Spare;
use super::{Arrived, Bytes, Snapshot};
use crate::cuda::Relaxed;
use crate::error::{Error, ErrorKind, Result};
use crate::save::saver::Shared;
use crate::sync::{thread, Arc};

/// How long a store that is closed waits for copies on their way.
const CLOSE_GRACE: Duration = Duration::from_secs(10);

pub(in crate::save) fn run_pump(shared: &Shared) {
    // Where it cannot be set, programs that capture graphs meanwhile must do so in their thread's own mode.
    let _relaxed = Relaxed::enter();
    let mut pump = Pump {
        shared,
        lanes: Vec::new(),
        jobs: VecDeque::new(),
        flights: VecDeque::new(),
        lent: Vec::new(),
        file: DirectFile::default(),
    };
    let mut pace = Pace::new();
    let mut closing_since = None;
    loop {
        let ticket = shared.exchange.work.ticket();
        let moved = pump.step();
        if moved {
            pace.moved();
            continue;
        }
        let idle = pump.jobs.is_empty() && pump.flights.is_empty();
        if shared.closing() {
            let since = *closing_since.get_or_insert_with(Instant::now);
            if !idle && since.elapsed() > CLOSE_GRACE {
                return pump.abandon();
            }
            if idle && shared.all_ended() {
                return;
            }
        }
        let until = (!idle).then(|| pace.next_look());
        let _ = shared.exchange.work.wait(ticket, until);
    }
}

struct Pump<'a> {
    shared: &'a Shared,
    lanes: Vec<Lane>,
    /// Oldest first.
    jobs: VecDeque<Job>,
    /// In the order of their enqueuing. Those of jobs that have gone only wait for their buffers.
    flights: VecDeque<Flight>,
    /// Spare memory of jobs that have gone, which is still being written from, with its lane.
    lent: Vec<(usize, Arc<Spare>)>,
    /// Where chunks go that do not pass through the staging pool.
    file: DirectFile,
}

impl Pump<'_> {
    /// True where something moved.
    fn step(&mut self) -> bool {
        let mut moved = false;
        while let Some(new) = self.shared.exchange.next_job() {
            self.jobs.extend(Job::new(new, |how| self.shared.exchange.allows_direct(how)));
            moved = true;
        }
        // Behind that: what was let go of before a save was begun is there for it.
        self.take_back();
        moved |= self.land();
        for at in 0..self.jobs.len() {
            moved |= self.advance(at);
        }
        moved |= self.end_jobs();
        let wants_memory = self.wants_memory();
        if self.shared.exchange.courtesy.ask(wants_memory) {
            self.shared.arrivals_came();
        }
        moved
    }

    /// Copies of the only save are on their way, all of them, and it may be waited for that they end.
    fn wants_memory(&mut self) -> bool {
        let alone = self.jobs.len() == 1 && self.shared.at_most_one_is_active();
        let mut job = self.jobs.front_mut().filter(|_| alone);
        job.as_mut().is_some_and(|job| {
            let fills_buffers = job.spares.is_empty() && !job.waits_for_copiers;
            !job.failed && fills_buffers && job.flights > 0 && job.is_enqueued()
        })
    }

    // ---- enqueuing ------------------------------------------------------------------------------------

    /// Enqueues what a job's copies find buffers for.
    fn advance(&mut self, at: usize) -> bool {
        if self.jobs[at].failed {
            return false;
        }
        let result = self.check(at).and_then(|()| match self.jobs[at].lanes.is_empty() {
            true => self.try_begin(at),
            false => Ok(false),
        });
        let result = result.and_then(|begun| Ok(self.enqueue(at)? | begun));
        result.unwrap_or_else(|error| {
            self.fail(at, error);
            true
        })
    }

    /// Errors where the save has failed, or has been on its way for too long.
    fn check(&self, at: usize) -> Result<()> {
        let job = &self.jobs[at];
        job.held.save().check()?;
        match job.is_late() {
            true => Err(late()),
            false => Ok(()),
        }
    }

    fn fail(&mut self, at: usize, error: Error) {
        let job = &mut self.jobs[at];
        job.failed = true;
        job.held.save().fail(error);
        job.copies.failed();
        self.end_batch(at);
        // It has failed anyhow.
        let _ = self.end_ring(at);
    }

    /// False where its turn has not come: another save gathers buffers; or an earlier one of the same device has yet to be enqueued; or cuFile
    /// would be called while copies wait for copiers, which the driver may hold up in such calls; or a stream has no room.
    fn try_begin(&mut self, at: usize) -> Result<bool> {
        let source = self.jobs[at].source()?;
        let gathers = self.jobs.iter_mut().enumerate().any(|(other, job)| other != at && job.gathers());
        if gathers || self.jobs.iter_mut().take(at).any(|job| job.is_ahead_on(&source)) {
            return Ok(false);
        }
        if self.jobs[at].layout.is_some() && self.shared.exchange.rings.wait_for_copiers() {
            return Ok(false);
        }
        for lane in &mut self.lanes {
            let is_used = source.devices().iter().any(|device| lane.is_of(device));
            if is_used && !lane.has_room_to_wait(source.after().len())? {
                return Ok(false);
            }
        }
        self.begin(at)?;
        self.decide_to_queue(at)?;
        Ok(true)
    }

    /// Finds the lanes, orders them after the caller's streams, and takes the snapshot, where one is to be taken.
    fn begin(&mut self, at: usize) -> Result<()> {
        let source = self.jobs[at].source()?;
        let mut lanes = Vec::with_capacity(source.devices().len());
        for device in source.devices() {
            let known = self.lanes.iter().position(|lane| lane.is_of(device));
            let lane = match known {
                Some(lane) => lane,
                None => {
                    self.lanes.push(Lane::new(device)?);
                    self.lanes.len() - 1
                }
            };
            self.jobs[at].locked &= self.shared.region.pool().register(device);
            if !self.shared.faults.copy_before_the_event() {
                self.lanes[lane].wait(source.after().iter())?;
            }
            lanes.push(lane);
        }
        self.jobs[at].lanes = lanes;
        self.prepare_direct(at)?;
        let required = self.jobs[at].direct_storage == DirectStorage::Required;
        match self.jobs[at].snapshot {
            Snapshot::Staging => Ok(()),
            Snapshot::Spare => self.take_spares(at, false).and_then(|spares| self.snapshot(at, spares)),
            Snapshot::Auto => match self.take_spares(at, true) {
                Ok(spares) => self.snapshot(at, spares),
                Err(error) if error.kind() == ErrorKind::OutOfMemory && !required => Ok(()),
                Err(error) => Err(error),
            },
        }
    }

    // ---- landing --------------------------------------------------------------------------------------

    /// Takes what has arrived to the copiers.
    fn land(&mut self) -> bool {
        let mut landed = false;
        let mut at = 0;
        while let Some(flight) = self.flights.get_mut(at) {
            let early = self.shared.faults.land_early() && flight.ring.is_none();
            match flight.look() {
                Arrival::Pending if !early => at += 1,
                Arrival::Pending | Arrival::Reached => {
                    self.settle(at, None);
                    landed = true;
                }
                Arrival::Failing(error) => {
                    landed |= self.lose(at, error);
                    at += 1;
                }
                Arrival::Lost(error) => {
                    self.settle(at, Some(error));
                    landed = true;
                }
            }
        }
        if landed {
            self.shared.arrivals_came();
        }
        landed
    }

    /// A flight's device reports an error: its job has failed. True where that is news.
    fn lose(&mut self, at: usize, error: Error) -> bool {
        self.lose_job(self.flights[at].job, error)
    }

    fn lose_job(&mut self, number: u64, error: Error) -> bool {
        let job = self.jobs.iter().position(|job| job.number() == number && !job.failed);
        job.is_some_and(|job| {
            self.fail(job, error);
            true
        })
    }

    /// A flight has ended.
    fn settle(&mut self, at: usize, lost: Option<Error>) {
        if let Some(error) = &lost {
            self.lose(at, error.clone());
        }
        let Some(mut flight) = self.flights.remove(at) else { return };
        let (number, leaving, hashing) = (flight.job, flight.leaving, flight.hashing.take());
        if let Some(ring) = &flight.ring {
            self.shared.exchange.rings.remove(ring);
        }
        let chunks = flight.land();
        let Some(job) = self.jobs.iter_mut().find(|job| job.number() == number) else { return };
        job.flights -= 1;
        if self.shared.faults.die_at_arrival() {
            assert!(self.shared.exchange.rings.is_empty(), "dies, as planted");
        }
        if job.failed {
            return;
        }
        let save = job.held.save().clone();
        let came = match &hashing {
            Some(hashing) => direct::hashed(job, hashing, &chunks),
            None => Ok(chunks.into_iter().map(|(chunk, buffer)| Bytes::Staged { chunk, buffer }).collect()),
        };
        let came = match came {
            Ok(came) => came,
            Err(error) => {
                self.lose_job(number, error);
                return;
            }
        };
        for bytes in came {
            let Ok(at_work) = save.enter() else { return };
            // Taken over by the copier.
            std::mem::forget(at_work);
            self.shared.exchange.arrive(Arrived { save: save.clone(), bytes });
        }
        if job.flights == 0 && job.is_enqueued() {
            // Before `copied` is told.
            job.source = None;
        }
        if leaving.chunks > 0 {
            save.chunks_left(leaving.chunks, leaving.bytes);
        }
    }

    /// Lets go of jobs that are done, or have failed and have nothing on its way any more, or not in time.
    fn end_jobs(&mut self) -> bool {
        let before = self.jobs.len();
        let mut at = 0;
        while let Some(job) = self.jobs.get_mut(at) {
            let late = job.failed && job.is_late();
            let done = job.flights == 0 && (job.failed || job.source.is_none() || job.is_enqueued());
            if !done && !late {
                at += 1;
                continue;
            }
            let Some(mut job) = self.jobs.remove(at) else { break };
            let spares = std::mem::take(&mut job.spares);
            if job.flights > 0 {
                // Copies may still use them, and giving them back would wait for those.
                std::mem::forget(spares);
            } else {
                // Of a save that failed, too: freeing them could wait for a stream.
                self.lent.extend(spares);
                self.take_back();
            }
        }
        before != self.jobs.len()
    }

    /// The store is closed, and copies do not end: what they use stays theirs.
    fn abandon(mut self) {
        for at in 0..self.jobs.len() {
            // Kept by all rings' end.
            self.jobs[at].ring = None;
            let error = Error::new(ErrorKind::Device, "close", "the GPU did not finish its copies");
            self.fail(at, error);
        }
        self.keep();
    }

    /// Giving streams and memory back could wait for the device: it stays its own.
    fn keep(&mut self) {
        self.jobs.drain(..).for_each(|mut job| std::mem::forget(std::mem::take(&mut job.spares)));
        std::mem::forget(std::mem::take(&mut self.lent));
        std::mem::forget(std::mem::take(&mut self.lanes));
        self.shared.exchange.rings.end();
        std::mem::forget(std::mem::take(&mut self.flights));
    }
}

impl Drop for Pump<'_> {
    fn drop(&mut self) {
        self.shared.exchange.courtesy.ask(false);
        // A defect: giving anything back could wait for a stream that waits for this store, which goes on only after this.
        if thread::panicking() {
            self.keep();
        }
    }
}
