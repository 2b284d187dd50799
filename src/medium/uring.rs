//! Asynchronous operations by io_uring: any thread submits its own, one thread reaps all completions.
//!
//! # Why nothing is lost
//!
//! - At most `depth` operations are in the kernel; each has a place in the table. Others wait in the backlog, and
//!   whoever frees a place (the reaper) submits the next. The completion queue is twice as long as the submission
//!   queue, so it cannot overflow.
//! - Everyone who fills a submission entry submits it before letting go of the submission lock, so that an entry
//!   never waits for somebody else. If the kernel refuses for good, the ring is marked broken: no
//!   call ever submits on it again, so that the entry left behind stays unread, and its buffer is free.
//! - The reaper sleeps on a condition variable while nothing is in the kernel, so closing needs no wake-up through
//!   the ring.
#![expect(unsafe_code, reason = "ring entries carry raw pointers to buffers")]

use std::collections::VecDeque;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::AsRawFd;

use io_uring::{opcode, squeue, types, IoUring};

use super::file::RegionFile;
use super::io::{op_name, short};
use super::{Io, IoOp};
use crate::error::{Error, ErrorKind, Result};
use crate::fork::{without_forks, ChildClosedGuard};
use crate::partial::{progress, BUSY_PAUSE, FRUITLESS_MAX, TRANSFER_MAX_BYTES};
use crate::staging::StagingPool;
use crate::sync::thread::{self, JoinHandle};
use crate::sync::{Arc, Condvar, Mutex, MutexGuard};

/// Bounds of the number of operations in the kernel at once.
const DEPTH_MIN: usize = 1;
const DEPTH_MAX: usize = 1024;

/// The kernel registers at most this many buffers.
const REGISTERED_BUFFERS_MAX: usize = 1 << 14;

/// The kernel registers buffers of at most this size.
const REGISTERED_BUFFER_MAX_BYTES: usize = 1 << 30;

/// How often a kernel that is out of resources is asked again: about a minute in all.
const BUSY_MAX: u32 = 600_000;

/// `IORING_ENTER_GETEVENTS`: wait for completions.
const ENTER_GETEVENTS: u32 = 1;

/// The region's file in the ring's table of registered files.
const FILE_INDEX: types::Fixed = types::Fixed(0);

/// One operation in the kernel.
struct Flight {
    io: Io,
    done: usize,
    fruitless: u32,
}

impl Flight {
    fn new(io: Io) -> Self {
        Flight { io, done: 0, fruitless: 0 }
    }
}

/// What is in the kernel, and what waits for room there.
struct Table {
    places: Vec<Option<Flight>>,
    vacant: Vec<usize>,
    backlog: VecDeque<Io>,
    /// Submissions less completions. Below zero for a moment when a completion is reaped before its submitter
    /// counted it.
    in_kernel: i64,
    closing: bool,
}

struct Shared {
    /// Never dropped in a forked child, where its mappings do not exist.
    ring: ManuallyDrop<IoUring>,
    registration: Option<ChildClosedGuard>,
    file: Arc<RegionFile>,
    /// The registered pool; keeps its memory mapped as long as the kernel may use it.
    pool: Option<Arc<StagingPool>>,
    table: Mutex<Table>,
    /// Told when something is in the kernel, and at closing.
    busy: Condvar,
    /// Guards the submission queue. The error is set once the kernel has refused for good.
    submission: Mutex<Option<Error>>,
}

/// A ring with its reaper.
pub(super) struct UringEngine {
    shared: Arc<Shared>,
    reaper: Option<JoinHandle<()>>,
}

impl UringEngine {
    /// Sets a ring up, or says why the kernel refuses one; `notes` receives what is missing from a ring that works.
    pub(super) fn new(
        file: Arc<RegionFile>,
        pool: Option<&Arc<StagingPool>>,
        depth: usize,
        notes: &mut Vec<String>,
    ) -> Result<Self> {
        let depth = depth.clamp(DEPTH_MIN, DEPTH_MAX);
        let (ring, registration) = without_forks(|| {
            let built = IoUring::builder().dontfork().build(depth as u32);
            let ring = built.map_err(|error| Error::io("set io_uring up", &error))?;
            let registration = ChildClosedGuard::register(ring.as_raw_fd())?;
            Ok((ring, registration))
        })?;
        ring.submitter()
            .register_files(&[file.raw_fd()])
            .map_err(|error| Error::io("register the file with io_uring", &error))?;
        let pool = pool.filter(|pool| match register_pool(&ring, pool) {
            Ok(()) => true,
            Err(why) => {
                notes.push(format!("staging buffers are not registered with io_uring: {why}"));
                false
            }
        });
        let shared = Arc::new(Shared {
            ring: ManuallyDrop::new(ring),
            registration: Some(registration),
            file,
            pool: pool.cloned(),
            table: Mutex::new(Table {
                places: (0..depth).map(|_| None).collect(),
                vacant: (0..depth).rev().collect(),
                backlog: VecDeque::new(),
                in_kernel: 0,
                closing: false,
            }),
            busy: Condvar::new(),
            submission: Mutex::new(None),
        });
        let reaping = Arc::clone(&shared);
        let reaper =
            thread::Builder::new().name("pccheck-reaper".to_string()).spawn(move || reaping.reap()).map_err(
                |error| Error::io("start the completion thread", &error).with_kind(ErrorKind::OutOfMemory),
            )?;
        Ok(UringEngine { shared, reaper: Some(reaper) })
    }

    /// Whether transfers use registered buffers.
    pub(super) fn has_registered_buffers(&self) -> bool {
        self.shared.pool.is_some()
    }

    /// Starts an operation that was already checked.
    pub(super) fn start(&self, io: Io) {
        let mut table = self.shared.lock_table();
        let Some(index) = table.vacant.pop() else {
            table.backlog.push_back(io);
            return;
        };
        drop(table);
        self.shared.launch(index, Flight::new(io));
    }
}

/// Registers every staging buffer under its own index.
fn register_pool(ring: &IoUring, pool: &Arc<StagingPool>) -> std::result::Result<(), String> {
    let (count, bytes) = (pool.buffer_count(), pool.buffer_bytes());
    if count > REGISTERED_BUFFERS_MAX || bytes > REGISTERED_BUFFER_MAX_BYTES {
        return Err(format!(
            "{count} buffers of {bytes} bytes; the kernel takes {REGISTERED_BUFFERS_MAX} of {REGISTERED_BUFFER_MAX_BYTES}"
        ));
    }
    let vectors: Vec<libc::iovec> = (0..count)
        .map(|index| libc::iovec { iov_base: pool.base().wrapping_add(index * bytes).cast(), iov_len: bytes })
        .collect();
    // SAFETY: the vectors cover the pool's mapped memory, which `Shared` keeps mapped until the ring is gone.
    let registered = unsafe { ring.submitter().register_buffers(&vectors) };
    registered.map_err(|error| match error.raw_os_error() {
        Some(libc::ENOMEM) => {
            let megabytes = pool.total_bytes() >> 20;
            format!("{error}; they need {megabytes} MiB of locked memory (ulimit -l)")
        }
        _ => error.to_string(),
    })
}

impl Shared {
    fn lock_table(&self) -> MutexGuard<'_, Table> {
        self.table.lock()
    }

    /// Hands a flight to the kernel, in a place that is its own; if that fails for good, ends it with the error.
    fn launch(&self, index: usize, flight: Flight) {
        if let Err(error) = self.try_launch(index, flight) {
            self.finish(index, Err(error));
        }
    }

    /// On an error the flight is still in its place.
    fn try_launch(&self, index: usize, mut flight: Flight) -> Result<()> {
        let entry = self.entry(index, &mut flight);
        self.lock_table().places[index] = Some(flight);
        self.submit(&entry)?;
        let mut table = self.lock_table();
        table.in_kernel += 1;
        if table.in_kernel == 1 {
            self.busy.notify_one();
        }
        Ok(())
    }

    /// The submission entry for what is left of a flight.
    fn entry(&self, index: usize, flight: &mut Flight) -> squeue::Entry {
        let len = (flight.io.len - flight.done).min(TRANSFER_MAX_BYTES) as u32;
        let offset = flight.io.offset + flight.done as u64;
        let start = flight.io.buffer.as_mut_ptr().wrapping_add(flight.done);
        let entry = match (flight.io.op, self.registered_index(&flight.io)) {
            (IoOp::Copy, Some(buffer)) => {
                opcode::WriteFixed::new(FILE_INDEX, start, len, buffer).offset(offset).build()
            }
            (IoOp::Copy, None) => opcode::Write::new(FILE_INDEX, start, len).offset(offset).build(),
            (IoOp::Read, Some(buffer)) => {
                opcode::ReadFixed::new(FILE_INDEX, start, len, buffer).offset(offset).build()
            }
            (IoOp::Read, None) => opcode::Read::new(FILE_INDEX, start, len).offset(offset).build(),
        };
        entry.user_data(index as u64)
    }

    /// The registered buffer that the operation uses; none if the buffer is another pool's.
    fn registered_index(&self, io: &Io) -> Option<u16> {
        let pool = self.pool.as_ref()?;
        let index = io.buffer.index();
        let expected = pool.base().wrapping_add(index * pool.buffer_bytes());
        let ours = index < pool.buffer_count() && std::ptr::eq(io.buffer.as_ptr(), expected);
        u16::try_from(index).ok().filter(|_| ours)
    }

    /// Hands one entry to the kernel before returning. On an error it will never be read.
    fn submit(&self, entry: &squeue::Entry) -> Result<()> {
        let mut broken = self.submission.lock();
        if let Some(error) = &*broken {
            return Err(error.clone());
        }
        // SAFETY: the lock makes this the only user of the submission queue.
        let mut queue = unsafe { self.ring.submission_shared() };
        // SAFETY: the buffer is owned by the flight in the table, which stays there until the kernel has finished.
        let pushed = unsafe { queue.push(entry) };
        drop(queue);
        let mut attempts = 0;
        loop {
            // The queue was empty before the push, so it has room; were it full, submitting would empty it.
            let error = match self.ring.submit() {
                Ok(_) if pushed.is_ok() => return Ok(()),
                Ok(_) => io::Error::other("the submission queue had no room"),
                Err(error) => error,
            };
            attempts += 1;
            match error.raw_os_error() {
                Some(libc::EINTR) if attempts < BUSY_MAX => continue,
                Some(libc::EAGAIN | libc::EBUSY) if attempts < BUSY_MAX => thread::sleep(BUSY_PAUSE),
                _ => {
                    let error = self.file.about(Error::io("submit to io_uring", &error));
                    *broken = Some(error.clone());
                    return Err(error);
                }
            }
        }
    }

    /// The reaper's life: until closing, and then until nothing is in the kernel.
    fn reap(&self) {
        let mut finished: Vec<(usize, i32)> = Vec::new();
        while self.wait_for_work() {
            // SAFETY: submits nothing and passes no argument; only waits for one completion.
            let waited =
                unsafe { self.ring.submitter().enter::<libc::sigset_t>(0, 1, ENTER_GETEVENTS, None) };
            if let Err(error) = waited {
                if error.kind() != io::ErrorKind::Interrupted {
                    // Completions still arrive in the shared queue without this call, only later noticed.
                    thread::sleep(BUSY_PAUSE);
                }
            }
            // SAFETY: only this thread uses the completion queue.
            let queue = unsafe { self.ring.completion_shared() };
            finished.extend(queue.map(|entry| (entry.user_data() as usize, entry.result())));
            for (index, result) in finished.drain(..) {
                self.completed(index, result);
            }
        }
    }

    /// Sleeps until something is in the kernel; false when closing and nothing is.
    fn wait_for_work(&self) -> bool {
        let mut table = self.lock_table();
        loop {
            if table.in_kernel > 0 {
                return true;
            }
            if table.closing && table.vacant.len() == table.places.len() {
                return false;
            }
            table = self.busy.wait(table);
        }
    }

    /// The kernel is done with one submission: go on with the rest, or end the operation.
    fn completed(&self, index: usize, result: i32) {
        let mut table = self.lock_table();
        table.in_kernel -= 1;
        let Some(flight) = table.places[index].as_mut() else { return };
        let (op, len) = (flight.io.op, flight.io.len);
        let outcome = match result {
            0 => Err(short(op, flight.done, len)),
            moved if moved > 0 => match progress(flight.done, moved as usize, len) {
                Some(useful) => {
                    (flight.done, flight.fruitless) = (useful, 0);
                    Ok(())
                }
                None if flight.fruitless < FRUITLESS_MAX => {
                    flight.fruitless += 1;
                    Ok(())
                }
                None => Err(short(op, flight.done + moved as usize, len)),
            },
            _ => {
                let error = io::Error::from_raw_os_error(-result);
                // Interrupted, out of room just then, or cancelled because the thread that submitted it ended.
                let again = matches!(-result, libc::EINTR | libc::EAGAIN | libc::ECANCELED);
                flight.fruitless += 1;
                if again && flight.fruitless <= FRUITLESS_MAX {
                    Ok(())
                } else {
                    Err(Error::io(op_name(op), &error))
                }
            }
        };
        let offset = flight.io.offset + flight.done as u64;
        if outcome.is_ok() && flight.done < len {
            let rest = table.places[index].take();
            drop(table);
            if let Some(flight) = rest {
                self.launch(index, flight);
            }
            return;
        }
        drop(table);
        self.finish(index, outcome.map_err(|error| self.file.about(error).at_offset(offset)));
    }

    /// Gives the place to the next in the backlog, or frees it, and tells the sink of the one that ended.
    fn finish(&self, index: usize, mut result: Result<()>) {
        loop {
            let mut table = self.lock_table();
            let ended = table.places[index].take();
            let next = table.backlog.pop_front();
            if next.is_none() {
                table.vacant.push(index);
            }
            drop(table);
            let launched = next.map(|io| self.try_launch(index, Flight::new(io)));
            if let Some(Flight { io, .. }) = ended {
                io.sink.finished(io.token, io.buffer, result);
            }
            match launched {
                Some(Err(error)) => result = Err(error),
                _ => return,
            }
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if self.file.stamp().is_forked() {
            return;
        }
        let closed = without_forks(|| {
            drop(self.registration.take());
            // The kernel dismantles a ring some time after it is closed; a device's exclusive claim must not wait for
            // that. Refusal changes nothing: then it does wait.
            let _ = self.ring.submitter().unregister_files();
            // SAFETY: not used again: `self` is being dropped.
            unsafe { ManuallyDrop::drop(&mut self.ring) };
            Ok(())
        });
        debug_assert!(closed.is_ok(), "the fork handlers were installed when the ring was made");
    }
}

impl Drop for UringEngine {
    /// Ends after every operation has.
    fn drop(&mut self) {
        let Some(reaper) = self.reaper.take() else { return };
        if self.shared.file.stamp().is_forked() {
            // The reaper is the parent's.
            std::mem::forget(reaper);
            return;
        }
        self.shared.lock_table().closing = true;
        self.shared.busy.notify_one();
        // A sink may own the last handle of the medium: then this is the reaper, which ends by itself.
        if reaper.thread().id() != thread::current().id() {
            // A panic was a sink's; there is nobody to tell.
            let _ = reaper.join();
        }
    }
}
