//! Where everything lies in a region: offsets from slot count and slot size, with checked arithmetic.

use super::codec::round_up;
use super::stripe::round_to_units;
use super::table::HASH_BYTES;
use super::{
    BLOCK_BYTES, MAX_CHUNKS, MAX_CHUNK_BYTES, MAX_SLOTS, MIN_CHUNK_BYTES, MIN_SLOTS, SLOT_ALIGN_BYTES,
};
use crate::error::{Error, ErrorKind, Result};

/// Byte offsets of the two superblock copies.
pub const SUPERBLOCK_OFFSETS: [u64; 2] = [0, BLOCK_BYTES];

/// Byte offsets of the two control blocks.
pub const CONTROL_OFFSETS: [u64; 2] = [2 * BLOCK_BYTES, 3 * BLOCK_BYTES];

/// Byte offset of slot 0's record; one block per slot.
pub const RECORDS_OFFSET: u64 = 4 * BLOCK_BYTES;

/// Largest region, in bytes: file offsets are signed.
pub const MAX_REGION_BYTES: u64 = i64::MAX as u64;

/// The geometry of a region. Once validated, no offset within the region overflows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Slots in the region.
    pub slot_count: u32,
    /// Bytes of each slot, payload and chunk table together; a multiple of [`SLOT_ALIGN_BYTES`].
    pub slot_bytes: u64,
    /// Byte offset of slot 0, a multiple of [`SLOT_ALIGN_BYTES`].
    pub payload_offset: u64,
}

impl Layout {
    /// The layout that this version formats: slots from the first boundary after the records.
    ///
    /// # Errors
    ///
    /// `InvalidArgument` when a number is outside its limits or the region would pass
    /// [`MAX_REGION_BYTES`].
    pub fn new(slot_count: u32, slot_bytes: u64) -> Result<Layout> {
        Layout::in_units(slot_count, slot_bytes, SLOT_ALIGN_BYTES)
    }

    /// [`Layout::new`] for a striped region: slots, and what is before them, take whole units.
    pub fn in_units(slot_count: u32, slot_bytes: u64, unit_bytes: u64) -> Result<Layout> {
        let bad = |message| Error::new(ErrorKind::InvalidArgument, "lay out region", message);
        let records_end = records_end(slot_count).ok_or_else(|| bad("slot count overflows".to_owned()))?;
        let payload_offset =
            round_to_units(records_end, unit_bytes).ok_or_else(|| bad("slot records overflow".to_owned()))?;
        let slot_bytes = match unit_bytes > SLOT_ALIGN_BYTES {
            true => round_to_units(slot_bytes, unit_bytes).ok_or_else(|| bad("slot overflows".to_owned()))?,
            false => slot_bytes,
        };
        let layout = Layout { slot_count, slot_bytes, payload_offset };
        layout.check().map_err(bad)?;
        Ok(layout)
    }

    /// Whether the layout is possible; if not, what is wrong.
    pub(crate) fn check(&self) -> Result<(), String> {
        let Layout { slot_count, slot_bytes, payload_offset } = *self;
        if !(MIN_SLOTS..=MAX_SLOTS).contains(&slot_count) {
            return Err(format!("slot count must be {MIN_SLOTS} to {MAX_SLOTS}, found {slot_count}"));
        }
        if slot_bytes == 0 || slot_bytes % SLOT_ALIGN_BYTES != 0 {
            return Err(format!(
                "slot bytes must be a positive multiple of {SLOT_ALIGN_BYTES}, found {slot_bytes}"
            ));
        }
        if payload_offset % SLOT_ALIGN_BYTES != 0 {
            return Err(format!(
                "payload offset must be a multiple of {SLOT_ALIGN_BYTES}, found {payload_offset}"
            ));
        }
        let records_end = records_end(slot_count).ok_or("slot count overflows")?;
        if payload_offset < records_end {
            return Err(format!(
                "payload offset {payload_offset} lies before the records' end {records_end}"
            ));
        }
        slot_bytes
            .checked_mul(u64::from(slot_count))
            .and_then(|bytes| bytes.checked_add(payload_offset))
            .filter(|&bytes| bytes <= MAX_REGION_BYTES)
            .map(drop)
            .ok_or_else(|| {
                format!("{slot_count} slots of {slot_bytes} bytes pass the largest region, {MAX_REGION_BYTES} bytes")
            })
    }

    /// Byte offset of the record of `slot`.
    pub fn record_offset(&self, slot: u32) -> u64 {
        debug_assert!(slot < self.slot_count);
        RECORDS_OFFSET + u64::from(slot) * BLOCK_BYTES
    }

    /// Byte offset of the first payload byte of `slot`.
    pub fn slot_offset(&self, slot: u32) -> u64 {
        debug_assert!(slot < self.slot_count);
        self.payload_offset + u64::from(slot) * self.slot_bytes
    }

    /// Bytes from the region's start to the end of its last slot.
    pub fn region_bytes(&self) -> u64 {
        self.payload_offset + u64::from(self.slot_count) * self.slot_bytes
    }

    /// The smallest slot that holds a payload of `payload_bytes` hashed in chunks of `chunk_bytes`.
    ///
    /// # Errors
    ///
    /// `InvalidArgument` for a chunk size outside its limits, `TooLarge` for a payload that no region can hold.
    pub fn slot_bytes_for(payload_bytes: u64, chunk_bytes: u64) -> Result<u64> {
        check_chunk_bytes(chunk_bytes)
            .map_err(|message| Error::new(ErrorKind::InvalidArgument, "size slot", message))?;
        let table_bytes = chunk_count_for(payload_bytes, chunk_bytes) * HASH_BYTES;
        round_up(payload_bytes, BLOCK_BYTES)
            .and_then(|padded| padded.checked_add(round_up(table_bytes, BLOCK_BYTES)?))
            .and_then(|bytes| round_up(bytes.max(1), SLOT_ALIGN_BYTES))
            .filter(|&bytes| bytes <= MAX_REGION_BYTES)
            .ok_or_else(|| {
                Error::new(
                    ErrorKind::TooLarge,
                    "size slot",
                    format!("a payload of {payload_bytes} bytes passes the largest region, {MAX_REGION_BYTES} bytes"),
                )
            })
    }
}

fn records_end(slot_count: u32) -> Option<u64> {
    RECORDS_OFFSET.checked_add(u64::from(slot_count) * BLOCK_BYTES)
}

/// Whether `chunk_bytes` is a permitted chunk size; if not, what is wrong.
pub(crate) fn check_chunk_bytes(chunk_bytes: u64) -> Result<(), String> {
    if (MIN_CHUNK_BYTES..=MAX_CHUNK_BYTES).contains(&chunk_bytes) && chunk_bytes.is_multiple_of(BLOCK_BYTES) {
        return Ok(());
    }
    Err(format!(
        "chunk bytes must be a multiple of {BLOCK_BYTES} from {MIN_CHUNK_BYTES} to {MAX_CHUNK_BYTES}, found {chunk_bytes}"
    ))
}

/// Whether a payload may be hashed in chunks of `chunk_bytes`, which must be permitted; if not, what is wrong.
pub(crate) fn check_chunk_count(payload_bytes: u64, chunk_bytes: u64) -> Result<(), String> {
    let chunk_count = chunk_count_for(payload_bytes, chunk_bytes);
    if chunk_count <= MAX_CHUNKS {
        return Ok(());
    }
    Err(format!(
        "expected at most {MAX_CHUNKS} chunks, found {chunk_count}: {payload_bytes} bytes in chunks of {chunk_bytes}"
    ))
}

/// Chunks of a payload; the last may be shorter than `chunk_bytes`, which must not be 0.
pub fn chunk_count_for(payload_bytes: u64, chunk_bytes: u64) -> u64 {
    payload_bytes.div_ceil(chunk_bytes)
}

/// Where a writer puts the chunk table of a payload, from the slot's start: the next block boundary.
/// `None` on overflow.
pub fn table_offset_for(payload_bytes: u64) -> Option<u64> {
    round_up(payload_bytes, BLOCK_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn limits_hold_at_their_edges() {
        for slot_count in [MIN_SLOTS, MAX_SLOTS] {
            Layout::new(slot_count, SLOT_ALIGN_BYTES).unwrap();
        }
        let bad = [
            (MIN_SLOTS - 1, SLOT_ALIGN_BYTES),
            (MAX_SLOTS + 1, SLOT_ALIGN_BYTES),
            (u32::MAX, SLOT_ALIGN_BYTES),
            (2, 0),
            (2, SLOT_ALIGN_BYTES - BLOCK_BYTES),
            (2, MAX_REGION_BYTES / SLOT_ALIGN_BYTES * SLOT_ALIGN_BYTES),
            (MAX_SLOTS, u64::MAX / SLOT_ALIGN_BYTES * SLOT_ALIGN_BYTES),
        ];
        for (slot_count, slot_bytes) in bad {
            let error = Layout::new(slot_count, slot_bytes).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{slot_count} {slot_bytes}");
        }
    }

    #[test]
    fn structures_of_the_largest_region_do_not_touch() {
        let layout = Layout::new(MAX_SLOTS, SLOT_ALIGN_BYTES).unwrap();
        assert_eq!(layout.record_offset(0), CONTROL_OFFSETS[1] + BLOCK_BYTES);
        assert!(layout.record_offset(MAX_SLOTS - 1) + BLOCK_BYTES <= layout.slot_offset(0));
        assert_eq!(layout.slot_offset(MAX_SLOTS - 1) + layout.slot_bytes, layout.region_bytes());
    }

    #[test]
    fn slot_size_counts_the_chunk_table() {
        assert_eq!(Layout::slot_bytes_for(0, 4096).unwrap(), SLOT_ALIGN_BYTES);
        // 510 blocks of payload need 2 blocks of table: exactly one alignment unit; one byte more does not fit.
        let full = 510 * 4096;
        assert_eq!(Layout::slot_bytes_for(full, 4096).unwrap(), SLOT_ALIGN_BYTES);
        assert_eq!(Layout::slot_bytes_for(full + 1, 4096).unwrap(), 2 * SLOT_ALIGN_BYTES);
        assert_eq!(Layout::slot_bytes_for(u64::MAX, 4096).unwrap_err().kind(), ErrorKind::TooLarge);
        for chunk_bytes in [0, 1, 4095, 4097, MAX_CHUNK_BYTES + 4096] {
            let error = Layout::slot_bytes_for(1, chunk_bytes).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        }
    }

    proptest! {
        #[test]
        fn any_numbers_give_a_layout_or_an_error(slots in any::<u32>(), bytes in any::<u64>(), chunk in any::<u64>()) {
            if let Ok(layout) = Layout::new(slots, bytes) {
                prop_assert!(layout.region_bytes() <= MAX_REGION_BYTES);
            }
            if let Ok(slot_bytes) = Layout::slot_bytes_for(bytes, chunk) {
                prop_assert!(slot_bytes >= bytes && slot_bytes % SLOT_ALIGN_BYTES == 0);
            }
        }
    }
}
