//! A copier: one of the threads that take chunks out of the caller's memory, oldest save first.
//!
//! A chunk is only looked at where it is likely to be in its place already; it is copied into its place where the medium's
//! bytes are memory; else it goes through a staging buffer.

use std::panic::{catch_unwind, AssertUnwindSafe};

use crate::error::Result;
use crate::format::BLOCK_BYTES;
use crate::persist::ChunkHasher;
use crate::save::core::{internal, ChunkWork, SaveCore};
use crate::save::saver::Shared;
use crate::staging::StagingBuffer;

/// What became of a chunk.
enum Copied {
    /// Its place holds it already.
    Found,
    /// It is in the staging buffer.
    Staged(u128),
    /// It is in its place; what that held before, where known.
    Placed { hash: u128, before: Option<u128> },
}

pub(super) fn run_copier(shared: &Shared) {
    loop {
        let ticket = shared.copy_work.ticket();
        if !shared.has_copy_work() {
            if shared.closing() {
                return;
            }
            let _ = shared.copy_work.wait(ticket, None);
            continue;
        }
        let Some(mut buffer) = shared.acquire_buffer() else { return };
        while let Some((save, work)) = shared.next_chunk() {
            match take_chunk(shared, &save, work, buffer) {
                Some(unused) => buffer = unused,
                None => break,
            }
        }
    }
}

/// Returns the buffer where it was not used.
fn take_chunk(
    shared: &Shared,
    save: &SaveCore,
    work: ChunkWork,
    mut buffer: StagingBuffer,
) -> Option<StagingBuffer> {
    let _at_work = save.at_work();
    let chunk = work.chunk;
    if shared.region.flush_failures() != save.flush_failures {
        drop(work);
        save.fail(shared.region.last_flush_error());
        return Some(buffer);
    }
    let mut placing = false;
    let copied = catch_unwind(AssertUnwindSafe(|| copy(shared, save, &work, &mut buffer, &mut placing)));
    // The caller's memory may be freed once `copied` is told: let go of the source before.
    drop(work);
    match copied {
        Ok(Ok(Copied::Found)) => save.chunk_found(chunk),
        Ok(Ok(Copied::Staged(hash))) => {
            let len = save.chunk_len(chunk);
            buffer[len..len.next_multiple_of(BLOCK_BYTES as usize)].fill(0);
            return save.chunk_copied(chunk, hash, buffer);
        }
        Ok(Ok(Copied::Placed { hash, before })) => save.chunk_placed(shared, chunk, hash, before),
        Ok(Err(error)) if placing => save.write_finished(shared, chunk, Err(error)),
        Ok(Err(error)) => save.fail(error),
        Err(panic) => {
            // Something may still be copying into the buffer. It is lost, and the store with it, but not the other
            // saves in flight. Dropping what was thrown could panic again.
            std::mem::forget((panic, buffer));
            shared.region.poison();
            let error = internal("copying from the state failed by a defect");
            match placing {
                true => save.write_finished(shared, chunk, Err(error)),
                false => save.fail(error),
            }
            return None;
        }
    }
    Some(buffer)
}

/// `placing` says whether a write was begun, and is to be finished.
fn copy(
    shared: &Shared,
    save: &SaveCore,
    work: &ChunkWork,
    buffer: &mut StagingBuffer,
    placing: &mut bool,
) -> Result<Copied> {
    let (offset, len) = (work.chunk * save.chunk_bytes, save.chunk_len(work.chunk));
    if let Some(hash) = work.steady {
        let mut hasher = ChunkHasher::new();
        work.source.hash(offset, len, &mut hasher)?;
        if hasher.finish() == hash {
            return Ok(Copied::Found);
        }
    }
    let mut hasher = ChunkHasher::new();
    let memory = shared.region.medium().memory().filter(|_| save.marked_soon());
    if let Some(memory) = memory {
        let before = save.begin_placing(shared, work.chunk)?;
        *placing = true;
        let at = shared.region.layout().slot_offset(save.claim.slot) + offset;
        memory.fill(at, len, &mut |place, write_back| {
            work.source.fill(offset, place, &mut hasher, write_back)
        })?;
        return Ok(Copied::Placed { hash: hasher.finish(), before });
    }
    work.source.fill(offset, &mut buffer[..len], &mut hasher, false)?;
    Ok(Copied::Staged(hasher.finish()))
}
