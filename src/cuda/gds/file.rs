//! Files that cuFile knows, and writing to them.
#![expect(unsafe_code, reason = "calls of cuFile")]

use core::ffi::{c_int, c_void};
use std::io;
use std::os::fd::AsRawFd;

use super::api::{check, Descriptor, Gds, Handle, Place, KIND_FD};
use super::codes;
use crate::cuda::device::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::partial::{progress, Fruitless, TRANSFER_MAX_BYTES};
use crate::sync::Arc;

const OP_REGISTER: &str = "register a file with cuFile";
const OP_WRITE: &str = "write by cuFile";

/// `CU_FILE_HANDLE_NOT_REGISTERED` and, until CUDA 12.9, `CU_FILE_INTERNAL_ERROR`: what registering fails with where udev
/// does not know what is on the file's device. Then there is no compatibility mode either.
const UNKNOWN_FILE_SYSTEM: [c_int; 2] = [codes::BASE + 27, codes::BASE + 30];
const ADVICE_UDEV: &str = "cuFile asks udev what file system is on the file's device (ID_FS_USAGE), also where nvidia-fs is \
                           not loaded: run udevd, and let containers see /run/udev; cuFile 1.20 knows tmpfs, too";

/// A file, registered with cuFile until this is dropped.
pub struct GdsFile {
    handle: Handle,
    gds: &'static Gds,
    /// Closed after it was deregistered: the field is dropped after `drop` has run.
    _file: Arc<dyn AsRawFd + Send + Sync>,
}

// SAFETY: cuFile's calls may be made from any thread; the handle is only handed to it.
unsafe impl Send for GdsFile {}
// SAFETY: as above.
unsafe impl Sync for GdsFile {}

impl GdsFile {
    /// Registers an open file, once for each descriptor. To go directly it must be open with `O_DIRECT`.
    pub fn register(file: Arc<dyn AsRawFd + Send + Sync>) -> Result<GdsFile> {
        let gds = Gds::get()?;
        let place = Place { fd: file.as_raw_fd() };
        let mut descriptor = Descriptor { kind: KIND_FD, handle: place, operations: core::ptr::null() };
        let mut handle: Handle = core::ptr::null_mut();
        // SAFETY: places for a handle and for what describes the file, which `file` keeps open.
        let status = unsafe { (gds.register_file)(&raw mut handle, &raw mut descriptor) };
        check(OP_REGISTER, status).map_err(|error| match status.err {
            code if UNKNOWN_FILE_SYSTEM.contains(&code) => {
                error.with_kind(ErrorKind::Unsupported).advise(ADVICE_UDEV)
            }
            _ => error,
        })?;
        Ok(GdsFile { handle, gds, _file: file })
    }

    /// Writes `len` bytes of the device's memory, from `buffer_offset` behind `base` on, to the file at `file_offset`: all of
    /// them, or an error. `base` is where memory was registered, or any address where it was not.
    ///
    /// What has been written is not durable: the file must be flushed. Of a file that is open with `O_DIRECT`, bytes that do
    /// not begin and end at multiples of 4096 in the file go through the page cache, by a descriptor of cuFile's own.
    ///
    /// # Safety
    ///
    /// The bytes are memory of the device that stays allocated during the call; they are complete, in no stream's order,
    /// and nothing changes them meanwhile.
    pub unsafe fn write(
        &self,
        device: &Device,
        base: u64,
        len: usize,
        file_offset: u64,
        buffer_offset: u64,
    ) -> Result<()> {
        self.gds.check_process(OP_WRITE)?;
        check_range(len, base, buffer_offset)?;
        check_range(len, file_offset, 0)?;
        // cuFile's calls on memory of a GPU must be made in a context.
        let _in_context = device.enter()?;
        let (mut done, mut fruitless) = (0, Fruitless::default());
        while done < len {
            let left = (len - done).min(TRANSFER_MAX_BYTES);
            let (to, from) = (file_offset as i64 + done as i64, buffer_offset as i64 + done as i64);
            // SAFETY: a registered file, and `left` bytes of the device's memory, by the caller's promise.
            let moved = unsafe { (self.gds.write)(self.handle, base as *const c_void, left, to, from) };
            match usize::try_from(moved) {
                Ok(0) => return Err(short(done, len).at_offset(file_offset)),
                Ok(moved) => match progress(done, moved, len) {
                    Some(useful) => (done, fruitless) = (useful, Fruitless::default()),
                    None if fruitless.again() => {}
                    None => return Err(short(done + moved, len).at_offset(file_offset)),
                },
                Err(_) => {
                    let errno = io::Error::last_os_error();
                    if moved != -1 || !fruitless.again_after(&errno) {
                        return Err(failed(moved, &errno, done, len).at_offset(to as u64));
                    }
                }
            }
        }
        Ok(())
    }
}

impl Drop for GdsFile {
    fn drop(&mut self) {
        if !self.gds.is_forked() {
            // SAFETY: registered in `register`, and written to by nobody any more; the file is open.
            unsafe { (self.gds.deregister_file)(self.handle) };
        }
    }
}

/// All of these bytes must have numbers that fit in cuFile's signed ones.
fn check_range(len: usize, start: u64, offset: u64) -> Result<()> {
    let end = start.checked_add(offset).and_then(|first| first.checked_add(len as u64));
    if end.is_some_and(|end| i64::try_from(end).is_ok()) {
        return Ok(());
    }
    let message = format!("{len} bytes from {offset} behind {start:#x} on: that does not fit in 63 bits");
    Err(Error::new(ErrorKind::InvalidArgument, OP_WRITE, message))
}

fn short(done: usize, len: usize) -> Error {
    let message = format!("expected to write {len} bytes, got {done}: the device took no more");
    Error::new(ErrorKind::Io, OP_WRITE, message)
}

/// The error for a negative result: -1 where `errno` tells more, which may be a number of cuFile's, too; or that number.
fn failed(result: isize, errno: &io::Error, done: usize, len: usize) -> Error {
    let number = match result {
        -1 => errno.raw_os_error().unwrap_or(0),
        code => c_int::try_from(code.unsigned_abs()).unwrap_or(c_int::MAX),
    };
    let error = match result {
        // cuFile tells EIO or EPERM of a full file system: what it was is in its log only.
        -1 if number < codes::BASE => Error::io(OP_WRITE, errno).advise(
            "this need not be what the file system said: look at cufile.log in the working directory, and for free space",
        ),
        _ => codes::error(OP_WRITE, number, None).with_kind(ErrorKind::Io),
    };
    error.within(&format!("expected to write {len} bytes, got {done}"))
}
