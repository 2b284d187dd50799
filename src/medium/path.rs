//! What is done with a region's path rather than with its bytes.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind as IoErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use super::file::{not_storage, sync_parent};
use crate::error::{Error, Result};
use crate::format::RECORDS_OFFSET;

/// Bytes at either end of a file or device that are looked at for something of value: partition tables, volume
/// managers and file systems all put their marks there.
const TELLING_BYTES: u64 = 1 << 20;

/// The bytes in front of the slot records, or all where there are fewer; `None` where the path holds nothing.
pub fn read_head(path: &Path) -> Result<Option<Vec<u8>>> {
    let Some(file) = open_to_look(path)? else { return Ok(None) };
    let head = read_at_most(file, RECORDS_OFFSET, path)?;
    Ok((!head.is_empty()).then_some(head))
}

/// Whether the path holds something that formatting would destroy: false where it does not exist, is empty, or
/// has nothing but zeros at both ends.
pub fn holds_data(path: &Path) -> Result<bool> {
    let Some(mut file) = open_to_look(path)? else { return Ok(false) };
    let about = |e: std::io::Error| Error::io("read", &e).at_path(path);
    let len = file.seek(SeekFrom::End(0)).map_err(about)?;
    for start in [0, len.saturating_sub(TELLING_BYTES)] {
        file.seek(SeekFrom::Start(start)).map_err(about)?;
        if read_at_most(&file, TELLING_BYTES, path)?.iter().any(|&byte| byte != 0) {
            return Ok(true);
        }
    }
    Ok(false)
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

/// Atomically puts `from` in the place of `to`; durable on return.
pub fn rename_over(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(|e| Error::io("rename", &e).at_path(to))?;
    sync_parent(to)
}
