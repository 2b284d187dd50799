//! Copies, alone or many in one call of the driver.
#![expect(unsafe_code, reason = "calls of the driver")]

use super::api::{Api, BatchCall, CUdeviceptr, CUmemcpyAttributes, SUCCESS};
use super::stream::Stream;
use crate::error::Result;

/// From how many copies on one call for all of them is worth its own cost.
const BATCH_MIN: usize = 4;

const OP: &str = "copy GPU memory";

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the device to host memory.
    ToHost,
    /// From host memory to the device.
    ToDevice,
    /// From the device to itself.
    OnDevice,
}

/// One copy, by addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Copy {
    /// First byte of the destination.
    pub to: u64,
    /// First byte of the source.
    pub from: u64,
    /// How many.
    pub bytes: usize,
}

/// Copies to be enqueued together; what goes on where the last one ended is part of it.
#[derive(Debug, Clone, Default)]
pub struct CopyList {
    copies: Vec<Copy>,
    /// What the last one was of.
    last: Option<u64>,
}

impl CopyList {
    /// Adds a copy. `of` says what memory of the device it concerns: only copies of the same are joined, as the driver
    /// refuses one that passes the end of an allocation, though the next one begin there. It refuses copies of nothing, too.
    pub fn push(&mut self, of: u64, next: Copy) {
        if next.bytes == 0 {
            return;
        }
        if let Some(last) = self.copies.last_mut().filter(|_| self.last == Some(of)) {
            let end = last.bytes as u64;
            if last.to + end == next.to && last.from + end == next.from {
                last.bytes += next.bytes;
                return;
            }
        }
        self.last = Some(of);
        self.copies.push(next);
    }

    /// Nothing was added.
    pub fn is_empty(&self) -> bool {
        self.copies.is_empty()
    }

    /// The copies, in the order of adding.
    pub fn copies(&self) -> &[Copy] {
        &self.copies
    }
}

impl Stream {
    /// Enqueues copies, whose order among each other is open. Host memory that is not page-locked has been read or written
    /// when this returns. After an error some may have been enqueued.
    ///
    /// # Safety
    ///
    /// Until the stream has reached what follows: sources must be readable and unchanged, destinations writable and used
    /// by nobody else, and none may overlap another.
    pub unsafe fn copy(&self, direction: Direction, copies: &[Copy]) -> Result<()> {
        let api = self.device().api;
        let _in_context = self.device().enter()?;
        if let Some(batch) = api.batch.filter(|_| copies.len() >= BATCH_MIN) {
            // SAFETY: the caller's promise.
            return unsafe { self.copy_batch(api, batch, copies) };
        }
        for copy in copies {
            // SAFETY: as above.
            unsafe { self.copy_one(api, direction, copy) }?;
        }
        Ok(())
    }

    /// # Safety
    ///
    /// As [`Stream::copy`]; the context is entered.
    unsafe fn copy_one(&self, api: &Api, direction: Direction, copy: &Copy) -> Result<()> {
        let &Copy { to, from, bytes } = copy;
        let code = match direction {
            // SAFETY: the caller's promise.
            Direction::ToHost => unsafe { (api.copy_to_host)(to as *mut _, from, bytes, self.handle) },
            // SAFETY: the caller's promise.
            Direction::ToDevice => unsafe { (api.copy_to_device)(to, from as *const _, bytes, self.handle) },
            // SAFETY: the caller's promise.
            Direction::OnDevice => unsafe { (api.copy_on_device)(to, from, bytes, self.handle) },
        };
        api.check(OP, code)
    }

    /// # Safety
    ///
    /// As [`Stream::copy_one`].
    unsafe fn copy_batch(&self, api: &Api, batch: BatchCall, copies: &[Copy]) -> Result<()> {
        let mut to: Vec<CUdeviceptr> = copies.iter().map(|copy| copy.to).collect();
        let mut from: Vec<CUdeviceptr> = copies.iter().map(|copy| copy.from).collect();
        let mut bytes: Vec<usize> = copies.iter().map(|copy| copy.bytes).collect();
        // SAFETY: numbers and enums for which zero is a value: no hints.
        let mut attributes: CUmemcpyAttributes = unsafe { core::mem::zeroed() };
        attributes.srcAccessOrder =
            cudarc::driver::sys::CUmemcpySrcAccessOrder_enum::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM;
        let (mut of_all, mut failed) = (0_usize, 0_usize);
        // SAFETY: arrays of the same length, one attribute for all from index 0 on; memory as the caller promises.
        let code = unsafe {
            batch(
                to.as_mut_ptr(),
                from.as_mut_ptr(),
                bytes.as_mut_ptr(),
                copies.len(),
                &raw mut attributes,
                &raw mut of_all,
                1,
                &raw mut failed,
                self.handle,
            )
        };
        match code {
            SUCCESS => Ok(()),
            code => Err(api.error(OP, code).within(&format!("copy {failed} of {}", copies.len()))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_that_go_on_where_the_last_one_ended_are_one_within_one_memory() {
        let mut list = CopyList::default();
        let copy = |to, from, bytes| Copy { to, from, bytes };
        for (of, next) in [
            (1, copy(0, 100, 10)),
            (1, copy(10, 110, 5)),
            (1, copy(15, 200, 5)),
            (1, copy(9, 9, 0)),
            (1, copy(30, 205, 5)),
            (1, copy(35, 210, 1)),
            (2, copy(36, 211, 4)),
            (2, copy(40, 215, 4)),
        ] {
            list.push(of, next);
        }
        assert_eq!(list.copies(), [copy(0, 100, 15), copy(15, 200, 5), copy(30, 205, 6), copy(36, 211, 8)]);
    }
}
