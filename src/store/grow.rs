//! Growing a region file: a larger copy beside it, made durable, renamed over it.
//!
//! The copy keeps region UUID, generations, pins and the global mark, so that nothing outside notices but for
//! the size. A crash leaves the old file or the new one; a leftover copy is replaced by the next attempt.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};
use crate::format::{
    Control, Layout, SlotMark, SlotRecord, Superblock, BLOCK_BYTES, CONTROL_OFFSETS, MARK_PINNED,
    SUPERBLOCK_OFFSETS,
};
use crate::medium::{self, Barrier, Durability, Medium, MediumOptions};
use crate::recovery::{DecisionTable, Verdict};
use crate::store::format::layout_for;
use crate::store::options::FormatOptions;
use crate::store::region::read_table;
use crate::store::DEFAULT_LOCK_WAIT;

const OP: &str = "grow";

/// Bytes copied at a time.
const COPY_BYTES: usize = 4 << 20;

pub(crate) fn grow_path(
    path: &Path,
    slot_count: u32,
    payload_bytes: u64,
    lock_wait: Option<Duration>,
) -> Result<()> {
    if medium::is_device(path)? {
        return Err(Error::new(ErrorKind::Unsupported, OP, "a device cannot grow")
            .at_path(path)
            .advise("format a larger device and import the exported checkpoints"));
    }
    let options = MediumOptions {
        writable: true,
        lock_wait: lock_wait.unwrap_or(DEFAULT_LOCK_WAIT),
        required: Durability::Process,
        ..Default::default()
    };
    let old = medium::open_medium(path, &options, None)?;
    let table = read_table(&*old).map_err(|e| e.at_path(path))?;
    // What is copied must be what a crash of the old medium would keep.
    old.persist(0, old.len_bytes(), Barrier::Open)?;
    let old_layout = &table.superblock.layout;
    let layout = layout_for(&FormatOptions::new(slot_count, payload_bytes)).map_err(|e| e.at_path(path))?;
    if layout.slot_count < old_layout.slot_count || layout.slot_bytes < old_layout.slot_bytes {
        return Err(Error::new(
            ErrorKind::InvalidArgument,
            OP,
            format!(
                "{} slots of {} bytes asked for, the region has {} of {}; growing never shrinks",
                layout.slot_count, layout.slot_bytes, old_layout.slot_count, old_layout.slot_bytes
            ),
        )
        .at_path(path));
    }
    let beside = beside(path);
    let result = copy_region(&*old, &table, layout, &beside, &options);
    let result = result.and_then(|()| medium::rename_over(&beside, path));
    if result.is_err() {
        // Nothing refers to the copy; the error that led here is the one to report.
        let _ = std::fs::remove_file(&beside);
    }
    drop(old);
    result
}

fn beside(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".growing");
    path.with_file_name(name)
}

fn copy_region(
    old: &dyn Medium,
    table: &DecisionTable,
    layout: Layout,
    beside: &Path,
    options: &MediumOptions,
) -> Result<()> {
    if let Err(e) = std::fs::remove_file(beside) {
        if e.kind() != std::io::ErrorKind::NotFound {
            return Err(Error::io(OP, &e).at_path(beside));
        }
    }
    medium::create_file(beside, layout.region_bytes(), None)?;
    let new = medium::open_medium(beside, options, None)?;
    let superblock = Superblock { layout, ..table.superblock.clone() };
    for decision in &table.slots {
        let Some(record) = &decision.record else { continue };
        match decision.verdict {
            Verdict::Checkpoint => copy_checkpoint(old, &table.superblock.layout, &*new, &layout, record)?,
            _ => continue,
        }
    }
    let control = table.control.clone().unwrap_or_else(Control::initial);
    let pins = |mark: &SlotMark| table.newest_first.contains(&mark.slot) && mark.flags & MARK_PINNED != 0;
    let marks = control.marks.iter().filter(|mark| pins(mark)).cloned().collect();
    let control = Control { marks, sequence: control.sequence + 1, ..control };
    // Both copies: a missing one would look like damage, and cost generations at every open.
    for offset in CONTROL_OFFSETS {
        new.copy(offset, &control.encode(&superblock.uuid)?)?;
    }
    new.fence(Barrier::Control)?;
    new.persist(0, new.len_bytes(), Barrier::Payload)?;
    for offset in SUPERBLOCK_OFFSETS {
        new.write_durable(offset, &superblock.encode(), Barrier::Control)?;
    }
    Ok(())
}

/// Same slot index in both regions; the record is re-encoded so that it is valid against the new layout.
fn copy_checkpoint(
    old: &dyn Medium,
    old_layout: &Layout,
    new: &dyn Medium,
    layout: &Layout,
    record: &SlotRecord,
) -> Result<()> {
    let used = (record.table_offset + record.table_bytes()).next_multiple_of(BLOCK_BYTES);
    let mut buffer = vec![0u8; COPY_BYTES];
    let mut at = 0;
    while at < used {
        let len = (used - at).min(COPY_BYTES as u64) as usize;
        old.read(old_layout.slot_offset(record.slot) + at, &mut buffer[..len])?;
        new.copy(layout.slot_offset(record.slot) + at, &buffer[..len])?;
        at += len as u64;
    }
    new.copy(layout.record_offset(record.slot), &record.encode())?;
    new.fence(Barrier::Payload)
}
