//! Asynchronous operations by blocking calls on a few threads, where io_uring is refused.

use std::collections::VecDeque;

use super::file::RegionFile;
use super::{io as transfer, Io};
use crate::error::{Error, ErrorKind, Result};
use crate::sync::thread::{self, JoinHandle};
use crate::sync::{Arc, Condvar, Mutex, MutexGuard};

struct Queue {
    waiting: VecDeque<Io>,
    closing: bool,
}

struct Shared {
    file: Arc<RegionFile>,
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock()
    }

    /// The next operation; none when the engine closes and nothing is left to do.
    fn next(&self) -> Option<Io> {
        let mut queue = self.lock();
        loop {
            if let Some(io) = queue.waiting.pop_front() {
                return Some(io);
            }
            if queue.closing {
                return None;
            }
            queue = self.changed.wait(queue);
        }
    }

    fn work(&self) {
        while let Some(io) = self.next() {
            run(&self.file, io);
        }
    }
}

/// Does one operation on this thread and tells its sink.
fn run(file: &RegionFile, mut io: Io) {
    let result = transfer::transfer_buffer(file.raw_fd(), &mut io).map_err(|error| file.about(error));
    io.sink.finished(io.token, io.buffer, result);
}

/// The threads and their queue. Operations wait in the queue without bound: each holds a staging buffer, of
/// which there are few.
pub(super) struct ThreadEngine {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl ThreadEngine {
    /// Starts `count` threads (at least one).
    pub(super) fn new(file: Arc<RegionFile>, count: usize) -> Result<Self> {
        let shared = Arc::new(Shared {
            file,
            queue: Mutex::new(Queue { waiting: VecDeque::new(), closing: false }),
            changed: Condvar::new(),
        });
        let mut engine = ThreadEngine { shared, threads: Vec::new() };
        for index in 0..count.max(1) {
            let shared = Arc::clone(&engine.shared);
            let started =
                thread::Builder::new().name(format!("pccheck-io-{index}")).spawn(move || shared.work());
            match started {
                Ok(thread) => engine.threads.push(thread),
                // Fewer threads are slower, not wrong.
                Err(_) if index > 0 => break,
                Err(error) => {
                    return Err(Error::io("start an I/O thread", &error).with_kind(ErrorKind::OutOfMemory))
                }
            }
        }
        Ok(engine)
    }

    /// Queues an operation that was already checked.
    pub(super) fn start(&self, io: Io) {
        self.shared.lock().waiting.push_back(io);
        self.shared.changed.notify_one();
    }
}

impl Drop for ThreadEngine {
    /// Ends after every queued operation has.
    fn drop(&mut self) {
        if self.shared.file.stamp().is_forked() {
            // The threads are the parent's, and their locks may have been held by them at the fork.
            for thread in self.threads.drain(..) {
                std::mem::forget(thread);
            }
            return;
        }
        self.shared.lock().closing = true;
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            // A sink may own the last handle of the medium: then this is one of the threads, which ends by itself.
            if thread.thread().id() != thread::current().id() {
                // A panic was a sink's; it has nothing to say about the others.
                let _ = thread.join();
            }
        }
    }
}
