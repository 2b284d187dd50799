//! Where a region is to be made: a file or device under the writer's lock, from the look at what it holds until the
//! region is complete. In between nobody else can make one there.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use super::create::{
    check_bytes, explain_create, fill, require_space, truncate, write_zeros, Progress, MODE,
};
use super::file::{RegionFile, Undo};
use super::open::medium_on;
use super::striped::media_on;
use super::{Medium, MediumOptions};
use crate::error::{Error, ErrorKind, Result};
use crate::format::RECORDS_OFFSET;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::Arc;

/// Bytes at either end of a device that are looked at for something of value: partition tables, volume managers and
/// file systems all put their marks there.
const TELLING_BYTES: u64 = 1 << 20;

/// Unit of `st_blocks`, whatever the file system's own.
pub(super) const STAT_BLOCK_BYTES: u64 = 512;

/// A file or device that is to become a region.
pub struct Site {
    file: RegionFile,
    created: bool,
}

/// Whether the region at a [`Site`] is complete. Until it is, the file goes (or, where there was one before, is left
/// empty) when its medium is closed.
pub struct Completion(Vec<Arc<AtomicBool>>);

impl Completion {
    /// The region is complete, and stays.
    pub fn keep(self) {
        // Release pairs with the acquire in the drop of the file.
        self.0.iter().for_each(|completed| completed.store(true, Ordering::Release));
    }
}

impl Site {
    /// Opens what is at `path`, without a lock, to look at it only. None where there is nothing.
    pub fn look(path: &Path) -> Result<Option<Site>> {
        match RegionFile::open(path, false, Duration::ZERO) {
            Ok(file) => Ok(Some(Site { file, created: false })),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Takes `path` for a region: under the writer's lock, created if it does not exist. Destroys nothing.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InUse`] when another writer holds it.
    pub fn take(path: &Path) -> Result<Site> {
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(MODE).custom_flags(libc::O_NOFOLLOW);
        let created = match options.open(path).map_err(|error| explain_create(&error, path)) {
            Ok(_) => true,
            Err(error) if error.kind() == ErrorKind::AlreadyExists => false,
            Err(error) => return Err(error),
        };
        let file = RegionFile::open(path, true, Duration::ZERO).map_err(|error| match error.kind() {
            // There is something, and it leads nowhere.
            ErrorKind::NotFound if !created => {
                Error::new(ErrorKind::InvalidArgument, "create", error.message()).at_path(path).advise(
                    "the path is a symbolic link that leads nowhere: remove it, or give the file itself",
                )
            }
            _ => error,
        })?;
        Ok(Site { file, created })
    }

    /// From here on it goes, if it was created by [`Site::take`], unless a region in it is completed. Before this
    /// somebody else might have made one there.
    pub fn claim(&mut self) {
        if self.created {
            self.file.undo = Undo::Remove;
        }
    }

    /// Whether it holds something that a region would destroy. A file does unless it is empty: what it is for cannot
    /// be told from zeros. A device does unless it has nothing but zeros at both ends.
    pub fn holds_data(&self) -> Result<bool> {
        let len = self.file.len_bytes();
        if !self.file.is_block_device() {
            return Ok(len > 0);
        }
        for start in [0, len.saturating_sub(TELLING_BYTES)] {
            let mut bytes = vec![0; TELLING_BYTES.min(len) as usize];
            self.file.read(start, &mut bytes)?;
            if bytes.iter().any(|&byte| byte != 0) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The bytes in front of the slot records, or all where there are fewer.
    pub fn head(&self) -> Result<Vec<u8>> {
        let mut head = vec![0; RECORDS_OFFSET.min(self.file.len_bytes()) as usize];
        self.file.read(0, &mut head)?;
        Ok(head)
    }

    /// Gives a file exactly `bytes`, preallocated and zero; of a device, checks that it is large enough. What was there
    /// is lost, but not for lack of space. With `prewrite`, as [`super::create_file`].
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NoSpace`] with the bytes needed and available.
    pub fn prepare(&mut self, bytes: u64, prewrite: Option<Progress<'_>>) -> Result<()> {
        check_bytes(self.file.path(), bytes)?;
        let path = self.file.path().to_path_buf();
        self.prepare_checked(bytes, prewrite).map_err(|error| error.at_path(&path))
    }

    fn prepare_checked(&mut self, bytes: u64, prewrite: Option<Progress<'_>>) -> Result<()> {
        let fd = self.file.raw_fd();
        if self.file.is_block_device() {
            if self.file.len_bytes() < bytes {
                let message = format!("{bytes} bytes are needed, the device has {}", self.file.len_bytes());
                return Err(Error::new(ErrorKind::NoSpace, "format", message)
                    .advise("use fewer or smaller slots, or a larger device"));
            }
            return prewrite.map_or(Ok(()), |progress| write_zeros(fd, bytes, progress));
        }
        self.claim();
        let own = fs::metadata(self.file.path()).map_or(0, |found| found.blocks() * STAT_BLOCK_BYTES);
        require_space(fd, bytes.saturating_sub(own))?;
        if !self.created {
            self.file.undo = Undo::Empty;
        }
        truncate(fd)?;
        fill(fd, bytes, prewrite)?;
        self.file.resized(bytes);
        Ok(())
    }

    /// The medium, under the same lock, and what keeps it when the region is complete.
    pub fn into_medium(self, options: &MediumOptions) -> Result<(Arc<dyn Medium>, Completion)> {
        let completion = Completion(vec![self.file.completed.clone()]);
        Ok((medium_on(self.file, options, None)?, completion))
    }
}

/// Media of one kind for the members of a striped region, in order, under the same locks, and what keeps all of them.
pub fn into_media(sites: Vec<Site>, options: &MediumOptions) -> Result<(Vec<Arc<dyn Medium>>, Completion)> {
    let completion = Completion(sites.iter().map(|site| site.file.completed.clone()).collect());
    let files = sites.into_iter().zip(0..).map(|(mut site, index)| {
        site.file.as_member(index);
        site.file
    });
    Ok((media_on(files.collect(), options, None)?, completion))
}
