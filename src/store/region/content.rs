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

/// A chunk whose bytes are durably on the medium.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct KnownChunk {
    /// XXH3-128 of its bytes.
    pub hash: u128,
    /// The last save into the slot found it there, and need not have copied it: the next one looks before it copies.
    pub steady: bool,
}

/// What is known of one slot's payload. The default: nothing.
#[derive(Debug, Default)]
pub(crate) struct Content {
    chunk_bytes: u64,
    payload_bytes: u64,
    chunks: Vec<Option<KnownChunk>>,
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
            chunks: hashes.iter().map(|&hash| Some(KnownChunk { hash, steady: false })).collect(),
            saves_since_rewrite: phase as u32,
        }
    }

    /// Makes ready for a save into the slot: keeps what is known of chunks that it has, too, with the same lengths.
    pub fn prepare(&mut self, chunk_bytes: u64, payload_bytes: u64, rewrite_every: u32) {
        let same_chunks = self.chunk_bytes == chunk_bytes;
        let due = self.saves_since_rewrite + 1 >= rewrite_every;
        if due || !same_chunks {
            self.chunks.clear();
        }
        self.saves_since_rewrite = if due { 0 } else { self.saves_since_rewrite + 1 };
        let count = payload_bytes.div_ceil(chunk_bytes) as usize;
        let common = self.chunks.len().min(count);
        if payload_bytes != self.payload_bytes && common > 0 {
            // The last one in common may be the old or the new payload's shorter one.
            self.chunks[common - 1] = None;
        }
        self.chunks.resize(count, None);
        self.chunk_bytes = chunk_bytes;
        self.payload_bytes = payload_bytes;
    }

    /// What the medium durably holds in the chunk's place.
    pub fn known(&self, chunk: u64) -> Option<KnownChunk> {
        self.chunks.get(chunk as usize).copied().flatten()
    }

    /// The save found the chunk's bytes there.
    pub fn found(&mut self, chunk: u64) {
        if let Some(Some(known)) = self.chunks.get_mut(chunk as usize) {
            known.steady = true;
        }
    }

    /// Something is about to be written in the chunk's place.
    pub fn forget(&mut self, chunk: u64) {
        if let Some(known) = self.chunks.get_mut(chunk as usize) {
            *known = None;
        }
    }

    /// The content once the save that owns it has durably committed; `hashes` of all its chunks.
    pub fn committed(&mut self, hashes: &[u128]) -> Content {
        let mut content = mem::take(self);
        let written = |hash| KnownChunk { hash, steady: false };
        content.chunks = content
            .chunks
            .iter()
            .zip(hashes)
            .map(|(found, &hash)| Some(found.unwrap_or(written(hash))))
            .collect();
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
        content.chunks.iter().map(|chunk| chunk.map(|known| known.hash)).collect()
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
        content.found(0);
        content.forget(1);
        content.found(1);
        assert_eq!(known(&content), [Some(0), None, Some(2)]);
        let content = content.committed(&[0, 7, 2]);
        assert_eq!(known(&content), [Some(0), Some(7), Some(2)]);
        let steady: Vec<bool> =
            (0..3).filter_map(|chunk| content.known(chunk)).map(|known| known.steady).collect();
        assert_eq!(steady, [true, false, false]);
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
