//! The durable steps that saves are made of.
//!
//! # Barriers and failures
//!
//! Payload and commit barriers are issued by one thread (the committer). Writing marks and control blocks are
//! *short barriers*, issued by other threads under [`Region::short_barriers`]. The kernel reports a failed
//! write-back to one flush only, so a flush that succeeds while another one fails proves nothing. Therefore a
//! failure is counted before the lock is released, and the committer, after each of its own barriers, passes
//! through the lock and compares the count with that at the save's begin before it believes its own success:
//! every save that was in flight at a failure fails.

use super::{Claimed, Content, Region};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{RecordState, SlotRecord, MARK_PINNED, MARK_QUARANTINED, MAX_GENERATION};
use crate::medium::Barrier;
use crate::slots::SlotState;
use crate::store::control::{global_generation, LEASE_GENERATIONS};
use crate::sync::atomic::Ordering;

impl Region {
    /// Takes the next generation and the free slot whose old content is oldest, with what is known of that; `None` when
    /// no slot is free. With `pin` the checkpoint will be pinned, for which the caller holds `room_to_pin`.
    pub(crate) fn claim(&self, pin: bool) -> Result<Option<(Claimed, Content)>> {
        let mut lease = self.lease.lock();
        if lease.next >= MAX_GENERATION {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "begin save",
                "the region's generations are used up",
            )
            .at_path(&self.path)
            .advise("export the newest checkpoint and format a new region"));
        }
        if lease.next >= lease.ceiling {
            lease.ceiling = self.change_control(|control, medium| control.lease(medium, lease.next))?;
        }
        let generation = lease.next;
        let Some(claim) = self.slots.claim(generation, pin) else { return Ok(None) };
        lease.next += 1;
        let content = std::mem::take(&mut self.contents.lock()[claim.slot as usize]);
        Ok(Some((Claimed { slot: claim.slot, generation }, content)))
    }

    /// Extends the lease while half of it is left, so that `claim` need not wait for the medium.
    pub(crate) fn extend_lease_early(&self) -> Result<()> {
        let next = {
            let lease = self.lease.lock();
            if lease.ceiling - lease.next.min(lease.ceiling) > LEASE_GENERATIONS / 2 {
                return Ok(());
            }
            lease.next
        };
        let ceiling = self.change_control(|control, medium| control.lease(medium, next))?;
        let mut lease = self.lease.lock();
        lease.ceiling = lease.ceiling.max(ceiling);
        Ok(())
    }

    /// Durably marks the slot `writing(g)`: from here on its old content is gone.
    pub(crate) fn mark_writing(&self, record: &SlotRecord) -> Result<()> {
        debug_assert_eq!(record.state, RecordState::Writing);
        let _short = self.short_barriers.lock();
        let offset = self.layout().record_offset(record.slot);
        let written = self.medium.write_durable(offset, &record.encode(), Barrier::WritingMark);
        self.believe("mark slot", written)?;
        // Not before: until then the old record may come back after a crash.
        self.records.lock()[record.slot as usize] = None;
        Ok(())
    }

    /// Makes the payloads (with their tables) of the given slots durable: `(slot offset, bytes used)` each.
    pub(crate) fn persist_payloads(&self, ranges: &[(u64, u64)]) -> Result<()> {
        self.believe("flush payload", self.medium.persist_ranges(ranges, Barrier::Payload))?;
        self.pass_short_barriers();
        Ok(())
    }

    /// Durably writes `committed(g)`.
    pub(crate) fn write_commit(&self, record: &SlotRecord) -> Result<()> {
        debug_assert_eq!(record.state, RecordState::Committed);
        let offset = self.layout().record_offset(record.slot);
        let written = self.medium.write_durable(offset, &record.encode(), Barrier::Commit);
        if written.is_err() {
            // It may have become durable all the same: discards must cover it.
            self.records.lock()[record.slot as usize] = Some(record.clone());
        }
        self.believe("commit record", written)?;
        self.pass_short_barriers();
        Ok(())
    }

    /// How many barriers have failed so far; a save that sees it change must fail.
    ///
    /// Acquire pairs with the Release in `believe`: who sees the count sees the error beside it. That a
    /// committer sees a failure that overlapped its own barrier follows from `short_barriers`.
    pub(crate) fn flush_failures(&self) -> u64 {
        self.flush_failures.load(Ordering::Acquire)
    }

    /// The error of the latest barrier that failed.
    pub(crate) fn last_flush_error(&self) -> Error {
        self.last_flush_error.lock().clone().unwrap_or_else(|| {
            Error::new(ErrorKind::Internal, "flush", "a failed barrier left no error").at_path(&self.path)
        })
    }

    /// Passes on the result of a barrier, counting its failure. Refusals that reached no medium are not counted.
    pub(super) fn believe(&self, op: &'static str, result: Result<()>) -> Result<()> {
        result.map_err(|cause| {
            let concerns_medium = matches!(
                cause.kind(),
                ErrorKind::Io | ErrorKind::NoSpace | ErrorKind::OutOfMemory | ErrorKind::DurabilityUnknown
            );
            if !concerns_medium {
                return cause.at_path(&self.path);
            }
            let error = self.durability_unknown(op, &cause);
            *self.last_flush_error.lock() = Some(error.clone());
            self.flush_failures.fetch_add(1, Ordering::Release);
            error
        })
    }

    /// Publishes a durable commit in DRAM and reclaims; returns the generation that supersedes it, if any.
    pub(crate) fn publish(&self, record: SlotRecord, content: Content) -> Option<u64> {
        let (slot, generation) = (record.slot, record.generation);
        // Before others can claim the slot.
        self.contents.lock()[slot as usize] = content;
        self.records.lock()[slot as usize] = Some(record);
        let was_writing = self.slots.commit(slot, generation);
        debug_assert!(was_writing, "a save commits the slot it owns");
        self.reclaim();
        let views = self.slots.views();
        if views[slot as usize].state == SlotState::Committed && views[slot as usize].generation == generation
        {
            return None;
        }
        views.iter().filter(|v| v.state == SlotState::Committed).map(|v| v.generation).max()
    }

    /// Gives back the slot of a save that failed or was cancelled, with what is still known of its content; `suspect`
    /// where the medium refused a write.
    pub(crate) fn release(&self, claim: Claimed, suspect: bool, content: Content) {
        self.contents.lock()[claim.slot as usize] = content;
        let owned = match suspect {
            true => self.slots.release_last(claim.slot, claim.generation),
            false => self.slots.release(claim.slot, claim.generation),
        };
        debug_assert!(owned, "a save releases the slot it owns");
        self.slot_freed.notify_all();
    }

    /// Takes the slot out of use after a failed flush, durably where the medium still answers.
    pub(crate) fn quarantine(&self, claim: Claimed) {
        let owned = self.slots.quarantine(claim.slot, claim.generation);
        debug_assert!(owned, "a save quarantines the slot it owns");
        self.slot_freed.notify_all();
        // Best effort: the medium has just failed. Without the mark recovery finds the slot's record as it is: nearly
        // always `writing`, which is never adopted; `committed` where only the commit's own barrier failed, and then
        // the checkpoint is whole (and pinned, if it was to be).
        let _ = self.mark_slot(claim.slot, claim.generation, MARK_QUARANTINED, MARK_PINNED);
    }

    /// Frees what the retention rule no longer keeps.
    pub(crate) fn reclaim(&self) {
        let floor = self.hold_floor();
        self.slots.reclaim(self.options.keep as usize, floor);
        self.slot_freed.notify_all();
    }

    pub(super) fn hold_floor(&self) -> Option<u64> {
        self.options.hold.then(|| global_generation(self.control.lock().current()))
    }

    /// Waits for short barriers in progress, so that their failures are counted.
    fn pass_short_barriers(&self) {
        drop(self.short_barriers.lock());
    }

    fn durability_unknown(&self, op: &'static str, cause: &Error) -> Error {
        Error::new(
            ErrorKind::DurabilityUnknown,
            op,
            format!("{}; what was written since the last flush may be lost", cause.message()),
        )
        .at_path(&self.path)
        .with_errno(cause.errno())
        .advise("its slot is quarantined: check the device, then repair the slot")
    }
}
