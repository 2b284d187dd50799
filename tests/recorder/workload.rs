//! Real saves into a region on a recorded disk, and what must be found on the disk after a crash.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pccheck::engine::{format_region, Store};
use pccheck::medium::{open_medium, Barrier, Io, Medium, MediumInfo, MediumMemory, MediumOptions};
use pccheck::save::{Faults, Save};
use pccheck::store::{FormatOptions, OpenOptions};

use super::child::Way;
use super::common::{save_bytes, WAIT};
use super::content::{self, Random};
use super::crashes::Recording;
use super::disk::{Disk, Image};
use super::volume::{Format, Volume};

const SLOTS: u32 = 6;
const IN_FLIGHT: u32 = 3;
const KEEP: u32 = 2;
/// Every so many saves one is cancelled as soon as it is copied.
const CANCEL_EVERY: u64 = 7;
/// Of a save in a second life; larger than any of the first.
const LATER_STEP: u64 = 1_000_000;

/// How the protocol is to be broken, for the checker's own sake.
#[derive(Clone, Copy, Default)]
pub struct Protocol {
    /// This barrier does nothing.
    pub removed: Option<Barrier>,
    pub faults: Faults,
}

/// A medium without one of its barriers.
struct Without {
    medium: Arc<dyn Medium>,
    removed: Barrier,
}

impl Medium for Without {
    fn info(&self) -> MediumInfo {
        self.medium.info()
    }

    fn len_bytes(&self) -> u64 {
        self.medium.len_bytes()
    }

    fn read(&self, offset: u64, dst: &mut [u8]) -> pccheck::Result<()> {
        self.medium.read(offset, dst)
    }

    fn start(&self, io: Io) {
        self.medium.start(io);
    }

    fn copy(&self, offset: u64, src: &[u8]) -> pccheck::Result<()> {
        self.medium.copy(offset, src)
    }

    fn fence(&self, barrier: Barrier) -> pccheck::Result<()> {
        self.medium.fence(barrier)
    }

    fn persist(&self, offset: u64, len: u64, barrier: Barrier) -> pccheck::Result<()> {
        match barrier == self.removed {
            true => Ok(()),
            false => self.medium.persist(offset, len, barrier),
        }
    }

    fn persist_ranges(&self, ranges: &[(u64, u64)], barrier: Barrier) -> pccheck::Result<()> {
        match barrier == self.removed {
            true => Ok(()),
            false => self.medium.persist_ranges(ranges, barrier),
        }
    }

    fn memory(&self) -> Option<&dyn MediumMemory> {
        self.medium.memory()
    }

    fn write_durable(&self, offset: u64, block: &[u8], barrier: Barrier) -> pccheck::Result<()> {
        match barrier == self.removed {
            true => self.medium.copy(offset, block),
            false => self.medium.write_durable(offset, block, barrier),
        }
    }
}

fn open(region: &Path, way: Way, protocol: Protocol) -> pccheck::Result<Store> {
    let options = way.options(IN_FLIGHT, KEEP);
    let Protocol { removed, faults } = protocol;
    if removed.is_none() && faults == Faults::default() {
        return Store::open(region, &options);
    }
    let medium = open_medium(
        region,
        &MediumOptions { kind: options.medium, backend: options.backend, ..MediumOptions::default() },
        None,
    )?;
    let medium = match removed {
        Some(removed) => Arc::new(Without { medium, removed }),
        None => medium,
    };
    Store::open_on(medium, &options, faults)
}

/// A life of a region: what came to the disk, and what was known when.
pub struct Life {
    pub recording: Recording,
    format: Format,
    way: Way,
    /// Events before each save began, and its step.
    begun: Vec<(usize, u64)>,
    /// Events before each save was reported durable, and its generation.
    durable: Vec<(usize, u64)>,
}

/// Saves so many times, several at once.
pub fn live(format: Format, way: Way, protocol: Protocol, saves: u64, seed: u64) -> Life {
    let disk = Disk::new(format.disk_bytes());
    let volume = Volume::make(format, disk.path());
    let options = FormatOptions {
        medium: way.options(1, 1).medium,
        ..FormatOptions::new(SLOTS, content::PAYLOAD_BYTES)
    };
    format_region(&volume.region(), &options).expect("format");
    let store = open(&volume.region(), way, protocol).expect("open");
    let mut begun = vec![(0, 0)];
    let first = save(&store, 0).wait_durable(WAIT).expect("the first save");
    let durable = Arc::new(Mutex::new(vec![(0, first.generation)]));
    volume.sync();
    let disk = Arc::new(disk);
    let base = disk.record();
    let mut random = Random(seed);
    let mut running: Vec<Arc<Save>> = Vec::new();
    for step in 1..=saves {
        begun.push((disk.position(), step));
        let save = Arc::new(save(&store, step));
        if step % CANCEL_EVERY == 0 {
            save.cancel();
        } else {
            let (ended, durable, disk) = (save.clone(), durable.clone(), disk.clone());
            save.on_end(Box::new(move || {
                let outcome = ended.wait_durable(Some(Duration::ZERO)).expect("durable");
                let mark = (disk.position(), outcome.generation);
                durable.lock().unwrap_or_else(PoisonError::into_inner).push(mark);
            }));
        }
        running.push(save);
        // Sometimes several are in flight, sometimes one.
        if random.below(3) == 0 {
            for save in running.drain(..) {
                let _ = save.wait_durable(WAIT);
            }
        }
    }
    for save in running.drain(..) {
        let _ = save.wait_durable(WAIT);
    }
    // Its threads end: every save has told by then.
    drop(store);
    let recording = Recording { base, events: disk.events() };
    drop(volume);
    let durable = durable.lock().unwrap_or_else(PoisonError::into_inner).clone();
    Life { recording, format, way, begun, durable }
}

fn save(store: &Store, step: u64) -> Save {
    save_bytes(store, step, &content::tensors_of(step), &[("step", &step.to_string())]).expect("begin a save")
}

/// A disk on which images are tried.
pub struct Judge<'a> {
    life: &'a Life,
    disk: Disk,
    /// Every so many images live on: they are saved into.
    live_on_every: usize,
    pub tried: usize,
    /// Images that did not give the newest save that had begun.
    pub fell_back: usize,
}

impl<'a> Judge<'a> {
    pub fn new(life: &'a Life, live_on_every: usize) -> Judge<'a> {
        let disk = Disk::new(life.format.disk_bytes());
        Judge { life, disk, live_on_every, tried: 0, fell_back: 0 }
    }

    /// What must hold of an image after a crash before event `at`.
    pub fn check(&mut self, image: Image, at: usize) -> Result<(), String> {
        self.disk.put(image);
        let volume = Volume::open(self.life.format, self.disk.path())?;
        let reader = OpenOptions { read_only: true, ..self.life.way.options(IN_FLIGHT, KEEP) };
        let store = Store::open(&volume.region(), &reader).map_err(|error| format!("open: {error}"))?;
        let found = content::check_all(&store)?;
        let known = |step: u64| self.life.begun.iter().any(|&(events, begun)| begun == step && events <= at);
        if let Some((generation, step)) = found.iter().find(|&&(_, step)| !known(step)) {
            return Err(format!("generation {generation} of step {step} had not begun"));
        }
        let newest = found.first().map_or(0, |&(generation, _)| generation);
        for &(_, durable) in self.life.durable.iter().filter(|&&(events, _)| events <= at) {
            let is_there = found.iter().any(|&(generation, _)| generation == durable);
            let newer = found.iter().filter(|&&(generation, _)| generation > durable).count();
            if !is_there && newer < KEEP as usize {
                return Err(format!(
                    "generation {durable} was reported durable, {KEEP} are kept, found {found:?}"
                ));
            }
        }
        let newest_begun =
            self.life.begun.iter().filter(|&&(events, _)| events <= at).map(|&(_, step)| step).max();
        self.fell_back += usize::from(found.first().map(|&(_, step)| step) != newest_begun);
        drop(store);
        self.tried += 1;
        if self.tried.is_multiple_of(self.live_on_every) {
            self.live_on(&volume, newest)?;
        }
        Ok(())
    }

    /// The next process opens the region and saves into it.
    fn live_on(&self, volume: &Volume, newest: u64) -> Result<(), String> {
        let store = open(&volume.region(), self.life.way, Protocol::default())
            .map_err(|error| format!("open for writing: {error}"))?;
        let durable =
            save(&store, LATER_STEP).wait_durable(WAIT).map_err(|error| format!("save: {error}"))?;
        if durable.generation <= newest {
            return Err(format!("generation {} after {newest}", durable.generation));
        }
        let found = content::check_all(&store)?;
        match found.first() {
            Some(&(_, LATER_STEP)) => Ok(()),
            other => Err(format!("saved step {LATER_STEP}, the newest is {other:?}")),
        }
    }
}
