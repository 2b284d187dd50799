//! How a save moves on: chunks are copied, parked, written, marked, committed; and how it ends.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::time::Instant;

use super::{internal, out_of_time, ChunkWork, Durable, Mark, Parked, SaveCore, SaveState};
use crate::error::{Error, Result};
use crate::format::encode_table;
use crate::medium::{Barrier, Io, IoOp, IoSink};
use crate::save::saver::Shared;
use crate::staging::StagingBuffer;
use crate::store::Content;

/// Token of chunk-table writes; chunk writes carry their index, which is smaller.
const TABLE_TOKEN: u64 = u64::MAX;

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
        if state.failure.is_some() || state.next_chunk == self.chunk_count {
            return None;
        }
        let source = state.source.clone()?;
        let chunk = state.next_chunk;
        state.next_chunk += 1;
        state.copying += 1;
        let steady = state.content.known(chunk).filter(|known| known.steady).map(|known| known.hash);
        Some(ChunkWork { chunk, source, steady })
    }

    /// Takes over the registration that `take_chunk` made.
    pub fn at_work(&self) -> AtWork<'_> {
        AtWork(self)
    }

    /// True while there are chunks to hand out.
    pub fn has_chunks(&self) -> bool {
        let state = self.state.lock();
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
        let (found, all_copied) = {
            let mut state = self.state.lock();
            let found = state.content.known(chunk).is_some_and(|known| known.hash == hash);
            (found, self.note_copied(&mut state, chunk, hash, found))
        };
        let unused = match found {
            true => Some(buffer),
            false => {
                self.write(chunk * self.chunk_bytes, padded, buffer, chunk);
                None
            }
        };
        if all_copied {
            self.finish_copy();
        }
        unused
    }

    /// A copier found that the chunk's place holds it already.
    pub fn chunk_found(&self, chunk: u64) {
        let all_copied = {
            let mut state = self.state.lock();
            // Nobody but the chunk's copier changes what is known of it.
            let Some(known) = state.content.known(chunk) else { return };
            self.note_copied(&mut state, chunk, known.hash, true)
        };
        if all_copied {
            self.finish_copy();
        }
    }

    /// True where it was the last one.
    fn note_copied(&self, state: &mut SaveState, chunk: u64, hash: u128, found: bool) -> bool {
        let len = self.chunk_len(chunk) as u64;
        state.hashes[chunk as usize] = hash;
        state.chunks_copied += 1;
        state.copied_bytes += len;
        if found {
            state.content.found(chunk);
            state.written_bytes += len;
            state.unchanged_bytes += len;
        }
        state.chunks_copied == self.chunk_count
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

    /// Bytes of the payload, and those of them that were not written.
    pub fn bytes(&self) -> (u64, u64) {
        (self.spec.payload_bytes, self.state.lock().unchanged_bytes)
    }

    /// Something is about to be written in the chunk's place.
    pub fn forget_chunk(&self, chunk: u64) {
        if let Ok(shared) = self.shared() {
            forget(&shared, &mut self.state.lock(), chunk);
        }
    }

    /// The last chunk has left the caller's memory: tell the waiters, then write the chunk table.
    fn finish_copy(&self) {
        // Dropped outside of the lock, and before `copied` is told: it is the caller's memory.
        let source = self.state.lock().source.take();
        drop(source);
        self.state.lock().copied_at = Some(Instant::now());
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

    /// Ends the save although something may be at work on it for ever, because a thread of the engine died. The store
    /// is poisoned by then. Whatever may still be written to or read from stays as it is: the slot remains this save's,
    /// buffers come back with their operations, and `wait_copied` waits for copiers that live.
    pub fn end_by_force(&self) {
        let (source, parked, error) = {
            let mut state = self.state.lock();
            if state.outcome.is_some() {
                return;
            }
            state.committing = true;
            let parked = std::mem::take(&mut state.parked);
            state.in_flight -= parked.len() as u32;
            let error =
                state.failure.get_or_insert_with(|| internal("a thread of the engine failed")).clone();
            (state.source.take(), parked, error)
        };
        drop((source, parked));
        if let Ok(shared) = self.shared() {
            shared.forget(self, |metrics| metrics.saves_failed());
        }
        self.end(Err(error));
    }

    /// Runs `work` on a thread that must outlive a defect: a panic poisons the store and ends this save alone.
    fn contained(&self, work: impl FnOnce()) {
        let Err(panic) = catch_unwind(AssertUnwindSafe(work)) else { return };
        // Dropping what was thrown could panic again.
        std::mem::forget(panic);
        if let Ok(shared) = self.shared() {
            shared.region.poison();
        }
        self.end_by_force();
    }

    /// Moves the save on if nothing is at work on it: to the committer when complete, to its end when failed.
    fn settle(&self) {
        enum Next {
            Commit,
            AwaitConfirmation,
            End(Error),
            Nothing,
        }
        let shared = self.shared();
        let (next, source) = {
            let mut state = self.state.lock();
            let early = state.last_chunk_written
                && state.table_queued
                && shared.as_ref().is_ok_and(|shared| shared.faults.commit_on_last_chunk());
            let idle = state.idle() || early && state.unowned();
            match &state.failure {
                Some(error) if idle && state.mark != Mark::Pending => {
                    let error = error.clone();
                    state.committing = true;
                    (Next::End(error), state.source.take())
                }
                None if idle && state.table_queued && !state.held_open => match state.unconfirmed {
                    true => (Next::AwaitConfirmation, None),
                    false => {
                        state.committing = true;
                        (Next::Commit, None)
                    }
                },
                _ => (Next::Nothing, None),
            }
        };
        drop(source);
        // Waiters for `copied` on a failed save look at `copying`.
        self.changed.notify_all();
        let Ok(shared) = shared else { return };
        match next {
            Next::Commit => shared.queue_commit(self.this.upgrade()),
            Next::AwaitConfirmation => shared.tell_unconfirmed(),
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

    /// The caller lets the save commit; where it has ended or failed, says how. Changes nothing where it was not begun to
    /// be confirmed.
    pub fn confirm(&self) -> Result<()> {
        if !self.spec.confirm {
            return Ok(());
        }
        {
            let mut state = self.state.lock();
            if let Some(outcome) = &state.outcome {
                return outcome.clone().map(drop);
            }
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            state.unconfirmed = false;
        }
        self.settle();
        Ok(())
    }

    /// Waits until payload bytes may reach the medium.
    pub fn wait_marked(&self, deadline: Option<Instant>) -> Result<()> {
        let mut state = self.state.lock();
        let mut timed_out = false;
        loop {
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            if state.mark == Mark::Durable {
                return Ok(());
            }
            if timed_out {
                return Err(out_of_time("raw write", "the slot's writing mark"));
            }
            (state, timed_out) = self.changed.wait_until(state, deadline);
        }
    }

    /// Sets the outcome, wakes every waiter. The one place where a save ends; the first outcome stays.
    pub fn end(&self, outcome: Result<(u32, Option<u64>)>) {
        if let (Some(raw), Err(_)) = (&self.raw, &outcome) {
            raw.clear();
        }
        let unread = {
            let mut state = self.state.lock();
            if state.outcome.is_some() {
                return;
            }
            let now = Instant::now();
            let copied_at = state.copied_at.unwrap_or(now);
            state.outcome = Some(outcome.map(|(slot, superseded_by)| Durable {
                generation: self.claim.generation,
                slot,
                superseded_by,
                copied_after: copied_at - self.begun,
                durable_after: now - self.begun,
            }));
            state.copying == 0
        };
        self.changed.notify_all();
        if unread {
            // Else the last copier does it (after an end by force): a callback may free the save, which waits for them.
            self.run_on_end();
        }
    }

    /// Runs `callback` when the save ends, at once if it has.
    pub fn set_on_end(&self, callback: Box<dyn FnOnce() + Send>) {
        let replaced = self.on_end.lock().replace(callback);
        // The caller's code: not under the lock.
        drop(replaced);
        if self.ended() {
            self.run_on_end();
        }
    }

    /// Either `end` or `set_on_end` finds the callback, never both. Its panic must not end a thread of the engine.
    fn run_on_end(&self) {
        let callback = self.on_end.lock().take();
        if let Some(callback) = callback {
            if let Err(panic) = catch_unwind(AssertUnwindSafe(callback)) {
                // Dropping what was thrown could panic again.
                std::mem::forget(panic);
            }
        }
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
