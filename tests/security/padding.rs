//! Slots hold what was saved and zeros: nothing of what buffers and heap held before.

use std::fs;
use std::ops::Range;

use pccheck::engine::{format_region, Store};
use pccheck::format::{Layout, SlotRecord, BLOCK_BYTES};
use pccheck::medium::{Durability, IoBackend, Requested};
use pccheck::store::{FormatOptions, OpenOptions};

use super::common::{save_one, scratch, WAIT};
use super::in_child;

const CHUNK_BYTES: u64 = 64 << 10;
const PAYLOAD_BYTES: u64 = 1 << 20;
/// What buffers hold of earlier saves: no other byte of a region has this value.
const STALE: u8 = 0xAA;
/// Not a multiple of anything: the last chunk, the last block of the payload and the table's block are begun only.
const ODD_BYTES: u64 = 5 * CHUNK_BYTES + 12_345;

/// Ranges of a region that hold neither payload nor table nor the fields of records, with the slot whose they are.
fn slack(layout: &Layout, record: &SlotRecord) -> [Range<u64>; 4] {
    let slot = layout.slot_offset(record.slot);
    let table = slot + record.table_offset;
    let block = layout.record_offset(record.slot);
    [
        block + 512..block + BLOCK_BYTES,
        slot + record.payload_bytes..table,
        table + record.table_bytes()..(table + record.table_bytes()).next_multiple_of(BLOCK_BYTES),
        (table + record.table_bytes()).next_multiple_of(BLOCK_BYTES)..slot + layout.slot_bytes,
    ]
}

fn first_byte_that_is_not_zero(bytes: &[u8], ranges: &[Range<u64>]) -> Option<u64> {
    ranges.iter().flat_map(|range| range.clone()).find(|&at| bytes[at as usize] != 0)
}

/// In a child whose heap is filled with a pattern wherever nothing was stored.
#[test]
fn what_is_not_payload_is_zero() {
    let patterned = |command: &mut std::process::Command| {
        command.env("MALLOC_PERTURB_", "85");
    };
    if !in_child("padding::what_is_not_payload_is_zero", patterned) {
        return;
    }
    let media = [
        (Requested::Direct, IoBackend::Uring),
        (Requested::Direct, IoBackend::Threads),
        (Requested::Mmap, IoBackend::Auto),
    ];
    for (medium, backend) in media {
        let dir = scratch();
        let path = dir.path().join("region");
        format_region(&path, &FormatOptions { medium, ..FormatOptions::new(4, PAYLOAD_BYTES) })
            .expect("format");
        let options = OpenOptions {
            medium,
            backend,
            required: Durability::Process,
            max_in_flight: 1,
            chunk_bytes: CHUNK_BYTES,
            staging_bytes: 4 * CHUNK_BYTES,
            ..OpenOptions::default()
        };
        let store = Store::open(&path, &options).expect("open");
        // Buffers are used again and again, and each now holds this.
        let stale = vec![STALE; PAYLOAD_BYTES as usize - 8192];
        save_one(&store, 1, &stale, &[]).expect("save").wait_durable(WAIT).expect("durable");
        let data = vec![7; ODD_BYTES as usize];
        save_one(&store, 2, &data, &[("key", "value")]).expect("save").wait_durable(WAIT).expect("durable");
        // Out of order, so that half-filled buffers are spilled with what they lack.
        let mut raw = store.begin_raw(3, ODD_BYTES, &[], WAIT).expect("begin");
        for part in [1, 0] {
            for at in (0..ODD_BYTES).step_by(CHUNK_BYTES as usize) {
                let half = CHUNK_BYTES / 2;
                let start = (at + part * half).min(ODD_BYTES);
                let end = (start + half).min(ODD_BYTES);
                raw.write_at(start, &data[start as usize..end as usize]).expect("write");
            }
        }
        raw.commit().expect("commit").wait_durable(WAIT).expect("durable");
        let layout = *store.region().layout();
        let records: Vec<SlotRecord> =
            store.region().read_table().expect("read").checkpoints().cloned().collect();
        drop(store);
        let mut bytes = fs::read(&path).expect("read the region");
        let steps: Vec<u64> = records.iter().map(|record| record.step).collect();
        assert_eq!(steps, [3, 2, 1], "{medium:?} {backend:?}");
        for record in &records {
            let slack = slack(&layout, record);
            let found = first_byte_that_is_not_zero(&bytes, &slack);
            assert_eq!(found, None, "{medium:?} {backend:?}, step {}", record.step);
            // And one that is there is found, wherever it is.
            for range in slack.iter().filter(|range| !range.is_empty()) {
                for at in [range.start, range.end - 1] {
                    bytes[at as usize] = STALE;
                    assert_eq!(first_byte_that_is_not_zero(&bytes, &slack), Some(at));
                    bytes[at as usize] = 0;
                }
            }
        }
        // In front of the slots: superblocks, control blocks and records, each followed by zeros alone, and then zeros.
        let records_end = layout.record_offset(layout.slot_count - 1) + BLOCK_BYTES;
        let before_slots = records_end..layout.payload_offset;
        let found = first_byte_that_is_not_zero(&bytes, std::slice::from_ref(&before_slots));
        assert_eq!(found, None, "{medium:?} {backend:?}");
    }
}
