//! An open region: its medium, its slots in DRAM, and the durable steps that saves are made of.
//!
//! # Barriers and failures
//!
//! Payload and commit barriers are issued by one thread (the committer). Writing marks and control blocks are
//! *short barriers*, issued by other threads under [`Region::short_barriers`]. The kernel reports a failed
//! write-back to one flush only, so a flush that succeeds while another one fails proves nothing. Therefore a
//! failure is counted before the lock is released, and the committer, after each of its own barriers, passes
//! through the lock and compares the count with that at the save's begin before it believes its own success:
//! every save that was in flight at a failure fails.

use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::error::{Error, ErrorKind, Result};
use crate::format::{
    Control, GlobalMark, Layout, RecordState, SlotRecord, Superblock, BLOCK_BYTES, MARK_DISCARDED,
    MARK_PINNED, MARK_QUARANTINED, MAX_GENERATION,
};
use crate::medium::{fork, Barrier, Medium, MediumInfo};
use crate::recovery::{self, DecisionTable, Verdict};
use crate::slots::{SlotState, SlotTable, SlotView};
use crate::staging::StagingPool;
use crate::store::control::{flags_of, global_generation, set_flags, ControlState};
use crate::store::options::OpenOptions;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{Arc, Event, Mutex};

/// An open region.
pub struct Region {
    path: PathBuf,
    options: OpenOptions,
    superblock: Superblock,
    medium: Arc<dyn Medium>,
    pool: Arc<StagingPool>,
    slots: SlotTable,
    /// Per slot the committed record that a crash may leave on the medium, whether or not it is still listed.
    records: Mutex<Vec<Option<SlotRecord>>>,
    control: Mutex<ControlState>,
    lease: Mutex<Lease>,
    short_barriers: Mutex<()>,
    slot_freed: Event,
    poisoned: AtomicBool,
    flush_failures: AtomicU64,
    last_flush_error: Mutex<Option<Error>>,
    fork_stamp: fork::ForkStamp,
    recovered: DecisionTable,
}

struct Lease {
    next: u64,
    ceiling: u64,
}

/// A slot owned by one save.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claimed {
    /// Index of the slot.
    pub slot: u32,
    /// The save's generation.
    pub generation: u64,
}

impl Region {
    /// Recovers a region from its medium and takes it into use.
    ///
    /// For a writer: flushes the medium, makes every adopted record durable again (a commit seen after a
    /// process crash may still be in a volatile cache), and leases generations. A read-only region touches nothing.
    pub fn open_on(
        path: &Path,
        medium: Arc<dyn Medium>,
        pool: Arc<StagingPool>,
        options: OpenOptions,
    ) -> Result<Region> {
        options.validate()?;
        let table = read_table(&*medium).map_err(|e| e.at_path(path))?;
        let layout = table.superblock.layout;
        check_slot_count(&options, &layout).map_err(|e| e.at_path(path))?;
        let found = table.control.clone().zip(table.control_copy);
        let mut control = ControlState::adopt(table.superblock.uuid, found);
        let mut lease = Lease { next: table.next_generation, ceiling: table.next_generation };
        if !options.read_only {
            make_durable_again(&*medium, &table).map_err(|e| e.at_path(path))?;
            control.make_durable_again(&*medium).map_err(|e| e.at_path(path))?;
            let run_id = options.run_id;
            lease.ceiling = control.lease(&*medium, lease.next).map_err(|e| e.at_path(path))?;
            if table.control_damaged {
                // Over the damaged copy as well, so that the next damage cannot hide a ceiling.
                control.lease(&*medium, lease.next).map_err(|e| e.at_path(path))?;
            }
            if control.current().run_id != run_id {
                control.update(&*medium, |c| c.run_id = run_id).map_err(|e| e.at_path(path))?;
            }
        }
        let views: Vec<SlotView> =
            table.slots.iter().map(|decision| slot_view(decision, control.current())).collect();
        let records = table
            .slots
            .iter()
            .map(|decision| match decision.verdict {
                Verdict::Checkpoint => decision.record.clone(),
                _ => None,
            })
            .collect();
        let region = Region {
            path: path.to_path_buf(),
            superblock: table.superblock.clone(),
            medium,
            pool,
            slots: SlotTable::new(&views),
            records: Mutex::new(records),
            control: Mutex::new(control),
            lease: Mutex::new(lease),
            short_barriers: Mutex::new(()),
            slot_freed: Event::new(),
            poisoned: AtomicBool::new(false),
            flush_failures: AtomicU64::new(0),
            last_flush_error: Mutex::new(None),
            fork_stamp: fork::ForkStamp::now(),
            recovered: table,
            options,
        };
        if !region.options.read_only {
            region.reclaim();
        }
        Ok(region)
    }

    /// Where the region is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The options it was opened with.
    pub fn options(&self) -> &OpenOptions {
        &self.options
    }

    /// The region's identity and layout.
    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// Slot geometry.
    pub fn layout(&self) -> &Layout {
        &self.superblock.layout
    }

    /// What the medium gave.
    pub fn medium_info(&self) -> MediumInfo {
        self.medium.info()
    }

    /// What recovery found at open.
    pub fn recovered(&self) -> &DecisionTable {
        &self.recovered
    }

    /// The staging pool shared by saves and loads.
    pub fn pool(&self) -> &Arc<StagingPool> {
        &self.pool
    }

    pub(crate) fn medium(&self) -> &Arc<dyn Medium> {
        &self.medium
    }

    /// State of every slot in DRAM.
    pub fn slot_views(&self) -> Vec<SlotView> {
        self.slots.views()
    }

    pub(crate) fn slot_freed(&self) -> &Event {
        &self.slot_freed
    }

    /// Refuses calls in a forked child and, for changes, on read-only or poisoned stores.
    pub(crate) fn check_usable(&self, op: &'static str, writes: bool) -> Result<()> {
        if self.fork_stamp.is_forked() {
            return Err(Error::new(
                ErrorKind::Forked,
                op,
                "the store was opened before this process was forked",
            )
            .at_path(&self.path)
            .advise("open the region again in this process, once the parent has closed it"));
        }
        if writes && self.options.read_only {
            return Err(
                Error::new(ErrorKind::ReadOnly, op, "the store was opened read-only").at_path(&self.path)
            );
        }
        if writes && self.poisoned.load(Ordering::Acquire) {
            return Err(Error::new(ErrorKind::Internal, op, "an earlier internal error poisoned the store")
                .at_path(&self.path)
                .advise("close it and open it again; durable checkpoints are intact"));
        }
        Ok(())
    }

    /// True in a process that was forked after the store was opened.
    pub(crate) fn forked(&self) -> bool {
        self.fork_stamp.is_forked()
    }

    /// Refuses further saves after an internal error. Pairs with the Acquire load in `check_usable`.
    pub fn poison(&self) {
        self.poisoned.store(true, Ordering::Release);
    }

    /// True after an internal error.
    pub(crate) fn poisoned(&self) -> bool {
        self.poisoned.load(Ordering::Acquire)
    }

    // ---- steps of a save -------------------------------------------------------------------------------

    /// Takes the next generation and the free slot whose old content is oldest; `None` when no slot is free.
    pub(crate) fn claim(&self) -> Result<Option<Claimed>> {
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
        let Some(claim) = self.slots.claim(generation) else { return Ok(None) };
        lease.next += 1;
        Ok(Some(Claimed { slot: claim.slot, generation }))
    }

    /// Extends the lease while half of it is left, so that `claim` need not wait for the medium.
    pub(crate) fn extend_lease_early(&self) -> Result<()> {
        let next = {
            let lease = self.lease.lock();
            if lease.ceiling - lease.next.min(lease.ceiling) > super::control::LEASE_GENERATIONS / 2 {
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
        self.believe("commit record", self.medium.write_durable(offset, &record.encode(), Barrier::Commit))?;
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
    fn believe(&self, op: &'static str, result: Result<()>) -> Result<()> {
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
    pub(crate) fn publish(&self, record: SlotRecord) -> Option<u64> {
        let (slot, generation) = (record.slot, record.generation);
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

    /// Gives back the slot of a save that failed or was cancelled; `suspect` where the medium refused a write.
    pub(crate) fn release(&self, claim: Claimed, suspect: bool) {
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
        // Best effort: the medium has just failed. Without the mark the slot's record is at most `writing`,
        // which recovery never adopts.
        let _ = self.mark_slot(claim.slot, claim.generation, MARK_QUARANTINED, true);
    }

    /// Frees what the retention rule no longer keeps.
    pub(crate) fn reclaim(&self) {
        let floor = self.hold_floor();
        self.slots.reclaim(self.options.keep as usize, floor);
        self.slot_freed.notify_all();
    }

    fn hold_floor(&self) -> Option<u64> {
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

    // ---- pins, marks, records ---------------------------------------------------------------------------

    fn change_control<T>(
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

    /// Durably sets or clears one flag of `(slot, generation)` in the control block.
    fn mark_slot(&self, slot: u32, generation: u64, flag: u32, on: bool) -> Result<()> {
        self.change_control(|control, medium| {
            control.update(medium, |c| {
                let old = flags_of(c, slot, generation);
                set_flags(c, slot, generation, if on { old | flag } else { old & !flag });
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

    /// True where saves will have N slots to claim however long what is protected now stays so: a pin outlives
    /// its checkpoint's time among the newest K.
    fn has_lasting_room(&self) -> bool {
        let protected = self
            .slots
            .views()
            .iter()
            .filter(|view| view.pinned || view.readers > 0 || view.state == SlotState::Quarantined)
            .count() as u32;
        protected + self.options.keep + self.options.max_in_flight <= self.layout().slot_count
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
        let record = self.record_of(generation).ok_or_else(|| self.not_found(OP, generation))?;
        let view = self.slots.view(record.slot);
        if view.pinned {
            return Ok(());
        }
        if !self.slots.pin(record.slot, generation) {
            return Err(self.not_found(OP, generation));
        }
        if !self.has_lasting_room() {
            let _ = self.slots.unpin(record.slot, generation);
            return Err(self.no_room(OP));
        }
        self.mark_slot(record.slot, generation, MARK_PINNED, true).inspect_err(|_| {
            let _ = self.slots.unpin(record.slot, generation);
        })
    }

    /// Durably lifts a pin; the retention rule applies again.
    pub fn unpin(&self, generation: u64) -> Result<()> {
        const OP: &str = "unpin";
        self.check_usable(OP, true)?;
        let record = self.record_of(generation).ok_or_else(|| self.not_found(OP, generation))?;
        self.mark_slot(record.slot, generation, MARK_PINNED, false)?;
        // False where it was not pinned: unpinning twice is no error.
        let _ = self.slots.unpin(record.slot, generation);
        self.reclaim();
        Ok(())
    }

    /// Protects a checkpoint from being overwritten while it is read. False where it is gone.
    ///
    /// Reading what is kept anyway is never refused: quarantined or held slots may have left fewer than N to save
    /// into, and the newest checkpoint must be restorable all the same.
    pub(crate) fn add_reader(&self, record: &SlotRecord) -> Result<bool> {
        let takes_room =
            self.slots.is_reclaimable(record.slot, self.options.keep as usize, self.hold_floor());
        if !self.slots.add_reader(record.slot, record.generation) {
            return Ok(false);
        }
        if takes_room && !self.has_room() {
            self.drop_reader(record.slot, record.generation);
            return Err(self.no_room("open checkpoint"));
        }
        Ok(true)
    }

    pub(crate) fn drop_reader(&self, slot: u32, generation: u64) {
        self.slots.drop_reader(slot, generation);
        self.reclaim();
    }

    /// Durably marks `(run_id, step)` as durable on every rank; older held checkpoints are reclaimed.
    pub fn mark_global(&self, run_id: u64, step: u64) -> Result<u64> {
        const OP: &str = "mark_global";
        self.check_usable(OP, true)?;
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
        let listed: Vec<SlotRecord> = self.committed().into_iter().filter(|record| doomed(record)).collect();
        if let Some(read) = listed.iter().find(|r| self.slots.view(r.slot).readers > 0) {
            return Err(Error::new(
                ErrorKind::InvalidState,
                op,
                format!("checkpoint of generation {} is being read", read.generation),
            )
            .at_path(&self.path)
            .advise("close it first"));
        }
        let on_medium = || -> Vec<SlotRecord> {
            self.records.lock().iter().flatten().filter(|record| doomed(record)).cloned().collect()
        };
        if on_medium().is_empty() {
            return Ok(0);
        }
        let targets = self.change_control(|control, medium| {
            // Looked up under the control lock: a newer checkpoint in the same slot cannot be pinned meanwhile.
            let targets = on_medium();
            control.update(medium, |c| {
                for record in &targets {
                    set_flags(c, record.slot, record.generation, MARK_DISCARDED);
                }
                let newest_doomed = |g: u64| targets.iter().any(|r| r.generation == g);
                if c.global.as_ref().is_some_and(|mark| newest_doomed(mark.generation)) {
                    c.global = None;
                }
            })?;
            Ok(targets)
        })?;
        for record in &targets {
            // The discard is durable: whatever the slot's state became meanwhile, the checkpoint is gone. One
            // that was reclaimed before has no state to change.
            let _ = self.slots.unpin(record.slot, record.generation);
            let _ = self.slots.discard(record.slot, record.generation);
        }
        self.slot_freed.notify_all();
        Ok(listed.len() as u32)
    }

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
            unix_ns: super::unix_ns(),
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

    /// Reads one slot's record from the medium, as another process must to learn whether it was reclaimed.
    pub(crate) fn read_record(&self, slot: u32) -> Result<Option<SlotRecord>> {
        let mut block = [0u8; BLOCK_BYTES as usize];
        self.medium.read(self.layout().record_offset(slot), &mut block)?;
        SlotRecord::decode(&block, &self.superblock.uuid, slot, self.layout())
            .map_err(|e| e.at_path(&self.path))
    }

    /// Reads all records again: the present decision table, as any process sees it.
    pub fn read_table(&self) -> Result<DecisionTable> {
        read_table(&*self.medium).map_err(|e| e.at_path(&self.path))
    }
}

/// Reads superblocks, control blocks and records, and decides.
pub fn read_table(medium: &dyn Medium) -> Result<DecisionTable> {
    recovery::read_region(|offset, dst| medium.read(offset, dst), medium.len_bytes())
}

/// Protocol step 0: nothing that recovery adopted may rest in a volatile cache only.
fn make_durable_again(medium: &dyn Medium, table: &DecisionTable) -> Result<()> {
    medium.persist(0, medium.len_bytes(), Barrier::Open)?;
    for decision in &table.slots {
        if let (Verdict::Checkpoint, Some(record)) = (&decision.verdict, &decision.record) {
            let offset = table.superblock.layout.record_offset(decision.slot);
            medium.write_durable(offset, &record.encode(), Barrier::Adopt)?;
        }
    }
    Ok(())
}

fn slot_view(decision: &recovery::SlotDecision, control: &Control) -> SlotView {
    let generation = decision.record.as_ref().map_or(0, |record| record.generation);
    let (state, generation) = match decision.verdict {
        Verdict::Checkpoint => (SlotState::Committed, generation),
        // The mark's generation: the record itself may be unreadable.
        Verdict::Quarantined => {
            let mark = control.marks.iter().find(|mark| mark.slot == decision.slot);
            (SlotState::Quarantined, mark.map_or(generation, |mark| mark.generation))
        }
        _ => (SlotState::Free, 0),
    };
    SlotView { state, generation, readers: 0, pinned: decision.pinned && state == SlotState::Committed }
}

fn check_slot_count(options: &OpenOptions, layout: &Layout) -> Result<()> {
    let needed = options.max_in_flight + options.keep;
    if options.read_only || needed <= layout.slot_count {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::InvalidArgument,
        "open",
        format!(
            "max_in_flight {} and keep {} need {needed} slots, the region has {}",
            options.max_in_flight, options.keep, layout.slot_count
        ),
    )
    .advise("ask for less, or grow the region"))
}
