//! The writer's exclusive lock, and who holds it.
#![expect(unsafe_code, reason = "flock is a system call")]

use std::fs;
use std::io;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use super::file::{identity, RegionFile};
use crate::error::{Error, ErrorKind, Result};
use crate::partial::Fruitless;
use crate::sync::thread;

/// First pause between two attempts; doubled each time.
const POLL_MIN: Duration = Duration::from_millis(1);
/// Longest pause between two attempts.
const POLL_MAX: Duration = Duration::from_millis(50);
/// How often the holder is looked for, and how long apart.
const LOOKS: u32 = 3;
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// Pauses between attempts at something that another process still holds.
pub(super) struct Backoff {
    /// None: never.
    deadline: Option<Instant>,
    pause: Duration,
}

impl Backoff {
    pub(super) fn until(deadline: Option<Instant>) -> Self {
        Backoff { deadline, pause: POLL_MIN }
    }

    /// Sleeps; false, at once, when the deadline has passed.
    pub(super) fn wait(&mut self) -> bool {
        let left = self.deadline.map_or(POLL_MAX, |at| at.saturating_duration_since(Instant::now()));
        if left.is_zero() {
            return false;
        }
        thread::sleep(self.pause.min(left));
        self.pause = (self.pause * 2).min(POLL_MAX);
        true
    }
}

/// Takes the lock on the open file description of `file`, trying until `deadline` (`None`: for ever).
pub(super) fn exclusive(file: &RegionFile, deadline: Option<Instant>) -> Result<()> {
    let (mut backoff, mut fruitless) = (Backoff::until(deadline), Fruitless::default());
    loop {
        // SAFETY: touches no memory.
        if unsafe { libc::flock(file.raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EWOULDBLOCK) => {}
            _ if fruitless.interrupted(&error) => continue,
            Some(libc::EINTR) => return Err(file.about(Error::io("lock", &error))),
            _ => {
                return Err(file.about(
                    Error::io("lock", &error)
                        .with_kind(ErrorKind::Unsupported)
                        .advise("put the region on a file system with locks: two writers would destroy it"),
                ))
            }
        }
        if !backoff.wait() {
            return Err(in_use(file));
        }
    }
}

/// Gives the lock up. Failure is impossible for a valid descriptor, and closing it does the same.
pub(super) fn release(fd: RawFd) {
    // SAFETY: touches no memory.
    unsafe { libc::flock(fd, libc::LOCK_UN) };
}

/// Whether some process holds the writer's lock.
pub(super) fn is_held(file: &RegionFile) -> bool {
    holder(file.raw_fd()).is_some()
}

/// The error that names who holds the region.
pub(super) fn in_use(file: &RegionFile) -> Error {
    // The kernel's list is read in pieces, between which it may change: who was refused looks more than once.
    let found = (0..LOOKS).find_map(|look| {
        if look > 0 {
            thread::sleep(LOOK_AGAIN);
        }
        holder(file.raw_fd())
    });
    let holder = match found {
        Some(pid) => match fs::read_to_string(format!("/proc/{pid}/comm")) {
            Ok(command) => format!("process {pid} ({})", command.trim_end()),
            Err(_) => format!("process {pid}, which has ended: the kernel is finishing its writes"),
        },
        None => "a process that cannot be seen from here".to_string(),
    };
    file.about(
        Error::new(ErrorKind::InUse, "lock", format!("another writer holds the region: {holder}"))
            .advise("end that process, wait longer, or open the region read-only"),
    )
}

/// The process that took the lock, from /proc/locks.
fn holder(fd: RawFd) -> Option<u32> {
    let (device, inode) = identity(fd).ok()?;
    holder_in(&fs::read_to_string("/proc/locks").ok()?, device, inode)
}

/// Finds `1: FLOCK  ADVISORY  WRITE 1234 fe:00:56789 0 EOF` by device and inode; by inode alone where the file
/// system shows another device number there (btrfs, overlay).
fn holder_in(locks: &str, device: u64, inode: u64) -> Option<u32> {
    let mut by_inode = None;
    for line in locks.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [_, "FLOCK", _, "WRITE", pid, place, ..] = words[..] else { continue };
        let mut parts = place.split(':');
        let (Some(major), Some(minor), Some(number)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        let Some(pid) = pid.parse().ok().filter(|pid| *pid > 0) else { continue };
        if number.parse() != Ok(inode) {
            continue;
        }
        let same_device = u32::from_str_radix(major, 16) == Ok(libc::major(device))
            && u32::from_str_radix(minor, 16) == Ok(libc::minor(device));
        if same_device {
            return Some(pid);
        }
        by_inode = by_inode.or(Some(pid));
    }
    by_inode
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_holder_is_found_by_device_and_inode() {
        let locks = "1: POSIX  ADVISORY  WRITE 11 fe:00:77 0 EOF\n\
                     2: FLOCK  ADVISORY  WRITE 22 fe:01:77 0 EOF\n\
                     3: FLOCK  ADVISORY  WRITE 33 fe:00:77 0 EOF\n\
                     3: -> FLOCK  ADVISORY  WRITE 44 fe:00:77 0 EOF\n\
                     4: FLOCK  ADVISORY  WRITE -1 fe:00:78 0 EOF\n\
                     rubbish\n";
        assert_eq!(holder_in(locks, libc::makedev(0xfe, 0), 77), Some(33));
        assert_eq!(holder_in(locks, libc::makedev(0xfe, 9), 77), Some(22), "by inode alone");
        assert_eq!(holder_in(locks, libc::makedev(0xfe, 0), 78), None, "holder in another pid namespace");
        assert_eq!(holder_in(locks, libc::makedev(0xfe, 0), 79), None);
    }
}
