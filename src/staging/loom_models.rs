//! Laws of the free list under every schedule: no buffer lost or handed out twice, no wake-up lost.
//!
//! A buffer's bytes are a cell whose accesses loom checks, so that a missing ordering fails as surely as a
//! wrong bit. The broken variants prove that the models can fail.

use super::{BufferSet, FreeList};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::model::{deadlocks, explore, UnsafeCell};
use crate::sync::{thread, Arc, Condvar, Mutex};

/// The preemptions that each model explores at least.
const PREEMPTIONS: usize = 3;

/// What is under test: the shipped code or a broken variant.
trait Pool: 'static {
    fn take(&self) -> Option<usize>;
    fn put(&self, index: usize) -> bool;
    fn free_count(&self) -> usize;
}

impl Pool for BufferSet {
    fn take(&self) -> Option<usize> {
        BufferSet::take(self)
    }
    fn put(&self, index: usize) -> bool {
        BufferSet::put(self, index)
    }
    fn free_count(&self) -> usize {
        BufferSet::free_count(self)
    }
}

/// Waits for an index where none is free, as the pool does.
impl Pool for FreeList {
    fn take(&self) -> Option<usize> {
        self.take_until(None)
    }
    fn put(&self, index: usize) -> bool {
        FreeList::put(self, index)
    }
    fn free_count(&self) -> usize {
        self.set().free_count()
    }
}

/// Whether a model also watches the buffers' bytes.
#[derive(Clone, Copy, PartialEq)]
enum Bytes {
    Watched,
    Unwatched,
}

/// `threads` threads each take a buffer, if there is one, write it and put it back.
fn take_write_put<P: Pool>(count: usize, threads: usize, bytes: Bytes, make: fn() -> P) {
    explore(PREEMPTIONS, move || {
        let cells: Vec<_> = (0..count).map(|_| UnsafeCell::new(())).collect();
        let shared = Arc::new((make(), cells));
        let takers: Vec<_> = (0..threads)
            .map(|_| {
                let shared = Arc::clone(&shared);
                thread::spawn(move || {
                    let (pool, cells) = &*shared;
                    if let Some(index) = pool.take() {
                        if bytes == Bytes::Watched {
                            // Panics if another access is not ordered before or after this one.
                            cells[index].with_mut(|_| ());
                        }
                        assert!(pool.put(index), "law: a buffer has one owner at a time");
                    }
                })
            })
            .collect();
        for taker in takers {
            taker.join().expect("taker");
        }
        assert_eq!(shared.0.free_count(), count, "law: no buffer is lost");
    });
}

#[test]
fn no_buffer_is_lost_or_handed_out_twice() {
    take_write_put(2, 3, Bytes::Watched, || BufferSet::new(2));
}

#[test]
fn no_buffer_is_lost_or_handed_out_twice_when_scarce() {
    take_write_put(1, 3, Bytes::Watched, || BufferSet::new(1));
}

/// A lost wake-up leaves a taker asleep for ever, which loom reports as a deadlock.
#[test]
fn no_wake_up_is_lost() {
    take_write_put(1, 3, Bytes::Watched, || FreeList::new(1));
}

/// Takes by load and store: two takers may see the same bit.
struct TornTake(AtomicU64);

impl Pool for TornTake {
    fn take(&self) -> Option<usize> {
        let seen = self.0.load(Ordering::Acquire);
        self.0.store(seen & seen.wrapping_sub(1), Ordering::Release);
        (seen != 0).then(|| seen.trailing_zeros() as usize)
    }
    fn put(&self, index: usize) -> bool {
        self.0.fetch_or(1 << index, Ordering::AcqRel) & 1 << index == 0
    }
    fn free_count(&self) -> usize {
        self.0.load(Ordering::Acquire).count_ones() as usize
    }
}

#[test]
#[should_panic(expected = "law: a buffer has one owner at a time")]
fn a_take_by_load_and_store_is_caught() {
    take_write_put(1, 2, Bytes::Unwatched, || TornTake(AtomicU64::new(1)));
}

/// Puts without ordering: the next owner may see the last one's stores late.
struct UnorderedPut(AtomicU64);

impl Pool for UnorderedPut {
    fn take(&self) -> Option<usize> {
        (self.0.fetch_and(0, Ordering::Acquire) == 1).then_some(0)
    }
    fn put(&self, index: usize) -> bool {
        self.0.fetch_or(1 << index, Ordering::Relaxed) == 0
    }
    fn free_count(&self) -> usize {
        self.0.load(Ordering::Relaxed).count_ones() as usize
    }
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_put_without_release_is_caught() {
    take_write_put(1, 2, Bytes::Watched, || UnorderedPut(AtomicU64::new(1)));
}

/// Looks for waiters before it makes the notification visible: one that registers in between sleeps on.
struct HastyNotify {
    set: BufferSet,
    epoch: AtomicU64,
    waiters: AtomicU64,
    lock: Mutex<()>,
    moved: Condvar,
}

impl Pool for HastyNotify {
    fn take(&self) -> Option<usize> {
        loop {
            let ticket = self.epoch.load(Ordering::Acquire);
            if let Some(index) = self.set.take() {
                return Some(index);
            }
            let mut guard = self.lock.lock();
            self.waiters.fetch_add(1, Ordering::AcqRel);
            while self.epoch.load(Ordering::Acquire) == ticket {
                guard = self.moved.wait(guard);
            }
            self.waiters.fetch_sub(1, Ordering::AcqRel);
        }
    }
    fn put(&self, index: usize) -> bool {
        let was_out = self.set.put(index);
        let waited_for = self.waiters.load(Ordering::Acquire) != 0;
        self.epoch.fetch_add(1, Ordering::AcqRel);
        if waited_for {
            let _guard = self.lock.lock();
            self.moved.notify_all();
        }
        was_out
    }
    fn free_count(&self) -> usize {
        self.set.free_count()
    }
}

#[test]
fn a_notification_behind_the_look_for_waiters_is_caught() {
    deadlocks("staging::loom_models::a_notification_behind_the_look_for_waiters_is_caught", || {
        take_write_put(1, 2, Bytes::Unwatched, || HastyNotify {
            set: BufferSet::new(1),
            epoch: AtomicU64::new(0),
            waiters: AtomicU64::new(0),
            lock: Mutex::new(()),
            moved: Condvar::new(),
        });
    });
}

/// A save that was cancelled gives the buffers of its parked writes back while other saves wait for them.
///
/// `returned` says how a buffer comes back.
fn cancelled_save_returns_its_buffers(returned: fn(&FreeList, usize) -> bool) {
    explore(PREEMPTIONS - 1, move || {
        let pool = Arc::new(FreeList::new(2));
        let cells: Arc<Vec<_>> = Arc::new((0..2).map(|_| UnsafeCell::new(())).collect());
        let parked: Vec<usize> = (0..2).filter_map(|_| pool.take_until(None)).collect();
        let waiters: Vec<_> = (0..2)
            .map(|_| {
                let (pool, cells) = (pool.clone(), cells.clone());
                thread::spawn(move || {
                    let index = pool.take_until(None).expect("law: who waits gets a buffer");
                    cells[index].with_mut(|_| ());
                    assert!(pool.put(index), "law: a buffer has one owner at a time");
                })
            })
            .collect();
        for index in parked {
            cells[index].with_mut(|_| ());
            assert!(returned(&pool, index), "law: a buffer has one owner at a time");
        }
        for waiter in waiters {
            waiter.join().expect("waiter");
        }
        assert_eq!(pool.set().free_count(), 2, "law: no buffer is lost");
    });
}

#[test]
fn a_cancelled_saves_buffers_reach_who_waits_for_them() {
    cancelled_save_returns_its_buffers(|pool, index| pool.put(index));
}

#[test]
fn a_buffer_that_comes_back_unnoticed_is_caught() {
    deadlocks("staging::loom_models::a_buffer_that_comes_back_unnoticed_is_caught", || {
        cancelled_save_returns_its_buffers(|pool, index| pool.set().put(index));
    });
}

/// Takes the ticket only after it has looked: what comes back in between is not noticed.
struct LateTicket(FreeList);

impl Pool for LateTicket {
    fn take(&self) -> Option<usize> {
        loop {
            if let Some(index) = self.0.set().take() {
                return Some(index);
            }
            let ticket = self.0.freed().ticket();
            let _forever = self.0.freed().wait(ticket, None);
        }
    }
    fn put(&self, index: usize) -> bool {
        self.0.put(index)
    }
    fn free_count(&self) -> usize {
        self.0.set().free_count()
    }
}

#[test]
fn a_ticket_taken_after_the_look_is_caught() {
    deadlocks("staging::loom_models::a_ticket_taken_after_the_look_is_caught", || {
        take_write_put(1, 2, Bytes::Unwatched, || LateTicket(FreeList::new(1)));
    });
}

/// Takes without ordering: the new owner's accesses may come before the last one's.
struct UnorderedTake(AtomicU64);

impl Pool for UnorderedTake {
    fn take(&self) -> Option<usize> {
        (self.0.fetch_and(0, Ordering::Relaxed) == 1).then_some(0)
    }
    fn put(&self, index: usize) -> bool {
        self.0.fetch_or(1 << index, Ordering::Release) == 0
    }
    fn free_count(&self) -> usize {
        self.0.load(Ordering::Relaxed).count_ones() as usize
    }
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_take_without_acquire_is_caught() {
    take_write_put(1, 2, Bytes::Watched, || UnorderedTake(AtomicU64::new(1)));
}
