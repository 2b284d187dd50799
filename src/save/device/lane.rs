//! One device as the pump uses it: two streams and spare memory.
#![expect(unsafe_code, reason = "buffers are lent to a device's copy engines")]

use super::backlog::Backlog;
use super::direct::{Hashing, HASH_BYTES};
use super::flight::{Flight, Mark};
use super::spare::Spare;
use crate::cuda::{free_memory, Copy, Device, Direction, Event, Hasher, Word};
use crate::error::{Error, ErrorKind, Result};
use crate::sync::Arc;

/// Launch, copy and event.
const HASHING: usize = 3;

/// Streams per device: while one copy ends, the next one runs.
const STREAMS: usize = 2;

/// `Auto` leaves so much of a device's memory, and so large a part of it, to the program.
const LEFT_BYTES: u64 = 1 << 30;
const LEFT_SHARE: u64 = 10;

/// Words that copies to a ring are enqueued between.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Between {
    /// They wait for it.
    pub free: Option<Word>,
    /// It is written behind them.
    pub arrived: Option<Word>,
}

pub(super) struct Lane {
    device: Arc<Device>,
    streams: Vec<Backlog>,
    turn: usize,
    spares: Vec<Spare>,
    hasher: Option<Hasher>,
}

impl Lane {
    pub fn new(device: &Arc<Device>) -> Result<Lane> {
        let streams = (0..STREAMS).map(|_| Backlog::new(device)).collect::<Result<_>>()?;
        let device = device.clone();
        Ok(Lane { device, streams, turn: 0, spares: Vec::new(), hasher: None })
    }

    pub fn is_of(&self, device: &Arc<Device>) -> bool {
        Arc::ptr_eq(&self.device, device)
    }

    /// Whether all streams may be made to wait for so many events.
    pub fn has_room_to_wait(&mut self, events: usize) -> Result<bool> {
        self.streams.iter_mut().try_fold(true, |has, backlog| Ok(has && backlog.has_room(events)?))
    }

    /// All that is enqueued from now on comes after the events.
    pub fn wait<'a>(&mut self, events: impl Iterator<Item = &'a Event> + Clone) -> Result<()> {
        for backlog in &mut self.streams {
            for event in events.clone() {
                backlog.grow(1);
                backlog.stream.wait(event)?;
            }
        }
        Ok(())
    }

    /// Whose turn it is of the streams, if there is room for so much on one.
    fn stream_for(&mut self, operations: usize) -> Result<Option<usize>> {
        for turn in 1..=STREAMS {
            let next = (self.turn + turn) % STREAMS;
            if self.streams[next].has_room(operations)? {
                return Ok(Some(next));
            }
        }
        Ok(None)
    }

    /// Enqueues copies out of the device into the buffers that are lent to a flight; the event is reached when they are done. None where
    /// there is no room for them now. After an error some of them may run.
    pub fn fetch(&mut self, copies: &[Copy], _lent: &Flight) -> Result<Option<Arc<Event>>> {
        // SAFETY: destinations are disjoint parts of the flight's buffers, which it keeps until all its events are reached
        // (or for ever); sources are the caller's memory, lent until the save is copied, which is told later, or a
        // spare, which the job keeps as long as it has a batch or flights.
        unsafe { self.copy(Direction::ToHost, copies) }
    }

    /// Enqueues copies out of the device to a place of a ring, on the stream `on` where it is said, and returns on which. None where there is
    /// no room for them now. After an error some of it may run.
    pub fn fetch_to_ring(
        &mut self,
        copies: &[Copy],
        between: Between,
        on: Option<usize>,
    ) -> Result<Option<usize>> {
        let Between { free, arrived } = between;
        let operations = copies.len() + 3;
        let chosen = match on {
            Some(on) => self.streams[on].has_room(operations)?.then_some(on),
            None => self.stream_for(operations)?,
        };
        let Some(chosen) = chosen else { return Ok(None) };
        self.turn = chosen;
        let backlog = &mut self.streams[chosen];
        backlog.grow(operations - 1);
        if let Some(free) = free {
            // SAFETY: a word of the ring, which its job and then a flight keep until the stream has come past this, or for ever.
            unsafe { backlog.stream.wait_word(free) }?;
        }
        // SAFETY: destinations are disjoint parts of the place's buffers, which the ring keeps as its words: nobody reads them before the
        // copies have arrived, and these wait until nobody does any more, or nobody minds. Sources as of `fetch`.
        unsafe { backlog.stream.copy(Direction::ToHost, copies) }?;
        if let Some(arrived) = arrived {
            // SAFETY: as of the other word.
            unsafe { backlog.stream.write_word(arrived) }?;
        }
        backlog.mark()?;
        Ok(Some(chosen))
    }

    /// Enqueues copies into spare memory of the device; the event is reached when they are done. None where there is no room for them now.
    /// After an error some of them may run.
    pub fn snapshot(&mut self, copies: &[Copy]) -> Result<Option<Arc<Event>>> {
        // SAFETY: destinations are disjoint parts of a spare, which the job keeps as long as it has a batch or flights; sources
        // are the caller's memory, lent until the save is copied, which is told later.
        unsafe { self.copy(Direction::OnDevice, copies) }
    }

    /// Whether hashing may be enqueued.
    pub fn has_room_to_hash(&mut self) -> Result<bool> {
        self.stream_for(HASHING).map(|stream| stream.is_some())
    }

    /// Enqueues the hashing of chunks of a spare that a snapshot was taken into, and the copying of the hashes to a flight's one
    /// buffer; the event is reached when they are there. After an error some of it may run.
    pub fn hash(
        &mut self,
        spare: &Spare,
        hashing: &Hashing,
        chunk_bytes: u64,
        lent: &Flight,
    ) -> Result<Arc<Event>> {
        let lacking = || Error::new(ErrorKind::Internal, "save", "no code to hash with was loaded");
        self.turn = self.stream_for(HASHING)?.unwrap_or(self.turn);
        let hasher = self.hasher.as_ref().ok_or_else(lacking)?;
        let backlog = &mut self.streams[self.turn];
        backlog.grow(HASHING - 1);
        let (chunks, hashes) = (spare.address() + hashing.at, spare.address() + hashing.hashes);
        // SAFETY: parts of the spare that the layout keeps apart; the job keeps it as long as it has flights, and the lane is
        // dropped only when none is left, and forgotten where that is not sure. The snapshot came before.
        unsafe { hasher.hash(&backlog.stream, chunks, chunk_bytes, hashing.count(), hashes) }?;
        let buffers = lent.chunks.iter().map(|(_, buffer)| buffer.as_ptr() as u64);
        let fetch: Vec<Copy> = buffers
            .map(|to| Copy { to, from: hashes, bytes: (HASH_BYTES * hashing.count()) as usize })
            .collect();
        // SAFETY: the flight keeps its buffer, in which the hashes fit, until the event is reached, or for ever.
        unsafe { backlog.stream.copy(Direction::ToHost, &fetch) }?;
        backlog.mark()
    }

    /// Loads the code that hashes, once.
    pub fn load_hasher(&mut self) -> Result<()> {
        if self.hasher.is_none() {
            self.hasher = Some(Hasher::new(&self.device)?);
        }
        Ok(())
    }

    /// Enqueues copies on the next stream, if there is room.
    ///
    /// # Safety
    ///
    /// As [`Stream::copy`](crate::cuda::Stream::copy).
    unsafe fn copy(&mut self, direction: Direction, copies: &[Copy]) -> Result<Option<Arc<Event>>> {
        let Some(turn) = self.stream_for(copies.len() + 1)? else { return Ok(None) };
        self.turn = turn;
        let backlog = &mut self.streams[turn];
        backlog.grow(copies.len());
        // SAFETY: the caller's promise.
        unsafe { backlog.stream.copy(direction, copies) }?;
        backlog.mark().map(Some)
    }

    /// What tells that all that was enqueued is done, where no event could be recorded.
    pub fn when_idle(&self) -> impl Iterator<Item = Mark> + '_ {
        self.streams.iter().map(|backlog| Mark::Idle(backlog.stream.clone()))
    }

    /// What is reached when all that was enqueued is done.
    pub fn ends(&mut self) -> Result<Vec<Arc<Event>>> {
        self.streams.iter_mut().map(Backlog::mark).collect()
    }

    fn spare_for(&self, bytes: u64) -> Option<usize> {
        self.spares.iter().position(|spare| spare.len() >= bytes)
    }

    /// Spare memory for so many bytes: what an earlier save has left, or new; `modest`: only where enough is left to the
    /// program.
    pub fn take_spare(&mut self, bytes: u64, modest: bool) -> Result<Spare> {
        if let Some(at) = self.spare_for(bytes) {
            return Ok(self.spares.swap_remove(at));
        }
        // Too small for this state: room for the one that is needed.
        self.spares.clear();
        if modest {
            let (free, total) = free_memory(&self.device)?;
            if free < bytes.saturating_add(LEFT_BYTES.max(total / LEFT_SHARE)) {
                let message = format!("{bytes} bytes of spare memory, and {free} are free");
                return Err(Error::new(ErrorKind::OutOfMemory, "allocate GPU memory", message));
            }
        }
        Spare::new(&self.device, bytes)
    }

    pub fn return_spare(&mut self, spare: Spare) {
        self.spares.push(spare);
    }
}
