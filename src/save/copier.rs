//! A copier: one of the threads that take chunks out of the caller's memory, oldest save first.
//!
//! A chunk is only looked at where it is likely to be in its place already; it is copied into its place where the medium's
//! bytes are memory; else it goes through a staging buffer.

use std::panic::{catch_unwind, AssertUnwindSafe};

use crate::error::Result;
#[cfg(feature = "cuda")]
use crate::format::chunk_hash;
use crate::format::BLOCK_BYTES;
use crate::persist::ChunkHasher;
use crate::save::core::{internal, ChunkWork, SaveCore};
#[cfg(feature = "cuda")]
use crate::save::device::{write_from_device, Arrived, Bytes};
use crate::save::saver::Shared;
#[cfg(feature = "cuda")]
use crate::source::copy_and_hash;
use crate::staging::StagingBuffer;
use crate::sync::thread;

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
        if take_arrived(shared, false) {
            continue;
        }
        if !shared.has_copy_work() {
            // Not before all saves have ended: what a device brings until then is to be seen to.
            if shared.closing() && shared.all_ended() {
                return;
            }
            let _ = shared.copy_work.wait(ticket, None);
            continue;
        }
        let Some(mut buffer) = shared.acquire_buffer() else {
            // The saves in the queue are failing, or something has arrived.
            thread::yield_now();
            continue;
        };
        while let Some((save, work)) = shared.next_chunk() {
            match take_chunk(shared, &save, work, buffer) {
                Some(unused) => buffer = unused,
                None => break,
            }
            if shared.may_take_arrived() {
                break;
            }
        }
    }
}

/// Sees to what a device has brought; false where there is nothing, or others are enough. `for_buffers`: the calling thread wants for a
/// staging buffer, and sees to nothing but what holds one.
#[cfg(feature = "cuda")]
pub(super) fn take_arrived(shared: &Shared, for_buffers: bool) -> bool {
    let exchange = &shared.exchange;
    let at_it = exchange.courtesy.begin(shared.region.options().writers);
    if at_it.is_none() && !for_buffers {
        return false;
    }
    let next = if for_buffers { exchange.next_staged() } else { exchange.next_arrived() };
    let Some(Arrived { save, bytes }) = next else { return false };
    let _at_work = save.at_work();
    if flushing_has_failed(shared, &save) {
        // Before the save is told that nobody is at work on it.
        drop(bytes);
        return true;
    }
    let (chunk, buffer) = match bytes {
        Bytes::Staged { chunk, buffer } => (chunk, buffer),
        Bytes::OnDevice(chunks) => {
            write_from_device(shared, &save, chunks);
            return true;
        }
    };
    let mut placing = false;
    let hash = || hash_arrived(shared, &save, chunk, &buffer, &mut placing);
    let copied = catch_unwind(AssertUnwindSafe(hash));
    drop(finish_chunk(shared, &save, chunk, buffer, copied, placing));
    true
}

#[cfg(not(feature = "cuda"))]
pub(super) fn take_arrived(_shared: &Shared, _for_buffers: bool) -> bool {
    false
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
    if flushing_has_failed(shared, save) {
        return Some(buffer);
    }
    let mut placing = false;
    let copied = catch_unwind(AssertUnwindSafe(|| copy(shared, save, &work, &mut buffer, &mut placing)));
    // The caller's memory may be freed once `copied` is told: let go of the source before.
    drop(work);
    if matches!(copied, Ok(Ok(_))) {
        save.chunk_left(chunk);
    }
    finish_chunk(shared, save, chunk, buffer, copied, placing)
}

/// True where a flush has failed since the save began: that has ended it.
fn flushing_has_failed(shared: &Shared, save: &SaveCore) -> bool {
    let failed = shared.region.flush_failures() != save.flush_failures;
    if failed {
        save.fail(shared.region.last_flush_error());
    }
    failed
}

/// Hands on what became of a chunk. Returns the buffer where it was not used.
fn finish_chunk(
    shared: &Shared,
    save: &SaveCore,
    chunk: u64,
    mut buffer: StagingBuffer,
    copied: thread::Result<Result<Copied>>,
    placing: bool,
) -> Option<StagingBuffer> {
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
    let fill = |dst: &mut [u8], hasher: &mut ChunkHasher, write_back: bool| {
        work.source.fill(offset, dst, hasher, write_back)
    };
    if let Some(placed) = place(shared, save, work.chunk, placing, fill)? {
        return Ok(placed);
    }
    let mut hasher = ChunkHasher::new();
    work.source.fill(offset, &mut buffer[..len], &mut hasher, false)?;
    Ok(Copied::Staged(hasher.finish()))
}

/// As [`copy`], of a chunk that is in the buffer already.
#[cfg(feature = "cuda")]
fn hash_arrived(
    shared: &Shared,
    save: &SaveCore,
    chunk: u64,
    buffer: &[u8],
    placing: &mut bool,
) -> Result<Copied> {
    let bytes = &buffer[..save.chunk_len(chunk)];
    if save.steady(chunk).is_some_and(|known| chunk_hash(bytes) == known) {
        return Ok(Copied::Found);
    }
    let fill = |dst: &mut [u8], hasher: &mut ChunkHasher, write_back: bool| {
        copy_and_hash(dst, bytes, hasher, write_back);
        Ok(())
    };
    match place(shared, save, chunk, placing, fill)? {
        Some(placed) => Ok(placed),
        None => Ok(Copied::Staged(chunk_hash(bytes))),
    }
}

/// Has a chunk stored straight into its place, where the medium's bytes are memory and the slot is marked by now.
fn place(
    shared: &Shared,
    save: &SaveCore,
    chunk: u64,
    placing: &mut bool,
    mut fill: impl FnMut(&mut [u8], &mut ChunkHasher, bool) -> Result<()>,
) -> Result<Option<Copied>> {
    let Some(memory) = shared.region.medium().memory().filter(|_| save.marked_soon()) else {
        return Ok(None);
    };
    let mut hasher = ChunkHasher::new();
    let before = save.begin_placing(shared, chunk)?;
    *placing = true;
    let at = shared.region.layout().slot_offset(save.claim.slot) + chunk * save.chunk_bytes;
    memory.fill(at, save.chunk_len(chunk), &mut |dst, write_back| fill(dst, &mut hasher, write_back))?;
    Ok(Some(Copied::Placed { hash: hasher.finish(), before }))
}
