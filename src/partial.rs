//! Calls that may come back before all is done: how far they have come, and how often they are made again.

use std::io;
use std::time::Duration;

use crate::sync::thread;

/// Alignment that suffices for O_DIRECT on every device with sectors up to 4 KiB.
pub(crate) const SAFE_DIO_ALIGN: usize = 4096;

/// The most that Linux moves in one call is a little less than 2 GiB; this stays aligned and below it.
pub(crate) const TRANSFER_MAX_BYTES: usize = 1 << 30;

/// How far an operation of `len` bytes has come when a call has moved `moved` of them from `done` on; none where that was no
/// progress. What follows must stay aligned for O_DIRECT: an odd tail is transferred again.
pub(crate) fn progress(done: usize, moved: usize, len: usize) -> Option<usize> {
    let total = done + moved;
    let useful = if total >= len { len } else { total / SAFE_DIO_ALIGN * SAFE_DIO_ALIGN };
    (useful > done).then_some(useful)
}

/// How often one operation may come back without any progress, also interrupted, before that is an error: no call waits for
/// ever for a file system that always answers so.
pub(crate) const FRUITLESS_MAX: u32 = 64;

/// Pause before asking a kernel again that was out of resources.
pub(crate) const BUSY_PAUSE: Duration = Duration::from_micros(100);

/// Counts calls that brought nothing, one after the other.
#[derive(Default)]
pub(crate) struct Fruitless(u32);

impl Fruitless {
    /// Whether a call that moved too little may be made again.
    pub(crate) fn again(&mut self) -> bool {
        self.0 += 1;
        self.0 <= FRUITLESS_MAX
    }

    /// Whether a call that failed may be made again: some times, after a signal or where the kernel had no room for it just
    /// then.
    pub(crate) fn again_after(&mut self, error: &io::Error) -> bool {
        match error.raw_os_error() {
            Some(libc::EINTR) => self.again(),
            Some(libc::EAGAIN) if self.again() => {
                thread::sleep(BUSY_PAUSE);
                true
            }
            _ => false,
        }
    }

    /// As [`Fruitless::again_after`], after a signal alone: other failures of such a call are told once.
    pub(crate) fn interrupted(&mut self, error: &io::Error) -> bool {
        error.kind() == io::ErrorKind::Interrupted && self.again()
    }
}
