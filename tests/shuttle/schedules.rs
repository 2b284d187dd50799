//! Runs a scenario under many schedules, and says how to run the one that fails again.

use std::cell::{Cell, RefCell};
use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::sync::{Arc, Once};
use std::time::Instant;

use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::{Config, FailurePersistence, MaxSteps, Runner};

/// Schedules that share one seed. The first of PCT's is needed to learn how long a schedule is.
const BATCH: u64 = 25;
/// Preemptions of PCT's schedules, in turn.
const DEPTHS: [usize; 4] = [2, 3, 5, 9];
/// A thread that fills the engine's buffers on its stack needs more than shuttle's default.
const STACK_BYTES: usize = 256 << 10;
/// Hundreds of times as many as a scenario takes: what needs more makes no progress.
const STEPS_MAX: usize = 3_000_000;

fn number(name: &str, default: u64) -> u64 {
    let asked = std::env::var(name).ok();
    asked.map_or(default, |asked| asked.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

thread_local! {
    /// The batch that runs on this thread.
    static BATCH_NOW: RefCell<String> = const { RefCell::new(String::new()) };
    /// The first panic of this schedule, also of the engine's threads, which survive theirs.
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
    /// A planted fault is looked for: what it says is not news.
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Before shuttle's own hook, which calls this one.
fn install_hook() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANIC.with_borrow_mut(|first| first.get_or_insert_with(|| info.to_string()).len());
            if !QUIET.get() {
                BATCH_NOW.with_borrow(|batch| eprintln!("{batch}"));
                before(info);
            }
        }));
    });
}

/// What the schedules came to.
#[derive(Default)]
struct Tally {
    schedules: u64,
    switches: u64,
}

fn run<S: Scheduler + 'static>(scheduler: S, scenario: &Arc<impl Fn() + Send + Sync + 'static>) -> Tally {
    let mut config = Config::new();
    config.stack_size = STACK_BYTES;
    config.failure_persistence = FailurePersistence::None;
    config.max_steps = MaxSteps::FailAfter(STEPS_MAX);
    config.silence_warnings = true;
    let switches = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let (counted, scenario) = (switches.clone(), scenario.clone());
    let schedules = Runner::new(scheduler, config).run(move || {
        PANIC.take();
        scenario();
        counted.fetch_add(shuttle::current::context_switches() as u64, std::sync::atomic::Ordering::Relaxed);
        if let Some(panic) = PANIC.take() {
            panic!("a thread of the engine panicked: {panic}");
        }
    });
    Tally { schedules: schedules as u64, switches: switches.load(std::sync::atomic::Ordering::Relaxed) }
}

/// Once, in no particular schedule: what scenarios have in common.
pub fn prepare(work: impl Fn() + Send + Sync + 'static) {
    install_hook();
    run(RandomScheduler::new_from_seed(0, 1), &Arc::new(work));
}

/// Random and PCT schedules in turn; `each` of either. Panics at the first that fails.
fn schedules(name: &str, each: u64, scenario: impl Fn() + Send + Sync + 'static) -> Tally {
    install_hook();
    let scenario = Arc::new(scenario);
    let mut tally = Tally::default();
    let first = number("PCC_SHUTTLE_SEED", 1);
    for batch in 0..each.div_ceil(BATCH) {
        let seed = first.wrapping_add(batch);
        let count = BATCH.min(each - batch * BATCH);
        let depth = DEPTHS[(seed % DEPTHS.len() as u64) as usize];
        BATCH_NOW.set(format!(
            "again: PCC_SHUTTLE_SEED={seed} PCC_SHUTTLE_ITERATIONS={count} scripts/shuttle --only {name}"
        ));
        for part in [
            run(RandomScheduler::new_from_seed(seed, count as usize), &scenario),
            run(PctScheduler::new_from_seed(seed, depth, count as usize), &scenario),
        ] {
            tally.schedules += part.schedules;
            tally.switches += part.switches;
        }
    }
    tally
}

/// The scenario must hold in every schedule.
pub fn explore(name: &str, scenario: impl Fn() + Send + Sync + 'static) {
    let began = Instant::now();
    let tally = schedules(name, number("PCC_SHUTTLE_ITERATIONS", 500), scenario);
    println!(
        "shuttle: {name}: {} schedules, {} switches each, {:.1} s",
        tally.schedules,
        tally.switches / tally.schedules.max(1),
        began.elapsed().as_secs_f64()
    );
}

/// The scenario must fail in one of at most `each` schedules of either kind, with one of these words.
pub fn must_fail(name: &str, each: u64, words: &[&str], scenario: impl Fn() + Send + Sync + 'static) {
    let tried = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let counted = tried.clone();
    QUIET.set(true);
    let found = catch_unwind(AssertUnwindSafe(|| {
        schedules(name, each, move || {
            counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            scenario();
        })
    }));
    QUIET.set(false);
    let tried = tried.load(std::sync::atomic::Ordering::Relaxed);
    let Err(panic) = found else { panic!("{name}: not found in {tried} schedules") };
    let said = panic.downcast_ref::<String>().cloned();
    let said = said.or_else(|| panic.downcast_ref::<&str>().map(|said| said.to_string()));
    let Some(said) = said else { resume_unwind(panic) };
    assert!(words.iter().any(|word| said.contains(word)), "{name}: something else was found: {said}");
    println!("shuttle: {name}: found in schedule {tried}: {}", said.lines().next().unwrap_or_default());
}
