//! Whose turn it is at places that groups of chunks go through, filled by devices and emptied by copiers.
//!
//! A device and the host tell each other in words of memory how far they are, as neither can be waited for otherwise: of each place the host
//! says how many groups have passed through it, and each device how many have arrived. Every word has one writer, and its values only grow.

use crate::sync::atomic::{AtomicU32, Ordering};

/// A place that no group waits for: more than there are groups, by the devices' comparison, which takes numbers as going round.
const OPEN: u32 = i32::MAX as u32;

/// The words.
pub trait Words {
    /// Groups that have passed through a place: written by the host.
    fn passed(&self, place: usize) -> &AtomicU32;
    /// Groups that a device has brought to it.
    fn arrived(&self, place: usize, device: usize) -> &AtomicU32;
}

/// A place, and how many groups go there before this one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Turn {
    /// Which place.
    pub place: usize,
    /// Groups before.
    pub before: u32,
}

#[derive(Debug, Clone, Default)]
struct Place {
    /// Groups that were given to it.
    given: u32,
    /// Groups of these that have landed.
    landed: u32,
    /// Buffers that copiers have.
    out: usize,
}

/// The host's part: under one lock.
#[derive(Debug)]
pub struct Turns {
    places: Vec<Place>,
    /// Where the next group goes.
    next: usize,
    sealed: bool,
    opened: bool,
}

impl Turns {
    /// Turns at so many places.
    pub fn new(places: usize) -> Turns {
        Turns { places: vec![Place::default(); places], next: 0, sealed: false, opened: false }
    }

    /// The next group's turn. It counts from now on: should its copies fail half-way, the place is not used for anything else.
    pub fn give(&mut self) -> Turn {
        let place = self.next;
        self.next = (place + 1) % self.places.len();
        let of = &mut self.places[place];
        of.given += 1;
        Turn { place, before: of.given - 1 }
    }

    /// Whether a group is there that these devices bring: it counts as landed then. `early`: believed without the devices, as a fault.
    pub fn lands(
        &mut self,
        words: &impl Words,
        turn: Turn,
        mut devices: impl Iterator<Item = usize>,
        early: bool,
    ) -> bool {
        let of = &mut self.places[turn.place];
        if self.opened || of.out > 0 || of.landed != turn.before {
            return false;
        }
        // Pairs with the device's write, before which what it has copied can be seen.
        let arrived = |device| words.arrived(turn.place, device).load(Ordering::Acquire) > turn.before;
        if !early && !devices.all(arrived) {
            return false;
        }
        of.landed += 1;
        true
    }

    /// Copiers get so many of its buffers.
    pub fn take(&mut self, place: usize, buffers: usize) {
        self.places[place].out += buffers;
    }

    /// A copier has let go of a buffer. True where the place is not used any more.
    pub fn back(&mut self, words: &impl Words, place: usize) -> bool {
        self.places[place].out -= 1;
        self.pass(words, place)
    }

    /// Where copiers have none of its buffers: the place's next group may come. True where there is none any more.
    pub fn pass(&mut self, words: &impl Words, place: usize) -> bool {
        let of = &self.places[place];
        if self.opened || of.out > 0 {
            return false;
        }
        if self.sealed && of.landed == of.given {
            return true;
        }
        // What was read of the buffers comes before; pairs with the device's look, behind which it writes them.
        words.passed(place).store(of.landed, Ordering::Release);
        false
    }

    /// No more turns are given. Returns the places that are not used any more.
    pub fn seal(&mut self, words: &impl Words) -> Vec<usize> {
        self.sealed = true;
        (0..self.places.len()).filter(|&place| self.pass(words, place)).collect()
    }

    /// Nobody waits for places any more, and nothing lands.
    pub fn open(&mut self, words: &impl Words) {
        if !std::mem::replace(&mut self.opened, true) {
            for place in 0..self.places.len() {
                // Relaxed: nobody cares any more what is read of the buffers.
                words.passed(place).store(OPEN, Ordering::Relaxed);
            }
        }
    }

    /// It was opened.
    pub fn is_open(&self) -> bool {
        self.opened
    }
}
