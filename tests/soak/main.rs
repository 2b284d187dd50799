//! Prevents: what only shows after hours, or when everything happens at once. Regions of random shape, over one file or several or
//! on a disk that fails now and then, live through savers that are killed, stopped or left to end, beside readers and exports; they
//! pin, cancel and repair. After each life all that was reported durable must be there, and whole.
//!
//! `scripts/soak --minutes 60` runs it for so long; without, it runs for some seconds. Needs root and /dev/fuse for the disk.

mod beside;
#[path = "../common/mod.rs"]
mod common;
#[path = "../sigkill/content.rs"]
mod content;
#[path = "../disk/mod.rs"]
#[allow(dead_code, reason = "nothing is recorded here")]
mod disk;
mod life;
#[path = "../sigkill/reports.rs"]
#[allow(dead_code, reason = "savers are ended in more ways than one")]
mod reports;
mod saver;
mod shape;
mod totals;

use std::env;
use std::str::FromStr;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use content::Random;
use life::Life;
use shape::{Planted, Shape};
use totals::Totals;

/// Unless `PCC_SOAK_SECONDS` says otherwise.
const SECONDS: u64 = 8;
/// Lives of one region.
const LIVES: u64 = 6;
/// Set to a file: the totals are written there as JSON.
const ENV_JSON: &str = "PCC_SOAK_JSON";

/// The body of a saver: a test that does nothing unless this process was started as one.
#[test]
fn saver_process() {
    saver::run_if_saver();
}

fn given<T: FromStr>(name: &str) -> Option<T> {
    env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text:?} is no number")))
}

fn now_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_nanos() as u64)
}

/// One region after the other until the time is up.
fn soak(
    lasts: Duration,
    seed: u64,
    shape_of: fn(&mut Random) -> Shape,
    totals: &mut Totals,
) -> Result<(), String> {
    let (began, mut random) = (Instant::now(), Random(seed));
    let progress = totals::Progress::new(lasts);
    let mut outcome = Ok(());
    while outcome.is_ok() && (began.elapsed() < lasts || totals.regions == 0) {
        let mut life = Life::new(shape_of(&mut random));
        totals.regions += 1;
        totals.on_failing_disks += u64::from(life.shape().fails);
        for nth in 0..LIVES {
            outcome = life
                .live(nth, &mut random, totals)
                .map_err(|what| format!("life {nth} of {:?}, PCC_SOAK_SEED={seed}: {what}", life.shape()));
            progress.show(totals);
            if outcome.is_err() || began.elapsed() >= lasts {
                break;
            }
        }
    }
    progress.end();
    totals.seconds = began.elapsed().as_secs();
    outcome
}

#[test]
fn whatever_happens_nothing_is_lost() {
    let seed = given("PCC_SOAK_SEED").unwrap_or_else(now_ns);
    let lasts = Duration::from_secs(given("PCC_SOAK_SECONDS").unwrap_or(SECONDS));
    let mut totals = Totals::new(seed);
    let outcome = soak(lasts, seed, Shape::random, &mut totals);
    totals.losses = u64::from(outcome.is_err());
    println!("{}", totals.table());
    if let Some(path) = env::var_os(ENV_JSON) {
        std::fs::write(&path, totals.json()).expect("write the totals");
    }
    outcome.unwrap_or_else(|what| panic!("{what}"));
    // The last one may have had no time to.
    assert!(totals.on_failing_disks < 2 || totals.faults_met > 0, "the disks did not fail");
    assert!(totals.durable > 0 && totals.verified_bytes > 0 && totals.exports > 0, "nothing was tested");
}

/// The soak can fail, and says why.
fn is_caught(shape_of: fn(&mut Random) -> Shape, why: &str) {
    let mut totals = Totals::new(1);
    let what = soak(Duration::from_secs(20), 1, shape_of, &mut totals).expect_err("not caught");
    assert!(what.contains(why), "caught for another reason: {what}");
}

fn planted(what: Planted, random: &mut Random) -> Shape {
    Shape { planted: Some(what), fails: false, ..Shape::random(random) }
}

#[test]
fn savers_that_report_what_they_never_wrote_are_caught() {
    is_caught(|random| planted(Planted::Lies, random), "was reported durable");
}

#[test]
fn saves_that_fail_on_a_healthy_disk_are_caught() {
    is_caught(|random| planted(Planted::Fails, random), "error step");
}

#[test]
fn savers_that_end_by_themselves_are_caught() {
    is_caught(|random| planted(Planted::Quits, random), "ended by itself");
}

#[test]
fn savers_that_cannot_open_a_healthy_region_are_caught() {
    is_caught(|random| planted(Planted::NeverOpens, random), "could not open");
}
