//! How a save moves on: chunks are copied, parked, written, marked, committed; and how it ends.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::time::Instant;

use super::{cancelled, Durable, Mark, Parked, SaveCore};
use crate::error::{Error, Result};
use crate::format::encode_table;
use crate::medium::{Barrier, Io, IoOp, IoSink};
use crate::save::saver::Shared;
use crate::source::Source;
use crate::staging::StagingBuffer;
use crate::sync::Arc;

/// Token of chunk-table writes; chunk writes carry their index, which is smaller.
const TABLE_TOKEN: u64 = u64::MAX;

impl SaveCore {
    /// Hands the next uncopied chunk to a copier; `None` when there is none left or the save has failed.
    pub fn take_chunk(&self) -> Option<(u64, Arc<dyn Source>)> {
        let mut state = self.state.lock();
        if state.failure.is_some() || state.next_chunk == self.chunk_count {
            return None;
        }
        let source = state.source.clone()?;
        let chunk = state.next_chunk;
        state.next_chunk += 1;
        state.copying += 1;
        Some((chunk, source))
    }

    /// True while there are chunks to hand out.
    pub fn has_chunks(&self) -> bool {
        let state = self.state.lock();
        state.failure.is_none() && state.source.is_some() && state.next_chunk < self.chunk_count
    }

    /// Registers a raw writer, so that the save does not end under it. Every success needs one `leave`.
    pub fn enter(&self) -> Result<()> {
        let mut state = self.state.lock();
        if let Some(failure) = &state.failure {
            return Err(failure.clone());
        }
        state.copying += 1;
        Ok(())
    }

    pub fn leave(&self) {
        self.state.lock().copying -= 1;
        self.settle();
    }

    /// A copier filled `buffer` with `chunk` (padding zeroed): record its hash and write it.
    pub fn chunk_copied(&self, chunk: u64, hash: u128, buffer: StagingBuffer) {
        let padded = self.chunk_len(chunk).next_multiple_of(crate::format::BLOCK_BYTES as usize);
        let all_copied = {
            let mut state = self.state.lock();
            state.hashes[chunk as usize] = hash;
            state.chunks_copied += 1;
            state.copied_bytes += self.chunk_len(chunk) as u64;
            state.chunks_copied == self.chunk_count
        };
        self.write(chunk * self.chunk_bytes, padded, buffer, chunk);
        if all_copied {
            self.finish_copy();
        }
    }

    /// Registers the end of a copier's work on this save, after `chunk_copied` or on failure.
    pub fn copier_done(&self, result: Result<()>) {
        if let Err(error) = result {
            self.fail(error);
        }
        self.leave();
    }

    /// The last chunk has left the caller's memory: tell the waiters, then write the chunk table.
    fn finish_copy(&self) {
        {
            let mut state = self.state.lock();
            state.source = None;
            state.copied_at = Some(Instant::now());
        }
        self.changed.notify_all();
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
            let Some(mut buffer) = shared.acquire_buffer() else {
                return Err(cancelled("the store was closed"));
            };
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
            if state.mark != Mark::Durable {
                state.parked.push(Parked { offset, len, buffer, token });
                return;
            }
        }
        self.submit(&shared, Parked { offset, len, buffer, token });
    }

    fn submit(&self, shared: &Shared, write: Parked) {
        let Some(sink) = self.this.upgrade() else { return };
        let Parked { offset, len, buffer, token } = write;
        shared.region.medium().start(Io { op: IoOp::Copy, offset, len, buffer, token, sink });
    }

    // ---- marking, committing, ending -----------------------------------------------------------------------

    /// False where the save failed before its mark was written: the marker must then leave the slot alone.
    pub fn wants_mark(&self) -> bool {
        let wanted = {
            let mut state = self.state.lock();
            if state.failure.is_some() {
                state.mark = Mark::Abandoned;
            }
            state.mark == Mark::Pending
        };
        if !wanted {
            self.settle();
        }
        wanted
    }

    /// The marker is done: submit what was parked, or fail.
    pub fn marked(&self, result: Result<()>) {
        let parked = {
            let mut state = self.state.lock();
            state.mark = if result.is_ok() { Mark::Durable } else { Mark::Abandoned };
            if let Err(error) = result {
                state.failure.get_or_insert(error);
            }
            let parked = std::mem::take(&mut state.parked);
            if state.failure.is_some() {
                state.in_flight -= parked.len() as u32;
                Vec::new()
            } else {
                parked
            }
        };
        if let Ok(shared) = self.shared() {
            for write in parked {
                self.submit(&shared, write);
            }
        }
        self.changed.notify_all();
        self.settle();
    }

    /// Records the first failure; the save ends once nothing is at work on it.
    pub fn fail(&self, error: Error) {
        {
            let mut state = self.state.lock();
            if state.outcome.is_some() || state.committing {
                return;
            }
            state.failure.get_or_insert(error);
            let parked = std::mem::take(&mut state.parked);
            state.in_flight -= parked.len() as u32;
        }
        self.changed.notify_all();
        self.settle();
    }

    /// Moves the save on if nothing is at work on it: to the committer when complete, to its end when failed.
    fn settle(&self) {
        enum Next {
            Commit,
            End(Error),
            Nothing,
        }
        let shared = self.shared();
        let next = {
            let mut state = self.state.lock();
            let early = state.last_chunk_written
                && state.table_queued
                && shared.as_ref().is_ok_and(|shared| shared.faults.commit_on_last_chunk());
            let unowned = !state.committing && state.outcome.is_none();
            let idle = unowned && state.copying == 0 && (state.in_flight == 0 || early);
            match &state.failure {
                Some(error) if idle && state.mark != Mark::Pending => {
                    let error = error.clone();
                    state.committing = true;
                    state.source = None;
                    Next::End(error)
                }
                None if idle && state.table_queued && !state.held_open => {
                    state.committing = true;
                    Next::Commit
                }
                _ => Next::Nothing,
            }
        };
        // Waiters for `copied` on a failed save look at `copying`.
        self.changed.notify_all();
        let Ok(shared) = shared else { return };
        match next {
            Next::Commit => shared.queue_commit(self.this.upgrade()),
            Next::End(error) => {
                shared.end_failed(self, &error);
                self.end(Err(error));
            }
            Next::Nothing => {}
        }
    }

    /// XXH3-128 of the encoded chunk table. Meaningful once all chunks are copied.
    pub fn table_hash(&self) -> u128 {
        crate::format::table_hash(&encode_table(&self.state.lock().hashes))
    }

    /// A raw save has all its bytes and may commit.
    pub fn let_commit(&self) -> Result<()> {
        {
            let mut state = self.state.lock();
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            state.held_open = false;
        }
        self.settle();
        Ok(())
    }

    /// Waits until payload bytes may reach the medium.
    pub fn wait_marked(&self) -> Result<()> {
        let mut state = self.state.lock();
        loop {
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            if state.mark == Mark::Durable {
                return Ok(());
            }
            state = self.changed.wait_until(state, None).0;
        }
    }

    /// Sets the outcome, wakes every waiter. The one place where a save ends.
    pub fn end(&self, outcome: Result<(u32, Option<u64>)>) {
        if let (Some(raw), Err(_)) = (&self.raw, &outcome) {
            raw.clear();
        }
        {
            let mut state = self.state.lock();
            let now = Instant::now();
            let copied_at = state.copied_at.unwrap_or(now);
            state.outcome = Some(outcome.map(|(slot, superseded_by)| Durable {
                generation: self.claim.generation,
                slot,
                superseded_by,
                copied_after: copied_at - self.begun,
                durable_after: now - self.begun,
            }));
        }
        self.changed.notify_all();
        self.run_on_end();
    }

    /// Runs `callback` when the save ends, at once if it has.
    pub fn set_on_end(&self, callback: Box<dyn FnOnce() + Send>) {
        *self.on_end.lock() = Some(callback);
        if self.ended() {
            self.run_on_end();
        }
    }

    /// Either `end` or `set_on_end` finds the callback, never both.
    fn run_on_end(&self) {
        let callback = self.on_end.lock().take();
        if let Some(callback) = callback {
            callback();
        }
    }
}

impl IoSink for SaveCore {
    fn finished(&self, token: u64, buffer: StagingBuffer, result: Result<()>) {
        drop(buffer);
        let Ok(shared) = self.shared() else { return };
        // The medium's thread serves all saves and must outlive a defect in one of them.
        let told = catch_unwind(AssertUnwindSafe(|| self.write_finished(&shared, token, result)));
        if told.is_err() {
            shared.region.poison();
        }
    }
}

impl SaveCore {
    fn write_finished(&self, shared: &Shared, token: u64, result: Result<()>) {
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
