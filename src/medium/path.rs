//! What is done with a region's path rather than with its bytes.
#![expect(unsafe_code, reason = "renameat2 is a system call")]

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind as IoErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{fchown, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use super::file::{not_storage, sync_parent};
use super::io as transfer;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Label, LABEL_OFFSETS, RECORDS_OFFSET};

/// The bytes in front of the slot records, or all where there are fewer; `None` where the path holds nothing. Of a
/// striped region, those are on member 0 behind its label.
pub fn read_head(path: &Path) -> Result<Option<Vec<u8>>> {
    let Some(file) = open_to_look(path)? else { return Ok(None) };
    let mut head = read_at_most(&file, 0, RECORDS_OFFSET, path)?;
    let copies = LABEL_OFFSETS.map(|offset| head.get(offset as usize..)?.first_chunk());
    if let [Some(a), Some(b)] = copies {
        if let Ok(Some(found)) = Label::choose(a, b) {
            head = read_at_most(&file, found.label.data_offset, RECORDS_OFFSET, path)?;
        }
    }
    Ok((!head.is_empty()).then_some(head))
}

fn open_to_look(path: &Path) -> Result<Option<File>> {
    // Without O_NONBLOCK, opening a pipe would wait for ever for somebody to write into it.
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == IoErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io("open", &e).at_path(path)),
    };
    let kind = file.metadata().map_err(|e| Error::io("open", &e).at_path(path))?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(not_storage(path));
    }
    Ok(Some(file))
}

fn read_at_most(file: &File, offset: u64, bytes: u64, path: &Path) -> Result<Vec<u8>> {
    let mut head = vec![0; bytes as usize];
    let mut done = 0;
    while done < head.len() {
        let read = transfer::read_tail(file.as_raw_fd(), offset + done as u64, &mut head[done..]);
        match read.map_err(|error| error.at_path(path))? {
            0 => break,
            moved => done += moved,
        }
    }
    head.truncate(done);
    Ok(head)
}

/// Whether the path names a block device.
pub fn is_device(path: &Path) -> Result<bool> {
    let metadata = fs::metadata(path).map_err(|e| Error::io("open", &e).at_path(path))?;
    Ok(metadata.file_type().is_block_device())
}

/// Whether two paths lead to one file or device, or to one that is not there yet.
pub fn is_same_place(a: &Path, b: &Path) -> bool {
    let place = |path: &Path| {
        let found = fs::metadata(path).ok()?;
        Some(match found.file_type().is_block_device() {
            true => (true, found.rdev(), 0),
            false => (false, found.dev(), found.ino()),
        })
    };
    match (place(a), place(b)) {
        (None, None) => std::path::absolute(a).ok() == std::path::absolute(b).ok(),
        (a, b) => a == b,
    }
}

/// Gives the file `to` mode, owner and group of the file `from`.
pub fn copy_owner(from: &Path, to: &Path) -> Result<()> {
    let wanted = fs::metadata(from).map_err(|e| Error::io("read the mode", &e).at_path(from))?;
    let flags = libc::O_NOFOLLOW | libc::O_NOCTTY;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(to);
    let file = file.map_err(|e| Error::io("open", &e).at_path(to))?;
    let found = file.metadata().map_err(|e| Error::io("read the mode", &e).at_path(to))?;
    if (found.uid(), found.gid()) != (wanted.uid(), wanted.gid()) {
        // Before the mode, of which a change of owner takes bits away.
        fchown(&file, Some(wanted.uid()), Some(wanted.gid())).map_err(|e| {
            Error::io("keep the owner", &e).at_path(to).advise("run as the region's owner, or as root")
        })?;
    }
    file.set_permissions(wanted.permissions()).map_err(|e| Error::io("keep the mode", &e).at_path(to))
}

/// Atomically puts `from` in the place of `to`; durable on return.
pub fn rename_over(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(|e| Error::io("rename", &e).at_path(to))?;
    sync_parent(to)
}

/// Atomically gives the file `from` the name `to`, and never takes it from what has it; durable on return.
///
/// # Errors
///
/// [`ErrorKind::AlreadyExists`](crate::ErrorKind::AlreadyExists), also for a link that leads nowhere;
/// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) on file systems that can only replace. Either way `from` stays.
pub fn rename_new(from: &Path, to: &Path) -> Result<()> {
    let named = |e: &io::Error| Error::io("rename", e).at_path(to);
    let without_replacing = match rename_noreplace(from, to) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS)) => fs::hard_link(from, to)
            // The name alone: what it leads to is in its place.
            .and_then(|()| fs::remove_file(from)),
        done => done,
    };
    without_replacing.map_err(|e| match e.raw_os_error() {
        Some(libc::EPERM | libc::EOPNOTSUPP | libc::ENOSYS) => named(&e).with_kind(ErrorKind::Unsupported),
        _ => named(&e),
    })?;
    sync_parent(to)
}

fn rename_noreplace(from: &Path, to: &Path) -> io::Result<()> {
    let [from, to] = [from, to].map(|path| CString::new(path.as_os_str().as_bytes()));
    let (from, to) = (from?, to?);
    let cwd = libc::AT_FDCWD;
    // SAFETY: two strings that end in NUL and live through the call, which keeps neither.
    let done = unsafe { libc::renameat2(cwd, from.as_ptr(), cwd, to.as_ptr(), libc::RENAME_NOREPLACE) };
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
