//! Prevents: recovery that returns a slot it should not, loses one that it should return, uses a generation
//! twice, or panics on a damaged region.

use super::*;
use crate::format::layout::{chunk_count_for, table_offset_for};
use crate::format::{GlobalMark, Layout, PreferredMedium, Uuid, FORMAT_VERSION, SLOT_ALIGN_BYTES};
use proptest::prelude::*;

const REGION: Uuid = Uuid([3; 16]);
const SLOTS: u32 = 5;

fn superblock() -> Superblock {
    Superblock {
        format_version: FORMAT_VERSION,
        compat: 0,
        incompat: 0,
        uuid: REGION,
        layout: Layout::new(SLOTS, SLOT_ALIGN_BYTES).unwrap(),
        created_unix_ns: 1,
        preferred_medium: PreferredMedium::Unknown,
    }
}

fn record(slot: u32, generation: u64, state: RecordState) -> SlotRecord {
    SlotRecord {
        uuid: REGION,
        slot,
        generation,
        state,
        step: generation * 10,
        run_id: 0,
        payload_bytes: 5000,
        header_bytes: 4096,
        tensor_count: 1,
        chunk_bytes: 4096,
        chunk_count: chunk_count_for(5000, 4096),
        table_offset: table_offset_for(5000).unwrap(),
        table_hash: 0,
        header_hash: 0,
        unix_ns: 0,
        flags: 0,
    }
}

fn control(sequence: u64, ceiling: u64, marks: &[(u32, u64, u32)]) -> Control {
    Control {
        sequence,
        run_id: 0,
        generation_ceiling: ceiling,
        global: None,
        marks: marks.iter().map(|&(slot, generation, flags)| SlotMark { slot, generation, flags }).collect(),
    }
}

/// The blocks at a region's start, as a test lays them out.
struct Image {
    superblocks: [Block; 2],
    controls: [Block; 2],
    records: Vec<Block>,
}

impl Image {
    fn new(controls: [Control; 2], records: &[(u32, u64, RecordState)]) -> Image {
        let mut blocks = vec![[0; 4096]; SLOTS as usize];
        for &(slot, generation, state) in records {
            blocks[slot as usize] = record(slot, generation, state).encode();
        }
        Image {
            superblocks: [superblock().encode(); 2],
            controls: controls.map(|control| control.encode(&REGION).unwrap()),
            records: blocks,
        }
    }

    fn decide(&self) -> DecisionTable {
        decide(self.superblocks.each_ref(), self.controls.each_ref(), &self.records).unwrap()
    }

    fn block_at(&self, offset: u64) -> &Block {
        match (offset / BLOCK_BYTES) as usize {
            index @ 0..2 => &self.superblocks[index],
            index @ 2..4 => &self.controls[index - 2],
            index => &self.records[index - 4],
        }
    }

    /// Reads through `read_region`, failing every read that touches a block in `unreadable`.
    fn read(&self, unreadable: &[u64]) -> Result<DecisionTable> {
        let read = |offset: u64, dst: &mut [u8]| {
            for (index, place) in dst.chunks_exact_mut(4096).enumerate() {
                let at = offset + index as u64 * BLOCK_BYTES;
                if unreadable.contains(&at) {
                    return Err(Error::new(ErrorKind::Io, "read", "input/output error").at_offset(at));
                }
                place.copy_from_slice(self.block_at(at));
            }
            Ok(())
        };
        read_region(read, superblock().layout.region_bytes())
    }
}

fn healthy() -> Image {
    Image::new(
        [control(4, 40, &[]), control(5, 60, &[(2, 7, MARK_PINNED)])],
        &[
            (0, 9, RecordState::Committed),
            (1, 11, RecordState::Writing),
            (2, 7, RecordState::Committed),
            (4, 10, RecordState::Committed),
        ],
    )
}

#[test]
fn newest_first_with_a_reason_for_every_slot() {
    let table = healthy().decide();
    assert_eq!(table.newest_first, [4, 0, 2]);
    let generations: Vec<u64> = table.checkpoints().map(|record| record.generation).collect();
    assert_eq!(generations, [10, 9, 7]);
    let verdicts: Vec<&Verdict> = table.slots.iter().map(|decision| &decision.verdict).collect();
    let checkpoint = &Verdict::Checkpoint;
    assert_eq!(verdicts, [checkpoint, &Verdict::Writing, checkpoint, &Verdict::Empty, checkpoint]);
    let pinned: Vec<u32> =
        table.slots.iter().filter(|decision| decision.pinned).map(|decision| decision.slot).collect();
    assert_eq!(pinned, [2]);
    assert!(table.slots.iter().all(|decision| !decision.reason.is_empty()));
    assert_eq!((table.control_copy, table.next_generation), (Some(1), 60));
    assert!(table.notes.is_empty() && !table.control_damaged, "{:?}", table.notes);
    assert_eq!(healthy().read(&[]).unwrap(), table, "reading a region and deciding on its blocks differ");
}

#[test]
fn marks_count_only_for_their_generation() {
    let marks = [
        (0, 9, MARK_QUARANTINED),
        (1, 11, MARK_QUARANTINED),
        (2, 7, MARK_DISCARDED | MARK_PINNED),
        (4, 6, MARK_DISCARDED | MARK_QUARANTINED | MARK_PINNED),
    ];
    let mut image = healthy();
    image.controls[1] = control(5, 60, &marks).encode(&REGION).unwrap();
    let table = image.decide();
    assert_eq!(table.newest_first, [4]);
    assert_eq!(table.slots[0].verdict, Verdict::Quarantined);
    assert_eq!(table.slots[1].verdict, Verdict::Quarantined);
    assert_eq!(table.slots[2].verdict, Verdict::Discarded);
    assert!(table.slots.iter().all(|decision| !decision.pinned));
}

#[test]
fn a_damaged_record_stays_in_quarantine() {
    let mut image = healthy();
    image.controls[1] = control(5, 60, &[(0, 9, MARK_QUARANTINED)]).encode(&REGION).unwrap();
    image.records[0][70] ^= 1;
    image.records[2][70] ^= 1;
    let table = image.decide();
    assert_eq!(table.slots[0].verdict, Verdict::Quarantined);
    assert!(matches!(&table.slots[2].verdict, Verdict::Rejected(reason) if reason.contains("checksum")));
    assert_eq!(table.newest_first, [4]);
}

#[test]
fn one_generation_twice_is_decided_the_same_way_every_time() {
    let mut image = healthy();
    image.records[3] = record(3, 10, RecordState::Committed).encode();
    image.controls[1] = control(5, 60, &[(4, 10, MARK_PINNED)]).encode(&REGION).unwrap();
    let table = image.decide();
    assert_eq!(table.newest_first, [3, 0, 2]);
    assert!(matches!(&table.slots[4].verdict, Verdict::Rejected(reason) if reason.contains("slot 3")));
    assert!(!table.slots[4].pinned);
}

/// Whatever was damaged, no generation is used twice.
#[test]
fn next_generation_is_above_every_trace() {
    let mut image = healthy();
    image.controls[1] = Control {
        global: Some(GlobalMark { run_id: 1, step: 2, generation: 70 }),
        ..control(5, 60, &[(3, 80, MARK_DISCARDED)])
    }
    .encode(&REGION)
    .unwrap();
    assert_eq!(image.decide().next_generation, 81);
    image.controls[1] = control(5, 60, &[]).encode(&REGION).unwrap();
    image.records[3] = record(3, 99, RecordState::Writing).encode();
    let table = image.decide();
    assert_eq!(table.next_generation, 100 + MAX_LEASE_GENERATIONS);
    assert!(table.control_damaged && table.notes[0].contains("ceiling"), "{:?}", table.notes);

    let mut image = healthy();
    image.controls[1][9] ^= 1;
    let table = image.decide();
    assert_eq!((table.control_copy, table.control_damaged), (Some(0), true));
    assert!(table.next_generation >= 60, "the damaged copy leased up to 60");
    image.controls[0][9] ^= 1;
    let table = image.decide();
    assert_eq!((table.control, table.control_copy), (None, None));
    assert_eq!(table.next_generation, 12 + LOST_CEILING_SKIP_GENERATIONS);
    assert_eq!(table.newest_first, [4, 0, 2]);
}

#[test]
fn the_last_generation_ends_the_region_s_life_and_is_still_read() {
    let mut image = healthy();
    image.records[3] = record(3, MAX_GENERATION, RecordState::Committed).encode();
    image.controls[1] = control(5, MAX_GENERATION + 1, &[]).encode(&REGION).unwrap();
    let table = image.decide();
    assert_eq!((table.newest_first[0], table.next_generation), (3, MAX_GENERATION + 1));
    assert!(table.notes[0].contains("no more"));
}

#[test]
fn a_mark_of_no_slot_is_noted() {
    let mut image = healthy();
    image.controls[1] = control(5, 60, &[(SLOTS, 7, MARK_PINNED)]).encode(&REGION).unwrap();
    assert!(image.decide().notes[0].contains("no such slot"));
}

#[test]
fn wrong_sizes_are_named() {
    let image = healthy();
    let error =
        decide(image.superblocks.each_ref(), image.controls.each_ref(), &image.records[1..]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    let region_bytes = superblock().layout.region_bytes();
    let read = |offset: u64, dst: &mut [u8]| {
        dst.copy_from_slice(image.block_at(offset));
        Ok(())
    };
    let error = read_region(read, region_bytes - 1).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    let message = error.message();
    assert!(message.contains(&region_bytes.to_string()) && message.contains(&(region_bytes - 1).to_string()));
    for short in [0, 1, 8191] {
        let error = read_region(|_, _| panic!("nothing to read"), short).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotARegion);
    }
}

#[test]
fn unreadable_blocks_cost_only_what_they_hold() {
    let image = healthy();
    let table = image.read(&[0, CONTROL_OFFSETS[0], superblock().layout.record_offset(0)]).unwrap();
    assert_eq!(table.newest_first, [4, 2]);
    assert!(matches!(&table.slots[0].verdict, Verdict::Rejected(reason) if reason.contains("input/output")));
    assert_eq!(table.notes.len(), 2, "{:?}", table.notes);
    let table = image.read(&CONTROL_OFFSETS).unwrap();
    assert_eq!(table.newest_first, [4, 0, 2]);
    let error = image.read(&SUPERBLOCK_OFFSETS).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
}

proptest! {
    /// Damage anywhere: recovery answers, returns only records that were written, and never a low generation.
    #[test]
    fn any_damage_is_survived(damage in proptest::collection::vec((0usize..9, 0usize..4096, 1u8..), 1..12)) {
        let mut image = healthy();
        let intact = image.decide();
        for (block, at, with) in damage {
            let block = match block {
                0..2 => &mut image.superblocks[block],
                2..4 => &mut image.controls[block - 2],
                _ => &mut image.records[block - 4],
            };
            block[at] ^= with;
        }
        if let Ok(table) = decide(image.superblocks.each_ref(), image.controls.each_ref(), &image.records) {
            prop_assert_eq!(&table, &image.read(&[]).unwrap());
            prop_assert!(table.next_generation >= intact.next_generation);
            for slot in table.newest_first {
                prop_assert_eq!(&table.slots[slot as usize].record, &intact.slots[slot as usize].record);
                prop_assert!(intact.newest_first.contains(&slot));
            }
        }
    }

    #[test]
    fn arbitrary_blocks_never_panic(blocks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 4096), 7)) {
        let mut image = healthy();
        for (index, bytes) in blocks.iter().enumerate() {
            let block = to_block(bytes);
            match index {
                0..2 => image.controls[index] = block,
                _ => image.records[index - 2] = block,
            }
        }
        prop_assert!(image.decide().newest_first.is_empty());
        image.superblocks = [to_block(&blocks[0]), to_block(&blocks[1])];
        prop_assert!(decide(image.superblocks.each_ref(), image.controls.each_ref(), &image.records).is_err());
    }
}
