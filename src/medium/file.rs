//! The file or block device of a region: opened once, locked and used through one open file description.
//!
//! The lock (flock) belongs to the open file description that does the I/O, so it outlives a killed process until
//! the kernel has finished that process's requests: nobody can open the region while old writes may still land.
#![expect(unsafe_code, reason = "ioctl, statx, fcntl and statfs are system calls")]

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::create::truncate;
use super::site::STAT_BLOCK_BYTES;
use super::{io as transfer, lock, Durability};
use crate::error::{Error, ErrorKind, Result};
use crate::fork::{without_forks, ChildClosedFd, ForkStamp};
use crate::partial::SAFE_DIO_ALIGN;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::Arc;

/// `BLKGETSIZE64`, which the C library's headers leave to the kernel's.
const BLKGETSIZE64: libc::Ioctl = libc::_IOR::<usize>(0x12, 114);
/// Attribute "no copy on write" of btrfs.
const FS_NOCOW_FL: libc::c_long = 0x0080_0000;
/// File systems that live in memory.
const RAMFS_MAGIC: i64 = 0x8584_58f6;
const TMPFS_MAGIC: i64 = 0x0102_1994;
/// Copy-on-write file systems.
const BTRFS_MAGIC: i64 = 0x9123_683e;
const ZFS_MAGIC: i64 = 0x2fc1_2fc1;
const BCACHEFS_MAGIC: i64 = 0xca45_1a4e;
/// File systems that a process serves.
const FUSE_SUPER_MAGIC: i64 = 0x6573_5546;
/// Layers that hide the file system beneath.
const OVERLAYFS_MAGIC: i64 = 0x794c_7630;

/// How long a device's claim is waited for at least: the kernel gives it up a little after its holder closed.
const CLAIM_GRACE: Duration = Duration::from_millis(100);

/// What is fixed about a region's file from the moment it is opened.
#[derive(Debug)]
pub struct RegionFile {
    fd: ChildClosedFd,
    path: PathBuf,
    len_bytes: u64,
    writable: bool,
    block_device: bool,
    fs_type: i64,
    durability: Durability,
    /// It had a name when it was opened. Some file systems count no names.
    named: bool,
    /// Which member of a striped region it is, for errors: those of the region name the region's path.
    member: Option<u32>,
    /// What becomes of the file when it is closed before `completed`.
    pub(super) undo: Undo,
    pub(super) completed: Arc<AtomicBool>,
}

/// What becomes of a file that is closed before the region in it is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Undo {
    /// Nothing: it is not to become a region, or is still as it was found.
    Nothing,
    /// It is left empty, as good as new.
    Empty,
    /// It is removed: it did not exist before.
    Remove,
}

impl RegionFile {
    /// Opens the region at `path`.
    ///
    /// A writer takes the exclusive lock, waiting at most `lock_wait` for it ([`ErrorKind::InUse`] afterwards,
    /// naming the holder; a wait beyond all clocks is one for ever). A reader takes no lock, and works beside a live writer. Symbolic links are followed
    /// only to block devices.
    pub fn open(path: &Path, writable: bool, lock_wait: Duration) -> Result<Self> {
        if !writable {
            return RegionFile::open_once(path, false, false);
        }
        // A wait that no clock can tell is one for ever.
        let deadline = Instant::now().checked_add(lock_wait);
        loop {
            let file = RegionFile::open_claimed(path, deadline)?;
            lock::exclusive(&file, deadline)?;
            if file.still_named()? {
                return Ok(file);
            }
            // The region was grown, which renames a new file over it, while this one waited for the old lock.
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Err(Error::new(
                    ErrorKind::InUse,
                    "open",
                    "the region was replaced while it was opened",
                )
                .at_path(path)
                .advise("try again"));
            }
        }
    }

    /// Opens for writing without the lock. For measuring a region that the caller itself holds locked.
    pub(super) fn open_unlocked(path: &Path) -> Result<Self> {
        RegionFile::open_once(path, true, false)
    }

    /// Opens for writing; a device also under the kernel's exclusive claim, which other writers hold while they are
    /// open, as mounts do.
    fn open_claimed(path: &Path, deadline: Option<Instant>) -> Result<Self> {
        let grace = Instant::now() + CLAIM_GRACE;
        let mut backoff = lock::Backoff::until(deadline.map(|deadline| deadline.max(grace)));
        loop {
            match RegionFile::open_once(path, true, true) {
                Err(error) if error.errno() == Some(libc::EBUSY) => {
                    if backoff.wait() {
                        continue;
                    }
                    // Another writer can be named, by its lock; a mount cannot.
                    let seen = RegionFile::open_once(path, false, false).ok().filter(lock::is_held);
                    return Err(seen.map_or(error, |file| lock::in_use(&file)));
                }
                opened => return opened,
            }
        }
    }

    fn open_once(given: &Path, writable: bool, claims: bool) -> Result<Self> {
        let about = |error: io::Error| explain_open(&error, given);
        let found = fs::metadata(given).map_err(about)?;
        let block_device = found.file_type().is_block_device();
        if !block_device && !found.is_file() {
            return Err(not_storage(given));
        }
        // Devices are mostly named by links (/dev/disk/by-id); for a file a link is more likely a trap.
        let path = if block_device { fs::canonicalize(given).map_err(about)? } else { given.to_path_buf() };
        let mut flags = libc::O_NOFOLLOW | libc::O_NOCTTY;
        if block_device && claims {
            // Refused by the kernel while the device is mounted or claimed by another.
            flags |= libc::O_EXCL;
        }
        let opened = without_forks(|| {
            let file = OpenOptions::new().read(true).write(writable).custom_flags(flags).open(&path);
            let file = file.map_err(|error| explain_open(&error, &path))?;
            ChildClosedFd::register(OwnedFd::from(file)).map_err(|error| error.at_path(&path))
        })?;
        RegionFile::describe(opened, path, writable)
    }

    /// Asks the kernel everything that is kept.
    fn describe(fd: ChildClosedFd, path: PathBuf, writable: bool) -> Result<Self> {
        let raw = fd.as_raw_fd();
        let stat = fstat(raw).map_err(|error| error.at_path(&path))?;
        let block_device = match stat.st_mode & libc::S_IFMT {
            libc::S_IFBLK => true,
            libc::S_IFREG => false,
            _ => return Err(not_storage(&path)),
        };
        let fs_type = fs_type(raw).map_err(|error| error.at_path(&path))?;
        let (len_bytes, volatile) = if block_device {
            let len_bytes = device_bytes(raw).map_err(|error| error.at_path(&path))?;
            (len_bytes, device_in_memory(stat.st_rdev))
        } else {
            (stat.st_size as u64, fs_in_memory(fs_type))
        };
        let durability = if volatile { Durability::Process } else { Durability::Power };
        Ok(RegionFile {
            fd,
            path,
            len_bytes,
            writable,
            block_device,
            fs_type,
            durability,
            named: stat.st_nlink > 0,
            member: None,
            undo: Undo::Nothing,
            completed: Arc::new(AtomicBool::new(false)),
        })
    }

    /// The path; of a device, the one that links lead to.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Notes the size that the file was given since it was opened.
    pub(super) fn resized(&mut self, len_bytes: u64) {
        self.len_bytes = len_bytes;
    }

    /// Size of the file or device when it was opened, in bytes.
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Whether it was opened for writing.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Whether it is a block device.
    pub fn is_block_device(&self) -> bool {
        self.block_device
    }

    /// What data that was flushed to this file survives.
    pub fn durability(&self) -> Durability {
        self.durability
    }

    /// Whether the file lives in memory only (tmpfs, ramfs).
    pub(super) fn is_in_memory(&self) -> bool {
        !self.block_device && fs_in_memory(self.fs_type)
    }

    /// Whether a process serves the file system. Linux (6.18) repeats what io_uring got short from such files, where they are
    /// open for direct I/O by the server's choice, at the wrong place.
    pub(super) fn is_served_by_a_process(&self) -> bool {
        !self.block_device && self.fs_type == FUSE_SUPER_MAGIC
    }

    /// Whether parts of the file have no place where it is stored. Formatting leaves none; of a device there are none.
    pub(super) fn has_holes(&self) -> bool {
        let stored = fstat(self.raw_fd()).map_or(0, |stat| stat.st_blocks as u64 * STAT_BLOCK_BYTES);
        !self.block_device && stored < self.len_bytes
    }

    pub(super) fn raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    pub(super) fn stamp(&self) -> ForkStamp {
        self.fd.stamp()
    }

    /// Notes that it is a member of a striped region.
    pub(super) fn as_member(&mut self, index: u32) {
        self.member = Some(index);
    }

    /// Names this file in an error.
    pub(super) fn about(&self, error: Error) -> Error {
        match self.member {
            Some(index) => error.within(&format!("member {index}, {}", self.path.display())),
            None => error,
        }
        .at_path(&self.path)
    }

    /// Refuses a range that leaves the region, a read-only file, and a forked child.
    pub(super) fn check(&self, op: &'static str, offset: u64, len: u64, writes: bool) -> Result<()> {
        self.stamp().check(op).map_err(|error| self.about(error))?;
        if writes && !self.writable {
            return Err(self.about(Error::new(ErrorKind::ReadOnly, op, "the region was opened read-only")));
        }
        if offset.checked_add(len).is_none_or(|end| end > self.len_bytes) {
            let message = format!("{len} bytes from {offset} leave the region of {} bytes", self.len_bytes);
            return Err(self.about(Error::new(ErrorKind::InvalidArgument, op, message).at_offset(offset)));
        }
        Ok(())
    }

    /// Refuses a file that was deleted, replaced or cut short since it was opened. One system call.
    pub(super) fn check_present(&self) -> Result<()> {
        if self.block_device {
            return Ok(());
        }
        let stat = fstat(self.raw_fd()).map_err(|error| self.about(error))?;
        let (what, advice) = match (stat.st_nlink, stat.st_size as u64) {
            (0, _) if self.named => (
                "the file was deleted or replaced: what is saved into it ends with this process".to_string(),
                "close the store, and open or format the region that is to be used",
            ),
            (_, found) if found < self.len_bytes => (
                format!("the file was cut short: expected {} bytes, found {found}", self.len_bytes),
                "close the store; what is left can be read, and saved elsewhere; then format the region anew",
            ),
            _ => return Ok(()),
        };
        Err(self.about(Error::new(ErrorKind::Io, "check the region's file", what)).advise(advice))
    }

    /// Fills `dst` from `offset` by pread.
    pub(super) fn read(&self, offset: u64, dst: &mut [u8]) -> Result<()> {
        self.check("read", offset, dst.len() as u64, false)?;
        transfer::read_all(self.raw_fd(), offset, dst).map_err(|error| self.about(error))
    }

    /// fdatasync of a file that is written by O_DIRECT.
    pub(super) fn sync_data(&self) -> Result<()> {
        self.sync_data_behind(transfer::Behind::Nothing)
    }

    /// fdatasync.
    pub(super) fn sync_data_behind(&self, behind: transfer::Behind) -> Result<()> {
        transfer::sync_data(self.raw_fd(), behind).map_err(|error| self.about(error))
    }

    /// Whether the path still leads to the file that is open.
    fn still_named(&self) -> Result<bool> {
        let open = fstat(self.raw_fd()).map_err(|error| self.about(error))?;
        match fs::symlink_metadata(&self.path) {
            Ok(named) => Ok(named.dev() == open.st_dev && named.ino() == open.st_ino),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(Error::io("open", &error).at_path(&self.path)),
        }
    }

    /// Switches the open file description to O_DIRECT, keeping the lock. Returns the alignment that memory must
    /// have, in bytes; offsets and lengths may be multiples of 4 KiB.
    pub(super) fn use_direct(&self) -> Result<usize> {
        let refused = |message: String| {
            Error::new(ErrorKind::Unsupported, "open for direct I/O", message)
                .at_path(&self.path)
                .advise("use the medium `mmap`, or put the region on a file system with O_DIRECT")
        };
        let (memory, offset) = dio_alignment(self.raw_fd()).unwrap_or((SAFE_DIO_ALIGN, SAFE_DIO_ALIGN));
        if memory > SAFE_DIO_ALIGN || offset > SAFE_DIO_ALIGN {
            return Err(refused(format!(
                "expected a direct I/O alignment of at most {SAFE_DIO_ALIGN} bytes, found {memory} for memory and {offset} for offsets"
            )));
        }
        self.change_flags(|flags| flags | libc::O_DIRECT)
            .map_err(|error| refused(format!("the file system refuses O_DIRECT: {error}")))?;
        Ok(memory)
    }

    /// Another descriptor of the same file with O_DIRECT, for cuFile, which takes none that was opened with O_NOFOLLOW. It shares
    /// neither lock nor flags.
    #[cfg(feature = "cuda")]
    pub(super) fn open_again(&self) -> Result<ChildClosedFd> {
        let refused = |error: io::Error| self.about(Error::io("open for direct I/O again", &error));
        without_forks(|| {
            let file = OpenOptions::new()
                .read(true)
                .write(self.writable)
                .custom_flags(libc::O_DIRECT | libc::O_NOCTTY)
                .open(format!("/proc/self/fd/{}", self.raw_fd()))
                .map_err(refused)?;
            ChildClosedFd::register(OwnedFd::from(file))
        })
    }

    /// Switches back to buffered I/O.
    pub(super) fn use_buffered(&self) -> Result<()> {
        self.change_flags(|flags| flags & !libc::O_DIRECT)
            .map_err(|error| self.about(Error::io("open for buffered I/O", &error)))
    }

    fn change_flags(&self, change: impl FnOnce(libc::c_int) -> libc::c_int) -> io::Result<()> {
        // SAFETY: touches no memory.
        let flags = unsafe { libc::fcntl(self.raw_fd(), libc::F_GETFL) };
        if flags < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: touches no memory.
        if unsafe { libc::fcntl(self.raw_fd(), libc::F_SETFL, change(flags)) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Undoes what was begun and not completed. A failure leaves a file that is no region, and is not taken for one.
    fn undo(&self) {
        // Acquire pairs with the release in `Completion::keep`.
        if self.undo == Undo::Nothing || self.completed.load(Ordering::Acquire) {
            return;
        }
        // For readers that have it open, and for names that still lead to it.
        let _ = truncate(self.raw_fd());
        if self.undo == Undo::Remove && self.still_named().unwrap_or(false) {
            let _ = fs::remove_file(&self.path);
        }
    }

    /// What people should know of the place where the region lies.
    pub(super) fn notes(&self) -> Vec<String> {
        if self.block_device {
            return Vec::new();
        }
        match self.fs_type {
            BTRFS_MAGIC if inode_flags(self.raw_fd()).is_ok_and(|flags| flags & FS_NOCOW_FL != 0) => Vec::new(),
            BTRFS_MAGIC | ZFS_MAGIC | BCACHEFS_MAGIC => vec![
                "copy-on-write file system: overwriting may need new space, so a save can fail with no space left"
                    .to_string(),
            ],
            OVERLAYFS_MAGIC => vec![
                "overlay file system: what flushed data survives depends on the file system beneath, which cannot be seen"
                    .to_string(),
            ],
            _ => Vec::new(),
        }
    }
}

impl Drop for RegionFile {
    fn drop(&mut self) {
        // All I/O has ended by now. Without this, a ring that the kernel dismantles a little later would keep the
        // lock for that while. Never in a forked child: the lock is the parent's.
        if self.writable && !self.stamp().is_forked() {
            // Under the lock: afterwards the file may be another's region.
            self.undo();
            lock::release(self.raw_fd());
        }
    }
}

pub(super) fn not_storage(path: &Path) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        "open",
        "expected a regular file or a block device, found something else",
    )
    .at_path(path)
    .advise("of persistent memory, use a file on an fsdax file system")
}

fn explain_open(error: &io::Error, path: &Path) -> Error {
    let wrapped = Error::io("open", error).at_path(path);
    match error.raw_os_error() {
        Some(libc::ELOOP) => wrapped
            .with_kind(ErrorKind::InvalidArgument)
            .advise("the path is a symbolic link: give the file that it leads to"),
        Some(libc::EBUSY) => wrapped
            .with_kind(ErrorKind::InUse)
            .advise("the device is mounted, or another process has claimed it: unmount it first"),
        Some(libc::ENOENT) => {
            wrapped.advise("create the region first (`pccheck format`), or correct the path")
        }
        Some(libc::EACCES | libc::EPERM) => {
            wrapped.advise("run as the region's owner, or have its permissions changed")
        }
        Some(libc::EROFS) => wrapped.advise("the file system is mounted read-only"),
        _ => wrapped,
    }
}

fn fstat(fd: RawFd) -> Result<libc::stat64> {
    let mut stat = MaybeUninit::<libc::stat64>::uninit();
    // SAFETY: the place is as large as the kernel writes.
    if unsafe { libc::fstat64(fd, stat.as_mut_ptr()) } != 0 {
        return Err(Error::last_os("fstat"));
    }
    // SAFETY: filled by the successful call.
    Ok(unsafe { stat.assume_init() })
}

/// Device and inode numbers of the open file.
pub(super) fn identity(fd: RawFd) -> Result<(u64, u64)> {
    fstat(fd).map(|stat| (stat.st_dev, stat.st_ino))
}

fn fs_type(fd: RawFd) -> Result<i64> {
    let mut info = MaybeUninit::<libc::statfs64>::uninit();
    // SAFETY: the place is as large as the kernel writes.
    if unsafe { libc::fstatfs64(fd, info.as_mut_ptr()) } != 0 {
        return Err(Error::last_os("statfs"));
    }
    // SAFETY: filled by the successful call.
    let info = unsafe { info.assume_init() };
    // The field's type differs between C libraries; the magic numbers have 32 bits.
    Ok(i64::from(info.f_type as u32))
}

fn fs_in_memory(fs_type: i64) -> bool {
    matches!(fs_type, TMPFS_MAGIC | RAMFS_MAGIC)
}

/// Free bytes that this process may use on the file system of `fd`.
pub(super) fn available_bytes(fd: RawFd) -> Option<u64> {
    let mut info = MaybeUninit::<libc::statvfs64>::uninit();
    // SAFETY: the place is as large as the C library writes.
    if unsafe { libc::fstatvfs64(fd, info.as_mut_ptr()) } != 0 {
        return None;
    }
    // SAFETY: filled by the successful call.
    let info = unsafe { info.assume_init() };
    Some(info.f_bavail.saturating_mul(info.f_frsize))
}

fn device_bytes(fd: RawFd) -> Result<u64> {
    let mut bytes: u64 = 0;
    // SAFETY: this request writes one u64.
    if unsafe { libc::ioctl(fd, BLKGETSIZE64, &mut bytes) } != 0 {
        return Err(Error::last_os("read the size of the device"));
    }
    Ok(bytes)
}

/// Whether a block device is a RAM disk, or a loop device over a file in memory.
fn device_in_memory(device: libc::dev_t) -> bool {
    let sys = format!("/sys/dev/block/{}:{}", libc::major(device), libc::minor(device));
    let name = fs::read_link(&sys).ok().and_then(|link| Some(link.file_name()?.to_str()?.to_string()));
    if name.is_some_and(|name| name.starts_with("ram") || name.starts_with("zram")) {
        return true;
    }
    let backing = fs::read_to_string(format!("{sys}/loop/backing_file")).unwrap_or_default();
    let backing = File::open(backing.trim_end()).ok().filter(|_| !backing.is_empty());
    backing.and_then(|file| fs_type(file.as_raw_fd()).ok()).is_some_and(fs_in_memory)
}

/// Alignments that O_DIRECT needs, of memory and of offsets, where the kernel tells.
fn dio_alignment(fd: RawFd) -> Option<(usize, usize)> {
    let mut info = MaybeUninit::<libc::statx>::zeroed();
    let empty = CString::default();
    // SAFETY: an empty, terminated path, and a place as large as the kernel writes.
    let code = unsafe {
        libc::statx(fd, empty.as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, info.as_mut_ptr())
    };
    if code != 0 {
        return None;
    }
    // SAFETY: zeroed, which is a valid value, and then filled.
    let info = unsafe { info.assume_init() };
    let (memory, offset) = (info.stx_dio_mem_align as usize, info.stx_dio_offset_align as usize);
    // Zero: not told, or no direct I/O; which of the two is found by trying.
    (info.stx_mask & libc::STATX_DIOALIGN != 0 && memory > 0 && offset > 0).then_some((memory, offset))
}

fn inode_flags(fd: RawFd) -> Result<libc::c_long> {
    let mut flags: libc::c_long = 0;
    // SAFETY: this request writes at most one long.
    if unsafe { libc::ioctl(fd, libc::FS_IOC_GETFLAGS, &mut flags) } != 0 {
        return Err(Error::last_os("read inode flags"));
    }
    Ok(flags)
}

/// On btrfs, switches copy-on-write off for an empty file, so that preallocated space is what writes use.
pub(super) fn disable_copy_on_write(fd: RawFd) {
    if !fs_type(fd).is_ok_and(|fs_type| fs_type == BTRFS_MAGIC) {
        return;
    }
    if let Ok(flags) = inode_flags(fd) {
        let flags = flags | FS_NOCOW_FL;
        // Refusal is not an error here: opening the region notes that space is not guaranteed.
        // SAFETY: this request reads at most one long.
        unsafe { libc::ioctl(fd, libc::FS_IOC_SETFLAGS, &flags) };
    }
}

/// Makes the entry of `path` in its directory durable.
pub fn sync_parent(path: &Path) -> Result<()> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().as_bytes().is_empty() => parent,
        _ => Path::new("."),
    };
    let opened = File::open(parent).map_err(|error| Error::io("sync the directory", &error));
    let synced = opened.and_then(|directory| transfer::sync_directory(directory.as_raw_fd()));
    synced.map_err(|error| error.at_path(parent))
}
