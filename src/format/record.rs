//! The slot record: what a slot holds. Its commit is the commit of a checkpoint.
//!
//! The record fits in the first 512-byte sector of its block. Tearing of any kind makes it invalid, never wrong.

use super::codec::{check_seal, is_zero, seal, Block, Field};
use super::layout::{check_chunk_bytes, check_chunk_count, chunk_count_for, table_offset_for};
use super::table::HASH_BYTES;
use super::{Layout, Uuid, BLOCK_BYTES, MAX_GENERATION, MAX_HEADER_JSON_BYTES, MAX_TENSORS};
use crate::error::{Error, ErrorKind, Result};

const OP: &str = "read slot record";

/// The first eight bytes of a slot record.
pub const RECORD_MAGIC: [u8; 8] = *b"PCCSLOT\0";

/// Version of the record's layout.
pub const RECORD_VERSION: u32 = 1;

/// Bytes of a record: one sector, so that a disk that never tears a sector never tears a record.
pub const RECORD_BYTES: usize = 512;

/// Flag: the payload is the one U8 tensor of a raw streaming save.
pub const RAW_STREAM: u32 = 1;

/// Flag: [`SlotRecord::header_hash`] is what it says.
pub const HEADER_HASHED: u32 = 2;

/// Shortest safetensors header: the length and `{}`.
pub(crate) const MIN_HEADER_BYTES: u64 = 10;

/// Longest safetensors header, its 8-byte length included.
pub(crate) const MAX_HEADER_BYTES: u64 = 8 + MAX_HEADER_JSON_BYTES;

const MAGIC: Field = Field::first("magic", 8);
const VERSION: Field = MAGIC.then("record_version", 4);
const STATE: Field = VERSION.then("state", 4);
const UUID: Field = STATE.then("uuid", 16);
const SLOT: Field = UUID.then("slot", 4);
const FLAGS: Field = SLOT.then("flags", 4);
const GENERATION: Field = FLAGS.then("generation", 8);
const STEP: Field = GENERATION.then("step", 8);
const RUN_ID: Field = STEP.then("run_id", 8);
const UNIX_NS: Field = RUN_ID.then("unix_ns", 8);
const PAYLOAD_BYTES: Field = UNIX_NS.then("payload_bytes", 8);
const HEADER_BYTES: Field = PAYLOAD_BYTES.then("header_bytes", 8);
const CHUNK_BYTES: Field = HEADER_BYTES.then("chunk_bytes", 8);
const CHUNK_COUNT: Field = CHUNK_BYTES.then("chunk_count", 8);
const TABLE_OFFSET: Field = CHUNK_COUNT.then("table_offset", 8);
const TABLE_HASH: Field = TABLE_OFFSET.then("table_hash", 16);
const TENSOR_COUNT: Field = TABLE_HASH.then("tensor_count", 4);
const GAP: Field = TENSOR_COUNT.then("reserved", 4);
const HEADER_HASH: Field = GAP.then("header_hash", 16);
const RESERVED: Field = HEADER_HASH.then("reserved", 352);
const CHECKSUM: Field = RESERVED.then("checksum", 8);
const _: () = assert!(CHECKSUM.end() == RECORD_BYTES);

/// Every byte of a record, in order.
#[cfg(test)]
pub(crate) const FIELDS: &[Field] = &[
    MAGIC,
    VERSION,
    STATE,
    UUID,
    SLOT,
    FLAGS,
    GENERATION,
    STEP,
    RUN_ID,
    UNIX_NS,
    PAYLOAD_BYTES,
    HEADER_BYTES,
    CHUNK_BYTES,
    CHUNK_COUNT,
    TABLE_OFFSET,
    TABLE_HASH,
    TENSOR_COUNT,
    GAP,
    HEADER_HASH,
    RESERVED,
    CHECKSUM,
];

/// Whether a slot's content is whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum RecordState {
    /// A save owns the slot: its payload is in an unknown state.
    Writing = 1,
    /// Payload and chunk table were durable before this record was written.
    Committed = 2,
}

/// What a slot record says.
///
/// While the state is [`RecordState::Writing`], the fields from `payload_bytes` on are what the save intends;
/// they are not validated, and the table hash is not known yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotRecord {
    /// Identity of the region.
    pub uuid: Uuid,
    /// The slot that the record describes.
    pub slot: u32,
    /// Generation of the save, 1 to [`MAX_GENERATION`].
    pub generation: u64,
    /// Whether the content is whole.
    pub state: RecordState,
    /// The trainer's iteration number; not unique, not ordered.
    pub step: u64,
    /// Group run id, 0 when there is none.
    pub run_id: u64,
    /// Bytes of the safetensors file in the slot.
    pub payload_bytes: u64,
    /// Where tensor data starts in the payload: 8 bytes of length and the padded JSON.
    pub header_bytes: u64,
    /// Tensors in the safetensors header; tied tensors, which are stored once, count once.
    pub tensor_count: u32,
    /// Bytes per chunk; the last chunk may be shorter.
    pub chunk_bytes: u64,
    /// Chunks of the payload.
    pub chunk_count: u64,
    /// Byte offset of the chunk table from the slot's start.
    pub table_offset: u64,
    /// XXH3-128 over the `16 * chunk_count` bytes of the chunk table.
    pub table_hash: u128,
    /// XXH3-128 over the `header_bytes` bytes of the header, so that it can be read and verified without the rest of its
    /// chunk; counts only with [`HEADER_HASHED`], which older writers did not set.
    pub header_hash: u128,
    /// When the save began, in nanoseconds since 1970 UTC.
    pub unix_ns: u64,
    /// [`RAW_STREAM`], [`HEADER_HASHED`]; other bits are kept and mean nothing.
    pub flags: u32,
}

impl SlotRecord {
    /// The block to store: the record, then zeros.
    pub fn encode(&self) -> Block {
        let mut block = [0; BLOCK_BYTES as usize];
        let record = &mut block[..RECORD_BYTES];
        MAGIC.put(record, RECORD_MAGIC);
        VERSION.put(record, RECORD_VERSION.to_le_bytes());
        STATE.put(record, (self.state as u32).to_le_bytes());
        UUID.put(record, self.uuid.0);
        SLOT.put(record, self.slot.to_le_bytes());
        FLAGS.put(record, self.flags.to_le_bytes());
        GENERATION.put(record, self.generation.to_le_bytes());
        STEP.put(record, self.step.to_le_bytes());
        RUN_ID.put(record, self.run_id.to_le_bytes());
        UNIX_NS.put(record, self.unix_ns.to_le_bytes());
        PAYLOAD_BYTES.put(record, self.payload_bytes.to_le_bytes());
        HEADER_BYTES.put(record, self.header_bytes.to_le_bytes());
        CHUNK_BYTES.put(record, self.chunk_bytes.to_le_bytes());
        CHUNK_COUNT.put(record, self.chunk_count.to_le_bytes());
        TABLE_OFFSET.put(record, self.table_offset.to_le_bytes());
        TABLE_HASH.put(record, self.table_hash.to_le_bytes());
        TENSOR_COUNT.put(record, self.tensor_count.to_le_bytes());
        HEADER_HASH.put(record, self.header_hash.to_le_bytes());
        seal(record, CHECKSUM);
        block
    }

    /// Reads the record of `slot`; `None` when the slot was never used (the sector is all zeros).
    ///
    /// A committed record that is returned lies within `layout` in every field, so that reading what it
    /// names needs no further checks.
    ///
    /// # Errors
    ///
    /// `Corrupt`, with the reason.
    pub fn decode(block: &Block, uuid: &Uuid, slot: u32, layout: &Layout) -> Result<Option<SlotRecord>> {
        let bytes = &block[..RECORD_BYTES];
        if is_zero(bytes) {
            return Ok(None);
        }
        SlotRecord::decode_inner(bytes, uuid, slot, layout)
            .map(Some)
            .map_err(|message| Error::new(ErrorKind::Corrupt, OP, message))
    }

    fn decode_inner(bytes: &[u8], uuid: &Uuid, slot: u32, layout: &Layout) -> Result<SlotRecord, String> {
        let magic: [u8; 8] = MAGIC.array(bytes);
        if magic != RECORD_MAGIC {
            return Err(format!(
                "expected the magic \"{}\", found \"{}\"",
                RECORD_MAGIC.escape_ascii(),
                magic.escape_ascii()
            ));
        }
        check_seal(bytes, CHECKSUM)?;
        let version = VERSION.u32(bytes);
        if version != RECORD_VERSION {
            return Err(format!("expected record version {RECORD_VERSION}, found {version}"));
        }
        let state = match STATE.u32(bytes) {
            1 => RecordState::Writing,
            2 => RecordState::Committed,
            other => return Err(format!("expected state 1 (writing) or 2 (committed), found {other}")),
        };
        let record = SlotRecord {
            uuid: Uuid(UUID.array(bytes)),
            slot: SLOT.u32(bytes),
            generation: GENERATION.u64(bytes),
            state,
            step: STEP.u64(bytes),
            run_id: RUN_ID.u64(bytes),
            payload_bytes: PAYLOAD_BYTES.u64(bytes),
            header_bytes: HEADER_BYTES.u64(bytes),
            tensor_count: TENSOR_COUNT.u32(bytes),
            chunk_bytes: CHUNK_BYTES.u64(bytes),
            chunk_count: CHUNK_COUNT.u64(bytes),
            table_offset: TABLE_OFFSET.u64(bytes),
            table_hash: TABLE_HASH.u128(bytes),
            header_hash: HEADER_HASH.u128(bytes),
            unix_ns: UNIX_NS.u64(bytes),
            flags: FLAGS.u32(bytes),
        };
        if record.uuid != *uuid {
            return Err(format!("belongs to another region: expected {uuid}, found {}", record.uuid));
        }
        if record.slot != slot {
            return Err(format!("belongs to another slot: expected {slot}, found {}", record.slot));
        }
        if !(1..=MAX_GENERATION).contains(&record.generation) {
            return Err(format!("generation must be 1 to {MAX_GENERATION}, found {}", record.generation));
        }
        if state == RecordState::Committed {
            record.check_geometry(layout)?;
        }
        Ok(record)
    }

    /// Whether payload and chunk table lie in a slot of `layout` as a commit must have them; if not, what is wrong.
    pub(crate) fn check_geometry(&self, layout: &Layout) -> Result<(), String> {
        let slot_bytes = layout.slot_bytes;
        if self.payload_bytes > slot_bytes {
            return Err(format!("payload of {} bytes in a slot of {slot_bytes}", self.payload_bytes));
        }
        let header_limit = self.payload_bytes.min(MAX_HEADER_BYTES);
        if !(MIN_HEADER_BYTES..=header_limit).contains(&self.header_bytes) {
            return Err(format!(
                "header bytes must be {MIN_HEADER_BYTES} to {header_limit}, found {}",
                self.header_bytes
            ));
        }
        if self.tensor_count as usize > MAX_TENSORS {
            return Err(format!("expected at most {MAX_TENSORS} tensors, found {}", self.tensor_count));
        }
        check_chunk_bytes(self.chunk_bytes)?;
        check_chunk_count(self.payload_bytes, self.chunk_bytes)?;
        let chunk_count = chunk_count_for(self.payload_bytes, self.chunk_bytes);
        if self.chunk_count != chunk_count {
            return Err(format!("expected {chunk_count} chunks, found {}", self.chunk_count));
        }
        let lowest = table_offset_for(self.payload_bytes).ok_or("payload bytes overflow")?;
        // Cannot overflow: the payload fits in the slot, so the table is smaller still.
        let table_blocks_bytes = self.table_bytes().next_multiple_of(BLOCK_BYTES);
        let highest = slot_bytes.checked_sub(table_blocks_bytes);
        if !self.table_offset.is_multiple_of(BLOCK_BYTES)
            || self.table_offset < lowest
            || highest.is_none_or(|highest| self.table_offset > highest)
        {
            return Err(format!(
                "chunk table of {} bytes at {} does not lie between the payload's end at {} and the slot's end at {slot_bytes}",
                self.table_bytes(),
                self.table_offset,
                self.payload_bytes
            ));
        }
        Ok(())
    }

    /// Bytes of the chunk table, without the zeros that fill its last block.
    pub fn table_bytes(&self) -> u64 {
        self.chunk_count.saturating_mul(HASH_BYTES)
    }

    /// Byte offset of chunk `index` in the payload.
    pub fn chunk_offset(&self, index: u64) -> u64 {
        index.saturating_mul(self.chunk_bytes)
    }

    /// Payload bytes in chunk `index`; 0 beyond the last chunk.
    pub fn chunk_len(&self, index: u64) -> usize {
        let rest = self.payload_bytes.saturating_sub(self.chunk_offset(index));
        rest.min(self.chunk_bytes) as usize
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::format::{MAX_CHUNKS, SLOT_ALIGN_BYTES};
    use proptest::prelude::*;

    const REGION: Uuid = Uuid([9; 16]);

    fn layout() -> Layout {
        Layout::new(4, SLOT_ALIGN_BYTES).unwrap()
    }

    fn sample() -> SlotRecord {
        SlotRecord {
            uuid: REGION,
            slot: 2,
            generation: 41,
            state: RecordState::Committed,
            step: u64::MAX,
            run_id: 5,
            payload_bytes: 100_001,
            header_bytes: 4096,
            tensor_count: 3,
            chunk_bytes: 8192,
            chunk_count: 13,
            table_offset: 102_400,
            table_hash: 0x0123_4567_89ab_cdef_0011_2233_4455_6677,
            header_hash: 0x8899_aabb_ccdd_eeff_7766_5544_3322_1100,
            unix_ns: 1_700_000_000_000_000_001,
            flags: RAW_STREAM | HEADER_HASHED,
        }
    }

    fn decode(block: &Block) -> Result<Option<SlotRecord>> {
        SlotRecord::decode(block, &REGION, 2, &layout())
    }

    #[test]
    fn every_single_bit_flip_is_detected_or_outside_the_record() {
        let block = sample().encode();
        assert_eq!(decode(&block).unwrap(), Some(sample()));
        for bit in 0..block.len() * 8 {
            let mut flipped = block;
            flipped[bit / 8] ^= 1 << (bit % 8);
            match decode(&flipped) {
                Ok(found) => assert!(bit / 8 >= RECORD_BYTES && found == Some(sample()), "bit {bit}"),
                Err(error) => {
                    assert!(bit / 8 < RECORD_BYTES && error.kind() == ErrorKind::Corrupt, "bit {bit}")
                }
            }
        }
    }

    /// Persistent memory tears a record into 8-byte words: any mixture of two records is one of them or invalid.
    #[test]
    fn every_mixture_of_words_of_two_records_is_one_of_them_or_invalid() {
        let old = SlotRecord { state: RecordState::Writing, generation: 40, table_hash: 0, ..sample() };
        let (old_block, new_block) = (old.encode(), sample().encode());
        let differing: Vec<usize> =
            (0..64).filter(|word| old_block[word * 8..][..8] != new_block[word * 8..][..8]).collect();
        assert!((4..=16).contains(&differing.len()), "{differing:?}");
        for subset in 0u32..1 << differing.len() {
            let mut torn = old_block;
            for (index, word) in differing.iter().enumerate() {
                if subset & (1 << index) != 0 {
                    torn[word * 8..][..8].copy_from_slice(&new_block[word * 8..][..8]);
                }
            }
            if let Ok(found) = decode(&torn) {
                assert!(
                    (subset == 0 && found.as_ref() == Some(&old))
                        || (subset == (1 << differing.len()) - 1 && found == Some(sample())),
                    "subset {subset:b}"
                );
            }
        }
    }

    #[test]
    fn zeros_are_a_slot_never_used() {
        assert_eq!(decode(&[0; 4096]).unwrap(), None);
    }

    #[test]
    fn stale_blocks_are_refused_with_the_reason() {
        let block = sample().encode();
        let error = SlotRecord::decode(&block, &Uuid([8; 16]), 2, &layout()).unwrap_err();
        assert!(error.message().contains("another region"), "{error}");
        let error = SlotRecord::decode(&block, &REGION, 1, &layout()).unwrap_err();
        assert!(error.message().contains("another slot"), "{error}");
    }

    #[test]
    fn committed_geometry_outside_the_slot_is_refused() {
        let changes: [fn(&mut SlotRecord); 17] = [
            |record| record.generation = 0,
            |record| record.generation = MAX_GENERATION + 1,
            |record| record.payload_bytes = SLOT_ALIGN_BYTES + 1,
            |record| record.payload_bytes = u64::MAX,
            |record| record.header_bytes = 9,
            |record| record.header_bytes = record.payload_bytes + 1,
            |record| record.tensor_count = u32::MAX,
            |record| record.chunk_bytes = 0,
            |record| record.chunk_bytes = 8193,
            |record| record.chunk_bytes = 128 << 20,
            |record| record.chunk_count += 1,
            |record| record.chunk_count = u64::MAX,
            |record| record.table_offset -= 4096,
            |record| record.table_offset += 1,
            |record| record.table_offset = SLOT_ALIGN_BYTES,
            |record| record.table_offset = u64::MAX - 4095,
            |record| record.payload_bytes = 0,
        ];
        for (index, change) in changes.into_iter().enumerate() {
            let mut record = sample();
            change(&mut record);
            assert_eq!(decode(&record.encode()).unwrap_err().kind(), ErrorKind::Corrupt, "change {index}");
        }
        let highest = SlotRecord { table_offset: SLOT_ALIGN_BYTES - 4096, ..sample() };
        assert_eq!(decode(&highest.encode()).unwrap(), Some(highest));
    }

    #[test]
    fn a_payload_that_fills_the_slot_leaves_no_room_for_its_table() {
        let record = SlotRecord {
            payload_bytes: SLOT_ALIGN_BYTES,
            chunk_count: SLOT_ALIGN_BYTES / 8192,
            table_offset: SLOT_ALIGN_BYTES,
            ..sample()
        };
        assert_eq!(decode(&record.encode()).unwrap_err().kind(), ErrorKind::Corrupt);
    }

    /// A sparse file has slots of any size for nothing; what a reader must hold of one is bounded.
    #[test]
    fn more_chunks_than_a_reader_will_hold_are_refused() {
        let layout = Layout::new(2, MAX_CHUNKS * 4096 * 2).unwrap();
        let with = |chunk_count: u64| SlotRecord {
            slot: 1,
            chunk_bytes: 4096,
            chunk_count,
            payload_bytes: chunk_count * 4096,
            table_offset: chunk_count * 4096,
            ..sample()
        };
        let decode = |record: SlotRecord| SlotRecord::decode(&record.encode(), &REGION, 1, &layout);
        assert!(decode(with(MAX_CHUNKS)).unwrap().is_some());
        let error = decode(with(MAX_CHUNKS + 1)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.message().contains("at most 16777216 chunks, found 16777217"), "{error}");
    }

    #[test]
    fn chunks_cover_the_payload_exactly() {
        let record = sample();
        let total: u64 = (0..record.chunk_count).map(|index| record.chunk_len(index) as u64).sum();
        assert_eq!(total, record.payload_bytes);
        assert_eq!(record.chunk_len(record.chunk_count), 0);
        assert_eq!(record.chunk_len(u64::MAX), 0);
        assert_eq!(record.table_bytes(), 13 * 16);
    }

    proptest! {
        #[test]
        fn round_trip(slot in 0u32..4, generation in 1..=MAX_GENERATION, step in any::<u64>(), run_id in any::<u64>(),
                      payload in 10u64..1 << 20, chunk_blocks in 1u64..=16384, hash in any::<u128>(),
                      unix_ns in any::<u64>(), flags in any::<u32>(), writing in any::<bool>()) {
            let chunk_bytes = chunk_blocks * 4096;
            let record = SlotRecord {
                uuid: REGION,
                slot,
                generation,
                state: if writing { RecordState::Writing } else { RecordState::Committed },
                step,
                run_id,
                payload_bytes: payload,
                header_bytes: payload.min(4096),
                tensor_count: slot,
                chunk_bytes,
                chunk_count: chunk_count_for(payload, chunk_bytes),
                table_offset: table_offset_for(payload).unwrap(),
                table_hash: hash,
                header_hash: hash.rotate_left(64),
                unix_ns,
                flags,
            };
            let found = SlotRecord::decode(&record.encode(), &REGION, slot, &layout()).unwrap();
            prop_assert_eq!(found, Some(record));
        }

        #[test]
        fn sealed_noise_never_panics(noise in proptest::collection::vec(any::<u8>(), 504), small in any::<bool>()) {
            let mut block = [0; 4096];
            block[..504].copy_from_slice(&noise);
            MAGIC.put(&mut block, RECORD_MAGIC);
            VERSION.put(&mut block, RECORD_VERSION.to_le_bytes());
            STATE.put(&mut block, 2u32.to_le_bytes());
            UUID.put(&mut block, REGION.0);
            SLOT.put(&mut block, 2u32.to_le_bytes());
            if small {
                GENERATION.put(&mut block, 3u64.to_le_bytes());
                PAYLOAD_BYTES.put(&mut block, u64::from(noise[5]).to_le_bytes());
            }
            seal(&mut block[..RECORD_BYTES], CHECKSUM);
            if let Ok(Some(record)) = decode(&block) {
                prop_assert!(record.table_offset + record.table_bytes() <= SLOT_ALIGN_BYTES);
            }
        }
    }
}
