//! Damage on the medium: one flipped bit in every byte that means anything; `PCC_FLIP_BITS=8` flips each bit of each.

use std::ops::Range;
use std::path::Path;

use pccheck::engine::{Select, Store};
use pccheck::format::{
    SlotRecord, Superblock, BLOCK_BYTES, CONTROL_OFFSETS, HEADER_HASHED, RECORDS_OFFSET, SUPERBLOCK_OFFSETS,
};
use pccheck::recovery::Verdict;
use pccheck::ErrorKind;

use super::bed::{self, checked_step, options, reading, refused_at, Bed, NEWEST, OLDER};

/// Every so many flips the region is also opened for writing, and saved into.
const WRITER_EVERY: u64 = 61;

/// What a flip may cost.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Cost {
    /// Nothing, and recovery says what it found.
    Noted,
    /// Nothing, and nobody can notice.
    Nothing,
    /// The newest checkpoint, whose record is rejected with a reason.
    Record,
    /// The newest checkpoint, when its payload is verified.
    Payload,
}

/// How many bits of each byte are flipped, one at a time.
fn bits_of_each() -> u64 {
    let given = std::env::var("PCC_FLIP_BITS").ok();
    given.map_or(1, |bits| bits.parse().expect("PCC_FLIP_BITS is a number"))
}

/// Flips bits in each byte of `range`, one at a time and another one first in each, and judges what is read then.
fn flip_each(bed: &Bed, range: Range<u64>, cost: Cost) {
    let file = bed.file();
    let pristine = bed.bytes();
    for (offset, nth) in range.flat_map(|offset| (0..bits_of_each()).map(move |nth| (offset, nth))) {
        use std::os::unix::fs::FileExt;
        let byte = pristine[offset as usize];
        let flipped = byte ^ (1 << ((offset.wrapping_mul(7) + nth) % 8));
        file.write_all_at(&[flipped], offset).expect("flip");
        let store =
            Store::open(&bed.path, &reading()).unwrap_or_else(|error| panic!("byte {offset}: {error}"));
        judge(&store, offset, cost);
        drop(store);
        if offset % WRITER_EVERY == 0 {
            write_after(bed, cost);
            bed.write(0, &pristine);
        }
        file.write_all_at(&[byte], offset).expect("flip back");
    }
    assert!(bed.bytes() == pristine);
    bed.assert_intact();
}

fn judge(store: &Store, offset: u64, cost: Cost) {
    let table = store.recovered();
    let step = checked_step(store).unwrap_or_else(|error| panic!("byte {offset}: {error}"));
    let rejected = table.slots.iter().filter(|slot| matches!(slot.verdict, Verdict::Rejected(_))).count();
    let expected = match cost {
        Cost::Noted => (NEWEST, true, 0),
        Cost::Nothing => (NEWEST, false, 0),
        Cost::Record => (OLDER, false, 1),
        Cost::Payload => (OLDER, false, 0),
    };
    assert_eq!(
        (step, !table.notes.is_empty(), rejected),
        expected,
        "byte {offset}, {cost:?}: {:?}",
        table.notes
    );
}

/// A writer takes the damaged region into use: nothing that a reader found is lost, and saving works.
fn write_after(bed: &Bed, cost: Cost) {
    const AFTER: u64 = 9;
    let store = Store::open(&bed.path, &options()).expect("open for writing");
    let found = if matches!(cost, Cost::Noted | Cost::Nothing) { NEWEST } else { OLDER };
    assert_eq!(checked_step(&store).expect("restore"), found);
    bed::save(&store, AFTER).expect("save");
    drop(store);
    assert_eq!(bed.newest_step().expect("open"), AFTER);
}

fn in_memory() -> Bed {
    Bed::in_dir(Path::new("/dev/shm"))
}

fn block(offset: u64) -> Range<u64> {
    offset..offset + BLOCK_BYTES
}

#[test]
fn flips_in_either_superblock_are_noted_and_cost_nothing() {
    let bed = in_memory();
    for offset in SUPERBLOCK_OFFSETS {
        flip_each(&bed, block(offset), Cost::Noted);
    }
}

#[test]
fn flips_in_either_control_block_are_noted_and_cost_nothing() {
    let bed = in_memory();
    for offset in CONTROL_OFFSETS {
        flip_each(&bed, block(offset), Cost::Noted);
    }
}

#[test]
fn flips_in_the_newest_record_fall_back_with_a_reason() {
    let bed = in_memory();
    let record = bed.layout.record_offset(1);
    let sector = record + pccheck::format::record::RECORD_BYTES as u64;
    flip_each(&bed, record..sector, Cost::Record);
    flip_each(&bed, sector..record + BLOCK_BYTES, Cost::Nothing);
    // Of the slot that was never used: one flipped bit makes no record.
    let unused = bed.layout.record_offset(2);
    let rejected = Store::open(&bed.path, &reading()).expect("open").recovered().slots[2].verdict.clone();
    assert_eq!(rejected, Verdict::Empty);
    bed.write(unused, &[1]);
    let store = Store::open(&bed.path, &reading()).expect("open");
    assert!(matches!(store.recovered().slots[2].verdict, Verdict::Rejected(_)));
    assert_eq!(checked_step(&store).expect("restore"), NEWEST);
}

#[test]
fn flips_in_header_payload_or_table_fall_back_when_read() {
    let bed = in_memory();
    let start = bed.layout.slot_offset(1);
    let record =
        Store::open(&bed.path, &reading()).expect("open").checkpoints().expect("list")[0].record.clone();
    assert_eq!(record.slot, 1);
    flip_each(&bed, start..start + record.payload_bytes, Cost::Payload);
    let (payload_end, table) = (start + record.payload_bytes, start + record.table_offset);
    flip_each(&bed, payload_end..table, Cost::Nothing);
    flip_each(&bed, table..table + record.table_bytes(), Cost::Payload);
    flip_each(&bed, table + record.table_bytes()..table + BLOCK_BYTES, Cost::Nothing);
}

/// What is only opened, and not verified, shows names, shapes and metadata: of a damaged header none may be believed.
fn flipped_headers_are_not_believed(bed: &Bed) {
    bed.assert_intact();
    let start = bed.layout.slot_offset(1);
    let header = bed.read(start, BLOCK_BYTES as usize);
    let mut still_json = 0;
    for (at, &byte) in header.iter().enumerate().filter(|&(at, _)| !(300..4000).contains(&at)) {
        // The lowest bit: digits and letters become others, so that some headers stay JSON.
        let flipped = byte ^ 1;
        bed.write(start + at as u64, &[flipped]);
        let text = [&header[8..at.max(8)], &[flipped], &header[at.max(8) + 1..]].concat();
        still_json += u32::from(at >= 8 && serde_json::from_slice::<serde_json::Value>(&text).is_ok());
        let store = Store::open(&bed.path, &reading()).expect("open");
        let opened = store.open_checkpoint(Select::Newest, false).expect("open checkpoint");
        assert_eq!(opened.checkpoint.record().step, OLDER, "byte {at}");
        assert_eq!(opened.rejected.len(), 1, "byte {at}");
        bed.write(start + at as u64, &[byte]);
    }
    assert!(
        still_json > 10,
        "only {still_json} flips left JSON: the parser alone would have found all of them"
    );
    bed.assert_intact();
}

#[test]
fn flips_in_a_header_are_found_when_it_is_opened() {
    flipped_headers_are_not_believed(&in_memory());
}

/// Records of older builds have no hash of the header: it is verified with its chunk.
#[test]
fn flips_in_a_header_without_a_hash_of_its_own_are_found_as_well() {
    let bed = in_memory();
    let superblock = bed.read(SUPERBLOCK_OFFSETS[0], BLOCK_BYTES as usize);
    let uuid = Superblock::decode(superblock.first_chunk().expect("a block")).expect("a superblock").uuid;
    for slot in [0, 1] {
        let offset = bed.layout.record_offset(slot);
        let block = bed.read(offset, BLOCK_BYTES as usize);
        let record = SlotRecord::decode(block.first_chunk().expect("a block"), &uuid, slot, &bed.layout);
        let mut record = record.expect("a record").expect("used");
        assert_eq!(record.flags, HEADER_HASHED);
        (record.flags, record.header_hash) = (0, 0);
        bed.write(offset, &record.encode());
    }
    flipped_headers_are_not_believed(&bed);
}

/// With both copies of the superblock damaged the region is refused, and told from a file that never was one.
#[test]
fn damage_to_both_superblocks_is_refused_and_says_why() {
    let bed = Bed::new();
    let superblocks = bed.read(0, RECORDS_OFFSET as usize);
    for at in [8, 60, 3000, 4095] {
        for offset in SUPERBLOCK_OFFSETS {
            bed.write(offset + at, &[superblocks[at as usize] ^ 4]);
        }
        let error = bed.assert_untouched(|| {
            let says = ["copy A", "copy B", "checksum mismatch", "stored is"];
            refused_at(Store::open(&bed.path, &options()), &bed.path, ErrorKind::Corrupt, &says)
        });
        assert!(error.advice().is_some_and(|advice| advice.contains("restore")), "{error}");
        bed.write(0, &superblocks);
        bed.assert_intact();
        bed.write(0, &superblocks);
    }
}

/// Both control blocks gone: checkpoints stay, and no generation comes back.
#[test]
fn losing_both_control_blocks_loses_no_checkpoint() {
    let bed = Bed::new();
    for offset in CONTROL_OFFSETS {
        bed.write(offset + 100, &[0xFF]);
    }
    let store = Store::open(&bed.path, &options()).expect("open");
    assert!(store.recovered().notes.iter().any(|note| note.contains("generation ceiling")));
    bed::assert_both(&store);
    bed::save(&store, 3).expect("save");
    let newest = store.checkpoints().expect("list")[0].record.generation;
    assert!(
        newest > pccheck::format::LOST_CEILING_SKIP_GENERATIONS,
        "generation {newest} may have been used"
    );
}
