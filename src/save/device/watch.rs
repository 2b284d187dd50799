//! Whether the thread that copies is held up inside the driver: what a stream that waits for it, or the program's own calls
//! behind that stream, can bring about.

use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind};
use crate::sync::atomic::{AtomicU64, Ordering};

/// It is looked so often,
pub(super) const LOOK: Duration = Duration::from_millis(500);
/// and so many looks without a sign of life say that it is: looks, and not time, in which this process may have been stopped.
const LOOKS: u32 = 10;

/// Signs of life of a thread that never waits for longer than a moment.
#[derive(Default)]
pub(crate) struct Beats(AtomicU64);

impl Beats {
    pub fn beat(&self) {
        // Relaxed: nothing is concluded from one but that it came.
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Who looks.
pub(super) struct Watch {
    seen: u64,
    looked_at: Instant,
    looks: u32,
}

impl Watch {
    pub fn new() -> Watch {
        Watch { seen: 0, looked_at: Instant::now(), looks: 0 }
    }

    /// Whether there were no beats for too long; `wanted`: whether there must be some.
    pub fn is_held_up(&mut self, beats: &Beats, wanted: bool) -> bool {
        let (seen, now) = (beats.count(), Instant::now());
        if !wanted || seen != self.seen {
            (self.seen, self.looked_at, self.looks) = (seen, now, 0);
        } else if now.duration_since(self.looked_at) >= LOOK {
            (self.looked_at, self.looks) = (now, self.looks + 1);
        }
        self.looks >= LOOKS
    }
}

/// What saves fail with then.
pub(super) fn held_up() -> Error {
    let message = format!(
        "the driver has held up the copies for {} s while a stream of the program waits for them; the save has failed",
        (LOOK * LOOKS).as_secs()
    );
    Error::new(ErrorKind::Device, "copy GPU memory", message)
        .advise("begin saves without flag_waits, or enqueue less behind the wait")
}
