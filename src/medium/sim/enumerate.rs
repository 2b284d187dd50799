//! Walks a trace and stops it everywhere: power lost, or the process killed.

use std::collections::HashSet;
use std::fmt;

use super::content::{mix, Content};
use super::image::{Image, Pick, PointState};
use super::replay::Replay;
use super::trace::{Event, Note, OpId, Start, Trace};
use super::SimMedium;
use crate::sync::Arc;

/// How many images to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EnumerateOptions {
    /// Images in all that exhaustive enumeration may spend over the trace.
    pub exhaustive_budget: u64,
    /// A point with at most so many distinct images is enumerated in full.
    pub images_per_point: u64,
    /// Random images at a point that is not; as many again are spent on "only one" and "all but one".
    pub samples_per_point: u64,
    /// Seed of all that is random.
    pub seed: u64,
    /// Count distinct images (reads every undecided block of every image).
    pub count_distinct: bool,
    /// On a disk that tears, a sector rewritten with the bytes that it held may tear as well. Multiplies
    /// the images, so it is off unless asked for.
    pub tear_unchanged: bool,
}

impl Default for EnumerateOptions {
    fn default() -> Self {
        EnumerateOptions {
            exhaustive_budget: 1 << 20,
            images_per_point: 1 << 12,
            samples_per_point: 256,
            seed: 1,
            count_distinct: false,
            tear_unchanged: false,
        }
    }
}

/// A moment at which the trace was stopped.
#[derive(Debug, Clone)]
pub struct Point {
    /// Index of the event before which it stops; the number of events at the end.
    pub event: usize,
    /// That event, in words.
    pub before: String,
    /// Units whose content is undecided.
    pub undecided_units: u64,
    /// Binary logarithm of the number of distinct images.
    pub log2_images: f64,
    /// Whether all of them are made.
    pub exhaustive: bool,
    /// What had been said, earlier lives of the region included.
    pub notes: Vec<Note>,
}

/// What was covered.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Summary {
    /// Points at which the trace was stopped.
    pub points: u64,
    /// Of them, those enumerated in full.
    pub exhaustive_points: u64,
    /// Images (or killed media) given to the check.
    pub images: u64,
    /// Distinct ones, if they were counted.
    pub distinct: Option<u64>,
    /// Binary logarithm of the largest number of distinct images at one point.
    pub largest_log2: f64,
}

/// A check that failed, with all that repeats it.
#[derive(Debug, Clone)]
pub struct Finding {
    /// Where the trace was stopped.
    pub point: Point,
    /// What the crash left, in words.
    pub image: String,
    /// Seed of the enumeration.
    pub seed: u64,
    /// What the check said.
    pub message: String,
    /// What had been covered, this image included.
    pub summary: Summary,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}\n  stopped before event {}: {}\n  {}\n  seed {}, image {} of the run, undecided units {}\n  notes {:?}",
            self.message,
            self.point.event,
            self.point.before,
            self.image,
            self.seed,
            self.summary.images,
            self.point.undecided_units,
            self.point.notes
        )
    }
}

impl std::error::Error for Finding {}

/// Power is lost: calls `check` with every image (or a sample of them) just before each fence and persist
/// takes effect, and at the end of the trace. These points are enough: between two of them the possible
/// images and the acknowledgements only grow.
///
/// # Errors
///
/// The first failure of `check`.
pub fn for_each_crash_image(
    trace: &Trace,
    options: &EnumerateOptions,
    mut check: impl FnMut(&Point, &Arc<Image>) -> Result<(), String>,
) -> Result<Summary, Box<Finding>> {
    let mut replay = Replay::new(trace, options.tear_unchanged);
    let mut summary = Summary::default();
    let mut seen = HashSet::new();
    let mut budget = options.exhaustive_budget;
    for event in 0..=trace.events.len() {
        let step = trace.events.get(event);
        if step.is_none_or(|step| !replay.covered_by(step).is_empty()) {
            let state = Arc::new(PointState::new(
                (trace.len_bytes, trace.model),
                replay.durable.clone(),
                replay.choices(),
                replay.notes.clone(),
                options.seed,
            ));
            let exhaustive = state.product <= options.images_per_point.min(budget);
            let point = point_at(event, step, &state, exhaustive);
            summary.points += 1;
            summary.exhaustive_points += u64::from(exhaustive);
            summary.largest_log2 = summary.largest_log2.max(state.log2);
            let picks: Box<dyn Iterator<Item = Pick>> = if exhaustive {
                budget -= state.product;
                Box::new((0..state.product).map(Pick::Combination))
            } else {
                Box::new(sampled_picks(&state, options, mix(options.seed, event as u64)))
            };
            for pick in picks {
                let image = Arc::new(Image { point: Arc::clone(&state), pick });
                summary.images += 1;
                if options.count_distinct {
                    seen.insert(image.fingerprint());
                    summary.distinct = Some(seen.len() as u64);
                }
                check(&point, &image).map_err(|message| {
                    let image = format!("{image:?}");
                    let (point, seed) = (point.clone(), options.seed);
                    Box::new(Finding { point, image, seed, message, summary })
                })?;
            }
        }
        if let Some(step) = step {
            replay.apply(step);
        }
    }
    Ok(summary)
}

fn point_at(event: usize, step: Option<&Event>, state: &PointState, exhaustive: bool) -> Point {
    Point {
        event,
        before: step.map_or_else(|| "the end".to_string(), |step| format!("{step:?}")),
        undecided_units: state.units,
        log2_images: state.log2,
        exhaustive,
        notes: state.notes.clone(),
    }
}

/// None, all, only one, all but one (of units and of blocks), then random ones.
fn sampled_picks(state: &PointState, options: &EnumerateOptions, seed: u64) -> impl Iterator<Item = Pick> {
    let (units, blocks) = (state.units, state.open.len() as u64);
    let share = (options.samples_per_point / 4).max(1);
    let some_units = move |salt: u64| some_of(units, share, mix(seed, salt));
    let some_blocks = move |salt: u64| some_of(blocks, share, mix(seed, salt)).map(|block| block as usize);
    [Pick::None, Pick::All]
        .into_iter()
        .chain(some_units(1).map(Pick::AllButUnit))
        .chain(some_blocks(2).map(Pick::AllButBlock))
        .chain(some_units(3).map(Pick::OnlyUnit))
        .chain(some_blocks(4).map(Pick::OnlyBlock))
        .chain((0..options.samples_per_point).map(move |sample| Pick::Random(mix(seed, sample + 5))))
}

/// All of `0..count` when that is at most `at_most`, else one from each of `at_most` equal parts.
fn some_of(count: u64, at_most: u64, seed: u64) -> impl Iterator<Item = u64> {
    let parts = count.min(at_most);
    (0..parts).map(move |part| {
        let from = (u128::from(count) * u128::from(part) / u128::from(parts)) as u64;
        let end = (u128::from(count) * u128::from(part + 1) / u128::from(parts)) as u64;
        from + mix(seed, part) % (end - from)
    })
}

/// What happened to the copies that were under way when a process was killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum UnderWay {
    Dropped,
    Landed,
    Prefix,
}

/// The process is killed, the machine lives: calls `check` with the medium as the next process finds it. All
/// that had completed is visible and (but on pmem) still pending, so that the next process can be made to lose
/// it; what a persist has failed on stays beyond the reach of later persists. Stops
/// before every copy, completion and effective barrier, and at the end; where copies are under way, each stop
/// comes three times: they are dropped, they land, and they land in part.
///
/// # Errors
///
/// The first failure of `check`.
pub fn for_each_kill(
    trace: &Trace,
    options: &EnumerateOptions,
    mut check: impl FnMut(&Point, SimMedium) -> Result<(), String>,
) -> Result<Summary, Box<Finding>> {
    let mut replay = Replay::new(trace, options.tear_unchanged);
    let mut summary = Summary::default();
    for event in 0..=trace.events.len() {
        let step = trace.events.get(event);
        let changes_what_is_read =
            matches!(step, None | Some(Event::Copy { .. } | Event::CopyCompleted { .. }));
        if changes_what_is_read || step.is_some_and(|step| !replay.covered_by(step).is_empty()) {
            let state = PointState::new(
                (trace.len_bytes, trace.model),
                Content::default(),
                replay.choices(),
                replay.notes.clone(),
                options.seed,
            );
            let point = point_at(event, step, &state, false);
            summary.points += 1;
            summary.largest_log2 = summary.largest_log2.max(state.log2);
            let fates: &[UnderWay] = match replay.copies_in_flight().is_empty() {
                true => &[UnderWay::Dropped],
                false => &[UnderWay::Dropped, UnderWay::Landed, UnderWay::Prefix],
            };
            for fate in fates {
                let unit_bytes = trace.model.unit_bytes() as u64;
                let landed = |op: OpId, total: u64| match fate {
                    UnderWay::Dropped => 0,
                    UnderWay::Landed => total,
                    UnderWay::Prefix => {
                        let units = mix(options.seed, op.0 << 32 | event as u64) % (total / unit_bytes);
                        units * unit_bytes
                    }
                };
                let (durable, pending) = replay.left_by_kill(landed);
                let start = Start { durable, pending, notes: replay.notes.clone() };
                summary.images += 1;
                check(&point, SimMedium::begin(trace.len_bytes, trace.model, start)).map_err(|message| {
                    let image = format!("process killed, copies under way: {fate:?}");
                    let (point, seed) = (point.clone(), options.seed);
                    Box::new(Finding { point, image, seed, message, summary })
                })?;
            }
        }
        if let Some(step) = step {
            replay.apply(step);
        }
    }
    Ok(summary)
}
