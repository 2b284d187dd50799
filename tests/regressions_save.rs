//! Defects of saves that were found once and must not come back: damage that a hash blessed, one caller's panic or a
//! dead thread that hangs every other save, a forked child that waits for its parent's threads, waits without an
//! end, memory without a bound.
#![cfg(feature = "sim")]

mod common;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use common::{disk, region_in, WAIT};
use pccheck::engine::{Select, Store, Tensor, TensorAt};
use pccheck::format::Dtype;
use pccheck::medium::sim::{Attempt, AttemptKind, SimMedium, SimModel};
use pccheck::medium::{Barrier, Durability, Medium, Requested};
use pccheck::save::{Faults, Save};
use pccheck::store::{format_medium, FormatOptions, OpenOptions};
use pccheck::{ErrorKind, Result};

const CHUNK: usize = 8192;
const STATE_BYTES: usize = 40_000;
const BUFFERS: usize = 6;
/// Nothing here takes this long unless it hangs.
const PROMPT: Duration = Duration::from_secs(10);
/// A wait that is meant to run out.
const SHORT: Option<Duration> = Some(Duration::from_millis(150));

fn options(max_in_flight: u32) -> OpenOptions {
    OpenOptions {
        required: Durability::Power,
        max_in_flight,
        chunk_bytes: CHUNK as u64,
        staging_bytes: (BUFFERS * CHUNK) as u64,
        writers: 1,
        readers: 1,
        ..OpenOptions::default()
    }
}

fn bed(max_in_flight: u32, payload_bytes: u64) -> (Arc<SimMedium>, Store) {
    let format = FormatOptions::new(max_in_flight + 2, payload_bytes);
    let slot_bytes = payload_bytes.next_multiple_of(2 << 20) + (2 << 20);
    let bytes = (2 << 20) + u64::from(max_in_flight + 2) * slot_bytes;
    let sim = Arc::new(SimMedium::new(bytes, SimModel::Ssd { torn: false }));
    format_medium(&*sim, &format).expect("format");
    let store = open(&sim, max_in_flight);
    (sim, store)
}

fn open(sim: &Arc<SimMedium>, max_in_flight: u32) -> Store {
    Store::open_on(sim.clone(), &options(max_in_flight), Faults::default()).expect("open")
}

fn state(step: u64) -> Vec<u8> {
    (0..STATE_BYTES as u64).map(|at| (at.wrapping_mul(37) ^ step.wrapping_mul(11)) as u8).collect()
}

fn begin(store: &Store, step: u64) -> Result<Save> {
    let tensor = Tensor { name: "w", dtype: Dtype::U8, shape: &[STATE_BYTES as u64], data: &state(step) };
    store.save(step, &[tensor], &[], WAIT)
}

fn save(store: &Store, step: u64) {
    begin(store, step).and_then(|save| save.wait_durable(WAIT)).expect("save");
}

/// Fails the test instead of hanging with it.
fn within<T: Send>(what: &str, run: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let running = scope.spawn(run);
        let deadline = Instant::now() + PROMPT;
        while !running.is_finished() {
            if Instant::now() > deadline {
                // Unwinding would wait for the thread that hangs.
                eprintln!("{what} hangs");
                std::process::exit(101);
            }
            thread::sleep(Duration::from_millis(1));
        }
        running.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// After the store was closed: the newest checkpoint is one of the steps and whole, and another is saved.
fn opens_and_saves_again(sim: &Arc<SimMedium>, steps: &[u64], what: &str) {
    sim.stop_failing();
    let store = open(sim, 2);
    let whole = |steps: &[u64]| {
        let newest = store.open_checkpoint(Select::Newest, true).expect("intact").checkpoint;
        let step = newest.record().step;
        assert!(steps.contains(&step), "{what}: step {step}");
        assert_eq!(newest.read_tensor("w").expect("read"), state(step), "{what}");
    };
    whole(steps);
    save(&store, 100);
    whole(&[100]);
}

fn all_buffers_are_back(store: &Store) {
    let pool = store.region().pool();
    let deadline = Instant::now() + PROMPT;
    while pool.free_count() != pool.buffer_count() {
        assert!(Instant::now() < deadline, "{pool:?}");
        thread::yield_now();
    }
}

#[test]
fn damage_to_a_spilled_chunk_fails_the_raw_save() {
    const CHUNKS: usize = 12;
    let (sim, store) = bed(1, (CHUNKS * CHUNK) as u64 + 8192);
    save(&store, 1);
    let mut raw = store.begin_raw(2, (CHUNKS * CHUNK) as u64, &[], WAIT).expect("begin");
    let slot = (0..3)
        .find(|&slot| store.region().slot_views()[slot as usize].generation == raw.generation())
        .expect("the raw save's slot");
    for chunk in 0..CHUNKS {
        raw.write_at((chunk * CHUNK) as u64, &[7; 100]).expect("write");
    }
    // More chunks are open than there are buffers: the first ones were spilled.
    let at = store.region().layout().slot_offset(slot) + CHUNK as u64;
    let mut block = [0; 4096];
    sim.read(at, &mut block).expect("read");
    block[10] ^= 1;
    sim.copy(at, &block).expect("damage");
    let mut finish = || -> Result<()> {
        for chunk in 0..CHUNKS {
            raw.write_at((chunk * CHUNK + 100) as u64, &[8; CHUNK - 100])?;
        }
        raw.commit()?.wait_durable(WAIT).map(|_| ())
    };
    let error = finish().expect_err("damaged bytes became a checkpoint");
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    let offset = error.offset().expect("the error names the offset");
    assert!((offset..offset + CHUNK as u64).contains(&(at + 10)), "{error}, damaged at {at}");
    assert_eq!(raw.write_at(0, &[1]).expect_err("it has failed").kind(), ErrorKind::Corrupt);
    drop(raw);
    store.drain(WAIT).expect("drain");
    all_buffers_are_back(&store);
    save(&store, 3);
}

#[test]
fn a_callback_that_panics_harms_no_other_save() {
    let (sim, store) = bed(3, 2 * STATE_BYTES as u64);
    let hold = sim.hold(|attempt| attempt.barrier == Some(Barrier::Payload));
    let first = begin(&store, 1).expect("begin");
    assert!(sim.wait_held(hold, 1, PROMPT));
    let others = [begin(&store, 2).expect("begin"), begin(&store, 3).expect("begin")];
    first.on_end(Box::new(|| panic!("the caller's (expected by the test)")));
    others[0].on_end(Box::new(|| panic!("the caller's (expected by the test)")));
    sim.release(hold);
    for save in [&first, &others[0], &others[1]] {
        save.wait_durable(Some(PROMPT)).expect("durable");
    }
    first.on_end(Box::new(|| panic!("at once (expected by the test)")));
    save(&store, 4);
    within("close", || drop(store));
    opens_and_saves_again(&sim, &[4], "callbacks");
}

#[test]
fn a_callback_that_is_replaced_is_dropped_outside_of_the_lock() {
    struct SetsAgain(Arc<Save>);
    impl Drop for SetsAgain {
        fn drop(&mut self) {
            self.0.on_end(Box::new(|| ()));
        }
    }
    let (sim, store) = bed(1, 2 * STATE_BYTES as u64);
    let hold = sim.hold(|attempt| attempt.barrier == Some(Barrier::Payload));
    let save = Arc::new(begin(&store, 1).expect("begin"));
    let sets_again = SetsAgain(save.clone());
    save.on_end(Box::new(move || drop(sets_again)));
    within("replacing a callback", || save.on_end(Box::new(|| ())));
    sim.release(hold);
    save.wait_durable(WAIT).expect("durable");
}

/// Panics once in the first call of the medium that `picks` picks.
fn panic_in(sim: &SimMedium, picks: impl Fn(&Attempt) -> bool + Send + 'static) {
    let mut panicked = false;
    sim.fail(move |attempt| {
        if !panicked && picks(attempt) {
            panicked = true;
            panic!("a thread of the engine dies (expected by the test)");
        }
        None
    });
}

#[test]
fn the_death_of_a_thread_ends_every_save_and_wakes_every_waiter() {
    type Picks = fn(&Attempt) -> bool;
    let deaths: [(&str, Picks); 4] = [
        ("committer, in its flush", |attempt| attempt.barrier == Some(Barrier::Payload)),
        ("committer, in its record", |attempt| attempt.barrier == Some(Barrier::Commit)),
        ("marker", |attempt| attempt.barrier == Some(Barrier::WritingMark)),
        ("copier or marker, submitting", |attempt| attempt.kind == AttemptKind::StartCopy),
    ];
    for (who, picks) in deaths {
        let (sim, store) = bed(3, 2 * STATE_BYTES as u64);
        save(&store, 1);
        let raw = store.begin_raw(9, 3 * CHUNK as u64, &[], WAIT).expect("begin raw");
        store.drain(Some(Duration::from_millis(20))).expect_err("the raw save is in flight");
        panic_in(&sim, picks);
        let data = state(2);
        let tensor = TensorAt {
            name: "w",
            dtype: Dtype::U8,
            shape: &[STATE_BYTES as u64],
            ptr: data.as_ptr(),
            bytes: STATE_BYTES as u64,
            device: None,
        };
        // SAFETY: `data` outlives both saves and is not changed.
        let save = || unsafe { store.begin_save(2, &[tensor], &[], WAIT) };
        let saves: Vec<Save> = [save(), save()]
            .into_iter()
            .filter_map(|begun| match begun {
                Ok(save) => Some(save),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::Internal, "{who}: {error}");
                    None
                }
            })
            .collect();
        for save in &saves {
            let error = save.wait_durable(Some(PROMPT)).expect_err("its thread died");
            assert_eq!(error.kind(), ErrorKind::Internal, "{who}: {error}");
            assert!(save.progress().ended);
            match save.wait_copied(Some(PROMPT)) {
                Ok(()) => {}
                Err(error) => assert_eq!(error.kind(), ErrorKind::Internal, "{who}: {error}"),
            }
        }
        assert!(!saves.is_empty(), "{who}");
        store.drain(Some(PROMPT)).expect("nothing is in flight");
        assert_eq!(raw.write_at(0, &[1]).expect_err("ended, too").kind(), ErrorKind::Internal, "{who}");
        assert_eq!(begin(&store, 3).err().expect("poisoned").kind(), ErrorKind::Internal, "{who}");
        let stats = store.stats();
        assert_eq!(
            stats.saves_begun,
            stats.saves_durable + stats.saves_failed,
            "{who}: each is counted once"
        );
        within(who, || {
            drop(saves);
            drop(raw);
            drop(store);
        });
        // A record whose writer died may be durable.
        opens_and_saves_again(&sim, &[1, 2], who);
    }
}

#[test]
fn a_defect_in_a_completion_ends_its_save_alone() {
    let (sim, store) = bed(2, 2 * STATE_BYTES as u64);
    save(&store, 1);
    let raw = store.begin_raw(2, 100, &[], WAIT).expect("begin raw");
    panic_in(&sim, |attempt| attempt.kind == AttemptKind::Fence);
    let error = begin(&store, 3).and_then(|save| save.wait_durable(Some(PROMPT))).expect_err("defect");
    assert_eq!(error.kind(), ErrorKind::Internal, "{error}");
    let mut raw = raw;
    raw.write_at(0, &[5; 100]).expect("write");
    raw.commit().expect("commit").wait_durable(Some(PROMPT)).expect("it is not concerned");
    assert_eq!(begin(&store, 4).err().expect("poisoned").kind(), ErrorKind::Internal);
    within("close", || drop(store));
    let store = open(&sim, 2);
    let streamed = store.open_checkpoint(Select::Newest, true).expect("intact").checkpoint;
    assert_eq!(streamed.record().step, 2, "what ended well is newest");
    let before = store.open_checkpoint(Select::Step(1), true).expect("the one before").checkpoint;
    assert_eq!(before.read_tensor("w").expect("read"), state(1));
    save(&store, 5);
}

#[test]
fn a_forked_child_can_drop_and_ask_every_save() {
    const BYTES: usize = 64 << 20;
    let format = FormatOptions { medium: Requested::Mmap, ..FormatOptions::new(4, BYTES as u64 + (1 << 20)) };
    let region = region_in(disk(), &format);
    let open = OpenOptions {
        medium: Requested::Mmap,
        required: Durability::Process,
        staging_bytes: 8 << 20,
        chunk_bytes: 1 << 20,
        ..OpenOptions::default()
    };
    let store = Store::open(&region.path, &open).expect("open");
    let data = vec![7u8; BYTES];
    let tensor = TensorAt {
        name: "w",
        dtype: Dtype::U8,
        shape: &[BYTES as u64],
        ptr: data.as_ptr(),
        bytes: BYTES as u64,
        device: None,
    };
    // SAFETY: `data` outlives the saves and is not changed.
    let begin = |step| unsafe { store.begin_save(step, &[tensor], &[], WAIT) }.expect("begin");
    let restored = || {
        let newest = store.open_checkpoint(Select::Newest, true).expect("intact").checkpoint;
        assert!(newest.read_tensor("w").expect("read") == data, "it came back changed");
        newest.record().step
    };
    begin(0).wait_durable(WAIT).expect("the checkpoint before");
    let mut raw = store.begin_raw(1, 4 << 20, &[], WAIT).expect("begin raw");
    raw.write_at(5, &[1; 100]).expect("write");
    let save = begin(2);
    // SAFETY: the child calls the library alone, and leaves by `_exit`.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: SIGALRM ends a child that hangs.
        unsafe { libc::alarm(20) };
        let forked = |result: Result<()>| result.is_err_and(|error| error.kind() == ErrorKind::Forked);
        let refused = [
            forked(save.wait_copied(None)),
            forked(save.wait_durable(None).map(|_| ())),
            forked(raw.write_at(300, &[1])),
            forked(raw.wait_ended(None).map(|_| ())),
            forked(raw.commit().map(|_| ())),
            forked(store.drain(None)),
        ];
        save.cancel();
        raw.cancel();
        save.on_end(Box::new(|| ()));
        let told = save.progress().ended && raw.progress().is_some_and(|progress| progress.ended);
        drop(save);
        drop(raw);
        drop(store);
        // SAFETY: ends the child without running the parent's exit handlers.
        unsafe { libc::_exit(i32::from(!refused.iter().all(|&refused| refused)) + 2 * i32::from(!told)) };
    }
    assert!(child > 0, "fork failed");
    let mut status = 0;
    // SAFETY: waits for the child just made.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(status, 0, "the child hung (14) or was not refused");
    save.wait_durable(WAIT).expect("the parent's save is not concerned");
    raw.write_at(0, &[1; 5]).expect("nor is its stream");
    assert_eq!(restored(), 2);
    begin(3).wait_durable(WAIT).expect("nor is the next");
    assert_eq!(restored(), 3);
}

#[test]
fn a_raw_write_that_cannot_go_on_ends_when_its_wait_does() {
    let (sim, store) = bed(2, 40 * CHUNK as u64);
    // A share is 2 of the 6 buffers; the third half-filled chunk needs the mark, which is held.
    let hold = sim.hold(|attempt| attempt.barrier == Some(Barrier::WritingMark));
    let raw = store.begin_raw(1, 30 * CHUNK as u64, &[], SHORT).expect("begin");
    let begun = Instant::now();
    let error = within("a write that waits for the mark", || {
        (0..9u64).find_map(|chunk| raw.write_at(chunk * CHUNK as u64, &[1; 10]).err())
    })
    .expect("the third chunk had no place");
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    assert!(error.to_string().contains("failed"), "{error} does not say that the save has failed");
    assert!(begun.elapsed() >= SHORT.unwrap(), "it gave up early");
    assert_eq!(raw.write_at(9 * CHUNK as u64, &[1]).expect_err("failed").kind(), ErrorKind::TimedOut);
    sim.release(hold);
    drop(raw);
    store.drain(WAIT).expect("drain");
    all_buffers_are_back(&store);
    save(&store, 2);
}

#[test]
fn a_full_pool_ends_raw_writes_and_begins_in_time() {
    let (sim, store) = bed(3, 40 * CHUNK as u64);
    let raw = store.begin_raw(1, 30 * CHUNK as u64, &[], SHORT).expect("begin");
    let hold = sim.hold(|attempt| attempt.kind == AttemptKind::StartCopy);
    // The rest of the first chunk, so that the raw save has no half-filled one that it could spill.
    raw.write_at(0, &[1; 4096]).expect("write");
    assert_eq!(raw.progress().expect("not committed").copied_bytes, CHUNK as u64);
    let data = vec![3u8; 20 * CHUNK];
    let tensor = TensorAt {
        name: "w",
        dtype: Dtype::U8,
        shape: &[data.len() as u64],
        ptr: data.as_ptr(),
        bytes: data.len() as u64,
        device: None,
    };
    // SAFETY: `data` outlives the save and is not changed.
    let other = unsafe { store.begin_save(2, &[tensor], &[], WAIT) }.expect("begin");
    let pool = store.region().pool();
    while pool.free_count() > 0 {
        thread::yield_now();
    }
    let error = within("begin", || store.begin_raw(3, 100, &[], SHORT)).err().expect("no buffer is free");
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    // One writer waits for a buffer of the pool, the other for the one that the first was promised.
    let errors: Vec<Option<pccheck::Error>> = within("writes", || {
        thread::scope(|scope| {
            let raw = &raw;
            let write = |at: usize| move || raw.write_at(at as u64, &[1; 10]).err();
            let places = [4 * CHUNK, 7 * CHUNK, 7 * CHUNK + 100];
            let writers = places.map(|at| scope.spawn(write(at)));
            writers.into_iter().map(|writer| writer.join().expect("writer")).collect()
        })
    });
    for error in errors {
        assert_eq!(error.expect("no buffer is free").kind(), ErrorKind::TimedOut);
    }
    sim.release(hold);
    other.wait_durable(WAIT).expect("durable");
    drop((raw, other));
    store.drain(WAIT).expect("drain");
    all_buffers_are_back(&store);
    save(&store, 4);
}

#[test]
fn a_wait_of_zero_is_said_of_the_slot_alone() {
    let (sim, store) = bed(2, 40 * CHUNK as u64);
    let hold = sim.hold(|attempt| attempt.barrier == Some(Barrier::WritingMark));
    let mut raw = store.begin_raw(1, 9 * CHUNK as u64, &[], Some(Duration::ZERO)).expect("a slot is free");
    thread::scope(|scope| {
        let writer = scope.spawn(|| {
            (0..9u64).try_for_each(|chunk| raw.write_at(chunk * CHUNK as u64, &[1; CHUNK / 2]))?;
            (0..9u64).try_for_each(|chunk| raw.write_at(chunk * CHUNK as u64 + 4096, &[2; CHUNK / 2]))
        });
        thread::sleep(Duration::from_millis(200));
        assert!(!writer.is_finished(), "nothing may be spilled before the mark is durable");
        sim.release(hold);
        writer.join().expect("writer").expect("writes");
    });
    raw.commit().expect("commit").wait_durable(WAIT).expect("durable");
}

#[test]
fn scattered_tiny_writes_are_bounded_and_told_so() {
    const BYTES: u64 = 1 << 20;
    let (_sim, store) = bed(1, BYTES + (1 << 20));
    let raw = store.begin_raw(1, BYTES, &[], WAIT).expect("begin");
    // Within a chunk before the next, so that only the count of ranges is in the way.
    let refused = (0..BYTES / 2).find_map(|at| raw.write_at(2 * at, &[1]).err().map(|error| (at, error)));
    let (at, error) = refused.expect("half a million ranges were kept in memory");
    assert!((65_000..=65_536).contains(&at), "refused after {at}");
    assert_eq!(error.kind(), ErrorKind::TooLarge, "{error}");
    assert!(error.advice().is_some_and(|advice| advice.contains("larger")), "{error}");
    drop(raw);
    store.drain(WAIT).expect("drain");
    save(&store, 2);
}
