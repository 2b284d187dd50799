//! Quarantined slots: which they are, and how one is taken back into use.

use std::time::Instant;

use super::{Claimed, Region};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{RecordState, SlotRecord, BLOCK_BYTES, MARK_QUARANTINED};
use crate::medium::Barrier;
use crate::slots::SlotState;
use crate::store::unix_ns;

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

    /// Rewrites a quarantined slot in full (zeros, then a `writing` mark), flushes it, and lifts the quarantine.
    pub(crate) fn repair(&self, claim: Claimed, deadline: Option<Instant>) -> Result<()> {
        const OP: &str = "repair";
        let layout = self.layout();
        // Says only that the slot holds no checkpoint; the sizes are the smallest that a record may have.
        let record = SlotRecord {
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
            unix_ns: unix_ns(),
            flags: 0,
        };
        {
            let _short = self.short_barriers.lock();
            let offset = layout.record_offset(claim.slot);
            self.believe(OP, self.medium.write_durable(offset, &record.encode(), Barrier::WritingMark))?;
        }
        let zeros = vec![0u8; (1 << 20) as usize];
        let (start, end) =
            (layout.slot_offset(claim.slot), layout.slot_offset(claim.slot) + layout.slot_bytes);
        let mut at = start;
        while at < end {
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Err(Error::new(
                    ErrorKind::TimedOut,
                    OP,
                    "the slot was not rewritten in the time given",
                )
                .at_path(&self.path)
                .at_offset(at));
            }
            let step = (end - at).min(zeros.len() as u64);
            self.medium.copy(at, &zeros[..step as usize]).map_err(|e| e.at_path(&self.path))?;
            at += step;
        }
        self.medium.fence(Barrier::Chunk).map_err(|e| e.at_path(&self.path))?;
        {
            // It may take the error of another save's data: its failure must count like that of any short barrier.
            let _short = self.short_barriers.lock();
            self.believe(OP, self.medium.persist(start, end - start, Barrier::Payload))?;
        }
        self.mark_slot(claim.slot, claim.generation, MARK_QUARANTINED, false)?;
        let _ = self.slots.lift_quarantine(claim.slot, claim.generation);
        self.slot_freed.notify_all();
        Ok(())
    }
}
