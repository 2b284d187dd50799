//! Raw streaming saves: the caller pushes bytes at offsets, from several threads, and commits.
//!
//! Chunks are assembled in staging buffers. A raw save may hold only its share of the pool half-filled; beyond
//! it, the least useful half-filled chunk is spilled to its place in the slot and read back when more of it
//! comes. So any order of writes works within the bounded pool, and writing in order never spills.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};
use crate::format::{chunk_hash, PayloadPlan, BLOCK_BYTES};
use crate::medium::Barrier;
use crate::save::core::{cancelled, Durable, Progress, SaveCore};
use crate::save::saver::Shared;
use crate::save::{deadline_in, Save};
use crate::staging::StagingBuffer;
use crate::sync::{Arc, Event, Mutex};

/// A chunk that has some of its bytes.
#[derive(Default)]
struct OpenChunk {
    buffer: Option<StagingBuffer>,
    /// Covered byte ranges within the chunk: sorted, disjoint, never touching.
    covered: Vec<(usize, usize)>,
    spilled: bool,
    complete: bool,
}

struct Book {
    open: BTreeMap<u64, Arc<Mutex<OpenChunk>>>,
    complete: Vec<bool>,
    /// Buffers held by open chunks, and how many may be.
    held: usize,
    limit: usize,
}

/// The half-filled chunks of one raw save.
pub(crate) struct RawChunks {
    book: Mutex<Book>,
    moved: Event,
}

impl RawChunks {
    /// `limit` buffers at most stay half-filled.
    pub fn new(limit: usize, chunk_count: u64) -> Self {
        let complete = vec![false; chunk_count as usize];
        let book = Book { open: BTreeMap::new(), complete, held: 0, limit: limit.max(1) };
        RawChunks { book: Mutex::new(book), moved: Event::new() }
    }

    /// Gives every buffer back.
    pub fn clear(&self) {
        let mut book = self.book.lock();
        book.open.clear();
        book.held = 0;
        drop(book);
        self.moved.notify_all();
    }
}

/// A raw save in progress. Dropping it without `commit` cancels it.
pub struct RawSave {
    save: Option<Save>,
    shared: Arc<Shared>,
    chunks: Arc<RawChunks>,
    data_offset: u64,
    data_bytes: u64,
}

impl RawSave {
    pub(crate) fn new(
        save: Save,
        shared: Arc<Shared>,
        chunks: Arc<RawChunks>,
        plan: &PayloadPlan,
    ) -> Result<RawSave> {
        let data_offset = plan.placements[0];
        let others =
            plan.header.len() + plan.metadata_tensor.as_ref().map_or(0, |metadata| metadata.data.len());
        let data_bytes = plan.payload_bytes - others as u64;
        let raw = RawSave { save: Some(save), shared, chunks, data_offset, data_bytes };
        raw.write_payload(0, &plan.header)?;
        if let Some(metadata) = &plan.metadata_tensor {
            raw.write_payload(metadata.offset, &metadata.data)?;
        }
        Ok(raw)
    }

    fn save(&self) -> Result<&Save> {
        self.save.as_ref().ok_or_else(already_committed)
    }

    /// The save's generation.
    pub fn generation(&self) -> u64 {
        self.save.as_ref().map_or(0, |save| save.generation())
    }

    /// Total bytes announced at begin.
    pub fn data_bytes(&self) -> u64 {
        self.data_bytes
    }

    /// How far the save is.
    pub fn progress(&self) -> Option<Progress> {
        self.save.as_ref().map(|save| save.progress())
    }

    /// Copies `bytes` to `offset` of the stream; they are the caller's again on return. Nothing is durable yet.
    ///
    /// Callable from several threads; ranges must not overlap. Blocks while the staging pool is full.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        const OP: &str = "raw write";
        let end = offset.checked_add(bytes.len() as u64).filter(|&end| end <= self.data_bytes);
        if end.is_none() {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                OP,
                format!("{} bytes at {offset} pass the announced {} bytes", bytes.len(), self.data_bytes),
            ));
        }
        self.write_payload(self.data_offset + offset, bytes)
    }

    fn write_payload(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let core = self.save()?.core().clone();
        core.enter()?;
        let result = self.write_pieces(&core, offset, bytes);
        if let Err(error) = &result {
            // A refused range changes nothing; after anything else the stream's content is unknown.
            if error.kind() != ErrorKind::InvalidArgument {
                core.fail(error.clone());
            }
        }
        core.leave();
        result
    }

    fn write_pieces(&self, core: &SaveCore, offset: u64, bytes: &[u8]) -> Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let chunk = at / core.chunk_bytes;
            let within = (at % core.chunk_bytes) as usize;
            let len = (core.chunk_len(chunk) - within).min(bytes.len() - done);
            self.write_piece(core, chunk, within, &bytes[done..done + len])?;
            done += len;
        }
        Ok(())
    }

    fn write_piece(&self, core: &SaveCore, chunk: u64, within: usize, bytes: &[u8]) -> Result<()> {
        let entry = {
            let mut book = self.chunks.book.lock();
            if book.complete[chunk as usize] {
                return Err(overlap(core, chunk, within));
            }
            book.open.entry(chunk).or_default().clone()
        };
        let mut open = entry.lock();
        if open.complete || !cover(&mut open.covered, within, within + bytes.len()) {
            return Err(overlap(core, chunk, within));
        }
        if open.buffer.is_none() {
            let mut buffer = self.get_buffer(core, chunk)?;
            if open.spilled {
                let padded = core.chunk_len(chunk).next_multiple_of(BLOCK_BYTES as usize);
                self.shared.region.medium().read(self.medium_offset(core, chunk), &mut buffer[..padded])?;
            }
            open.buffer = Some(buffer);
        }
        let Some(buffer) = open.buffer.as_mut() else { return Ok(()) };
        buffer[within..within + bytes.len()].copy_from_slice(bytes);
        if open.covered == [(0, core.chunk_len(chunk))] {
            open.complete = true;
            let buffer = open.buffer.take();
            drop(open);
            self.complete(core, chunk, buffer);
        }
        Ok(())
    }

    fn complete(&self, core: &SaveCore, chunk: u64, buffer: Option<StagingBuffer>) {
        let Some(mut buffer) = buffer else { return };
        {
            let mut book = self.chunks.book.lock();
            book.complete[chunk as usize] = true;
            book.open.remove(&chunk);
            book.held = book.held.saturating_sub(1);
        }
        self.chunks.moved.notify_all();
        let len = core.chunk_len(chunk);
        let padded = len.next_multiple_of(BLOCK_BYTES as usize);
        buffer[len..padded].fill(0);
        let hash = chunk_hash(&buffer[..len]);
        core.chunk_copied(chunk, hash, buffer);
    }

    /// A buffer within the save's share; spills another open chunk where the share is used up.
    fn get_buffer(&self, core: &SaveCore, wanted_for: u64) -> Result<StagingBuffer> {
        loop {
            let ticket = self.chunks.moved.ticket();
            let reserved = {
                let mut book = self.chunks.book.lock();
                let free = book.held < book.limit;
                book.held += usize::from(free);
                free
            };
            if reserved {
                return self.shared.acquire_buffer().ok_or_else(|| cancelled("the store was closed"));
            }
            if !self.spill_one(core, wanted_for)? {
                // Every other open chunk is being filled at this moment: wait until one moves.
                let _ = self.chunks.moved.wait(ticket, deadline_in(Some(Duration::from_millis(1))));
            }
            core.enter()?;
            core.leave();
        }
    }

    /// Writes one half-filled chunk (zeros in its gaps) to its place and takes its buffer back.
    fn spill_one(&self, core: &SaveCore, wanted_for: u64) -> Result<bool> {
        let candidates: Vec<(u64, Arc<Mutex<OpenChunk>>)> = self
            .chunks
            .book
            .lock()
            .open
            .iter()
            .filter(|(chunk, _)| **chunk != wanted_for)
            .map(|(chunk, entry)| (*chunk, entry.clone()))
            .collect();
        for (chunk, entry) in candidates {
            let Some(mut open) = entry.try_lock() else { continue };
            let Some(mut buffer) = open.buffer.take() else { continue };
            let len = core.chunk_len(chunk);
            let padded = len.next_multiple_of(BLOCK_BYTES as usize);
            zero_gaps(&mut buffer[..padded], &open.covered);
            core.wait_marked()?;
            let medium = self.shared.region.medium();
            medium.copy(self.medium_offset(core, chunk), &buffer[..padded])?;
            medium.fence(Barrier::Chunk)?;
            open.spilled = true;
            drop(buffer);
            drop(open);
            let mut book = self.chunks.book.lock();
            book.held = book.held.saturating_sub(1);
            drop(book);
            self.chunks.moved.notify_all();
            return Ok(true);
        }
        Ok(false)
    }

    fn medium_offset(&self, core: &SaveCore, chunk: u64) -> u64 {
        self.shared.region.layout().slot_offset(core.claim.slot) + chunk * core.chunk_bytes
    }

    /// Lets the save commit; every announced byte must have been written. The returned save can be waited for.
    pub fn commit(&mut self) -> Result<Save> {
        let core = self.save()?.core().clone();
        if let Some(missing) = self.first_gap(&core) {
            return Err(Error::new(
                ErrorKind::InvalidState,
                "raw commit",
                format!("of {} announced bytes, those at {missing} were not written", self.data_bytes),
            )
            .advise("write every byte before commit, or cancel"));
        }
        core.let_commit()?;
        self.save.take().ok_or_else(already_committed)
    }

    fn first_gap(&self, core: &SaveCore) -> Option<u64> {
        let (chunk, entry) = {
            let book = self.chunks.book.lock();
            let chunk = book.complete.iter().position(|complete| !complete)? as u64;
            (chunk, book.open.get(&chunk).cloned())
        };
        let covered_to = entry.map_or(0, |entry| match entry.lock().covered.first() {
            Some(&(0, end)) => end as u64,
            _ => 0,
        });
        Some((chunk * core.chunk_bytes + covered_to).saturating_sub(self.data_offset))
    }

    /// Cancels the save; writers in other calls get an error.
    pub fn cancel(&self) {
        if let Some(save) = &self.save {
            save.cancel();
        }
    }

    /// Waits for a committed raw save; provided for symmetry with [`Save::wait_durable`].
    pub fn wait_ended(&self, timeout: Option<Duration>) -> Result<Durable> {
        self.save()?.wait_durable(timeout)
    }
}

impl Drop for RawSave {
    fn drop(&mut self) {
        self.cancel();
    }
}

fn already_committed() -> Error {
    Error::new(ErrorKind::InvalidState, "raw save", "the raw save was already committed")
}

fn overlap(core: &SaveCore, chunk: u64, within: usize) -> Error {
    Error::new(
        ErrorKind::InvalidArgument,
        "raw write",
        format!("payload byte {} was written before", chunk * core.chunk_bytes + within as u64),
    )
    .advise("write each byte of a raw save once")
}

/// Adds `start..end` to the sorted ranges, merging neighbours; false where it overlaps one.
fn cover(ranges: &mut Vec<(usize, usize)>, start: usize, end: usize) -> bool {
    if start == end {
        return true;
    }
    let at = ranges.partition_point(|&(_, range_end)| range_end <= start);
    if ranges.get(at).is_some_and(|&(range_start, _)| range_start < end) {
        return false;
    }
    ranges.insert(at, (start, end));
    if at + 1 < ranges.len() && ranges[at + 1].0 == end {
        ranges[at].1 = ranges[at + 1].1;
        ranges.remove(at + 1);
    }
    if at > 0 && ranges[at - 1].1 == start {
        ranges[at - 1].1 = ranges[at].1;
        ranges.remove(at);
    }
    true
}

fn zero_gaps(buffer: &mut [u8], covered: &[(usize, usize)]) {
    let mut at = 0;
    for &(start, end) in covered {
        buffer[at..start].fill(0);
        at = end;
    }
    buffer[at..].fill(0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn covering_merges_neighbours_and_refuses_overlap() {
        let mut ranges = Vec::new();
        assert!(cover(&mut ranges, 10, 20));
        assert!(cover(&mut ranges, 30, 40));
        assert!(!cover(&mut ranges, 15, 16));
        assert!(!cover(&mut ranges, 5, 11));
        assert!(!cover(&mut ranges, 39, 50));
        assert!(cover(&mut ranges, 20, 30));
        assert_eq!(ranges, [(10, 40)]);
        assert!(cover(&mut ranges, 0, 10));
        assert_eq!(ranges, [(0, 40)]);
        assert!(cover(&mut ranges, 7, 7));
    }

    #[test]
    fn gaps_become_zero_and_data_stays() {
        let mut buffer = vec![7u8; 10];
        zero_gaps(&mut buffer, &[(2, 4), (6, 7)]);
        assert_eq!(buffer, [0, 0, 7, 7, 0, 0, 7, 0, 0, 0]);
    }
}
