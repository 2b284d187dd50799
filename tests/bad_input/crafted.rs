//! Images that no accident makes: right in every checksum, and hostile. Fuzzing found them.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use pccheck::engine::{grow_region, Store};
use pccheck::format::{Control, Superblock, CONTROL_OFFSETS, SUPERBLOCK_OFFSETS};
use pccheck::ErrorKind;

use super::bed::{self, options, refused_at, Bed, NEWEST, PAYLOAD_BYTES, SLOTS};
use super::common::scratch_in;

/// The next number after the last would be 0: every later control block would count for less than this one, and pins and
/// ceilings written from then on would be lost at the next open.
#[test]
fn a_control_block_with_the_last_sequence_number_is_read_and_not_written() {
    let bed = Bed::new();
    let block = bed.read(SUPERBLOCK_OFFSETS[0], 4096);
    let uuid = Superblock::decode(block.first_chunk().expect("a block")).expect("a superblock").uuid;
    let last = Control { sequence: u64::MAX, generation_ceiling: 2048, ..Control::initial() };
    for offset in CONTROL_OFFSETS {
        bed.write(offset, &last.encode(&uuid).expect("encode"));
    }
    assert_eq!(bed.newest_step().expect("reading works"), NEWEST);
    let says = ["sequence number", "export"];
    bed.assert_untouched(|| {
        refused_at(Store::open(&bed.path, &options()), &bed.path, ErrorKind::Corrupt, &says)
    });
    bed.assert_untouched(|| {
        let grown = grow_region(&bed.path, SLOTS + 1, PAYLOAD_BYTES, Some(Duration::ZERO));
        refused_at(grown, &bed.path, ErrorKind::Corrupt, &says)
    });
    assert_eq!(bed.newest_step().expect("reading still works"), NEWEST);
}

/// A file in memory that is nearly all hole: making its pages on opening would take all memory there is, for a wrong path,
/// too.
#[test]
fn holes_of_a_file_in_memory_stay_holes_when_it_is_opened() {
    let dir = scratch_in(Path::new("/dev/shm"));
    let path = dir.path().join("no region");
    File::create(&path).expect("create").set_len(1 << 30).expect("a length");
    refused_at(Store::open(&path, &options()), &path, ErrorKind::NotARegion, &["magic"]);
    let blocks = |path: &Path| path.metadata().expect("metadata").blocks();
    assert_eq!(blocks(&path), 0, "opening made pages");

    // A region of which only what was ever written is stored, as a sparse copy has it.
    let bed = Bed::in_dir(Path::new("/dev/shm"));
    let sparse = dir.path().join("sparse");
    let file = File::create(&sparse).expect("create");
    file.set_len(bed.layout.region_bytes()).expect("a length");
    for (at, block) in
        bed.bytes().chunks(4096).enumerate().filter(|(_, block)| block.iter().any(|&byte| byte != 0))
    {
        use std::os::unix::fs::FileExt;
        file.write_all_at(block, at as u64 * 4096).expect("copy");
    }
    let before = blocks(&sparse);
    let store = Store::open(&sparse, &options()).expect("open");
    bed::assert_both(&store);
    bed::save(&store, 3).expect("save");
    assert_eq!(bed::checked_step(&store).expect("restore"), 3);
    let more = (blocks(&sparse) - before) * 512;
    assert!(more < 64 << 10, "opening and one save of 9001 bytes took {more} bytes");
}
