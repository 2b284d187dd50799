//! Growing a region file: a larger copy beside it, made durable, renamed over it.
//!
//! The copy keeps region UUID, generations, pins and the global mark, mode and owner of the file, so that nothing
//! outside notices but for the size. A crash leaves the old file or the new one; a leftover copy is replaced by the next
//! attempt. A checkpoint that the medium can no longer read is left out, and the caller is told.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};
use crate::format::{
    Control, Layout, SlotMark, SlotRecord, Superblock, Uuid, BLOCK_BYTES, CONTROL_OFFSETS, MARK_PINNED,
    MAX_GENERATION, SUPERBLOCK_OFFSETS,
};
use crate::medium::{self, Barrier, Durability, Medium, MediumOptions};
use crate::recovery::DecisionTable;
use crate::store::format::layout_for;
use crate::store::options::FormatOptions;
use crate::store::region::read_table;
use crate::store::DEFAULT_LOCK_WAIT;

const OP: &str = "grow";

/// Bytes copied at a time.
const COPY_BYTES: usize = 4 << 20;

/// A checkpoint that could not be read, and so is not in the grown region.
#[derive(Debug, Clone)]
pub struct LeftOut {
    /// Its generation.
    pub generation: u64,
    /// Why it could not be read.
    pub error: Error,
}

pub(crate) fn grow_path(
    path: &Path,
    slot_count: u32,
    payload_bytes: u64,
    lock_wait: Option<Duration>,
) -> Result<Vec<LeftOut>> {
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
    if old.info().stripes.is_some() {
        return Err(Error::new(ErrorKind::Unsupported, OP, "a striped region cannot grow in place")
            .at_path(path)
            .advise("format a larger one over other files and import the exported checkpoints"));
    }
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
    remove_leftover(&beside, &table.superblock.uuid)?;
    medium::create_file(&beside, layout.region_bytes(), None)?;
    let result = copy_region(&*old, &table, layout, &beside, &options).and_then(|left_out| {
        medium::copy_owner(path, &beside)?;
        medium::rename_over(&beside, path)?;
        Ok(left_out)
    });
    if result.is_err() {
        // Nothing refers to the copy; the error that led here is the one to report.
        let _ = std::fs::remove_file(&beside);
    }
    drop(old);
    result.map_err(|error| if error.path().is_some() { error } else { error.at_path(path) })
}

fn beside(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".growing");
    path.with_file_name(name)
}

/// Removes what an earlier attempt left, and nothing else: such a copy bears this region's identity, or none yet.
fn remove_leftover(beside: &Path, uuid: &Uuid) -> Result<()> {
    let found = match medium::Site::look(beside) {
        Ok(None) => return Ok(()),
        Ok(Some(found)) => found,
        Err(error) => return Err(not_a_leftover(beside, error.message())),
    };
    let head = found.head()?;
    let copies = SUPERBLOCK_OFFSETS.map(|offset| head.get(offset as usize..).and_then(<[u8]>::first_chunk));
    let ours = match copies {
        [Some(a), Some(b)] if a.iter().chain(b).any(|&byte| byte != 0) => {
            Superblock::choose(a, b).is_ok_and(|(superblock, _)| superblock.uuid == *uuid)
        }
        // The superblocks are written last.
        [Some(_), Some(_)] => true,
        _ => head.is_empty(),
    };
    if !ours {
        return Err(not_a_leftover(beside, "it holds something else than a copy of this region"));
    }
    std::fs::remove_file(beside).map_err(|e| Error::io(OP, &e).at_path(beside))
}

fn not_a_leftover(beside: &Path, why: &str) -> Error {
    let message = format!("the copy to grow into needs this name, and what has it was left as it was: {why}");
    Error::new(ErrorKind::AlreadyExists, OP, message).at_path(beside).advise("move it away, then grow again")
}

fn copy_region(
    old: &dyn Medium,
    table: &DecisionTable,
    layout: Layout,
    beside: &Path,
    options: &MediumOptions,
) -> Result<Vec<LeftOut>> {
    let new = medium::open_medium(beside, options, None)?;
    copy_to(old, table, layout, &*new)
}

/// Everything that counts, to a medium of the new size that is all zeros. Durable on return.
fn copy_to(
    old: &dyn Medium,
    table: &DecisionTable,
    layout: Layout,
    new: &dyn Medium,
) -> Result<Vec<LeftOut>> {
    let superblock = Superblock { layout, ..table.superblock.clone() };
    let mut left_out = Vec::new();
    for record in table.checkpoints() {
        if let Err(error) = copy_checkpoint(old, &table.superblock.layout, new, &layout, record)? {
            left_out.push(LeftOut { generation: record.generation, error });
        }
    }
    if left_out.len() == table.newest_first.len() {
        // Nothing is left to grow for: the old file is worth more, to whoever can still rescue some of it.
        if let Some(LeftOut { error, .. }) = left_out.pop() {
            return Err(error);
        }
    }
    let control = table.control.clone().unwrap_or_else(Control::initial);
    let pins = |mark: &SlotMark| {
        let copied = |record: &SlotRecord| record.slot == mark.slot && record.generation == mark.generation;
        let is_left_out = left_out.iter().any(|left_out| left_out.generation == mark.generation);
        mark.flags & MARK_PINNED != 0 && table.checkpoints().any(copied) && !is_left_out
    };
    let marks = control.marks.iter().filter(|mark| pins(mark)).cloned().collect();
    // Records of saves that did not commit, and a ceiling that was lost, keep generations from being used twice; they
    // are not copied.
    let generation_ceiling = control.generation_ceiling.max(table.next_generation).min(MAX_GENERATION);
    let sequence = control.next_sequence()?;
    let control = Control { marks, generation_ceiling, sequence, ..control };
    // Both copies: a missing one would look like damage, and cost generations at every open.
    for offset in CONTROL_OFFSETS {
        new.copy(offset, &control.encode(&superblock.uuid)?)?;
    }
    new.fence(Barrier::Control)?;
    new.persist(0, new.len_bytes(), Barrier::Payload)?;
    for offset in SUPERBLOCK_OFFSETS {
        new.write_durable(offset, &superblock.encode(), Barrier::Control)?;
    }
    Ok(left_out)
}

/// Same slot index in both regions; the record is re-encoded so that it is valid against the new layout. The inner error
/// is that of the old medium: what was copied until then has no record, and counts for nothing.
fn copy_checkpoint(
    old: &dyn Medium,
    old_layout: &Layout,
    new: &dyn Medium,
    layout: &Layout,
    record: &SlotRecord,
) -> Result<Result<()>> {
    let used = (record.table_offset + record.table_bytes()).next_multiple_of(BLOCK_BYTES);
    let mut buffer = vec![0u8; COPY_BYTES];
    let mut at = 0;
    while at < used {
        let len = (used - at).min(COPY_BYTES as u64) as usize;
        if let Err(error) = old.read(old_layout.slot_offset(record.slot) + at, &mut buffer[..len]) {
            return Ok(Err(error));
        }
        new.copy(layout.slot_offset(record.slot) + at, &buffer[..len])?;
        at += len as u64;
    }
    new.copy(layout.record_offset(record.slot), &record.encode())?;
    new.fence(Barrier::Payload)?;
    Ok(Ok(()))
}

#[cfg(all(test, feature = "sim"))]
mod tests {
    use super::*;
    use crate::engine::{Store, Tensor};
    use crate::format::Dtype;
    use crate::medium::sim::{AttemptKind, SimMedium, SimModel};
    use crate::save::Faults;
    use crate::store::{format_medium, OpenOptions};
    use crate::sync::Arc;

    const SLOT_BYTES: u64 = 2 << 20;
    const BYTES: usize = 100_000;

    /// A region of three checkpoints, and one twice as large to grow to.
    fn grown() -> (Arc<SimMedium>, DecisionTable, Layout, SimMedium) {
        let model = SimModel::Ssd { torn: false };
        let old = Arc::new(SimMedium::new(7 * SLOT_BYTES, model));
        format_medium(&*old, &FormatOptions::new(6, BYTES as u64 * 2)).unwrap();
        let options = OpenOptions { keep: 3, max_in_flight: 1, ..OpenOptions::default() };
        let store = Store::open_on(old.clone(), &options, Faults::default()).unwrap();
        for step in 0..3 {
            let data = vec![step; BYTES];
            let tensor = Tensor { name: "w", dtype: Dtype::U8, shape: &[BYTES as u64], data: &data };
            store.save(step.into(), &[tensor], &[], None).unwrap().wait_durable(None).unwrap();
        }
        store.pin(1).unwrap();
        store.pin(2).unwrap();
        drop(store);
        let table = read_table(&*old).unwrap();
        let layout = layout_for(&FormatOptions::new(8, BYTES as u64 * 2)).unwrap();
        (old, table, layout, SimMedium::new(layout.region_bytes(), model))
    }

    /// One bad sector must not keep a region from growing that is full for the very reason that it must grow.
    #[test]
    fn a_checkpoint_that_cannot_be_read_is_left_out_and_named() {
        let (old, table, layout, new) = grown();
        let lost = table.checkpoints().find(|record| record.generation == 2).unwrap();
        let bad = table.superblock.layout.slot_offset(lost.slot);
        old.fail(move |attempt| {
            let hit = attempt.offset <= bad && bad < attempt.offset + attempt.len;
            (attempt.kind == AttemptKind::Read && hit).then_some(libc::EIO)
        });
        let left_out = copy_to(&*old, &table, layout, &new).unwrap();
        let told: Vec<_> = left_out.iter().map(|lost| (lost.generation, lost.error.errno())).collect();
        assert_eq!(told, [(2, Some(libc::EIO))]);
        let found = read_table(&new).unwrap();
        let kept: Vec<u64> = found.checkpoints().map(|record| record.generation).collect();
        assert_eq!(kept, [3, 1]);
        let pins = |table: &DecisionTable| table.slots.iter().filter(|slot| slot.pinned).count();
        assert_eq!(
            (pins(&table), pins(&found)),
            (2, 1),
            "the pin of what is left out must go, the other stay"
        );
        assert!(found.next_generation >= table.next_generation);
    }

    #[test]
    fn where_nothing_can_be_read_growing_fails() {
        let (old, table, layout, new) = grown();
        let slots = table.superblock.layout.payload_offset;
        old.fail(move |attempt| {
            (attempt.kind == AttemptKind::Read && attempt.offset >= slots).then_some(libc::EIO)
        });
        let error = copy_to(&*old, &table, layout, &new).unwrap_err();
        assert_eq!(error.errno(), Some(libc::EIO), "{error}");
        assert_eq!(read_table(&new).unwrap_err().kind(), ErrorKind::NotARegion, "and must leave no region");
    }
}
