//! The threads that move saves along: copiers, a marker, a committer; and the queues between them.
//!
//! ```text
//! begin --> marker: durable writing(g) --------------------.
//!   `-----> copiers: source -> staging + hash (oldest first) `-> medium --> committer: flush, commit record, publish
//! ```
//!
//! A copier waits for a staging buffer before it chooses a chunk, so that a free buffer always goes to the oldest
//! save. No thread waits for a buffer while it holds one, so buffers always come back.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::metrics::Metrics;
use crate::save::core::{cancelled, out_of_time, ChunkWork, Origin, SaveCore, SaveSpec};
#[cfg(feature = "cuda")]
use crate::save::device::{run_landing, run_pump, Exchange, NewJob};
use crate::save::faults::Faults;
use crate::save::{commit, copier};
use crate::slots::SlotState;
use crate::staging::StagingBuffer;
use crate::store::Region;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{now, thread, Arc, Event, Mutex};

/// How long a thread that waits for a buffer goes without looking whether the store is being closed.
const CLOSE_POLL: Duration = Duration::from_millis(50);

/// How long closing a poisoned store waits for saves to end by themselves.
const POISONED_CLOSE_WAIT: Duration = Duration::from_secs(10);

/// What the threads of one store share.
pub(crate) struct Shared {
    pub region: Arc<Region>,
    pub metrics: Arc<Metrics>,
    pub faults: Faults,
    /// Saves with chunks to copy, oldest first.
    copy_queue: Mutex<BTreeMap<u64, Arc<SaveCore>>>,
    pub copy_work: Event,
    mark_queue: Mutex<VecDeque<Arc<SaveCore>>>,
    mark_work: Event,
    commit_queue: Mutex<BTreeMap<u64, Arc<SaveCore>>>,
    commit_work: Event,
    /// Saves that have not ended.
    active: Mutex<BTreeMap<u64, Arc<SaveCore>>>,
    active_changed: Event,
    /// Generations of saves that are no longer counted, and whose outcome is still to be told. Taken under `active`.
    ending: Mutex<BTreeSet<u64>>,
    closing: AtomicBool,
    #[cfg(feature = "cuda")]
    pub exchange: Exchange,
}

/// The saving side of an open store.
pub(crate) struct Saver {
    shared: Arc<Shared>,
    threads: Mutex<Vec<thread::JoinHandle<()>>>,
    /// Whether the threads that copy from GPUs and that take what arrives in rings were started: at the first save that needs them.
    #[cfg(feature = "cuda")]
    device_threads: Mutex<(bool, bool)>,
}

impl Saver {
    /// Starts the threads; fails, with none left running, where the system refuses one.
    pub fn start(region: Arc<Region>, metrics: Arc<Metrics>, faults: Faults) -> Result<Saver> {
        let writers = region.options().writers;
        let shared = Arc::new(Shared {
            region,
            metrics,
            faults,
            copy_queue: Mutex::new(BTreeMap::new()),
            copy_work: Event::new(),
            mark_queue: Mutex::new(VecDeque::new()),
            mark_work: Event::new(),
            commit_queue: Mutex::new(BTreeMap::new()),
            commit_work: Event::new(),
            active: Mutex::new(BTreeMap::new()),
            active_changed: Event::new(),
            ending: Mutex::new(BTreeSet::new()),
            closing: AtomicBool::new(false),
            #[cfg(feature = "cuda")]
            exchange: Exchange::default(),
        });
        let saver = Saver {
            shared,
            threads: Mutex::new(Vec::new()),
            #[cfg(feature = "cuda")]
            device_threads: Mutex::new((false, false)),
        };
        saver.spawn("pcc-mark", run_marker)?;
        saver.spawn("pcc-commit", commit::run_committer)?;
        for _ in 0..writers {
            saver.spawn("pcc-copy", copier::run_copier)?;
        }
        Ok(saver)
    }

    fn spawn(&self, name: &str, run: fn(&Shared)) -> Result<()> {
        let shared = self.shared.clone();
        let body = move || {
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| run(&shared))) {
                // Dropping what was thrown could panic again.
                std::mem::forget(panic);
                shared.give_up();
            }
        };
        let handle = thread::Builder::new().name(name.to_string()).spawn(body).map_err(|e| {
            Error::io("start thread", &e)
                .with_kind(ErrorKind::OutOfMemory)
                .advise("raise the limit on threads (ulimit -u)")
        })?;
        self.threads.lock().push(handle);
        Ok(())
    }

    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Begins a save: claims generation and slot, then lets marker and copiers go to work.
    ///
    /// Waits until `deadline` for a slot.
    pub fn begin(&self, spec: SaveSpec, origin: Origin, deadline: Option<Instant>) -> Result<Arc<SaveCore>> {
        let shared = &self.shared;
        shared.region.medium().check_present()?;
        #[cfg(feature = "cuda")]
        if let Origin::Device(part) = &origin {
            self.start_for_devices(part.flag_waits)?;
        }
        let save = loop {
            let ticket = shared.region.slot_freed().ticket();
            if let Some(save) = shared.try_begin(&spec, &origin)? {
                break save;
            }
            if shared.region.slot_freed().wait(ticket, deadline) {
                return Err(no_slot(&shared.region));
            }
        };
        if save.has_chunks() {
            shared.copy_queue.lock().insert(save.claim.generation, save.clone());
            shared.copy_work.notify_all();
        }
        shared.mark_queue.lock().push_back(save.clone());
        shared.mark_work.notify_all();
        #[cfg(feature = "cuda")]
        if let Origin::Device(part) = origin {
            shared.exchange.submit(NewJob { save: save.clone(), part });
        }
        Ok(save)
    }

    #[cfg(feature = "cuda")]
    fn start_for_devices(&self, rings: bool) -> Result<()> {
        let mut started = self.device_threads.lock();
        if !started.0 {
            self.spawn("pcc-device", run_pump)?;
            started.0 = true;
        }
        if rings && !started.1 {
            self.spawn("pcc-landing", run_landing)?;
            started.1 = true;
        }
        Ok(())
    }

    /// Waits until no save is in flight, and the outcome of each is known. Without a deadline it refuses to wait for saves
    /// that wait only for their confirmation: its caller may be the one who is to give it.
    pub fn drain(&self, deadline: Option<Instant>) -> Result<()> {
        loop {
            let ticket = self.shared.active_changed.ticket();
            let active = self.active();
            // In this order: a save is among those that end before it leaves those that are active.
            if active.is_empty() && self.shared.ending.lock().is_empty() {
                return Ok(());
            }
            if deadline.is_none()
                && !active.is_empty()
                && active.iter().all(|save| save.awaits_confirmation())
            {
                return Err(unconfirmed(&active));
            }
            if self.shared.active_changed.wait(ticket, deadline) && !self.shared.active.lock().is_empty() {
                return Err(Error::new(ErrorKind::TimedOut, "drain", "saves are still in flight"));
            }
        }
    }

    /// Saves that have not ended.
    pub fn active(&self) -> Vec<Arc<SaveCore>> {
        self.shared.active.lock().values().cloned().collect()
    }

    /// Cancels what is in flight, waits until nothing is, and ends the threads.
    pub fn close(&self) {
        let shared = &self.shared;
        if shared.region.forked() {
            // The threads live in the parent; here there is nothing to join and nothing to wait for.
            self.threads.lock().drain(..).for_each(std::mem::forget);
            return;
        }
        shared.closing.store(true, Ordering::SeqCst);
        for save in self.active() {
            save.fail(cancelled("the store was closed before the save was durable"));
        }
        // Ends by itself: every operation in flight completes, nothing new is started, and a thread that dies ends
        // all saves. Where a panic poisoned the store, no such thing is sure.
        let limit = shared.region.poisoned().then(|| now() + POISONED_CLOSE_WAIT);
        if self.drain(limit).is_err() {
            shared.end_all_by_force();
            shared.wake_all();
            self.threads.lock().drain(..).for_each(std::mem::forget);
            return;
        }
        shared.wake_all();
        for handle in self.threads.lock().drain(..) {
            let _ = handle.join();
        }
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    fn check_open(&self) -> Result<()> {
        self.region.check_usable("begin save", true)?;
        if self.closing() {
            return Err(cancelled("the store is being closed"));
        }
        Ok(())
    }

    /// SeqCst pairs with the store in `close`: a thread that was woken after it sees it.
    pub fn closing(&self) -> bool {
        self.closing.load(Ordering::SeqCst)
    }

    fn wake_all(&self) {
        self.copy_work.notify_all();
        self.mark_work.notify_all();
        self.commit_work.notify_all();
        self.region.slot_freed().notify_all();
        #[cfg(feature = "cuda")]
        {
            self.exchange.work.notify_all();
            self.exchange.rings.changed.notify_all();
        }
    }

    /// A thread of the engine panicked: no further saves, and those in flight end at once, since what they wait for
    /// may never come. `try_begin` looks for the poison under the lock of active saves, so none slips through.
    fn give_up(&self) {
        self.region.poison();
        self.end_all_by_force();
        #[cfg(feature = "cuda")]
        self.exchange.rings.end();
        self.wake_all();
    }

    fn end_all_by_force(&self) {
        let active: Vec<_> = self.active.lock().values().cloned().collect();
        for save in active {
            save.end_by_force();
        }
    }

    /// Claims under the lock of active saves, so that no more than N are in flight.
    fn try_begin(self: &Arc<Self>, spec: &SaveSpec, origin: &Origin) -> Result<Option<Arc<SaveCore>>> {
        let mut active = self.active.lock();
        self.check_open()?;
        // Before anything is waited for: what is full of pins stays so until one is lifted.
        let _room = if spec.pin { Some(self.region.room_to_pin()?) } else { None };
        if active.len() >= self.region.options().max_in_flight as usize {
            return Ok(None);
        }
        let Some((claim, content)) = self.region.claim(spec.pin)? else { return Ok(None) };
        let save = SaveCore::new(self, claim, content, spec.clone(), origin.clone());
        active.insert(claim.generation, save.clone());
        self.metrics.saves_begun();
        Ok(Some(save))
    }

    /// A buffer as soon as one is free; `None` when the store is being closed, or when there is other work for a copier.
    pub fn acquire_buffer(&self) -> Option<StagingBuffer> {
        let pool = self.region.pool();
        loop {
            let ticket = pool.freed().ticket();
            if let Some(buffer) = pool.try_acquire() {
                return Some(buffer);
            }
            if self.closing() || self.may_take_arrived() {
                return None;
            }
            let _ = pool.freed().wait(ticket, Some(now() + CLOSE_POLL));
        }
    }

    /// Whether chunks from devices wait for a copier, and one more may be at them.
    pub fn may_take_arrived(&self) -> bool {
        #[cfg(feature = "cuda")]
        return self.exchange.has_arrived() && self.exchange.courtesy.has_room(self.region.options().writers);
        #[cfg(not(feature = "cuda"))]
        return false;
    }

    /// No more than one save is in flight.
    #[cfg(feature = "cuda")]
    pub fn at_most_one_is_active(&self) -> bool {
        self.active.lock().len() <= 1
    }

    /// Chunks from devices have arrived: wakes copiers, also those that wait for a buffer.
    #[cfg(feature = "cuda")]
    pub fn arrivals_came(&self) {
        if self.exchange.has_arrived() {
            self.copy_work.notify_all();
            self.region.pool().freed().notify_all();
        }
    }

    /// No save is in flight.
    pub fn all_ended(&self) -> bool {
        self.active.lock().is_empty()
    }

    /// A buffer for the save as soon as one is free; an error when it has failed or `deadline` has passed.
    ///
    /// Chunks that have arrived from devices are seen to meanwhile: they hold the buffers that this waits for.
    pub fn acquire_buffer_for(&self, save: &SaveCore, deadline: Option<Instant>) -> Result<StagingBuffer> {
        let pool = self.region.pool();
        loop {
            let ticket = pool.freed().ticket();
            if let Some(buffer) = pool.try_acquire() {
                return Ok(buffer);
            }
            save.check()?;
            if self.closing() {
                return Err(cancelled("the store was closed"));
            }
            if deadline.is_some_and(|deadline| now() >= deadline) {
                return Err(out_of_time("raw write", "a staging buffer"));
            }
            if copier::take_arrived(self, true) {
                continue;
            }
            let poll = now() + CLOSE_POLL;
            let _ = pool.freed().wait(ticket, Some(deadline.map_or(poll, |deadline| deadline.min(poll))));
        }
    }

    pub fn queue_commit(&self, save: Option<Arc<SaveCore>>) {
        if let Some(save) = save {
            self.commit_queue.lock().insert(save.claim.generation, save);
            self.commit_work.notify_all();
        }
    }

    /// All saves that are ready to commit, oldest first; waits for the first. `None` when the store is closed.
    pub fn next_commits(&self) -> Option<Vec<Arc<SaveCore>>> {
        loop {
            let ticket = self.commit_work.ticket();
            let ready = self.take_commits();
            if !ready.is_empty() {
                return Some(ready);
            }
            if self.closing() && self.active.lock().is_empty() {
                return None;
            }
            let _ = self.commit_work.wait(ticket, None);
        }
    }

    /// All saves that are ready to commit by now, oldest first.
    pub fn take_commits(&self) -> Vec<Arc<SaveCore>> {
        std::mem::take(&mut *self.commit_queue.lock()).into_values().collect()
    }

    /// A save has come to wait for its confirmation alone: who drains must know.
    pub fn tell_unconfirmed(&self) {
        self.active_changed.notify_all();
    }

    /// Gives the slot of a failed save back, or quarantines it where its durability is unknown.
    pub fn end_failed(&self, save: &SaveCore, error: &Error) {
        match error.kind() {
            ErrorKind::DurabilityUnknown => self.region.quarantine(save.claim),
            kind => {
                let cancelled = kind == ErrorKind::Cancelled;
                self.region.release(save.claim, !cancelled, save.left_content(cancelled));
            }
        }
        self.forget(save, |metrics| match error.kind() {
            ErrorKind::Cancelled => metrics.saves_cancelled(),
            _ => metrics.saves_failed(),
        });
    }

    /// The save is no longer in flight: `count` says how it ended, unless that was said before.
    pub fn forget(&self, save: &SaveCore, count: impl FnOnce(&Metrics)) {
        self.copy_queue.lock().remove(&save.claim.generation);
        {
            let mut active = self.active.lock();
            if active.remove(&save.claim.generation).is_some() {
                self.ending.lock().insert(save.claim.generation);
                count(&self.metrics);
                self.metrics.saves_ended();
            }
        }
        self.active_changed.notify_all();
        if !self.faults.wake_before_forgetting() {
            self.region.slot_freed().notify_all();
        }
        if self.closing() {
            self.wake_all();
        }
    }

    /// The outcome of a save is known to whoever asks.
    pub fn told(&self, save: &SaveCore) {
        self.ending.lock().remove(&save.claim.generation);
        self.active_changed.notify_all();
    }

    pub fn next_chunk(&self) -> Option<(Arc<SaveCore>, ChunkWork)> {
        // Outlives the lock: the last owner of a save drops what its caller gave.
        let mut done = Vec::new();
        let mut queue = self.copy_queue.lock();
        while let Some(entry) = queue.first_entry() {
            match entry.get().take_chunk() {
                Some(work) => return Some((entry.get().clone(), work)),
                None => done.push(entry.remove()),
            }
        }
        None
    }

    pub fn has_copy_work(&self) -> bool {
        !self.copy_queue.lock().is_empty()
    }
}

fn run_marker(shared: &Shared) {
    loop {
        let ticket = shared.mark_work.ticket();
        let next = shared.mark_queue.lock().pop_front();
        let Some(save) = next else {
            if shared.closing() && shared.active.lock().is_empty() {
                return;
            }
            let _ = shared.mark_work.wait(ticket, None);
            continue;
        };
        if !save.wants_mark() {
            continue;
        }
        let record = commit::writing_record(shared, &save);
        let result = match shared.faults.skip_writing_mark() {
            true => Ok(()),
            false => shared.region.mark_writing(&record),
        };
        save.marked(result);
        // Not fatal here: `claim` tries again when the lease has run out, and reports it to its caller.
        let _ = shared.region.extend_lease_early();
    }
}

fn unconfirmed(saves: &[Arc<SaveCore>]) -> Error {
    let generations: Vec<String> = saves.iter().map(|save| save.claim.generation.to_string()).collect();
    let message = format!("generation {} waits for its confirmation", generations.join(", "));
    Error::new(ErrorKind::InvalidState, "drain", message)
        .advise("confirm, cancel or free it, or drain with a timeout")
}

fn no_slot(region: &Region) -> Error {
    let options = region.options();
    let views = region.slot_views();
    let pinned = views.iter().filter(|view| view.pinned).count();
    let read = views.iter().filter(|view| view.readers > 0).count();
    let quarantined = views.iter().filter(|view| view.state == SlotState::Quarantined).count();
    Error::new(
        ErrorKind::NoSlot,
        "begin save",
        format!(
            "no slot became free in the time given: {} slots, of which {pinned} pinned, {read} being read and \
             {quarantined} quarantined; max_in_flight {}, keep {}, hold {}",
            region.layout().slot_count,
            options.max_in_flight,
            options.keep,
            options.hold
        ),
    )
    .at_path(region.path())
    .advise(match (options.hold, pinned + read, quarantined) {
        (true, ..) => "mark a step as durable everywhere, or abandon one",
        (_, _, 1..) => "check the device, then repair the quarantined slots",
        (_, 1.., _) => "unpin or close a checkpoint, or grow the region",
        _ => "wait longer, save less often, or raise max_in_flight and the slot count",
    })
}

#[cfg(all(test, feature = "sim"))]
#[path = "saver_test.rs"]
mod tests;
