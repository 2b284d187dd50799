//! What is done with a region's path rather than with its bytes.

use std::fs::{self, File};
use std::io::{ErrorKind as IoErrorKind, Read};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use super::file::sync_parent;
use crate::error::{Error, Result};
use crate::format::RECORDS_OFFSET;

/// The bytes in front of the slot records, or all where there are fewer; `None` where the path holds nothing.
pub fn read_head(path: &Path) -> Result<Option<Vec<u8>>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == IoErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io("open", &e).at_path(path)),
    };
    let mut head = Vec::new();
    file.take(RECORDS_OFFSET).read_to_end(&mut head).map_err(|e| Error::io("read", &e).at_path(path))?;
    Ok((!head.is_empty()).then_some(head))
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
