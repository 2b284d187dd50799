//! One device as the pump uses it: two streams and spare memory.
#![expect(unsafe_code, reason = "buffers are lent to a device's copy engines")]

use super::direct::{Hashing, HASH_BYTES};
use super::flight::{Flight, Mark};
use super::spare::Spare;
use crate::cuda::{free_memory, Copy, CopyList, Device, Direction, Event, Hasher, Stream, Word};
use crate::error::{Error, ErrorKind, Result};
use crate::sync::Arc;

/// Streams per device: while one copy ends, the next one runs.
const STREAMS: usize = 2;

/// `Auto` leaves so much of a device's memory, and so large a part of it, to the program.
const LEFT_BYTES: u64 = 1 << 30;
const LEFT_SHARE: u64 = 10;

pub(super) struct Lane {
    device: Arc<Device>,
    streams: Vec<Arc<Stream>>,
    turn: usize,
    spares: Vec<Spare>,
    hasher: Option<Hasher>,
}

impl Lane {
    pub fn new(device: &Arc<Device>) -> Result<Lane> {
        let streams = (0..STREAMS).map(|_| Stream::new(device).map(Arc::new)).collect::<Result<_>>()?;
        let device = device.clone();
        Ok(Lane { device, streams, turn: 0, spares: Vec::new(), hasher: None })
    }

    pub fn is_of(&self, device: &Arc<Device>) -> bool {
        Arc::ptr_eq(&self.device, device)
    }

    /// All copies that are enqueued from now on come after the events.
    pub fn wait(&self, events: &[Event]) -> Result<()> {
        self.streams.iter().try_for_each(|stream| events.iter().try_for_each(|event| stream.wait(event)))
    }

    /// Enqueues copies out of the device into the buffers that are lent to a flight; the event is reached when they are
    /// done. After an error some of them may run.
    pub fn fetch(&mut self, copies: &CopyList, _lent: &Flight) -> Result<Event> {
        // SAFETY: destinations are disjoint parts of the flight's buffers, which it keeps until all its events are reached
        // (or for ever); sources are the caller's memory, lent until the save is copied, which is told later, or a
        // spare, which the job keeps as long as it has flights.
        unsafe { self.copy(Direction::ToHost, copies.copies()) }
    }

    /// Enqueues copies out of the device to a place of a ring: behind what they wait for, and before what tells that they are done. After an
    /// error some of it may run.
    pub fn fetch_to_ring(&mut self, copies: &CopyList, free: Option<Word>, arrived: Word) -> Result<()> {
        self.turn = (self.turn + 1) % STREAMS;
        let stream = &self.streams[self.turn];
        if let Some(free) = free {
            // SAFETY: a word of the ring, whose flight keeps it until the stream has come past this, or for ever.
            unsafe { stream.wait_word(free) }?;
        }
        // SAFETY: destinations are disjoint parts of the place's buffers, which the ring keeps as its words: nobody reads them before the
        // copies have arrived, and these wait until nobody does any more, or nobody minds. Sources as of `fetch`.
        unsafe { stream.copy(Direction::ToHost, copies.copies()) }?;
        // SAFETY: as of the other word.
        unsafe { stream.write_word(arrived) }
    }

    /// Enqueues copies into spare memory of the device; the event is reached when they are done. After an error some of them may run.
    pub fn snapshot(&mut self, copies: &[Copy]) -> Result<Event> {
        // SAFETY: destinations are disjoint parts of a spare, which the job keeps as long as it has flights; sources are
        // the caller's memory, lent until the save is copied, which is told later.
        unsafe { self.copy(Direction::OnDevice, copies) }
    }

    /// All that is enqueued from now on comes after what was enqueued before. Returns what is reached then.
    pub fn join(&self) -> Result<Vec<Event>> {
        let events = self.mark_all()?;
        self.wait(&events)?;
        Ok(events)
    }

    /// Enqueues the hashing of chunks of a spare that a snapshot was taken into, and the copying of the hashes to a flight's one
    /// buffer; the event is reached when they are there. After an error some of it may run.
    pub fn hash(
        &mut self,
        spare: &Spare,
        hashing: &Hashing,
        chunk_bytes: u64,
        lent: &Flight,
    ) -> Result<Event> {
        let lacking = || Error::new(ErrorKind::Internal, "save", "no code to hash with was loaded");
        let event = Event::new(&self.device)?;
        self.turn = (self.turn + 1) % STREAMS;
        let (stream, hasher) = (&self.streams[self.turn], self.hasher.as_ref().ok_or_else(lacking)?);
        let (chunks, hashes) = (spare.address() + hashing.at, spare.address() + hashing.hashes);
        // SAFETY: parts of the spare that the layout keeps apart; the job keeps it as long as it has flights, and the lane is
        // dropped only when none is left, and forgotten where that is not sure. The snapshot came before.
        unsafe { hasher.hash(stream, chunks, chunk_bytes, hashing.count(), hashes) }?;
        let buffers = lent.chunks.iter().map(|(_, buffer)| buffer.as_ptr() as u64);
        let fetch: Vec<Copy> = buffers
            .map(|to| Copy { to, from: hashes, bytes: (HASH_BYTES * hashing.count()) as usize })
            .collect();
        // SAFETY: the flight keeps its buffer, in which the hashes fit, until the event is reached, or for ever.
        unsafe { stream.copy(Direction::ToHost, &fetch) }?;
        event.record(stream)?;
        Ok(event)
    }

    /// Loads the code that hashes, once.
    pub fn load_hasher(&mut self) -> Result<()> {
        if self.hasher.is_none() {
            self.hasher = Some(Hasher::new(&self.device)?);
        }
        Ok(())
    }

    /// Enqueues copies on the next stream.
    ///
    /// # Safety
    ///
    /// As [`Stream::copy`].
    unsafe fn copy(&mut self, direction: Direction, copies: &[Copy]) -> Result<Event> {
        let event = Event::new(&self.device)?;
        self.turn = (self.turn + 1) % STREAMS;
        let stream = &self.streams[self.turn];
        // SAFETY: the caller's promise.
        unsafe { stream.copy(direction, copies) }?;
        event.record(stream)?;
        Ok(event)
    }

    /// What tells that all that was enqueued is done, where no event could be recorded.
    pub fn when_idle(&self) -> impl Iterator<Item = Mark> + '_ {
        self.streams.iter().map(|stream| Mark::Idle(stream.clone()))
    }

    /// Events that are reached when all that was enqueued on the streams is done.
    pub fn mark_all(&self) -> Result<Vec<Event>> {
        let mark = |stream: &Arc<Stream>| {
            let event = Event::new(&self.device)?;
            event.record(stream)?;
            Ok(event)
        };
        self.streams.iter().map(mark).collect()
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
