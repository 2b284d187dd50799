//! Streams of the program that wait for a flag in memory, so that no thread of the program has to.
//!
//! An event can be waited for only once all copies are enqueued, and a pool that is smaller than the state takes them in
//! portions: a thread would wait meanwhile. A flag is waited for by the stream itself and raised by a thread that makes no call of the
//! driver: when the state has left the caller's memory, when its save has failed, and at the save's deadline at the latest.
#![expect(unsafe_code, reason = "words of a mapping that devices read")]

use std::time::Instant;

use super::job::late;
use super::watch::{held_up, Watch, LOOK};
use crate::cuda::{Device, Event, Pending, Relaxed, UserStream, Waits};
use crate::save::core::SaveCore;
use crate::save::saver::Shared;
use crate::staging::{StagingOptions, StagingPool, BUFFERS_MIN};
use crate::sync::atomic::{AtomicU32, Ordering};
use crate::sync::{now, Arc, Event as Signal, Mutex, OnceLock};

const PAGE_BYTES: usize = 4096;
/// No two in one line of the cache.
const WORD_STRIDE: usize = 64;
const WORDS: usize = BUFFERS_MIN * PAGE_BYTES / WORD_STRIDE;
const RAISED: u32 = 1;

/// The flags of a store.
#[derive(Default)]
pub(crate) struct Flags {
    /// Memory of the kind that staging buffers are of: page-locked, not inherited by children. None: that was refused.
    words: OnceLock<Option<Arc<StagingPool>>>,
    state: Mutex<State>,
    /// A save is copied, has failed, or is waited for.
    pub changed: Signal,
}

#[derive(Default)]
struct State {
    /// How many words were ever given out.
    given: usize,
    free: Vec<usize>,
    flags: Vec<Flag>,
    /// Saves that were waited for: their end may call the driver, so it is not left to the thread that raises.
    over: Vec<Arc<SaveCore>>,
    /// Nobody raises flags any more, and nobody may wait for them.
    ended: bool,
}

struct Flag {
    word: usize,
    /// None: it is raised.
    wait: Option<Wait>,
    /// Behind the waits: when they are reached nobody looks at the word any more. None: not known yet, or never.
    behind: Option<Vec<Event>>,
}

struct Wait {
    save: Arc<SaveCore>,
    deadline: Option<Instant>,
    _pending: Pending,
}

impl Flags {
    /// Whether the next `prepare` allocates.
    pub fn is_unprepared(&self) -> bool {
        self.words.get().is_none()
    }

    /// Page-locks the words, once.
    pub fn prepare(&self, device: &Arc<Device>) {
        self.words.get_or_init(|| {
            let bytes = (BUFFERS_MIN * PAGE_BYTES) as u64;
            let pool = StagingPool::new(bytes, PAGE_BYTES, &StagingOptions::default()).ok()?;
            pool.register(device).then_some(pool)
        });
    }

    /// There are words to wait for.
    pub fn is_ready(&self) -> bool {
        self.words.get().is_some_and(Option::is_some)
    }

    fn word(&self, word: usize) -> Option<&AtomicU32> {
        let base = self.words.get()?.as_ref()?.base();
        let place = base.wrapping_add(word * WORD_STRIDE).cast::<u32>();
        // SAFETY: one of WORDS places, aligned, inside of a mapping that lives as long as `self` and that nobody
        // accesses but through these.
        Some(unsafe { AtomicU32::from_ptr(place) })
    }

    /// Makes the stream wait until the save's memory is the caller's again. False where it could not be made to, in part or
    /// at all: then a thread is to wait.
    pub fn wait_on(
        &self,
        stream: UserStream,
        devices: &[Arc<Device>],
        save: &Arc<SaveCore>,
        deadline: Option<Instant>,
    ) -> bool {
        let Some(pending) = Pending::begin() else { return false };
        let Some(number) = self.take() else { return false };
        let Some(word) = self.word(number) else { return false };
        // The driver's call orders this before the stream's first look.
        word.store(0, Ordering::Relaxed);
        let wait = Some(Wait { save: save.clone(), deadline, _pending: pending });
        {
            // Before the stream waits: whatever comes then, the flag is raised.
            let mut state = self.state.lock();
            if state.ended {
                state.free.push(number);
                return false;
            }
            state.flags.push(Flag { word: number, wait, behind: None });
        }
        self.changed.notify_all();
        // SAFETY: the word lies in the pool, which is page-locked until `drop` finds all streams behind their waits, or for ever.
        let waits = unsafe { stream.wait_flag(devices, word.as_ptr(), RAISED) };
        let (behind, all) = match waits {
            Waits::All(events) => (Some(events), true),
            Waits::None => (Some(Vec::new()), false),
            // Behind a wait that is there although it failed nothing can be known: its word is not used again.
            Waits::Some => (None, false),
        };
        let unused = {
            let mut state = self.state.lock();
            let flag = state.flags.iter_mut().find(|flag| flag.word == number);
            flag.and_then(|flag| {
                flag.behind = behind;
                // No stream waits: nothing to keep others from allocating for.
                flag.wait.take_if(|_| !all && flag.behind.is_some())
            })
        };
        drop(unused);
        all
    }

    /// The words stay page-locked for ever: a device that hangs may look at them.
    pub fn keep(&self) {
        if let Some(words) = self.words.get().cloned().flatten() {
            std::mem::forget(words);
        }
    }

    /// Nobody is left to raise flags: raises all, and refuses further waits. Saves that are waited for have failed by now.
    pub fn end(&self) {
        self.state.lock().ended = true;
        self.raise(|_| true);
    }

    /// As [`end`](Flags::end), if no stream waits for one.
    fn end_if_unused(&self) -> bool {
        let mut state = self.state.lock();
        state.ended |= state.flags.iter().all(|flag| flag.wait.is_none());
        state.ended
    }

    /// A word that no stream looks at.
    fn take(&self) -> Option<usize> {
        // The driver is asked without the lock, which the thread that raises needs.
        let raised = |flag: &Flag| flag.wait.is_none() && flag.behind.is_some();
        let asked: Vec<Flag> = self.state.lock().flags.extract_if(.., |flag| raised(flag)).collect();
        let reached = |event: &Event| event.reached().is_ok_and(|reached| reached);
        let passed = |flag: &Flag| flag.behind.iter().flatten().all(reached);
        let (over, waiting): (Vec<_>, Vec<_>) = asked.into_iter().partition(passed);
        let (word, ended) = {
            let mut state = self.state.lock();
            state.flags.extend(waiting);
            state.free.extend(over.iter().map(|flag| flag.word));
            let word = state.free.pop().or_else(|| {
                let word = state.given;
                state.given += usize::from(word < WORDS);
                (word < WORDS).then_some(word)
            });
            (word, std::mem::take(&mut state.over))
        };
        drop(ended);
        word
    }

    /// Raises the flags whose save `is_due`; returns how many are left waiting, and their earliest deadline.
    fn raise(&self, is_due: impl Fn(&Wait) -> bool) -> (usize, Option<Instant>) {
        let (mut left, mut earliest) = (0, None::<Instant>);
        let mut guard = self.state.lock();
        let state = &mut *guard;
        for flag in &mut state.flags {
            if let Some(Wait { save, .. }) = flag.wait.take_if(|wait| is_due(wait)) {
                if let Some(word) = self.word(flag.word) {
                    // The state was read, or its save has failed and what is still being read of it is never committed, as
                    // the save's lock has told; pairs with the stream's look, behind which that memory is written.
                    word.store(RAISED, Ordering::Release);
                }
                state.over.push(save);
            } else if let Some(wait) = &flag.wait {
                left += 1;
                earliest = earliest.into_iter().chain(wait.deadline).min();
            }
        }
        (left, earliest)
    }

    /// Some stream waits.
    pub fn are_waited_for(&self) -> bool {
        !self.waited_for(|_| true).is_empty()
    }

    /// Saves that streams wait for.
    fn waited_for(&self, which: impl Fn(&Wait) -> bool) -> Vec<Arc<SaveCore>> {
        let state = self.state.lock();
        let waits = state.flags.iter().filter_map(|flag| flag.wait.as_ref());
        waits.filter(|wait| which(wait)).map(|wait| wait.save.clone()).collect()
    }
}

impl Wait {
    fn is_late(&self) -> bool {
        self.deadline.is_some_and(|deadline| now() >= deadline)
    }
}

impl Drop for Flags {
    fn drop(&mut self) {
        let _relaxed = Relaxed::enter();
        let reached = |event: &Event| event.reached().is_ok_and(|reached| reached);
        let passed = |flag: &Flag| flag.behind.as_ref().is_some_and(|events| events.iter().all(reached));
        if !self.state.lock().flags.iter().all(passed) {
            self.keep();
        }
    }
}

/// The thread that raises flags. Should it or another thread of the engine die, [`Flags::end`] comes after the saves were ended.
pub(in crate::save) fn run_flags(shared: &Shared) {
    let flags = &shared.exchange.flags;
    let mut watch = Watch::new();
    let mut left = 0;
    loop {
        let ticket = flags.changed.ticket();
        // Its own thread, as the pump may be held up in the driver: by the stream that waits.
        flags.waited_for(Wait::is_late).iter().for_each(|save| save.doom(late()));
        if watch.is_held_up(&shared.exchange.beats, left > 0) {
            flags.waited_for(|_| true).iter().for_each(|save| save.doom(held_up()));
        }
        let early = shared.faults.stream_waits_for_nothing();
        let earliest;
        (left, earliest) = flags.raise(|wait| early || wait.save.lets_update());
        if left == 0 && shared.closing() && shared.all_ended() && flags.end_if_unused() {
            return;
        }
        let next_look = (left > 0).then(|| now() + LOOK);
        let _ = flags.changed.wait(ticket, earliest.into_iter().chain(next_look).min());
    }
}
