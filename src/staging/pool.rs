//! The pool and its buffers.
#![expect(unsafe_code, reason = "buffers are disjoint slices of one mapping")]

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::time::Instant;

use super::mapping::{Mapping, PAGE_BYTES};
use super::set::FreeList;
use crate::error::{Error, ErrorKind, Result};
use crate::sync::{Arc, Event};

/// Fewest buffers in a pool: one fills while another is written.
pub const BUFFERS_MIN: usize = 2;

/// What to ask of the kernel for the pool.
#[derive(Debug, Clone, Default)]
pub struct StagingOptions {
    /// Lock the pool in memory, where RLIMIT_MEMLOCK allows it; [`StagingPool::locked`] tells.
    pub lock_memory: bool,
}

/// The fixed set of chunk buffers shared by all saves and loads of a store.
///
/// All memory is taken in [`new`](StagingPool::new) and given back when the pool and its last buffer are
/// dropped.
pub struct StagingPool {
    /// Page-locked for GPUs; none: they refused. Dropped before the mapping.
    #[cfg(all(feature = "cuda", not(loom)))]
    registered: crate::sync::OnceLock<Option<crate::cuda::Registered>>,
    mapping: Mapping,
    buffer_bytes: usize,
    free: FreeList,
    locked: bool,
}

impl StagingPool {
    /// Maps and touches `total_bytes / buffer_bytes` buffers: never more than `total_bytes`.
    ///
    /// `buffer_bytes` is a multiple of 4096. The base is aligned to 2 MiB, so with a `buffer_bytes` that is a
    /// multiple of 2 MiB every buffer sits in whole huge pages.
    ///
    /// # Errors
    ///
    /// `InvalidArgument` when `buffer_bytes` is not a positive multiple of 4096 or fewer than 2 buffers fit;
    /// `OutOfMemory` when the kernel does not give the memory.
    pub fn new(total_bytes: u64, buffer_bytes: usize, options: &StagingOptions) -> Result<Arc<StagingPool>> {
        let invalid = |message| Error::new(ErrorKind::InvalidArgument, "create staging pool", message);
        if buffer_bytes == 0 || !buffer_bytes.is_multiple_of(PAGE_BYTES) {
            return Err(invalid(format!(
                "a buffer must be a positive multiple of {PAGE_BYTES} bytes, found {buffer_bytes}"
            )));
        }
        let count = total_bytes / buffer_bytes as u64;
        if count < BUFFERS_MIN as u64 {
            return Err(invalid(format!(
                "at least {BUFFERS_MIN} buffers of {buffer_bytes} bytes must fit, found {total_bytes} bytes"
            ))
            .advise("give a larger staging pool or smaller chunks"));
        }
        let len = usize::try_from(count * buffer_bytes as u64)
            .map_err(|_| invalid(format!("{total_bytes} bytes do not fit the address space")))?;
        let mapping = Mapping::new(len)?;
        let locked = options.lock_memory && mapping.lock();
        let free = FreeList::new(len / buffer_bytes);
        Ok(Arc::new(StagingPool {
            #[cfg(all(feature = "cuda", not(loom)))]
            registered: crate::sync::OnceLock::new(),
            mapping,
            buffer_bytes,
            free,
            locked,
        }))
    }

    /// First byte of buffer 0; buffer `i` begins `i * buffer_bytes` later. For registering the pool with the
    /// kernel or a device; bytes are accessed through a [`StagingBuffer`] only.
    pub fn base(&self) -> *mut u8 {
        self.mapping.base()
    }

    /// Bytes of all buffers together.
    pub fn total_bytes(&self) -> u64 {
        self.mapping.len() as u64
    }

    /// Bytes of one buffer.
    pub fn buffer_bytes(&self) -> usize {
        self.buffer_bytes
    }

    /// How many buffers there are, free or not.
    pub fn buffer_count(&self) -> usize {
        self.free.set().capacity()
    }

    /// Bytes that sit in huge pages now, as the kernel accounts for them (reads `/proc/self/smaps`: slow; 0
    /// where the kernel does not say).
    pub fn huge_page_bytes(&self) -> u64 {
        self.mapping.huge_page_bytes()
    }

    /// Whether the pool is locked in memory.
    pub fn locked(&self) -> bool {
        self.locked
    }

    /// Page-locks the pool for GPUs, once. False where the driver refuses: copies then go through memory of its own.
    #[cfg(all(feature = "cuda", not(loom)))]
    pub fn register(&self, device: &Arc<crate::cuda::Device>) -> bool {
        let register = || {
            // SAFETY: mapped until the pool is dropped, and what is returned is dropped before the mapping.
            unsafe { crate::cuda::Registered::new(device, self.base(), self.mapping.len()) }.ok()
        };
        self.registered.get_or_init(register).is_some()
    }

    /// How many buffers are free; out of date at once.
    pub fn free_count(&self) -> usize {
        self.free.set().free_count()
    }

    /// Notified whenever a buffer returns.
    pub fn freed(&self) -> &Event {
        self.free.freed()
    }

    /// Takes a free buffer, if there is one. Its contents are what the last owner left (at first zeros).
    #[must_use]
    pub fn try_acquire(self: &Arc<Self>) -> Option<StagingBuffer> {
        self.free.set().take().map(|index| StagingBuffer::of(self, index))
    }

    /// Waits for a free buffer until `deadline` (`None`: for ever); then `None`. Waiters are not queued: the
    /// caller decides whose turn it is.
    #[must_use]
    pub fn acquire(self: &Arc<Self>, deadline: Option<Instant>) -> Option<StagingBuffer> {
        self.free.take_until(deadline).map(|index| StagingBuffer::of(self, index))
    }
}

impl fmt::Debug for StagingPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "StagingPool({} of {} buffers of {} bytes free)",
            self.free_count(),
            self.buffer_count(),
            self.buffer_bytes
        )
    }
}

/// Whom a buffer goes back to that was lent to somebody.
pub trait Lender: Send + Sync {
    /// The buffer was dropped that was lent as number `at`.
    fn take_back(&self, at: usize, buffer: StagingBuffer);
}

/// One chunk buffer, owned until dropped; dropping returns it to the pool and wakes who waits for one, or to its lender.
pub struct StagingBuffer {
    pool: Arc<StagingPool>,
    index: usize,
    lent: Option<(Arc<dyn Lender>, usize)>,
}

impl StagingBuffer {
    fn of(pool: &Arc<StagingPool>, index: usize) -> StagingBuffer {
        StagingBuffer { pool: Arc::clone(pool), index, lent: None }
    }

    /// The same buffer, which is the lender's again when it is dropped.
    pub fn lend(mut self, lender: Arc<dyn Lender>, at: usize) -> StagingBuffer {
        self.lent = Some((lender, at));
        self
    }

    /// Which buffer of the pool this is.
    pub fn index(&self) -> usize {
        self.index
    }

    /// The pool it returns to.
    pub fn pool(&self) -> &Arc<StagingPool> {
        &self.pool
    }

    /// First byte, for reading. Valid until the buffer is dropped.
    pub fn as_ptr(&self) -> *const u8 {
        self.start()
    }

    /// First byte, for writing. Valid until the buffer is dropped.
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.start()
    }

    fn start(&self) -> *mut u8 {
        self.pool.base().wrapping_add(self.index * self.pool.buffer_bytes)
    }
}

impl Deref for StagingBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the pool is alive (held by Arc); `index` is this buffer's alone until it is put back, so
        // nobody writes these `buffer_bytes` initialised bytes while `self` is borrowed: but for a GPU, where the save has failed that
        // the buffer is lent to. What is read then is any bytes, of which nobody believes anything.
        unsafe { std::slice::from_raw_parts(self.start(), self.pool.buffer_bytes) }
    }
}

impl DerefMut for StagingBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, with the same exception; `&mut self` makes this the only access else.
        unsafe { std::slice::from_raw_parts_mut(self.start(), self.pool.buffer_bytes) }
    }
}

impl Drop for StagingBuffer {
    fn drop(&mut self) {
        if let Some((lender, at)) = self.lent.take() {
            return lender.take_back(at, StagingBuffer::of(&self.pool, self.index));
        }
        let was_out = self.pool.free.put(self.index);
        debug_assert!(was_out, "buffer {} returned twice", self.index);
    }
}

impl fmt::Debug for StagingBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StagingBuffer({} of {} bytes)", self.index, self.pool.buffer_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::{thread, Mutex};
    use std::time::Duration;

    fn pool(count: usize, buffer_bytes: usize) -> Arc<StagingPool> {
        StagingPool::new((count * buffer_bytes) as u64, buffer_bytes, &StagingOptions::default())
            .expect("pool")
    }

    #[test]
    fn never_takes_more_than_it_was_given() {
        let pool = StagingPool::new(5 * 8192 - 1, 8192, &StagingOptions { lock_memory: true }).expect("pool");
        assert_eq!((pool.buffer_count(), pool.total_bytes()), (4, 4 * 8192));
        assert!(pool.huge_page_bytes() <= pool.total_bytes());
    }

    #[test]
    fn refuses_what_cannot_work() {
        for (total, buffer) in [(1 << 20, 0), (1 << 20, 5000), (8191, 4096), (0, 4096)] {
            let error = StagingPool::new(total, buffer, &StagingOptions::default()).expect_err("refused");
            assert_eq!(
                error.kind(),
                ErrorKind::InvalidArgument,
                "{total} bytes in buffers of {buffer}: {error}"
            );
        }
        let error = StagingPool::new(1 << 60, 4096, &StagingOptions::default()).expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::OutOfMemory);
    }

    #[test]
    fn buffers_do_not_overlap_and_return() {
        let pool = pool(5, 4096);
        let mut held: Vec<_> = std::iter::from_fn(|| pool.try_acquire()).collect();
        assert_eq!((held.len(), pool.free_count()), (5, 0));
        for buffer in &mut held {
            let mark = buffer.index() as u8 + 1;
            buffer.fill(mark);
        }
        for buffer in &held {
            assert!(
                buffer.iter().all(|&byte| byte == buffer.index() as u8 + 1),
                "{buffer:?} was overwritten"
            );
            assert_eq!(buffer.as_ptr(), pool.base().wrapping_add(buffer.index() * 4096).cast_const());
        }
        assert!(pool.acquire(Some(Instant::now() + Duration::from_millis(5))).is_none(), "must time out");
        drop(held);
        assert_eq!(pool.free_count(), 5);
    }

    #[test]
    fn a_waiter_gets_the_buffer_that_returns() {
        let pool = pool(2, 4096);
        let (first, second) = (pool.try_acquire().expect("first"), pool.try_acquire().expect("second"));
        let waiting = Arc::clone(&pool);
        let waiter = thread::spawn(move || {
            waiting.acquire(Some(Instant::now() + Duration::from_secs(20))).map(|buffer| buffer.index())
        });
        thread::sleep(Duration::from_millis(10));
        drop(second);
        assert_eq!(waiter.join().expect("waiter"), Some(1));
        drop(first);
    }

    #[test]
    fn a_buffer_that_was_lent_goes_back_to_its_lender() {
        #[derive(Default)]
        struct Kept(Mutex<Vec<(usize, StagingBuffer)>>);
        impl Lender for Kept {
            fn take_back(&self, at: usize, buffer: StagingBuffer) {
                self.0.lock().push((at, buffer));
            }
        }
        let (pool, lender) = (pool(2, 4096), Arc::new(Kept::default()));
        let mut buffer = pool.try_acquire().expect("buffer").lend(lender.clone(), 7);
        buffer.fill(1);
        drop(buffer);
        assert_eq!(pool.free_count(), 1);
        let (at, buffer) = lender.0.lock().pop().expect("it is back");
        assert_eq!((at, buffer[0]), (7, 1));
        drop(buffer);
        assert_eq!(pool.free_count(), 2);
    }

    #[test]
    fn a_buffer_outlives_the_handle_of_its_pool() {
        let pool = pool(2, 4096);
        let mut buffer = pool.try_acquire().expect("buffer");
        drop(pool);
        buffer.fill(7);
        assert_eq!(buffer[4095], 7);
    }
}
