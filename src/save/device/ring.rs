//! A ring of staging buffers, for which all copies of a save are enqueued at once although it is smaller than the state.
//!
//! Groups of chunks go to its places in turn. A copy to a place that another group has before it waits, on the GPU, for a word of
//! page-locked memory: the host sets it when the copiers have let go of that group. Behind each group's copies the GPU sets a word that tells
//! that they have arrived. So once all is enqueued no call of the driver is needed until the state is copied: whatever holds up the driver, a
//! stream of the program that waits for the copies goes on.
#![expect(unsafe_code, reason = "words that devices write and wait for")]

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::time::Instant;

use super::job::late;
use super::{Arrived, Bytes, Exchange};
use crate::cuda::{Device, Word};
use crate::error::{Error, ErrorKind, Result};
use crate::save::core::SaveCore;
use crate::save::faults::Faults;
use crate::source::DeviceSource;
use crate::staging::{Lender, StagingBuffer, Turn, Turns, Words};
use crate::sync::atomic::{AtomicU32, Ordering};
use crate::sync::{now, Arc, Mutex};

/// No two words in one line of the cache.
const WORD_STRIDE: usize = 64;

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
    words: PinnedWords,
    group: usize,
    /// By number, whoever has the buffer.
    addresses: Vec<u64>,
    deadline: Option<Instant>,
    state: Mutex<State>,
}

struct State {
    turns: Turns,
    /// By number; none: a copier has it, or it is given back.
    buffers: Vec<Option<StagingBuffer>>,
    /// Of each place, groups whose copies are enqueued and that have not landed, oldest first.
    coming: Vec<VecDeque<Group>>,
    /// How many chunks have yet to land.
    chunks_to_come: u64,
    source: Option<Arc<DeviceSource>>,
    kept: BTreeMap<u64, Vec<u8>>,
    /// The GPU uses nothing of it any more.
    over: bool,
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
        let places = buffers.len().div_ceil(group).min(PinnedWords::most(&words, source.devices()));
        if places == 0 {
            return Err(Error::new(ErrorKind::Internal, "save", "a ring without a place"));
        }
        buffers.truncate(places * group);
        let addresses = buffers.iter().map(|buffer| buffer.as_ptr() as u64).collect();
        let words = PinnedWords::new(words, source.devices(), places)?;
        let state = State {
            turns: Turns::new(places),
            buffers: buffers.into_iter().map(Some).collect(),
            coming: (0..places).map(|_| VecDeque::new()).collect(),
            chunks_to_come: chunks,
            source: Some(source),
            kept,
            over: false,
        };
        Ok(Arc::new(Ring { save, words, group, addresses, deadline, state: Mutex::new(state) }))
    }

    // ---- for the pump, which enqueues ------------------------------------------------------------------

    /// Where the next group goes. It counts as given from now on: should copies to it fail half-way, the place is not used for anything else.
    pub fn give(&self) -> Turn {
        self.state.lock().turns.give()
    }

    /// For how many chunks it has buffers.
    pub fn chunks(&self) -> u64 {
        self.addresses.len() as u64
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
        let mut state = self.state.lock();
        state.coming[group.turn.place].push_back(group);
    }

    /// Nothing more will be enqueued: what has passed is given back.
    pub fn seal(&self) {
        let unused: Vec<_> = {
            let mut state = self.state.lock();
            let places = state.turns.seal(&self.words);
            places.into_iter().flat_map(|place| self.give_back(&mut state, place)).collect()
        };
        drop(unused);
    }

    /// All that arrives has been taken, or nothing will be: once the GPU has done all that was enqueued, the ring is over.
    pub fn may_end(&self) -> bool {
        let state = self.state.lock();
        state.turns.is_open() || state.coming.iter().all(VecDeque::is_empty)
    }

    /// The GPU uses nothing of it any more.
    pub fn end(&self) {
        let (buffers, source) = {
            let mut state = self.state.lock();
            state.over = true;
            state.coming.iter_mut().for_each(VecDeque::clear);
            let buffers: Vec<_> = state.buffers.iter_mut().filter_map(Option::take).collect();
            (buffers, state.source.take())
        };
        drop((buffers, source));
    }

    // ---- for the thread that lands -----------------------------------------------------------------------

    /// Takes what has arrived to the copiers; where the save has failed nothing is taken any more, nor waited for. True where something
    /// had arrived.
    pub fn land(self: &Arc<Self>, exchange: &Exchange, faults: &Faults) -> bool {
        if self.save.check().is_err() {
            self.open();
            return false;
        }
        let (mut landed, mut bytes) = (Vec::new(), 0);
        let (source, done) = {
            let mut state = self.state.lock();
            for place in 0..state.coming.len() {
                let State { turns, coming, .. } = &mut *state;
                let is_here = coming[place].front().is_some_and(|group| {
                    turns.lands(&self.words, group.turn, group.devices.iter().copied(), faults.land_early())
                });
                let Some(group) = is_here.then(|| coming[place].pop_front()).flatten() else { continue };
                bytes += group.bytes;
                state.chunks_to_come -= group.chunks.len() as u64;
                state.turns.take(place, group.chunks.len());
                if faults.free_places_early() {
                    self.words.passed(place).store(group.turn.before + 1, Ordering::Relaxed);
                }
                for (number, chunk) in self.numbers(place).zip(group.chunks) {
                    // At once: whatever comes, they come back here.
                    let buffer = state.buffers[number].take().map(|buffer| buffer.lend(self.clone(), number));
                    let kept = state.kept.remove(&chunk);
                    landed.extend(buffer.map(|buffer| (chunk, buffer, kept)));
                }
            }
            let done = if state.chunks_to_come == 0 { state.source.take() } else { None };
            (done.clone().or_else(|| state.source.clone()), done)
        };
        if landed.is_empty() {
            return false;
        }
        for (chunk, buffer, kept) in &mut landed {
            if let (Some(kept), Some(source)) = (kept, &source) {
                let len = self.save.chunk_len(*chunk);
                source.place_host(*chunk * self.save.chunk_bytes, &mut buffer[..len], kept);
            }
        }
        // Before `copied` is told; and that before copiers may make the save durable.
        drop((source, done));
        self.save.chunks_left(landed.len() as u64, bytes);
        for (chunk, buffer, _) in landed {
            let Ok(at_work) = self.save.enter() else { continue };
            // Taken over by the copier.
            std::mem::forget(at_work);
            exchange.arrive(Arrived { save: self.save.clone(), bytes: Bytes::Staged { chunk, buffer } });
        }
        true
    }

    /// A save that is not copied at its deadline fails.
    pub fn keep_deadline(&self) {
        if self.deadline.is_some_and(|deadline| now() >= deadline) {
            self.save.doom(late());
        }
    }

    /// Its copies may wait for copiers.
    pub fn waits(&self) -> bool {
        let state = self.state.lock();
        !state.over && !state.turns.is_open()
    }

    /// Lets all copies run, also into buffers that copiers still read, and takes nothing of what they bring: the save can only fail, and
    /// of a place that it had begun to write to nothing is believed then. So a stream that waits for the copies waits for no
    /// storage.
    pub fn open(&self) {
        self.state.lock().turns.open(&self.words);
    }

    // ---- inside ------------------------------------------------------------------------------------------

    /// Numbers of a place's buffers.
    fn numbers(&self, place: usize) -> Range<usize> {
        place * self.group..self.addresses.len().min((place + 1) * self.group)
    }

    /// What a place has, which is not used any more.
    fn give_back(&self, state: &mut State, place: usize) -> Vec<StagingBuffer> {
        state.buffers[self.numbers(place)].iter_mut().filter_map(Option::take).collect()
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
                match state.turns.back(&self.words, place) {
                    true => self.give_back(&mut state, place),
                    false => Vec::new(),
                }
            }
        };
        // They may wake somebody.
        drop(unused);
    }
}

/// The words, in page-locked memory.
struct PinnedWords {
    buffer: StagingBuffer,
    /// Where the buffer begins, as each device addresses it.
    bases: Vec<u64>,
}

impl PinnedWords {
    fn new(buffer: StagingBuffer, devices: &[Arc<Device>], places: usize) -> Result<PinnedWords> {
        let base = buffer.as_ptr();
        let bases = devices.iter().map(|device| device.address_of(base)).collect::<Result<_>>()?;
        let mut words = PinnedWords { buffer, bases };
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
}

impl Words for PinnedWords {
    fn passed(&self, place: usize) -> &AtomicU32 {
        self.word(place, 0)
    }

    fn arrived(&self, place: usize, device: usize) -> &AtomicU32 {
        self.word(place, 1 + device)
    }
}
