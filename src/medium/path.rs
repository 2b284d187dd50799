//! What is done with a region's path rather than with its bytes.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind as IoErrorKind, Read};
use std::os::unix::fs::{fchown, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use super::file::{not_storage, sync_parent};
use crate::error::{Error, Result};
use crate::format::RECORDS_OFFSET;

/// The bytes in front of the slot records, or all where there are fewer; `None` where the path holds nothing.
pub fn read_head(path: &Path) -> Result<Option<Vec<u8>>> {
    let Some(file) = open_to_look(path)? else { return Ok(None) };
    let head = read_at_most(file, RECORDS_OFFSET, path)?;
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

fn read_at_most(file: impl Read, bytes: u64, path: &Path) -> Result<Vec<u8>> {
    let mut head = Vec::new();
    file.take(bytes).read_to_end(&mut head).map_err(|e| Error::io("read", &e).at_path(path))?;
    Ok(head)
}

/// Whether the path names a block device.
pub fn is_device(path: &Path) -> Result<bool> {
    let metadata = fs::metadata(path).map_err(|e| Error::io("open", &e).at_path(path))?;
    Ok(metadata.file_type().is_block_device())
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
