//! Locks, condition variables and the clock where shuttle decides which thread runs next (`--cfg shuttle`).
//!
//! # Time
//!
//! No time passes in a schedule: a wait with a deadline lets the others go on once, and then the schedule decides whether
//! the deadline has passed or the waiter looks once more (wake-ups may be spurious anyway). So each of the engine's time-outs
//! runs out in some schedules, early as well as late, and a loop that polls makes progress however its interval is. A wait
//! without a deadline ends by a notification alone: that it is missing is found as a deadlock. What this cannot show is a
//! notification that a poll makes up for.

use std::cell::Cell;
use std::ops::{Deref, DerefMut};
use std::sync::{LockResult, OnceLock, PoisonError, TryLockError, TryLockResult};
use std::time::{Duration, Instant};

use shuttle::rand::{thread_rng, Rng};
use shuttle::{sync, thread};

/// A timed wait runs out at one of so many looks.
const LOOKS: u32 = 4;

thread_local! {
    /// How far the clock is. Of the system's thread, on which one schedule runs after another: it never goes back.
    static ELAPSED: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

/// The time of the schedule. Moves only when a timed wait runs out.
pub fn now() -> Instant {
    static START: OnceLock<Instant> = OnceLock::new();
    *START.get_or_init(Instant::now) + ELAPSED.get()
}

/// As std's; remembers its lock, to which a timed wait returns.
#[derive(Debug, Default)]
pub struct Mutex<T>(sync::Mutex<T>);

impl<T> Mutex<T> {
    pub const fn new(value: T) -> Self {
        Mutex(sync::Mutex::new(value))
    }

    pub fn lock(&self) -> LockResult<MutexGuard<'_, T>> {
        match self.0.lock() {
            Ok(held) => Ok(MutexGuard { held, lock: self }),
            Err(poisoned) => Err(PoisonError::new(MutexGuard { held: poisoned.into_inner(), lock: self })),
        }
    }

    pub fn try_lock(&self) -> TryLockResult<MutexGuard<'_, T>> {
        match self.0.try_lock() {
            Ok(held) => Ok(MutexGuard { held, lock: self }),
            Err(TryLockError::Poisoned(poisoned)) => {
                let guard = MutexGuard { held: poisoned.into_inner(), lock: self };
                Err(TryLockError::Poisoned(PoisonError::new(guard)))
            }
            Err(TryLockError::WouldBlock) => Err(TryLockError::WouldBlock),
        }
    }
}

/// As std's.
#[derive(Debug)]
pub struct MutexGuard<'a, T> {
    held: sync::MutexGuard<'a, T>,
    lock: &'a Mutex<T>,
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.held
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.held
    }
}

/// Whether a timed wait ran out.
pub struct WaitTimeoutResult(bool);

impl WaitTimeoutResult {
    pub fn timed_out(&self) -> bool {
        self.0
    }
}

#[derive(Debug, Default)]
pub struct Condvar(sync::Condvar);

impl Condvar {
    pub fn new() -> Self {
        Condvar(sync::Condvar::new())
    }

    pub fn wait<'a, T>(&self, guard: MutexGuard<'a, T>) -> LockResult<MutexGuard<'a, T>> {
        let MutexGuard { held, lock } = guard;
        match self.0.wait(held) {
            Ok(held) => Ok(MutexGuard { held, lock }),
            Err(poisoned) => Err(PoisonError::new(MutexGuard { held: poisoned.into_inner(), lock })),
        }
    }

    /// See the head of this file.
    pub fn wait_timeout<'a, T>(
        &self,
        guard: MutexGuard<'a, T>,
        time: Duration,
    ) -> LockResult<(MutexGuard<'a, T>, WaitTimeoutResult)> {
        let MutexGuard { held, lock } = guard;
        drop(held);
        thread::yield_now();
        let ran_out = thread_rng().gen_ratio(1, LOOKS);
        if ran_out {
            ELAPSED.set(ELAPSED.get() + time);
        }
        match lock.lock() {
            Ok(guard) => Ok((guard, WaitTimeoutResult(ran_out))),
            Err(poisoned) => Err(PoisonError::new((poisoned.into_inner(), WaitTimeoutResult(ran_out)))),
        }
    }

    pub fn notify_one(&self) {
        self.0.notify_one();
    }

    pub fn notify_all(&self) {
        self.0.notify_all();
    }
}
