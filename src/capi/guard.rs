//! The boundary: the only place where pointers from C are checked and cast, and where panics end.
//!
//! A [`Caller`] stands for the promise that the header binds the C program to: every pointer is NULL, or points to
//! what the header says, for as long as the header says. It is made at the start of each exported function, and
//! everything that depends on the promise is a method of it. What *can* be checked is checked all the same: NULL,
//! alignment, lengths, UTF-8, struct sizes, and that a handle is of the expected kind and of this process.
#![expect(unsafe_code, reason = "the one place where pointers from C are turned into references")]

use core::cell::{Cell, RefCell};
use core::ffi::{c_char, CStr};
use core::mem::ManuallyDrop;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::panic::{catch_unwind, AssertUnwindSafe, PanicHookInfo};
use std::path::Path;

use super::status::{pcc_status, PCC_BAD_POINTER, PCC_OK};
use super::text::{cut, remember, Fault};
use crate::error::{Error, ErrorKind};
use crate::medium::fork::ForkStamp;
use crate::sync::OnceLock;

pub(super) type Outcome<T> = Result<T, Fault>;

/// Largest `struct_bytes` that is believed: beyond it the field was not initialised.
pub(super) const MAX_STRUCT_BYTES: u64 = 4096;
/// Unit of `struct_bytes`, and alignment of every struct.
const STRUCT_ALIGN_BYTES: u64 = 8;
/// Names of the engine's threads begin so.
const THREAD_PREFIX: &str = "pcc-";

/// An opaque type of the header, and what stands behind it.
pub(super) trait Opaque {
    type Inner;
    /// Tells the kinds of handles apart.
    const TAG: u64;
    const NAME: &'static str;
    /// A call on this handle panicked.
    fn poison(inner: &Self::Inner);
}

/// What a pointer to an opaque type really points to.
#[repr(C)]
struct Handle<I> {
    tag: u64,
    stamp: ForkStamp,
    inner: ManuallyDrop<I>,
}

/// A struct that grows by versions. Its first field is `struct_bytes`.
///
/// # Safety
///
/// `repr(C)`, aligned to 8, its size a multiple of 8, no padding, nothing but integers and pointers and
/// arrays of them, so that any bytes are a value; the first field is a `u64`.
pub(super) unsafe trait Versioned: Copy {
    /// What an initialised struct holds, `struct_bytes` included.
    fn initial() -> Self;
    const NAME: &'static str;
}

/// Stands for the promise of the header that binds the C program during one call.
pub(super) struct Caller {
    op: &'static str,
}

/// A checked place for a result, or none. Not a reference: a program may pass one place twice.
pub(super) struct Out<T>(*mut T);

impl<T: Copy> Out<T> {
    /// Stores the result where the caller wants it.
    pub fn set(&self, value: T) {
        if !self.0.is_null() {
            // SAFETY: aligned, as `Caller::out` checked, and by the promise writable until the call returns.
            unsafe { self.0.write(value) };
        }
    }
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
            H::poison(inner);
        }
        result
    });
    match result {
        Ok(()) => PCC_OK,
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

/// Copies text out: the body of every exported function that takes `buf` and `cap`. 0 for no text.
///
/// # Safety
///
/// `buf` is NULL or `cap` writable bytes.
pub(super) unsafe fn text_out(buf: *mut c_char, cap: u64, text: Option<String>) -> u64 {
    let caller = Caller { op: "copy text" };
    match text {
        Some(text) => caller.text_to(buf, cap, &text),
        None => {
            caller.copy_text(buf, cap, "");
            0
        }
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

    fn check<T>(&self, what: &str, ptr: *const T) -> Outcome<()> {
        if ptr.is_null() {
            return Err(self.bad_pointer(format!("{what} is NULL")));
        }
        if !ptr.is_aligned() {
            let align = align_of::<T>();
            return Err(self.bad_pointer(format!("{what} is {ptr:p}, expected a multiple of {align}")));
        }
        Ok(())
    }

    /// Memory that will be used later, or by somebody else: not NULL, and within memory.
    pub fn check_memory(&self, what: &str, data: *const core::ffi::c_void, bytes: u64) -> Outcome<()> {
        self.check(what, data.cast::<u8>())?;
        self.check_span(what, data as usize, bytes).map(|_| ())
    }

    fn check_span(&self, what: &str, start: usize, bytes: u64) -> Outcome<usize> {
        let fits = usize::try_from(bytes)
            .ok()
            .filter(|&bytes| isize::try_from(bytes).is_ok() && start.checked_add(bytes).is_some());
        fits.ok_or_else(|| {
            self.bad_pointer(format!("{what}: {bytes} bytes at {start:#x} pass the end of memory"))
        })
    }

    // ---- handles --------------------------------------------------------------------------------------

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

    /// Where a new handle goes; NULL is stored there at once, so that failure leaves it so.
    pub fn out_handle<H>(&self, what: &str, out: *mut *mut H) -> Outcome<Out<*mut H>> {
        self.out(what, out, core::ptr::null_mut())
    }

    /// Where a result goes; `initial` is stored there at once.
    pub fn out<T: Copy>(&self, what: &str, out: *mut T, initial: T) -> Outcome<Out<T>> {
        self.check(what, out)?;
        let out = Out(out);
        out.set(initial);
        Ok(out)
    }

    /// As [`Caller::out`], where NULL means that the caller does not want it.
    pub fn out_optional<T: Copy>(&self, what: &str, out: *mut T, initial: T) -> Outcome<Out<T>> {
        match out.is_null() {
            true => Ok(Out(out)),
            false => self.out(what, out, initial),
        }
    }

    // ---- text and bytes -------------------------------------------------------------------------------

    fn c_str<'a>(&'a self, what: &str, text: *const c_char) -> Outcome<&'a CStr> {
        self.check(what, text)?;
        // SAFETY: not NULL, and by the promise NUL-terminated and unchanged during this call.
        Ok(unsafe { CStr::from_ptr(text) })
    }

    /// NUL-terminated UTF-8.
    pub fn text<'a>(&'a self, what: &str, text: *const c_char) -> Outcome<&'a str> {
        let bytes = self.c_str(what, text)?;
        bytes.to_str().map_err(|e| self.invalid(format!("{what} is not UTF-8 at byte {}", e.valid_up_to())))
    }

    /// A NUL-terminated path, in the file system's bytes.
    pub fn path(&self, path: *const c_char) -> Outcome<&Path> {
        let path = self.c_str("path", path)?;
        if path.is_empty() {
            return Err(self.invalid("path is empty".into()));
        }
        Ok(Path::new(OsStr::from_bytes(path.to_bytes())))
    }

    /// Copies `text` and a NUL to `buf`, cut to `cap`.
    pub fn copy_text(&self, buf: *mut c_char, cap: u64, text: &str) {
        let Some(room) = usize::try_from(cap).unwrap_or(usize::MAX).checked_sub(1) else { return };
        if buf.is_null() {
            return;
        }
        let text = cut(text, room);
        // SAFETY: `text` and its NUL fit in `cap` bytes, which by the promise are writable.
        unsafe { core::ptr::copy_nonoverlapping(text.as_ptr(), buf.cast(), text.len()) };
        // SAFETY: `text.len() <= cap - 1`.
        let end = unsafe { buf.add(text.len()) };
        // SAFETY: as above.
        unsafe { end.write(0) };
    }

    /// Memory to read from; NULL is fine for 0 bytes.
    pub fn bytes<'a>(&'a self, what: &str, data: *const core::ffi::c_void, bytes: u64) -> Outcome<&'a [u8]> {
        if bytes == 0 {
            return Ok(&[]);
        }
        self.check(what, data.cast::<u8>())?;
        let len = self.check_span(what, data as usize, bytes)?;
        // SAFETY: not NULL, no longer than memory, and by the promise readable and unchanged during this call.
        Ok(unsafe { core::slice::from_raw_parts(data.cast(), len) })
    }

    /// Memory to write to; NULL is fine for 0 bytes. Slices that live at once must not overlap: see [`disjoint`].
    #[expect(clippy::mut_from_ref, reason = "it comes from the pointer; callers check what may overlap")]
    pub fn bytes_mut<'a>(
        &'a self,
        what: &str,
        data: *mut core::ffi::c_void,
        bytes: u64,
    ) -> Outcome<&'a mut [u8]> {
        if bytes == 0 {
            return Ok(&mut []);
        }
        self.check(what, data.cast::<u8>())?;
        let len = self.check_span(what, data as usize, bytes)?;
        // SAFETY: not NULL, no longer than memory, and by the promise writable by this call alone.
        Ok(unsafe { core::slice::from_raw_parts_mut(data.cast(), len) })
    }

    // ---- arrays and versioned structs -----------------------------------------------------------------

    /// An array of plain values; NULL is fine for none.
    pub fn array<'a, T: Copy>(&'a self, what: &str, array: *const T, count: u64) -> Outcome<&'a [T]> {
        if count == 0 {
            return Ok(&[]);
        }
        self.check(what, array)?;
        let bytes = count
            .checked_mul(size_of::<T>() as u64)
            .ok_or_else(|| self.bad_pointer(format!("{what}: {count} elements pass the end of memory")))?;
        self.check_span(what, array as usize, bytes)?;
        // SAFETY: not NULL, aligned, no longer than memory, and by the promise readable and initialised.
        Ok(unsafe { core::slice::from_raw_parts(array, count as usize) })
    }

    /// Initialises a struct of which the caller knows `struct_bytes` bytes.
    pub fn init<T: Versioned>(&self, out: *mut T, struct_bytes: u64) -> Outcome<()> {
        self.check(T::NAME, out)?;
        self.check_struct_bytes(T::NAME, struct_bytes)?;
        self.put(out, T::initial(), struct_bytes);
        Ok(())
    }

    /// Reads a struct of any version; NULL gives the defaults.
    pub fn options<T: Versioned>(&self, options: *const T) -> Outcome<T> {
        if options.is_null() {
            return Ok(T::initial());
        }
        self.check(T::NAME, options)?;
        // SAFETY: not NULL, aligned; every version begins with `struct_bytes`.
        let struct_bytes = unsafe { *options.cast::<u64>() };
        self.check_struct_bytes(T::NAME, struct_bytes)?;
        self.get(T::NAME, options, struct_bytes)
    }

    /// Reads an array of structs of any version; all have the same `struct_bytes`, which is also their distance.
    pub fn options_array<T: Versioned>(&self, what: &str, array: *const T, count: u64) -> Outcome<Vec<T>> {
        if count == 0 {
            return Ok(Vec::new());
        }
        self.check(what, array)?;
        // SAFETY: not NULL, aligned; every version begins with `struct_bytes`.
        let struct_bytes = unsafe { *array.cast::<u64>() };
        self.check_struct_bytes(what, struct_bytes)?;
        let total = count.saturating_mul(struct_bytes);
        self.check_span(what, array as usize, total)?;
        (0..count as usize)
            .map(|index| {
                // SAFETY: within the array, whose span was checked.
                let element: *const T = unsafe { array.byte_add(index * struct_bytes as usize) };
                // SAFETY: aligned, since `struct_bytes` is a multiple of 8; begins with `struct_bytes`.
                let its_bytes = unsafe { *element.cast::<u64>() };
                if its_bytes != struct_bytes {
                    let message =
                        format!("{what}[{index}].struct_bytes is {its_bytes}, [0] has {struct_bytes}");
                    return Err(self.invalid(message));
                }
                self.get(what, element, struct_bytes)
            })
            .collect()
    }

    /// Fills a struct whose `struct_bytes` its caller has set.
    pub fn fill<T: Versioned>(&self, out: *mut T, value: T) -> Outcome<()> {
        let struct_bytes = self.out_struct_bytes(out)?;
        self.put(out, value, struct_bytes);
        Ok(())
    }

    /// [`Caller::fill`], where NULL means that the caller does not want it.
    pub fn fill_optional<T: Versioned>(&self, out: *mut T, value: T) -> Outcome<()> {
        match out.is_null() {
            true => Ok(()),
            false => self.fill(out, value),
        }
    }

    /// Checks a struct that will be filled after the work is done: before it, so that a bad one costs nothing.
    pub fn check_fillable<T: Versioned>(&self, out: *mut T) -> Outcome<()> {
        match out.is_null() {
            true => Ok(()),
            false => self.out_struct_bytes(out).map(|_| ()),
        }
    }

    /// Fills elements of an array that are `struct_bytes` apart.
    pub fn fill_array<T: Versioned>(
        &self,
        array: *mut T,
        struct_bytes: u64,
        capacity: u64,
        values: impl Iterator<Item = T>,
    ) -> Outcome<()> {
        if capacity == 0 {
            return Ok(());
        }
        self.check(T::NAME, array)?;
        self.check_struct_bytes(T::NAME, struct_bytes)?;
        let total = capacity.saturating_mul(struct_bytes);
        self.check_span(T::NAME, array as usize, total)?;
        for (index, value) in values.take(capacity as usize).enumerate() {
            // SAFETY: within the array, whose span was checked.
            let element: *mut T = unsafe { array.byte_add(index * struct_bytes as usize) };
            self.put(element, value, struct_bytes);
        }
        Ok(())
    }

    fn out_struct_bytes<T: Versioned>(&self, out: *mut T) -> Outcome<u64> {
        self.check(T::NAME, out)?;
        // SAFETY: not NULL, aligned; by the promise its `struct_bytes` was set.
        let struct_bytes = unsafe { *out.cast::<u64>() };
        self.check_struct_bytes(T::NAME, struct_bytes)?;
        Ok(struct_bytes)
    }

    fn check_struct_bytes(&self, what: &str, struct_bytes: u64) -> Outcome<()> {
        let known = (STRUCT_ALIGN_BYTES..=MAX_STRUCT_BYTES).contains(&struct_bytes);
        if known && struct_bytes.is_multiple_of(STRUCT_ALIGN_BYTES) {
            return Ok(());
        }
        Err(self.invalid(format!(
            "{what}: struct_bytes is {struct_bytes}, expected the size of the struct, a multiple of 8 up to \
             {MAX_STRUCT_BYTES}"
        )))
    }

    /// Known fields from the caller, the rest by default; what is unknown here must be zero.
    fn get<T: Versioned>(&self, what: &str, from: *const T, struct_bytes: u64) -> Outcome<T> {
        let known = size_of::<T>().min(struct_bytes as usize);
        let mut value = T::initial();
        // SAFETY: by the promise `struct_bytes` bytes are readable; any bytes are a value of T.
        unsafe { core::ptr::copy_nonoverlapping(from.cast::<u8>(), (&raw mut value).cast::<u8>(), known) };
        // SAFETY: within the struct.
        let tail: *const u8 = unsafe { from.cast::<u8>().add(known) };
        // SAFETY: the rest of the `struct_bytes` readable bytes.
        let tail = unsafe { core::slice::from_raw_parts(tail, struct_bytes as usize - known) };
        match tail.iter().position(|&byte| byte != 0) {
            None => Ok(value),
            Some(at) => Err(Error::new(
                ErrorKind::Unsupported,
                self.op,
                format!(
                    "{what}: byte {} of the struct asks for something newer than this library",
                    known + at
                ),
            )
            .into()),
        }
    }

    /// Known fields to the caller, zeros beyond; `struct_bytes` stays the caller's.
    fn put<T: Versioned>(&self, to: *mut T, value: T, struct_bytes: u64) {
        let known = size_of::<T>().min(struct_bytes as usize);
        let to = to.cast::<u8>();
        // SAFETY: by the promise `struct_bytes` bytes are writable.
        unsafe { core::ptr::write_bytes(to, 0, struct_bytes as usize) };
        // SAFETY: as above; `value` is a local of at least `known` bytes, without padding.
        unsafe { core::ptr::copy_nonoverlapping((&raw const value).cast::<u8>(), to, known) };
        // SAFETY: aligned to 8 as every struct; the first field.
        unsafe { to.cast::<u64>().write(struct_bytes) };
    }
}

/// Whether no two of the spans `(address, bytes)` share a byte. Sorts them.
pub(super) fn disjoint(spans: &mut [(usize, u64)]) -> bool {
    spans.sort_unstable();
    spans.windows(2).all(|pair| (pair[1].0 - pair[0].0) as u64 >= pair[0].1)
}

#[cfg(test)]
mod tests {
    use super::super::status::{PCC_INTERNAL, PCC_INVALID_ARGUMENT};
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

    #[test]
    fn spans_that_touch_are_disjoint_and_those_that_share_a_byte_are_not() {
        assert!(disjoint(&mut [(10, 5), (0, 10), (15, 1)]));
        assert!(!disjoint(&mut [(10, 5), (0, 11)]));
        assert!(!disjoint(&mut [(10, 5), (10, 5)]));
    }

    #[derive(Clone, Copy, PartialEq, Debug)]
    #[repr(C)]
    struct Grown {
        struct_bytes: u64,
        a: u64,
        b: u64,
    }

    // SAFETY: three u64.
    unsafe impl Versioned for Grown {
        const NAME: &'static str = "grown";
        fn initial() -> Self {
            Grown { struct_bytes: 24, a: 1, b: 2 }
        }
    }

    fn read(bytes: &[u64]) -> Outcome<Grown> {
        Caller { op: "test" }.options(bytes.as_ptr().cast::<Grown>())
    }

    #[test]
    fn structs_of_other_versions_are_read_with_care() {
        assert_eq!(read(&[16, 7]).unwrap(), Grown { struct_bytes: 16, a: 7, b: 2 });
        assert_eq!(read(&[24, 7, 8]).unwrap(), Grown { struct_bytes: 24, a: 7, b: 8 });
        assert_eq!(read(&[32, 7, 8, 0]).unwrap().b, 8);
        let newer = read(&[32, 7, 8, 1 << 40]).unwrap_err();
        assert_eq!(newer.error.kind(), ErrorKind::Unsupported);
        assert!(newer.error.message().contains("byte 29"), "{}", newer.error);
        for size in [0, 1, 7, 17, 4104, u64::MAX] {
            assert_eq!(read(&[size, 0, 0]).unwrap_err().status, PCC_INVALID_ARGUMENT, "size {size}");
        }
    }

    #[test]
    fn structs_of_other_versions_are_filled_with_care() {
        let fill = |bytes: &mut [u64]| {
            Caller { op: "test" }.fill(bytes.as_mut_ptr().cast::<Grown>(), Grown::initial()).unwrap();
        };
        let mut small = [16, 9, 99];
        fill(&mut small);
        assert_eq!(small, [16, 1, 99]);
        let mut large = [32, 9, 9, 9, 99];
        fill(&mut large);
        assert_eq!(large, [32, 1, 2, 0, 99]);
    }
}
