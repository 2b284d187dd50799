//! Chunks that devices bring into the staging pool, enqueued in groups.

use super::{Flight, Leaving, Pump};
use crate::cuda::CopyList;
use crate::error::Result;
use crate::save::device::batch::{Batch, To, PIECE_COPIES};
use crate::save::device::lane::Between;
use crate::staging::StagingBuffer;

/// Chunks are enqueued in groups of so many bytes: long copies use the bus best.
const GROUP_BYTES: usize = 16 << 20;
/// No group takes more than this share of the pool, so that one can be on its way while another is written.
const GROUP_SHARE: usize = 4;
/// Of a large pool groups take this share, up to so many bytes: each costs calls of the driver, and until all are enqueued a
/// trainer may wait.
const LARGE_GROUP_SHARE: usize = 64;
pub(super) const LARGE_GROUP_BYTES: usize = 64 << 20;
/// So many buffers, or that share of the pool, are left to others, who would else wait for as long as a stream takes to
/// reach the copies.
const LEFT_BUFFERS: usize = 4;
const LEFT_SHARE: usize = 4;

impl Pump<'_> {
    /// The next group of a job, where there are buffers. True where there is one.
    pub(super) fn next_group(&mut self, at: usize) -> Result<bool> {
        if self.jobs[at].peek().is_none() || !self.jobs[at].is_ready()? {
            return Ok(false);
        }
        let buffers = self.free_buffers(self.group());
        if buffers.is_empty() {
            return Ok(false);
        }
        let job = &mut self.jobs[at];
        let mut lists = vec![CopyList::default(); job.lanes.len()];
        let (mut chunks, mut bytes) = (Vec::with_capacity(buffers.len()), 0);
        for mut buffer in buffers {
            let Some((chunk, len)) = job.take_chunk(&mut buffer, &mut lists)? else { break };
            bytes += len;
            chunks.push((chunk, buffer));
            if copies_of(&lists) >= PIECE_COPIES {
                break;
            }
        }
        let leaving = match job.spares.is_empty() {
            true => Leaving { chunks: chunks.len() as u64, bytes },
            // They left with the snapshot.
            false => Leaving::default(),
        };
        let flight = Flight::new(job.number(), Vec::new(), chunks, leaving);
        job.batch = Some(Batch::new(To::Pool(flight), &lists, |_| Between::default()));
        Ok(true)
    }

    /// How many buffers a group takes.
    pub(super) fn group(&self) -> usize {
        let pool = self.shared.region.pool();
        group_of(pool.buffer_bytes(), pool.buffer_count())
    }

    /// How many buffers devices may have at the same time.
    pub(super) fn most_buffers(&self) -> usize {
        let count = self.shared.region.pool().buffer_count();
        count - (count / LEFT_SHARE).clamp(1, LEFT_BUFFERS)
    }

    /// At most so many, where others are left enough.
    pub(super) fn free_buffers(&self, most: usize) -> Vec<StagingBuffer> {
        let pool = self.shared.region.pool();
        let left = pool.buffer_count() - self.most_buffers();
        let free = pool.free_count().saturating_sub(left);
        std::iter::from_fn(|| pool.try_acquire()).take(most.min(free)).collect()
    }
}

pub(super) fn copies_of(lists: &[CopyList]) -> usize {
    lists.iter().map(|list| list.copies().len()).sum()
}

/// How many buffers of a pool a group may take.
fn group_of(buffer_bytes: usize, buffer_count: usize) -> usize {
    let bytes = (buffer_bytes * (buffer_count / LARGE_GROUP_SHARE)).clamp(GROUP_BYTES, LARGE_GROUP_BYTES);
    (bytes / buffer_bytes).min(buffer_count / GROUP_SHARE).max(1)
}

#[cfg(test)]
mod tests {
    use super::group_of;

    #[test]
    fn groups_are_long_and_leave_most_of_the_pool() {
        const MIB: usize = 1 << 20;
        for (buffer, count, expected) in [
            (MIB, 256, 16),
            (MIB, 8, 2),
            (MIB, 2, 1),
            (MIB, 2048, 32),
            (MIB, 4200, 64),
            (MIB, 100_000, 64),
            (4 * MIB, 64, 4),
            (128 * MIB, 100, 1),
        ] {
            assert_eq!(group_of(buffer, count), expected, "{count} of {buffer} bytes");
        }
    }
}
