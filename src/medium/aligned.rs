//! A bounce buffer for O_DIRECT transfers from and to memory of any alignment.
#![expect(unsafe_code, reason = "the allocator's aligned interface works with raw pointers")]

use std::alloc::{alloc_zeroed, dealloc, Layout};
use std::ops::{Deref, DerefMut};

use crate::error::{Error, ErrorKind, Result};

/// Zeroed heap memory, aligned as asked, of a fixed length.
pub(super) struct AlignedBuffer {
    start: *mut u8,
    layout: Layout,
}

impl AlignedBuffer {
    /// `len` bytes (not 0) at a multiple of `align` (a power of two).
    pub(super) fn new(len: usize, align: usize) -> Result<Self> {
        let refused = || Error::new(ErrorKind::OutOfMemory, "allocate a buffer", format!("{len} bytes"));
        let layout = Layout::from_size_align(len, align).map_err(|_| refused())?;
        if len == 0 {
            return Err(refused());
        }
        // SAFETY: the layout's size is not 0.
        let start = unsafe { alloc_zeroed(layout) };
        if start.is_null() {
            return Err(refused());
        }
        Ok(AlignedBuffer { start, layout })
    }
}

impl Deref for AlignedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: allocated with this size and zeroed; owned by `self`.
        unsafe { std::slice::from_raw_parts(self.start, self.layout.size()) }
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.layout.size()) }
    }
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated by `new` with this layout.
        unsafe { dealloc(self.start, self.layout) };
    }
}
