//! Text, bytes and arrays of the caller, and places for results.
#![expect(unsafe_code, reason = "the caller's pointers are turned into references")]

use core::ffi::{c_char, c_void, CStr};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::{Caller, Outcome};
use crate::capi::text::cut;

/// A checked place for a result, or none. Not a reference: a program may pass one place twice.
pub(in crate::capi) struct Out<T>(*mut T);

impl<T: Copy> Out<T> {
    /// Whether the caller wants the result: a handle must not be made that nobody could free.
    pub fn is_wanted(&self) -> bool {
        !self.0.is_null()
    }

    /// Stores the result where the caller wants it.
    pub fn set(&self, value: T) {
        if !self.0.is_null() {
            // SAFETY: aligned, as `Caller::out` checked, and by the promise writable until the call returns.
            unsafe { self.0.write(value) };
        }
    }
}

/// Copies text out: the body of every exported function that takes `buf` and `cap`. 0 for no text.
///
/// # Safety
///
/// `buf` is NULL or `cap` writable bytes.
pub(in crate::capi) unsafe fn text_out(buf: *mut c_char, cap: u64, text: Option<String>) -> u64 {
    let caller = Caller { op: "copy text" };
    match text {
        Some(text) => caller.text_to(buf, cap, &text),
        None => {
            caller.copy_text(buf, cap, "");
            0
        }
    }
}

impl Caller {
    pub(super) fn check<T>(&self, what: &str, ptr: *const T) -> Outcome<()> {
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
    pub fn check_memory(&self, what: &str, data: *const c_void, bytes: u64) -> Outcome<()> {
        self.check(what, data.cast::<u8>())?;
        self.check_span(what, data as usize, bytes).map(|_| ())
    }

    pub(super) fn check_span(&self, what: &str, start: usize, bytes: u64) -> Outcome<usize> {
        let fits = usize::try_from(bytes)
            .ok()
            .filter(|&bytes| isize::try_from(bytes).is_ok() && start.checked_add(bytes).is_some());
        fits.ok_or_else(|| {
            self.bad_pointer(format!("{what}: {bytes} bytes at {start:#x} pass the end of memory"))
        })
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

    /// An array of `count` paths; where that is 0, it may be NULL.
    pub fn paths(&self, what: &str, array: *const *const c_char, count: u64) -> Outcome<Vec<PathBuf>> {
        if count == 0 {
            return Ok(Vec::new());
        }
        self.check(what, array)?;
        self.check_span(what, array as usize, count.saturating_mul(size_of::<*const c_char>() as u64))?;
        (0..count as usize)
            .map(|index| {
                // SAFETY: within the array, whose span was checked.
                let place = unsafe { array.add(index) };
                // SAFETY: aligned, as the array is, and by the promise readable.
                let text = unsafe { place.read() };
                let path = self.c_str(&format!("{what}[{index}]"), text)?;
                if path.is_empty() {
                    return Err(self.invalid(format!("{what}[{index}] is empty")));
                }
                Ok(PathBuf::from(OsStr::from_bytes(path.to_bytes())))
            })
            .collect()
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
    pub fn bytes<'a>(&'a self, what: &str, data: *const c_void, bytes: u64) -> Outcome<&'a [u8]> {
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
    pub fn bytes_mut<'a>(&'a self, what: &str, data: *mut c_void, bytes: u64) -> Outcome<&'a mut [u8]> {
        if bytes == 0 {
            return Ok(&mut []);
        }
        self.check(what, data.cast::<u8>())?;
        let len = self.check_span(what, data as usize, bytes)?;
        // SAFETY: not NULL, no longer than memory, and by the promise writable by this call alone.
        Ok(unsafe { core::slice::from_raw_parts_mut(data.cast(), len) })
    }

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
}

/// Whether no two of the spans `(address, bytes)` share a byte. Sorts them.
pub(in crate::capi) fn disjoint(spans: &mut [(usize, u64)]) -> bool {
    spans.sort_unstable();
    spans.windows(2).all(|pair| (pair[1].0 - pair[0].0) as u64 >= pair[0].1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_that_touch_are_disjoint_and_those_that_share_a_byte_are_not() {
        assert!(disjoint(&mut [(10, 5), (0, 10), (15, 1)]));
        assert!(!disjoint(&mut [(10, 5), (0, 11)]));
        assert!(!disjoint(&mut [(10, 5), (10, 5)]));
    }
}
