//! What is known of the bytes that a slot holds, so that a save need not write what is there already.
//!
//! # Why nothing is believed too early or too long
//!
//! The hash of a chunk is *known* only while the medium durably holds bytes of that hash at that place:
//!
//! 1. It becomes known when a save commits: the payload was flushed before the commit record was written. Or at open,
//!    from the chunk table of a record that recovery adopted: that record was written after such a flush, too.
//! 2. It is forgotten before the first byte of anything else is submitted to the chunk's place ([`Content::forget`]),
//!    whatever becomes of the save. Until its save commits nothing else makes it known again.
//! 3. A slot's content has one owner: the region while no save owns the slot, else that save. It goes over with the slot.
//! 4. Chunks beyond a save's payload are forgotten when it begins ([`Content::prepare`]): its chunk table may lie there.
//!
//! Rot is not kept for ever: every `rewrite_every`-th save into a slot writes everything. And a chunk that was found
//! damaged makes its whole slot unknown.

use std::mem;

use crate::format::SlotRecord;

/// One chunk's place.
#[derive(Debug, Clone, Copy, Default)]
struct Place {
    /// XXH3-128 of the bytes that are durably there, where known.
    known: Option<u128>,
    /// The last save into the slot had the same bytes as the one before. Only a guess about the next one, which looks
    /// before it copies.
    steady: bool,
}

/// What is known of one slot's payload. The default: nothing.
#[derive(Debug, Default)]
pub(crate) struct Content {
    chunk_bytes: u64,
    payload_bytes: u64,
    places: Vec<Place>,
    /// Saves into the slot since everything was written.
    saves_since_rewrite: u32,
}

impl Content {
    /// The payload of an adopted record with its chunk table. Where in the cycle of rewriting the slot is, is not known:
    /// the generation chooses, so that processes which save only a few times each come to rewrite, too.
    pub fn adopted(record: &SlotRecord, hashes: &[u128], rewrite_every: u32) -> Content {
        let phase = crate::format::chunk_hash(&record.generation.to_le_bytes()) % u128::from(rewrite_every);
        Content {
            chunk_bytes: record.chunk_bytes,
            payload_bytes: record.payload_bytes,
            places: hashes.iter().map(|&hash| Place { known: Some(hash), steady: false }).collect(),
            saves_since_rewrite: phase as u32,
        }
    }

    /// Makes ready for a save into the slot: keeps what is known of chunks that it has, too, with the same lengths.
    pub fn prepare(&mut self, chunk_bytes: u64, payload_bytes: u64, rewrite_every: u32) {
        let same_chunks = self.chunk_bytes == chunk_bytes;
        let due = self.saves_since_rewrite + 1 >= rewrite_every;
        if due || !same_chunks {
            self.places.clear();
        }
        self.saves_since_rewrite = if due { 0 } else { self.saves_since_rewrite + 1 };
        let count = payload_bytes.div_ceil(chunk_bytes) as usize;
        let common = self.places.len().min(count);
        if payload_bytes != self.payload_bytes && common > 0 {
            // The last one in common may be the old or the new payload's shorter one.
            self.places[common - 1] = Place::default();
        }
        self.places.resize(count, Place::default());
        self.chunk_bytes = chunk_bytes;
        self.payload_bytes = payload_bytes;
    }

    /// Hash of what the medium durably holds in the chunk's place.
    pub fn known(&self, chunk: u64) -> Option<u128> {
        self.places.get(chunk as usize)?.known
    }

    /// The same, where the save is likely to have the same bytes.
    pub fn steady(&self, chunk: u64) -> Option<u128> {
        self.places.get(chunk as usize).filter(|place| place.steady)?.known
    }

    /// Whether the save has the bytes that were known to be in the chunk's place.
    pub fn compared(&mut self, chunk: u64, same: bool) {
        if let Some(place) = self.places.get_mut(chunk as usize) {
            place.steady = same;
        }
    }

    /// Something is about to be written in the chunk's place.
    pub fn forget(&mut self, chunk: u64) {
        if let Some(place) = self.places.get_mut(chunk as usize) {
            place.known = None;
        }
    }

    /// The content once the save that owns it has durably committed; `hashes` of all its chunks.
    pub fn committed(&mut self, hashes: &[u128]) -> Content {
        let mut content = mem::take(self);
        content.places.iter_mut().zip(hashes).for_each(|(place, &hash)| place.known = Some(hash));
        content
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: u64 = 4096;
    const NEVER: u32 = u32::MAX;

    fn content(payload_bytes: u64) -> Content {
        let mut content = Content::default();
        content.prepare(CHUNK, payload_bytes, NEVER);
        let hashes: Vec<u128> = (0..payload_bytes.div_ceil(CHUNK)).map(u128::from).collect();
        content.committed(&hashes)
    }

    fn known(content: &Content) -> Vec<Option<u128>> {
        content.places.iter().map(|place| place.known).collect()
    }

    #[test]
    fn only_chunks_of_the_same_place_and_length_stay_known() {
        // Payload before and after, chunks known after.
        let cases: [(u64, u64, &[Option<u128>]); 7] = [
            (3 * CHUNK, 3 * CHUNK, &[Some(0), Some(1), Some(2)]),
            (3 * CHUNK - 1, 3 * CHUNK - 1, &[Some(0), Some(1), Some(2)]),
            (3 * CHUNK - 1, 3 * CHUNK, &[Some(0), Some(1), None]),
            (3 * CHUNK, 3 * CHUNK - 1, &[Some(0), Some(1), None]),
            (3 * CHUNK - 1, 5 * CHUNK, &[Some(0), Some(1), None, None, None]),
            (3 * CHUNK, CHUNK + 1, &[Some(0), None]),
            (1, 2 * CHUNK, &[None, None]),
        ];
        for (before, after, expected) in cases {
            let mut content = content(before);
            content.prepare(CHUNK, after, NEVER);
            assert_eq!(known(&content), expected, "{before} bytes, then {after}");
        }
        let mut other = content(4 * CHUNK);
        other.prepare(2 * CHUNK, 4 * CHUNK, NEVER);
        assert_eq!(known(&other), [None, None], "other chunks");
    }

    #[test]
    fn what_is_forgotten_is_known_again_after_the_commit_only() {
        let mut content = content(3 * CHUNK);
        content.prepare(CHUNK, 3 * CHUNK, NEVER);
        content.compared(0, true);
        content.forget(1);
        content.compared(1, false);
        assert_eq!(known(&content), [Some(0), None, Some(2)]);
        let mut content = content.committed(&[0, 7, 2]);
        assert_eq!(known(&content), [Some(0), Some(7), Some(2)]);
        content.prepare(CHUNK, 3 * CHUNK, NEVER);
        let steady: Vec<Option<u128>> = (0..3).map(|chunk| content.steady(chunk)).collect();
        assert_eq!(steady, [Some(0), None, None]);
        content.forget(0);
        assert_eq!(content.steady(0), None, "a guess about nothing");
    }

    #[test]
    fn every_nth_save_writes_everything() {
        for every in 1..5u32 {
            let mut content = Content::default();
            let mut rewritten = Vec::new();
            for _ in 0..3 * every {
                content.prepare(CHUNK, CHUNK, every);
                rewritten.push(content.known(0).is_none());
                content = content.committed(&[1]);
            }
            // The first one finds nothing, the others follow the cycle.
            let expected: Vec<bool> = (1..=3 * every).map(|save| save == 1 || save % every == 0).collect();
            assert_eq!(rewritten, expected, "every {every}");
        }
    }
}
