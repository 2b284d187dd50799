//! Prevents: a recorder that would pass a broken protocol. Each barrier is removed and each fault planted that a real disk can
//! show, on media and file systems by turns; the images must show it, and for the reason that belongs to it.

use pccheck::medium::Barrier;

use super::broken::Protocol;
use super::child::Way;
use super::crashes::Effort;
use super::judge::{Finding, Judge, Kind};
use super::life::Living;
use super::volume::Format;
use super::workload::{live, History, ROOMY};

const SAVES: u64 = 24;
/// Some faults need writes to end in an order that a busy machine seldom brings.
const LIVES: u64 = 10;
/// Enough for every flush of a life.
const EFFORT: Effort = Effort { per_moment: 6, in_all: 6000, seed: 1 };

type Place = (Format, Way);
const BARE: Place = (Format::Bare, Way::Uring);
const EXT4: Place = (Format::Ext4, Way::Threads);
const EXT4_MAPPED: Place = (Format::Ext4, Way::Mmap);
const XFS: Place = (Format::Xfs, Way::Uring);
const XFS_MAPPED: Place = (Format::Xfs, Way::Mmap);
const BTRFS: Place = (Format::Btrfs, Way::Threads);
const BTRFS_MAPPED: Place = (Format::Btrfs, Way::Mmap);

/// What the images show of a broken protocol, in one of so many lives.
fn finding(history: History, (format, way): Place, protocol: Protocol, lives: u64) -> Option<Finding> {
    (1..=lives).find_map(|seed| {
        let life = live(history, format, way, protocol, SAVES, seed);
        let mut judge = Judge::new(&life, usize::MAX);
        life.recording.for_each_image(EFFORT, |image, at| judge.check(image, at)).err()
    })
}

fn must_be_caught(what: &str, history: History, protocol: Protocol, kind: Kind, places: &[Place]) {
    for &place in places {
        let Some(found) = finding(history, place, protocol, LIVES) else {
            panic!("{what}, {place:?}: not caught")
        };
        println!("{what}, {place:?}: {found}");
        // Any other is no proof: an image that cannot even be mounted would be one, too.
        assert_eq!(found.kind, kind, "{what}, {place:?}: caught for another reason");
    }
}

/// What forces a fault to show must not be what is found.
fn must_pass(what: &str, history: History, protocol: Protocol, place: Place) {
    let found = finding(history, place, protocol, 1);
    println!("{what}, {place:?}: {}", found.as_ref().map_or("nothing found".into(), Finding::to_string));
    assert!(found.is_none(), "{what}, {place:?}");
}

#[test]
fn without_the_flush_of_the_writing_mark() {
    let protocol = Protocol::without(Barrier::WritingMark);
    must_be_caught("no WritingMark", History::Whole, protocol, Kind::Wrong, &[BARE, EXT4_MAPPED]);
    let unmarked = Protocol::with(|faults| faults.skip_writing_mark = true);
    must_be_caught("no writing mark", History::Whole, unmarked, Kind::Wrong, &[EXT4, XFS_MAPPED]);
}

#[test]
fn without_the_flush_of_the_payload() {
    let protocol = Protocol::without(Barrier::Payload);
    must_be_caught("no Payload", History::Whole, protocol, Kind::Wrong, &[BARE, EXT4, XFS, BTRFS_MAPPED]);
    let late = Protocol::with(|faults| faults.commit_before_payload = true);
    must_be_caught("commit before the payload's flush", History::Whole, late, Kind::Wrong, &[BARE, BTRFS]);
}

#[test]
fn without_the_flush_of_the_commit_record() {
    let protocol = Protocol::without(Barrier::Commit);
    must_be_caught(
        "no Commit",
        History::Whole,
        protocol,
        Kind::Lost,
        &[BARE, EXT4_MAPPED, XFS_MAPPED, BTRFS],
    );
}

#[test]
fn without_the_flush_of_the_control_block() {
    let protocol = Protocol::without(Barrier::Control);
    must_be_caught("no Control", History::Whole, protocol, Kind::Lost, &[BARE, EXT4, EXT4_MAPPED]);
    let late = Protocol::with(|faults| faults.pin_after_commit = true);
    must_be_caught("pinned after the commit", History::Whole, late, Kind::Lost, &[BARE, EXT4_MAPPED]);
}

#[test]
fn without_the_flush_at_open() {
    let protocol = Protocol::without(Barrier::Open);
    must_be_caught("no Open", History::KilledFormatter, protocol, Kind::Lost, &[EXT4_MAPPED, XFS_MAPPED]);
    must_pass("killed formatter", History::KilledFormatter, Protocol::default(), EXT4_MAPPED);
    must_pass("killed formatter", History::KilledFormatter, Protocol::default(), BARE);
    // Every flush of a disk covers all of it, and what is adopted is written and flushed before anything is reported.
    must_pass("no Open, redundant", History::KilledFormatter, protocol, BARE);
}

#[test]
fn committing_on_the_last_chunk() {
    let early = Protocol::with(|faults| faults.commit_on_last_chunk = true);
    must_be_caught("commit on the last chunk", History::Whole, early, Kind::Wrong, &[BARE, EXT4]);
}

#[test]
fn freeing_before_the_commit_is_durable() {
    let early = Protocol::with(|faults| faults.free_before_commit = true);
    let places = [BARE, EXT4, EXT4_MAPPED];
    must_be_caught("freed before the commit", History::CommitHeldBack, early, Kind::Lost, &places);
    must_pass("a commit held back", History::CommitHeldBack, Protocol::default(), BARE);
}

#[test]
fn without_writing_again_what_is_adopted() {
    let protocol = Protocol::without(Barrier::Adopt);
    must_be_caught("no Adopt", History::CommitFails, protocol, Kind::Lost, &[EXT4_MAPPED, XFS_MAPPED]);
    must_pass("a commit that fails", History::CommitFails, Protocol::default(), EXT4_MAPPED);
}

#[test]
fn joining_others_after_their_flush() {
    let late = Protocol::with(|faults| faults.join_after_flush = true);
    // Not unmapped: there the durable write of the first commit record flushes the disk, and with it the payload of the other save.
    let places = [EXT4_MAPPED, XFS_MAPPED];
    must_be_caught("joined after the flush", History::CompleteInAFlush, late, Kind::Wrong, &places);
    must_pass("complete in a flush", History::CompleteInAFlush, Protocol::default(), EXT4_MAPPED);
}

/// A save that fails on a disk that was not told to fail is a finding of its own, before any crash.
#[test]
#[should_panic(expected = "generation 2: ")]
fn a_save_that_fails() {
    let (format, way) = BARE;
    let mut living = Living::new(format, way, ROOMY, Protocol::default());
    living.begin(0);
    living.wait();
    living.fail_next_write();
    living.begin(1);
    living.end();
}
