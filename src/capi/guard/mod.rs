//! The boundary: the only place where pointers from C are checked and cast, and where panics end.
//!
//! A [`Caller`] stands for the promise that the header binds the C program to: every pointer is NULL, or points to
//! what the header says, for as long as the header says. It is made at the start of each exported function, and
//! everything that depends on the promise is a method of it. What *can* be checked is checked all the same: NULL,
//! alignment, lengths, UTF-8, struct sizes, and that a handle is of the expected kind and of this process.
//!
//! | file | what |
//! |---|---|
//! | this one | calls, panics, handles |
//! | [`memory`] | text, bytes and arrays of the caller, and places for results |
//! | [`versioned`] | structs of any version |
#![expect(unsafe_code, reason = "the one place where pointers from C are turned into references")]

mod memory;
mod versioned;

use core::cell::{Cell, RefCell};
use core::mem::ManuallyDrop;
use std::panic::{catch_unwind, AssertUnwindSafe, PanicHookInfo};

pub(super) use memory::{disjoint, text_out, Out};
pub(super) use versioned::{versioned, Versioned};

use super::status::{pcc_status, PCC_BAD_POINTER, PCC_OK};
use super::text::{remember, Fault};
use crate::engine::Store;
use crate::error::{Error, ErrorKind};
use crate::fork::ForkStamp;
use crate::sync::{Arc, OnceLock};

pub(super) type Outcome<T> = Result<T, Fault>;

/// Names of the engine's threads begin so.
const THREAD_PREFIX: &str = "pcc-";

/// An opaque type of the header, and what stands behind it.
pub(super) trait Opaque {
    type Inner;
    /// Tells the kinds of handles apart.
    const TAG: u64;
    const NAME: &'static str;
    /// The store that a panic in a call on this handle makes doubtful, unless it is closed.
    fn store(inner: &Self::Inner) -> Option<Arc<Store>>;
}

/// What a pointer to an opaque type really points to.
#[repr(C)]
struct Handle<I> {
    tag: u64,
    stamp: ForkStamp,
    inner: ManuallyDrop<I>,
}
/// Stands for the promise of the header that binds the C program during one call.
pub(super) struct Caller {
    op: &'static str,
}

thread_local! {
    /// How many guarded calls this thread is in: its panics are results, not messages.
    static INSIDE: Cell<u32> = const { Cell::new(0) };
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Runs the body of an exported function: faults and panics become a status and this thread's last error.
///
/// # Safety
///
/// What the header asks of the C program holds for every pointer that `body` hands to its `Caller`.
pub(super) unsafe fn call(op: &'static str, body: impl FnOnce(&Caller) -> Outcome<()>) -> pcc_status {
    match contain(op, || body(&Caller { op })) {
        Ok(()) => PCC_OK,
        Err(fault) => remember(fault),
    }
}

/// [`call`] on a handle that is used, not freed.
///
/// # Safety
///
/// As [`call`]; `handle` is NULL or a live handle.
pub(super) unsafe fn on<H: Opaque>(
    op: &'static str,
    handle: *const H,
    body: impl FnOnce(&Caller, &H::Inner) -> Outcome<()>,
) -> pcc_status {
    let caller = Caller { op };
    let result = caller.handle(handle).and_then(|inner| {
        let result = contain(op, || body(&caller, inner));
        if result.as_ref().is_err_and(|fault| fault.error.kind() == ErrorKind::Internal) {
            if let Some(store) = H::store(inner) {
                store.poison();
            }
        }
        result
    });
    match result {
        Ok(()) => PCC_OK,
        Err(fault) => remember(fault),
    }
}

/// [`on`] for calls with results: `places` checks where they go and stores there what is left after a failure, also
/// where the handle is none.
///
/// # Safety
///
/// As [`on`].
pub(super) unsafe fn results_on<H: Opaque, P>(
    op: &'static str,
    handle: *const H,
    places: impl FnOnce(&Caller) -> Outcome<P>,
    body: impl FnOnce(&Caller, &H::Inner, P) -> Outcome<()>,
) -> pcc_status {
    match places(&Caller { op }) {
        // SAFETY: the caller's promise is the same.
        Ok(places) => unsafe { on(op, handle, |caller, inner| body(caller, inner, places)) },
        Err(fault) => remember(fault),
    }
}

/// [`on`] for calls that return a number instead of a status; `default` on failure.
///
/// # Safety
///
/// As [`on`].
pub(super) unsafe fn value_on<H: Opaque, T>(
    op: &'static str,
    handle: *const H,
    default: T,
    body: impl FnOnce(&Caller, &H::Inner) -> Outcome<T>,
) -> T {
    let mut value = default;
    // SAFETY: the caller's promise is the same.
    let _ = unsafe { on(op, handle, |caller, inner| body(caller, inner).map(|found| value = found)) };
    value
}

/// [`results_on`] for calls with one result, which goes to `out` where that is not NULL.
///
/// # Safety
///
/// As [`on`].
pub(super) unsafe fn optional_result_on<H: Opaque, T: Copy + Default>(
    op: &'static str,
    handle: *const H,
    what: &str,
    out: *mut T,
    body: impl FnOnce(&H::Inner) -> crate::Result<T>,
) -> pcc_status {
    let body = |_: &Caller, inner: &H::Inner, out: Out<T>| {
        out.set(body(inner)?);
        Ok(())
    };
    // SAFETY: the caller's promise is the same.
    unsafe { results_on(op, handle, |caller| caller.out_optional(what, out, T::default()), body) }
}

/// Frees a handle. NULL is nothing; in a forked child the engine's object is left alone, since its threads and
/// locks live in the parent.
///
/// # Safety
///
/// `handle` is NULL or a live handle that nobody uses any more.
pub(super) unsafe fn free<H: Opaque>(op: &'static str, handle: *mut H) {
    if handle.is_null() {
        return;
    }
    let caller = Caller { op };
    let result = caller.own(handle).and_then(|owned| {
        let forked = owned.stamp.is_forked();
        let Handle { inner, .. } = *owned;
        if !forked {
            contain(op, || {
                drop(ManuallyDrop::into_inner(inner));
                Ok(())
            })?;
        }
        Ok(())
    });
    if let Err(fault) = result {
        remember(fault);
    }
}

/// A new handle around `inner`.
pub(super) fn new_handle<H: Opaque>(inner: H::Inner) -> *mut H {
    let handle = Handle { tag: H::TAG, stamp: ForkStamp::now(), inner: ManuallyDrop::new(inner) };
    Box::into_raw(Box::new(handle)).cast()
}

fn contain<T>(op: &'static str, body: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
    static HOOK: OnceLock<()> = OnceLock::new();
    HOOK.get_or_init(keep_panics_quiet);
    let enter = |by: i32| {
        let _ = INSIDE.try_with(|inside| inside.set(inside.get().saturating_add_signed(by)));
    };
    enter(1);
    let result = catch_unwind(AssertUnwindSafe(body));
    enter(-1);
    result.unwrap_or_else(|payload| {
        // Dropping a payload runs foreign code, which may panic again.
        core::mem::forget(payload);
        let text = PANIC.try_with(|text| text.borrow_mut().take()).ok().flatten();
        let message = format!("a defect of the library: {}", text.as_deref().unwrap_or("no message"));
        let error = Error::new(ErrorKind::Internal, op, message);
        Err(error.advise("close the store and open it again; durable checkpoints are intact").into())
    })
}

/// Panics inside guarded calls are kept for the last error, those of the engine's own threads end in the saves they
/// worked for; neither may write to the program's standard error. All others go to the hook that was there.
fn keep_panics_quiet() {
    let previous = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info: &PanicHookInfo<'_>| {
        if INSIDE.try_with(Cell::get).unwrap_or(0) > 0 {
            let _ = PANIC.try_with(|text| *text.borrow_mut() = Some(info.to_string()));
        } else if !std::thread::current().name().is_some_and(|name| name.starts_with(THREAD_PREFIX)) {
            previous(info);
        }
    }));
}

impl Caller {
    /// The exported function.
    pub fn op(&self) -> &'static str {
        self.op
    }

    pub fn bad_pointer(&self, message: String) -> Fault {
        Fault { status: PCC_BAD_POINTER, error: Error::new(ErrorKind::InvalidArgument, self.op, message) }
    }

    pub fn invalid(&self, message: String) -> Fault {
        Error::new(ErrorKind::InvalidArgument, self.op, message).into()
    }

    fn header<'a, H: Opaque>(&self, handle: *const H) -> Outcome<&'a Handle<H::Inner>> {
        let handle: *const Handle<H::Inner> = handle.cast();
        self.check(H::NAME, handle)?;
        // SAFETY: aligned, and by the promise a live handle; all kinds begin with the tag.
        let tag = unsafe { *handle.cast::<u64>() };
        if tag != H::TAG {
            return Err(self.bad_pointer(format!("not a live {} handle (wrong kind, or freed)", H::NAME)));
        }
        // SAFETY: its tag says that `new_handle::<H>` made it; the promise keeps it alive.
        Ok(unsafe { &*handle })
    }

    /// What stands behind a handle, during this call.
    pub fn handle<H: Opaque>(&self, handle: *const H) -> Outcome<&H::Inner> {
        let header = self.header(handle)?;
        header.stamp.check(self.op)?;
        Ok(&header.inner)
    }

    /// As [`Caller::handle`], for calls that no other call on the same handle may overlap.
    #[expect(
        clippy::mut_from_ref,
        reason = "it comes from the pointer; the promise is that no call overlaps"
    )]
    pub fn handle_mut<H: Opaque>(&self, handle: *mut H) -> Outcome<&mut H::Inner> {
        self.handle(handle.cast_const())?;
        let handle: *mut Handle<H::Inner> = handle.cast();
        // SAFETY: live and of this kind, as just checked; the promise is that no other call uses it meanwhile.
        let handle = unsafe { &mut *handle };
        Ok(&mut handle.inner)
    }

    fn own<H: Opaque>(&self, handle: *mut H) -> Outcome<Box<Handle<H::Inner>>> {
        self.header(handle.cast_const())?;
        // SAFETY: live and of this kind, as just checked; `new_handle` made it from a box.
        let mut owned: Box<Handle<H::Inner>> = unsafe { Box::from_raw(handle.cast()) };
        // Volatile, so that a second free of the same memory is noticed as long as nobody else has got it.
        // SAFETY: a valid place of the box.
        unsafe { core::ptr::write_volatile(&mut owned.tag, 0) };
        Ok(owned)
    }
}

#[cfg(test)]
mod tests {
    use super::super::status::PCC_INTERNAL;
    use super::super::text::{pcc_last_error, pcc_last_error_status};
    use super::*;

    #[test]
    fn a_panic_becomes_a_status_and_its_message_the_last_error() {
        // SAFETY: no pointers are used.
        let status = unsafe { call("pcc_test", |_| panic!("at {}", 7)) };
        assert_eq!(status, PCC_INTERNAL);
        assert_eq!(pcc_last_error_status(), PCC_INTERNAL);
        let mut text = [0u8; 512];
        // SAFETY: a buffer of 512 bytes.
        let needed = unsafe { pcc_last_error(text.as_mut_ptr().cast(), 512) };
        let text = std::str::from_utf8(&text[..needed as usize - 1]).unwrap();
        assert!(text.contains("pcc_test") && text.contains("at 7"), "{text}");
    }
}
