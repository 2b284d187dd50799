//! Saves that wait for their caller's confirmation, and saves that commit pinned: a regression here makes a torn copy a
//! checkpoint, lets one save that nobody confirms hold up all others, or loses a checkpoint that was to be kept. What
//! crashes leave of them is in tests/crash.
#![cfg(feature = "sim")]

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use pccheck::engine::{Select, Store, Tensor, TensorAt};
use pccheck::format::{Dtype, MARK_PINNED};
use pccheck::medium::sim::{AttemptKind, SimMedium, SimModel};
use pccheck::medium::Barrier;
use pccheck::save::{Faults, Save, SaveOptions};
use pccheck::store::{format_medium, FormatOptions, OpenOptions};
use pccheck::{ErrorKind, Result};

const CHUNK: u64 = 8192;
const STATE_BYTES: usize = 40_000;
const RUN_ID: u64 = 5;
/// Nothing here takes this long unless it hangs.
const PROMPT: Duration = Duration::from_secs(20);
const WAIT: Option<Duration> = Some(PROMPT);
const SHORT: Option<Duration> = Some(Duration::from_millis(50));
const CONFIRM: SaveOptions = SaveOptions { wait: WAIT, confirm: true, ..SaveOptions::DEFAULT };
const PIN: SaveOptions = SaveOptions { wait: WAIT, pin: true, ..SaveOptions::DEFAULT };

/// A store of `slots` slots with `max_in_flight` saves, 1 kept, and a pool of no more buffers than it must have.
fn bed(slots: u32, max_in_flight: u32) -> (Arc<SimMedium>, Store) {
    let sim = Arc::new(SimMedium::new(u64::from(slots + 1) << 21, SimModel::Ssd { torn: false }));
    format_medium(&*sim, &FormatOptions::new(slots, 2 * STATE_BYTES as u64)).expect("format");
    let options = OpenOptions {
        max_in_flight,
        run_id: RUN_ID,
        chunk_bytes: CHUNK,
        staging_bytes: u64::from(max_in_flight + 1) * CHUNK,
        writers: 1,
        readers: 1,
        ..OpenOptions::default()
    };
    let store = Store::open_on(sim.clone(), &options, Faults::default()).expect("open");
    (sim, store)
}

fn state(step: u64) -> Vec<u8> {
    (0..STATE_BYTES as u64).map(|at| (at.wrapping_mul(37) ^ step.wrapping_mul(11)) as u8).collect()
}

fn begin(store: &Store, step: u64, options: impl Into<SaveOptions>) -> Result<Save> {
    let tensor = Tensor { name: "w", dtype: Dtype::U8, shape: &[STATE_BYTES as u64], data: &state(step) };
    store.save(step, &[tensor], &[], options)
}

fn save(store: &Store, step: u64) -> u64 {
    let durable = begin(store, step, WAIT).and_then(|save| save.wait_durable(WAIT));
    durable.expect("save").generation
}

/// Generations with their pins, newest first.
fn list(store: &Store) -> Vec<(u64, bool)> {
    store.checkpoints().expect("list").iter().map(|info| (info.record.generation, info.pinned)).collect()
}

fn until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + PROMPT;
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        thread::yield_now();
    }
}

/// Until nothing is left to do for the save but its commit, and it holds no buffer.
fn written(store: &Store, save: &Save) {
    let pool = store.region().pool();
    until("it is written", || {
        let progress = save.progress();
        progress.written_bytes == progress.total_bytes && pool.free_count() == pool.buffer_count()
    });
}

fn kind<T>(result: Result<T>) -> ErrorKind {
    result.err().expect("it fails").kind()
}

fn check_newest(store: &Store, step: u64) {
    let opened = store.open_checkpoint(Select::Newest, true).expect("open");
    assert_eq!(opened.checkpoint.record().step, step);
    assert!(opened.checkpoint.read_tensor("w").expect("read") == state(step), "the state came back changed");
}

/// Pins that the control block holds, whether or not a checkpoint answers to them.
fn pins_on_medium(store: &Store) -> Vec<u64> {
    let control = store.region().read_table().expect("table").control.expect("a control block");
    let pins = control.marks.iter().filter(|mark| mark.flags & MARK_PINNED != 0);
    pins.map(|mark| mark.generation).collect()
}

fn fail(sim: &SimMedium, barriers: &'static [Barrier]) {
    sim.fail(move |attempt| attempt.barrier.is_some_and(|b| barriers.contains(&b)).then_some(libc::EIO));
}

// ---- confirmed saves ----------------------------------------------------------------------------------------

#[test]
fn others_pass_saves_that_wait_for_their_confirmation() {
    let (sim, store) = bed(4, 3);
    let waiting = [1, 2].map(|step| begin(&store, step, CONFIRM).expect("begin"));
    waiting.iter().for_each(|save| written(&store, save));
    let commits = sim.barrier_counts().get(&Barrier::Commit).copied().unwrap_or(0);
    assert_eq!(commits, 0, "a commit record was written before the confirmation");
    let passing: Vec<u64> = (3..9).map(|step| save(&store, step)).collect();
    check_newest(&store, 8);
    for save in waiting {
        assert_eq!(kind(save.wait_durable(SHORT)), ErrorKind::TimedOut);
        save.confirm().expect("confirm");
        let durable = save.wait_durable(WAIT).expect("durable");
        assert_eq!(durable.superseded_by, passing.last().copied(), "it comes too late to be the newest");
        save.confirm().expect("once more, after the end");
    }
    check_newest(&store, 8);
    let stats = store.stats();
    assert_eq!((stats.saves_durable, stats.saves_superseded, stats.claimable_slots), (8, 2, 3));
}

#[test]
fn a_confirmation_may_come_before_anything_else() {
    let (sim, store) = bed(3, 2);
    let hold = sim.hold(|attempt| attempt.barrier == Some(Barrier::WritingMark));
    let data = state(1);
    let (shape, bytes) = (&[STATE_BYTES as u64], STATE_BYTES as u64);
    let tensor = TensorAt { name: "w", dtype: Dtype::U8, shape, ptr: data.as_ptr(), bytes, device: None };
    // SAFETY: `data` outlives the save and is not changed.
    let save = unsafe { store.begin_save(1, &[tensor], &[], CONFIRM) }.expect("begin");
    assert!(sim.wait_held(hold, 1, PROMPT));
    save.confirm().expect("confirm");
    assert!(!save.progress().copied, "its chunks wait for the mark, and there are few buffers");
    sim.release(hold);
    save.wait_durable(WAIT).expect("durable");
    check_newest(&store, 1);
    // Too late: cancelled, though not ended while an operation is under way. A plain save has nothing to be told.
    let hold = sim.hold(|attempt| attempt.barrier == Some(Barrier::WritingMark));
    // SAFETY: as above.
    let [failed, plain] = [CONFIRM, SaveOptions::default()]
        .map(|options| unsafe { store.begin_save(1, &[tensor], &[], options) }.expect("begin"));
    assert!(sim.wait_held(hold, 1, PROMPT));
    failed.cancel();
    plain.cancel();
    assert!(!failed.progress().ended);
    assert_eq!(kind(failed.confirm()), ErrorKind::Cancelled);
    plain.confirm().expect("it never waited for this");
    sim.release(hold);
    assert_eq!(kind(plain.wait_durable(WAIT)), ErrorKind::Cancelled);
    assert_eq!(kind(failed.wait_durable(WAIT)), ErrorKind::Cancelled);
    let mut raw = store.begin_raw(2, 100, &[], CONFIRM).expect("begin raw");
    raw.write_at(0, &[7; 100]).expect("write");
    let raw = raw.commit().expect("commit");
    written(&store, &raw);
    assert_eq!(kind(raw.wait_durable(SHORT)), ErrorKind::TimedOut);
    raw.confirm().expect("confirm");
    assert_eq!(raw.wait_durable(WAIT).expect("durable").superseded_by, None);
}

#[test]
fn a_house_full_of_unconfirmed_saves_lets_the_next_in_when_one_goes() {
    let (_sim, store) = bed(3, 2);
    let (first, second) =
        (begin(&store, 1, CONFIRM).expect("begin"), begin(&store, 2, CONFIRM).expect("begin"));
    assert_eq!(kind(begin(&store, 3, SHORT)), ErrorKind::NoSlot);
    thread::scope(|scope| {
        let waiting = scope.spawn(|| begin(&store, 3, WAIT).and_then(|save| save.wait_durable(WAIT)));
        written(&store, &first);
        drop(first);
        waiting.join().expect("waiting").expect("the slot and the place of the dropped save are free");
        let told = scope.spawn(|| second.wait_durable(Some(PROMPT)));
        written(&store, &second);
        second.cancel();
        assert_eq!(kind(told.join().expect("told")), ErrorKind::Cancelled);
    });
    assert_eq!(kind(second.confirm()), ErrorKind::Cancelled);
    store.drain(WAIT).expect("nothing is in flight");
    assert_eq!((store.stats().saves_cancelled, store.stats().claimable_slots), (2, 2));
    let third = begin(&store, 4, CONFIRM).expect("begin");
    written(&store, &third);
    thread::scope(|scope| {
        let told = scope.spawn(|| third.wait_durable(Some(PROMPT)));
        drop(store);
        assert_eq!(kind(told.join().expect("told")), ErrorKind::Cancelled);
    });
    assert_eq!(kind(third.confirm()), ErrorKind::Cancelled);
}

/// Drains without a timeout, and lets what holds the drain up go on. Fails, instead of hanging, where it does not return
/// although only `unconfirmed` is left.
fn drain_for_ever(store: &Store, unconfirmed: &Save, go_on: impl FnOnce()) -> Result<()> {
    thread::scope(|scope| {
        let draining = scope.spawn(|| store.drain(None));
        thread::sleep(Duration::from_millis(50));
        assert!(!draining.is_finished(), "something is on its way");
        go_on();
        let deadline = Instant::now() + PROMPT;
        while !draining.is_finished() && Instant::now() < deadline {
            thread::yield_now();
        }
        let hangs = !draining.is_finished();
        if hangs {
            unconfirmed.cancel();
        }
        let outcome = draining.join().expect("draining");
        assert!(!hangs, "it waits for a confirmation that may never come");
        outcome
    })
}

#[test]
fn a_drain_without_an_end_does_not_wait_for_a_confirmation() {
    let (sim, store) = bed(4, 3);
    // Its chunk table, behind the last chunk, is all that keeps it from waiting for its confirmation alone.
    let table = STATE_BYTES.next_multiple_of(4096) as u64 + 4096;
    let hold = sim
        .hold(move |attempt| attempt.kind == AttemptKind::StartCopy && attempt.offset % (2 << 20) >= table);
    let waiting = begin(&store, 1, CONFIRM).expect("begin");
    assert!(sim.wait_held(hold, 1, PROMPT));
    let refused = drain_for_ever(&store, &waiting, || sim.release(hold));
    assert_eq!(kind(refused), ErrorKind::InvalidState);
    let hold = sim.hold(|attempt| attempt.barrier == Some(Barrier::Payload));
    let other = begin(&store, 2, WAIT).expect("begin");
    assert!(sim.wait_held(hold, 1, PROMPT));
    let error =
        drain_for_ever(&store, &waiting, || sim.release(hold)).expect_err("only the unconfirmed one is left");
    assert_eq!(error.kind(), ErrorKind::InvalidState, "{error}");
    assert!(error.to_string().contains("generation 1 "), "{error} does not name it");
    other.wait_durable(WAIT).expect("durable");
    // It is in flight as long as it is neither confirmed nor cancelled.
    assert_eq!(kind(store.drain(SHORT)), ErrorKind::TimedOut);
    assert_eq!(kind(store.discard_newer(0)), ErrorKind::InvalidState);
    thread::scope(|scope| {
        let draining = scope.spawn(|| store.drain(WAIT));
        waiting.confirm().expect("confirm");
        draining.join().expect("draining").expect("with a timeout it waits for the confirmation");
    });
    let abandoned = begin(&store, 3, CONFIRM).expect("begin");
    written(&store, &abandoned);
    assert_eq!(store.abandon(RUN_ID, 3, WAIT).expect("abandon"), 0);
    assert_eq!(kind(abandoned.confirm()), ErrorKind::Cancelled);
    store.drain(WAIT).expect("drain");
}

#[test]
fn a_flush_that_fails_meanwhile_fails_the_save_that_waits() {
    let (sim, store) = bed(5, 2);
    save(&store, 1);
    let waiting = begin(&store, 2, CONFIRM).expect("begin");
    written(&store, &waiting);
    fail(&sim, &[Barrier::Payload]);
    assert_eq!(kind(begin(&store, 3, WAIT).and_then(|s| s.wait_durable(WAIT))), ErrorKind::DurabilityUnknown);
    sim.stop_failing();
    waiting.confirm().expect("not failed yet: nobody has looked");
    assert_eq!(kind(waiting.wait_durable(WAIT)), ErrorKind::DurabilityUnknown);
    assert_eq!(kind(waiting.confirm()), ErrorKind::DurabilityUnknown, "why it failed");
    assert_eq!(store.repair(WAIT).expect("repair"), 2);
    check_newest(&store, 1);
}

// ---- pinned saves -------------------------------------------------------------------------------------------

#[test]
fn a_pinned_save_is_kept_from_its_commit_on() {
    let (sim, store) = bed(5, 2);
    let hold = sim.hold(|attempt| attempt.barrier == Some(Barrier::Payload));
    let first = begin(&store, 1, PIN).expect("begin");
    assert!(sim.wait_held(hold, 1, PROMPT));
    let generation = first.generation();
    assert_eq!(kind(store.unpin(generation)), ErrorKind::NotFound, "it is no checkpoint yet");
    assert!(pins_on_medium(&store).is_empty(), "and may never be one");
    sim.release(hold);
    assert_eq!(first.wait_durable(WAIT).expect("durable").generation, generation);
    assert_eq!((list(&store), pins_on_medium(&store)), (vec![(generation, true)], vec![generation]));
    for step in 2..9 {
        save(&store, step);
    }
    assert_eq!(list(&store), [(8, false), (generation, true)]);
    // Older than the newest K when it commits: it is pinned all the same.
    let late = begin(&store, 9, SaveOptions { confirm: true, ..PIN }).expect("begin");
    let newest = save(&store, 10);
    late.confirm().expect("confirm");
    assert_eq!(late.wait_durable(WAIT).expect("durable").superseded_by, None);
    assert_eq!(list(&store), [(newest, false), (late.generation(), true), (generation, true)]);
    let opened = store.open_checkpoint(Select::Generation(generation), true).expect("open");
    assert!(opened.checkpoint.read_tensor("w").expect("read") == state(1));
    drop(opened);
    store.unpin(generation).expect("unpin");
    store.unpin(late.generation()).expect("unpin");
    assert_eq!((list(&store), pins_on_medium(&store)), (vec![(newest, false)], vec![]));
    assert_eq!(store.stats().claimable_slots, 4);
}

#[test]
fn pins_in_flight_count_each_other() {
    // Room for two pins beside N = 2 and K = 1.
    let (sim, store) = bed(5, 2);
    let kept = save(&store, 1);
    let hold = sim.hold(|attempt| attempt.barrier == Some(Barrier::Payload));
    let first = begin(&store, 2, PIN).expect("room");
    assert!(sim.wait_held(hold, 1, PROMPT));
    let second = begin(&store, 3, SaveOptions { confirm: true, ..PIN }).expect("room");
    assert_eq!(store.stats().claimable_slots, 2, "N slots are left for saves, and will be");
    // Refused at once, although a wait for a slot was granted and none is free.
    let begun = Instant::now();
    let error = begin(&store, 4, PIN).err().expect("no room");
    assert!(begun.elapsed() < PROMPT);
    assert_eq!(error.kind(), ErrorKind::NoSlot);
    assert_eq!(error.message(), store.pin(kept).expect_err("no room").message(), "the error that pin gives");
    assert_eq!(kind(store.begin_raw(4, 100, &[], PIN)), ErrorKind::NoSlot);
    second.cancel();
    sim.release(hold);
    first.wait_durable(WAIT).expect("durable");
    assert_eq!(kind(second.wait_durable(WAIT)), ErrorKind::Cancelled);
    // What it had reserved is given back, once.
    store.pin(first.generation()).expect("it is");
    let mut raw = store.begin_raw(5, 100, &[], PIN).expect("room");
    assert_eq!(kind(begin(&store, 6, PIN)), ErrorKind::NoSlot);
    raw.write_at(0, &[7; 100]).expect("write");
    let raw = raw.commit().expect("commit");
    raw.wait_durable(WAIT).expect("durable");
    assert_eq!(kind(begin(&store, 6, PIN)), ErrorKind::NoSlot);
    let newest = save(&store, 7);
    assert_eq!(list(&store), [(newest, false), (raw.generation(), true), (first.generation(), true)]);
}

#[test]
fn a_pin_ends_with_the_save_that_failed() {
    let (sim, store) = bed(4, 1);
    save(&store, 1);
    let unconfirmed = |step| {
        let save = begin(&store, step, SaveOptions { confirm: true, ..PIN }).expect("room for the pin");
        written(&store, &save);
        save
    };
    drop(unconfirmed(2));
    store.drain(WAIT).expect("drain");
    assert_eq!((pins_on_medium(&store), store.stats().claimable_slots), (vec![], 3));
    // The pin's own write fails, the commit's, and from the commit on everything: then the quarantine, which takes the pin
    // back, is not durable either.
    let failures = [(Barrier::Control, true), (Barrier::Commit, false), (Barrier::Commit, true)];
    for (step, (first, and_all_later)) in (3..).zip(failures) {
        let failing = unconfirmed(step);
        let mut failed = false;
        sim.fail(move |attempt| {
            let hit = attempt.barrier == Some(first) || failed && and_all_later;
            failed |= hit;
            hit.then_some(libc::EIO)
        });
        failing.confirm().expect("confirm");
        assert_eq!(kind(failing.wait_durable(WAIT)), ErrorKind::DurabilityUnknown, "{first:?}");
        store.drain(WAIT).expect("drain");
        sim.stop_failing();
        assert!(pins_on_medium(&store).is_empty(), "{first:?}");
        let pinned = store.region().slot_views().iter().filter(|view| view.pinned).count();
        assert_eq!((pinned, store.stats().quarantined_slots), (0, 1), "{first:?}");
        assert_eq!(store.repair(WAIT).expect("repair"), 1);
        assert_eq!((pins_on_medium(&store), store.stats().claimable_slots), (vec![], 3), "{first:?}");
        save(&store, 100 + step);
    }
    let pinned = begin(&store, 9, PIN).and_then(|save| save.wait_durable(WAIT)).expect("durable");
    assert_eq!(
        (list(&store), pins_on_medium(&store)),
        (vec![(pinned.generation, true)], vec![pinned.generation])
    );
}
