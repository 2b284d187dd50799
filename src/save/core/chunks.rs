//! What happens to the chunks of a save: taken, copied or found in their places, parked, written.

use std::time::Duration;

use super::{ChunkWork, Mark, Parked, SaveCore, SaveState, Write};
use crate::error::Result;
use crate::format::encode_table;
use crate::medium::{Barrier, Io, IoOp, IoSink};
use crate::metrics::SavedBytes;
#[cfg(feature = "cuda")]
use crate::save::device::{Arrived, Bytes, OnDevice};
use crate::save::saver::Shared;
use crate::staging::StagingBuffer;
use crate::store::Content;
use crate::sync::now;

/// Token of chunk-table writes; chunk writes carry their index, which is smaller.
const TABLE_TOKEN: u64 = u64::MAX;

/// How long a copier waits for a writing mark before it copies into staging instead.
const MARK_PATIENCE: Duration = Duration::from_millis(1);

/// A copier or raw writer at work on a save, which does not end meanwhile. Dropped also where its thread dies, so that
/// nobody waits for it for ever.
pub(crate) struct AtWork<'a>(&'a SaveCore);

impl Drop for AtWork<'_> {
    fn drop(&mut self) {
        let save = self.0;
        // During an unwinding a second panic would abort the process.
        save.contained(|| {
            let ended = {
                let mut state = save.state.lock();
                state.copying -= 1;
                state.copying == 0 && state.outcome.is_some()
            };
            save.settle();
            if ended {
                save.run_on_end();
            }
        });
    }
}

impl SaveCore {
    /// Hands the next uncopied chunk to a copier; `None` when there is none left or the save has failed. Every success
    /// needs one `at_work`.
    pub fn take_chunk(&self) -> Option<ChunkWork> {
        let mut state = self.state.lock();
        self.skip_fetched(&mut state);
        if state.failure.is_some() || state.next_chunk == self.chunk_count {
            return None;
        }
        let source = state.source.clone()?;
        let chunk = state.next_chunk;
        state.next_chunk += 1;
        state.copying += 1;
        state.host_chunks += 1;
        let steady = state.content.steady(chunk);
        Some(ChunkWork { chunk, source, steady })
    }

    /// Hash of what the chunk's place holds, where it is expected to be the same.
    #[cfg(feature = "cuda")]
    pub fn steady(&self, chunk: u64) -> Option<u128> {
        self.state.lock().content.steady(chunk)
    }

    /// Takes over the registration that `take_chunk` made.
    pub fn at_work(&self) -> AtWork<'_> {
        AtWork(self)
    }

    /// Passes over chunks that a device brings by itself.
    pub(super) fn skip_fetched(&self, state: &mut SaveState) {
        let Some(source) = &state.source else { return };
        while state.next_chunk < self.chunk_count
            && source.is_fetched(state.next_chunk * self.chunk_bytes, self.chunk_len(state.next_chunk))
        {
            state.next_chunk += 1;
        }
    }

    /// True while there are chunks to hand out.
    pub fn has_chunks(&self) -> bool {
        let mut state = self.state.lock();
        self.skip_fetched(&mut state);
        state.failure.is_none() && state.source.is_some() && state.next_chunk < self.chunk_count
    }

    /// Registers a raw writer, so that the save does not end under it.
    pub fn enter(&self) -> Result<AtWork<'_>> {
        let mut state = self.state.lock();
        if let Some(failure) = &state.failure {
            return Err(failure.clone());
        }
        state.copying += 1;
        Ok(AtWork(self))
    }

    /// Why the save has failed, where it has.
    pub fn check(&self) -> Result<()> {
        self.state.lock().failure.clone().map_or(Ok(()), Err)
    }

    /// A copier filled `buffer` with `chunk` (padding zeroed): record its hash and write it, unless its place holds it
    /// already; then the buffer is returned.
    pub fn chunk_copied(&self, chunk: u64, hash: u128, buffer: StagingBuffer) -> Option<StagingBuffer> {
        let padded = self.chunk_len(chunk).next_multiple_of(crate::format::BLOCK_BYTES as usize);
        let (found, all_hashed) = {
            let mut state = self.state.lock();
            let found = state.content.known(chunk) == Some(hash);
            state.content.compared(chunk, found);
            (found, self.note_hashed(&mut state, chunk, hash, found))
        };
        let unused = match found {
            true => Some(buffer),
            false => {
                self.write(chunk * self.chunk_bytes, padded, buffer, chunk);
                None
            }
        };
        if all_hashed {
            self.finish_chunks();
        }
        unused
    }

    /// A copier found that the chunk's place holds it already.
    pub fn chunk_found(&self, chunk: u64) {
        let all_hashed = {
            let mut state = self.state.lock();
            // Nobody but the chunk's copier changes what is known of it.
            let Some(known) = state.content.known(chunk) else { return };
            self.note_hashed(&mut state, chunk, known, true)
        };
        if all_hashed {
            self.finish_chunks();
        }
    }

    /// Whether the place of a chunk, whose hash a device has found, holds it already; then that is all there was to do for it.
    #[cfg(feature = "cuda")]
    pub fn is_in_place(&self, chunk: u64, hash: u128) -> bool {
        let all_hashed = {
            let mut state = self.state.lock();
            if state.content.known(chunk) != Some(hash) {
                return false;
            }
            state.content.compared(chunk, true);
            self.note_hashed(&mut state, chunk, hash, true)
        };
        if all_hashed {
            self.finish_chunks();
        }
        true
    }

    /// As [`chunk_placed`](SaveCore::chunk_placed), of a chunk that cuFile has written.
    #[cfg(feature = "cuda")]
    pub fn chunk_written_directly(&self, shared: &Shared, chunk: u64, hash: u128, before: Option<u128>) {
        self.state.lock().direct_bytes += self.chunk_len(chunk) as u64;
        self.chunk_placed(shared, chunk, hash, before);
    }

    /// Chunks that a copier is to have written from the memory of a GPU: returned where that may be done, else parked until the
    /// writing mark is durable, or dropped where the save has failed.
    #[cfg(feature = "cuda")]
    pub fn park_unless_marked(&self, chunks: OnDevice) -> Option<OnDevice> {
        let mut state = self.state.lock();
        match state.mark {
            _ if state.failure.is_some() => {}
            Mark::Durable => return Some(chunks),
            Mark::Pending => {
                state.in_flight += 1;
                state.parked.push(Parked::OnDevice(chunks));
                return None;
            }
            Mark::Abandoned => {}
        }
        drop(state);
        drop(chunks);
        None
    }

    /// The writing mark is durable: hands chunks that were parked to the copiers again.
    #[cfg(feature = "cuda")]
    pub(super) fn give_back(&self, shared: &Shared, chunks: OnDevice) {
        let Some(save) = self.this.upgrade() else { return };
        {
            let mut state = self.state.lock();
            state.in_flight -= 1;
            // Taken over by the copier.
            state.copying += 1;
        }
        shared.exchange.arrive(Arrived { save, bytes: Bytes::OnDevice(chunks) });
        shared.arrivals_came();
    }

    /// Waits for the writing mark, for no longer than persistent memory takes: where it takes longer, copying into staging
    /// meanwhile is better. True if payload bytes may reach the medium.
    pub fn marked_soon(&self) -> bool {
        let mut deadline = None;
        let mut state = self.state.lock();
        loop {
            if state.mark != Mark::Pending || state.failure.is_some() {
                return state.mark == Mark::Durable;
            }
            let deadline = *deadline.get_or_insert_with(|| now() + MARK_PATIENCE);
            let timed_out;
            (state, timed_out) = self.changed.wait_until(state, Some(deadline));
            if timed_out {
                return state.mark == Mark::Durable;
            }
        }
    }

    /// The caller, a copier, is about to store the chunk into its place: `chunk_placed` or `write_finished` must follow.
    /// Returns what was known of the place.
    pub fn begin_placing(&self, shared: &Shared, chunk: u64) -> Result<Option<u128>> {
        let mut state = self.state.lock();
        if let Some(failure) = &state.failure {
            return Err(failure.clone());
        }
        state.in_flight += 1;
        let before = state.content.known(chunk);
        forget(shared, &mut state, chunk);
        Ok(before)
    }

    /// The calling thread has stored the chunk into its place, which is known to have held `before`.
    pub fn chunk_placed(&self, shared: &Shared, chunk: u64, hash: u128, before: Option<u128>) {
        let all_hashed = {
            let mut state = self.state.lock();
            state.content.compared(chunk, before == Some(hash));
            self.note_hashed(&mut state, chunk, hash, false)
        };
        self.write_finished(shared, chunk, Ok(()));
        if all_hashed {
            self.finish_chunks();
        }
    }

    /// True where it was the last one.
    fn note_hashed(&self, state: &mut SaveState, chunk: u64, hash: u128, found: bool) -> bool {
        let len = self.chunk_len(chunk) as u64;
        state.hashes[chunk as usize] = hash;
        state.chunks_hashed += 1;
        if found {
            state.written_bytes += len;
            state.unchanged_bytes += len;
        }
        state.chunks_hashed == self.chunk_count
    }

    /// A chunk that a copier took has left the caller's memory, and the copier has let go of the source: when it was the
    /// last one, the waiters are told.
    pub fn chunk_left(&self, chunk: u64) {
        let waited_for = {
            let mut state = self.state.lock();
            state.host_chunks -= 1;
            self.has_device_part() && state.host_chunks == 0
        };
        if waited_for {
            self.changed.notify_all();
        }
        self.chunks_left(1, self.chunk_len(chunk) as u64);
    }

    #[cfg(feature = "cuda")]
    fn has_device_part(&self) -> bool {
        self.device.is_some()
    }

    #[cfg(not(feature = "cuda"))]
    fn has_device_part(&self) -> bool {
        false
    }

    /// Chunks with so many bytes in all have left the caller's memory, and nobody will read them there any more.
    pub fn chunks_left(&self, chunks: u64, bytes: u64) {
        {
            let mut state = self.state.lock();
            state.chunks_left += chunks;
            state.copied_bytes += bytes;
            if state.chunks_left < self.chunk_count {
                return;
            }
        }
        // Dropped outside of the lock, and before `copied` is told: it is the caller's memory.
        let source = self.state.lock().source.take();
        drop(source);
        self.state.lock().copied_at = Some(now());
        self.changed.notify_all();
    }

    /// What is known of the slot once the commit record is durable.
    pub fn committed_content(&self) -> Content {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        state.content.committed(&state.hashes)
    }

    /// What is still known of the slot when the save has failed: where it was cancelled, all that it did not overwrite.
    pub fn left_content(&self, cancelled: bool) -> Content {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        let faulty = self.shared().is_ok_and(|shared| shared.faults.know_uncommitted());
        match cancelled {
            true if faulty => state.content.committed(&state.hashes),
            true => std::mem::take(&mut state.content),
            false => Content::default(),
        }
    }

    /// What became of the payload's bytes.
    pub fn bytes(&self) -> SavedBytes {
        let state = self.state.lock();
        SavedBytes {
            payload: self.spec.payload_bytes,
            unchanged: state.unchanged_bytes,
            direct: state.direct_bytes,
        }
    }

    /// Something is about to be written in the chunk's place.
    pub fn forget_chunk(&self, chunk: u64) {
        if let Ok(shared) = self.shared() {
            forget(&shared, &mut self.state.lock(), chunk);
        }
    }

    /// All hashes are known: write the chunk table.
    fn finish_chunks(&self) {
        if let Err(error) = self.write_table() {
            self.fail(error);
        }
    }

    fn write_table(&self) -> Result<()> {
        let shared = self.shared()?;
        let table = encode_table(&self.state.lock().hashes);
        let block = crate::format::BLOCK_BYTES as usize;
        let piece_bytes = shared.region.pool().buffer_bytes();
        for (index, piece) in table.chunks(piece_bytes).enumerate() {
            let deadline = self.raw.as_ref().and_then(|raw| raw.deadline());
            let mut buffer = shared.acquire_buffer_for(self, deadline)?;
            let padded = piece.len().next_multiple_of(block);
            buffer[..piece.len()].copy_from_slice(piece);
            buffer[piece.len()..padded].fill(0);
            self.write(self.table_offset + (index * piece_bytes) as u64, padded, buffer, TABLE_TOKEN);
        }
        self.state.lock().table_queued = true;
        self.settle();
        Ok(())
    }

    /// Writes a buffer at an offset of the slot, or parks it until the writing mark is durable.
    pub fn write(&self, slot_offset: u64, len: usize, buffer: StagingBuffer, token: u64) {
        let Ok(shared) = self.shared() else { return };
        let offset = shared.region.layout().slot_offset(self.claim.slot) + slot_offset;
        {
            let mut state = self.state.lock();
            if state.failure.is_some() {
                return;
            }
            state.in_flight += 1;
            // The table's token is no chunk's.
            forget(&shared, &mut state, token);
            if state.mark != Mark::Durable {
                state.parked.push(Parked::Write(Write { offset, len, buffer, token }));
                return;
            }
        }
        self.submit(&shared, Write { offset, len, buffer, token });
    }

    pub(super) fn submit(&self, shared: &Shared, write: Write) {
        let Some(sink) = self.this.upgrade() else { return };
        let Write { offset, len, buffer, token } = write;
        shared.region.medium().start(Io { op: IoOp::Copy, offset, len, buffer, token, sink });
    }
}

/// Before the first byte of the chunk can reach the medium.
fn forget(shared: &Shared, state: &mut SaveState, chunk: u64) {
    if !shared.faults.remember_overwritten() {
        state.content.forget(chunk);
    }
}

impl IoSink for SaveCore {
    fn finished(&self, token: u64, buffer: StagingBuffer, result: Result<()>) {
        drop(buffer);
        let Ok(shared) = self.shared() else { return };
        // The medium's thread serves all saves.
        self.contained(|| self.write_finished(&shared, token, result));
    }
}

impl SaveCore {
    /// A write has ended, on the thread that did it or was told of it.
    pub fn write_finished(&self, shared: &Shared, token: u64, result: Result<()>) {
        // On persistent memory the thread that stored the chunk runs this, and its fence makes the chunk durable.
        let result = result.and_then(|()| shared.region.medium().fence(Barrier::Chunk));
        {
            let mut state = self.state.lock();
            state.in_flight -= 1;
            match result {
                Ok(()) if token != TABLE_TOKEN => {
                    state.written_bytes += self.chunk_len(token) as u64;
                    state.last_chunk_written |= token + 1 == self.chunk_count;
                }
                Ok(()) => {}
                Err(error) => {
                    let error = error.at_path(shared.region.path());
                    state.failure.get_or_insert(error);
                    let parked = std::mem::take(&mut state.parked);
                    state.in_flight -= parked.len() as u32;
                }
            }
        }
        self.settle();
    }
}
