//! The simulated medium itself: visible bytes, the growing trace, and the queue of operations under way.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use super::content::{mix, read_blocks, BlockBytes, Content, BLOCK};
use super::gates::{Attempt, AttemptKind, Gates, HoldId};
use super::trace::{Event, Note, OpId, SimModel, Start, ThreadTag, Trace};
use crate::error::{Error, ErrorKind, Result};
use crate::format::BLOCK_BYTES;
use crate::medium::{Barrier, Durability, Io, IoOp, Medium, MediumInfo, MediumKind, MediumMemory};
use crate::sync::{now, thread, Arc, Condvar, Mutex, MutexGuard};

/// When operations given to [`Medium::start`] complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SimSchedule {
    /// Before `start` returns, on the calling thread (unless held).
    Inline,
    /// On another thread, each after its own random delay, so in another order than they were started in.
    Reordered {
        /// Seed of the delays.
        seed: u64,
        /// Longest delay.
        max_delay: Duration,
    },
}

/// An operation that was started and has not completed.
struct Queued {
    io: Io,
    /// Set once its copy is in the trace.
    op: Option<OpId>,
    errno: Option<i32>,
    held_by: Option<HoldId>,
    due: Instant,
}

struct State {
    visible: Content,
    events: Vec<Event>,
    threads: HashMap<thread::ThreadId, ThreadTag>,
    next_op: u64,
    removed: BTreeSet<Barrier>,
    counts: BTreeMap<Barrier, u64>,
    gates: Gates,
    schedule: SimSchedule,
    delays_drawn: u64,
    queue: Vec<Queued>,
    worker: Option<thread::JoinHandle<()>>,
    closing: bool,
}

struct Shared {
    len_bytes: u64,
    model: SimModel,
    start: Start,
    state: Mutex<State>,
    /// Told of every change of the queue and the gates.
    changed: Condvar,
}

/// A region in memory that behaves as its [`SimModel`] says and remembers every step. Start with zeros
/// ([`SimMedium::new`]) or with what a crash left ([`super::Image::to_medium`], [`super::for_each_kill`]).
///
/// Dropping it completes what is queued; operations still held by a gate end as cancelled.
pub struct SimMedium {
    shared: Arc<Shared>,
}

impl SimMedium {
    /// A region of `len_bytes` zeros (a multiple of a block), completing operations inline.
    pub fn new(len_bytes: u64, model: SimModel) -> Self {
        SimMedium::begin(len_bytes, model, Start::default())
    }

    pub(super) fn begin(len_bytes: u64, model: SimModel, start: Start) -> Self {
        let mut visible = start.durable.clone();
        let mut next_op = 0;
        for (block, versions) in &start.pending {
            next_op += versions.len() as u64;
            if let Some(newest) = versions.last() {
                visible.set(*block, newest.bytes.clone());
            }
        }
        let state = State {
            visible,
            events: Vec::new(),
            threads: HashMap::new(),
            next_op,
            removed: BTreeSet::new(),
            counts: BTreeMap::new(),
            gates: Gates::default(),
            schedule: SimSchedule::Inline,
            delays_drawn: 0,
            queue: Vec::new(),
            worker: None,
            closing: false,
        };
        let (state, changed) = (Mutex::new(state), Condvar::new());
        SimMedium { shared: Arc::new(Shared { len_bytes, model, start, state, changed }) }
    }

    /// Changes when operations started from now on complete.
    pub fn set_schedule(&self, schedule: SimSchedule) {
        self.shared.state.lock().schedule = schedule;
    }

    /// Puts a note of the test in its place among the events.
    pub fn note(&self, note: Note) {
        self.shared.state.lock().events.push(Event::Note(note));
    }

    /// From now on every fence, persist and the persisting half of every durable write that carries
    /// `barrier` does nothing and reports success.
    pub fn remove(&self, barrier: Barrier) {
        self.shared.state.lock().removed.insert(barrier);
    }

    /// How often each barrier was issued, removed ones included.
    pub fn barrier_counts(&self) -> BTreeMap<Barrier, u64> {
        self.shared.state.lock().counts.clone()
    }

    /// Holds back every call that `caught` picks: an operation given to `start` stays under way, any other
    /// call blocks its thread. `caught` is called under the medium's lock and must not use the medium.
    pub fn hold(&self, caught: impl Fn(&Attempt) -> bool + Send + 'static) -> HoldId {
        self.shared.state.lock().gates.add_hold(Box::new(caught))
    }

    /// Waits until gate `id` has caught `count` calls; false when `timeout` ran out first.
    #[must_use]
    pub fn wait_held(&self, id: HoldId, count: usize, timeout: Duration) -> bool {
        let deadline = now() + timeout;
        let mut state = self.shared.state.lock();
        while state.gates.caught(id) < count {
            let timed_out;
            (state, timed_out) = self.shared.changed.wait_until(state, Some(deadline));
            if timed_out {
                return state.gates.caught(id) >= count;
            }
        }
        true
    }

    /// Removes gate `id` and lets go what it caught; inline operations complete on this thread.
    pub fn release(&self, id: HoldId) {
        let mut let_go = Vec::new();
        let mut state = self.shared.state.lock();
        state.gates.remove_hold(id);
        let inline = state.schedule == SimSchedule::Inline;
        let mut at = 0;
        while at < state.queue.len() {
            if state.queue[at].held_by != Some(id) {
                at += 1;
            } else if inline {
                let_go.push(state.queue.remove(at));
            } else {
                state.queue[at].held_by = None;
                state.queue[at].due = now();
                at += 1;
            }
        }
        if !inline {
            self.shared.ensure_worker(&mut state);
        }
        drop(state);
        self.shared.changed.notify_all();
        let_go.into_iter().for_each(|queued| self.shared.finish(queued));
    }

    /// Fails every call for which `fault` returns an error number. Replaces the fault set before. A failed
    /// copy may still land in any part; see the fault model for a failed persist. `fault` is called under the
    /// medium's lock and must not use the medium.
    pub fn fail(&self, fault: impl FnMut(&Attempt) -> Option<i32> + Send + 'static) {
        self.shared.state.lock().gates.set_fault(Some(Box::new(fault)));
    }

    /// Ends what [`SimMedium::fail`] began.
    pub fn stop_failing(&self) {
        self.shared.state.lock().gates.set_fault(None);
    }

    /// All that has happened up to now.
    pub fn trace(&self) -> Trace {
        let events = self.shared.state.lock().events.clone();
        let Shared { len_bytes, model, start, .. } = &*self.shared;
        Trace { len_bytes: *len_bytes, model: *model, start: start.clone(), events }
    }
}

impl Drop for SimMedium {
    fn drop(&mut self) {
        let mut state = self.shared.state.lock();
        state.closing = true;
        let (cancelled, due): (Vec<_>, Vec<_>) =
            std::mem::take(&mut state.queue).into_iter().partition(|queued| queued.held_by.is_some());
        state.queue = due;
        let worker = state.worker.take();
        drop(state);
        self.shared.changed.notify_all();
        for queued in cancelled {
            let message = "the simulated medium was dropped while a gate held this operation";
            let error = Error::new(ErrorKind::Cancelled, op_name(queued.io.op), message);
            queued.io.sink.finished(
                queued.io.token,
                queued.io.buffer,
                Err(error.at_offset(queued.io.offset)),
            );
        }
        if let Some(worker) = worker {
            // A sink may hold the last reference to the medium: then this is the worker itself.
            if worker.thread().id() != thread::current().id() {
                // A panic in a sink was reported on its own thread.
                let _ = worker.join();
            }
        }
    }
}

fn op_name(op: IoOp) -> &'static str {
    match op {
        IoOp::Copy => "simulated copy",
        IoOp::Read => "simulated read",
    }
}

impl State {
    fn thread(&mut self) -> ThreadTag {
        let next = ThreadTag(self.threads.len() as u32);
        *self.threads.entry(thread::current().id()).or_insert(next)
    }

    fn op(&mut self) -> OpId {
        self.next_op += 1;
        OpId(self.next_op)
    }

    fn begin_copy(&mut self, offset: u64, data: Arc<[u8]>) -> OpId {
        let (op, thread) = (self.op(), self.thread());
        self.events.push(Event::Copy { op, thread, offset, data });
        op
    }

    fn complete_copy(&mut self, op: OpId, offset: u64, data: &Arc<[u8]>) {
        for at in (0..data.len()).step_by(BLOCK) {
            self.visible.set((offset + at as u64) / BLOCK_BYTES, BlockBytes::part_of(data, at));
        }
        self.events.push(Event::CopyCompleted { op });
    }

    /// Counts the barrier; false when it was removed.
    fn issue(&mut self, barrier: Barrier) -> bool {
        *self.counts.entry(barrier).or_default() += 1;
        !self.removed.contains(&barrier)
    }

    fn fence(&mut self, barrier: Barrier) {
        if self.issue(barrier) {
            let thread = self.thread();
            self.events.push(Event::Fence { thread, barrier });
        }
    }

    fn begin_persist(&mut self, offset: u64, len: u64, barrier: Barrier) -> OpId {
        let (op, thread) = (self.op(), self.thread());
        self.events.push(Event::PersistBegan { op, thread, offset, len, barrier });
        op
    }
}

impl Shared {
    /// Refuses what the real media refuse as well.
    fn check_range(&self, op: &'static str, offset: u64, len: u64, whole_blocks: bool) -> Result<()> {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.len_bytes);
        if !inside {
            let message =
                format!("{len} bytes from there end outside the region of {} bytes", self.len_bytes);
            return Err(Error::new(ErrorKind::InvalidArgument, op, message).at_offset(offset));
        }
        if whole_blocks && (!offset.is_multiple_of(BLOCK_BYTES) || !len.is_multiple_of(BLOCK_BYTES)) {
            let message = format!("expected whole blocks of {BLOCK_BYTES} bytes, found {len} bytes");
            return Err(Error::new(ErrorKind::InvalidArgument, op, message).at_offset(offset));
        }
        Ok(())
    }

    /// Lets the gates look at a blocking call; returns once no gate holds it.
    fn pass<'a>(
        &'a self,
        op: &'static str,
        kind: AttemptKind,
        (offset, len): (u64, u64),
        barrier: Option<Barrier>,
    ) -> (MutexGuard<'a, State>, Result<()>) {
        let mut state = self.state.lock();
        let attempt = state.gates.attempt(kind, (offset, len), barrier);
        if let Some(hold) = state.gates.catch(&attempt) {
            self.changed.notify_all();
            while state.gates.is_held_by(hold) {
                state = self.changed.wait(state);
            }
        }
        let outcome = match state.gates.errno(&attempt) {
            Some(errno) => Err(injected(op, offset, errno)),
            None => Ok(()),
        };
        (state, outcome)
    }

    /// Starts the thread that completes operations later, if it does not run yet.
    fn ensure_worker(self: &Arc<Self>, state: &mut State) {
        if state.worker.is_none() {
            let shared = Arc::clone(self);
            state.worker = Some(thread::spawn(move || shared.work()));
        }
    }

    fn work(&self) {
        let mut state = self.state.lock();
        loop {
            let ready = state.queue.iter().enumerate().filter(|(_, queued)| queued.held_by.is_none());
            let next = ready.min_by_key(|(_, queued)| queued.due).map(|(at, queued)| (at, queued.due));
            match next {
                Some((at, due)) if due <= now() || state.closing => {
                    let queued = state.queue.swap_remove(at);
                    drop(state);
                    self.finish(queued);
                    state = self.state.lock();
                }
                Some((_, due)) => (state, _) = self.changed.wait_until(state, Some(due)),
                None if state.closing => return,
                None => state = self.changed.wait(state),
            }
        }
    }

    /// Carries out an operation and tells its sink.
    fn finish(&self, queued: Queued) {
        let Queued { io: Io { op, offset, len, mut buffer, token, sink }, op: recorded, errno, .. } = queued;
        let mut state = self.state.lock();
        if op == IoOp::Copy {
            let data: Arc<[u8]> = Arc::from(&buffer[..len]);
            let id = recorded.unwrap_or_else(|| state.begin_copy(offset, Arc::clone(&data)));
            if errno.is_some() {
                state.events.push(Event::CopyFailed { op: id });
            } else {
                state.complete_copy(id, offset, &data);
                if self.model == SimModel::Pmem {
                    // Its caller cannot know which thread stored the bytes, so the medium fences for it.
                    state.fence(Barrier::Chunk);
                }
            }
        } else if errno.is_none() {
            read_blocks(offset, &mut buffer[..len], |block| state.visible.get(block));
        }
        drop(state);
        let result = errno.map_or(Ok(()), |errno| Err(injected(op_name(op), offset, errno)));
        sink.finished(token, buffer, result);
    }

    fn run_persist(
        &self,
        mut state: MutexGuard<'_, State>,
        outcome: Result<()>,
        (offset, len): (u64, u64),
        barrier: Barrier,
    ) -> Result<()> {
        if !state.issue(barrier) {
            return Ok(());
        }
        let op = state.begin_persist(offset, len, barrier);
        // Other threads may write in the meantime: what they write now is not covered.
        drop(state);
        thread::yield_now();
        let mut state = self.state.lock();
        state.events.push(match outcome {
            Ok(()) => Event::PersistDone { op, barrier },
            Err(_) => Event::PersistFailed { op },
        });
        outcome
    }

    fn run_copy(&self, state: &mut State, outcome: Result<()>, offset: u64, src: &[u8]) -> Result<()> {
        let data: Arc<[u8]> = Arc::from(src);
        let op = state.begin_copy(offset, Arc::clone(&data));
        match outcome {
            Ok(()) => state.complete_copy(op, offset, &data),
            Err(_) => state.events.push(Event::CopyFailed { op }),
        }
        outcome
    }
}

fn injected(op: &'static str, offset: u64, errno: i32) -> Error {
    Error::io(op, &std::io::Error::from_raw_os_error(errno)).at_offset(offset)
}

impl Medium for SimMedium {
    fn info(&self) -> MediumInfo {
        let path = match self.shared.model {
            SimModel::Pmem => "simulated persistent memory",
            SimModel::Ssd { torn: false } => "simulated disk",
            SimModel::Ssd { torn: true } => "simulated disk that tears sectors",
            SimModel::PageCache => "simulated page cache",
        };
        let (kind, durability) = (MediumKind::Sim, Durability::Power);
        MediumInfo { kind, durability, path, notes: Vec::new(), stripes: None }
    }

    fn len_bytes(&self) -> u64 {
        self.shared.len_bytes
    }

    fn read(&self, offset: u64, dst: &mut [u8]) -> Result<()> {
        let len = dst.len() as u64;
        self.shared.check_range("simulated read", offset, len, false)?;
        let (state, outcome) = self.shared.pass("simulated read", AttemptKind::Read, (offset, len), None);
        outcome?;
        read_blocks(offset, dst, |block| state.visible.get(block));
        Ok(())
    }

    fn start(&self, io: Io) {
        let shared = &self.shared;
        let name = op_name(io.op);
        let fits = if io.len <= io.buffer.len() {
            shared.check_range(name, io.offset, io.len as u64, true)
        } else {
            let message = format!("{} bytes do not fit the buffer of {} bytes", io.len, io.buffer.len());
            Err(Error::new(ErrorKind::InvalidArgument, name, message))
        };
        if let Err(error) = fits {
            return io.sink.finished(io.token, io.buffer, Err(error));
        }
        let mut guard = shared.state.lock();
        let state = &mut *guard;
        let kind = if io.op == IoOp::Copy { AttemptKind::StartCopy } else { AttemptKind::StartRead };
        let attempt = state.gates.attempt(kind, (io.offset, io.len as u64), None);
        let held_by = state.gates.catch(&attempt);
        let errno = state.gates.errno(&attempt);
        // A device may carry out a write as soon as it is submitted; a store happens when its thread runs.
        let op = (io.op == IoOp::Copy && matches!(shared.model, SimModel::Ssd { .. }))
            .then(|| state.begin_copy(io.offset, Arc::from(&io.buffer[..io.len])));
        let mut queued = Queued { io, op, errno, held_by, due: now() };
        if let SimSchedule::Reordered { seed, max_delay } = state.schedule {
            state.delays_drawn += 1;
            let longest_ns = max_delay.as_nanos().min(u128::from(u64::MAX - 1)) as u64;
            queued.due += Duration::from_nanos(mix(seed, state.delays_drawn) % (longest_ns + 1));
            shared.ensure_worker(state);
        } else if held_by.is_none() {
            drop(guard);
            return shared.finish(queued);
        }
        state.queue.push(queued);
        drop(guard);
        shared.changed.notify_all();
    }

    /// Persistent memory is memory; the others stand for what is written to.
    fn memory(&self) -> Option<&dyn MediumMemory> {
        (self.shared.model == SimModel::Pmem).then_some(self)
    }

    fn copy(&self, offset: u64, src: &[u8]) -> Result<()> {
        let range = (offset, src.len() as u64);
        self.shared.check_range("simulated copy", offset, range.1, true)?;
        let (mut state, outcome) = self.shared.pass("simulated copy", AttemptKind::Copy, range, None);
        self.shared.run_copy(&mut state, outcome, offset, src)
    }

    fn fence(&self, barrier: Barrier) -> Result<()> {
        let (mut state, outcome) =
            self.shared.pass("simulated fence", AttemptKind::Fence, (0, 0), Some(barrier));
        outcome?;
        state.fence(barrier);
        Ok(())
    }

    fn persist(&self, offset: u64, len: u64, barrier: Barrier) -> Result<()> {
        self.shared.check_range("simulated persist", offset, len, false)?;
        let (state, outcome) =
            self.shared.pass("simulated persist", AttemptKind::Persist, (offset, len), Some(barrier));
        self.shared.run_persist(state, outcome, (offset, len), barrier)
    }

    fn write_durable(&self, offset: u64, block: &[u8], barrier: Barrier) -> Result<()> {
        if block.len() != BLOCK {
            let message = format!("expected one block of {BLOCK_BYTES} bytes, found {} bytes", block.len());
            return Err(Error::new(ErrorKind::InvalidArgument, "simulated durable write", message));
        }
        let range = (offset, block.len() as u64);
        self.shared.check_range("simulated durable write", offset, range.1, true)?;
        let (mut state, outcome) =
            self.shared.pass("simulated durable write", AttemptKind::WriteDurable, range, Some(barrier));
        // A durable write fails as a whole: its copy lands perhaps, and the durability of the rest is unknown.
        self.shared.run_copy(&mut state, Ok(()), offset, block)?;
        self.shared.run_persist(state, outcome, range, barrier)
    }
}

impl MediumMemory for SimMedium {
    /// As a copy that was started, but its thread waits while a gate holds it. The stores land when `fill` is done.
    fn fill(
        &self,
        offset: u64,
        len: usize,
        fill: &mut dyn FnMut(&mut [u8], bool) -> Result<()>,
    ) -> Result<()> {
        const OP: &str = "simulated copy in place";
        let mut bytes = vec![0; len.next_multiple_of(BLOCK)];
        let range = (offset, bytes.len() as u64);
        self.shared.check_range(OP, offset, range.1, true)?;
        fill(&mut bytes[..len], true)?;
        let (mut state, outcome) = self.shared.pass(OP, AttemptKind::StartCopy, range, None);
        self.shared.run_copy(&mut state, outcome, offset, &bytes)
    }
}
