//! Which bytes a disk may hold after power loss: at any moment all that a flush made durable, and of the rest any sectors.
//!
//! A flush covers the writes that had been reported complete when it came. Whatever else was handed to the disk is there or not,
//! each write by itself, in any order, or in part: sector by sector.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;

use super::content::Random;
use super::disk::{Event, Image};

const SECTOR_BYTES: usize = 512;
/// A recording is gone through again until there are as many different images as are wanted, this often at most.
const PASSES_MAX: usize = 8;

/// What a workload did to a disk.
pub struct Recording {
    /// Durable before the first event.
    pub base: Image,
    pub events: Vec<Event>,
    /// Bytes of the disk that a write changes as a whole or not at all.
    pub never_torn: Range<u64>,
}

/// How many images are made.
#[derive(Clone, Copy)]
pub struct Effort {
    /// Of one moment, at most.
    pub per_moment: usize,
    /// In all, about: then moments are left out evenly, but one image between any two flushes stays.
    pub in_all: usize,
    pub seed: u64,
}

/// What a moment of a crash holds.
struct Moment<'a> {
    durable: &'a Told,
    /// Events that are writes which may be lost.
    pending: Vec<usize>,
}

/// An image, and a number that tells its bytes from those of other images: the exclusive or of a hash of each sector and its place
/// that differs from the recording's base.
#[derive(Clone)]
struct Told {
    image: Image,
    identity: u64,
}

impl Told {
    fn write(&mut self, sector: u64, bytes: &[u8]) {
        let at = sector * SECTOR_BYTES as u64;
        let hash = |bytes: &[u8]| {
            let mut hasher = DefaultHasher::new();
            (sector, bytes).hash(&mut hasher);
            hasher.finish()
        };
        self.identity ^= hash(&self.image.read(at, SECTOR_BYTES)) ^ hash(bytes);
        self.image.write(at, bytes);
    }
}

/// What was tried of a recording.
#[derive(Debug, Default)]
pub struct Tried {
    seen: HashSet<u64>,
    /// Between which flushes a crash fell: how many had come before.
    visited: BTreeSet<usize>,
    /// So many there are.
    pub intervals: usize,
}

impl Tried {
    /// Images that differ.
    pub fn images(&self) -> usize {
        self.seen.len()
    }

    /// In how many of the intervals between flushes at least one crash fell.
    pub fn visited(&self) -> usize {
        self.visited.len()
    }
}

/// When a pass through a recording lets crashes happen, and how many images it makes of each moment.
#[derive(Clone, Copy)]
struct Pass {
    images: usize,
    /// Which kind of image comes first is another at each moment.
    by_turns: bool,
    before_flush: f64,
    before_other: f64,
}

impl Recording {
    /// Calls `check` with every image that is to be tried and the number of events before the crash, until it objects.
    ///
    /// Between any two flushes there is a crash, also where that makes more images than are wanted.
    pub fn for_each_image<E>(
        &self,
        effort: Effort,
        mut check: impl FnMut(Image, usize) -> Result<(), E>,
    ) -> Result<Tried, E> {
        let mut random = Random(effort.seed);
        let flushes = self.events.iter().filter(|event| matches!(event, Event::Flush)).count();
        let mut tried = Tried { intervals: flushes + 1, ..Tried::default() };
        let moments_in = |images: usize| (images / effort.per_moment).max(1);
        if moments_in(effort.in_all) < tried.intervals {
            let each = Pass { by_turns: true, images: 1, before_flush: 1.0, before_other: 0.0 };
            self.pass(each, effort, &mut random, &mut tried, &mut check)?;
        }
        for _ in 0..PASSES_MAX {
            let left = effort.in_all.saturating_sub(tried.images());
            if left == 0 {
                break;
            }
            // A moment before each flush is enough for what is lost; others catch what is there too early.
            let moments = moments_in(left);
            let others = moments.saturating_sub(tried.intervals);
            let drawn = Pass {
                by_turns: false,
                images: effort.per_moment,
                before_flush: (moments as f64 / tried.intervals as f64).min(1.0),
                before_other: others as f64 / self.events.len().max(1) as f64,
            };
            self.pass(drawn, effort, &mut random, &mut tried, &mut check)?;
        }
        Ok(tried)
    }

    /// Goes through the recording once.
    fn pass<E>(
        &self,
        pass: Pass,
        effort: Effort,
        random: &mut Random,
        tried: &mut Tried,
        check: &mut impl FnMut(Image, usize) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut durable = Told { image: self.base.clone(), identity: 0 };
        let mut durable_sectors: BTreeMap<u64, usize> = BTreeMap::new();
        let mut pending: BTreeMap<usize, bool> = BTreeMap::new();
        let mut interval = 0;
        // The end counts as a flush that never comes.
        for at in 0..=self.events.len() {
            let event = self.events.get(at);
            let chance = match event {
                Some(Event::Flush) | None => pass.before_flush,
                Some(_) => pass.before_other,
            };
            if event.is_none() || (random.below(1 << 20) as f64) < chance * f64::from(1 << 20) {
                let moment = Moment { durable: &durable, pending: pending.keys().copied().collect() };
                let first = if pass.by_turns { interval % effort.per_moment } else { 0 };
                let kinds = first..first + pass.images;
                tried.visited.insert(interval);
                let seen = &mut tried.seen;
                self.images_of(&moment, kinds, random, &durable_sectors, |image, identity| {
                    match seen.insert(identity) {
                        true => check(image, at),
                        false => Ok(()),
                    }
                })?;
            }
            match event {
                Some(Event::Write { .. }) => drop(pending.insert(at, false)),
                Some(Event::Done(write)) => drop(pending.get_mut(write).map(|done| *done = true)),
                Some(Event::Flush) => {
                    interval += 1;
                    let done: Vec<usize> =
                        pending.iter().filter(|(_, &done)| done).map(|(&write, _)| write).collect();
                    for write in done {
                        pending.remove(&write);
                        self.apply(&mut durable, write, &durable_sectors, |_| true);
                        for sector in self.sectors(write) {
                            durable_sectors.insert(sector, write);
                        }
                    }
                }
                None => {}
            }
        }
        Ok(())
    }

    /// None of the pending writes, all, one, all but one, then random ones, half of these torn.
    fn images_of<E>(
        &self,
        moment: &Moment<'_>,
        kinds: Range<usize>,
        random: &mut Random,
        durable_sectors: &BTreeMap<u64, usize>,
        mut image: impl FnMut(Image, u64) -> Result<(), E>,
    ) -> Result<(), E> {
        let pending = &moment.pending;
        for nth in kinds {
            let mut made = moment.durable.clone();
            let (one, torn) = match pending.len() {
                0 => (0, false),
                some => (pending[random.below(some as u64) as usize], random.below(2) == 0),
            };
            for &write in pending {
                let tear = match nth {
                    0 => Tear::Lost,
                    1 => Tear::Whole,
                    2 if write == one => Tear::Whole,
                    2 => Tear::Lost,
                    3 if write == one => Tear::Lost,
                    3 => Tear::Whole,
                    _ if torn && write == one && self.can_tear(write) => Tear::Sectors(random.next()),
                    _ if random.below(2) == 0 => Tear::Lost,
                    _ => Tear::Whole,
                };
                self.apply(&mut made, write, durable_sectors, |sector| tear.keeps(sector));
            }
            image(made.image, made.identity)?;
        }
        Ok(())
    }

    fn can_tear(&self, write: usize) -> bool {
        let Event::Write { offset, data } = &self.events[write] else { panic!("event {write} is no write") };
        self.never_torn.end <= *offset || offset + data.len() as u64 <= self.never_torn.start
    }

    fn sectors(&self, write: usize) -> impl Iterator<Item = u64> {
        let Event::Write { offset, data } = &self.events[write] else { panic!("event {write} is no write") };
        let first = offset / SECTOR_BYTES as u64;
        first..first + (data.len() / SECTOR_BYTES) as u64
    }

    /// Writes the sectors that are kept, unless a later write of them is durable.
    fn apply(
        &self,
        image: &mut Told,
        write: usize,
        durable_sectors: &BTreeMap<u64, usize>,
        keep: impl Fn(u64) -> bool,
    ) {
        let Event::Write { data, .. } = &self.events[write] else { panic!("event {write} is no write") };
        for (sector, bytes) in self.sectors(write).zip(data.chunks_exact(SECTOR_BYTES)) {
            let stale = durable_sectors.get(&sector).is_some_and(|&later| later > write);
            if keep(sector) && !stale {
                image.write(sector, bytes);
            }
        }
    }
}

/// What became of a write that was not durable.
#[derive(Clone, Copy)]
enum Tear {
    Lost,
    Whole,
    /// Of these sectors by a random number.
    Sectors(u64),
}

impl Tear {
    fn keeps(self, sector: u64) -> bool {
        match self {
            Tear::Lost => false,
            Tear::Whole => true,
            Tear::Sectors(seed) => Random(seed ^ sector).next() & 1 == 0,
        }
    }
}
