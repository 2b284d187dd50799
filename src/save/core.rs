//! One save: its state, who may change it, and how it ends.
//!
//! All mutable state stands under one lock that is taken a few times per chunk and never held over I/O,
//! copying or hashing. A save ends exactly once:
//!
//! - `Durable` when its commit record is durable;
//! - `Failed` (also by cancellation) when a failure was recorded *and* no copier reads its source, no operation
//!   on its slot is in flight, its writing mark is not being written and the committer does not hold it. Only
//!   then is the slot given back, so that no late write can hit a slot that another save has claimed.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::format::{encode_table, RecordState, SlotRecord};
use crate::medium::{Barrier, Io, IoOp, IoSink};
use crate::save::raw::RawChunks;
use crate::save::saver::Shared;
use crate::source::Source;
use crate::staging::StagingBuffer;
use crate::store::Claimed;
use crate::sync::{Arc, Condvar, Mutex, Weak};

/// Token of chunk-table writes; chunk writes carry their index, which is smaller.
const TABLE_TOKEN: u64 = u64::MAX;

/// What a save is about, fixed at its begin.
#[derive(Debug, Clone)]
pub(crate) struct SaveSpec {
    pub step: u64,
    pub payload_bytes: u64,
    pub header_bytes: u64,
    pub tensor_count: u32,
    pub flags: u32,
}

/// How far a save is, in bytes of its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of the payload.
    pub total_bytes: u64,
    /// Bytes that have left the caller's memory.
    pub copied_bytes: u64,
    /// Bytes handed to the medium and completed (not yet durable).
    pub written_bytes: u64,
    /// Every byte has left the caller's memory.
    pub copied: bool,
    /// The save has ended, durably or not.
    pub ended: bool,
}

/// What is known of a durable save.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Durable {
    /// The save's generation.
    pub generation: u64,
    /// Slot that it was written to.
    pub slot: u32,
    /// The newer generation that had made it superfluous by the time it was durable, if any.
    pub superseded_by: Option<u64>,
    /// From begin to copied.
    pub copied_after: Duration,
    /// From begin to durable.
    pub durable_after: Duration,
}

/// Where the bytes of a save come from: pulled by copiers, or pushed by the caller.
#[derive(Clone)]
pub(crate) enum Origin {
    Source(Arc<dyn Source>),
    Raw(Arc<RawChunks>),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mark {
    Pending,
    Durable,
    /// Will never be durable: the marker has given up or was told not to try.
    Abandoned,
}

struct Parked {
    offset: u64,
    len: usize,
    buffer: StagingBuffer,
    token: u64,
}

pub(crate) struct SaveState {
    source: Option<Arc<dyn Source>>,
    next_chunk: u64,
    /// Copiers (and raw writers) at work on this save.
    copying: u32,
    chunks_copied: u64,
    copied_bytes: u64,
    written_bytes: u64,
    /// Operations submitted or parked that have not ended.
    in_flight: u32,
    table_queued: bool,
    last_chunk_written: bool,
    /// A raw save that was not committed yet: may fail, may not commit.
    held_open: bool,
    mark: Mark,
    parked: Vec<Parked>,
    hashes: Vec<u128>,
    committing: bool,
    copied_at: Option<Instant>,
    failure: Option<Error>,
    outcome: Option<Result<Durable>>,
}

/// A save, shared by its handle, the copiers, the medium's completions, the marker and the committer.
pub(crate) struct SaveCore {
    pub claim: Claimed,
    pub spec: SaveSpec,
    pub chunk_bytes: u64,
    pub chunk_count: u64,
    pub table_offset: u64,
    pub begun: Instant,
    /// `Region::flush_failures` when the save began.
    pub flush_failures: u64,
    pub(super) state: Mutex<SaveState>,
    changed: Condvar,
    on_end: Mutex<Option<Box<dyn FnOnce() + Send>>>,
    /// Half-filled chunks of a raw save; their buffers go back when it fails.
    raw: Option<Arc<RawChunks>>,
    shared: Weak<Shared>,
    this: Weak<SaveCore>,
}

impl SaveCore {
    pub fn new(shared: &Arc<Shared>, claim: Claimed, spec: SaveSpec, origin: Origin) -> Arc<SaveCore> {
        let (source, raw) = match origin {
            Origin::Source(source) => (Some(source), None),
            Origin::Raw(chunks) => (None, Some(chunks)),
        };
        let chunk_bytes = shared.region.options().chunk_bytes;
        let chunk_count = spec.payload_bytes.div_ceil(chunk_bytes);
        let table_offset = spec.payload_bytes.next_multiple_of(crate::format::BLOCK_BYTES);
        Arc::new_cyclic(|this| SaveCore {
            claim,
            spec,
            chunk_bytes,
            chunk_count,
            table_offset,
            begun: Instant::now(),
            flush_failures: shared.region.flush_failures(),
            state: Mutex::new(SaveState {
                source,
                next_chunk: 0,
                copying: 0,
                chunks_copied: 0,
                copied_bytes: 0,
                written_bytes: 0,
                in_flight: 0,
                table_queued: false,
                last_chunk_written: false,
                held_open: raw.is_some(),
                mark: Mark::Pending,
                parked: Vec::new(),
                hashes: vec![0; chunk_count as usize],
                committing: false,
                copied_at: None,
                failure: None,
                outcome: None,
            }),
            changed: Condvar::new(),
            on_end: Mutex::new(None),
            raw,
            shared: Arc::downgrade(shared),
            this: this.clone(),
        })
    }

    /// The save's record in either state; the table hash is known once all chunks are copied.
    pub fn record(
        &self,
        state: RecordState,
        run_id: u64,
        table_hash: u128,
        uuid: crate::format::Uuid,
    ) -> SlotRecord {
        SlotRecord {
            uuid,
            slot: self.claim.slot,
            generation: self.claim.generation,
            state,
            step: self.spec.step,
            run_id,
            payload_bytes: self.spec.payload_bytes,
            header_bytes: self.spec.header_bytes,
            tensor_count: self.spec.tensor_count,
            chunk_bytes: self.chunk_bytes,
            chunk_count: self.chunk_count,
            table_offset: self.table_offset,
            table_hash,
            unix_ns: crate::store::unix_ns(),
            flags: self.spec.flags,
        }
    }

    /// Bytes of the slot that the save uses: payload and table.
    pub fn used_bytes(&self) -> u64 {
        self.table_offset + (self.chunk_count * 16).next_multiple_of(crate::format::BLOCK_BYTES)
    }

    pub fn chunk_len(&self, chunk: u64) -> usize {
        (self.spec.payload_bytes - chunk * self.chunk_bytes).min(self.chunk_bytes) as usize
    }

    // ---- copying ----------------------------------------------------------------------------------------

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

    // ---- waiting -----------------------------------------------------------------------------------------

    /// Waits until every byte has left the caller's memory. After an error, too, the memory is the caller's again,
    /// but for `TimedOut`.
    pub fn wait_copied(&self, deadline: Option<Instant>) -> Result<()> {
        let mut state = self.state.lock();
        loop {
            if state.copied_at.is_some() {
                return Ok(());
            }
            if let (Some(error), 0) = (&state.failure, state.copying) {
                return Err(error.clone());
            }
            let (guard, timed_out) = self.changed.wait_until(state, deadline);
            state = guard;
            if timed_out && state.copied_at.is_none() {
                return Err(timed_out_error("wait for copied"));
            }
        }
    }

    /// Waits until the save has ended.
    pub fn wait_durable(&self, deadline: Option<Instant>) -> Result<Durable> {
        let mut state = self.state.lock();
        loop {
            if let Some(outcome) = &state.outcome {
                return outcome.clone();
            }
            let (guard, timed_out) = self.changed.wait_until(state, deadline);
            state = guard;
            if timed_out && state.outcome.is_none() {
                return Err(timed_out_error("wait for durable"));
            }
        }
    }

    pub fn progress(&self) -> Progress {
        let state = self.state.lock();
        Progress {
            total_bytes: self.spec.payload_bytes,
            copied_bytes: state.copied_bytes,
            written_bytes: state.written_bytes.min(self.spec.payload_bytes),
            copied: state.copied_at.is_some(),
            ended: state.outcome.is_some(),
        }
    }

    /// From begin to copied (as far as it has come), and from begin to now.
    pub fn ages(&self) -> (Duration, Duration) {
        let now = Instant::now();
        let copied_at = self.state.lock().copied_at.unwrap_or(now);
        (copied_at - self.begun, now - self.begun)
    }

    pub fn ended(&self) -> bool {
        self.state.lock().outcome.is_some()
    }

    fn shared(&self) -> Result<Arc<Shared>> {
        self.shared.upgrade().ok_or_else(|| cancelled("the store was closed"))
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

pub(crate) fn cancelled(why: &str) -> Error {
    Error::new(ErrorKind::Cancelled, "save", why)
}

fn timed_out_error(op: &'static str) -> Error {
    Error::new(ErrorKind::TimedOut, op, "the time given ran out; the save goes on")
        .advise("wait again, or cancel")
}
