//! One save as the pump sees it: what is to be copied from where, and how far that is.

use std::collections::BTreeMap;
use std::time::Instant;

use super::batch::Batch;
use super::direct::{DirectStorage, Hashing, Layout, HASH_BYTES};
use super::flight::Leaving;
use super::ring::Ring;
use super::spare::Spare;
use super::{Copies, DevicePart, NewJob, Snapshot};
use crate::cuda::gds::GdsFile;
use crate::cuda::{Copy, CopyList, Owners};
use crate::error::{Error, ErrorKind, Result};
use crate::save::core::SaveCore;
use crate::source::{DeviceSource, Source};
use crate::staging::StagingBuffer;
use crate::sync::Arc;

/// A save that does not end while this lives.
pub(super) struct Held(Arc<SaveCore>);

impl Held {
    /// Fails where the save has.
    pub fn new(save: Arc<SaveCore>) -> Result<Held> {
        // Taken over by `drop`.
        std::mem::forget(save.enter()?);
        Ok(Held(save))
    }

    pub fn save(&self) -> &Arc<SaveCore> {
        &self.0
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        drop(self.0.at_work());
    }
}

/// What a save fails with that has been on its way for too long.
pub(super) fn late() -> Error {
    Error::new(
        ErrorKind::TimedOut,
        "copy GPU memory",
        "the GPU has not finished copying the state in the time given at begin; the save has failed",
    )
    .advise("look for a stream that waits for something that never comes, or give a longer device timeout")
}

/// A chunk of which copies are to be made.
pub(super) struct Listed {
    pub chunk: u64,
    pub bytes: u64,
    /// So many of them are brought by devices; the others are in host memory.
    pub fetched: u64,
}

/// Buffers that are gathered until they are enough.
#[derive(Default)]
pub(super) struct Hoard {
    /// How many chunks they are for.
    pub chunks: u64,
    pub buffers: Vec<StagingBuffer>,
    /// When that began.
    pub since: Option<Instant>,
    /// When the last one came.
    pub grown_at: Option<Instant>,
}

pub(super) struct Job {
    pub held: Held,
    pub source: Option<Arc<DeviceSource>>,
    pub copies: Arc<Copies>,
    pub snapshot: Snapshot,
    pub flag_waits: bool,
    /// All its copies are to be enqueued at once.
    pub queues: bool,
    /// Buffers for that, as they come.
    pub hoard: Hoard,
    /// What was made of them, until all is enqueued.
    pub ring: Option<Arc<Ring>>,
    /// Copies of it wait for buffers that copiers have.
    pub waits_for_copiers: bool,
    /// None: never.
    pub deadline: Option<Instant>,
    /// Per device of the source, its lane. Empty: not begun.
    pub lanes: Vec<usize>,
    /// Per segment, where it is read that is a device's: the caller's memory or the spare.
    addresses: Vec<u64>,
    /// Per segment, whether it is known to be its device's memory still.
    checked: Vec<bool>,
    /// Whose memory the driver was asked about for this save.
    asked: Owners,
    /// Per lane that has one.
    pub spares: Vec<(usize, Arc<Spare>)>,
    pub direct_storage: DirectStorage,
    /// How its spare is laid out where chunks go directly from there; before it has one, how it would be.
    pub layout: Option<Layout>,
    /// Where they go then.
    pub file: Option<Arc<GdsFile>>,
    /// How many of them are hashed, or are being hashed.
    pub hashed: u64,
    /// With a snapshot in spare memory, and where all copies are to be enqueued at once: of chunks in which host memory
    /// stands between, that memory's bytes.
    pub kept: BTreeMap<u64, Vec<u8>>,
    /// Copies that are being enqueued.
    pub batch: Option<Batch>,
    next_chunk: u64,
    /// A chunk that a device brings, as was found before.
    peeked: Option<u64>,
    pub flights: u32,
    pub failed: bool,
    /// The staging pool is page-locked: copies into it do not hold up the thread that enqueues them.
    pub locked: bool,
}

impl Job {
    /// None where the save has ended already. `allows`: chunks can go directly, as far as is known.
    pub fn new(new: NewJob, allows: impl Fn(DirectStorage) -> bool) -> Option<Job> {
        let DevicePart { source, snapshot, direct_storage, flag_waits, timeout, asked, copies } = new.part;
        let deadline = new.save.begun.checked_add(timeout);
        let Ok(held) = Held::new(new.save) else {
            copies.failed();
            return None;
        };
        let mut addresses = vec![0; source.segment_count()];
        source.on_devices().for_each(|(segment, _, address, _)| addresses[segment] = address);
        let layout = (snapshot != Snapshot::Staging && allows(direct_storage))
            .then(|| Layout::of(&source, held.save().chunk_bytes).ok())
            .flatten();
        Some(Job {
            held,
            source: Some(source),
            copies,
            snapshot,
            flag_waits,
            queues: false,
            hoard: Hoard::default(),
            ring: None,
            waits_for_copiers: false,
            deadline,
            lanes: Vec::new(),
            checked: vec![false; addresses.len()],
            addresses,
            asked,
            spares: Vec::new(),
            direct_storage,
            layout,
            file: None,
            hashed: 0,
            kept: BTreeMap::new(),
            batch: None,
            next_chunk: 0,
            peeked: None,
            flights: 0,
            failed: false,
            locked: true,
        })
    }

    pub fn is_late(&self) -> bool {
        self.deadline.is_some_and(|deadline| Instant::now() >= deadline)
    }

    pub fn number(&self) -> u64 {
        self.held.save().claim.generation
    }

    pub fn source(&self) -> Result<Arc<DeviceSource>> {
        let gone = || Error::new(ErrorKind::Internal, "save", "the source is gone before its copies");
        self.source.clone().ok_or_else(gone)
    }

    /// Fails where the memory of a segment is not its device's any more.
    fn check_owner(&mut self, source: &DeviceSource, segment: usize) -> Result<()> {
        if !std::mem::replace(&mut self.checked[segment], true) {
            if let Some((device, address, bytes)) = source.memory_of(segment) {
                self.asked.check(device, address, bytes)?;
            }
        }
        Ok(())
    }

    fn span(&self, chunk: u64) -> (u64, usize) {
        let save = self.held.save();
        (chunk * save.chunk_bytes, save.chunk_len(chunk))
    }

    /// The next chunk that a device brings into the staging pool, if there is one.
    pub fn peek(&mut self) -> Option<u64> {
        let source = self.source.as_ref()?;
        let count = self.held.save().chunk_count;
        while self.next_chunk < count {
            let (offset, len) = self.span(self.next_chunk);
            let known = self.peeked == Some(self.next_chunk);
            if known || source.is_fetched(offset, len) && !self.goes_directly(self.next_chunk) {
                self.peeked = Some(self.next_chunk);
                return self.peeked;
            }
            self.next_chunk += 1;
        }
        None
    }

    fn goes_directly(&self, chunk: u64) -> bool {
        !self.spares.is_empty() && self.layout.as_ref().is_some_and(|layout| layout.holds(chunk))
    }

    /// The next chunks that go directly and are to be hashed, as many as have their hashes in so many bytes.
    pub fn next_to_hash(&self, bytes: usize) -> Option<Hashing> {
        let layout = self.layout.as_ref().filter(|_| !self.spares.is_empty())?;
        layout.next_to_hash(self.hashed, bytes as u64 / HASH_BYTES)
    }

    /// It waits for buffers to have all its copies enqueued.
    pub fn gathers(&mut self) -> bool {
        !self.failed && self.queues && self.ring.is_none() && self.peek().is_some()
    }

    /// On a device that another state is on, too, it has not begun, or copies out of the caller's memory are to be enqueued, or others find no
    /// room: they would come behind the stream of the other one.
    pub fn is_ahead_on(&mut self, other: &DeviceSource) -> bool {
        let Some(source) = self.source.clone().filter(|_| !self.failed) else { return false };
        let is_on = |device| source.devices().iter().any(|of| Arc::ptr_eq(of, device));
        let shares = other.devices().iter().any(is_on);
        shares
            && (self.lanes.is_empty()
                || self.batch.is_some()
                || self.spares.is_empty() && self.peek().is_some())
    }

    /// All copies are enqueued, and all hashing.
    pub fn is_enqueued(&mut self) -> bool {
        !self.lanes.is_empty()
            && self.batch.is_none()
            && self.peek().is_none()
            && self.next_to_hash(usize::MAX).is_none()
    }

    /// Puts what is in host memory of the next chunk into `buffer`, and adds what is to be copied to the lists, one for
    /// each device. Returns chunk and bytes.
    pub fn take_chunk(&mut self, buffer: &mut [u8], lists: &mut [CopyList]) -> Result<Option<(u64, u64)>> {
        let Some(Listed { chunk, bytes, fetched }) = self.list_chunk(buffer.as_ptr() as u64, lists)? else {
            return Ok(None);
        };
        if fetched < bytes {
            let (source, (offset, len)) = (self.source()?, self.span(chunk));
            match self.kept.remove(&chunk) {
                Some(kept) => source.place_host(offset, &mut buffer[..len], &kept),
                None => source.copy_host(offset, &mut buffer[..len])?,
            }
        }
        Ok(Some((chunk, bytes)))
    }

    /// Adds what is to be copied of the next chunk, into memory that begins at `to`, to the lists, one for each device.
    pub fn list_chunk(&mut self, to: u64, lists: &mut [CopyList]) -> Result<Option<Listed>> {
        let Some(chunk) = self.peek() else { return Ok(None) };
        let source = self.source()?;
        let (offset, len) = self.span(chunk);
        let mut fetched = 0;
        for fetch in source.fetches(offset, len) {
            self.check_owner(&source, fetch.segment)?;
            let from = self.addresses[fetch.segment] + fetch.skip;
            let copy = Copy { to: to + fetch.at as u64, from, bytes: fetch.bytes };
            // A spare is one memory, whatever lies in it.
            let of = if self.spares.is_empty() { fetch.segment as u64 } else { 0 };
            lists[fetch.device].push(of, copy);
            fetched += fetch.bytes as u64;
        }
        self.next_chunk += 1;
        Ok(Some(Listed { chunk, bytes: len as u64, fetched }))
    }

    /// How many chunks devices bring into the staging pool.
    pub fn chunks_to_fetch(&self) -> Result<u64> {
        let source = self.source()?;
        let is_fetched = |&chunk: &u64| {
            let (offset, len) = self.span(chunk);
            source.is_fetched(offset, len) && !self.goes_directly(chunk)
        };
        Ok((0..self.held.save().chunk_count).filter(is_fetched).count() as u64)
    }

    /// Whether copies can be enqueued without waiting for the caller's streams inside the driver.
    pub fn is_ready(&self) -> Result<bool> {
        if self.locked {
            return Ok(true);
        }
        // With a snapshot in spare memory: once that is there.
        if self.flights > 0 {
            return Ok(false);
        }
        let source = self.source()?;
        source.after().iter().try_fold(true, |ready, event| Ok(ready && event.reached()?))
    }

    /// Bytes of spare memory that a snapshot takes on each of the source's devices.
    pub fn spare_bytes(&self) -> Result<Vec<u64>> {
        if let Some(layout) = &self.layout {
            return Ok(vec![layout.spare_bytes()]);
        }
        let source = self.source()?;
        let mut bytes = vec![0; source.devices().len()];
        for (_, device, _, len) in source.on_devices() {
            bytes[device] += len as u64;
        }
        Ok(bytes)
    }

    /// From now on the segments are read in spare memory, one for each device, which the returned copies fill; what stands
    /// in host memory between them is copied at once. Also returns what leaves the caller's memory so.
    pub fn move_to_spares(&mut self, spares: Vec<(usize, Spare)>) -> Result<(Vec<CopyList>, Leaving)> {
        let source = self.source()?;
        let mut lists = vec![CopyList::default(); spares.len()];
        let mut ends: Vec<u64> = spares.iter().map(|(_, spare)| spare.address()).collect();
        // At once: however this ends they are given back with the job.
        self.spares = spares.into_iter().map(|(lane, spare)| (lane, Arc::new(spare))).collect();
        for (segment, device, from, bytes) in source.on_devices() {
            let to = match &self.layout {
                Some(layout) => ends[device] + layout.place(source.start_of(segment)),
                None => ends[device],
            };
            lists[device].push(segment as u64, Copy { to, from, bytes });
            self.check_owner(&source, segment)?;
            self.addresses[segment] = to;
            if self.layout.is_none() {
                ends[device] += bytes as u64;
            }
        }
        let mut leaving = Leaving::default();
        self.keep_host(usize::MAX)?;
        for chunk in 0..self.held.save().chunk_count {
            let (offset, len) = self.span(chunk);
            if source.is_fetched(offset, len) {
                leaving.chunks += 1;
                leaving.bytes += len as u64;
            }
        }
        Ok((lists, leaving))
    }

    /// Copies what stands in host memory between a device's. False, and nothing is kept, where that is more than `most` bytes.
    pub fn keep_host(&mut self, most: usize) -> Result<bool> {
        let source = self.source()?;
        let (mut kept, mut next) = (0, 0);
        for (first, behind) in source.in_host_memory() {
            let chunk_bytes = self.held.save().chunk_bytes;
            for chunk in (first / chunk_bytes).max(next)..behind.div_ceil(chunk_bytes) {
                next = chunk + 1;
                let (offset, len) = self.span(chunk);
                if !source.is_fetched(offset, len) {
                    continue;
                }
                let between = source.host_bytes(offset, len)?;
                kept += between.len();
                if kept > most {
                    self.kept.clear();
                    return Ok(false);
                }
                if !between.is_empty() {
                    self.kept.insert(chunk, between);
                }
            }
        }
        Ok(true)
    }
}
