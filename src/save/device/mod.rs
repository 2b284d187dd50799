//! The part of saves that is in the memory of GPUs: fetched by their copy engines, chunk by chunk, into the staging pool.
//!
//! One thread, the [`pump`], makes all calls of the driver that copy: it never waits inside one, but looks at events, so
//! that a device that hangs holds up nothing but the saves of its own memory. It enqueues copies as long as there are
//! free buffers, several groups of chunks ahead on two streams per device, and hands what has arrived to the copiers,
//! which hash and write it. So a chunk has left the caller's memory before it is hashed, and `copied` is told before. Where the pool is smaller
//! than the state, a save may have all its copies enqueued at once for a [`ring`] of buffers; what arrives there is taken by a thread of its own.
//!
//! | module | what |
//! |---|---|
//! | this one | what a save and the pump share |
//! | [`pump`] | the thread |
//! | [`job`] | one save, as the pump sees it |
//! | [`flight`] | copies that were enqueued, and the buffers that are lent to them |
//! | [`lane`] | one device: its streams and its spare memory |
//! | [`backlog`] | a stream, and how much is enqueued on it |
//! | [`batch`] | copies that are to be enqueued together |
//! | [`ring`] | buffers that a GPU's own copies wait for |
//! | [`landing`] | the thread that takes what arrives there |
//! | [`courtesy`] | how many copiers are at what has arrived |
//! | [`spare`] | spare memory of a device |
//! | [`direct`] | which chunks go from there to the file by cuFile |
//! | [`on_device`] | writing them |

mod backlog;
mod batch;
mod courtesy;
mod direct;
mod flight;
mod job;
mod landing;
mod lane;
mod on_device;
mod pump;
mod ring;
mod spare;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

pub use direct::DirectStorage;
pub(super) use landing::run_landing;
pub(super) use on_device::{write_from_device, OnDevice};
pub(super) use pump::run_pump;

use courtesy::Courtesy;
use landing::Rings;

use crate::cuda::{Device, Event, Owners, Relaxed, UserStream};
use crate::error::{Error, ErrorKind, Result};
use crate::save::core::SaveCore;
use crate::source::DeviceSource;
use crate::staging::StagingBuffer;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Arc, Condvar, Event as Signal, Mutex};

/// Where a state on a GPU goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Snapshot {
    /// Into the staging pool, over the bus: copied when all has passed through it.
    #[default]
    Staging,
    /// Into spare memory of the GPU where that has room, else as `Staging`.
    Auto,
    /// Into spare memory of the GPU, at the speed of that memory: copied at once, fetched from there. As much memory as
    /// the state takes there is allocated at the first such save and kept; the save fails where there is not so much.
    Spare,
}

/// How the part of a save that is on GPUs is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceOptions {
    /// The save holds the state as of everything that was enqueued on this stream (`CUstream`, as a number) when it
    /// began; 0 is the legacy default stream of each device concerned. Default 0.
    pub stream: usize,
    /// Where the state goes first. Default: the staging pool.
    pub snapshot: Snapshot,
    /// Whether chunks go from spare memory to the file past host memory. Default: not.
    pub direct_storage: DirectStorage,
    /// Where the staging pool is smaller than the state, copies wait on the GPU for buffers to become free, by flags in memory, so that all
    /// are enqueued at once and [`Save::stream_wait_copied`](super::Save::stream_wait_copied) waits for no writing. Default false.
    pub flag_waits: bool,
    /// After so long without all of it having arrived the save fails: the device hangs, or its stream waits for
    /// something that never comes. Default 10 minutes.
    pub timeout: Duration,
}

impl DeviceOptions {
    /// What [`Default`] gives.
    pub const DEFAULT: DeviceOptions = DeviceOptions {
        stream: 0,
        snapshot: Snapshot::Staging,
        direct_storage: DirectStorage::Off,
        flag_waits: false,
        timeout: Duration::from_secs(600),
    };
}

impl Default for DeviceOptions {
    fn default() -> Self {
        DeviceOptions::DEFAULT
    }
}

/// A device's part of a save, from begin on.
#[derive(Clone)]
pub(crate) struct DevicePart {
    pub source: Arc<DeviceSource>,
    pub snapshot: Snapshot,
    pub direct_storage: DirectStorage,
    pub flag_waits: bool,
    pub timeout: Duration,
    /// Whose memory the driver was asked about for it.
    pub asked: Owners,
    pub copies: Arc<Copies>,
}

/// A save that has just begun, for the pump.
pub(crate) struct NewJob {
    pub save: Arc<SaveCore>,
    pub part: DevicePart,
}

/// What has come from a device, for the copiers. Its save was told of one more at work on it.
pub(crate) struct Arrived {
    pub save: Arc<SaveCore>,
    pub bytes: Bytes,
}

pub(crate) enum Bytes {
    /// A chunk, which is to be hashed.
    Staged { chunk: u64, buffer: StagingBuffer },
    /// Hashes of chunks, which are to be written from the device's memory.
    OnDevice(OnDevice),
}

/// What pump, copiers and the savers' threads share.
#[derive(Default)]
pub(crate) struct Exchange {
    jobs: Mutex<VecDeque<NewJob>>,
    pub work: Signal,
    arrived: Mutex<VecDeque<Arrived>>,
    pub rings: Rings,
    pub courtesy: Courtesy,
    /// Something of direct storage was not to be had, or has failed.
    direct_refused: AtomicBool,
    /// Whose memory saves have been of. It may have become another's since: the pump asks before it copies.
    owners: Mutex<Seen>,
}

/// Memory that saves have been of.
#[derive(Default)]
struct Seen {
    owners: Owners,
    /// That of the last save: address, bytes, device.
    last: Vec<(u64, u64, u32)>,
}

impl Exchange {
    pub fn submit(&self, job: NewJob) {
        self.jobs.lock().push_back(job);
        self.work.notify_all();
    }

    pub fn next_job(&self) -> Option<NewJob> {
        self.jobs.lock().pop_front()
    }

    pub fn arrive(&self, chunk: Arrived) {
        self.arrived.lock().push_back(chunk);
    }

    pub fn next_arrived(&self) -> Option<Arrived> {
        self.arrived.lock().pop_front()
    }

    /// The next one that has a staging buffer.
    pub fn next_staged(&self) -> Option<Arrived> {
        let mut arrived = self.arrived.lock();
        let staged = |arrived: &Arrived| matches!(arrived.bytes, Bytes::Staged { .. });
        let at = arrived.iter().position(staged)?;
        arrived.remove(at)
    }

    /// `Auto` does without direct storage from now on.
    pub fn refuse_direct(&self) {
        // Relaxed, here and there: it orders nothing.
        self.direct_refused.store(true, Ordering::Relaxed);
    }

    /// For whoever requires it no refusal is final: what was missing may have been mended.
    pub fn allows_direct(&self, how: DirectStorage) -> bool {
        match how {
            DirectStorage::Off => false,
            DirectStorage::Auto => !self.direct_refused.load(Ordering::Relaxed),
            DirectStorage::Required => true,
        }
    }

    pub fn has_arrived(&self) -> bool {
        !self.arrived.lock().is_empty()
    }

    /// Refuses memory (address, bytes) that is not that of the device that it is said to be of. The driver is asked about what no
    /// earlier save was of; the answers are returned.
    pub fn check_owners<'a>(
        &self,
        said: impl Iterator<Item = (&'a Arc<Device>, u64, u64)>,
    ) -> Result<Owners> {
        let mut asked = Owners::default();
        // Out of the lock, which no call of the driver is made under. Who comes meanwhile asks for himself.
        let Seen { mut owners, last } = std::mem::take(&mut *self.owners.lock());
        let mut now = Vec::with_capacity(last.len());
        for (at, (device, address, bytes)) in said.enumerate() {
            let memory = (address, bytes, device.ordinal());
            // Mostly it is where it was in the last save, which is quicker to see than where it is among all.
            let is_known = || owners.known(address, bytes) == Some(Some(device.ordinal()));
            if last.get(at) != Some(&memory) && !is_known() {
                asked.check(device, address, bytes)?;
            }
            now.push(memory);
        }
        owners.learn(&asked);
        *self.owners.lock() = Seen { owners, last: now };
        Ok(asked)
    }
}

/// How far the copies of one save are enqueued.
#[derive(Default)]
pub(crate) struct Copies {
    state: Mutex<Enqueued>,
    changed: Condvar,
}

#[derive(Default)]
enum Enqueued {
    #[default]
    Pending,
    /// All are; they are done when these are reached.
    All(Arc<Vec<Arc<Event>>>),
    /// They never will be: the save has failed.
    Failed,
}

impl Copies {
    fn set(&self, state: Enqueued) {
        *self.state.lock() = state;
        self.changed.notify_all();
    }

    pub(super) fn all_enqueued(&self, events: Vec<Arc<Event>>) {
        self.set(Enqueued::All(Arc::new(events)));
    }

    pub fn failed(&self) {
        self.set(Enqueued::Failed);
    }

    /// Waits until all copies are enqueued: they are done when these are reached. None where the save has failed before.
    fn wait(&self, deadline: Option<Instant>) -> Result<Option<Arc<Vec<Arc<Event>>>>> {
        let mut state = self.state.lock();
        loop {
            match &*state {
                Enqueued::All(events) => return Ok(Some(events.clone())),
                Enqueued::Failed => return Ok(None),
                Enqueued::Pending => {}
            }
            let timed_out;
            (state, timed_out) = self.changed.wait_until(state, deadline);
            if timed_out && matches!(*state, Enqueued::Pending) {
                return Err(Error::new(
                    ErrorKind::TimedOut,
                    "wait for copied",
                    "the time given ran out; the save goes on",
                )
                .advise("wait again, or cancel"));
            }
        }
    }
}

impl SaveCore {
    /// Makes a stream of the program wait until the state is copied: the calling thread waits only until all copies are
    /// enqueued, and what is in host memory is copied. Where the stream cannot be made to wait (it captures a graph, the
    /// driver refuses), the calling thread waits instead: whatever is returned but `TimedOut`, the memory is the caller's.
    pub fn stream_wait_copied(self: &Arc<Self>, stream: UserStream, deadline: Option<Instant>) -> Result<()> {
        let Some(copies) = &self.device else { return self.wait_copied(deadline) };
        self.wait_host_copied(deadline)?;
        if self.check().is_err() {
            // Copiers may still read host memory.
            return self.wait_copied(deadline);
        }
        match copies.wait(deadline)? {
            Some(events) => {
                let wait = || -> Result<()> {
                    let _relaxed = Relaxed::enter()?;
                    events.iter().try_for_each(|event| stream.wait(event))
                };
                wait().or_else(|_| self.wait_copied(deadline))
            }
            // It has failed: says why, once the memory is the caller's again.
            None => self.wait_copied(deadline),
        }
    }
}
