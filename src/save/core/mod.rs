//! One save: its state, who may change it, and how it ends.
//!
//! All mutable state stands under one lock that is taken a few times per chunk and never held over I/O,
//! copying or hashing. A save ends exactly once:
//!
//! - `Durable` when its commit record is durable;
//! - `Failed` (also by cancellation) when a failure was recorded *and* no copier reads its source, no operation
//!   on its slot is in flight, its writing mark is not being written and the committer does not hold it. Only
//!   then is the slot given back, so that no late write can hit a slot that another save has claimed. After the
//!   death of a thread of the engine it is failed at once, and the slot is never given back.

mod chunks;
mod flow;

use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::fork::ForkStamp;
use crate::format::{RecordState, SlotRecord};
#[cfg(feature = "cuda")]
use crate::save::device::{Copies, DevicePart, OnDevice};
use crate::save::raw::RawChunks;
use crate::save::saver::Shared;
use crate::source::Source;
use crate::staging::StagingBuffer;
use crate::store::{Claimed, Content};
use crate::sync::{now, Arc, Condvar, Mutex, Weak};

/// What a save is about, fixed at its begin.
#[derive(Debug, Clone)]
pub(crate) struct SaveSpec {
    pub step: u64,
    pub payload_bytes: u64,
    pub header_bytes: u64,
    pub header_hash: u128,
    pub tensor_count: u32,
    pub flags: u32,
    /// It may not commit before its caller confirms it.
    pub confirm: bool,
    /// Its checkpoint is pinned from the commit on.
    pub pin: bool,
}

/// How far a save is, in bytes of its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of the payload.
    pub total_bytes: u64,
    /// Bytes that have left the caller's memory.
    pub copied_bytes: u64,
    /// Bytes handed to the medium and completed (not yet durable), or found there.
    pub written_bytes: u64,
    /// Every byte has left the caller's memory.
    pub copied: bool,
    /// The save has ended, durably or not.
    pub ended: bool,
}

impl Progress {
    /// Of a save that another process works on.
    pub(crate) fn unknown(total_bytes: u64) -> Progress {
        Progress { total_bytes, copied_bytes: 0, written_bytes: 0, copied: false, ended: true }
    }
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
    /// Pulled by copiers where it is in host memory, else brought by a device.
    #[cfg(feature = "cuda")]
    Device(DevicePart),
}

/// One chunk to copy.
pub(crate) struct ChunkWork {
    pub chunk: u64,
    pub source: Arc<dyn Source>,
    /// Hash of what its place holds, where it is expected to be the same.
    pub steady: Option<u128>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mark {
    Pending,
    Durable,
    /// Will never be durable: the marker has given up or was told not to try.
    Abandoned,
}

/// A write into the slot.
struct Write {
    offset: u64,
    len: usize,
    buffer: StagingBuffer,
    token: u64,
}

/// What waits for the writing mark. Each is an operation in flight.
enum Parked {
    Write(Write),
    /// Chunks that a copier is to have written from the memory of a GPU.
    #[cfg(feature = "cuda")]
    OnDevice(OnDevice),
}

pub(crate) struct SaveState {
    source: Option<Arc<dyn Source>>,
    next_chunk: u64,
    /// Copiers (and raw writers) at work on this save.
    copying: u32,
    /// Chunks that have left the caller's memory.
    chunks_left: u64,
    /// Chunks that copiers are taking out of it.
    host_chunks: u64,
    chunks_hashed: u64,
    copied_bytes: u64,
    written_bytes: u64,
    /// Operations submitted or parked that have not ended.
    in_flight: u32,
    table_queued: bool,
    last_chunk_written: bool,
    /// A raw save that was not committed yet: may fail, may not commit.
    held_open: bool,
    /// Its caller has yet to confirm it: may fail, may not commit.
    unconfirmed: bool,
    mark: Mark,
    parked: Vec<Parked>,
    hashes: Vec<u128>,
    /// What the slot is known to hold: the save's own while it owns the slot.
    content: Content,
    /// Payload bytes that were found in their places.
    unchanged_bytes: u64,
    /// Payload bytes that cuFile wrote.
    direct_bytes: u64,
    committing: bool,
    copied_at: Option<Instant>,
    failure: Option<Error>,
    outcome: Option<Result<Durable>>,
}

impl SaveState {
    /// Nothing is at work on it, and it has neither ended nor been handed to the committer.
    fn idle(&self) -> bool {
        self.unowned() && self.in_flight == 0
    }

    /// As `idle`, but operations on the medium may be under way.
    fn unowned(&self) -> bool {
        !self.committing && self.outcome.is_none() && self.copying == 0
    }

    /// Could commit, were it confirmed.
    fn awaits_confirmation(&self) -> bool {
        let complete = self.idle() && self.failure.is_none() && self.table_queued && !self.held_open;
        complete && self.unconfirmed
    }
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
    /// Of a state on GPUs.
    #[cfg(feature = "cuda")]
    pub(super) device: Option<Arc<Copies>>,
    shared: Weak<Shared>,
    this: Weak<SaveCore>,
    fork_stamp: ForkStamp,
}

impl SaveCore {
    pub fn new(
        shared: &Arc<Shared>,
        claim: Claimed,
        mut content: Content,
        spec: SaveSpec,
        origin: Origin,
    ) -> Arc<SaveCore> {
        #[cfg(feature = "cuda")]
        let device = match &origin {
            Origin::Device(part) => Some(part.copies.clone()),
            _ => None,
        };
        let (source, raw): (Option<Arc<dyn Source>>, _) = match origin {
            Origin::Source(source) => (Some(source), None),
            Origin::Raw(chunks) => (None, Some(chunks)),
            #[cfg(feature = "cuda")]
            Origin::Device(part) => (Some(part.source), None),
        };
        let options = shared.region.options();
        let chunk_bytes = options.chunk_bytes;
        content.prepare(chunk_bytes, spec.payload_bytes, options.rewrite_every);
        let unconfirmed = spec.confirm;
        let chunk_count = spec.payload_bytes.div_ceil(chunk_bytes);
        let table_offset = spec.payload_bytes.next_multiple_of(crate::format::BLOCK_BYTES);
        Arc::new_cyclic(|this| SaveCore {
            claim,
            spec,
            chunk_bytes,
            chunk_count,
            table_offset,
            begun: now(),
            flush_failures: shared.region.flush_failures(),
            state: Mutex::new(SaveState {
                source,
                next_chunk: 0,
                copying: 0,
                chunks_left: 0,
                host_chunks: 0,
                chunks_hashed: 0,
                copied_bytes: 0,
                written_bytes: 0,
                in_flight: 0,
                table_queued: false,
                last_chunk_written: false,
                held_open: raw.is_some(),
                unconfirmed,
                mark: Mark::Pending,
                parked: Vec::new(),
                hashes: vec![0; chunk_count as usize],
                content,
                unchanged_bytes: 0,
                direct_bytes: 0,
                committing: false,
                copied_at: None,
                failure: None,
                outcome: None,
            }),
            changed: Condvar::new(),
            on_end: Mutex::new(None),
            raw,
            #[cfg(feature = "cuda")]
            device,
            shared: Arc::downgrade(shared),
            this: this.clone(),
            fork_stamp: ForkStamp::now(),
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
            header_hash: self.spec.header_hash,
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

    /// Waits until what is in host memory has left it, but for what stands between a device's memory.
    #[cfg(feature = "cuda")]
    pub fn wait_host_copied(&self, deadline: Option<Instant>) -> Result<()> {
        let mut state = self.state.lock();
        loop {
            self.skip_fetched(&mut state);
            let taken = state.source.is_none() || state.next_chunk == self.chunk_count;
            if state.copied_at.is_some() || state.failure.is_some() || taken && state.host_chunks == 0 {
                return Ok(());
            }
            let timed_out;
            (state, timed_out) = self.changed.wait_until(state, deadline);
            if timed_out {
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
        let at = now();
        let copied_at = self.state.lock().copied_at.unwrap_or(at);
        (copied_at - self.begun, at - self.begun)
    }

    /// Everything is written, and only its caller's confirmation is missing.
    pub fn awaits_confirmation(&self) -> bool {
        self.state.lock().awaits_confirmation()
    }

    /// It was begun to be confirmed, and was not.
    pub fn unconfirmed(&self) -> bool {
        self.state.lock().unconfirmed
    }

    pub fn ended(&self) -> bool {
        self.state.lock().outcome.is_some()
    }

    /// True in a child forked after the save began: its threads live in the parent, and any of its locks may have
    /// been held at the fork.
    pub fn forked(&self) -> bool {
        self.fork_stamp.is_forked()
    }

    /// Refuses in a forked child.
    pub fn check_process(&self, op: &'static str) -> Result<()> {
        self.fork_stamp.check(op)
    }

    pub(in crate::save) fn shared(&self) -> Result<Arc<Shared>> {
        self.shared.upgrade().ok_or_else(|| cancelled("the store was closed"))
    }
}

pub(crate) fn cancelled(why: &str) -> Error {
    Error::new(ErrorKind::Cancelled, "save", why)
}

fn timed_out_error(op: &'static str) -> Error {
    Error::new(ErrorKind::TimedOut, op, "the time given ran out; the save goes on")
        .advise("wait again, or cancel")
}

/// What a raw write fails with where it waited in vain.
pub(crate) fn out_of_time(op: &'static str, awaited: &str) -> Error {
    Error::new(
        ErrorKind::TimedOut,
        op,
        format!("waited for {awaited} as long as was allowed at begin; the save has failed"),
    )
    .advise("give a longer wait at begin, a larger staging pool, or look at the device")
}

/// What a save ends with after a defect of the engine.
pub(crate) fn internal(why: &str) -> Error {
    Error::new(ErrorKind::Internal, "save", why)
        .advise("close the store and open it again; durable checkpoints are intact")
}
