//! The chunk table: one XXH3-128 per chunk of the payload, itself covered by a hash in the slot record.

use super::codec::reserved;
use super::SlotRecord;
use crate::error::{Error, ErrorKind, Result};
use crate::persist::ChunkHasher;

/// Bytes of one hash in the table.
pub const HASH_BYTES: u64 = 16;

/// XXH3-128 (seed 0) of the payload bytes of one chunk.
pub fn chunk_hash(bytes: &[u8]) -> u128 {
    let mut hasher = ChunkHasher::new();
    hasher.update(bytes);
    hasher.finish()
}

/// XXH3-128 (seed 0) of a whole chunk table, as the slot record keeps it.
pub fn table_hash(table: &[u8]) -> u128 {
    chunk_hash(table)
}

/// The table's bytes: the hashes in chunk order, little-endian, [`HASH_BYTES`] each.
pub fn encode_table(hashes: &[u128]) -> Vec<u8> {
    hashes.iter().flat_map(|hash| hash.to_le_bytes()).collect()
}

/// The hashes in `table`, which starts with the `record.table_bytes()` bytes of the table of `record`.
///
/// # Errors
///
/// `Corrupt` when bytes are missing or do not hash to what the record says.
pub fn decode_table(table: &[u8], record: &SlotRecord) -> Result<Vec<u128>> {
    let corrupt = |message| Error::new(ErrorKind::Corrupt, "read chunk table", message);
    let table = usize::try_from(record.table_bytes())
        .ok()
        .and_then(|bytes| table.get(..bytes))
        .ok_or_else(|| corrupt(format!("expected {} bytes, found {}", record.table_bytes(), table.len())))?;
    let hash = table_hash(table);
    if hash != record.table_hash {
        return Err(corrupt(format!(
            "the table hashes to {hash:032x}, the slot record says {:032x}",
            record.table_hash
        )));
    }
    let hash_of = |bytes: &[u8]| {
        let mut hash = [0; HASH_BYTES as usize];
        hash.copy_from_slice(bytes);
        u128::from_le_bytes(hash)
    };
    let mut hashes = reserved(record.chunk_count, "read chunk table")?;
    hashes.extend(table.chunks_exact(HASH_BYTES as usize).map(hash_of));
    Ok(hashes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{RecordState, Uuid};
    use proptest::prelude::*;

    fn record_of(table: &[u8]) -> SlotRecord {
        SlotRecord {
            uuid: Uuid([0; 16]),
            slot: 0,
            generation: 1,
            state: RecordState::Committed,
            step: 0,
            run_id: 0,
            payload_bytes: table.len() as u64 / 16 * 4096,
            header_bytes: 4096,
            tensor_count: 0,
            chunk_bytes: 4096,
            chunk_count: table.len() as u64 / 16,
            table_offset: 0,
            table_hash: table_hash(table),
            header_hash: 0,
            unix_ns: 0,
            flags: 0,
        }
    }

    /// The reference vector for empty input pins algorithm, seed and byte order.
    #[test]
    fn hash_is_xxh3_128_with_seed_zero() {
        assert_eq!(chunk_hash(b""), 0x99aa_06d3_0147_98d8_6001_c324_468d_497f);
        assert_eq!(ChunkHasher::new().finish(), chunk_hash(b""));
    }

    #[test]
    fn every_bit_flip_in_a_table_is_detected() {
        let table = encode_table(&[1, u128::MAX, 3]);
        let record = record_of(&table);
        assert_eq!(decode_table(&table, &record).unwrap(), [1, u128::MAX, 3]);
        for bit in 0..table.len() * 8 {
            let mut flipped = table.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode_table(&flipped, &record).unwrap_err().kind(), ErrorKind::Corrupt);
        }
        assert_eq!(decode_table(&table[..47], &record).unwrap_err().kind(), ErrorKind::Corrupt);
        let huge = SlotRecord { chunk_count: u64::MAX, ..record };
        assert_eq!(decode_table(&table, &huge).unwrap_err().kind(), ErrorKind::Corrupt);
    }

    proptest! {
        #[test]
        fn round_trip_with_padding(hashes in proptest::collection::vec(any::<u128>(), 0..300)) {
            let mut table = encode_table(&hashes);
            let record = record_of(&table);
            table.resize(table.len().next_multiple_of(4096), 0);
            prop_assert_eq!(decode_table(&table, &record).unwrap(), hashes);
        }

        #[test]
        fn pieces_hash_like_the_whole(bytes in proptest::collection::vec(any::<u8>(), 0..2000), cuts in proptest::collection::vec(0usize..2000, 0..6)) {
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(bytes.len())).collect();
            cuts.sort_unstable();
            let mut hasher = ChunkHasher::new();
            let mut start = 0;
            for cut in cuts.into_iter().chain([bytes.len()]) {
                hasher.update(&bytes[start..cut]);
                start = cut;
            }
            prop_assert_eq!(hasher.finish(), twox_hash::XxHash3_128::oneshot(&bytes));
        }
    }
}
