//! A region through its lives: one saver after the other, each ended in some way, and what must be there after each.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use pccheck::engine::{format_region, Store};
use pccheck::store::OpenOptions;
use pccheck::ErrorKind;

use super::beside::{export_until, read_until, Seen};
use super::common::{disk as real_disk, save_bytes, scratch_in, WAIT};
use super::content::{self, Random};
use super::disk::{Call, Disk, Trouble};
use super::reports::{run_and_end, Known, Said};
use super::shape::{Orders, Shape, Way};
use super::totals::Totals;

/// Steps that one life may use; the last is the checker's own.
const STEPS_PER_LIFE: u64 = 1_000_000;
const LONGEST_LIFE_MS: u64 = 600;
/// The lock of a killed process must be free after this long.
const LOCK_WAIT: Duration = Duration::from_secs(5);
const READERS: usize = 2;

/// Where a region lies; goes with it.
enum Place {
    Folder { _folder: tempfile::TempDir },
    Disk(Disk),
}

pub struct Life {
    shape: Shape,
    place: Place,
    region: PathBuf,
    known: Known,
}

/// How a saver ends.
#[derive(Debug, Clone, Copy)]
enum End {
    Killed,
    Terminated,
    /// Stopped for a while, then killed.
    Stopped,
}

impl Life {
    pub fn new(shape: Shape) -> Life {
        let in_memory = shape.fails || shape.way == Way::Memory;
        let folder = scratch_in(if in_memory { Path::new("/dev/shm") } else { real_disk() });
        let file = folder.path().join("region");
        format_region(&file, &shape.format(&file)).expect("format");
        let (place, region) = match shape.fails {
            true => {
                let disk = Disk::of_file(Disk::behind_cache, &file);
                let region = disk.path().to_path_buf();
                (Place::Disk(disk), region)
            }
            false => (Place::Folder { _folder: folder }, file),
        };
        Life { shape, place, region, known: Known::default() }
    }

    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// One saver, beside readers and exports, and what it leaves.
    pub fn live(&mut self, nth: u64, random: &mut Random, totals: &mut Totals) -> Result<(), String> {
        let orders = Orders {
            region: self.region.clone(),
            shape: self.shape.clone(),
            first_step: (nth + 1) * STEPS_PER_LIFE,
        };
        let troubles = Arc::new(AtomicU64::new(0));
        if let Place::Disk(disk) = &self.place {
            // What the page cache writes back short is lost in silence: a lying disk, which nothing protects from.
            let may_be_short = self.shape.way != Way::Mmap;
            fail_now_and_then(disk, may_be_short, Random(random.next()), troubles.clone());
        }
        let end = match random.below(10) {
            0..7 => End::Killed,
            7 | 8 => End::Terminated,
            _ => End::Stopped,
        };
        let lasts = Duration::from_millis(random.below(LONGEST_LIFE_MS));
        let seen = Seen::default();
        let said = self.run_saver(&orders, end, lasts, &seen)?;
        if let Place::Disk(disk) = &self.place {
            disk.stop_failing();
        }
        totals.add(&said, &seen, troubles.load(Ordering::Relaxed));
        self.known.learn(&said)?;
        self.check(&said, totals)?;
        self.take_over(orders.first_step + STEPS_PER_LIFE - 1, totals)
    }

    fn run_saver(&self, orders: &Orders, end: End, lasts: Duration, seen: &Seen) -> Result<Said, String> {
        let mut command = Command::new(std::env::current_exe().map_err(|error| error.to_string())?);
        command.args(["--exact", "saver_process", "--nocapture", "--test-threads=1"]).envs(orders.to_env());
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let (region, shape, stop) = (&self.region, &self.shape, &stop);
            let beside: Vec<_> = (0..READERS)
                .map(|_| scope.spawn(move || read_until(stop, region, shape, seen)))
                .chain([scope.spawn(move || export_until(stop, region, shape, seen))])
                .collect();
            let ran = run_and_end(&mut command, "ready", |process| end_saver(process, end, lasts));
            stop.store(true, Ordering::Relaxed);
            for thread in beside {
                thread.join().map_err(|_| "a reader panicked".to_string())??;
            }
            let (said, status) = ran?;
            match status {
                Some(status) if !was_ended(status, shape) => {
                    Err(format!("a saver ended by itself: {status}"))
                }
                None if !shape.fails => Err("a saver could not open the region".to_string()),
                _ => Ok(said),
            }
        })
    }

    /// What any reader finds now: all that was reported durable, whole, and nothing else.
    fn check(&mut self, said: &Said, totals: &mut Totals) -> Result<(), String> {
        let options = OpenOptions { read_only: true, ..self.shape.options() };
        let store =
            Store::open(&self.region, &options).map_err(|error| format!("open read-only: {error}"))?;
        let listed = content::check_all(&store)?;
        for info in store.checkpoints().map_err(|error| error.to_string())? {
            totals.checkpoints_verified += 1;
            totals.verified_bytes += info.record.payload_bytes;
        }
        self.known.check_listed(&listed)?;
        self.known.check_durable(&listed, self.shape.keep, said)?;
        for decision in &store.recovered().slots {
            let recorded = decision.record.as_ref().map_or(0, |record| record.generation);
            self.known.used_up_to = self.known.used_up_to.max(recorded);
        }
        Ok(())
    }

    /// The next writer finds the same, repairs what there is to repair, and saves.
    fn take_over(&mut self, step: u64, totals: &mut Totals) -> Result<(), String> {
        let options = OpenOptions { lock_wait: Some(LOCK_WAIT), ..self.shape.options() };
        let store = match Store::open(&self.region, &options) {
            // What was written back for a dead process and lost is told to whoever asks next, once.
            Err(error) if self.shape.fails && error.kind() == ErrorKind::DurabilityUnknown => {
                Store::open(&self.region, &options)
            }
            opened => opened,
        };
        let store = store.map_err(|error| format!("take over: {error}"))?;
        totals.repaired += u64::from(store.repair(WAIT).map_err(|error| format!("repair: {error}"))?);
        let tensors = content::tensors_of(step);
        let durable = save_bytes(&store, step, &tensors, &[("step", &step.to_string())])
            .and_then(|save| save.wait_durable(WAIT))
            .map_err(|error| format!("the save of a new writer: {error}"))?;
        let mut own = Said::default();
        own.began.insert(step);
        own.issued.insert(durable.generation, step);
        own.durable.insert(durable.generation, step);
        self.known.learn(&own)?;
        let listed = content::check_all(&store)?;
        self.known.check_listed(&listed)?;
        self.known.check_durable(&listed, self.shape.keep, &own)
    }
}

/// Whether it was this program that ended it.
fn was_ended(status: ExitStatus, shape: &Shape) -> bool {
    match status.signal() {
        Some(libc::SIGKILL | libc::SIGTERM) => true,
        // A page of the mapping that the disk did not give: what `mmap` costs on a failing disk.
        Some(libc::SIGBUS) => shape.fails && shape.way == Way::Mmap,
        _ => false,
    }
}

fn end_saver(process: &mut Child, end: End, lasts: Duration) -> std::io::Result<()> {
    let send = |process: &Child, signal| {
        // SAFETY: a signal to a child that has not been waited for.
        match unsafe { libc::kill(process.id() as i32, signal) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    };
    thread::sleep(lasts);
    match end {
        End::Killed => process.kill(),
        End::Terminated => send(process, libc::SIGTERM),
        End::Stopped => {
            send(process, libc::SIGSTOP)?;
            thread::sleep(lasts / 4);
            send(process, libc::SIGCONT)?;
            thread::sleep(lasts / 4);
            process.kill()
        }
    }
}

/// Most calls go well.
fn fail_now_and_then(disk: &Disk, may_be_short: bool, mut random: Random, met: Arc<AtomicU64>) {
    disk.fail(move |call, bytes| {
        let trouble = match (call, random.below(1000)) {
            (_, 0..3) => Some(Trouble::Errno(libc::EIO)),
            (Call::Write, 3 | 4) => Some(Trouble::Errno(libc::ENOSPC)),
            (Call::Write, 5..10) if may_be_short => Some(Trouble::Short(random.below(bytes as u64) as usize)),
            (_, 10..20) => Some(Trouble::Errno(libc::EINTR)),
            (Call::Write, 20..25) => Some(Trouble::Errno(libc::EAGAIN)),
            _ => None,
        };
        // Relaxed: a counter, read when the saver has ended.
        met.fetch_add(u64::from(trouble.is_some()), Ordering::Relaxed);
        trouble
    });
}
