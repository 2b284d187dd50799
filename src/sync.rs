//! The one door to threads, atomics, locks and the clock: no other file names `core::sync::atomic`, `std::sync`, `loom` or
//! `shuttle`.
//!
//! Built with `--cfg loom`, the same names are loom's, so that the models check the code that ships; with `--cfg shuttle`
//! they are shuttle's, so that it is scheduled as a whole (tests/shuttle). Locks do
//! not expose poisoning: what a lock of this crate guards is valid between any two statements, and a thread
//! that died is reported by the save it worked for, not by every later user of the lock.

#[cfg(shuttle)]
mod scheduled;

use std::time::Instant;

#[cfg(not(any(loom, shuttle)))]
mod imp {
    pub use core::sync::atomic;
    pub use std::sync::{Arc, Condvar, Mutex, MutexGuard};
    pub use std::thread;
}

#[cfg(shuttle)]
mod imp {
    pub use super::scheduled::{Condvar, Mutex, MutexGuard};
    pub use shuttle::sync::{atomic, Arc};
    pub use shuttle::thread;
}

#[cfg(loom)]
mod imp {
    pub use loom::sync::atomic;
    pub use loom::sync::{Arc, Condvar, Mutex, MutexGuard};
    pub use loom::thread;
}

pub use imp::{thread, Arc, MutexGuard};
#[cfg(not(loom))]
pub use std::sync::{OnceLock, Weak};

/// Atomics: core's, or loom's in a model, or shuttle's in a schedule.
pub mod atomic {
    pub use super::imp::atomic::{fence, AtomicBool, AtomicI32, AtomicU32, AtomicU64, AtomicUsize, Ordering};
}

/// What belongs to the process, whatever runs in it: statics, which outlive every schedule. Always core's and std's.
pub mod process {
    pub use core::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering};
    pub use std::thread::yield_now;
}

/// The time, for deadlines and ages of what the engine does. In a schedule it is a matter of the schedule.
#[cfg(not(shuttle))]
pub fn now() -> Instant {
    Instant::now()
}

#[cfg(shuttle)]
pub use scheduled::now;

/// Runs `work` on the calling thread and `more` others, and returns when all are done. Where the system refuses a thread,
/// those that run do the work.
#[cfg(not(any(loom, shuttle)))]
pub fn share(name: &str, more: usize, work: impl Fn() + Sync) {
    thread::scope(|scope| {
        for _ in 0..more {
            let _ = thread::Builder::new().name(name.into()).spawn_scoped(scope, &work);
        }
        work();
    });
}

/// The same in a schedule, on other threads only: the end of shuttle's last scoped thread wakes the one that made the
/// scope, whatever that waits for by then.
#[cfg(shuttle)]
pub fn share(_name: &str, more: usize, work: impl Fn() + Sync) {
    thread::scope(|scope| (0..=more).for_each(|_| drop(scope.spawn(&work))));
}

/// What the models need of loom.
#[cfg(all(test, loom))]
pub mod model {
    pub use loom::cell::UnsafeCell;

    /// Runs `law` under every schedule with at most `preemptions` preemptions (more if LOOM_MAX_PREEMPTIONS
    /// says so); panics at the first that breaks it.
    pub fn explore(preemptions: usize, law: impl Fn() + Sync + Send + 'static) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(preemptions.max(builder.preemption_bound.unwrap_or(0)));
        builder.check(law);
    }

    /// Set in the child process of [`deadlocks`].
    const IN_CHILD: &str = "PCCHECK_MODEL_CHILD";

    /// Runs a broken model in which some thread waits for ever; `test` is the path of the calling test in the crate. loom
    /// cannot unwind out of a deadlock (it aborts), so a child process runs that test again.
    pub fn deadlocks(test: &str, model: impl FnOnce()) {
        if std::env::var_os(IN_CHILD).is_some() {
            return model();
        }
        let child = std::process::Command::new(std::env::current_exe().expect("this test's program"))
            .args(["--exact", test, "--nocapture"])
            .env(IN_CHILD, "1")
            .env("RUST_BACKTRACE", "0")
            .output()
            .expect("child process");
        let said = String::from_utf8_lossy(&child.stderr);
        assert!(
            !child.status.success() && said.contains("deadlock"),
            "{test}: no deadlock was found: {said}"
        );
    }
}

use atomic::{AtomicU64, Ordering};

/// A mutual exclusion lock without poisoning.
#[derive(Debug, Default)]
pub struct Mutex<T>(imp::Mutex<T>);

impl<T> Mutex<T> {
    /// A new lock around `value`.
    #[cfg(not(loom))]
    pub const fn new(value: T) -> Self {
        Mutex(imp::Mutex::new(value))
    }

    /// A new lock around `value`.
    #[cfg(loom)]
    pub fn new(value: T) -> Self {
        Mutex(imp::Mutex::new(value))
    }

    /// Takes the lock if nobody holds it.
    #[cfg(not(loom))]
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        match self.0.try_lock() {
            Ok(guard) => Some(guard),
            Err(std::sync::TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(std::sync::TryLockError::WouldBlock) => None,
        }
    }

    /// Waits for the lock and holds it until the guard is dropped.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// A condition variable for [`Mutex`]. Wake-ups may be spurious: check the condition in a loop.
#[derive(Debug, Default)]
pub struct Condvar(imp::Condvar);

impl Condvar {
    /// A new condition variable.
    pub fn new() -> Self {
        Condvar(imp::Condvar::new())
    }

    /// Releases the lock, waits to be notified, takes the lock again.
    pub fn wait<'a, T>(&self, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        self.0.wait(guard).unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// As [`Condvar::wait`], but not beyond `deadline` (`None`: for ever). The flag says that the deadline
    /// has passed; a model has no clock, so there it is never set.
    pub fn wait_until<'a, T>(
        &self,
        guard: MutexGuard<'a, T>,
        deadline: Option<Instant>,
    ) -> (MutexGuard<'a, T>, bool) {
        #[cfg(not(loom))]
        if let Some(deadline) = deadline {
            let left = deadline.saturating_duration_since(now());
            if left.is_zero() {
                return (guard, true);
            }
            let (guard, result) =
                self.0.wait_timeout(guard, left).unwrap_or_else(|poisoned| poisoned.into_inner());
            return (guard, result.timed_out());
        }
        #[cfg(loom)]
        let _no_clock = deadline;
        (self.wait(guard), false)
    }

    /// Wakes one waiter.
    pub fn notify_one(&self) {
        self.0.notify_one();
    }

    /// Wakes all waiters.
    pub fn notify_all(&self) {
        self.0.notify_all();
    }
}

/// Low bits of [`Event`]'s word: how many threads are inside [`Event::wait`].
const WAITER_BITS: u32 = 20;
const WAITER_ONE: u64 = 1;
const WAITER_MASK: u64 = (1 << WAITER_BITS) - 1;
/// One notification; 44 bits of them do not wrap in the life of a process.
const EPOCH_ONE: u64 = 1 << WAITER_BITS;

/// An event count: waiting for a condition that other threads change without holding a lock.
///
/// ```
/// # use pccheck::sync::Event;
/// # let (event, condition) = (Event::new(), || true);
/// loop {
///     let ticket = event.ticket();
///     if condition() {
///         break;
///     }
///     if event.wait(ticket, None) {
///         break; // timed out
///     }
/// }
/// ```
///
/// Whoever makes the condition true calls [`Event::notify_all`] after that.
///
/// # Why no wake-up is lost
///
/// Epoch and waiter count share one word that only read-modify-writes change, so a notification and a
/// registration have an order. Registration first: the notifier sees the waiter and takes the lock, which the
/// waiter holds from its registration until it sleeps. Notification first: the waiter sees that its ticket is
/// out of date and does not sleep.
#[derive(Debug)]
pub struct Event {
    word: AtomicU64,
    lock: Mutex<()>,
    moved: Condvar,
}

/// What [`Event::ticket`] returns: waiting with it ends at the first notification after it was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket(u64);

impl Ticket {
    fn of(word: u64) -> Self {
        Ticket(word & !WAITER_MASK)
    }
}

impl Default for Event {
    fn default() -> Self {
        Event::new()
    }
}

impl Event {
    /// An event without waiters.
    pub fn new() -> Self {
        Event { word: AtomicU64::new(0), lock: Mutex::new(()), moved: Condvar::new() }
    }

    /// Takes a ticket. Check the condition after this, then [`wait`](Event::wait) with the ticket.
    #[must_use]
    pub fn ticket(&self) -> Ticket {
        // Acquire pairs with the Release in `notify_all`: with a ticket of that epoch, the check that follows
        // sees the change that was notified. It also keeps the check from moving before the ticket.
        Ticket::of(self.word.load(Ordering::Acquire))
    }

    /// Sleeps until a notification later than the ticket, or until `deadline` (`None`: for ever).
    /// Returns true when it timed out. Check the condition again in either case.
    #[must_use]
    pub fn wait(&self, ticket: Ticket, deadline: Option<Instant>) -> bool {
        let mut guard = self.lock.lock();
        // Acquire: as in `ticket`. Release: the notifier that sees this waiter need see nothing else, but one
        // word with one ordering for its read-modify-writes is easier to trust.
        let mut word = self.word.fetch_add(WAITER_ONE, Ordering::AcqRel);
        let mut timed_out = false;
        while Ticket::of(word) == ticket && !timed_out {
            (guard, timed_out) = self.moved.wait_until(guard, deadline);
            // Acquire pairs with the Release in `notify_all`, for the condition that is checked next.
            word = self.word.load(Ordering::Acquire);
        }
        self.word.fetch_sub(WAITER_ONE, Ordering::AcqRel);
        drop(guard);
        Ticket::of(word) == ticket
    }

    /// Ends the wait of every thread whose ticket is older than this call. One atomic add when nobody waits.
    pub fn notify_all(&self) {
        // Release pairs with the Acquire loads of `ticket` and `wait`: the change that is notified must not
        // move behind the notification. Acquire orders the lock below behind the registration that was seen.
        let before = self.word.fetch_add(EPOCH_ONE, Ordering::AcqRel);
        if before & WAITER_MASK != 0 {
            // Holding the lock shows that each waiter seen above sleeps or has left.
            let _guard = self.lock.lock();
            self.moved.notify_all();
        }
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_ticket_older_than_the_notification_does_not_sleep() {
        let event = Event::new();
        let ticket = event.ticket();
        event.notify_all();
        assert!(!event.wait(ticket, None), "must return at once, as notified");
    }

    #[test]
    fn a_deadline_ends_the_wait() {
        let event = Event::new();
        let start = Instant::now();
        assert!(event.wait(event.ticket(), Some(start + Duration::from_millis(20))));
        assert!(start.elapsed() >= Duration::from_millis(20), "returned before the deadline");
        assert!(event.wait(event.ticket(), Some(start)), "a deadline in the past times out at once");
        assert_eq!(event.word.load(Ordering::Relaxed) & WAITER_MASK, 0, "waiters left registered");
    }

    #[test]
    fn all_waiters_wake() {
        let event = Arc::new(Event::new());
        let ticket = event.ticket();
        let waiters: Vec<_> = (0..4)
            .map(|_| {
                let event = Arc::clone(&event);
                thread::spawn(move || event.wait(ticket, Some(Instant::now() + Duration::from_secs(20))))
            })
            .collect();
        thread::sleep(Duration::from_millis(10));
        event.notify_all();
        for waiter in waiters {
            assert!(!waiter.join().expect("waiter"), "a waiter slept through the notification");
        }
    }

    #[test]
    fn a_lock_survives_the_death_of_its_holder() {
        let lock = Arc::new(Mutex::new(1));
        let held = Arc::clone(&lock);
        let died = thread::spawn(move || {
            *held.lock() = 2;
            let _guard = held.lock();
            panic!("holder dies (expected by the test)");
        });
        assert!(died.join().is_err());
        assert_eq!(*lock.lock(), 2);
    }
}
