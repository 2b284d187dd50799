//! Crashes a history everywhere, lives on after some of the crashes, and counts what was covered.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use pccheck::engine::Select;
use pccheck::medium::sim::{
    for_each_crash_image, for_each_kill, EnumerateOptions, SimMedium, SimModel, SimSchedule, Trace,
};
use pccheck::medium::{Barrier, Medium};
use pccheck::recovery::Verdict;
use pccheck::save::Faults;

use crate::judge::{judge, Promises, Seen};
use crate::world::{Content, Life, Setup};

pub const MODELS: [SimModel; 3] = [SimModel::Pmem, SimModel::Ssd { torn: true }, SimModel::PageCache];

/// Multiplies the samples: for long runs.
pub fn scale() -> u64 {
    let asked = std::env::var("PCC_CRASH_SCALE").ok();
    asked.map_or(1, |asked| asked.parse().expect("PCC_CRASH_SCALE is a number"))
}

/// Seed of everything random, unless PCC_CRASH_SEED says otherwise.
pub fn seed() -> u64 {
    let asked = std::env::var("PCC_CRASH_SEED").ok();
    asked.map_or(1, |asked| asked.parse().expect("PCC_CRASH_SEED is a number"))
}

/// How far to go.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    pub images_per_point: u64,
    pub samples_per_point: u64,
    /// One image of so many is lived on after: opened by the engine, saved into, and crashed again.
    pub live_on_every: u64,
}

impl Effort {
    pub fn usual() -> Effort {
        let scale = scale();
        Effort { images_per_point: 4096 * scale, samples_per_point: 300 * scale, live_on_every: 300 }
    }

    /// For the crashes of second lives where there are many.
    pub fn small() -> Effort {
        Effort { images_per_point: 12, samples_per_point: 4 * scale(), live_on_every: u64::MAX }
    }

    /// For the crashes of second lives where there are few.
    pub fn thorough() -> Effort {
        Effort { images_per_point: 600, samples_per_point: 40 * scale(), live_on_every: u64::MAX }
    }

    pub fn options(&self, seed: u64) -> EnumerateOptions {
        EnumerateOptions {
            exhaustive_budget: 1 << 20,
            images_per_point: self.images_per_point,
            samples_per_point: self.samples_per_point,
            seed,
            count_distinct: self.live_on_every != u64::MAX,
            tear_unchanged: false,
        }
    }
}

/// What was covered.
#[derive(Debug, Default, Clone, Copy)]
pub struct Counts {
    pub points: u64,
    pub exhaustive_points: u64,
    pub images: u64,
    pub distinct: u64,
    pub fell_back: u64,
    pub second_lives: u64,
    pub second_images: u64,
}

impl Counts {
    pub fn add(&mut self, other: Counts) {
        self.points += other.points;
        self.exhaustive_points += other.exhaustive_points;
        self.images += other.images;
        self.distinct += other.distinct;
        self.fell_back += other.fell_back;
        self.second_lives += other.second_lives;
        self.second_images += other.second_images;
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Counts { points, exhaustive_points, images, distinct, fell_back, second_lives, second_images } =
            self;
        let share = 100.0 * *fell_back as f64 / (*images).max(1) as f64;
        write!(
            f,
            "seed {}: {points} points ({exhaustive_points} exhaustive), {images} images ({distinct} distinct, \
             {share:.0}% fell back), {second_lives} second lives with {second_images} images",
            seed()
        )
    }
}

/// Power is lost at every barrier of `trace`.
pub fn lose_power(setup: &Setup, trace: &Trace, effort: &Effort) -> Result<Counts, String> {
    let mut counts = Counts::default();
    let summary = for_each_crash_image(trace, &effort.options(seed()), |_, image| {
        let seen = judge(setup, image.notes(), |offset, dst| {
            image.read(offset, dst);
            Ok(())
        })?;
        let Some(seen) = seen else { return Ok(()) };
        counts.fell_back += u64::from(seen.fell_back);
        counts.images += 1;
        if counts.images % effort.live_on_every == 0 {
            counts.second_lives += 1;
            counts.second_images += live_on(setup, image.to_medium(), &seen, &Effort::small(), &[])?;
        }
        Ok(())
    })
    .map_err(|finding| finding.to_string())?;
    counts.points = summary.points;
    counts.exhaustive_points = summary.exhaustive_points;
    counts.distinct = summary.distinct.unwrap_or(0);
    Ok(counts)
}

/// The process is killed everywhere, then a new one opens the region and saves, then power is lost. One kill of
/// `every` is followed up with `effort`; `removed` barriers are missing in the new life.
pub fn kill_then_lose_power(
    setup: &Setup,
    trace: &Trace,
    (every, effort): (u64, Effort),
    removed: &[Barrier],
) -> Result<Counts, String> {
    let mut counts = Counts::default();
    let options = effort.options(seed());
    let summary = for_each_kill(trace, &options, |point, next| {
        if !Promises::of(&point.notes).watched {
            return Ok(());
        }
        let seen = judge(setup, &point.notes, |offset, dst| next.read(offset, dst))?;
        let Some(seen) = seen else { return Ok(()) };
        counts.fell_back += u64::from(seen.fell_back);
        counts.images += 1;
        if (counts.images + seed()).is_multiple_of(every) {
            counts.second_lives += 1;
            counts.second_images += live_on(setup, next, &seen, &effort, removed)?;
        }
        Ok(())
    })
    .map_err(|finding| finding.to_string())?;
    counts.points = summary.points;
    Ok(counts)
}

/// The engine opens what a crash left, shows it, saves into it; then power is lost at every barrier of that.
fn live_on(
    setup: &Setup,
    medium: SimMedium,
    seen: &Seen,
    effort: &Effort,
    removed: &[Barrier],
) -> Result<u64, String> {
    let sim = Arc::new(medium);
    removed.iter().for_each(|&barrier| sim.remove(barrier));
    let life = Life::open(&sim, setup, Faults::default()).map_err(|e| format!("opening fails: {e}"))?;
    let listed = life.store.checkpoints().map_err(|e| e.to_string())?;
    let shown: Vec<u64> = listed.iter().map(|info| info.record.generation).collect();
    let decided: Vec<u64> = seen.table.checkpoints().map(|record| record.generation).collect();
    // The store lists what it keeps; records of slots that it has freed stay readable until they are reused.
    if shown.first() != decided.first() || !shown.iter().all(|shown| decided.contains(shown)) {
        return Err(format!("the store shows {shown:?}, recovery decided on {decided:?}"));
    }
    let pins = |life: &Life| -> Result<Vec<u64>, String> {
        let listed = life.store.checkpoints().map_err(|e| e.to_string())?;
        Ok(listed.iter().filter(|info| info.pinned).map(|info| info.record.generation).collect())
    };
    let pinned = pins(&life)?;
    if let Some(&newest) = shown.first() {
        restore(&life, setup, newest)?;
    }
    let quarantined = seen.table.slots.iter().filter(|slot| slot.verdict == Verdict::Quarantined).count();
    if life.store.stats().quarantined_slots as usize != quarantined {
        return Err(format!("{quarantined} slots are quarantined, the store shows {:?}", life.store.stats()));
    }
    // A quarantined slot may leave too few to save into: repairing it is the user's way out.
    life.store.repair(None).map_err(|e| format!("repair fails: {e}"))?;
    // What is listed is kept; every other slot serves saves, whatever marks the crash left.
    let (free, slots) = (life.store.stats().claimable_slots as usize, setup.slots as usize);
    if free + shown.len() != slots {
        return Err(format!("{free} of {slots} slots serve saves, and only {shown:?} are kept"));
    }
    for _ in 0..2 {
        if life.store.stats().claimable_slots == 0 {
            // Everything is held until a step is marked; what is held must not be overwritten.
            continue;
        }
        let generation = life.save().generation;
        if generation <= seen.issued {
            return Err(format!("generation {generation} was used before: {} was issued", seen.issued));
        }
        restore(&life, setup, generation)?;
    }
    if pins(&life)? != pinned {
        return Err(format!("{pinned:?} were pinned, two saves later {:?}", pins(&life)?));
    }
    drop(life);
    lose_power(setup, &sim.trace(), effort)
        .map(|counts| counts.images)
        .map_err(|e| format!("in the life after the crash: {e}"))
}

fn restore(life: &Life, setup: &Setup, generation: u64) -> Result<(), String> {
    let opened =
        life.store.open_checkpoint(Select::Newest, true).map_err(|e| format!("restore fails: {e}"))?;
    let checkpoint = &opened.checkpoint;
    let name = checkpoint.tensors()[0].name.clone();
    let data = checkpoint.read_tensor(&name).map_err(|e| e.to_string())?;
    if checkpoint.record().generation != generation || data != Content::of(setup, generation).data {
        return Err(format!("restored {}, expected {generation}", checkpoint.record().generation));
    }
    match opened.rejected.is_empty() {
        true => Ok(()),
        false => Err(format!("passed over {:?}: a committed slot did not verify", opened.rejected)),
    }
}

/// A way to use a store, told as calls.
pub type Script = fn(&Life);

/// The protocol as it is, or with something missing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Protocol {
    pub faults: Faults,
    pub removed: Option<Barrier>,
}

/// Runs `script` on a fresh region of `model`.
pub fn run(
    setup: &Setup,
    model: SimModel,
    schedule: SimSchedule,
    script: Script,
    protocol: Protocol,
) -> Arc<SimMedium> {
    let sim = crate::world::formatted(setup, model);
    protocol.removed.into_iter().for_each(|barrier| sim.remove(barrier));
    sim.set_schedule(schedule);
    let life = Life::open(&sim, setup, protocol.faults).expect("open");
    script(&life);
    drop(life);
    sim
}

/// All that reached the medium when `script` ran.
pub fn record(setup: &Setup, model: SimModel, schedule: SimSchedule, script: Script) -> Trace {
    run(setup, model, schedule, script, Protocol::default()).trace()
}

/// Prints what a test covered, and checks that it covered something.
pub fn report(test: &str, counts: &BTreeMap<String, Counts>) {
    let mut all = Counts::default();
    for (name, counts) in counts {
        println!("{test}, {name}: {counts}");
        all.add(*counts);
    }
    println!("{test}, all: {all}");
    assert!(all.images > 0 && all.fell_back > 0, "{test} covered too little: {all}");
}
