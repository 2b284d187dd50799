//! Prevents: training that hangs, a slot or a buffer that is lost, or a save that is called durable, when the medium
//! answers with EIO. Every write, every flush and every read of a history fails in turn, once and for ever; what
//! is asserted then: the saves concerned fail with the right kind, every waiter wakes, buffers and slots come back
//! or are quarantined, the checkpoint before is intact (also after power loss), and the store goes on or says why not.
#![cfg(feature = "sim")]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use pccheck::engine::{Select, Store, Tensor};
use pccheck::format::Dtype;
use pccheck::medium::sim::{
    for_each_crash_image, Attempt, AttemptKind, EnumerateOptions, SimMedium, SimModel,
};
use pccheck::medium::{Barrier, Durability};
use pccheck::recovery::Verdict;
use pccheck::save::{Durable, Faults, Save};
use pccheck::store::{format_medium, FormatOptions, OpenOptions};
use pccheck::{Error, ErrorKind, Result};

const WAIT: Option<Duration> = Some(Duration::from_secs(20));
/// Nothing in this file may take longer.
const PATIENCE: Duration = Duration::from_secs(60);
const SLOTS: u32 = 8;
const STATE_BYTES: usize = 40_000;
const MODELS: [SimModel; 2] = [SimModel::Ssd { torn: false }, SimModel::Pmem];

fn options(in_flight: u32) -> OpenOptions {
    OpenOptions {
        required: Durability::Power,
        max_in_flight: in_flight,
        keep: 1,
        chunk_bytes: 8192,
        staging_bytes: 6 * 8192,
        writers: 2,
        readers: 1,
        ..OpenOptions::default()
    }
}

fn state(step: u64) -> Vec<u8> {
    (0..STATE_BYTES as u64)
        .map(|at| (at.wrapping_mul(37) ^ (at >> 9) ^ step.wrapping_mul(11)) as u8)
        .collect()
}

/// Fails the test instead of hanging it.
fn promptly<T: Send>(what: &str, run: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let running = scope.spawn(run);
        let deadline = Instant::now() + PATIENCE;
        while !running.is_finished() {
            if Instant::now() > deadline {
                // Unwinding would wait for the thread that hangs.
                eprintln!("{what} hangs");
                std::process::exit(101);
            }
            thread::sleep(Duration::from_micros(200));
        }
        running.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// A region on a simulated medium, with one checkpoint of step 1.
struct Bed {
    sim: Arc<SimMedium>,
    in_flight: u32,
    store: Store,
}

impl Bed {
    fn new(model: SimModel, in_flight: u32) -> Bed {
        let options_of_format = FormatOptions::new(SLOTS, 2 * STATE_BYTES as u64);
        let sim = Arc::new(SimMedium::new(u64::from(SLOTS + 1) * (2 << 20), model));
        format_medium(&*sim, &options_of_format).expect("format");
        let store = open(&sim, in_flight).expect("open");
        begin(&store, 1).and_then(|save| save.wait_durable(WAIT)).expect("the first save");
        Bed { sim, in_flight, store }
    }

    /// Fails the `nth` call that `picks` picks, or all from it on. Returns the count of failures.
    fn fail(
        &self,
        nth: u64,
        always: bool,
        picks: impl Fn(&Attempt) -> bool + Send + 'static,
    ) -> Arc<AtomicU64> {
        fail(&self.sim, nth, always, picks)
    }

    /// Nothing is under way and nothing is lost.
    fn assert_settled(&self) {
        self.store.drain(WAIT).expect("drain");
        let stats = self.store.stats();
        assert_eq!(stats.in_flight, 0);
        assert_eq!(stats.saves_begun, stats.saves_durable + stats.saves_failed + stats.saves_cancelled);
        let pool = self.store.region().pool();
        let deadline = Instant::now() + PATIENCE;
        // A copier that was given a buffer for a save that failed brings it back a moment later.
        while pool.free_count() != pool.buffer_count() {
            assert!(Instant::now() < deadline, "{} of {} buffers", pool.free_count(), pool.buffer_count());
            thread::yield_now();
        }
    }

    /// Every slot can be written again, and the region reopens with what was saved last.
    fn assert_as_good_as_new(self, first_step: u64) {
        let last_step = first_step + 2 * u64::from(SLOTS);
        for step in first_step..=last_step {
            begin(&self.store, step).and_then(|save| save.wait_durable(WAIT)).expect("save");
        }
        assert_eq!(self.store.stats().quarantined_slots, 0);
        assert_eq!(self.store.stats().claimable_slots, SLOTS - 1);
        drop(self.store);
        let store = open(&self.sim, self.in_flight).expect("reopen");
        assert_eq!(restored_step(&store).expect("restore"), last_step);
    }
}

fn fail(
    sim: &SimMedium,
    nth: u64,
    always: bool,
    picks: impl Fn(&Attempt) -> bool + Send + 'static,
) -> Arc<AtomicU64> {
    let failed = Arc::new(AtomicU64::new(0));
    let (counter, mut seen) = (failed.clone(), 0);
    sim.fail(move |attempt| {
        let picked = picks(attempt);
        let fails = picked && (seen == nth || (always && seen > nth));
        seen += u64::from(picked);
        counter.fetch_add(u64::from(fails), Ordering::SeqCst);
        fails.then_some(libc::EIO)
    });
    failed
}

fn open(sim: &Arc<SimMedium>, in_flight: u32) -> Result<Store> {
    Store::open_on(sim.clone(), &options(in_flight), Faults::default())
}

fn begin(store: &Store, step: u64) -> Result<Save> {
    let data = state(step);
    let shape = [data.len() as u64];
    store.save(step, &[Tensor { name: "w", dtype: Dtype::U8, shape: &shape, data: &data }], &[], WAIT)
}

/// Saves the steps side by side, each from its own thread and with several waiters, who must all agree.
fn save_together(store: &Store, steps: std::ops::Range<u64>) -> Vec<(u64, Result<Durable>)> {
    promptly("saving", || {
        thread::scope(|scope| {
            let saving: Vec<_> =
                steps.map(|step| (step, scope.spawn(move || save_watched(store, step)))).collect();
            saving.into_iter().map(|(step, saving)| (step, saving.join().expect("no panic"))).collect()
        })
    })
}

fn save_watched(store: &Store, step: u64) -> Result<Durable> {
    let save = begin(store, step)?;
    let outcomes: Vec<Result<Durable>> = thread::scope(|scope| {
        let waiting: Vec<_> = (0..3).map(|_| scope.spawn(|| save.wait_durable(WAIT))).collect();
        waiting.into_iter().map(|waiter| waiter.join().expect("no panic")).collect()
    });
    let kinds: Vec<Option<ErrorKind>> =
        outcomes.iter().map(|outcome| outcome.as_ref().err().map(Error::kind)).collect();
    assert!(kinds.windows(2).all(|pair| pair[0] == pair[1]), "waiters of one save heard {kinds:?}");
    assert!(save.progress().ended);
    outcomes.into_iter().next().expect("three of them")
}

/// The step of the newest checkpoint, whose bytes must be right.
fn restored_step(store: &Store) -> Result<u64> {
    let opened = store.open_checkpoint(Select::Newest, true)?;
    let step = opened.checkpoint.record().step;
    assert!(opened.checkpoint.read_tensor("w")? == state(step), "step {step} came back changed");
    Ok(step)
}

fn assert_eio(error: &Error, kinds: &[ErrorKind]) {
    assert!(kinds.contains(&error.kind()), "{error:?}, expected one of {kinds:?}");
    assert_eq!(error.errno(), Some(libc::EIO), "{error}");
    assert!(error.path().is_some(), "{error} does not name the region");
}

/// The highest generation that was told to be durable, the first save's included.
fn newest_acknowledged(results: &[(u64, Result<Durable>)]) -> u64 {
    results.iter().filter_map(|(_, result)| Some(result.as_ref().ok()?.generation)).max().unwrap_or(1)
}

/// Power is lost now: whatever the medium kept, recovery finds what was acknowledged, or newer, whole.
fn assert_survives_power_loss(sim: &SimMedium, acknowledged: u64) {
    let few = EnumerateOptions { images_per_point: 4, samples_per_point: 6, ..EnumerateOptions::default() };
    for_each_crash_image(&sim.trace(), &few, |point, image| {
        if point.before != "the end" {
            return Ok(());
        }
        let read_only = OpenOptions { read_only: true, ..options(1) };
        let store = Store::open_on(Arc::new(image.to_medium()), &read_only, Faults::default())
            .map_err(|error| format!("recovery: {error}"))?;
        let newest = store
            .checkpoints()
            .map_err(|error| error.to_string())?
            .first()
            .map(|info| info.record.generation);
        match newest {
            Some(newest) if newest >= acknowledged => {
                restored_step(&store).map(drop).map_err(|error| format!("restore: {error}"))
            }
            found => Err(format!("generation {acknowledged} was acknowledged, found {found:?}")),
        }
    })
    .unwrap_or_else(|finding| panic!("{finding}"));
}

/// The `nth` attempt of a kind fails, once or always from there on, under `in_flight` saves. False where there was no
/// such attempt.
fn one_failure(model: SimModel, in_flight: u32, kind: AttemptKind, nth: u64, always: bool) -> bool {
    let bed = Bed::new(model, in_flight);
    let failures = bed.fail(nth, always, move |attempt| attempt.kind == kind);
    let results = save_together(&bed.store, 2..2 + u64::from(in_flight));
    bed.assert_settled();
    let failed: Vec<&Error> = results.iter().filter_map(|(_, result)| result.as_ref().err()).collect();
    let hit = failures.load(Ordering::SeqCst) > 0;
    let context = format!("{model:?}, {in_flight} saves, {kind:?} {nth}, always {always}");
    assert_eq!(!failed.is_empty(), hit, "{context}: {failed:?}");
    let flushes = matches!(kind, AttemptKind::Persist | AttemptKind::WriteDurable);
    for error in &failed {
        let kinds: &[ErrorKind] = match flushes {
            true => &[ErrorKind::DurabilityUnknown],
            // A fence on persistent memory is a flush where it guards a commit, a write where it guards a chunk.
            false if kind == AttemptKind::Fence => &[ErrorKind::DurabilityUnknown, ErrorKind::Io],
            false => &[ErrorKind::Io],
        };
        assert_eio(error, kinds);
    }
    let quarantined = bed.store.stats().quarantined_slots;
    let unknown = failed.iter().filter(|error| error.kind() == ErrorKind::DurabilityUnknown).count();
    assert_eq!(quarantined as usize, unknown, "{context}");
    assert_survives_power_loss(&bed.sim, newest_acknowledged(&results));

    bed.sim.stop_failing();
    let newest_saved =
        results.iter().filter(|(_, result)| result.is_ok()).map(|(step, _)| *step).max().unwrap_or(1);
    let restored = restored_step(&bed.store).expect("an earlier checkpoint is intact");
    let saved_or_newest = results.iter().any(|(step, result)| *step == restored && result.is_ok());
    assert!(saved_or_newest || (restored == 1 && newest_saved == 1), "{context}: restored step {restored}");

    let next = begin(&bed.store, 50).and_then(|save| save.wait_durable(WAIT));
    next.unwrap_or_else(|error| panic!("{context}: the next save failed: {error}"));
    assert_survives_power_loss(&bed.sim, bed.store.stats().newest_generation);
    if nth.is_multiple_of(2) {
        assert_eq!(bed.store.repair(WAIT).expect("repair"), quarantined, "{context}");
        bed.assert_as_good_as_new(100);
    } else {
        reopen_then_repair(bed, quarantined, &context);
    }
    hit
}

/// Recovery finds the same, whether quarantines were recorded or not; a repair by the next process lifts them.
fn reopen_then_repair(bed: Bed, quarantined: u32, context: &str) {
    let Bed { sim, in_flight, store } = bed;
    drop(store);
    let store = open(&sim, in_flight).expect("reopen");
    assert_eq!(restored_step(&store).expect("restore"), 50, "{context}");
    let recorded =
        store.recovered().slots.iter().filter(|slot| slot.verdict == Verdict::Quarantined).count() as u32;
    assert!(recorded <= quarantined, "{context}: {recorded} quarantined on the medium");
    assert_eq!(store.repair(WAIT).expect("repair"), recorded, "{context}");
    Bed { sim, in_flight, store }.assert_as_good_as_new(100);
}

fn fail_each(kind: AttemptKind, most_expected: u64) {
    for model in MODELS {
        for in_flight in 1..=3 {
            for always in [false, true] {
                let points =
                    (0..most_expected).take_while(|nth| one_failure(model, in_flight, kind, *nth, always));
                let points = points.count() as u64;
                assert!(
                    points < most_expected,
                    "more {kind:?} than {most_expected}: the test ends too early"
                );
                assert!(points > 0, "{kind:?} is never used by saves on {model:?}");
            }
        }
    }
}

#[test]
fn each_write_fails_in_turn() {
    fail_each(AttemptKind::StartCopy, 30);
}

#[test]
fn each_flush_fails_in_turn() {
    fail_each(AttemptKind::Persist, 10);
}

#[test]
fn each_durable_write_fails_in_turn() {
    fail_each(AttemptKind::WriteDurable, 16);
}

#[test]
fn each_fence_fails_in_turn() {
    fail_each(AttemptKind::Fence, 40);
}

/// The flush fails with several saves under it, and later flushes succeed: all of them fail, none is tried again.
#[test]
fn a_failed_flush_fails_every_save_in_flight() {
    for in_flight in [2u32, 3] {
        let bed = Bed::new(SimModel::Ssd { torn: false }, in_flight);
        let payload = |attempt: &Attempt| attempt.barrier == Some(Barrier::Payload);
        let held = bed.sim.hold(payload);
        let saves: Vec<Save> = (2..2 + u64::from(in_flight))
            .map(|step| promptly("begin", || begin(&bed.store, step)).expect("begin"))
            .collect();
        assert!(bed.sim.wait_held(held, 1, PATIENCE), "no payload was flushed");
        wait_written(&saves);
        let failures = bed.fail(0, false, payload);
        bed.sim.release(held);
        for save in &saves {
            let error = promptly("wait", || save.wait_durable(WAIT)).expect_err("its flush failed");
            assert_eio(&error, &[ErrorKind::DurabilityUnknown]);
            assert!(error.advice().is_some(), "{error} does not say what to do");
        }
        assert_eq!(failures.load(Ordering::SeqCst), 1, "the one failure must count for all");
        bed.assert_settled();
        assert_eq!(bed.store.stats().quarantined_slots, in_flight);
        assert_eq!(restored_step(&bed.store).expect("restore"), 1);
        assert_survives_power_loss(&bed.sim, 1);
        bed.sim.stop_failing();
        assert_eq!(bed.store.repair(WAIT).expect("repair"), in_flight);
        bed.assert_as_good_as_new(100);
    }
}

fn wait_written(saves: &[Save]) {
    let deadline = Instant::now() + PATIENCE;
    while !saves.iter().all(|save| save.progress().written_bytes == save.progress().total_bytes) {
        assert!(Instant::now() < deadline, "the saves are never written");
        thread::yield_now();
    }
}

/// The kernel tells a failed write-back to one flush only: the mark of one save may take the error of another's data.
#[test]
fn a_mark_that_fails_beside_a_flush_that_succeeds_fails_both() {
    let bed = Bed::new(SimModel::Ssd { torn: false }, 2);
    let held = bed.sim.hold(|attempt| attempt.barrier == Some(Barrier::Payload));
    let first = promptly("begin", || begin(&bed.store, 2)).expect("begin");
    assert!(bed.sim.wait_held(held, 1, PATIENCE));
    let failures = bed.fail(0, false, |attempt| attempt.barrier == Some(Barrier::WritingMark));
    let second = promptly("begin", || begin(&bed.store, 3).and_then(|save| save.wait_durable(WAIT)));
    assert_eio(&second.expect_err("its mark failed"), &[ErrorKind::DurabilityUnknown]);
    assert_eq!(failures.load(Ordering::SeqCst), 1);
    bed.sim.release(held);
    let error =
        promptly("wait", || first.wait_durable(WAIT)).expect_err("a flush failed while it was in flight");
    assert_eio(&error, &[ErrorKind::DurabilityUnknown]);
    bed.assert_settled();
    assert_eq!(restored_step(&bed.store).expect("restore"), 1);
    bed.sim.stop_failing();
    assert_eq!(bed.store.repair(WAIT).expect("repair"), 2);
    bed.assert_as_good_as_new(100);
}

/// A device that is gone for flushes: every save fails at once, until the store says that all slots are quarantined.
/// What was saved before can be read all the while.
#[test]
fn a_dead_device_is_reported_until_it_is_repaired() {
    let bed = Bed::new(SimModel::Ssd { torn: false }, 2);
    bed.fail(0, true, |attempt| matches!(attempt.kind, AttemptKind::Persist | AttemptKind::WriteDurable));
    for step in 2..u64::from(SLOTS) + 1 {
        let error = promptly("save", || begin(&bed.store, step).and_then(|save| save.wait_durable(WAIT)));
        assert_eio(&error.expect_err("nothing can be flushed"), &[ErrorKind::DurabilityUnknown]);
        assert_eq!(restored_step(&bed.store).expect("restore"), 1);
    }
    bed.assert_settled();
    let stats = bed.store.stats();
    assert_eq!((stats.quarantined_slots, stats.claimable_slots), (SLOTS - 1, 0));
    let brief = Some(Duration::from_millis(10));
    let error = promptly("begin", || bed.store.begin_raw(99, 1, &[], brief)).err().expect("no slot is left");
    assert_eq!(error.kind(), ErrorKind::NoSlot);
    let text = error.to_string();
    assert!(text.contains("7 quarantined") && text.contains("repair"), "{text}");
    let repair = promptly("repair", || bed.store.repair(WAIT)).expect_err("the device is still dead");
    assert_eq!(repair.errno(), Some(libc::EIO), "{repair}");
    assert!(repair.path().is_some(), "{repair} does not name the region");
    assert_eq!(bed.store.stats().quarantined_slots, SLOTS - 1, "a repair that failed lifts nothing");
    assert_survives_power_loss(&bed.sim, 1);

    bed.sim.stop_failing();
    assert_eq!(bed.store.repair(WAIT).expect("repair"), SLOTS - 1);
    bed.assert_as_good_as_new(100);
}

/// Pins, marks and discards that cannot be made durable are refused, change nothing, and can be asked for again.
#[test]
fn control_changes_that_fail_change_nothing() {
    let bed = Bed::new(SimModel::Ssd { torn: false }, 1);
    type Change = fn(&Store) -> Result<()>;
    let changes: [(&str, Change); 4] = [
        ("pin", |store| store.pin(1)),
        ("unpin", |store| store.unpin(1)),
        ("mark_global", |store| store.mark_global(0, 1).map(drop)),
        ("discard_newer", |store| store.discard_newer(0).map(drop)),
    ];
    for (name, change) in changes {
        let before = bed.store.checkpoints().expect("list");
        let mark = bed.store.region().global_mark();
        bed.fail(0, false, |attempt| attempt.barrier == Some(Barrier::Control));
        let error = promptly(name, || change(&bed.store)).expect_err("it cannot be durable");
        assert_eio(&error, &[ErrorKind::DurabilityUnknown]);
        assert_eq!(bed.store.checkpoints().expect("list"), before, "{name}");
        assert_eq!(bed.store.region().global_mark(), mark, "{name}");
        assert_eq!(restored_step(&bed.store).expect("restore"), 1, "{name}");
        bed.sim.stop_failing();
        change(&bed.store).unwrap_or_else(|error| panic!("{name}, again: {error}"));
    }
    assert!(bed.store.checkpoints().expect("list").is_empty(), "discarded at last");
    bed.assert_as_good_as_new(100);
}

/// Opening fails with an ordinary error, or works around what cannot be read, and destroys nothing.
#[test]
fn each_step_of_opening_fails_in_turn() {
    for kind in [AttemptKind::Read, AttemptKind::Persist, AttemptKind::WriteDurable] {
        for model in MODELS {
            for always in [false, true] {
                for nth in 0.. {
                    let bed = Bed::new(model, 1);
                    let Bed { sim, in_flight, store } = bed;
                    drop(store);
                    let failures = fail(&sim, nth, always, move |attempt| attempt.kind == kind);
                    let opened = promptly("open", || open(&sim, in_flight));
                    let hit = failures.load(Ordering::SeqCst) > 0;
                    match &opened {
                        Ok(store) if hit => {
                            assert_eq!(kind, AttemptKind::Read, "{nth}: a flush that failed went unnoticed");
                            // What could be read again is not missed; what could not is told: now, or, of the chunk
                            // tables that only spare writes, when it is needed.
                            match restored_step(store) {
                                _ if tells_damage(store) => {}
                                Err(error) if always => assert_eio(&error, &[ErrorKind::Io]),
                                restored => assert_eq!(restored.expect("restore"), 1),
                            }
                        }
                        Ok(_) => {}
                        Err(error) => assert_eio(error, &[ErrorKind::Io, ErrorKind::DurabilityUnknown]),
                    }
                    drop(opened);
                    sim.stop_failing();
                    assert_survives_power_loss(&sim, 1);
                    let store = open(&sim, in_flight).expect("open");
                    assert_eq!(restored_step(&store).expect("restore"), 1, "{kind:?} {nth}");
                    begin(&store, 2).and_then(|save| save.wait_durable(WAIT)).expect("save");
                    if !hit {
                        assert!(nth > 0, "{kind:?} is never used by opening");
                        break;
                    }
                }
            }
        }
    }
}

fn tells_damage(store: &Store) -> bool {
    let table = store.recovered();
    let rejected = |verdict: &Verdict| matches!(verdict, Verdict::Rejected(_));
    !table.notes.is_empty() || table.slots.iter().any(|slot| rejected(&slot.verdict))
}

/// A payload that cannot be read falls back to the one before, and says so; the newest is there when it can be.
#[test]
fn each_read_of_a_restore_fails_in_turn() {
    for nth in 0.. {
        let bed = Bed::new(SimModel::Ssd { torn: false }, 1);
        let Bed { sim, store, .. } = bed;
        drop(store);
        let store = Store::open_on(sim.clone(), &OpenOptions { keep: 2, ..options(1) }, Faults::default())
            .expect("open");
        begin(&store, 2).and_then(|save| save.wait_durable(WAIT)).expect("save");
        let reads = |attempt: &Attempt| matches!(attempt.kind, AttemptKind::Read | AttemptKind::StartRead);
        let failures = fail(&sim, nth, false, reads);
        let opened =
            promptly("restore", || store.open_checkpoint(Select::Newest, true)).expect("one can be read");
        let hit = failures.load(Ordering::SeqCst) > 0;
        assert_eq!(opened.checkpoint.record().step, if hit { 1 } else { 2 }, "read {nth}");
        assert_eq!(opened.rejected.len(), usize::from(hit));
        for (record, error) in &opened.rejected {
            assert_eq!(record.step, 2);
            assert_eio(error, &[ErrorKind::Io]);
        }
        sim.stop_failing();
        drop(opened);
        assert_eq!(restored_step(&store).expect("restore"), 2);
        let pool = store.region().pool();
        assert_eq!(pool.free_count(), pool.buffer_count(), "a staging buffer was lost");
        if !hit {
            assert!(nth > 2, "a restore reads table, header and chunks");
            break;
        }
    }
}
