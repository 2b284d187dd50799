//! Functions of the C library that this program has instead: they fail when the thread that calls them was told so, else they
//! are the kernel's own. The engine is linked into this program, so that its calls come here.

use std::cell::Cell;
use std::ffi::{c_char, c_int, c_long, c_void};
use std::sync::atomic::{AtomicI64, Ordering};

thread_local! {
    /// Calls until one fails; none: never.
    static THREADS: Cell<Option<u32>> = const { Cell::new(None) };
    static MAPPINGS: Cell<Option<u32>> = const { Cell::new(None) };
    static DIRECT_IO: Cell<Option<u32>> = const { Cell::new(None) };
}

/// Seconds that the clock of the day is wrong.
static CLOCK_OFF_BY_S: AtomicI64 = AtomicI64::new(0);

/// What is refused to the calling thread while `run` runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// The nth new thread from now.
    Thread(u32),
    /// The nth mapping from now.
    Mapping(u32),
    /// Switching a file to O_DIRECT, the next time.
    DirectIo,
}

/// Runs with something refused. Also returns whether it was asked for.
pub fn refusing<T>(what: Refused, run: impl FnOnce() -> T) -> (T, bool) {
    match what {
        Refused::Thread(nth) => THREADS.set(Some(nth)),
        Refused::Mapping(nth) => MAPPINGS.set(Some(nth)),
        Refused::DirectIo => DIRECT_IO.set(Some(0)),
    }
    let result = run();
    let asked = match what {
        Refused::Thread(_) => THREADS.take().is_none(),
        Refused::Mapping(_) => MAPPINGS.take().is_none(),
        Refused::DirectIo => DIRECT_IO.take().is_none(),
    };
    (result, asked)
}

/// Sets the clock of the day, for all threads.
pub fn set_clock_off_by_s(seconds: i64) {
    // Relaxed: nothing else is ordered by it.
    CLOCK_OFF_BY_S.store(seconds, Ordering::Relaxed);
}

/// Whether it is this call's turn to fail.
fn is_turn(countdown: &'static std::thread::LocalKey<Cell<Option<u32>>>) -> bool {
    let left = countdown.get();
    countdown.set(left.and_then(|left| left.checked_sub(1)));
    left == Some(0)
}

fn set_errno(errno: c_int) {
    // SAFETY: takes nothing.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: the calling thread's own.
    unsafe { *place = errno };
}

type PthreadCreate = unsafe extern "C" fn(
    *mut libc::pthread_t,
    *const libc::pthread_attr_t,
    extern "C" fn(*mut c_void) -> *mut c_void,
    *mut c_void,
) -> c_int;

/// # Safety
///
/// As the C library's.
#[no_mangle]
unsafe extern "C" fn pthread_create(
    thread: *mut libc::pthread_t,
    attributes: *const libc::pthread_attr_t,
    start: extern "C" fn(*mut c_void) -> *mut c_void,
    argument: *mut c_void,
) -> c_int {
    if is_turn(&THREADS) {
        return libc::EAGAIN;
    }
    let name: *const c_char = c"pthread_create".as_ptr();
    // SAFETY: a C string.
    let next = unsafe { libc::dlsym(libc::RTLD_NEXT, name) };
    // SAFETY: the C library has it, and this is its type.
    let next: PthreadCreate = unsafe { std::mem::transmute(next) };
    // SAFETY: the caller's promise.
    unsafe { next(thread, attributes, start, argument) }
}

/// # Safety
///
/// As the C library's.
#[no_mangle]
unsafe extern "C" fn mmap(
    address: *mut c_void,
    len: usize,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: libc::off_t,
) -> *mut c_void {
    // SAFETY: the caller's promise.
    unsafe { map(address, len, protection, flags, fd, offset) }
}

/// What memmap2 calls.
///
/// # Safety
///
/// As the C library's.
#[no_mangle]
unsafe extern "C" fn mmap64(
    address: *mut c_void,
    len: usize,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: libc::off64_t,
) -> *mut c_void {
    // SAFETY: the caller's promise.
    unsafe { map(address, len, protection, flags, fd, offset) }
}

/// # Safety
///
/// As the C library's `mmap`.
unsafe fn map(
    address: *mut c_void,
    len: usize,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> *mut c_void {
    if is_turn(&MAPPINGS) {
        set_errno(libc::ENOMEM);
        return libc::MAP_FAILED;
    }
    // SAFETY: the caller's promise.
    let mapped = unsafe { libc::syscall(libc::SYS_mmap, address, len, protection, flags, fd, offset) };
    mapped as *mut c_void
}

/// # Safety
///
/// As the C library's, whose variable argument is one register here.
#[no_mangle]
unsafe extern "C" fn fcntl(fd: c_int, command: c_int, argument: c_long) -> c_int {
    if command == libc::F_SETFL && argument & c_long::from(libc::O_DIRECT) != 0 && is_turn(&DIRECT_IO) {
        set_errno(libc::EINVAL);
        return -1;
    }
    // SAFETY: the caller's promise.
    unsafe { libc::syscall(libc::SYS_fcntl, fd, command, argument) as c_int }
}

/// # Safety
///
/// As the C library's.
#[no_mangle]
unsafe extern "C" fn clock_gettime(clock: libc::clockid_t, time: *mut libc::timespec) -> c_int {
    // SAFETY: the caller's promise.
    let code = unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time) as c_int };
    if code == 0 && clock == libc::CLOCK_REALTIME {
        // SAFETY: just written by the kernel.
        unsafe { (*time).tv_sec += CLOCK_OFF_BY_S.load(Ordering::Relaxed) };
    }
    code
}
