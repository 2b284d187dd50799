//! What must be found on a disk after a crash.

use std::fmt;

use pccheck::engine::{format_region, Select, Store};
use pccheck::recovery::Verdict;
use pccheck::store::{FormatOptions, OpenOptions};
use pccheck::{Error, ErrorKind};

use super::common::WAIT;
use super::content;
use super::disk::{Disk, Image};
use super::life::{save, Life};
use super::volume::Volume;

/// Of a save in a second life; larger than any of the first.
const LATER_STEP: u64 = 1_000_000;

/// What is wrong with an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// What had been reported durable is not there.
    Lost,
    /// What is listed is not what was saved, or never should be.
    Wrong,
    /// It could not be judged: a tool or a call failed that has nothing to do with what is there. No planted fault is shown by it.
    Failed,
}

#[derive(Debug)]
pub struct Finding {
    pub kind: Kind,
    text: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.kind, self.text)
    }
}

impl Kind {
    fn says(self, text: impl Into<String>) -> Finding {
        Finding { kind: self, text: text.into() }
    }
}

/// Reading found other bytes than were written, or could not read at all.
fn wrong_or_failed(about: &str, error: &Error) -> Finding {
    let kind = match error.kind() {
        ErrorKind::Corrupt => Kind::Wrong,
        _ => Kind::Failed,
    };
    kind.says(format!("{about}: {error}"))
}

/// A checkpoint that is listed.
#[derive(Debug, Clone, Copy)]
struct Found {
    generation: u64,
    step: u64,
    pinned: bool,
}

/// Holds every listed checkpoint against what its step must have saved. Newest first.
fn check_all(store: &Store) -> Result<Vec<Found>, Finding> {
    let listed = store.checkpoints().map_err(|error| wrong_or_failed("list", &error))?;
    let mut found = Vec::with_capacity(listed.len());
    for info in &listed {
        let (generation, step) = (info.record.generation, info.record.step);
        let about = format!("generation {generation}");
        let opened = store.open_checkpoint(Select::Generation(generation), true);
        let opened = opened.map_err(|error| wrong_or_failed(&about, &error))?;
        content::check(&opened.checkpoint).map_err(|what| Kind::Wrong.says(format!("{about}: {what}")))?;
        found.push(Found { generation, step, pinned: info.pinned });
    }
    Ok(found)
}

/// A disk on which images are tried.
pub struct Judge<'a> {
    life: &'a Life,
    disk: Disk,
    /// Every so many images live on: they are saved into.
    live_on_every: usize,
    tried: usize,
    /// Images in which opening passed over a save that had not committed, or a record that it rejected, newer than all that it lists.
    pub fell_back: usize,
    /// Images in which there was no region yet.
    pub none: usize,
    /// Images that did not give the newest save that had begun.
    pub behind: usize,
}

impl<'a> Judge<'a> {
    pub fn new(life: &'a Life, live_on_every: usize) -> Judge<'a> {
        let disk = Disk::new(life.format.disk_bytes());
        Judge { life, disk, live_on_every, tried: 0, fell_back: 0, none: 0, behind: 0 }
    }

    /// What must hold of an image after a crash before event `at`.
    pub fn check(&mut self, image: Image, at: usize) -> Result<(), Finding> {
        self.check_image(image, at).map_err(|Finding { kind, text }| {
            kind.says(format!("crash before event {at} of {}: {text}", self.life.recording.events.len()))
        })
    }

    fn check_image(&mut self, image: Image, at: usize) -> Result<(), Finding> {
        self.disk.put(image);
        let volume =
            Volume::open(self.life.format, self.disk.path()).map_err(|what| Kind::Failed.says(what))?;
        let opened = self.open(&volume, at)?;
        let is_there = opened.is_some();
        let found = match opened {
            Some(store) => {
                let found = check_all(&store)?;
                let newest = found.first().map_or(0, |found| found.generation);
                self.fell_back += usize::from(passed_over(&store, newest));
                found
            }
            None => {
                self.none += 1;
                Vec::new()
            }
        };
        self.check_found(&found, at)?;
        let newest_begun =
            self.life.begun.iter().filter(|&&(events, _)| events <= at).map(|&(_, step)| step).max();
        self.behind += usize::from(found.first().map(|found| found.step) != newest_begun);
        self.tried += 1;
        if self.tried.is_multiple_of(self.live_on_every) {
            self.live_on(&volume, is_there, found.first().map_or(0, |found| found.generation))?;
        }
        Ok(())
    }

    /// None where there is no region, and need not be one yet.
    fn open(&self, volume: &Volume, at: usize) -> Result<Option<Store>, Finding> {
        let options = self.life.shape.options(self.life.way);
        let reader = OpenOptions { read_only: true, ..options };
        Store::open(&volume.region(), &reader).map(Some).or_else(|error| match error.kind() {
            // Corrupt: a superblock of which some sectors came.
            ErrorKind::NotFound | ErrorKind::NotARegion | ErrorKind::Corrupt => {
                match at < self.life.formatted {
                    true => Ok(None),
                    false => {
                        Err(Kind::Lost.says(format!("the region had been reported to be there: {error}")))
                    }
                }
            }
            _ => Err(Kind::Failed.says(format!("open: {error}"))),
        })
    }

    fn check_found(&self, found: &[Found], at: usize) -> Result<(), Finding> {
        let Life { begun, durable, cancelled, pins, shape, .. } = self.life;
        let known = |step: u64| begun.iter().any(|&(events, begun)| begun == step && events <= at);
        for &Found { generation, step, .. } in found {
            if !known(step) {
                return Err(Kind::Wrong.says(format!("generation {generation} of step {step} had not begun")));
            }
            if cancelled.contains(&generation) {
                return Err(Kind::Wrong.says(format!("generation {generation} was reported cancelled")));
            }
        }
        let pinned = |generation: u64| {
            pins.iter().any(|pin| pin.generation == generation && (pin.from..=pin.until).contains(&at))
        };
        if let Some(lost) = found.iter().find(|found| pinned(found.generation) && !found.pinned) {
            return Err(Kind::Lost.says(format!("the pin of generation {}", lost.generation)));
        }
        for &(_, durable) in durable.iter().filter(|&&(events, _)| events <= at) {
            let is_there = found.iter().any(|found| found.generation == durable);
            let newer = found.iter().filter(|found| found.generation > durable).count();
            if !is_there && (newer < shape.keep as usize || pinned(durable)) {
                return Err(Kind::Lost.says(format!(
                    "generation {durable} was reported durable, {} are kept, found {found:?}",
                    shape.keep
                )));
            }
        }
        Ok(())
    }

    /// The next process opens the region, or makes it, and saves into it.
    fn live_on(&self, volume: &Volume, is_there: bool, newest: u64) -> Result<(), Finding> {
        let failed = |about: &str, error: Error| Kind::Failed.says(format!("{about}: {error}"));
        let Life { shape, way, .. } = self.life;
        if !is_there {
            let over = FormatOptions { force: true, ..shape.format(*way) };
            format_region(&volume.region(), &over).map_err(|error| failed("format", error))?;
        }
        let store = Store::open(&volume.region(), &shape.options(*way))
            .map_err(|error| failed("open for writing", error))?;
        let durable = save(&store, LATER_STEP, WAIT)
            .and_then(|save| save.wait_durable(WAIT))
            .map_err(|error| failed("save", error))?;
        if durable.generation <= newest {
            return Err(Kind::Wrong.says(format!("generation {} after {newest}", durable.generation)));
        }
        match check_all(&store)?.first() {
            Some(&Found { step: LATER_STEP, .. }) => Ok(()),
            other => Err(Kind::Lost.says(format!("saved step {LATER_STEP}, the newest is {other:?}"))),
        }
    }
}

/// Whether what opening found holds more than what it lists: a save newer than all of that, or a record of unknown age.
fn passed_over(store: &Store, newest: u64) -> bool {
    store.recovered().slots.iter().any(|slot| match slot.verdict {
        Verdict::Writing => slot.record.as_ref().is_some_and(|record| record.generation > newest),
        Verdict::Rejected(_) => true,
        _ => false,
    })
}
