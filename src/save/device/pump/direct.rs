//! What the pump does for chunks that go from spare memory to the file by cuFile.

use super::{Flight, Job, Leaving, Mark, Pump};
use crate::cuda::gds::GdsFile;
use crate::error::{Error, ErrorKind, Result};
use crate::save::device::direct::{unsupported, DirectStorage, Hashing, Layout};
use crate::save::device::flight::Chunks;
use crate::save::device::spare::Spare;
use crate::save::device::{Bytes, OnDevice, Snapshot};
use crate::sync::Arc;

/// A copier has so many bytes written by one call.
const PIECE_BYTES: u64 = 16 << 20;

impl Pump<'_> {
    /// Opens the file and loads the code that hashes, where a job's chunks are to go directly. Where that cannot be, they go through
    /// the staging pool, or the save fails.
    pub(super) fn prepare_direct(&mut self, at: usize) -> Result<()> {
        let job = &self.jobs[at];
        let how = job.direct_storage;
        // What cannot be, or was refused before, is not tried again: some of these calls may wait for a device.
        if how == DirectStorage::Off || how == DirectStorage::Auto && job.layout.is_none() {
            return Ok(());
        }
        let prepared = self.try_prepare_direct(at);
        let job = &mut self.jobs[at];
        match prepared {
            Ok(file) => job.file = Some(file),
            Err(error) if how == DirectStorage::Required => return Err(error),
            Err(_) => job.layout = None,
        }
        Ok(())
    }

    fn try_prepare_direct(&mut self, at: usize) -> Result<Arc<GdsFile>> {
        let job = &self.jobs[at];
        if job.snapshot == Snapshot::Staging {
            return Err(unsupported("no snapshot is taken into spare memory"));
        }
        Layout::of(&*job.source()?, job.held.save().chunk_bytes)?;
        if !job.locked {
            return Err(unsupported("the staging pool could not be page-locked"));
        }
        let lane = &mut self.lanes[job.lanes[0]];
        let file = self.file.open(&self.shared.region, job.direct_storage).and_then(|file| {
            lane.load_hasher()?;
            Ok(file)
        });
        file.inspect_err(|_| self.shared.exchange.refuse_direct())
    }

    /// Makes spares known to cuFile, where chunks are to go directly from them. Where that cannot be, they do not, or the save fails.
    pub(super) fn register(
        &mut self,
        at: usize,
        mut spares: Vec<(usize, Spare)>,
    ) -> Result<Vec<(usize, Spare)>> {
        let job = &mut self.jobs[at];
        if job.layout.is_some() {
            if let Err(error) = spares.iter_mut().try_for_each(|(_, spare)| spare.register()) {
                if job.direct_storage == DirectStorage::Required {
                    spares.into_iter().for_each(|(lane, spare)| self.lanes[lane].return_spare(spare));
                    return Err(error);
                }
                job.layout = None;
                self.shared.exchange.refuse_direct();
            }
        }
        Ok(spares)
    }

    /// Enqueues the hashing of chunks in a job's spare, as there are buffers for the hashes.
    pub(super) fn enqueue_hashing(&mut self, at: usize) -> Result<bool> {
        let mut moved = false;
        let buffer_bytes = self.shared.region.pool().buffer_bytes();
        while let Some(hashing) = self.jobs[at].next_to_hash(buffer_bytes) {
            let Some((lane, spare)) = self.jobs[at].spares.first().cloned() else { break };
            if !self.lanes[lane].has_room_to_hash()? {
                break;
            }
            let Some(buffer) = self.free_buffers(1).pop() else { break };
            moved = true;
            let job = &mut self.jobs[at];
            job.hashed += hashing.count();
            let chunk_bytes = job.held.save().chunk_bytes;
            let lent = vec![(hashing.chunks.start, buffer)];
            let mut flight = Flight::new(job.number(), Vec::new(), lent, Leaving::default());
            let enqueued = self.lanes[lane].hash(&spare, &hashing, chunk_bytes, &flight);
            flight.hashing = Some(hashing);
            let failure = match enqueued {
                Ok(event) => {
                    flight.marks.push(Mark::Event(event));
                    None
                }
                Err(error) => {
                    // Some of it may run all the same.
                    flight.marks.extend(self.lanes[lane].when_idle());
                    Some(error)
                }
            };
            job.flights += 1;
            self.flights.push_back(flight);
            if let Some(error) = failure {
                self.shared.exchange.refuse_direct();
                return Err(error);
            }
        }
        Ok(moved)
    }
}

/// Chunks whose hashes have come, in pieces for the copiers.
pub(super) fn hashed(job: &Job, hashing: &Hashing, brought: &Chunks) -> Result<Vec<Bytes>> {
    let (Some((_, buffer)), Some((_, spare)), Some(file)) = (brought.first(), job.spares.first(), &job.file)
    else {
        return Err(Error::new(ErrorKind::Internal, "save", "chunks were hashed that are nowhere"));
    };
    let chunk_bytes = job.held.save().chunk_bytes;
    let most = (PIECE_BYTES / chunk_bytes).max(1) as usize;
    let piece = |(at, hashes): (usize, &[u128])| {
        let skip = (at * most) as u64;
        Bytes::OnDevice(OnDevice {
            first: hashing.chunks.start + skip,
            hashes: hashes.to_vec(),
            spare: spare.clone(),
            at: hashing.at + skip * chunk_bytes,
            file: file.clone(),
        })
    };
    Ok(hashing.parse(buffer).chunks(most).enumerate().map(piece).collect())
}
