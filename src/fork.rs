//! What happens to regions when the process forks: trainers fork data-loader workers while saves are in flight.
//!
//! A child that kept the region's file descriptor would keep the writer's lock for as long as it lives, and a
//! child that used the ring would corrupt its parent's. So every descriptor of the engine is registered here
//! when it is opened; a `pthread_atfork` handler closes them all in the child and raises the process's fork
//! generation, by which each object notices that it was opened in another process.
//!
//! Not covered: a child made by a raw `clone` system call, which runs no handlers. Children that exec are
//! covered by `O_CLOEXEC` alone.
#![expect(unsafe_code, reason = "pthread_atfork and close are system calls")]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use crate::error::{Error, ErrorKind, Result};
use crate::sync::process::{yield_now, AtomicBool, AtomicI32, AtomicU32, Ordering};
use crate::sync::OnceLock;

/// How many descriptors (regions, rings) one process may have open at once.
const REGISTRY_LEN: usize = 2048;

/// Marks an unused place of the registry.
const VACANT: RawFd = -1;

static REGISTRY: [AtomicI32; REGISTRY_LEN] = [const { AtomicI32::new(VACANT) }; REGISTRY_LEN];

/// Raised by one in every child.
static GENERATION: AtomicU32 = AtomicU32::new(0);

/// Held while a descriptor or mapping exists that is not yet registered, and across every fork. A spin lock, because
/// the handlers that hold it across a fork are three separate C functions.
static UNREGISTERED: AtomicBool = AtomicBool::new(false);

/// Set once the handlers were tried: an error number, or 0 where they are installed.
static INSTALLED: OnceLock<i32> = OnceLock::new();

fn acquire() {
    // Acquire pairs with the release in `release`: registrations made under the lock are seen.
    while UNREGISTERED.compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed).is_err() {
        yield_now();
    }
}

fn release() {
    // Pairs with the acquire in `acquire`.
    UNREGISTERED.store(false, Ordering::Release);
}

extern "C" fn before_fork() {
    acquire();
}

extern "C" fn in_parent() {
    release();
}

/// Runs in the child before `fork` returns there. Only async-signal-safe calls: atomics and close.
extern "C" fn in_child() {
    // The child has one thread: no ordering is needed, and threads that it makes later see these by their creation.
    GENERATION.fetch_add(1, Ordering::Relaxed);
    for place in &REGISTRY {
        let fd = place.swap(VACANT, Ordering::Relaxed);
        if fd != VACANT {
            // SAFETY: the parent's engine owned this descriptor, and nothing in the child will use or close it:
            // every owner compares fork generations first.
            unsafe { libc::close(fd) };
        }
    }
    release();
}

fn install() -> Result<()> {
    let code = *INSTALLED.get_or_init(|| {
        // SAFETY: three functions that live as long as the library, which is linked so as never to be unloaded.
        unsafe { libc::pthread_atfork(Some(before_fork), Some(in_parent), Some(in_child)) }
    });
    match code {
        0 => Ok(()),
        code => Err(Error::io("install fork handlers", &io::Error::from_raw_os_error(code))),
    }
}

/// Runs `make`, which opens or maps something that a forked child must not inherit, so that no fork can come
/// between that and its registration (or MADV_DONTFORK), both of which belong inside `make`.
pub fn without_forks<T>(make: impl FnOnce() -> Result<T>) -> Result<T> {
    struct Held;
    impl Drop for Held {
        fn drop(&mut self) {
            release();
        }
    }
    install()?;
    acquire();
    let _held = Held;
    make()
}

/// The process in which an object was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ForkStamp(u32);

impl ForkStamp {
    /// This process. Meaningful only for objects made inside [`without_forks`] or registered with a [`ChildClosedFd`].
    pub fn now() -> Self {
        // Relaxed: changed only while the process has a single thread.
        ForkStamp(GENERATION.load(Ordering::Relaxed))
    }

    /// Whether this is another process than the one that made the stamp.
    pub fn is_forked(self) -> bool {
        self != ForkStamp::now()
    }

    /// An error of kind [`ErrorKind::Forked`] in a child of the process that made the stamp.
    pub fn check(self, op: &'static str) -> Result<()> {
        if self.is_forked() {
            return Err(Error::new(
                ErrorKind::Forked,
                op,
                "the region was opened before this process was forked",
            )
            .advise("open the region again in this process, after the parent has closed it"));
        }
        Ok(())
    }
}

/// A file descriptor that the child of a fork closes by itself.
#[derive(Debug)]
pub(crate) struct ChildClosedFd {
    fd: RawFd,
    place: usize,
    stamp: ForkStamp,
}

impl ChildClosedFd {
    /// Registers `fd`. To be called inside [`without_forks`], in which the descriptor was opened.
    pub(crate) fn register(fd: OwnedFd) -> Result<Self> {
        let raw = fd.as_raw_fd();
        let place = register_raw(raw)?;
        // From here on this object closes it.
        std::mem::forget(fd);
        Ok(ChildClosedFd { fd: raw, place, stamp: ForkStamp::now() })
    }

    pub(crate) fn stamp(&self) -> ForkStamp {
        self.stamp
    }
}

impl AsRawFd for ChildClosedFd {
    fn as_raw_fd(&self) -> RawFd {
        self.fd
    }
}

impl Drop for ChildClosedFd {
    fn drop(&mut self) {
        if self.stamp.is_forked() {
            return;
        }
        acquire();
        unregister(self.place);
        // SAFETY: this object owns the descriptor, and is being dropped.
        unsafe { libc::close(self.fd) };
        release();
    }
}

/// A registration of a descriptor that something else owns and closes, such as an io_uring.
#[derive(Debug)]
pub(crate) struct ChildClosedGuard {
    place: usize,
    stamp: ForkStamp,
}

impl ChildClosedGuard {
    /// Registers `fd`, which must be closed by its owner only after this guard was dropped.
    pub(crate) fn register(fd: RawFd) -> Result<Self> {
        Ok(ChildClosedGuard { place: register_raw(fd)?, stamp: ForkStamp::now() })
    }
}

impl Drop for ChildClosedGuard {
    fn drop(&mut self) {
        if !self.stamp.is_forked() {
            unregister(self.place);
        }
    }
}

fn register_raw(fd: RawFd) -> Result<usize> {
    for (index, place) in REGISTRY.iter().enumerate() {
        // Relaxed: the child reads the registry after the fork, which the spin lock orders after this.
        if place.compare_exchange(VACANT, fd, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            return Ok(index);
        }
    }
    Err(Error::new(
        ErrorKind::Unsupported,
        "register a file descriptor",
        format!("at most {REGISTRY_LEN} regions and rings may be open at once in one process"),
    ))
}

fn unregister(place: usize) {
    // Relaxed: as in `register_raw`.
    REGISTRY[place].store(VACANT, Ordering::Relaxed);
}
