//! The thread that takes what arrives in rings to the copiers. It makes no call of the driver, which the program may hold up.

use std::time::{Duration, Instant};

use super::ring::Ring;
use crate::save::saver::Shared;
use crate::sync::{Arc, Event as Signal, Mutex};

/// How long a thread sleeps while copies are on their way: a share of the time since something moved, within limits.
const PAUSE_SHARE: u32 = 16;
const PAUSE_MIN: Duration = Duration::from_micros(20);
const PAUSE_MAX: Duration = Duration::from_millis(1);

/// When to look next at what is on its way.
pub(super) struct Pace(Instant);

impl Pace {
    pub fn new() -> Pace {
        Pace(Instant::now())
    }

    pub fn moved(&mut self) {
        self.0 = Instant::now();
    }

    pub fn next_look(&self) -> Instant {
        let now = Instant::now();
        now + (now.duration_since(self.0) / PAUSE_SHARE).clamp(PAUSE_MIN, PAUSE_MAX)
    }
}

/// The rings of a store whose copies have not ended.
#[derive(Default)]
pub(crate) struct Rings {
    state: Mutex<State>,
    /// One was added or has ended.
    pub changed: Signal,
}

#[derive(Default)]
struct State {
    rings: Vec<Arc<Ring>>,
    /// Nobody lands what arrives any more.
    ended: bool,
}

impl Rings {
    /// False where nobody would land what arrives in it.
    pub(super) fn add(&self, ring: Arc<Ring>) -> bool {
        {
            let mut state = self.state.lock();
            if state.ended {
                return false;
            }
            state.rings.push(ring);
        }
        self.changed.notify_all();
        true
    }

    pub(super) fn remove(&self, ring: &Arc<Ring>) {
        // Outlives the lock: the last owner gives its buffers back.
        let removed: Vec<_> =
            self.state.lock().rings.extract_if(.., |other| Arc::ptr_eq(other, ring)).collect();
        drop(removed);
        self.changed.notify_all();
    }

    pub fn is_empty(&self) -> bool {
        self.state.lock().rings.is_empty()
    }

    /// Copies may wait for copiers.
    pub fn wait_for_copiers(&self) -> bool {
        self.state.lock().rings.iter().any(|ring| ring.waits())
    }

    /// Nobody lands what arrives any more: nothing waits for that, and the GPU may use the buffers for ever.
    pub fn end(&self) {
        let rings = {
            let mut state = self.state.lock();
            state.ended = true;
            std::mem::take(&mut state.rings)
        };
        rings.iter().for_each(|ring| ring.open());
        std::mem::forget(rings);
        self.changed.notify_all();
    }

    fn end_if_unused(&self) -> bool {
        let mut state = self.state.lock();
        state.ended |= state.rings.is_empty();
        state.ended
    }
}

/// Should it or another thread of the engine die, [`Rings::end`] is called.
pub(in crate::save) fn run_landing(shared: &Shared) {
    let rings = &shared.exchange.rings;
    let (mut pace, mut known) = (Pace::new(), 0);
    loop {
        let ticket = rings.changed.ticket();
        let all = rings.state.lock().rings.clone();
        if all.len() != known {
            known = all.len();
            pace.moved();
        }
        let mut moved = false;
        for ring in &all {
            moved |= ring.land(&shared.exchange, &shared.faults);
            ring.keep_deadline();
        }
        if moved {
            assert!(!shared.faults.die_at_landing(), "dies, as planted");
            shared.arrivals_came();
            pace.moved();
            continue;
        }
        if all.is_empty() && shared.closing() && shared.all_ended() && rings.end_if_unused() {
            return;
        }
        let until = (!all.is_empty()).then(|| pace.next_look());
        drop(all);
        let _ = rings.changed.wait(ticket, until);
    }
}
