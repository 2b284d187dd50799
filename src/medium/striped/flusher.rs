//! One long-lived thread per member that makes it durable, so that a barrier over several members takes as long as the
//! slowest of them, and no save starts a thread.

use std::collections::VecDeque;
use std::panic::{catch_unwind, AssertUnwindSafe};

use crate::error::{Error, ErrorKind, Result};
use crate::fork::ForkStamp;
use crate::medium::{Barrier, Medium};
use crate::sync::thread::{self, JoinHandle};
use crate::sync::{Arc, Condvar, Mutex};

/// How many of one barrier's flushes have not ended, and the first failure.
#[derive(Default)]
struct Tally {
    left: usize,
    failed: Option<Error>,
}

#[derive(Default)]
struct Shared {
    tally: Mutex<Tally>,
    ended: Condvar,
}

impl Shared {
    fn end(&self, result: Result<()>) {
        let mut tally = self.tally.lock();
        tally.left -= 1;
        if let Err(error) = result {
            tally.failed.get_or_insert(error);
        }
        drop(tally);
        self.ended.notify_all();
    }
}

/// The flushes of one barrier that are under way on other threads. Dropped unwaited, it says nothing of them.
#[derive(Default)]
pub(super) struct Barriers {
    shared: Option<Arc<Shared>>,
}

impl Barriers {
    /// Begins to persist `spans` on the member of `flusher`: it covers what had completed when this was called.
    pub(super) fn begin(&mut self, flusher: &Flusher, spans: Vec<(u64, u64)>, barrier: Barrier) {
        let shared = self.shared.get_or_insert_with(Arc::default);
        shared.tally.lock().left += 1;
        flusher.queue.submit(Job { spans, barrier, shared: Arc::clone(shared) });
    }

    /// Waits until all have ended. One failure is the failure of all.
    pub(super) fn wait(self) -> Result<()> {
        let Some(shared) = self.shared else { return Ok(()) };
        let mut tally = shared.tally.lock();
        while tally.left > 0 {
            tally = shared.ended.wait(tally);
        }
        tally.failed.take().map_or(Ok(()), Err)
    }
}

struct Job {
    spans: Vec<(u64, u64)>,
    barrier: Barrier,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Waiting {
    jobs: VecDeque<Job>,
    closing: bool,
}

#[derive(Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

impl Queue {
    fn submit(&self, job: Job) {
        self.waiting.lock().jobs.push_back(job);
        self.changed.notify_one();
    }

    /// The next job; none when the member is closed and nothing is left to do.
    fn next(&self) -> Option<Job> {
        let mut waiting = self.waiting.lock();
        loop {
            if let Some(job) = waiting.jobs.pop_front() {
                return Some(job);
            }
            if waiting.closing {
                return None;
            }
            waiting = self.changed.wait(waiting);
        }
    }

    fn work(&self, member: &dyn Medium) {
        while let Some(Job { spans, barrier, shared }) = self.next() {
            let done = catch_unwind(AssertUnwindSafe(|| member.persist_ranges(&spans, barrier)));
            let panicked = |_| {
                Err(Error::new(ErrorKind::Internal, "persist", "the thread that flushes a member panicked"))
            };
            shared.end(done.unwrap_or_else(panicked));
        }
    }
}

/// The thread of one member.
pub(super) struct Flusher {
    queue: Arc<Queue>,
    thread: Option<JoinHandle<()>>,
    stamp: ForkStamp,
}

impl Flusher {
    /// Starts the thread of member `index`.
    pub(super) fn start(index: usize, member: Arc<dyn Medium>) -> Result<Flusher> {
        let queue = Arc::new(Queue::default());
        let theirs = Arc::clone(&queue);
        let named = thread::Builder::new().name(format!("pccheck-sync-{index}"));
        let started = named.spawn(move || theirs.work(&*member));
        let thread = started.map_err(|error| Error::io("start a flushing thread", &error))?;
        Ok(Flusher { queue, thread: Some(thread), stamp: ForkStamp::now() })
    }
}

impl Drop for Flusher {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        if self.stamp.is_forked() {
            // The thread is the parent's, and its lock may have been held by it at the fork.
            std::mem::forget(thread);
            return;
        }
        self.queue.waiting.lock().closing = true;
        self.queue.changed.notify_all();
        // It ends by itself, and never owns the last handle of the region: it has the member only.
        let _ = thread.join();
    }
}
