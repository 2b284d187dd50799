//! Writing chunks from spare memory of a device to their places, by cuFile. Their hashes are known.
#![expect(unsafe_code, reason = "cuFile reads memory of the device")]

use std::panic::{catch_unwind, AssertUnwindSafe};

use super::spare::Spare;
use crate::cuda::gds::GdsFile;
use crate::cuda::Relaxed;
use crate::error::{Error, Result};
use crate::save::core::{internal, SaveCore};
use crate::save::saver::Shared;
use crate::sync::Arc;

/// Chunks that lie one behind the other in a spare.
pub(crate) struct OnDevice {
    pub first: u64,
    pub hashes: Vec<u128>,
    pub spare: Arc<Spare>,
    /// Where the first one is in the spare.
    pub at: u64,
    pub file: Arc<GdsFile>,
}

/// Sees to chunks that a copier has taken from the queue; its thread is at work on the save.
pub(in crate::save) fn write_from_device(shared: &Shared, save: &Arc<SaveCore>, chunks: OnDevice) {
    let Some(chunks) = save.park_unless_marked(chunks) else { return };
    match catch_unwind(AssertUnwindSafe(|| write(shared, save, &chunks))) {
        Ok(Ok(())) => {}
        Ok(Err(error)) => save.fail(error),
        Err(panic) => {
            // cuFile may still be reading the spare, which is lost. Dropping what was thrown could panic again.
            std::mem::forget((panic, chunks.spare));
            shared.region.poison();
            save.fail(internal("writing from a GPU failed by a defect"));
        }
    }
}

fn write(shared: &Shared, save: &SaveCore, chunks: &OnDevice) -> Result<()> {
    // Where it cannot be set, captures of the program must be in their thread's own mode.
    let _relaxed = Relaxed::enter();
    let mut together: Vec<Placing<'_>> = Vec::new();
    for (chunk, &hash) in (chunks.first..).zip(&chunks.hashes) {
        if save.is_in_place(chunk, hash) {
            write_run(shared, save, chunks, std::mem::take(&mut together))?;
        } else {
            together.push(Placing::begin(shared, save, chunk, hash)?);
        }
    }
    write_run(shared, save, chunks, together)
}

/// Writes chunks of which each follows the one before.
fn write_run(shared: &Shared, save: &SaveCore, chunks: &OnDevice, run: Vec<Placing<'_>>) -> Result<()> {
    let Some(first) = run.first().map(|placing| placing.chunk) else { return Ok(()) };
    let at = chunks.at + (first - chunks.first) * save.chunk_bytes;
    let bytes = run.len() * save.chunk_bytes as usize;
    let place = shared.region.layout().slot_offset(save.claim.slot) + first * save.chunk_bytes;
    // SAFETY: the hashes came from the device behind the snapshot, so that it is complete; nobody writes to the spare before all who
    // hold it have let go.
    let written = unsafe { chunks.spare.write(at, bytes, &chunks.file, place) };
    if written.is_err() {
        shared.exchange.refuse_direct();
    }
    run.into_iter().for_each(|placing| placing.end(written.clone()));
    Ok(())
}

/// A chunk that is being written to its place. Its save does not end before this does.
struct Placing<'a> {
    shared: &'a Shared,
    save: &'a SaveCore,
    chunk: u64,
    hash: u128,
    /// What its place was known to hold.
    before: Option<u128>,
    /// Why it was not written, until it is known that it was.
    failure: Option<Error>,
}

impl<'a> Placing<'a> {
    fn begin(shared: &'a Shared, save: &'a SaveCore, chunk: u64, hash: u128) -> Result<Placing<'a>> {
        let before = save.begin_placing(shared, chunk)?;
        let failure = Some(internal("a chunk was not written to its place"));
        Ok(Placing { shared, save, chunk, hash, before, failure })
    }

    fn end(mut self, written: Result<()>) {
        self.failure = written.err();
    }
}

impl Drop for Placing<'_> {
    fn drop(&mut self) {
        match self.failure.take() {
            None => self.save.chunk_written_directly(self.shared, self.chunk, self.hash, self.before),
            Some(error) => self.save.write_finished(self.shared, self.chunk, Err(error)),
        }
    }
}
