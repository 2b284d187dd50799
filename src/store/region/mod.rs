//! An open region: its medium, its slots in DRAM, and the durable steps that saves are made of.
//!
//! The steps of a save and what a failed flush means are in `steps`, what keeps a checkpoint in `retention`.

mod content;
mod repair;
mod retention;
mod steps;

use std::path::{Path, PathBuf};

pub(crate) use content::Content;

use crate::error::{Error, ErrorKind, Result};
use crate::fork;
use crate::format::{decode_table, Control, Layout, SlotRecord, Superblock, BLOCK_BYTES, MAX_CHUNKS};
use crate::medium::{Barrier, Medium, MediumInfo};
use crate::recovery::{self, DecisionTable, Verdict};
use crate::slots::{SlotState, SlotTable, SlotView};
use crate::staging::StagingPool;
use crate::store::control::ControlState;
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
    /// What is known of the bytes in each slot that no save owns.
    contents: Mutex<Vec<Content>>,
    control: Mutex<ControlState>,
    lease: Mutex<Lease>,
    short_barriers: Mutex<()>,
    /// Held by whatever changes what is kept: pins, marks, discards, repairs. Taken before `control`.
    maintenance: Mutex<()>,
    /// Held from counting the slots that pins leave until one more is pinned, or claimed to be: two pins never both take
    /// the last one. Taken after `maintenance`, before `lease` and `control`.
    pin_room: Mutex<()>,
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
        let contents = known_contents(&*medium, &table, &options);
        let region = Region {
            path: path.to_path_buf(),
            superblock: table.superblock.clone(),
            medium,
            pool,
            slots: SlotTable::new(&views),
            records: Mutex::new(records),
            contents: Mutex::new(contents),
            control: Mutex::new(control),
            lease: Mutex::new(lease),
            short_barriers: Mutex::new(()),
            maintenance: Mutex::new(()),
            pin_room: Mutex::new(()),
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

/// What the chunk tables of the adopted records say of their slots. Of one that cannot be read nothing is known, nor of
/// those beyond as many chunks as one payload may have: what is known stays in memory, and a sparse file may have any size.
fn known_contents(medium: &dyn Medium, table: &DecisionTable, options: &OpenOptions) -> Vec<Content> {
    let mut chunks_left = MAX_CHUNKS;
    let mut known = |decision: &recovery::SlotDecision| {
        let record = decision.record.as_ref().filter(|_| decision.verdict == Verdict::Checkpoint)?;
        if options.read_only || options.rewrite_every == 1 || record.chunk_bytes != options.chunk_bytes {
            return None;
        }
        chunks_left = chunks_left.checked_sub(record.chunk_count)?;
        let table_bytes = usize::try_from(record.table_bytes()).ok()?;
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(table_bytes).ok()?;
        bytes.resize(table_bytes, 0);
        let offset = table.superblock.layout.slot_offset(record.slot) + record.table_offset;
        medium.read(offset, &mut bytes).ok()?;
        let hashes = decode_table(&bytes, record).ok()?;
        Some(Content::adopted(record, &hashes, options.rewrite_every))
    };
    table.slots.iter().map(|decision| known(decision).unwrap_or_default()).collect()
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
