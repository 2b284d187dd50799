//! What keeps a checkpoint and what gives it up: pins, readers, the global mark, discards.

use super::{Claimed, Content, Region};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{GlobalMark, SlotRecord, MARK_DISCARDED, MARK_PINNED};
use crate::medium::Medium;
use crate::slots::{SlotState, READERS_MAX};
use crate::store::control::{flags_of, global_generation, set_flags, ControlState};
use crate::sync::MutexGuard;

impl Region {
    pub(super) fn change_control<T>(
        &self,
        change: impl FnOnce(&mut ControlState, &dyn Medium) -> Result<T>,
    ) -> Result<T> {
        let mut control = self.control.lock();
        let _short = self.short_barriers.lock();
        let mut value = None;
        let result = change(&mut control, &*self.medium).map(|done| value = Some(done));
        self.believe("write control block", result)?;
        value.ok_or_else(|| {
            Error::new(ErrorKind::Internal, "write control block", "no result").at_path(&self.path)
        })
    }

    /// Durably sets and clears flags of `(slot, generation)` in the control block.
    pub(super) fn mark_slot(&self, slot: u32, generation: u64, set: u32, clear: u32) -> Result<()> {
        self.change_control(|control, medium| {
            control.update(medium, |c| {
                let old = flags_of(c, slot, generation);
                set_flags(c, slot, generation, old & !clear | set);
            })
        })
    }

    /// The committed record of `generation`, with its slot.
    pub(crate) fn record_of(&self, generation: u64) -> Option<SlotRecord> {
        self.committed().into_iter().find(|record| record.generation == generation)
    }

    /// Committed records, newest first.
    pub(crate) fn committed(&self) -> Vec<SlotRecord> {
        let records = self.records.lock();
        let mut found: Vec<SlotRecord> = self
            .slots
            .views()
            .iter()
            .enumerate()
            .filter(|(_, view)| view.state == SlotState::Committed)
            .filter_map(|(slot, view)| {
                records[slot].as_ref().filter(|record| record.generation == view.generation).cloned()
            })
            .collect();
        found.sort_by_key(|record| std::cmp::Reverse(record.generation));
        found
    }

    /// The step last marked as durable on every rank.
    pub fn global_mark(&self) -> Option<GlobalMark> {
        self.control.lock().current().global
    }

    /// Slots that saves may use: free, being written, or reclaimable.
    pub(crate) fn claimable_count(&self) -> usize {
        self.slots.claimable_count(self.options.keep as usize, self.hold_floor())
    }

    /// True where saves will have N slots to claim however long what is protected now, and `more` slots besides, stay
    /// so: a pin outlives its checkpoint's time among the newest K. Slots of saves that are to be pinned count.
    fn has_lasting_room(&self, more: u32) -> bool {
        let protected = self
            .slots
            .views()
            .iter()
            .filter(|view| view.pinned || view.readers > 0 || view.state == SlotState::Quarantined)
            .count() as u32;
        protected + more + self.options.keep + self.options.max_in_flight <= self.layout().slot_count
    }

    /// Refuses a save that is to be pinned where there is no room for one more pin. What is returned is to be held until
    /// its slot is claimed.
    pub(crate) fn room_to_pin(&self) -> Result<MutexGuard<'_, ()>> {
        let room = self.pin_room.lock();
        match self.has_lasting_room(1) {
            true => Ok(room),
            false => Err(self.no_room("begin save")),
        }
    }

    /// True where saves have N slots to claim now. Enough for a reader, which goes away again.
    fn has_room(&self) -> bool {
        self.claimable_count() >= self.options.max_in_flight as usize
    }

    fn no_room(&self, op: &'static str) -> Error {
        Error::new(
            ErrorKind::NoSlot,
            op,
            format!(
                "it would leave fewer than max_in_flight = {} slots to save into",
                self.options.max_in_flight
            ),
        )
        .at_path(&self.path)
        .advise("unpin or close another checkpoint, or grow the region by a slot")
    }

    fn not_found(&self, op: &'static str, generation: u64) -> Error {
        Error::new(ErrorKind::NotFound, op, format!("no checkpoint has generation {generation}"))
            .at_path(&self.path)
    }

    /// Durably keeps a checkpoint whatever the retention rule says.
    pub fn pin(&self, generation: u64) -> Result<()> {
        const OP: &str = "pin";
        self.check_usable(OP, true)?;
        // A second pin of the same checkpoint must not be told of the first before that one is durable.
        let _maintenance = self.maintenance.lock();
        let record = self.record_of(generation).ok_or_else(|| self.not_found(OP, generation))?;
        if self.slots.view(record.slot).pinned {
            return Ok(());
        }
        {
            let _room = self.pin_room.lock();
            if !self.slots.pin(record.slot, generation) {
                return Err(self.not_found(OP, generation));
            }
            if !self.has_lasting_room(0) {
                let _ = self.slots.unpin(record.slot, generation);
                return Err(self.no_room(OP));
            }
        }
        self.mark_slot(record.slot, generation, MARK_PINNED, 0).inspect_err(|_| {
            let _ = self.slots.unpin(record.slot, generation);
        })
    }

    /// Durably pins the checkpoint that the save of `claim` is about to commit. Only once its writing mark is durable:
    /// a slot has one entry in the control block, and until then it may have to keep the slot's old record discarded.
    pub(crate) fn pin_before_commit(&self, claim: Claimed) -> Result<()> {
        self.mark_slot(claim.slot, claim.generation, MARK_PINNED, 0)
    }

    /// Durably lifts a pin; the retention rule applies again.
    pub fn unpin(&self, generation: u64) -> Result<()> {
        const OP: &str = "unpin";
        self.check_usable(OP, true)?;
        let _maintenance = self.maintenance.lock();
        let record = self.record_of(generation).ok_or_else(|| self.not_found(OP, generation))?;
        self.mark_slot(record.slot, generation, 0, MARK_PINNED)?;
        // False where it was not pinned: unpinning twice is no error.
        let _ = self.slots.unpin(record.slot, generation);
        self.reclaim();
        Ok(())
    }

    /// Protects a checkpoint from being overwritten while it is read. False where it is gone.
    ///
    /// Reading what is kept anyway is never refused: quarantined or held slots may have left fewer than N to save
    /// into, and the newest checkpoint must be restorable all the same.
    pub(crate) fn add_reader(&self, record: &SlotRecord, fallback: bool) -> Result<bool> {
        let (slot, generation) = (record.slot, record.generation);
        self.revive(record);
        let takes_room = self.slots.is_reclaimable(slot, self.options.keep as usize, self.hold_floor());
        if !self.slots.add_reader(slot, generation) {
            let view = self.slots.view(slot);
            if view.generation == generation && view.readers == READERS_MAX {
                return Err(Error::new(
                    ErrorKind::InvalidState,
                    "open checkpoint",
                    format!("generation {generation} is open {READERS_MAX} times already"),
                )
                .at_path(&self.path)
                .advise("close some"));
            }
            return Ok(false);
        }
        if takes_room && !fallback && !self.has_room() {
            self.drop_reader(slot, generation);
            return Err(self.no_room("open checkpoint"));
        }
        Ok(true)
    }

    pub(crate) fn drop_reader(&self, slot: u32, generation: u64) {
        self.slots.drop_reader(slot, generation);
        self.reclaim();
    }

    /// Records of checkpoints that can be opened, newest first: the committed ones, and those that were reclaimed but
    /// whose slots no save has claimed since.
    pub(crate) fn readable(&self) -> Vec<SlotRecord> {
        let mut found = self.committed();
        found.extend(self.reclaimed());
        found.sort_by_key(|record| std::cmp::Reverse(record.generation));
        found
    }

    /// A FREE word of a record's generation says that no save has claimed the slot since it was reclaimed.
    fn reclaimed(&self) -> Vec<SlotRecord> {
        let records = self.records.lock();
        let views = self.slots.views();
        let still = |record: &&SlotRecord| {
            let view = &views[record.slot as usize];
            view.state == SlotState::Free && view.generation == record.generation
        };
        records.iter().flatten().filter(still).cloned().collect()
    }

    /// Whether a committed checkpoint is beyond the newest K, so that nothing but its readers keeps it.
    pub(crate) fn outlived(&self, record: &SlotRecord) -> bool {
        let newer = self.committed().iter().filter(|other| other.generation > record.generation).count();
        newer >= self.options.keep as usize && !self.slots.view(record.slot).pinned
    }

    /// Takes a reclaimed checkpoint back, if it is one. Under the records lock: `discard` takes records away first.
    fn revive(&self, record: &SlotRecord) {
        let records = self.records.lock();
        if records[record.slot as usize].as_ref() == Some(record) {
            // False where it is committed, as it mostly is, or was claimed.
            let _ = self.slots.revive(record.slot, record.generation);
        }
    }

    /// Fills up the newest K from what was reclaimed, after one of them was lost.
    fn revive_kept(&self) {
        let mut kept = self.committed().len();
        let mut reclaimed = self.reclaimed();
        reclaimed.sort_by_key(|record| record.generation);
        while kept < self.options.keep as usize {
            let Some(record) = reclaimed.pop() else { return };
            self.revive(&record);
            kept += 1;
        }
    }

    /// A checkpoint's payload was found damaged: it no longer counts among the newest K, so that it does not cost an
    /// intact one its place. Not durable: whoever opens the region again finds out again. Pinned ones stay.
    pub(crate) fn condemn(&self, record: &SlotRecord) {
        let _maintenance = self.maintenance.lock();
        let (slot, generation) = (record.slot, record.generation);
        // Also where it is being read. Where a save has claimed the slot, that has taken what was known.
        self.contents.lock()[slot as usize] = Content::default();
        if let Some(was_committed) = self.slots.withhold(slot, generation) {
            if !self.slots.lift_quarantine(slot, generation) {
                self.slots.give_back(slot, generation, was_committed);
            }
        }
        self.revive_kept();
        self.slot_freed.notify_all();
    }

    /// Durably marks `(run_id, step)` as durable on every rank; older held checkpoints are reclaimed.
    pub fn mark_global(&self, run_id: u64, step: u64) -> Result<u64> {
        const OP: &str = "mark_global";
        self.check_usable(OP, true)?;
        let _maintenance = self.maintenance.lock();
        let record = self
            .committed()
            .into_iter()
            .find(|record| record.run_id == run_id && record.step == step)
            .ok_or_else(|| {
                Error::new(ErrorKind::NotFound, OP, format!("no checkpoint of run {run_id}, step {step}"))
                    .at_path(&self.path)
            })?;
        let generation = record.generation;
        self.change_control(|control, medium| {
            if global_generation(control.current()) >= generation {
                return Ok(());
            }
            control.update(medium, |c| {
                c.global = Some(GlobalMark { run_id, step, generation });
            })
        })?;
        self.reclaim();
        Ok(generation)
    }

    /// Durably discards every checkpoint that `doomed` names. Checkpoints being read are refused.
    ///
    /// So does it with those that were reclaimed and whose slots no save has marked since: their records are
    /// still valid, and recovery would return them. Returns how many listed checkpoints were discarded.
    pub(crate) fn discard(&self, op: &'static str, doomed: impl Fn(&SlotRecord) -> bool) -> Result<u32> {
        let _maintenance = self.maintenance.lock();
        let targets: Vec<SlotRecord> =
            self.records.lock().iter().flatten().filter(|record| doomed(record)).cloned().collect();
        if targets.is_empty() {
            return Ok(0);
        }
        let withheld = self.withhold(op, &targets)?;
        let marked = self.change_control(|control, medium| {
            control.update(medium, |c| {
                for record in &targets {
                    set_flags(c, record.slot, record.generation, MARK_DISCARDED);
                }
                let is_target = |generation| targets.iter().any(|r| r.generation == generation);
                if c.global.as_ref().is_some_and(|mark| is_target(mark.generation)) {
                    c.global = None;
                }
            })
        });
        if let Err(error) = marked {
            self.give_back(&withheld);
            return Err(error);
        }
        {
            let mut records = self.records.lock();
            for record in &targets {
                // Unless a newer save has marked the slot meanwhile.
                let entry = &mut records[record.slot as usize];
                if entry.as_ref() == Some(record) {
                    *entry = None;
                }
            }
        }
        for (record, _) in &withheld {
            // The discard is durable, a pin notwithstanding.
            let _ = self.slots.unpin(record.slot, record.generation);
            let _ = self.slots.lift_quarantine(record.slot, record.generation);
        }
        self.revive_kept();
        self.slot_freed.notify_all();
        Ok(withheld.iter().filter(|(_, was_committed)| *was_committed).count() as u32)
    }

    /// Puts the targets out of reach of readers, pins and claims while their discard becomes durable; all or, where one
    /// is being read, none. Those that a save has claimed meanwhile, or that are quarantined, need not be.
    fn withhold(&self, op: &'static str, targets: &[SlotRecord]) -> Result<Vec<(SlotRecord, bool)>> {
        let mut withheld = Vec::new();
        for record in targets {
            if let Some(was_committed) = self.slots.withhold(record.slot, record.generation) {
                withheld.push((record.clone(), was_committed));
                continue;
            }
            let view = self.slots.view(record.slot);
            if view.generation == record.generation && view.readers > 0 {
                self.give_back(&withheld);
                return Err(Error::new(
                    ErrorKind::InvalidState,
                    op,
                    format!("checkpoint of generation {} is being read", record.generation),
                )
                .at_path(&self.path)
                .advise("close it first"));
            }
        }
        Ok(withheld)
    }

    fn give_back(&self, withheld: &[(SlotRecord, bool)]) {
        for (record, was_committed) in withheld {
            self.slots.give_back(record.slot, record.generation, *was_committed);
        }
    }
}
