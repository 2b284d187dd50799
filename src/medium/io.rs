//! Blocking transfers on a file descriptor: whole, or an error.
#![expect(unsafe_code, reason = "system calls on raw buffers")]

use std::io;
use std::os::fd::RawFd;

use super::{Io, IoOp};
use crate::error::{Error, ErrorKind, Result};
use crate::partial::{progress, Fruitless, TRANSFER_MAX_BYTES};

/// The name of an operation in errors.
pub(super) fn op_name(op: IoOp) -> &'static str {
    match op {
        IoOp::Copy => "write",
        IoOp::Read => "read",
    }
}

/// The error for a transfer that ended before its end.
pub(super) fn short(op: IoOp, done: usize, len: usize) -> Error {
    let what = match op {
        IoOp::Copy => "the device took no more",
        IoOp::Read => "the file ends there",
    };
    Error::new(ErrorKind::Io, op_name(op), format!("expected to transfer {len} bytes, got {done}: {what}"))
}

fn signed_offset(op: IoOp, offset: u64) -> Result<i64> {
    i64::try_from(offset).map_err(|_| {
        Error::new(ErrorKind::InvalidArgument, op_name(op), "offset does not fit in 63 bits")
            .at_offset(offset)
    })
}

/// Moves `len` bytes between `buffer` and `fd` at `offset`, blocking, going on after signals and short transfers.
///
/// # Safety
///
/// `buffer` must be valid for `len` bytes: readable for a copy, writable for a read.
pub(super) unsafe fn transfer_all(
    op: IoOp,
    fd: RawFd,
    offset: u64,
    buffer: *mut u8,
    len: usize,
) -> Result<()> {
    let (mut done, mut fruitless) = (0, Fruitless::default());
    while done < len {
        let left = (len - done).min(TRANSFER_MAX_BYTES);
        let at = signed_offset(op, offset.saturating_add(done as u64))?;
        // SAFETY: `done < len`.
        let place = unsafe { buffer.add(done) };
        let moved = match op {
            // SAFETY: `left` bytes from `place` are readable, by the caller's promise.
            IoOp::Copy => unsafe { libc::pwrite64(fd, place.cast_const().cast(), left, at) },
            // SAFETY: `left` bytes from `place` are writable, by the caller's promise.
            IoOp::Read => unsafe { libc::pread64(fd, place.cast(), left, at) },
        };
        match usize::try_from(moved) {
            Ok(0) => return Err(short(op, done, len).at_offset(offset)),
            Ok(moved) => match progress(done, moved, len) {
                Some(useful) => (done, fruitless) = (useful, Fruitless::default()),
                None if fruitless.again() => {}
                None => return Err(short(op, done + moved, len).at_offset(offset)),
            },
            Err(_) => {
                let error = io::Error::last_os_error();
                if !fruitless.again_after(&error) {
                    return Err(Error::io(op_name(op), &error).at_offset(at as u64));
                }
            }
        }
    }
    Ok(())
}

/// Does the whole of an asynchronous operation by blocking calls.
pub(super) fn transfer_buffer(fd: RawFd, io: &mut Io) -> Result<()> {
    let buffer = io.buffer.as_mut_ptr();
    // SAFETY: `Medium::start` refused lengths beyond the buffer, which `io` owns.
    unsafe { transfer_all(io.op, fd, io.offset, buffer, io.len) }
}

/// Fills `dst` from `offset`.
pub(super) fn read_all(fd: RawFd, offset: u64, dst: &mut [u8]) -> Result<()> {
    // SAFETY: the slice is writable for its length.
    unsafe { transfer_all(IoOp::Read, fd, offset, dst.as_mut_ptr(), dst.len()) }
}

/// Writes `src` at `offset`; nothing is promised about a crash.
pub(super) fn write_all(fd: RawFd, offset: u64, src: &[u8]) -> Result<()> {
    // SAFETY: the slice is readable for its length, and a copy only reads.
    unsafe { transfer_all(IoOp::Copy, fd, offset, src.as_ptr().cast_mut(), src.len()) }
}

/// What may lie between the file and the device: decides what an interrupted flush means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Behind {
    /// Nothing: all writes went by O_DIRECT, and their errors were theirs. A flush may be asked for again.
    Nothing,
    /// The page cache: the interruption may be that of a write-back, which lost its pages and is told once. Asking
    /// again would turn that into success.
    PageCache,
}

/// Writes `src` at `offset` so that it is durable on return: RWF_DSYNC, or a write and fdatasync where the
/// kernel or file system does not know that flag.
pub(super) fn write_dsync(fd: RawFd, offset: u64, src: &[u8], behind: Behind) -> Result<()> {
    let (mut done, mut fruitless) = (0, Fruitless::default());
    while done < src.len() {
        let rest = &src[done..];
        let piece = libc::iovec { iov_base: rest.as_ptr().cast_mut().cast(), iov_len: rest.len() };
        let at = signed_offset(IoOp::Copy, offset.saturating_add(done as u64))?;
        // SAFETY: one vector, readable for its length.
        let moved = unsafe { libc::pwritev2(fd, &piece, 1, at, libc::RWF_DSYNC) };
        match usize::try_from(moved) {
            Ok(0) => return Err(short(IoOp::Copy, done, src.len()).at_offset(offset)),
            Ok(moved) => match progress(done, moved, src.len()) {
                Some(useful) => (done, fruitless) = (useful, Fruitless::default()),
                None if fruitless.again() => {}
                None => return Err(short(IoOp::Copy, done + moved, src.len()).at_offset(offset)),
            },
            Err(_) => {
                let error = io::Error::last_os_error();
                match error.raw_os_error() {
                    _ if behind == Behind::Nothing && fruitless.again_after(&error) => {}
                    Some(libc::EOPNOTSUPP | libc::ENOSYS) => {
                        write_all(fd, at as u64, rest).map_err(durability_unknown)?;
                        return sync_data(fd, behind);
                    }
                    _ => {
                        return Err(durability_unknown(
                            Error::io("write durably", &error).at_offset(at as u64),
                        ))
                    }
                }
            }
        }
    }
    Ok(())
}

/// fdatasync: what was written through this file, and what is needed to find it again, is durable.
///
/// Never called again after it failed: the kernel reports a lost write once, and then forgets it.
pub(super) fn sync_data(fd: RawFd, behind: Behind) -> Result<()> {
    let mut fruitless = Fruitless::default();
    loop {
        // SAFETY: touches no memory.
        if unsafe { libc::fdatasync(fd) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if behind == Behind::PageCache || !fruitless.interrupted(&error) {
            return Err(durability_unknown(Error::io("fdatasync", &error)));
        }
    }
}

/// fsync of a directory: its entries are durable.
pub(super) fn sync_directory(fd: RawFd) -> Result<()> {
    let mut fruitless = Fruitless::default();
    loop {
        // SAFETY: touches no memory.
        if unsafe { libc::fsync(fd) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if !fruitless.interrupted(&error) {
            return Err(Error::io("sync the directory", &error));
        }
    }
}

/// Marks an error after which nobody knows what is durable.
pub(super) fn durability_unknown(error: Error) -> Error {
    error.with_kind(ErrorKind::DurabilityUnknown)
}

/// Reads what there is of a range that may reach beyond the end of the file; returns how much that was.
pub(super) fn read_tail(fd: RawFd, offset: u64, dst: &mut [u8]) -> Result<usize> {
    let at = signed_offset(IoOp::Read, offset)?;
    let mut fruitless = Fruitless::default();
    loop {
        // SAFETY: the slice is writable for its length.
        let got = unsafe { libc::pread64(fd, dst.as_mut_ptr().cast(), dst.len(), at) };
        if let Ok(got) = usize::try_from(got) {
            return Ok(got);
        }
        let error = io::Error::last_os_error();
        if !fruitless.again_after(&error) {
            return Err(Error::io("read", &error).at_offset(offset));
        }
    }
}
