//! [`Store`]: an open region with its threads, and everything that a caller does with it.

mod checkpoints;
mod saves;

use std::path::Path;
use std::time::Duration;

pub use checkpoints::{CheckpointInfo, Opened, Select};
pub use saves::{Tensor, TensorAt};

use crate::error::{Error, ErrorKind, Result};
use crate::format::{Block, Planner, PreferredMedium, Superblock, SUPERBLOCK_OFFSETS};
use crate::medium::{open_medium, read_head, Medium, MediumInfo, MediumOptions, PreferredHint, Stripes};
use crate::metrics::{Metrics, Stats};
use crate::recovery::DecisionTable;
use crate::save::{deadline_in, Faults, Saver};
use crate::slots::SlotState;
use crate::staging::{StagingOptions, StagingPool};
use crate::store::{format, grow, FormatOptions, LeftOut, OpenOptions, Region};
use crate::sync::Arc;

/// Creates a region at `path`: a new file, an empty file, or a block device. Durable on return.
///
/// Never destroys: a path that holds anything is refused without `force`.
pub fn format_region(path: &Path, options: &FormatOptions) -> Result<()> {
    format::format_path(path, options, None)
}

/// [`format_region`], reporting bytes written out of the total while `prewrite` runs.
pub fn format_region_with_progress(
    path: &Path,
    options: &FormatOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    format::format_path(path, options, Some(progress))
}

/// Replaces the region file by a larger one that holds the same checkpoints. Durable on return.
///
/// A crash leaves the old region or the new one. Refused on devices, and while a writer has the region open. Returns the
/// checkpoints that could not be read, which the new region lacks; fails where not one can be.
pub fn grow_region(
    path: &Path,
    slot_count: u32,
    payload_bytes: u64,
    lock_wait: Option<Duration>,
) -> Result<Vec<LeftOut>> {
    grow::grow_path(path, slot_count, payload_bytes, lock_wait)
}

/// An open region and its threads. All methods may be called from several threads at once.
///
/// Dropping it cancels the saves that are in flight, waits for their I/O to end, and releases the lock (once the
/// checkpoints and raw saves that were opened from it are dropped, too).
pub struct Store {
    // Dropped first: its threads use the region.
    saver: Option<Saver>,
    metrics: Arc<Metrics>,
    planner: Planner,
    region: Arc<Region>,
}

impl Store {
    /// Opens a region. A writer takes the exclusive lock; a read-only store works beside a live writer.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Store> {
        options.validate()?;
        let pool = new_pool(options)?;
        let medium_options = MediumOptions {
            kind: options.medium,
            writable: !options.read_only,
            lock_wait: options.lock_wait.unwrap_or(FOR_EVER),
            preferred: preferred_medium(path),
            required: options.required,
            backend: options.backend,
            queue_depth: options.queue_depth as usize,
            ..MediumOptions::default()
        };
        let medium = open_medium(path, &medium_options, Some(&pool))?;
        Store::open_parts(path, medium, pool, options, Faults::default())
    }

    /// Opens a region on a given medium, with faults planted in the protocol: for the crash checker.
    #[cfg(feature = "sim")]
    pub fn open_on(medium: Arc<dyn Medium>, options: &OpenOptions, faults: Faults) -> Result<Store> {
        options.validate()?;
        let pool = new_pool(options)?;
        Store::open_parts(Path::new("sim"), medium, pool, options, faults)
    }

    fn open_parts(
        path: &Path,
        medium: Arc<dyn Medium>,
        pool: Arc<StagingPool>,
        options: &OpenOptions,
        faults: Faults,
    ) -> Result<Store> {
        if let Some(stripes) = medium.info().stripes.filter(|_| !options.read_only) {
            check_chunk(stripes, options.chunk_bytes).map_err(|error| error.at_path(path))?;
        }
        let region = Arc::new(Region::open_on(path, medium, pool, options.clone())?);
        let metrics = Arc::new(Metrics::default());
        let saver = match options.read_only {
            true => None,
            false => Some(Saver::start(region.clone(), metrics.clone(), faults)?),
        };
        Ok(Store { saver, metrics, planner: Planner::default(), region })
    }

    /// The open region.
    pub fn region(&self) -> &Arc<Region> {
        &self.region
    }

    /// What the medium gave, as opposed to what was asked for.
    pub fn medium_info(&self) -> MediumInfo {
        self.region.medium_info()
    }

    /// What recovery found when the store was opened.
    pub fn recovered(&self) -> &DecisionTable {
        self.region.recovered()
    }

    /// Counters since open, and gauges of this moment.
    pub fn stats(&self) -> Stats {
        let views = self.region.slot_views();
        let committed = views.iter().filter(|v| v.state == SlotState::Committed);
        Stats {
            in_flight: self.saver.as_ref().map_or(0, |saver| saver.active().len() as u32),
            quarantined_slots: views.iter().filter(|v| v.state == SlotState::Quarantined).count() as u32,
            claimable_slots: self.region.claimable_count() as u32,
            newest_generation: committed.map(|v| v.generation).max().unwrap_or(0),
            ..self.metrics.snapshot()
        }
    }

    /// Waits until no save is in flight. Says nothing of how they ended.
    ///
    /// A save that waits only for its confirmation is in flight. With a timeout it is waited for like any other; without
    /// one, `InvalidState` is returned as soon as nothing else is in flight, lest the wait never end.
    pub fn drain(&self, timeout: Option<Duration>) -> Result<()> {
        self.region.check_usable("drain", false)?;
        self.saver.as_ref().map_or(Ok(()), |saver| saver.drain(deadline_in(timeout)))
    }

    /// Durably keeps a checkpoint until it is unpinned.
    pub fn pin(&self, generation: u64) -> Result<()> {
        self.region.pin(generation)
    }

    /// Durably lifts a pin.
    pub fn unpin(&self, generation: u64) -> Result<()> {
        self.region.unpin(generation)
    }

    /// Durably marks a step as durable on every rank; returns its generation here.
    pub fn mark_global(&self, run_id: u64, step: u64) -> Result<u64> {
        self.region.mark_global(run_id, step)
    }

    /// Collectively abandons a step: cancels its saves in flight and durably discards its checkpoints.
    /// Returns how many checkpoints were discarded.
    ///
    /// `timeout` bounds the wait for the cancelled saves to end (`None`: for ever); then `TimedOut`, and nothing was
    /// discarded yet.
    pub fn abandon(&self, run_id: u64, step: u64, timeout: Option<Duration>) -> Result<u32> {
        const OP: &str = "abandon";
        let saver = self.writer(OP)?;
        if self.region.global_mark().is_some_and(|mark| mark.run_id == run_id && mark.step == step) {
            return Err(Error::new(
                ErrorKind::InvalidState,
                OP,
                format!("step {step} of run {run_id} is marked as durable everywhere"),
            )
            .at_path(self.region.path()));
        }
        if run_id == self.region.options().run_id {
            let deadline = deadline_in(timeout);
            let mut saves = saver.active();
            saves.retain(|save| save.spec.step == step);
            saves.iter().for_each(|save| save.fail(crate::save::cancelled("its step was abandoned")));
            for save in saves {
                // It may have been too late to cancel: then the checkpoint is discarded below.
                let _ = save.wait_durable(deadline);
                if !save.ended() {
                    let message = "the time given ran out before its saves had ended; nothing was discarded";
                    let error = Error::new(ErrorKind::TimedOut, OP, message).at_path(self.region.path());
                    return Err(error.advise("call again: the saves are cancelled, and end by themselves"));
                }
            }
        }
        self.region.discard(OP, |record| record.run_id == run_id && record.step == step)
    }

    /// Durably discards every checkpoint newer than `generation` (0: all). Refused while saves are in flight.
    pub fn discard_newer(&self, generation: u64) -> Result<u32> {
        const OP: &str = "discard_newer";
        let saver = self.writer(OP)?;
        if !saver.active().is_empty() {
            return Err(Error::new(ErrorKind::InvalidState, OP, "saves are in flight")
                .at_path(self.region.path())
                .advise("drain the store first"));
        }
        if generation != 0 && self.region.record_of(generation).is_none() {
            return Err(Error::new(
                ErrorKind::NotFound,
                OP,
                format!("no checkpoint has generation {generation}, nothing was discarded"),
            )
            .at_path(self.region.path()));
        }
        self.region.discard(OP, |record| record.generation > generation)
    }

    /// Rewrites every quarantined slot in full, flushes it and takes it back into use. Returns how many.
    pub fn repair(&self, timeout: Option<Duration>) -> Result<u32> {
        self.writer("repair")?;
        let quarantined = self.region.quarantined();
        let deadline = deadline_in(timeout);
        let mut repaired = 0;
        for claim in quarantined {
            repaired += u32::from(self.region.repair(claim, deadline)?);
        }
        Ok(repaired)
    }

    /// Refuses further saves: called where the C boundary caught a panic.
    pub fn poison(&self) {
        self.region.poison();
    }

    fn writer(&self, op: &'static str) -> Result<&Saver> {
        self.region.check_usable(op, true)?;
        self.saver.as_ref().ok_or_else(|| {
            Error::new(ErrorKind::ReadOnly, op, "the store was opened read-only").at_path(self.region.path())
        })
    }
}

/// A chunk that straddled two members would be two transfers.
fn check_chunk(stripes: Stripes, chunk_bytes: u64) -> Result<()> {
    let unit_bytes = stripes.unit_bytes;
    if unit_bytes.is_multiple_of(chunk_bytes) {
        return Ok(());
    }
    let message = format!(
        "chunk_bytes is {chunk_bytes}, expected to divide the {unit_bytes} bytes of a unit of the stripes"
    );
    Err(Error::new(ErrorKind::InvalidArgument, "open", message)
        .advise(format!("open with chunk_bytes {unit_bytes}, or half of that, or a quarter, ...")))
}

/// Waiting "for ever" as a time that clocks can add.
const FOR_EVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// What was measured when the region was formatted; errors are left to the opening that follows.
fn preferred_medium(path: &Path) -> Option<PreferredHint> {
    let head = read_head(path).ok().flatten()?;
    let block = |offset: u64| -> Option<&Block> { head.get(offset as usize..)?.first_chunk() };
    let (superblock, _) =
        Superblock::choose(block(SUPERBLOCK_OFFSETS[0])?, block(SUPERBLOCK_OFFSETS[1])?).ok()?;
    match superblock.preferred_medium {
        PreferredMedium::Unknown => None,
        PreferredMedium::Direct => Some(PreferredHint::Direct),
        PreferredMedium::Mmap => Some(PreferredHint::Mmap),
    }
}

fn new_pool(options: &OpenOptions) -> Result<Arc<StagingPool>> {
    let staging = StagingOptions { lock_memory: options.lock_memory };
    StagingPool::new(options.staging_bytes, options.chunk_bytes as usize, &staging)
}
