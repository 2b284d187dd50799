//! Text out of the library, and this thread's last error.
#![expect(unsafe_code, reason = "exported functions")]
#![expect(clippy::missing_safety_doc, reason = "the contract of exported functions is the header")]

use core::cell::RefCell;
use core::ffi::c_char;

use super::guard::{self, Caller};
use super::status::{pcc_status, PCC_OK};
use crate::error::Error;

/// Version of the C ABI: the number in the SONAME. A library of another major is another library.
pub const PCC_ABI_MAJOR: u32 = 1;
/// Raised with every addition to the ABI; additions never change what was there.
pub const PCC_ABI_MINOR: u32 = 2;
/// `offset` of an error that concerns no byte offset: all bits set.
pub const PCC_NO_OFFSET: u64 = u64::MAX;

/// A failure with the number that the caller gets for it.
#[derive(Debug, Clone)]
pub(super) struct Fault {
    pub status: pcc_status,
    pub error: Error,
}

impl From<Error> for Fault {
    fn from(error: Error) -> Fault {
        Fault { status: super::status::status_of(error.kind()), error }
    }
}

thread_local! {
    static LAST: RefCell<Option<Fault>> = const { RefCell::new(None) };
}

/// Makes `fault` this thread's last error; returns its status.
pub(super) fn remember(fault: Fault) -> pcc_status {
    let status = fault.status;
    // Fails only while the thread is ending: then nobody can ask for the text any more.
    let _ = LAST.try_with(|last| *last.borrow_mut() = Some(fault));
    status
}

fn last<T>(default: T, read: impl FnOnce(&Fault) -> T) -> T {
    LAST.try_with(|last| last.borrow().as_ref().map(read)).ok().flatten().unwrap_or(default)
}

/// UTF-8 with a NUL after it, so that C can borrow it.
#[derive(Debug, Clone)]
pub(super) struct CText(Vec<u8>);

impl CText {
    pub fn new(text: &str) -> CText {
        CText::from_bytes(text.as_bytes())
    }

    pub fn from_bytes(text: &[u8]) -> CText {
        let mut bytes = Vec::with_capacity(text.len() + 1);
        bytes.extend_from_slice(text);
        bytes.push(0);
        CText(bytes)
    }

    pub fn as_ptr(&self) -> *const c_char {
        self.0.as_ptr().cast()
    }

    /// Bytes without the final NUL.
    pub fn len(&self) -> u64 {
        self.0.len() as u64 - 1
    }

    pub fn bytes(&self) -> &[u8] {
        &self.0[..self.0.len() - 1]
    }
}

/// Version of the library, such as "0.1.0".
///
/// Durability: none.
/// Threads: any.
/// Ownership: static text, never freed.
/// Errors: none.
#[no_mangle]
pub extern "C" fn pcc_version() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    VERSION.as_ptr().cast()
}

/// Version of the ABI that the loaded library has: major * 65536 + minor. A program that loads the library with
/// dlopen checks that the major is the PCC_ABI_MAJOR it was written for and that the minor is not below its own:
///
///   uint32_t abi = pcc_abi_version();
///   int fits = abi / 65536u == PCC_ABI_MAJOR && abi >= PCC_ABI_MAJOR * 65536u + PCC_ABI_MINOR;
///
/// Durability: none.
/// Threads: any.
/// Ownership: none.
/// Errors: none.
#[no_mangle]
pub extern "C" fn pcc_abi_version() -> u32 {
    PCC_ABI_MAJOR << 16 | PCC_ABI_MINOR
}

/// Copies what is known of the last call that failed on this thread: operation, path, byte offset, what was
/// expected and found, what to do next; one line of UTF-8, NUL-terminated, cut at a character where `cap` is too
/// small. Returns the bytes that the whole text takes with its NUL, or 0 where no call has failed on this thread.
/// A call that succeeds leaves the last error as it is, so look at it only after a negative status.
///
/// Durability: none.
/// Threads: any; every thread has its own last error.
/// Ownership: the text is copied to `buf` (`cap` bytes); NULL or 0 only ask for the size.
/// Errors: none.
#[no_mangle]
pub unsafe extern "C" fn pcc_last_error(buf: *mut c_char, cap: u64) -> u64 {
    let text = last(None, |fault| Some(fault.error.to_string()));
    // SAFETY: the header binds the caller.
    unsafe { guard::text_out(buf, cap, text) }
}

/// The status of the last call that failed on this thread; `PCC_OK` where none has.
///
/// Durability: none.
/// Threads: any; every thread has its own last error.
/// Ownership: none.
/// Errors: none.
#[no_mangle]
pub extern "C" fn pcc_last_error_status() -> pcc_status {
    last(PCC_OK, |fault| fault.status)
}

/// The operating system's error number (errno) in this thread's last error; 0 where there is none.
///
/// Durability: none.
/// Threads: any; every thread has its own last error.
/// Ownership: none.
/// Errors: none.
#[no_mangle]
pub extern "C" fn pcc_last_error_errno() -> i32 {
    last(0, |fault| fault.error.errno().unwrap_or(0))
}

/// The byte offset in the region that this thread's last error concerns; `PCC_NO_OFFSET` (all bits set) where there
/// is none.
///
/// Durability: none.
/// Threads: any; every thread has its own last error.
/// Ownership: none.
/// Errors: none.
#[no_mangle]
pub extern "C" fn pcc_last_error_offset() -> u64 {
    last(PCC_NO_OFFSET, |fault| fault.error.offset().unwrap_or(PCC_NO_OFFSET))
}

/// Copies the operation in this thread's last error, as `pcc_last_error` does with the whole text.
///
/// Durability: none.
/// Threads: any; every thread has its own last error.
/// Ownership: the text is copied to `buf` (`cap` bytes); NULL or 0 only ask for the size.
/// Errors: none.
#[no_mangle]
pub unsafe extern "C" fn pcc_last_error_operation(buf: *mut c_char, cap: u64) -> u64 {
    let text = last(None, |fault| Some(fault.error.op().to_string()));
    // SAFETY: the header binds the caller.
    unsafe { guard::text_out(buf, cap, text) }
}

/// Copies the path in this thread's last error, as `pcc_last_error` does with the whole text; 0 where there is none.
///
/// Durability: none.
/// Threads: any; every thread has its own last error.
/// Ownership: the text is copied to `buf` (`cap` bytes); NULL or 0 only ask for the size.
/// Errors: none.
#[no_mangle]
pub unsafe extern "C" fn pcc_last_error_path(buf: *mut c_char, cap: u64) -> u64 {
    let text = last(None, |fault| fault.error.path().map(|path| path.to_string_lossy().into_owned()));
    // SAFETY: the header binds the caller.
    unsafe { guard::text_out(buf, cap, text) }
}

/// Copies what this thread's last error advises to do next, as `pcc_last_error` does with the whole text; 0 where it
/// advises nothing.
///
/// Durability: none.
/// Threads: any; every thread has its own last error.
/// Ownership: the text is copied to `buf` (`cap` bytes); NULL or 0 only ask for the size.
/// Errors: none.
#[no_mangle]
pub unsafe extern "C" fn pcc_last_error_advice(buf: *mut c_char, cap: u64) -> u64 {
    let text = last(None, |fault| fault.error.advice().map(str::to_owned));
    // SAFETY: the header binds the caller.
    unsafe { guard::text_out(buf, cap, text) }
}

/// The longest prefix of `text` that fits in `room` bytes and ends at a character.
pub(super) fn cut(text: &str, room: usize) -> &str {
    let mut end = room.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

impl Caller {
    /// As the exported functions that copy text.
    pub fn text_to(&self, buf: *mut c_char, cap: u64, text: &str) -> u64 {
        let text = text.replace('\0', "\u{FFFD}");
        self.copy_text(buf, cap, &text);
        text.len() as u64 + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_cut_at_characters() {
        assert_eq!(cut("aé", 3), "aé");
        assert_eq!(cut("aé", 2), "a");
        assert_eq!(cut("aé", 0), "");
        assert_eq!(cut("aé", 99), "aé");
    }
}
