//! All copies of a save enqueued at once, to a ring of buffers.

use std::time::{Duration, Instant};

use super::groups::{copies_of, LARGE_GROUP_BYTES};
use super::{Flight, Job, Leaving, Mark, Pump};
use crate::cuda::{CopyList, Device, Event};
use crate::error::{Error, ErrorKind, Result};
use crate::save::device::batch::{Batch, To, PIECE_COPIES};
use crate::save::device::job::Hoard;
use crate::save::device::lane::Between;
use crate::save::device::ring::{Group, Ring, RingParts};
use crate::staging::StagingBuffer;
use crate::sync::Arc;

/// Copies are enqueued at once where no more than so much host memory stands between that of devices: it is kept aside.
const KEPT_BYTES: usize = 16 << 20;
/// A ring is made of no less than this share of the buffers that there are for it.
const ENOUGH_SHARE: usize = 2;
/// Where none has become free for so long they may never be so many: somebody holds them.
const PATIENCE: Duration = Duration::from_millis(100);
/// Places are at least so many: one is filled while another is written.
const PLACES_MIN: usize = 2;
/// Groups are so large that there are no more places than this, within limits.
const PLACES: usize = 8;
/// It takes no longer than this in any case.
const GATHERING_MAX: Duration = Duration::from_secs(1);

impl Pump<'_> {
    /// Whether all copies of a job that has just begun are to be enqueued at once. Otherwise they are when there are buffers for them, and
    /// a thread that has a stream wait for them waits until the last are.
    pub(super) fn decide_to_queue(&mut self, at: usize) -> Result<()> {
        let most = self.most_buffers();
        // Copiers that call cuFile may be held up in the driver; a save that will have them do so waits for rings to be over.
        let wants_cufile = |job: &Job| !job.failed && job.lanes.is_empty() && job.layout.is_some();
        let copiers_are_free = !self.file.is_open() && !self.jobs.iter().any(wants_cufile);
        let job = &mut self.jobs[at];
        // Copies into memory that is not page-locked hold this thread up in the driver.
        if !job.flag_waits || !job.spares.is_empty() || !job.locked || !copiers_are_free {
            return Ok(());
        }
        // In a queue that all streams share, the program's work would wait for the copiers.
        let can = |device: &Arc<Device>| device.has_words() && !device.has_one_queue();
        let can = job.source()?.devices().iter().all(can);
        job.queues = can && most > PLACES_MIN && job.peek().is_some() && job.keep_host(KEPT_BYTES)?;
        if job.queues {
            job.hoard.chunks = job.chunks_to_fetch()?;
        }
        Ok(())
    }

    /// The next group of a job, for the ring that is made of the buffers that it gathers. True where something moved.
    pub(super) fn next_for_ring(&mut self, at: usize) -> Result<bool> {
        let job = &mut self.jobs[at];
        if job.peek().is_none() {
            return Ok(false);
        }
        let Some(ring) = job.ring.clone() else { return self.gather(at) };
        let turn = ring.give();
        let mut lists = vec![CopyList::default(); job.lanes.len()];
        let mut group = Group { turn, chunks: Vec::new(), devices: Vec::new(), bytes: 0 };
        for &address in ring.addresses(turn) {
            let Some(listed) = job.list_chunk(address, &mut lists)? else { break };
            group.chunks.push(listed.chunk);
            group.bytes += listed.bytes;
            if copies_of(&lists) >= PIECE_COPIES {
                break;
            }
        }
        let bring = lists.iter().enumerate().filter(|(_, copies)| !copies.is_empty());
        group.devices.extend(bring.map(|(device, _)| device));
        let words = |device| Between {
            free: ring.is_free(device, turn),
            arrived: Some(ring.has_arrived(device, turn)),
        };
        job.batch = Some(Batch::new(To::Ring(group), &lists, words));
        Ok(true)
    }

    /// Makes the ring of a job once there are buffers enough. True where something moved.
    fn gather(&mut self, at: usize) -> Result<bool> {
        let chunks = usize::try_from(self.jobs[at].hoard.chunks).unwrap_or(usize::MAX);
        // One is for the words.
        let most = chunks.saturating_add(1).min(self.most_buffers());
        let came = self.free_buffers(most.saturating_sub(self.jobs[at].hoard.buffers.len()));
        let hoard = &mut self.jobs[at].hoard;
        let grown = !came.is_empty();
        let since = *hoard.since.get_or_insert_with(Instant::now);
        if grown || hoard.grown_at.is_none() {
            hoard.grown_at = Some(Instant::now());
        }
        hoard.buffers.extend(came);
        let enough = most.div_ceil(ENOUGH_SHARE).max(PLACES_MIN + 1).min(most);
        if hoard.buffers.len() < enough {
            let in_vain = hoard.grown_at.is_some_and(|at| at.elapsed() > PATIENCE);
            if in_vain || since.elapsed() > GATHERING_MAX {
                // As they come, then.
                hoard.buffers.clear();
                self.jobs[at].queues = false;
                return Ok(true);
            }
            return Ok(grown);
        }
        let ring = self.make_ring(at)?;
        if !self.shared.exchange.rings.add(ring.clone()) {
            return Err(Error::new(ErrorKind::Cancelled, "save", "the store is being closed"));
        }
        self.jobs[at].ring = Some(ring);
        Ok(true)
    }

    /// Of what was gathered.
    fn make_ring(&mut self, at: usize) -> Result<Arc<Ring>> {
        let (group, buffer_bytes) = (self.group(), self.shared.region.pool().buffer_bytes());
        let job = &mut self.jobs[at];
        let Hoard { chunks, mut buffers, .. } = std::mem::take(&mut job.hoard);
        let nothing = || Error::new(ErrorKind::Internal, "save", "no buffers were gathered");
        // What goes to neighbours is one copy.
        buffers.sort_unstable_by_key(StagingBuffer::index);
        let words = buffers.pop().ok_or_else(nothing)?;
        // The larger, the fewer there are to be enqueued.
        let large = (buffers.len() / PLACES).min(LARGE_GROUP_BYTES / buffer_bytes);
        let group = group.max(large).min(buffers.len() / PLACES_MIN).max(1);
        let ring = Ring::new(RingParts {
            save: job.held.save().clone(),
            source: job.source()?,
            kept: std::mem::take(&mut job.kept),
            chunks,
            words,
            buffers,
            group,
            deadline: job.deadline,
        })?;
        job.waits_for_copiers = chunks > ring.chunks();
        Ok(ring)
    }

    /// Nothing more is enqueued to the ring of a job, if it has one: a flight keeps it until the GPU is done with it. Returns what is
    /// reached then, for streams of the program.
    pub(super) fn end_ring(&mut self, at: usize) -> Result<Vec<Arc<Event>>> {
        let job = &mut self.jobs[at];
        let Some(ring) = job.ring.take() else { return Ok(Vec::new()) };
        ring.seal();
        job.flights += 1;
        let mut flight = Flight::new(job.number(), Vec::new(), Vec::new(), Leaving::default());
        flight.ring = Some(ring);
        let ends = self.ends(at);
        match &ends {
            Ok(ends) => flight.marks.extend(ends.iter().cloned().map(Mark::Event)),
            Err(_) => self.mark_when_idle(at, &mut flight),
        }
        self.flights.push_back(flight);
        ends
    }
}
