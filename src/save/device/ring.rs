//! A ring of staging buffers, for which all copies of a save are enqueued at once although it is smaller than the state.
//!
//! Groups of chunks go to its places in turn. A copy to a place that another group has before it waits, on the GPU, for a word of
//! page-locked memory: the host sets it when the copiers have let go of that group. Behind each group's copies the GPU sets a word that tells
//! that they have arrived. So once all is enqueued no call of the driver is needed until the state is copied: whatever holds up the driver, a
//! stream of the program that waits for the copies goes on.
//!
//! Each word has one writer, and its values only grow: how many groups have passed through its place.
#![expect(unsafe_code, reason = "words that devices write and wait for")]

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::time::Instant;

use super::job::late;
use super::{Arrived, Bytes, Exchange};
use crate::cuda::{Device, Word};
use crate::error::{Error, ErrorKind, Result};
use crate::save::core::SaveCore;
use crate::source::DeviceSource;
use crate::staging::{Lender, StagingBuffer};
use crate::sync::atomic::{AtomicU32, Ordering};
use crate::sync::{now, Arc, Mutex};

/// No two words in one line of the cache.
const WORD_STRIDE: usize = 64;

/// A place that no group waits for: more than there are groups, by the device's comparison, which takes numbers as going round.
const OPEN: u32 = i32::MAX as u32;

/// What a ring is made of.
pub(super) struct RingParts {
    pub save: Arc<SaveCore>,
    pub source: Arc<DeviceSource>,
    /// Of chunks in which host memory stands between, that memory's bytes.
    pub kept: BTreeMap<u64, Vec<u8>>,
    /// How many chunks will come.
    pub chunks: u64,
    /// For the words.
    pub words: StagingBuffer,
    /// For the chunks.
    pub buffers: Vec<StagingBuffer>,
    /// Buffers of a place.
    pub group: usize,
    pub deadline: Option<Instant>,
}

/// See the module.
pub(super) struct Ring {
    save: Arc<SaveCore>,
    words: Words,
    group: usize,
    /// By number, whoever has the buffer.
    addresses: Vec<u64>,
    deadline: Option<Instant>,
    state: Mutex<State>,
}

struct State {
    places: Vec<Place>,
    /// By number; none: a copier has it, or it is given back.
    buffers: Vec<Option<StagingBuffer>>,
    /// Groups whose copies are enqueued and that have not landed, oldest first.
    coming: VecDeque<Group>,
    /// How many chunks have yet to land.
    chunks_to_come: u64,
    source: Option<Arc<DeviceSource>>,
    kept: BTreeMap<u64, Vec<u8>>,
    /// Nothing more will be enqueued.
    sealed: bool,
    /// Nobody waits for places any more, and nothing that arrives is taken.
    opened: bool,
    /// The GPU uses nothing of it any more.
    over: bool,
}

/// Buffers that a group of chunks goes to.
#[derive(Debug, Clone, Default)]
struct Place {
    /// Groups that were given to it.
    given: u32,
    /// Groups of these that have landed.
    landed: u32,
    /// Buffers that copiers have.
    out: usize,
}

/// A place, and which one of the groups that go there this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Turn {
    place: usize,
    before: u32,
}

/// Chunks whose copies were enqueued together.
#[derive(Debug)]
pub(super) struct Group {
    pub turn: Turn,
    /// Each goes to the place's next buffer.
    pub chunks: Vec<u64>,
    /// Which of the source's devices bring them.
    pub devices: Vec<usize>,
    pub bytes: u64,
}

impl Ring {
    /// A ring of as many places as there are buffers and words for.
    pub fn new(parts: RingParts) -> Result<Arc<Ring>> {
        let RingParts { save, source, kept, chunks, words, mut buffers, group, deadline } = parts;
        // The last one may be smaller.
        let places = buffers.len().div_ceil(group).min(Words::most(&words, source.devices()));
        if places == 0 {
            return Err(Error::new(ErrorKind::Internal, "save", "a ring without a place"));
        }
        buffers.truncate(places * group);
        let addresses = buffers.iter().map(|buffer| buffer.as_ptr() as u64).collect();
        let words = Words::new(words, source.devices(), places)?;
        let state = State {
            places: vec![Place::default(); places],
            buffers: buffers.into_iter().map(Some).collect(),
            coming: VecDeque::new(),
            chunks_to_come: chunks,
            source: Some(source),
            kept,
            sealed: false,
            opened: false,
            over: false,
        };
        Ok(Arc::new(Ring { save, words, group, addresses, deadline, state: Mutex::new(state) }))
    }

    // ---- for the pump, which enqueues ------------------------------------------------------------------

    /// Where the group with that number goes. It counts as given from now on: should copies to it fail half-way, the place is not used for
    /// anything else.
    pub fn give(&self, number: usize) -> Turn {
        let mut state = self.state.lock();
        let place = number % state.places.len();
        let before = state.places[place].given;
        state.places[place].given += 1;
        Turn { place, before }
    }

    /// First bytes of the place's buffers.
    pub fn addresses(&self, turn: Turn) -> &[u64] {
        &self.addresses[self.numbers(turn.place)]
    }

    /// What a device's copies of that group wait for; none where the place was never used.
    pub fn is_free(&self, device: usize, turn: Turn) -> Option<Word> {
        let word = self.words.address(device, turn.place, 0);
        (turn.before > 0).then_some(Word { address: word, value: turn.before })
    }

    /// What a device tells when its copies of that group are done.
    pub fn has_arrived(&self, device: usize, turn: Turn) -> Word {
        let word = self.words.address(device, turn.place, 1 + device);
        Word { address: word, value: turn.before + 1 }
    }

    /// All copies of a group are enqueued.
    pub fn comes(&self, group: Group) {
        self.state.lock().coming.push_back(group);
    }

    /// Nothing more will be enqueued: what has passed is given back.
    pub fn seal(&self) {
        let mut unused = Vec::new();
        let mut state = self.state.lock();
        state.sealed = true;
        for place in 0..state.places.len() {
            unused.extend(self.pass(&mut state, place));
        }
        drop(state);
        drop(unused);
    }

    /// All that arrives has been taken, or nothing will be: once the GPU has done all that was enqueued, the ring is over.
    pub fn may_end(&self) -> bool {
        let failed = self.save.check().is_err();
        let state = self.state.lock();
        failed || state.opened || state.coming.is_empty()
    }

    /// The GPU uses nothing of it any more.
    pub fn end(&self) {
        let (buffers, source) = {
            let mut state = self.state.lock();
            state.over = true;
            state.coming.clear();
            let buffers: Vec<_> = state.buffers.iter_mut().filter_map(Option::take).collect();
            (buffers, state.source.take())
        };
        drop((buffers, source));
    }

    // ---- for the thread that lands -----------------------------------------------------------------------

    /// Takes what has arrived to the copiers, or drops it where the save has failed. True where something had. `early`: whether or not
    /// it has, as a fault.
    pub fn land(self: &Arc<Self>, exchange: &Exchange, early: bool) -> bool {
        let failed = self.save.check().is_err();
        let (mut landed, mut chunks, mut bytes) = (Vec::new(), 0, 0);
        let (mut moved, mut unused) = (false, Vec::new());
        let (source, done) = {
            let mut state = self.state.lock();
            let mut at = 0;
            // The next group of each place is among so many.
            while at < state.coming.len().min(state.places.len()) {
                let group = &state.coming[at];
                let place = &state.places[group.turn.place];
                let is_next = place.out == 0 && place.landed == group.turn.before;
                if state.opened || !is_next || !early && !self.words.tell_arrival(group) {
                    at += 1;
                    continue;
                }
                let Some(group) = state.coming.remove(at) else { break };
                moved = true;
                let place = group.turn.place;
                state.places[place].landed += 1;
                state.chunks_to_come -= group.chunks.len() as u64;
                if failed {
                    unused.extend(self.pass(&mut state, place));
                    continue;
                }
                chunks += group.chunks.len() as u64;
                bytes += group.bytes;
                state.places[place].out += group.chunks.len();
                for (number, chunk) in self.numbers(place).zip(group.chunks) {
                    let buffer = state.buffers[number].take();
                    let kept = state.kept.remove(&chunk);
                    landed.extend(buffer.map(|buffer| (number, chunk, buffer, kept)));
                }
            }
            let source = state.source.clone();
            // Before `copied` is told.
            let done = if state.chunks_to_come == 0 { state.source.take() } else { None };
            (source, done)
        };
        drop(unused);
        for (number, chunk, mut buffer, kept) in landed {
            if let (Some(kept), Some(source)) = (kept, &source) {
                let len = self.save.chunk_len(chunk);
                source.place_host(chunk * self.save.chunk_bytes, &mut buffer[..len], &kept);
            }
            let buffer = buffer.lend(self.clone(), number);
            let Ok(at_work) = self.save.enter() else { continue };
            // Taken over by the copier.
            std::mem::forget(at_work);
            exchange.arrive(Arrived { save: self.save.clone(), bytes: Bytes::Staged { chunk, buffer } });
        }
        drop((source, done));
        if chunks > 0 {
            self.save.chunks_left(chunks, bytes);
        }
        moved
    }

    /// At its deadline the save fails, and nothing waits for its copiers any more.
    pub fn keep_deadline(&self) {
        let is_due = self.deadline.is_some_and(|deadline| now() >= deadline);
        if is_due && self.state.lock().chunks_to_come > 0 {
            self.save.doom(late());
            self.open();
        }
    }

    /// Lets all copies run, also into buffers that copiers may still read, and takes nothing of what they bring: the save can only fail, and
    /// then nothing is believed of what it has written.
    pub fn open(&self) {
        let mut state = self.state.lock();
        if std::mem::replace(&mut state.opened, true) {
            return;
        }
        for place in 0..state.places.len() {
            // Relaxed: what was read of the buffers is worthless.
            self.words.free(place).store(OPEN, Ordering::Relaxed);
        }
    }

    // ---- inside ------------------------------------------------------------------------------------------

    /// Numbers of a place's buffers.
    fn numbers(&self, place: usize) -> Range<usize> {
        place * self.group..self.addresses.len().min((place + 1) * self.group)
    }

    /// All buffers of a place are here: its next group may come, or they are given back.
    fn pass(&self, state: &mut State, place: usize) -> Vec<StagingBuffer> {
        let of = &state.places[place];
        if state.opened || of.out > 0 {
            return Vec::new();
        }
        if state.sealed && of.landed == of.given {
            return state.buffers[self.numbers(place)].iter_mut().filter_map(Option::take).collect();
        }
        // What was read of the buffers comes before; pairs with the stream's look, behind which they are written.
        self.words.free(place).store(of.landed, Ordering::Release);
        Vec::new()
    }
}

impl Lender for Ring {
    fn take_back(&self, number: usize, buffer: StagingBuffer) {
        let unused = {
            let mut state = self.state.lock();
            if state.over {
                vec![buffer]
            } else {
                let place = number / self.group;
                state.buffers[number] = Some(buffer);
                state.places[place].out -= 1;
                self.pass(&mut state, place)
            }
        };
        // They may wake somebody.
        drop(unused);
    }
}

/// Words of page-locked memory: of each place one that the host writes, and one that each device writes.
struct Words {
    buffer: StagingBuffer,
    /// Where the buffer begins, as each device addresses it.
    bases: Vec<u64>,
}

impl Words {
    fn new(buffer: StagingBuffer, devices: &[Arc<Device>], places: usize) -> Result<Words> {
        let base = buffer.as_ptr();
        let bases = devices.iter().map(|device| device.address_of(base)).collect::<Result<_>>()?;
        let mut words = Words { buffer, bases };
        let end = words.offset(places, 0);
        words.buffer[..end].fill(0);
        Ok(words)
    }

    /// How many places there are words for.
    fn most(buffer: &StagingBuffer, devices: &[Arc<Device>]) -> usize {
        buffer.len() / (WORD_STRIDE * (1 + devices.len()))
    }

    fn offset(&self, place: usize, which: usize) -> usize {
        (place * (1 + self.bases.len()) + which) * WORD_STRIDE
    }

    /// Word `which` of a place, as a device addresses it.
    fn address(&self, device: usize, place: usize, which: usize) -> u64 {
        self.bases[device] + self.offset(place, which) as u64
    }

    fn word(&self, place: usize, which: usize) -> &AtomicU32 {
        let at = self.buffer.as_ptr().wrapping_add(self.offset(place, which)).cast::<u32>().cast_mut();
        // SAFETY: aligned, and inside of the buffer, as `most` bounds the places; the buffer is this one's as long as it lives, and nobody
        // accesses it but through these, and devices by whole words.
        unsafe { AtomicU32::from_ptr(at) }
    }

    /// Groups that have passed through a place.
    fn free(&self, place: usize) -> &AtomicU32 {
        self.word(place, 0)
    }

    /// All devices that bring a group say that it has arrived.
    fn tell_arrival(&self, group: &Group) -> bool {
        let arrived = |&device: &usize| {
            // Pairs with the device's write, before which what it has copied can be seen.
            self.word(group.turn.place, 1 + device).load(Ordering::Acquire) > group.turn.before
        };
        group.devices.iter().all(arrived)
    }
}
