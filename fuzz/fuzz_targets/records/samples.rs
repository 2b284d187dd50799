//! One valid block of each kind, to be patched.

use std::sync::OnceLock;

use pccheck::format::layout::{chunk_count_for, table_offset_for};
use pccheck::format::{
    Block, Control, GlobalMark, Label, Layout, PreferredMedium, RecordState, SlotMark, SlotRecord,
    StripeLayout, Superblock, Uuid, FORMAT_VERSION, HEADER_HASHED, LABEL_AREA_BYTES, MARK_DISCARDED,
    MARK_PINNED, RAW_STREAM, SLOT_ALIGN_BYTES,
};

pub const REGION: Uuid = Uuid(*b"fuzzed records!!");
/// The slot of the sample records.
pub const SLOT: u32 = 2;

/// Where the checksum of a block lies.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// In its last eight bytes.
    Block,
    /// In the last eight of its first sector.
    Record,
}

pub fn layout() -> Layout {
    Layout::new(4, SLOT_ALIGN_BYTES).expect("a layout")
}

fn record(state: RecordState, generation: u64, payload_bytes: u64) -> SlotRecord {
    let chunk_bytes = 8192;
    SlotRecord {
        uuid: REGION,
        slot: SLOT,
        generation,
        state,
        step: 7,
        run_id: 5,
        payload_bytes,
        header_bytes: 4096,
        tensor_count: 3,
        chunk_bytes,
        chunk_count: chunk_count_for(payload_bytes, chunk_bytes),
        table_offset: table_offset_for(payload_bytes).expect("a small payload"),
        table_hash: 1 << 100,
        header_hash: 2 << 100,
        unix_ns: 1_700_000_000_000_000_001,
        flags: RAW_STREAM | HEADER_HASHED,
    }
}

fn control(sequence: u64) -> Control {
    Control {
        sequence,
        run_id: 77,
        generation_ceiling: 1 << 20,
        global: Some(GlobalMark { run_id: 77, step: 900, generation: 41 }),
        marks: vec![
            SlotMark { slot: 3, generation: 41, flags: MARK_PINNED },
            SlotMark { slot: SLOT, generation: 44, flags: MARK_DISCARDED },
        ],
    }
}

fn label(index: u32, sequence: u64) -> Label {
    Label {
        set: REGION,
        index,
        sequence,
        stripe: StripeLayout::new(3, 4 << 20, 100 << 20).expect("stripes"),
        data_offset: LABEL_AREA_BYTES,
        created_unix_ns: 1_700_000_000_123_456_789,
        paths: [&b"/a/r0"[..], b"/b/\xff\xfe", b"/c/r2"].map(<[u8]>::to_vec).to_vec(),
    }
}

pub fn samples() -> &'static [(Kind, Block)] {
    static SAMPLES: OnceLock<Vec<(Kind, Block)>> = OnceLock::new();
    SAMPLES.get_or_init(|| {
        let superblock = Superblock {
            format_version: FORMAT_VERSION,
            compat: 0,
            incompat: 0,
            uuid: REGION,
            layout: layout(),
            created_unix_ns: 1_750_000_000_000_000_000,
            preferred_medium: PreferredMedium::Mmap,
        };
        let control = |sequence| control(sequence).encode(&REGION).expect("a control block");
        let label = |index, sequence| label(index, sequence).encode().expect("a label");
        vec![
            (Kind::Block, superblock.encode()),
            (Kind::Block, control(7)),
            (Kind::Block, control(8)),
            (Kind::Record, record(RecordState::Committed, 44, 100_001).encode()),
            (Kind::Record, record(RecordState::Committed, 45, 4106).encode()),
            (Kind::Record, record(RecordState::Writing, 46, 4096).encode()),
            (Kind::Block, label(0, 3)),
            (Kind::Block, label(1, 4)),
        ]
    })
}
