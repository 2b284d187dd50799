//! Quarantined slots: which they are, and how one is taken back into use.

use std::time::Instant;

use super::{Claimed, Region};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{RecordState, SlotRecord, BLOCK_BYTES, MARK_PINNED, MARK_QUARANTINED};
use crate::medium::Barrier;
use crate::slots::SlotState;
use crate::store::unix_ns;
use crate::sync::now;

/// Zeros written at a time.
const ZEROS_BYTES: u64 = 1 << 20;

/// Bytes rewritten between two flushes.
const FLUSH_BYTES: u64 = 64 << 20;

impl Region {
    /// Quarantined slots with the generation whose flush failed.
    pub fn quarantined(&self) -> Vec<Claimed> {
        self.slots
            .views()
            .iter()
            .enumerate()
            .filter(|(_, view)| view.state == SlotState::Quarantined)
            .map(|(slot, view)| Claimed { slot: slot as u32, generation: view.generation })
            .collect()
    }

    /// Rewrites a quarantined slot in full (a `writing` mark, then zeros), flushes it, and lifts the quarantine.
    /// False where there is nothing to repair any more: another repair was first, or the slot is still being read.
    pub(crate) fn repair(&self, claim: Claimed, deadline: Option<Instant>) -> Result<bool> {
        const OP: &str = "repair";
        // One at a time: a second repair must not write into a slot that the first has given to a save.
        let _maintenance = self.maintenance.lock();
        let view = self.slots.view(claim.slot);
        let mine = view.state == SlotState::Quarantined && view.generation == claim.generation;
        if !mine || view.readers > 0 {
            return Ok(false);
        }
        let layout = self.layout();
        let offset = layout.record_offset(claim.slot);
        self.short_barrier(OP, || {
            self.medium.write_durable(offset, &self.empty_record(claim).encode(), Barrier::WritingMark)
        })?;
        self.records.lock()[claim.slot as usize] = None;
        let zeros = vec![0u8; ZEROS_BYTES as usize];
        let (start, end) =
            (layout.slot_offset(claim.slot), layout.slot_offset(claim.slot) + layout.slot_bytes);
        let (mut at, mut flushed) = (start, start);
        while at < end {
            if deadline.is_some_and(|deadline| now() >= deadline) {
                let message = "the slot was not rewritten in the time given and stays quarantined";
                return Err(Error::new(ErrorKind::TimedOut, OP, message).at_path(&self.path).at_offset(at));
            }
            let step = (end - at).min(ZEROS_BYTES);
            self.medium.copy(at, &zeros[..step as usize]).map_err(|e| e.at_path(&self.path))?;
            at += step;
            if at - flushed >= FLUSH_BYTES || at == end {
                self.medium.fence(Barrier::Chunk).map_err(|e| e.at_path(&self.path))?;
                // Short, so that the marks of saves need not wait for a whole slot to be flushed.
                self.short_barrier(OP, || self.medium.persist(flushed, at - flushed, Barrier::Payload))?;
                flushed = at;
            }
        }
        // A pin, too: of a checkpoint, or of a save whose quarantine could not be noted.
        self.mark_slot(claim.slot, claim.generation, 0, MARK_QUARANTINED | MARK_PINNED)?;
        let _ = self.slots.unpin(claim.slot, claim.generation);
        let lifted = self.slots.lift_quarantine(claim.slot, claim.generation);
        self.slot_freed.notify_all();
        Ok(lifted)
    }

    /// A barrier beside the committer's: its failure counts before any other can be believed.
    fn short_barrier(&self, op: &'static str, barrier: impl FnOnce() -> Result<()>) -> Result<()> {
        let _short = self.short_barriers.lock();
        self.believe(op, barrier())
    }

    /// Says only that the slot holds no checkpoint; the sizes are the smallest that a record may have.
    fn empty_record(&self, claim: Claimed) -> SlotRecord {
        SlotRecord {
            uuid: self.superblock.uuid,
            slot: claim.slot,
            generation: claim.generation,
            state: RecordState::Writing,
            step: 0,
            run_id: self.options.run_id,
            payload_bytes: BLOCK_BYTES,
            header_bytes: BLOCK_BYTES,
            tensor_count: 0,
            chunk_bytes: BLOCK_BYTES,
            chunk_count: 1,
            table_offset: BLOCK_BYTES,
            table_hash: 0,
            header_hash: 0,
            unix_ns: unix_ns(),
            flags: 0,
        }
    }
}
