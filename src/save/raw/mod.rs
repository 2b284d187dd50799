//! Raw streaming saves: the caller pushes bytes at offsets, from several threads, and commits.
//!
//! Chunks are assembled in staging buffers. A raw save may hold only its share of the pool half-filled; beyond
//! it, the half-filled chunk that was left alone for longest is spilled to its place in the slot, and read back
//! (and checked against its hash) when more of it comes. So any order of writes works within the bounded pool,
//! and writing in order never spills.

mod book;

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::time::{Duration, Instant};

pub(crate) use book::RawChunks;

use crate::error::{Error, ErrorKind, Result};
use crate::format::{chunk_hash, PayloadPlan, BLOCK_BYTES};
use crate::medium::Barrier;
use crate::save::core::{internal, out_of_time, Durable, Progress, SaveCore};
use crate::save::saver::Shared;
use crate::save::{deadline_in, Save};
use crate::staging::StagingBuffer;
use crate::sync::{now, Arc};

/// How often a writer looks whether a chunk that is being filled may be spilled.
const SPILL_POLL: Duration = Duration::from_millis(1);

/// A raw save in progress. Dropping it without `commit` cancels it; dropping it in a forked child only forgets it.
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
    /// Callable from several threads; ranges must not overlap. Blocks while the staging pool is full, but no single
    /// wait longer than the `wait` given at begin (10 s where that was 0). After that the save has failed with
    /// `TimedOut`, since a piece of which a part was taken cannot be continued. More than 65,536 written ranges with
    /// gaps between them fail it with `TooLarge`.
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
        let core = self.save()?.core();
        core.check_process("raw write")?;
        let _at_work = core.enter()?;
        let written = catch_unwind(AssertUnwindSafe(|| self.write_pieces(core, offset, bytes)));
        let result = written.unwrap_or_else(|panic| {
            // Dropping what was thrown could panic again.
            std::mem::forget(panic);
            self.shared.region.poison();
            Err(internal("a raw write failed by a defect"))
        });
        let result = result.and_then(|()| core.check());
        if let Err(error) = &result {
            // A refused range changes nothing; after anything else the stream's content is unknown.
            if error.kind() != ErrorKind::InvalidArgument {
                core.fail(error.clone());
            }
        }
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
        let Some(entry) = self.chunks.open(chunk) else { return Err(overlap(core, chunk, within)) };
        let mut open = entry.lock();
        if open.complete || !self.chunks.cover(&mut open, within, within + bytes.len())? {
            return Err(overlap(core, chunk, within));
        }
        let mut buffer = match open.buffer.take() {
            Some(buffer) => buffer,
            None => {
                let mut buffer = self.get_buffer(core, chunk)?;
                if let Some(hash) = open.spilled {
                    self.read_back(core, chunk, hash, &mut buffer)?;
                }
                buffer
            }
        };
        buffer[within..within + bytes.len()].copy_from_slice(bytes);
        if open.covered.is_whole(core.chunk_len(chunk)) {
            open.complete = true;
            drop(open);
            self.complete(core, chunk, buffer);
        } else {
            open.buffer = Some(buffer);
        }
        Ok(())
    }

    fn complete(&self, core: &SaveCore, chunk: u64, mut buffer: StagingBuffer) {
        self.chunks.complete(chunk);
        let len = core.chunk_len(chunk);
        buffer[len..padded_len(core, chunk)].fill(0);
        let hash = chunk_hash(&buffer[..len]);
        core.chunks_left(1, core.chunk_len(chunk) as u64);
        drop(core.chunk_copied(chunk, hash, buffer));
    }

    /// A buffer within the save's share; spills another open chunk where the share is used up.
    fn get_buffer(&self, core: &SaveCore, wanted_for: u64) -> Result<StagingBuffer> {
        let deadline = self.chunks.deadline();
        loop {
            let ticket = self.chunks.moved.ticket();
            core.check()?;
            if self.chunks.reserve(wanted_for) {
                return self.shared.acquire_buffer_for(core, deadline);
            }
            if deadline.is_some_and(|deadline| now() >= deadline) {
                return Err(out_of_time("raw write", "another chunk's staging buffer"));
            }
            if !self.spill_one(core, wanted_for, deadline)? {
                // Every other open chunk is being filled at this moment: wait until one moves.
                let _ = self.chunks.moved.wait(ticket, deadline_in(Some(SPILL_POLL)));
            }
        }
    }

    /// Writes one half-filled chunk (zeros in its gaps) to its place and takes its buffer back; false where all that
    /// hold one are being filled.
    fn spill_one(&self, core: &SaveCore, wanted_for: u64, deadline: Option<Instant>) -> Result<bool> {
        let mut tried = 0;
        while let Some((age, chunk, entry)) = self.chunks.idlest_since(tried, wanted_for) {
            tried = age;
            let Some(mut open) = entry.try_lock() else { continue };
            let Some(mut buffer) = open.buffer.take() else { continue };
            let bytes = &mut buffer[..padded_len(core, chunk)];
            open.covered.zero_gaps(bytes);
            core.wait_marked(deadline)?;
            core.forget_chunk(chunk);
            let medium = self.shared.region.medium();
            medium.copy(self.medium_offset(core, chunk), bytes)?;
            medium.fence(Barrier::Chunk)?;
            open.spilled = Some(chunk_hash(bytes));
            drop(buffer);
            drop(open);
            self.chunks.release(chunk);
            return Ok(true);
        }
        Ok(false)
    }

    /// Reads a spilled chunk. Its hash is checked, since the hash of the whole chunk would bless any damage.
    fn read_back(&self, core: &SaveCore, chunk: u64, hash: u128, buffer: &mut StagingBuffer) -> Result<()> {
        let offset = self.medium_offset(core, chunk);
        let bytes = &mut buffer[..padded_len(core, chunk)];
        self.shared.region.medium().read(offset, bytes)?;
        if chunk_hash(bytes) == hash {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Corrupt,
            "raw write",
            format!("chunk {chunk} was spilled half-filled to the medium and came back changed"),
        )
        .at_path(self.shared.region.path())
        .at_offset(offset)
        .advise("check the device; earlier checkpoints are not concerned"))
    }

    fn medium_offset(&self, core: &SaveCore, chunk: u64) -> u64 {
        self.shared.region.layout().slot_offset(core.claim.slot) + chunk * core.chunk_bytes
    }

    /// Lets the save commit; every announced byte must have been written. The returned save can be waited for (and is to
    /// be confirmed, where it was begun so).
    pub fn commit(&mut self) -> Result<Save> {
        let core = self.save()?.core().clone();
        core.check_process("raw commit")?;
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
        let (chunk, entry) = self.chunks.first_incomplete()?;
        let covered_to = entry.map_or(0, |entry| entry.lock().covered.first_gap() as u64);
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
        if self.shared.region.forked() {
            // Their buffers and locks are the parent's.
            std::mem::forget((self.shared.clone(), self.chunks.clone()));
            return;
        }
        self.cancel();
    }
}

/// Bytes of a chunk on the medium.
fn padded_len(core: &SaveCore, chunk: u64) -> usize {
    core.chunk_len(chunk).next_multiple_of(BLOCK_BYTES as usize)
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
