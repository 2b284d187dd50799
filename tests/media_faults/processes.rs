//! Trainers that fork, are stopped, terminated or killed.

use std::env;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::channel;
use std::sync::Mutex;
use std::time::Duration;

use pccheck::engine::{format_region, Store};
use pccheck::save::Save;
use pccheck::store::OpenOptions;
use pccheck::{ErrorKind, Result};

use super::bed::{
    assert_settled, begin, format, restored_step, save, seen_by_a_reader, Bed, Way, STATE_BYTES, WAIT,
};
use super::common::scratch;
use super::disk::Call;

const ENV_REGION: &str = "PCC_FAULTS_REGION";
const ENV_FORKS: &str = "PCC_FAULTS_FORKS";
/// Of a state that is streamed.
const HALF: usize = STATE_BYTES / 2;

/// The trainer: a test that does nothing unless [`Trainer::start`] started this process.
#[test]
fn child_process() {
    let Some(path) = env::var_os(ENV_REGION) else { return };
    let store = Store::open(Path::new(&path), &Way::Threads.options()).expect("open");
    if env::var_os(ENV_FORKS).is_some() {
        // The one is in flight until its other half is written, the other as long as it takes.
        let mut raw = store.begin_raw(2, 2 * HALF as u64, &[], WAIT).expect("begin");
        raw.write_at(0, &[7; HALF]).expect("write");
        let save = begin(&store, 3).expect("begin");
        // SAFETY: the child does nothing but wait for a signal.
        let worker = match unsafe { libc::fork() } {
            0 => loop {
                // SAFETY: waits.
                unsafe { libc::pause() };
            },
            worker => worker,
        };
        say("in-flight", u64::from(store.stats().in_flight));
        say("forked", worker as u64);
        raw.write_at(HALF as u64, &[7; HALF]).expect("the parent's saves go on");
        for save in [raw.commit().expect("commit"), save] {
            save.wait_durable(WAIT).expect("the parent's saves go on");
        }
    }
    for step in 10.. {
        save(&store, step).expect("save");
        say("durable", step);
    }
}

fn say(what: &str, number: u64) {
    let mut out = std::io::stdout().lock();
    // On a line of its own, whatever the test runner has printed before.
    writeln!(out, "\n@{what} {number}").and_then(|()| out.flush()).expect("the parent listens");
}

struct Trainer {
    process: Child,
    says: BufReader<ChildStdout>,
}

impl Trainer {
    fn start(region: &Path, forks: bool) -> Trainer {
        let mut command = Command::new(env::current_exe().expect("this program"));
        command.args(["--exact", "processes::child_process", "--nocapture", "--test-threads=1"]);
        command.env(ENV_REGION, region).stdin(Stdio::null()).stdout(Stdio::piped());
        if forks {
            command.env(ENV_FORKS, "1");
        }
        let mut process = command.spawn().expect("start a trainer");
        let says = BufReader::new(process.stdout.take().expect("a pipe"));
        Trainer { process, says }
    }

    /// The next number that it says of something.
    fn hear(&mut self, what: &str) -> u64 {
        let mut line = String::new();
        loop {
            line.clear();
            assert!(self.says.read_line(&mut line).expect("read") > 0, "the trainer ended without {what}");
            let said = line.trim().strip_prefix('@').and_then(|said| said.split_once(' '));
            if let Some((_, number)) = said.filter(|(said, _)| *said == what) {
                return number.parse().expect("a number");
            }
        }
    }

    fn signal(&self, signal: i32) {
        send(self.process.id() as i32, signal);
    }

    /// Waits for the end; the last step that it said to be durable, from `known` on.
    fn end(mut self, known: u64) -> u64 {
        let mut last = known;
        let lines = self.says.by_ref().lines().map_while(Result::ok);
        for line in lines {
            last = line.strip_prefix("@durable ").and_then(|step| step.parse().ok()).unwrap_or(last);
        }
        self.process.wait().expect("wait");
        last
    }
}

fn send(process: i32, signal: i32) {
    // SAFETY: sends a signal to a child of this process or of its child.
    assert_eq!(unsafe { libc::kill(process, signal) }, 0);
}

fn region() -> (tempfile::TempDir, PathBuf) {
    let folder = scratch();
    let path = folder.path().join("region");
    format_region(&path, &format()).expect("format");
    (folder, path)
}

/// As a writer who does not wait much for the lock of one that is dead: the kernel frees it when it has ended the process.
fn open_soon(path: &Path) -> Store {
    let options = OpenOptions { lock_wait: Some(Duration::from_secs(2)), ..Way::Threads.options() };
    Store::open(path, &options).expect("the lock is free")
}

/// Data-loader workers outlive a trainer that is killed, and hold nothing of it.
#[test]
fn workers_that_outlive_a_killed_trainer_do_not_hold_the_region() {
    let (_folder, path) = region();
    let mut trainer = Trainer::start(&path, true);
    assert!(trainer.hear("in-flight") > 0, "it must fork in mid-save");
    let worker = trainer.hear("forked") as i32;
    let durable = trainer.hear("durable");
    trainer.signal(libc::SIGKILL);
    trainer.process.wait().expect("wait");
    let store = open_soon(&path);
    let alive = Path::new("/proc").join(worker.to_string()).exists();
    let restored = restored_step(&store);
    let saved = save(&store, 1_000_000);
    send(worker, libc::SIGKILL);
    assert!(alive, "the worker must live on, else nothing was tested");
    assert!(restored.expect("restore") >= durable);
    saved.expect("save");
}

#[test]
fn a_trainer_that_is_terminated_loses_nothing_durable() {
    let (_folder, path) = region();
    let mut trainer = Trainer::start(&path, false);
    let durable = trainer.hear("durable");
    trainer.signal(libc::SIGTERM);
    let last = trainer.end(durable);
    assert!(seen_by_a_reader(&path, Way::Threads) >= last);
    let store = open_soon(&path);
    assert!(restored_step(&store).expect("restore") >= last);
    save(&store, 1_000_000).expect("save");
}

/// Stopped, it holds the region, which others can read all the while; it goes on where it was.
#[test]
fn a_trainer_that_is_stopped_holds_the_region_and_goes_on() {
    let (_folder, path) = region();
    let mut trainer = Trainer::start(&path, false);
    let durable = trainer.hear("durable");
    trainer.signal(libc::SIGSTOP);
    assert!(seen_by_a_reader(&path, Way::Threads) >= durable);
    let options = OpenOptions { lock_wait: Some(Duration::from_millis(50)), ..Way::Threads.options() };
    let error = Store::open(&path, &options).err().expect("it is not dead");
    assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
    assert!(error.to_string().contains(&trainer.process.id().to_string()), "{error}");
    trainer.signal(libc::SIGCONT);
    // What it had said before it was stopped may still be in the pipe, which holds less than this.
    const IN_THE_PIPE: u64 = (64 << 10) / "\n@durable 1\n".len() as u64;
    let mut heard = durable;
    while heard < durable + IN_THE_PIPE + 20 {
        heard = trainer.hear("durable");
    }
    trainer.signal(libc::SIGKILL);
    let last = trainer.end(heard);
    let store = open_soon(&path);
    assert!(restored_step(&store).expect("restore") >= last);
    save(&store, 1_000_000).expect("save");
    assert_eq!(restored_step(&store).expect("restore"), 1_000_000);
}

/// Closing in mid-save cancels: each save has ended when it returns, and what was durable by then stays.
#[test]
fn a_store_that_is_closed_in_mid_save_brings_its_saves_to_an_end() {
    for way in Way::ALL {
        let (_folder, path) = region();
        save(&Store::open(&path, &way.options()).expect("open"), 1).expect("save");
        let mut newest = 1;
        for step in (2..40).step_by(2) {
            let store = Store::open(&path, &way.options()).expect("open");
            // The one cannot be in time, the other may.
            let raw = store.begin_raw(step, 2 * HALF as u64, &[], WAIT).expect("begin");
            raw.write_at(0, &[7; HALF]).expect("write");
            let saved = begin(&store, step + 1).expect("begin");
            // At another moment each time.
            std::thread::sleep(Duration::from_micros(100 * (step - 2)));
            drop(store);
            let error = raw.wait_ended(Some(Duration::ZERO)).expect_err("half of it is missing");
            assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}");
            match saved.wait_durable(Some(Duration::ZERO)) {
                Ok(_) => newest = step + 1,
                Err(error) => assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}"),
            }
            assert_eq!(seen_by_a_reader(&path, way), newest, "{way:?}");
        }
        assert!(newest > 1, "{way:?}: no save was ever in time");
        let store = Store::open(&path, &way.options()).expect("open");
        save(&store, 100).expect("save");
        assert_eq!(restored_step(&store).expect("restore"), 100, "{way:?}");
    }
}

/// Data-loader workers are forked in mid-save: the parent's saves go on, the child is refused, and holds neither lock nor file.
#[test]
fn a_trainer_that_forks_in_mid_save_goes_on() {
    for way in Way::ALL {
        let mut bed = Bed::new(way);
        let (release, held) = channel::<()>();
        let held = Mutex::new(held);
        bed.disk.fail(move |call, bytes| {
            if call == Call::Write && bytes > 4096 {
                // Ends at once when the other side is gone. Not for ever: where the page cache keeps large pieces, the writing mark is
                // such a write, too, and beginning may wait for it.
                let _ = held.lock().expect("lock").recv_timeout(Duration::from_millis(500));
            }
            None
        });
        let saved = begin(bed.store(), 2).expect("begin");
        // SAFETY: the child only asks the library, waits for a signal, and leaves by `_exit`.
        let child = match unsafe { libc::fork() } {
            0 => asks_all(bed.store(), &saved),
            child => child,
        };
        assert!(child > 0, "fork failed");
        assert!(!saved.progress().ended, "{way:?}: it must fork in mid-save");
        drop(release);
        saved.wait_durable(WAIT).expect("the parent's save goes on");
        assert_eq!(waited_for(child), 0, "{way:?}: the child hung or was not refused");
        assert_settled(bed.store(), 0);
        assert_eq!(restored_step(bed.store()).expect("restore"), 2);
        // SAFETY: as above.
        let idle = match unsafe { libc::fork() } {
            0 => loop {
                // SAFETY: waits.
                unsafe { libc::pause() };
            },
            idle => idle,
        };
        bed.store = None;
        let options = OpenOptions { lock_wait: Some(Duration::from_secs(2)), ..way.options() };
        let reopened = Store::open(&bed.path(), &options);
        send(idle, libc::SIGKILL);
        waited_for(idle);
        bed.store = Some(reopened.expect("the child does not keep the lock"));
        assert_eq!(restored_step(bed.store()).expect("restore"), 2);
        bed.assert_as_good_as_new(10);
    }
}

/// The child's end: whether everything was refused to it. What hangs is ended by a signal.
fn asks_all(store: &Store, saved: &Save) -> ! {
    const SOON_S: u32 = 20;
    // SAFETY: takes a number.
    unsafe { libc::alarm(SOON_S) };
    let forked = |result: Result<()>| result.is_err_and(|error| error.kind() == ErrorKind::Forked);
    let refused = forked(saved.wait_durable(WAIT).map(drop))
        && forked(begin(store, 3).map(drop))
        && forked(restored_step(store).map(drop))
        && forked(store.drain(WAIT));
    // SAFETY: ends the child without what the parent does at its exit.
    unsafe { libc::_exit(i32::from(!refused)) }
}

/// The status of a child that has ended.
fn waited_for(child: i32) -> i32 {
    let mut status = 0;
    // SAFETY: writes one number.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    status
}
