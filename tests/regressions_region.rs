//! One test per defect that was found in what a region keeps and gives up. Each opens with its story.
#![cfg(feature = "sim")]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use pccheck::engine::{Select, Store, Tensor};
use pccheck::format::Dtype;
use pccheck::medium::sim::{AttemptKind, SimMedium, SimModel};
use pccheck::medium::{Barrier, Medium};
use pccheck::save::{Faults, Save};
use pccheck::store::{format_medium, FormatOptions, OpenOptions};
use pccheck::{Error, ErrorKind, Result};

const WAIT: Option<Duration> = Some(Duration::from_secs(60));
const HELD: Duration = Duration::from_secs(30);
const STATE_BYTES: usize = 40_000;

fn options(keep: u32) -> OpenOptions {
    OpenOptions {
        max_in_flight: 1,
        keep,
        chunk_bytes: 8192,
        staging_bytes: 6 * 8192,
        writers: 1,
        readers: 1,
        ..OpenOptions::default()
    }
}

fn state(step: u64) -> Vec<u8> {
    (0..STATE_BYTES as u64).map(|at| (at.wrapping_mul(37) ^ step.wrapping_mul(11)) as u8).collect()
}

fn begin(store: &Store, step: u64) -> Result<Save> {
    let data = state(step);
    let tensor = Tensor { name: "w", dtype: Dtype::U8, shape: &[STATE_BYTES as u64], data: &data };
    store.save(step, &[tensor], &[], WAIT)
}

/// Saves and returns the generation, which is durable.
fn save(store: &Store, step: u64) -> u64 {
    begin(store, step).expect("begin").wait_durable(WAIT).expect("durable").generation
}

fn bed(slots: u32, keep: u32) -> (Arc<SimMedium>, Store) {
    let sim = SimMedium::new(u64::from(slots + 1) * (2 << 20), SimModel::Ssd { torn: false });
    let sim = Arc::new(sim);
    format_medium(&*sim, &FormatOptions::new(slots, 2 * STATE_BYTES as u64)).expect("format");
    let store = Store::open_on(sim.clone(), &options(keep), Faults::default()).expect("open");
    (sim, store)
}

fn generations(store: &Store) -> Vec<u64> {
    store.checkpoints().expect("list").iter().map(|info| info.record.generation).collect()
}

fn newest(store: &Store) -> Result<u64> {
    store.open_checkpoint(Select::Newest, true).map(|opened| opened.checkpoint.record().generation)
}

/// Makes the payload flush of the next save fail: its slot is then quarantined.
fn quarantine_one(sim: &SimMedium, store: &Store) -> u32 {
    let mut once = true;
    sim.fail(move |attempt| {
        let hit = attempt.kind == AttemptKind::Persist && attempt.barrier == Some(Barrier::Payload);
        (hit && std::mem::take(&mut once)).then_some(libc::EIO)
    });
    let error = begin(store, 2).expect("begin").wait_durable(WAIT).expect_err("its flush failed");
    assert_eq!(error.kind(), ErrorKind::DurabilityUnknown);
    sim.stop_failing();
    store.region().quarantined()[0].slot
}

/// Two threads repaired the same slot; the slower one went on writing zeros after the first had lifted the quarantine
/// and a save had made the slot its own, and so destroyed a durable checkpoint.
#[test]
fn a_second_repair_does_not_touch_what_the_first_gave_back() {
    let (sim, store) = bed(3, 1);
    save(&store, 1);
    let slot = quarantine_one(&sim, &store);
    let start = store.region().layout().slot_offset(slot);
    thread::scope(|scope| {
        let seen = AtomicUsize::new(0);
        let hold = sim.hold(move |attempt| {
            let zeros = attempt.kind == AttemptKind::Copy && attempt.offset == start;
            zeros && seen.fetch_add(1, Ordering::SeqCst) == 0
        });
        let slow = scope.spawn(|| store.repair(WAIT));
        assert!(sim.wait_held(hold, 1, HELD), "the slow repair has begun");
        let second = scope.spawn(|| store.repair(WAIT));
        let patience = Instant::now() + Duration::from_millis(300);
        while store.stats().quarantined_slots > 0 && Instant::now() < patience {
            thread::sleep(Duration::from_millis(1));
        }
        if store.stats().quarantined_slots == 0 {
            // The second has overtaken the first: let a save make the slot its own, under the first one's zeros.
            for step in 20.. {
                save(&store, step);
                if store.checkpoints().expect("list")[0].record.slot == slot {
                    break;
                }
            }
        }
        sim.release(hold);
        let repaired = [slow, second].map(|repair| repair.join().expect("no panic").expect("repair"));
        assert_eq!(repaired.iter().sum::<u32>(), 1, "one slot, repaired once");
        newest(&store).expect("a durable checkpoint was destroyed");
    });
    let mut last = 0;
    for step in 3..9 {
        last = save(&store, step);
        assert_eq!(newest(&store).expect("intact"), last);
    }
    assert_eq!(generations(&store), [last]);
}

/// A reader opened a checkpoint between the discard's look at readers and its durable mark. The checkpoint stayed
/// listed, counted as the newest, and cost the one that was meant to survive its place; after a restart nothing was
/// left.
#[test]
fn a_reader_cannot_slip_into_a_discard() {
    let (sim, store) = bed(3, 1);
    let survivor = save(&store, 1);
    let reading = store.open_checkpoint(Select::Generation(survivor), false).expect("open");
    let doomed = save(&store, 2);
    thread::scope(|scope| {
        let hold = sim.hold(|attempt| attempt.barrier == Some(Barrier::Control));
        let discard = scope.spawn(|| store.discard_newer(survivor));
        assert!(sim.wait_held(hold, 1, HELD), "the discard writes its mark");
        let opened = store.open_checkpoint(Select::Generation(doomed), false);
        // Released before anything is asserted: a panic here would leave the discard held for ever.
        sim.release(hold);
        let discarded = discard.join().expect("no panic").expect("discard");
        assert!(opened.is_err(), "a checkpoint that is being discarded was opened");
        assert_eq!(discarded, 1);
    });
    drop(reading);
    assert_eq!(generations(&store), [survivor]);
    sim.fail(|attempt| (attempt.barrier == Some(Barrier::Payload)).then_some(libc::EIO));
    for step in 3..5 {
        let _ = begin(&store, step).map(|save| save.wait_durable(WAIT));
    }
    sim.stop_failing();
    drop(store);
    let store = Store::open_on(sim, &options(1), Faults::default()).expect("open again");
    assert_eq!(generations(&store), [survivor]);
}

/// A discard whose mark could not be written leaves everything as it was.
#[test]
fn a_discard_that_fails_changes_nothing() {
    let (sim, store) = bed(4, 2);
    let kept = [save(&store, 1), save(&store, 2)];
    sim.fail(|attempt| (attempt.barrier == Some(Barrier::Control)).then_some(libc::EIO));
    store.discard_newer(kept[0]).expect_err("the mark cannot be written");
    sim.stop_failing();
    assert_eq!(generations(&store), [kept[1], kept[0]]);
    assert_eq!(newest(&store).expect("newest"), kept[1]);
    assert_eq!(save(&store, 3), kept[1] + 1);
}

/// With K = 1, the default, the store that resumes training listed the newest checkpoint only: when that was damaged,
/// intact older ones were on the medium, were not tried, and the next saves overwrote them.
#[test]
fn the_writer_falls_back_beyond_the_newest_k_and_keeps_what_it_found() {
    let (sim, store) = bed(4, 1);
    let saved: Vec<u64> = (1..=3).map(|step| save(&store, step)).collect();
    let record = store.checkpoints().expect("list")[0].record.clone();
    let place = store.region().layout().slot_offset(record.slot) + 8192;
    drop(store);
    sim.copy(place, &[0x5a; 4096]).expect("damage");
    sim.persist(0, sim.len_bytes(), Barrier::Open).expect("flush");
    let store = Store::open_on(sim.clone(), &options(1), Faults::default()).expect("open");
    let opened = store.open_checkpoint(Select::Newest, true).expect("an older one is intact");
    assert_eq!(opened.checkpoint.record().generation, saved[1]);
    assert!(opened.checkpoint.read_tensor("w").expect("read") == state(2));
    assert_eq!(opened.rejected.len(), 1);
    drop(opened);
    // Until a newer one is durable the intact one keeps its place, whatever fails meanwhile.
    assert_eq!(generations(&store), [saved[1]]);
    sim.fail(|attempt| (attempt.kind == AttemptKind::StartCopy).then_some(libc::EIO));
    for step in 4..9 {
        let ended = begin(&store, step).and_then(|save| save.wait_durable(WAIT));
        ended.expect_err("the medium refuses");
        assert_eq!(newest(&store).expect("kept"), saved[1]);
    }
    sim.stop_failing();
    let last = save(&store, 9);
    assert_eq!(newest(&store).expect("newest"), last);
}

/// After the newest was discarded, the store said that it held nothing, although an older one was still whole.
#[test]
fn a_discard_brings_back_what_was_reclaimed_for_the_discarded() {
    let (_sim, store) = bed(4, 1);
    let (older, newer) = (save(&store, 1), save(&store, 2));
    assert_eq!(generations(&store), [newer]);
    assert_eq!(store.abandon(0, 2, None).expect("abandon"), 1);
    assert_eq!(generations(&store), [older]);
    assert_eq!(newest(&store).expect("older"), older);
}

/// A second pin returned success while the first was still being made durable, and failed in the end.
#[test]
fn a_second_pin_waits_for_the_first() {
    let (sim, store) = bed(4, 1);
    let generation = save(&store, 1);
    thread::scope(|scope| {
        let hold = sim.hold(|attempt| attempt.barrier == Some(Barrier::Control));
        let first = scope.spawn(|| store.pin(generation));
        assert!(sim.wait_held(hold, 1, HELD), "the first pin writes its mark");
        let second = scope.spawn(|| store.pin(generation));
        thread::sleep(Duration::from_millis(50));
        sim.fail(|attempt| (attempt.barrier == Some(Barrier::Control)).then_some(libc::EIO));
        sim.release(hold);
        let results = [first, second].map(|pin| pin.join().expect("no panic"));
        sim.stop_failing();
        let pinned = store.checkpoints().expect("list")[0].pinned;
        assert!(!results.iter().any(Result::is_ok) || pinned, "{results:?}, pinned: {pinned}");
    });
}

/// An I/O error of the caller's own, while it restored, was taken for damage, and an older state was restored.
#[test]
fn the_callers_own_failure_is_no_damage() {
    let (_sim, store) = bed(4, 2);
    save(&store, 1);
    save(&store, 2);
    let mut calls = 0;
    let result = store.restore(Select::Newest, |checkpoint| {
        calls += 1;
        checkpoint.read_tensor("w")?;
        Err(Error::new(ErrorKind::Io, "write export", "the caller's disk is full"))
    });
    assert_eq!(result.err().expect("the caller's error").message(), "the caller's disk is full");
    assert_eq!(calls, 1, "it was tried again with an older checkpoint");
}
