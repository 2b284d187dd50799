//! Prevents: a flush that is missing where only a real kernel and file system can show it. The real media write to a disk that
//! remembers every write and flush, below a loop device and ext4, XFS, btrfs or nothing. The disk is then brought to what it
//! may hold after power loss at any moment, mounted again, and opened: nothing that was reported durable may be missing, and
//! nothing may be wrong.
//!
//! Needs root, /dev/fuse and loop devices: `scripts/recorder` runs it.

mod broken;
#[path = "../sigkill/child.rs"]
#[allow(dead_code, reason = "this uses its media alone")]
mod child;
#[path = "../common/mod.rs"]
mod common;
#[path = "../sigkill/content.rs"]
#[allow(dead_code, reason = "the judge here tells what is wrong from what failed")]
mod content;
mod crashes;
#[path = "../disk/mod.rs"]
#[allow(dead_code, reason = "this disk hardly ever fails")]
mod disk;
mod judge;
mod life;
mod planted;
#[path = "../sigkill/reports.rs"]
#[allow(dead_code, reason = "nobody reports here")]
mod reports;
mod volume;
mod workload;

use std::env;
use std::time::Instant;

use broken::Protocol;
use child::Way;
use crashes::Effort;
use judge::Judge;
use volume::Format;
use workload::{live, History};

/// Images of each file system and medium, or a few more (one for each flush), unless `PCC_RECORDER_IMAGES` says otherwise.
const IMAGES: usize = 60;
const PER_MOMENT: usize = 6;
const LIVE_ON_EVERY: usize = 10;
const SAVES: u64 = 24;
/// At least one in so many images must hold something that opening passes over.
const FELL_BACK_SHARE: usize = 10;

fn given(name: &str) -> Option<u64> {
    env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text:?} is no number")))
}

fn ways(format: Format) -> Vec<Way> {
    match format {
        // A device is not mapped.
        Format::Bare => vec![Way::Uring, Way::Threads],
        _ => Way::ALL.to_vec(),
    }
}

fn effort(in_all: usize) -> Effort {
    Effort { per_moment: PER_MOMENT, in_all, seed: given("PCC_RECORDER_SEED").unwrap_or(1) }
}

#[test]
fn power_loss_at_any_moment_loses_nothing_durable() {
    let effort = effort(given("PCC_RECORDER_IMAGES").map_or(IMAGES, |images| images as usize));
    let saves = SAVES.max(effort.in_all as u64 / 20);
    for format in Format::ALL {
        for way in ways(format) {
            let began = Instant::now();
            let life = live(History::Whole, format, way, Protocol::default(), saves, effort.seed);
            let mut judge = Judge::new(&life, LIVE_ON_EVERY);
            let tried = life
                .recording
                .for_each_image(effort, |image, at| judge.check(image, at))
                .unwrap_or_else(|what| panic!("{format:?}, {way:?}, seed {}: {what}", effort.seed));
            let images = tried.images();
            println!(
                "{format:?}, {way:?}: {} events of {saves} saves, {images} images, {} fell back, {} without the newest \
                 save begun, {} without a region, crashes in {} of {} intervals between flushes, {:?}",
                life.recording.events.len(),
                judge.fell_back,
                judge.behind,
                judge.none,
                tried.visited(),
                tried.intervals,
                began.elapsed()
            );
            assert!(images >= effort.in_all / 3, "{format:?}, {way:?}: only {images} images");
            assert_eq!(
                tried.visited(),
                tried.intervals,
                "{format:?}, {way:?}: no crash between some two flushes"
            );
            assert!(
                judge.fell_back >= images / FELL_BACK_SHARE,
                "{format:?}, {way:?}: opening passed over something in {} of {images} images: little was tested",
                judge.fell_back
            );
        }
    }
}
