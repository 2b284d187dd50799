//! Creating a region's file, with all of its space, so that no save ever finds the file system full.
#![expect(unsafe_code, reason = "fallocate and ftruncate are system calls")]

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::aligned::AlignedBuffer;
use super::file::{available_bytes, disable_copy_on_write, sync_parent};
use super::io as transfer;
use crate::error::{Error, ErrorKind, Result};
use crate::format::BLOCK_BYTES;
use crate::partial::{Fruitless, SAFE_DIO_ALIGN};

/// Bytes of zeros written at a time.
const ZEROS_BYTES: usize = 4 << 20;

/// Only the owner may read a training run's state, unless they decide otherwise.
pub(super) const MODE: u32 = 0o600;

/// Told of `(done, total)` bytes while a file is being filled.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64);

/// Creates the file `path` of `bytes` (a multiple of 4 KiB, not 0), preallocated and zero, durable with its entry
/// in the directory when this returns.
///
/// With `prewrite` every block is also written once, and progress reported: that makes the first save into each
/// slot as fast as later ones, because file systems convert unwritten extents at their first write.
///
/// # Errors
///
/// [`ErrorKind::AlreadyExists`] if the path exists, whatever it is; [`ErrorKind::NoSpace`] with the bytes needed and
/// available. On any error the new file is removed.
pub fn create_file(path: &Path, bytes: u64, prewrite: Option<Progress<'_>>) -> Result<()> {
    check_bytes(path, bytes)?;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(MODE)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .map_err(|error| explain_create(&error, path))?;
    let filled = fill(file.as_raw_fd(), bytes, prewrite).map_err(|error| error.at_path(path));
    drop(file);
    let done = filled.and_then(|()| sync_parent(path));
    if done.is_err() {
        // The first error is the one to report; a file that cannot be removed is seen by the next attempt.
        let _ = fs::remove_file(path);
    }
    done
}

/// Empties a file.
pub(super) fn truncate(fd: RawFd) -> Result<()> {
    // SAFETY: touches no memory.
    if unsafe { libc::ftruncate64(fd, 0) } != 0 {
        return Err(Error::last_os("truncate"));
    }
    Ok(())
}

/// Refuses what is no size of a region.
pub(super) fn check_bytes(path: &Path, bytes: u64) -> Result<()> {
    if bytes == 0 || !bytes.is_multiple_of(BLOCK_BYTES) || i64::try_from(bytes).is_err() {
        let message = format!("expected a positive multiple of {BLOCK_BYTES} bytes, found {bytes}");
        return Err(Error::new(ErrorKind::InvalidArgument, "create", message).at_path(path));
    }
    Ok(())
}

/// The error of a file that could not be created.
pub(super) fn explain_create(error: &io::Error, path: &Path) -> Error {
    let wrapped = Error::io("create", error).at_path(path);
    match error.raw_os_error() {
        Some(libc::EEXIST) => wrapped.with_kind(ErrorKind::AlreadyExists),
        Some(libc::ENOENT) => wrapped.advise("create the directory first"),
        _ => wrapped,
    }
}

/// Gives an empty file its space, durably.
pub(super) fn fill(fd: RawFd, bytes: u64, prewrite: Option<Progress<'_>>) -> Result<()> {
    disable_copy_on_write(fd);
    let reserved = preallocate(fd, bytes)?;
    let mut silent = |_, _| {};
    match prewrite {
        Some(progress) => write_zeros(fd, bytes, progress)?,
        None if !reserved => write_zeros(fd, bytes, &mut silent)?,
        None => {}
    }
    transfer::sync_data(fd, transfer::Behind::PageCache)
}

/// Reserves the space; false where the file system has no such operation.
fn preallocate(fd: RawFd, bytes: u64) -> Result<bool> {
    // First, because a file system may fill itself up before it finds that it has too little.
    require_space(fd, bytes)?;
    let mut fruitless = Fruitless::default();
    loop {
        // SAFETY: touches no memory. The caller checked that `bytes` fits.
        if unsafe { libc::fallocate64(fd, 0, 0, bytes as i64) } == 0 {
            return Ok(true);
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            _ if fruitless.interrupted(&error) => {}
            Some(libc::EOPNOTSUPP | libc::ENOSYS) => return Ok(false),
            Some(libc::ENOSPC | libc::EDQUOT) => return Err(no_space(fd, bytes)),
            Some(libc::EFBIG) => {
                let message = format!("{bytes} bytes are more than this file system or process limit allows");
                return Err(Error::new(ErrorKind::TooLarge, "preallocate", message));
            }
            _ => return Err(Error::io("preallocate", &error)),
        }
    }
}

/// Refuses more than the file system has.
pub(super) fn require_space(fd: RawFd, bytes: u64) -> Result<()> {
    match available_bytes(fd) {
        Some(available) if available < bytes => Err(no_space(fd, bytes)),
        _ => Ok(()),
    }
}

fn no_space(fd: RawFd, bytes: u64) -> Error {
    let available = match available_bytes(fd) {
        Some(available) => format!("{available} bytes are available"),
        None => "the file system does not tell what is available".to_string(),
    };
    Error::new(ErrorKind::NoSpace, "preallocate", format!("{bytes} bytes are needed, {available}"))
        .advise("free space, use fewer or smaller slots, or choose another file system")
}

/// Writes zeros over the first `bytes` bytes.
pub(super) fn write_zeros(fd: RawFd, bytes: u64, progress: Progress<'_>) -> Result<()> {
    let zeros = AlignedBuffer::new(ZEROS_BYTES, SAFE_DIO_ALIGN)?;
    let mut done = 0;
    while done < bytes {
        let len = (bytes - done).min(ZEROS_BYTES as u64);
        transfer::write_all(fd, done, &zeros[..len as usize]).map_err(|error| match error.kind() {
            ErrorKind::NoSpace => no_space(fd, bytes),
            _ => error,
        })?;
        done += len;
        progress(done, bytes);
    }
    Ok(())
}
