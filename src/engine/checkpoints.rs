//! Finding, opening, verifying and restoring checkpoints.

use super::Store;
use crate::error::{Error, ErrorKind, Result};
use crate::format::SlotRecord;
use crate::load::{concerns_one, Checkpoint};
use crate::recovery::Verdict;
use crate::store::Region;
use crate::sync::Arc;

/// How often checkpoints are listed anew because saves overtook the opening of one.
const LISTINGS_MAX: usize = 16;

/// Which checkpoint to open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Select {
    /// The one with the highest generation; falls back to the next newest where it is damaged.
    Newest,
    /// As `Newest`, among those older than a generation.
    OlderThan(u64),
    /// Exactly this generation.
    Generation(u64),
    /// The newest of this step, of any run; falls back to an older one of the same step.
    Step(u64),
}

/// One readable checkpoint, as listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointInfo {
    /// Its record: generation, step, sizes, time.
    pub record: SlotRecord,
    /// Durably kept until unpinned.
    pub pinned: bool,
    /// Opens through this store.
    pub readers: u32,
}

/// An opened checkpoint, and the newer ones that had to be passed over, newest first, with the reason.
pub struct Opened {
    /// The checkpoint.
    pub checkpoint: Checkpoint,
    /// Damaged checkpoints that would have been preferred.
    pub rejected: Vec<(SlotRecord, Error)>,
}

impl Store {
    /// Checkpoints, newest first. In a read-only store this reads the records anew.
    pub fn checkpoints(&self) -> Result<Vec<CheckpointInfo>> {
        self.region().check_usable("list checkpoints", false)?;
        if self.region().options().read_only {
            let table = self.region().read_table()?;
            let infos = table.newest_first.iter().filter_map(|&slot| {
                let decision = &table.slots[slot as usize];
                let record = decision.record.clone()?;
                (decision.verdict == Verdict::Checkpoint).then_some(CheckpointInfo {
                    record,
                    pinned: decision.pinned,
                    readers: 0,
                })
            });
            return Ok(infos.collect());
        }
        let views = self.region().slot_views();
        let infos = self.region().committed().into_iter().map(|record| {
            let view = views[record.slot as usize];
            CheckpointInfo { pinned: view.pinned, readers: view.readers, record }
        });
        Ok(infos.collect())
    }

    /// Opens a checkpoint. With `verify_payload` every chunk is read and checked first; otherwise record, table and
    /// header are, and chunks as they are read.
    pub fn open_checkpoint(&self, select: Select, verify_payload: bool) -> Result<Opened> {
        self.open_first(select, |checkpoint| if verify_payload { checkpoint.verify() } else { Ok(()) })
    }

    /// Opens the chosen checkpoint and hands it to `read`; when a payload turns out to be damaged on the way, the
    /// next candidate is opened and `read` is called again. One pass over the data, verification included.
    pub fn restore(&self, select: Select, read: impl FnMut(&Checkpoint) -> Result<()>) -> Result<Opened> {
        self.open_first(select, read)
    }

    fn open_first(&self, select: Select, mut check: impl FnMut(&Checkpoint) -> Result<()>) -> Result<Opened> {
        const OP: &str = "open checkpoint";
        self.region().check_usable(OP, false)?;
        let mut rejected: Vec<(SlotRecord, Error)> = Vec::new();
        let mut overtaken = None;
        for _ in 0..LISTINGS_MAX {
            overtaken = None;
            for record in self.candidates(select)? {
                let fallback = !rejected.is_empty();
                let error = match open_and_check(self.region(), &record, fallback, &mut check) {
                    Ok(checkpoint) => {
                        self.keep_found(&record, &rejected);
                        return Ok(Opened { checkpoint, rejected });
                    }
                    Err(Refusal::Checkpoint(error)) => error,
                    // The newest takes no room: newer ones have come since the listing.
                    Err(Refusal::Other(error)) if refused_as_old(select, &error) => {
                        overtaken = Some(error);
                        break;
                    }
                    Err(Refusal::Other(error)) => return Err(error),
                };
                if error.kind() == ErrorKind::Reclaimed {
                    // Newer ones have come since the listing: what follows in it is not the next newest.
                    overtaken = Some(error);
                    break;
                }
                if !rejected.iter().any(|(known, _)| known.generation == record.generation) {
                    rejected.push((record, error));
                }
            }
            if overtaken.is_none() {
                break;
            }
        }
        if let Some(error) = overtaken.or_else(|| rejected.into_iter().next().map(|(_, error)| error)) {
            return Err(error);
        }
        let what = match select {
            Select::Newest => "no checkpoint yet".to_string(),
            Select::OlderThan(generation) => format!("no checkpoint is older than generation {generation}"),
            Select::Generation(generation) => format!("no checkpoint has generation {generation}"),
            Select::Step(step) => format!("no checkpoint of step {step}"),
        };
        Err(Error::new(ErrorKind::NotFound, OP, what).at_path(self.region().path()))
    }

    /// An intact checkpoint was found behind damaged ones: where they would cost it its place among the newest K, they no
    /// longer count. Only then, and only now: a damaged checkpoint that is the only one must go on being reported, lest
    /// a trainer take the region for an empty one.
    fn keep_found(&self, found: &SlotRecord, rejected: &[(SlotRecord, Error)]) {
        if self.region().options().read_only || !self.region().outlived(found) {
            return;
        }
        for (record, error) in rejected {
            if error.kind() == ErrorKind::Corrupt {
                self.region().condemn(record);
            }
        }
    }

    fn candidates(&self, select: Select) -> Result<Vec<SlotRecord>> {
        let matches = |record: &SlotRecord| match select {
            Select::Newest => true,
            Select::OlderThan(generation) => record.generation < generation,
            Select::Generation(generation) => record.generation == generation,
            Select::Step(step) => record.step == step,
        };
        let records: Vec<SlotRecord> = match self.region().options().read_only {
            true => self.checkpoints()?.into_iter().map(|info| info.record).collect(),
            // With those that were reclaimed and not overwritten yet: more to fall back on.
            false => self.region().readable(),
        };
        Ok(records.into_iter().filter(matches).collect())
    }
}

/// Whoever asks for the newest is not to hear that an older one, which it was a moment ago, would cost saves a slot.
fn refused_as_old(select: Select, error: &Error) -> bool {
    select == Select::Newest && error.kind() == ErrorKind::NoSlot
}

/// Why a candidate was not taken.
enum Refusal {
    /// The checkpoint cannot be read: the next one may serve.
    Checkpoint(Error),
    /// Something else: it would meet the next one, too.
    Other(Error),
}

fn open_and_check(
    region: &Arc<Region>,
    record: &SlotRecord,
    fallback: bool,
    check: &mut impl FnMut(&Checkpoint) -> Result<()>,
) -> std::result::Result<Checkpoint, Refusal> {
    let checkpoint =
        Checkpoint::open(region, record.clone(), fallback).map_err(|error| match concerns_one(&error) {
            true => Refusal::Checkpoint(error),
            false => Refusal::Other(error),
        })?;
    match check(&checkpoint) {
        Ok(()) => Ok(checkpoint),
        // The caller's own I/O may fail with the same kinds: only what the checkpoint's reads met counts.
        Err(error) => Err(checkpoint.damage().map_or(Refusal::Other(error), Refusal::Checkpoint)),
    }
}
