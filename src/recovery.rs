//! Recovery: a pure function from the blocks at a region's start to a decision table.
//!
//! There is no pointer to the newest checkpoint on the medium. The table lists the slots whose committed
//! record is valid, newest first, and says of each other slot why it does not count. Whoever restores then verifies a
//! slot's payload against its chunk table, and falls back to the next newest.

use crate::error::{Error, ErrorKind, Result};
use crate::format::layout::{CONTROL_OFFSETS, RECORDS_OFFSET, SUPERBLOCK_OFFSETS};
use crate::format::{
    Block, Control, RecordState, SlotMark, SlotRecord, Superblock, BLOCK_BYTES,
    LOST_CEILING_SKIP_GENERATIONS, MARK_DISCARDED, MARK_PINNED, MARK_QUARANTINED, MAX_GENERATION,
    MAX_LEASE_GENERATIONS,
};

const OP: &str = "recover region";

/// What became of a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Its record is committed and valid: a candidate for restoring.
    Checkpoint,
    /// Never used.
    Empty,
    /// A save owned it and did not commit.
    Writing,
    /// Its record cannot be used, with the reason.
    Rejected(String),
    /// A flush failed while its generation was written: it is not used, and not reused until repaired.
    Quarantined,
    /// The caller gave its checkpoint up.
    Discarded,
}

/// The decision on one slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotDecision {
    /// The slot.
    pub slot: u32,
    /// What became of it.
    pub verdict: Verdict,
    /// Its record, where that could be read.
    pub record: Option<SlotRecord>,
    /// Whether its checkpoint is pinned.
    pub pinned: bool,
    /// The verdict in words.
    pub reason: String,
}

/// What recovery found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DecisionTable {
    /// The region's superblock.
    pub superblock: Superblock,
    /// The control block that counts, if either copy could be read.
    pub control: Option<Control>,
    /// Which copy that is (0 or 1); the next write goes to the other.
    pub control_copy: Option<usize>,
    /// One decision per slot, in slot order.
    pub slots: Vec<SlotDecision>,
    /// The slots that hold a checkpoint, highest generation first.
    pub newest_first: Vec<u32>,
    /// Whether a copy of the control block is damaged or older than the records. The writer then writes both
    /// copies before it uses a generation, so that the next damage cannot hide a ceiling.
    pub control_damaged: bool,
    /// Lowest generation that was certainly never used. Above [`MAX_GENERATION`] the region can save no more.
    pub next_generation: u64,
    /// Damage that was found and survived, in words.
    pub notes: Vec<String>,
}

impl DecisionTable {
    /// The checkpoints, highest generation first.
    pub fn checkpoints(&self) -> impl Iterator<Item = &SlotRecord> {
        self.newest_first.iter().filter_map(|&slot| self.slots.get(slot as usize)?.record.as_ref())
    }
}

/// Decides on every slot of a region from its superblocks, its control blocks and one record block per slot.
///
/// # Errors
///
/// Those of [`Superblock::choose`]; `InvalidArgument` when `records` has not one block per slot.
pub fn decide(superblocks: [&Block; 2], controls: [&Block; 2], records: &[Block]) -> Result<DecisionTable> {
    let (superblock, note) = Superblock::choose(superblocks[0], superblocks[1])?;
    let slot_count = superblock.layout.slot_count;
    if records.len() != slot_count as usize {
        return Err(Error::new(
            ErrorKind::InvalidArgument,
            OP,
            format!("expected {slot_count} record blocks, found {}", records.len()),
        ));
    }
    Ok(decide_read(superblock, note, controls.map(Ok), records.iter().map(Ok)))
}

/// Reads the start of a region of `region_bytes` bytes through `read` (byte offset, destination) and decides.
///
/// A block that cannot be read costs what it holds, not the region: its copy is used, or its slot rejected.
///
/// # Errors
///
/// Those of [`Superblock::choose`]; `NotARegion` when there is no room for superblocks; `Corrupt` when the
/// region is shorter than its superblock says.
pub fn read_region<R>(read: R, region_bytes: u64) -> Result<DecisionTable>
where
    R: Fn(u64, &mut [u8]) -> Result<()>,
{
    let read_block = |offset| {
        let mut block: Block = [0; BLOCK_BYTES as usize];
        read(offset, &mut block).map(|()| block)
    };
    if region_bytes < CONTROL_OFFSETS[0] {
        return Err(Error::new(
            ErrorKind::NotARegion,
            OP,
            format!("expected at least {} bytes, found {region_bytes}", CONTROL_OFFSETS[0]),
        )
        .advise("name a file that `pccheck format` made, or restore the whole file from a copy"));
    }
    let [a, b] = SUPERBLOCK_OFFSETS.map(|offset| Superblock::decode(&read_block(offset)?));
    let (superblock, note) = Superblock::choose_decoded(a, b)?;
    let expected_bytes = superblock.layout.region_bytes();
    if region_bytes < expected_bytes {
        return Err(Error::new(
            ErrorKind::Corrupt,
            OP,
            format!("truncated: expected {expected_bytes} bytes, found {region_bytes}"),
        )
        .advise("restore the whole file from a copy"));
    }
    let controls = CONTROL_OFFSETS.map(read_block);
    let slot_count = superblock.layout.slot_count as usize;
    let mut bytes = vec![0; slot_count * BLOCK_BYTES as usize];
    let records: Vec<Result<Block>> = match read(RECORDS_OFFSET, &mut bytes) {
        Ok(()) => bytes.chunks_exact(BLOCK_BYTES as usize).map(|chunk| Ok(to_block(chunk))).collect(),
        // One bad sector fails the whole read: find out which slot it belongs to.
        Err(_) => (0..superblock.layout.slot_count)
            .map(|slot| read_block(superblock.layout.record_offset(slot)))
            .collect(),
    };
    let controls = controls.each_ref().map(|block| block.as_ref().map_err(Error::clone));
    let records = records.iter().map(|block| block.as_ref().map_err(Error::clone));
    Ok(decide_read(superblock, note, controls, records))
}

fn to_block(chunk: &[u8]) -> Block {
    let mut block = [0; BLOCK_BYTES as usize];
    block.copy_from_slice(chunk);
    block
}

/// The decision proper, on blocks of which some could perhaps not even be read.
fn decide_read<'a>(
    superblock: Superblock,
    superblock_note: Option<String>,
    controls: [Result<&'a Block>; 2],
    records: impl Iterator<Item = Result<&'a Block>>,
) -> DecisionTable {
    let mut notes: Vec<String> = superblock_note.into_iter().collect();
    let (chosen, control_notes) = Control::choose_read(controls, &superblock.uuid);
    let mut control_damaged = !control_notes.is_empty();
    notes.extend(control_notes);
    let (control, control_copy) = chosen.unzip();

    let marks = control.as_ref().map_or(&[][..], |control| &control.marks);
    for mark in marks.iter().filter(|mark| mark.slot >= superblock.layout.slot_count) {
        notes.push(format!("a mark of slot {} was ignored: the region has no such slot", mark.slot));
    }
    let mut slots: Vec<SlotDecision> = (0..)
        .zip(records)
        .map(|(slot, block)| {
            let mark = marks.iter().find(|mark| mark.slot == slot);
            let record =
                block.and_then(|block| SlotRecord::decode(block, &superblock.uuid, slot, &superblock.layout));
            decide_slot(slot, record, mark)
        })
        .collect();
    let newest_first = order_checkpoints(&mut slots);
    let next_generation = next_generation(control.as_ref(), &mut control_damaged, &slots, &mut notes);
    DecisionTable {
        superblock,
        control,
        control_copy,
        slots,
        newest_first,
        control_damaged,
        next_generation,
        notes,
    }
}

fn decide_slot(slot: u32, record: Result<Option<SlotRecord>>, mark: Option<&SlotMark>) -> SlotDecision {
    let undecided =
        |verdict, reason: String| SlotDecision { slot, verdict, record: None, pinned: false, reason };
    let record = match record {
        Ok(Some(record)) => record,
        Ok(None) => return undecided(Verdict::Empty, "never used".to_owned()),
        // An unreadable record cannot free its slot from a quarantine: its generation cannot be compared.
        Err(error) if mark.is_some_and(|mark| mark.flags & MARK_QUARANTINED != 0) => {
            let reason = format!("a flush failed here, and the record is rejected: {}", error.message());
            return undecided(Verdict::Quarantined, reason);
        }
        Err(error) => {
            let reason = format!("record rejected: {}", error.message());
            return undecided(Verdict::Rejected(error.message().to_owned()), reason);
        }
    };
    let generation = record.generation;
    // A mark of another generation speaks of a checkpoint that is no longer here.
    let flags = mark.filter(|mark| mark.generation == generation).map_or(0, |mark| mark.flags);
    let (verdict, reason) = if flags & MARK_QUARANTINED != 0 {
        let reason =
            format!("a flush failed while generation {generation} was written: its durability is unknown");
        (Verdict::Quarantined, reason)
    } else if record.state == RecordState::Writing {
        (Verdict::Writing, format!("generation {generation} was not committed"))
    } else if flags & MARK_DISCARDED != 0 {
        (Verdict::Discarded, format!("generation {generation} was discarded by the caller"))
    } else {
        (Verdict::Checkpoint, format!("generation {generation} is committed"))
    };
    let pinned = flags & MARK_PINNED != 0 && verdict == Verdict::Checkpoint;
    SlotDecision { slot, verdict, record: Some(record), pinned, reason }
}

/// The slots that hold a checkpoint, highest generation first. Of two that claim one generation, which only a
/// damaged medium shows, the lower slot stays.
fn order_checkpoints(slots: &mut [SlotDecision]) -> Vec<u32> {
    let mut found: Vec<(u64, u32)> = slots
        .iter()
        .filter(|decision| decision.verdict == Verdict::Checkpoint)
        .filter_map(|decision| Some((decision.record.as_ref()?.generation, decision.slot)))
        .collect();
    found.sort_unstable_by_key(|&(generation, slot)| (std::cmp::Reverse(generation), slot));
    let mut newest_first: Vec<u32> = Vec::with_capacity(found.len());
    let mut last = None;
    for (generation, slot) in found {
        match last {
            Some((kept_generation, kept)) if kept_generation == generation => {
                let decision = &mut slots[slot as usize];
                let reason = format!("generation {generation} is also committed in slot {kept}");
                decision.reason = format!("record rejected: {reason}");
                decision.verdict = Verdict::Rejected(reason);
                decision.pinned = false;
            }
            _ => {
                last = Some((generation, slot));
                newest_first.push(slot);
            }
        }
    }
    newest_first
}

/// The lowest generation above all that can have been used.
fn next_generation(
    control: Option<&Control>,
    control_damaged: &mut bool,
    slots: &[SlotDecision],
    notes: &mut Vec<String>,
) -> u64 {
    let recorded = slots.iter().filter_map(|decision| Some(decision.record.as_ref()?.generation));
    let above_records = recorded.max().unwrap_or(0) + 1;
    let next = match control {
        Some(control) => {
            let named = control.marks.iter().map(|mark| mark.generation);
            let above_named = named.chain(control.global.map(|mark| mark.generation)).max().unwrap_or(0) + 1;
            if above_records > control.generation_ceiling {
                *control_damaged = true;
                notes.push(format!(
                    "generation {} is committed or was being written, the ceiling is {}: the control block is older than the records",
                    above_records - 1,
                    control.generation_ceiling
                ));
            }
            let next = control.generation_ceiling.max(above_records).max(above_named);
            // The damaged copy may have been the newer one, with a higher ceiling.
            next + if *control_damaged { MAX_LEASE_GENERATIONS } else { 0 }
        }
        None => {
            notes.push("pins, quarantines, the global mark and the generation ceiling are lost".to_owned());
            above_records + LOST_CEILING_SKIP_GENERATIONS
        }
    };
    if next > MAX_GENERATION {
        notes.push(format!("the next generation, {next}, is above the highest: the region can save no more"));
    }
    next
}

#[cfg(test)]
#[path = "recovery_test.rs"]
mod tests;
