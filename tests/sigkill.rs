//! Prevents: a checkpoint that was reported durable and is gone, or is wrong, after the process was killed; and a
//! region that cannot be opened any more. Real processes save without pause, on a real disk, and are killed at
//! random moments, also while they open and recover; every region lives through all of its kills.

#[path = "sigkill/child.rs"]
mod child;
mod common;
#[path = "sigkill/content.rs"]
mod content;
#[path = "sigkill/reports.rs"]
mod reports;

use std::collections::BTreeSet;
use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use child::{Orders, Way};
use common::scratch;
use content::Random;
use pccheck::engine::{format_region, Store};
use pccheck::store::{FormatOptions, OpenOptions};
use reports::{Known, Said};

/// Unless [`ENV_KILLS`] says otherwise.
const KILLS: usize = 200;
const MOST_IN_FLIGHT: u32 = 4;
const MOST_KEPT: u32 = 2;
/// One to spare: what was committed stays readable a little longer than it must.
const SLOTS: u32 = MOST_IN_FLIGHT + MOST_KEPT + 1;
/// A child is killed at most this long after it is ready.
const LONGEST_LIFE_US: u64 = 40_000;
/// Every so many kills hit opening and recovery instead, at most this long after it began.
const KILL_OPENING_EVERY: usize = 8;
const LONGEST_OPENING_US: u64 = 6_000;
/// Steps that one child may use.
const STEPS_PER_CHILD: u64 = 1_000_000;
/// The lock of a killed process must be free after this long.
const LOCK_WAIT: Duration = Duration::from_secs(5);
const ENV_KILLS: &str = "PCC_SIGKILL_KILLS";
/// Set to a number that a failed run printed, to repeat its kill moments.
const ENV_SEED: &str = "PCC_SIGKILL_SEED";

/// The child's body: a test that does nothing unless this process was started by [`run_child`].
#[test]
fn child_process() {
    child::run_if_child();
}

/// A region, and all that is known of it from its children's reports.
struct History {
    path: PathBuf,
    way: Way,
    known: Known,
}

#[derive(Default, Debug)]
struct Totals {
    kills: usize,
    saves: usize,
    durable: usize,
    in_opening: usize,
    most_lost_steps: u64,
    longest_open: Duration,
    paths: BTreeSet<String>,
}

impl History {
    fn new(dir: &Path, way: Way, members: usize) -> History {
        let name = |index: usize| dir.join(format!("{way:?} over {members}, {index}"));
        let path = name(0);
        let format = FormatOptions {
            stripe: (1..members).map(name).collect(),
            stripe_unit_bytes: 2 << 20,
            ..FormatOptions::new(SLOTS, content::PAYLOAD_BYTES)
        };
        format_region(&path, &format).expect("format");
        History { path, way, known: Known::default() }
    }

    fn orders(&self, nth: usize) -> Orders {
        Orders {
            region: self.path.clone(),
            way: self.way,
            in_flight: 1 + nth as u32 % MOST_IN_FLIGHT,
            keep: 1 + nth as u32 / MOST_IN_FLIGHT % MOST_KEPT,
            first_step: (nth as u64 + 1) * STEPS_PER_CHILD,
            lie: false,
        }
    }

    /// One child, one kill, one check.
    fn round(
        &mut self,
        nth: usize,
        orders: &Orders,
        random: &mut Random,
        totals: &mut Totals,
    ) -> Result<(), String> {
        let in_opening = nth % KILL_OPENING_EVERY == KILL_OPENING_EVERY - 1;
        let (after, life_us) = match in_opening {
            true => ("opening", random.below(LONGEST_OPENING_US)),
            false => ("ready", random.below(LONGEST_LIFE_US)),
        };
        let said = run_child(orders, after, Duration::from_micros(life_us))?;
        totals.kills += 1;
        totals.in_opening += usize::from(in_opening);
        totals.saves += said.issued.len();
        totals.durable += said.durable.len();
        totals.paths.insert(said.path.clone());
        self.known.learn(&said)?;
        let open_began = Instant::now();
        let newest_step = self.check(orders, &said)?;
        totals.longest_open = totals.longest_open.max(open_began.elapsed());
        if let (Some(last), Some(first)) = (said.began.last(), said.began.first()) {
            let lost = last - newest_step.unwrap_or(0).clamp(first - 1, *last);
            totals.most_lost_steps = totals.most_lost_steps.max(lost);
        }
        Ok(())
    }

    /// Opens the region as any other process would, then as its next writer. Returns the step of the newest.
    fn check(&mut self, orders: &Orders, said: &Said) -> Result<Option<u64>, String> {
        let options = self.way.options(orders.in_flight, orders.keep);
        let reader = OpenOptions { read_only: true, ..options.clone() };
        let store = Store::open(&self.path, &reader).map_err(|error| format!("open read-only: {error}"))?;
        let listed = self.check_listed(&store)?;
        self.known.check_durable(&listed, orders.keep, said)?;
        for decision in &store.recovered().slots {
            let recorded = decision.record.as_ref().map_or(0, |record| record.generation);
            self.known.used_up_to = self.known.used_up_to.max(recorded);
        }
        drop(store);

        let writer = OpenOptions { lock_wait: Some(LOCK_WAIT), ..options };
        let store = Store::open(&self.path, &writer).map_err(|error| format!("open for writing: {error}"))?;
        let kept = self.check_listed(&store)?;
        let newest = &listed[..listed.len().min(orders.keep as usize)];
        if kept != newest {
            return Err(format!("a reader saw {listed:?}, the next writer keeps {kept:?}"));
        }
        Ok(listed.first().map(|&(_, step)| step))
    }

    /// Every listed checkpoint must be one that was begun, and hold exactly what it must. Generation and step, newest first.
    fn check_listed(&mut self, store: &Store) -> Result<Vec<(u64, u64)>, String> {
        let listed = content::check_all(store)?;
        self.known.check_listed(&listed)?;
        Ok(listed)
    }
}

/// Starts a child and kills it `life` after it has said `after`. Returns all that it said.
fn run_child(orders: &Orders, after: &str, life: Duration) -> Result<Said, String> {
    let mut command = Command::new(env::current_exe().expect("this program"));
    command.args(["--exact", "child_process", "--nocapture", "--test-threads=1"]).envs(orders.to_env());
    reports::run_and_kill(&mut command, after, life)
}

fn given<T: FromStr>(name: &str) -> Option<T> {
    env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text:?} is no number")))
}

fn seed() -> u64 {
    given(ENV_SEED).unwrap_or_else(|| {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_nanos() as u64)
    })
}

fn kill_often(dir: &Path, (way, members): (Way, usize), kills: usize, seed: u64) -> Totals {
    let mut history = History::new(dir, way, members);
    let mut random = Random(seed ^ way as u64);
    let mut totals = Totals::default();
    for nth in 0..kills {
        let orders = history.orders(nth);
        if let Err(what) = history.round(nth, &orders, &mut random, &mut totals) {
            panic!("kill {nth} on {way:?} with {orders:?}, {ENV_SEED}={seed}: {what}");
        }
    }
    totals
}

#[test]
fn kills_lose_nothing_durable() {
    let (dir, seed, wanted) = (scratch(), seed(), given(ENV_KILLS).unwrap_or(KILLS));
    let began = Instant::now();
    let all: Vec<Totals> = thread::scope(|scope| {
        let ways = Way::ALL.into_iter().enumerate();
        let runs: Vec<_> = ways
            .map(|(index, way)| {
                let kills = (wanted + Way::ALL.len() - 1 - index) / Way::ALL.len();
                let dir = dir.path();
                scope.spawn(move || kill_often(dir, (way, 1), kills, seed))
            })
            .collect();
        runs.into_iter()
            .map(|run| run.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    let sum = |of: fn(&Totals) -> usize| all.iter().map(of).sum::<usize>();
    let (kills, durable) = (sum(|totals| totals.kills), sum(|totals| totals.durable));
    println!(
        "{kills} kills ({} while opening), {} saves begun, {durable} reported durable, at most {} steps lost by a kill, \
         checked within {:?}, {:?}, {ENV_SEED}={seed}, {:?}",
        sum(|totals| totals.in_opening),
        sum(|totals| totals.saves),
        all.iter().map(|totals| totals.most_lost_steps).max().unwrap_or(0),
        all.iter().map(|totals| totals.longest_open).max().unwrap_or_default(),
        all.iter().flat_map(|totals| &totals.paths).filter(|path| !path.is_empty()).collect::<BTreeSet<_>>(),
        began.elapsed(),
    );
    assert_eq!(kills, wanted);
    assert!(
        durable > 2 * kills,
        "only {durable} saves became durable: the kills came too early to test anything"
    );
}

#[test]
fn kills_of_a_striped_region_lose_nothing_durable() {
    const KILLS_EACH: usize = 24;
    let (dir, seed) = (scratch(), seed());
    for (way, members) in [(Way::Uring, 2), (Way::Threads, 3), (Way::Mmap, 2)] {
        let totals = kill_often(dir.path(), (way, members), KILLS_EACH, seed);
        println!("{way:?} over {members}: {totals:?}, {ENV_SEED}={seed}");
        assert_eq!(totals.kills, KILLS_EACH);
        assert!(totals.durable > totals.kills, "{way:?}: the kills came too early to test anything");
    }
}

/// The check itself can fail: a child that reports saves durable and has written nothing is found out.
#[test]
fn a_child_that_lies_about_durability_is_caught() {
    const MOST_KILLS: usize = 50;
    let (dir, seed) = (scratch(), seed());
    let mut history = History::new(dir.path(), Way::Threads, 1);
    let mut random = Random(seed);
    let caught = (0..MOST_KILLS).find_map(|nth| {
        let orders = Orders { lie: true, ..history.orders(nth) };
        let round = history.round(0, &orders, &mut random, &mut Totals::default());
        round.err()
    });
    let what = caught.unwrap_or_else(|| panic!("not caught in {MOST_KILLS} kills, {ENV_SEED}={seed}"));
    assert!(what.contains("was reported durable"), "caught for the wrong reason: {what}");
}
