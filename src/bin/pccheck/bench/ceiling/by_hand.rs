//! The flushes and writes of the smallest save, done by hand: one thread, no queue, nothing else in flight.
#![expect(unsafe_code, reason = "durable writes are a system call of their own")]

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pccheck::{Error, Result};

use super::super::memory::HugeBlock;

const BLOCK_BYTES: usize = 4096;
/// Mark and commit record, of two slots.
const RECORDS: u64 = 2;
/// Header, state and chunk table, next to each other.
const PAYLOAD_BYTES: usize = 3 * BLOCK_BYTES;

/// A file with two slots by hand.
pub struct ByHand {
    file: File,
    path: PathBuf,
    block: HugeBlock,
    saves: u64,
}

impl ByHand {
    /// Creates the file and writes every block of it once.
    pub fn new(path: &Path) -> Result<ByHand> {
        let failed = |error: std::io::Error| Error::io("save by hand", &error).at_path(path);
        // Nobody's file, and through nobody's link.
        File::create_new(path).map_err(failed)?;
        let with = |flags| {
            OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOFOLLOW | flags).open(path)
        };
        let file = match with(libc::O_DIRECT) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => with(0),
            opened => opened,
        }
        .map_err(failed)?;
        let block = HugeBlock::new(PAYLOAD_BYTES)?;
        let by_hand = ByHand { file, path: path.to_path_buf(), block, saves: 0 };
        for at in 0..RECORDS {
            by_hand.write(at * BLOCK_BYTES as u64, BLOCK_BYTES)?;
        }
        for slot in 0..RECORDS {
            by_hand.write(Self::payload_offset(slot), PAYLOAD_BYTES)?;
        }
        by_hand.flush()?;
        Ok(by_hand)
    }

    fn payload_offset(slot: u64) -> u64 {
        (RECORDS + slot * 4) * BLOCK_BYTES as u64
    }

    /// Mark, payload, flush, commit; how long that took.
    pub fn save(&mut self) -> Result<Duration> {
        self.saves += 1;
        self.block[..8].copy_from_slice(&self.saves.to_le_bytes());
        let slot = self.saves % RECORDS;
        let began = Instant::now();
        self.write_durable(slot * BLOCK_BYTES as u64)?;
        self.write(Self::payload_offset(slot), PAYLOAD_BYTES)?;
        self.flush()?;
        self.write_durable(slot * BLOCK_BYTES as u64)?;
        Ok(began.elapsed())
    }

    fn write(&self, offset: u64, len: usize) -> Result<()> {
        let written = self.file.write_all_at(&self.block[..len], offset);
        written.map_err(|error| Error::io("write by hand", &error).at_path(&self.path))
    }

    fn flush(&self) -> Result<()> {
        let flushed = self.file.sync_data();
        flushed.map_err(|error| Error::io("flush by hand", &error).at_path(&self.path))
    }

    /// One block, durable on return.
    fn write_durable(&self, offset: u64) -> Result<()> {
        let piece = libc::iovec { iov_base: self.block.as_ptr().cast_mut().cast(), iov_len: BLOCK_BYTES };
        // SAFETY: one vector, readable for its length.
        let moved =
            unsafe { libc::pwritev2(self.file.as_raw_fd(), &piece, 1, offset as i64, libc::RWF_DSYNC) };
        match moved {
            moved if moved == BLOCK_BYTES as isize => Ok(()),
            _ => Err(Error::last_os("write durably by hand").at_path(&self.path)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_and_records_of_the_saves_lie_apart_and_hold_what_was_saved_last() {
        let dir = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
        let path = dir.path().join("by-hand");
        let mut by_hand = ByHand::new(&path).unwrap();
        for _ in 0..3 {
            by_hand.save().unwrap();
        }
        let bytes = std::fs::read(&path).unwrap();
        let first = |offset: u64| u64::from_le_bytes(bytes[offset as usize..][..8].try_into().unwrap());
        for (slot, save) in [(0, 2), (1, 3)] {
            assert_eq!(first(slot * BLOCK_BYTES as u64), save, "record of slot {slot}");
            assert_eq!(first(ByHand::payload_offset(slot)), save, "payload of slot {slot}");
        }
        assert_eq!(bytes.len() as u64, ByHand::payload_offset(1) + PAYLOAD_BYTES as u64);
    }

    /// In a folder that others may write, too, a link could wait for the bench.
    #[test]
    fn a_link_with_the_name_of_the_file_is_not_followed() {
        let dir = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
        let (path, mine) = (dir.path().join("by-hand"), dir.path().join("mine"));
        std::fs::write(&mine, "mine").unwrap();
        std::os::unix::fs::symlink(&mine, &path).unwrap();
        let error = ByHand::new(&path).err().unwrap();
        assert_eq!(error.errno(), Some(libc::EEXIST), "{error}");
        assert_eq!(std::fs::read(&mine).unwrap(), b"mine");
    }
}
