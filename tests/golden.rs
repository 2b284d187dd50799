//! Prevents: a change of the code that makes regions of version 1 unreadable, or writes other bytes under the
//! same version number.
//!
//! `data/region-v1.golden` was written once, by version 1, and is never written again. It holds the non-zero
//! part of each block: offset (u64), length (u32), bytes; little-endian. All other bytes of the region are
//! zero.

use std::collections::BTreeMap;
use std::path::Path;

use pccheck::format::layout::{table_offset_for, CONTROL_OFFSETS, SUPERBLOCK_OFFSETS};
use pccheck::format::{
    chunk_hash, decode_table, encode_table, parse_header, plan, plan_raw, table_hash, Control, Dtype,
    GlobalMark, Layout, PayloadPlan, PreferredMedium, RecordState, SlotMark, SlotRecord, Superblock,
    TensorSpec, Uuid, BLOCK_BYTES, FORMAT_VERSION, MARK_DISCARDED, MARK_PINNED, RAW_STREAM, SLOT_ALIGN_BYTES,
};
use pccheck::recovery::{read_region, DecisionTable, Verdict};
use pccheck::{Error, ErrorKind, Result};

const GOLDEN: &[u8] = include_bytes!("data/region-v1.golden");
const REGION: Uuid = Uuid(*b"golden image v1\0");
const CHUNK_BYTES: u64 = 4096;
const RAW: &[u8] = b"a raw stream";

/// A region of which only the blocks that were written exist; all others read as zero.
#[derive(Default)]
struct Sparse(BTreeMap<u64, Vec<u8>>);

impl Sparse {
    fn put(&mut self, offset: u64, bytes: &[u8]) {
        for (index, chunk) in bytes.chunks(BLOCK_BYTES as usize).enumerate() {
            let mut block = chunk.to_vec();
            block.resize(BLOCK_BYTES as usize, 0);
            self.0.insert(offset + index as u64 * BLOCK_BYTES, block);
        }
    }

    fn read(&self, offset: u64, dst: &mut [u8]) -> Result<()> {
        if !offset.is_multiple_of(BLOCK_BYTES) {
            return Err(Error::new(ErrorKind::InvalidArgument, "read", "unaligned"));
        }
        dst.fill(0);
        for (index, place) in dst.chunks_mut(BLOCK_BYTES as usize).enumerate() {
            if let Some(block) = self.0.get(&(offset + index as u64 * BLOCK_BYTES)) {
                place.copy_from_slice(&block[..place.len()]);
            }
        }
        Ok(())
    }

    /// The form of the golden file: each block up to its last byte that is not zero.
    fn to_runs(&self) -> Vec<u8> {
        let mut runs = Vec::new();
        for (offset, block) in &self.0 {
            let used = block.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
            if used > 0 {
                runs.extend(offset.to_le_bytes());
                runs.extend((used as u32).to_le_bytes());
                runs.extend(&block[..used]);
            }
        }
        runs
    }

    fn from_runs(mut runs: &[u8]) -> Sparse {
        let mut image = Sparse::default();
        while let Some((offset, rest)) = runs.split_first_chunk() {
            let (used, rest) = rest.split_first_chunk().expect("a length after each offset");
            let (bytes, rest) = rest.split_at(u32::from_le_bytes(*used) as usize);
            image.put(u64::from_le_bytes(*offset), bytes);
            runs = rest;
        }
        image
    }
}

/// Tensors of the golden checkpoint: byte `i` of a tensor is `seed + i`.
const TENSORS: &[(&str, Dtype, &[u64], u8)] = &[
    ("layer.weight", Dtype::F32, &[5, 3], 10),
    ("layer.bias", Dtype::BF16, &[3], 20),
    ("полный \"вес\"", Dtype::C128, &[2], 30),
    ("scalar", Dtype::I64, &[], 40),
    ("nothing", Dtype::U16, &[0, 7], 50),
    ("quarter", Dtype::F4, &[2, 3], 60),
    ("mask", Dtype::BOOL, &[3000], 70),
    ("layer.tied", Dtype::F32, &[15], 10),
];
const TIED: usize = 7;
const TIED_TO: usize = 0;
const METADATA: &[(&str, &str)] = &[("epoch", "12"), ("rng", "\u{1f3b2} \"state\"")];

fn bytes_of(dtype: Dtype, shape: &[u64], seed: u8) -> Vec<u8> {
    let bytes = shape.iter().product::<u64>() * dtype.bits() / 8;
    (0..bytes).map(|index| seed.wrapping_add(index as u8)).collect()
}

fn specs() -> Vec<TensorSpec<'static>> {
    TENSORS
        .iter()
        .enumerate()
        .map(|(index, &(name, dtype, shape, seed))| TensorSpec {
            name,
            dtype,
            shape,
            bytes: bytes_of(dtype, shape, seed).len() as u64,
            alias_of: (index == TIED).then_some(TIED_TO),
        })
        .collect()
}

fn superblock() -> Superblock {
    Superblock {
        format_version: FORMAT_VERSION,
        compat: 0,
        incompat: 0,
        uuid: REGION,
        layout: Layout::new(5, SLOT_ALIGN_BYTES).unwrap(),
        created_unix_ns: 1_750_000_000_000_000_000,
        preferred_medium: PreferredMedium::Mmap,
    }
}

fn control(sequence: u64) -> Control {
    Control {
        sequence,
        run_id: 99,
        generation_ceiling: 1000 + sequence,
        global: Some(GlobalMark { run_id: 99, step: 30, generation: 3 }),
        marks: vec![
            SlotMark { slot: 2, generation: 4, flags: MARK_PINNED },
            SlotMark { slot: 4, generation: 2, flags: MARK_DISCARDED },
        ],
    }
}

/// Writes payload, chunk table and committed record of one slot.
fn commit(image: &mut Sparse, slot: u32, generation: u64, flags: u32, plan: &PayloadPlan, payload: &[u8]) {
    assert_eq!(payload.len() as u64, plan.payload_bytes);
    let layout = superblock().layout;
    let table = encode_table(&payload.chunks(CHUNK_BYTES as usize).map(chunk_hash).collect::<Vec<_>>());
    let record = SlotRecord {
        uuid: REGION,
        slot,
        generation,
        state: RecordState::Committed,
        step: generation * 10,
        run_id: 99,
        payload_bytes: plan.payload_bytes,
        header_bytes: plan.header.len() as u64,
        tensor_count: plan.tensor_count,
        chunk_bytes: CHUNK_BYTES,
        chunk_count: table.len() as u64 / 16,
        table_offset: table_offset_for(plan.payload_bytes).unwrap(),
        table_hash: table_hash(&table),
        header_hash: 0,
        unix_ns: 1_750_000_000_000_000_000 + generation,
        flags,
    };
    image.put(layout.slot_offset(slot), payload);
    image.put(layout.slot_offset(slot) + record.table_offset, &table);
    image.put(layout.record_offset(slot), &record.encode());
}

/// The golden region as today's code writes it.
fn build() -> Sparse {
    let mut image = Sparse::default();
    for offset in SUPERBLOCK_OFFSETS {
        image.put(offset, &superblock().encode());
    }
    for (copy, sequence) in [(0, 8), (1, 7)] {
        image.put(CONTROL_OFFSETS[copy], &control(sequence).encode(&REGION).unwrap());
    }
    let planned = plan(&specs(), METADATA).unwrap();
    let mut payload = planned.header.clone();
    payload.resize(planned.payload_bytes as usize, 0);
    for &index in &planned.order {
        let (_, dtype, shape, seed) = TENSORS[index];
        let bytes = bytes_of(dtype, shape, seed);
        payload[planned.placements[index] as usize..][..bytes.len()].copy_from_slice(&bytes);
    }
    commit(&mut image, 0, 3, 0, &planned, &payload);
    let raw = plan_raw(RAW.len() as u64, &[]).unwrap();
    let payload = [&raw.header, RAW].concat();
    commit(&mut image, 2, 4, RAW_STREAM, &raw, &payload);
    commit(&mut image, 4, 2, RAW_STREAM, &raw, &payload);
    let writing = SlotRecord {
        uuid: REGION,
        slot: 1,
        generation: 5,
        state: RecordState::Writing,
        step: 50,
        run_id: 99,
        payload_bytes: 0,
        header_bytes: 0,
        tensor_count: 0,
        chunk_bytes: 0,
        chunk_count: 0,
        table_offset: 0,
        table_hash: 0,
        header_hash: 0,
        unix_ns: 1_750_000_000_000_000_005,
        flags: 0,
    };
    image.put(superblock().layout.record_offset(1), &writing.encode());
    image
}

fn recover(image: &Sparse) -> DecisionTable {
    read_region(|offset, dst| image.read(offset, dst), superblock().layout.region_bytes()).unwrap()
}

/// The payload of a checkpoint, every chunk verified.
fn verified(image: &Sparse, record: &SlotRecord) -> Result<Vec<u8>> {
    let start = superblock().layout.slot_offset(record.slot);
    let mut table = vec![0; record.table_bytes() as usize];
    image.read(start + record.table_offset, &mut table)?;
    let hashes = decode_table(&table, record)?;
    let mut payload = vec![0; record.payload_bytes as usize];
    image.read(start, &mut payload)?;
    for (index, (chunk, hash)) in payload.chunks(CHUNK_BYTES as usize).zip(hashes).enumerate() {
        assert_eq!(chunk.len(), record.chunk_len(index as u64));
        if chunk_hash(chunk) != hash {
            return Err(Error::new(ErrorKind::Corrupt, "verify", format!("chunk {index}")));
        }
    }
    Ok(payload)
}

#[test]
fn version_1_is_read() {
    let image = Sparse::from_runs(GOLDEN);
    let table = recover(&image);
    assert_eq!(table.superblock, superblock());
    assert_eq!((table.control, table.control_copy), (Some(control(8)), Some(0)));
    assert_eq!((table.next_generation, table.notes), (1008, vec![]));
    assert_eq!(table.newest_first, [2, 0]);
    let verdicts: Vec<Verdict> = table.slots.iter().map(|decision| decision.verdict.clone()).collect();
    let expected =
        [Verdict::Checkpoint, Verdict::Writing, Verdict::Checkpoint, Verdict::Empty, Verdict::Discarded];
    assert_eq!(verdicts, expected);
    assert!(table.slots[2].pinned);

    let record = table.slots[0].record.as_ref().unwrap();
    assert_eq!((record.generation, record.step, record.run_id), (3, 30, 99));
    let bytes = verified(&image, record).unwrap();
    let payload = parse_header(&bytes, record.payload_bytes).unwrap();
    assert_eq!(payload.tensors.len(), TENSORS.len());
    for &(name, dtype, shape, seed) in TENSORS {
        let tensor = payload.tensor(name).unwrap();
        assert_eq!((tensor.dtype, &tensor.shape[..]), (dtype, shape), "{name}");
        let stored = &bytes[tensor.offset as usize..][..tensor.bytes as usize];
        assert_eq!(stored, bytes_of(dtype, shape, seed), "{name}");
    }
    assert_eq!(payload.tensor("layer.tied").unwrap().alias_of.as_deref(), Some("layer.weight"));
    let metadata: Vec<(&str, &str)> =
        payload.metadata.iter().map(|(key, value)| (&key[..], &value[..])).collect();
    assert_eq!(metadata, METADATA);

    let record = table.slots[2].record.as_ref().unwrap();
    assert_eq!(record.flags, RAW_STREAM);
    let bytes = verified(&image, record).unwrap();
    let payload = parse_header(&bytes, record.payload_bytes).unwrap();
    assert!(payload.raw);
    assert_eq!(&bytes[payload.tensors[0].offset as usize..], RAW);
}

#[test]
fn version_1_is_written_byte_for_byte() {
    let built = build().to_runs();
    if built != GOLDEN {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("region-v1.built");
        std::fs::write(&path, &built).unwrap();
        panic!("the code no longer writes version 1; what it writes is in {}", path.display());
    }
}

/// Every byte of the golden region is covered by a checksum or a hash, or means nothing.
#[test]
fn damage_to_the_golden_image_never_goes_unnoticed() {
    let golden = Sparse::from_runs(GOLDEN);
    let intact = recover(&golden);
    let offsets: Vec<u64> = golden.0.keys().copied().collect();
    for offset in offsets {
        for at in [0, 9, 100, 511, 2000, 4095] {
            let mut damaged = Sparse::from_runs(GOLDEN);
            damaged.0.get_mut(&offset).unwrap()[at] ^= 0x40;
            let table = recover(&damaged);
            for record in table.checkpoints() {
                let decision = &intact.slots[record.slot as usize];
                assert_eq!(
                    (Some(record), &decision.verdict),
                    (decision.record.as_ref(), &Verdict::Checkpoint)
                );
            }
            let slots_offset = superblock().layout.payload_offset;
            if offset < 16384 {
                assert_eq!(table.notes.len(), 1, "{offset} + {at}");
            } else if offset >= slots_offset {
                assert_eq!(table, intact);
                let slot = ((offset - slots_offset) / SLOT_ALIGN_BYTES) as usize;
                let record = intact.slots[slot].record.as_ref().unwrap();
                let used = offset - superblock().layout.slot_offset(slot as u32) + at as u64;
                let table_end = record.table_offset + record.table_bytes();
                if used < record.payload_bytes || (record.table_offset..table_end).contains(&used) {
                    let error = verified(&damaged, record).unwrap_err();
                    assert_eq!(error.kind(), ErrorKind::Corrupt, "slot {slot}, byte {used}");
                }
            }
        }
    }
}
