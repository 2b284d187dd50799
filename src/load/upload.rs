//! Bytes that arrived in staging buffers, on to the memory of GPUs.
#![expect(unsafe_code, reason = "buffers and destinations are lent to a device's copy engines")]

use std::time::{Duration, Instant};

use crate::cuda::{Copy, CopyList, Device, Direction, Event, Owners, Relaxed, Stream};
use crate::error::{Error, ErrorKind, Result};
use crate::store::Region;
use crate::sync::{thread, Arc};

/// A copy of one buffer that takes longer than this hangs.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long it is waited for without sleeping: most copies are done by the time that the buffer is verified.
const SPIN: Duration = Duration::from_micros(50);
const PAUSE: Duration = Duration::from_micros(20);
/// A device that reports nothing but errors for so long has stopped copying.
const LOST_AFTER: Duration = Duration::from_secs(1);

const OP: &str = "read to GPU";

/// The GPUs that a read has destinations on.
pub(super) struct Targets {
    devices: Vec<Arc<Device>>,
    owners: Owners,
}

impl Targets {
    /// Opens them, and has the staging pool page-locked for them.
    pub fn open(region: &Region, wanted: impl Iterator<Item = u32>) -> Result<Targets> {
        let mut ordinals: Vec<u32> = wanted.collect();
        ordinals.sort_unstable();
        ordinals.dedup();
        let _relaxed = (!ordinals.is_empty()).then(Relaxed::enter).transpose()?;
        let devices: Vec<_> = ordinals.into_iter().map(Device::open).collect::<Result<_>>()?;
        for device in &devices {
            // Where it is refused copies are slower.
            let _ = region.pool().register(device);
        }
        Ok(Targets { devices, owners: Owners::default() })
    }

    /// The index of a destination's device. Refuses memory that is not that device's.
    pub fn index_of(&mut self, ordinal: u32, address: u64, bytes: usize) -> Result<usize> {
        let at = self.devices.iter().position(|device| device.ordinal() == ordinal);
        let found = match at {
            Some(at) => self.owners.of(&self.devices[at], address, bytes as u64)?,
            None => None,
        };
        match at.filter(|_| found == Some(ordinal)) {
            Some(at) => Ok(at),
            None => {
                let found = Owners::describe(found);
                let message =
                    format!("the destination {address:#x} is said to be on GPU {ordinal}; that is {found}");
                Err(Error::new(ErrorKind::InvalidArgument, OP, message))
            }
        }
    }
}

/// The copies of one reading thread.
pub(super) struct Uploads<'a> {
    targets: &'a Targets,
    /// Per device, once it was needed.
    streams: Vec<Option<(Stream, Event)>>,
    /// Per device, copies of the present buffer that are not enqueued yet.
    lists: Vec<CopyList>,
    /// Per device, whether copies may be on their way.
    running: Vec<bool>,
    /// Per device, whether its event was recorded behind them.
    recorded: Vec<bool>,
    _relaxed: Option<Relaxed>,
}

impl<'a> Uploads<'a> {
    pub fn new(targets: &'a Targets) -> Self {
        let count = targets.devices.len();
        Uploads {
            targets,
            streams: (0..count).map(|_| None).collect(),
            lists: vec![CopyList::default(); count],
            running: vec![false; count],
            recorded: vec![false; count],
            // Where it is refused the copies will say why.
            _relaxed: (count > 0).then(Relaxed::enter).and_then(Result::ok),
        }
    }

    /// Adds a copy of bytes of the present buffer to a part's destination.
    pub fn add(&mut self, device: usize, part: usize, to: *mut u8, src: &[u8]) {
        let copy = Copy { to: to as u64, from: src.as_ptr() as u64, bytes: src.len() };
        self.lists[device].push(part as u64, copy);
    }

    /// Enqueues what was added. The buffer must stay as it is until [`Uploads::finish`] has succeeded.
    pub fn enqueue(&mut self) -> Result<()> {
        for device in 0..self.lists.len() {
            let copies = std::mem::take(&mut self.lists[device]);
            if copies.is_empty() {
                continue;
            }
            if self.streams[device].is_none() {
                let target = &self.targets.devices[device];
                self.streams[device] = Some((Stream::new(target)?, Event::new(target)?));
            }
            let Some((stream, event)) = &self.streams[device] else { continue };
            self.running[device] = true;
            // SAFETY: the sources are in a staging buffer that the thread keeps until `finish` has succeeded, or for ever;
            // the destinations are disjoint memory of that device, lent by the reader's caller until the read returns.
            let copied = unsafe { stream.copy(Direction::ToDevice, copies.copies()) };
            copied.and_then(|()| event.record(stream))?;
            self.recorded[device] = true;
        }
        Ok(())
    }

    /// Waits until what was enqueued is done.
    pub fn finish(&mut self) -> Result<()> {
        let mut result = Ok(());
        for device in 0..self.running.len() {
            if self.running[device] {
                result = result.and(self.finish_one(device));
            }
        }
        result
    }

    fn finish_one(&mut self, device: usize) -> Result<()> {
        let Some((stream, event)) = &self.streams[device] else { return Ok(()) };
        let began = Instant::now();
        let mut failure = None;
        loop {
            let done = match self.recorded[device] {
                true => event.reached(),
                // No event could be recorded behind what was enqueued.
                false => stream.idle(),
            };
            match done {
                Ok(true) => break,
                Ok(false) => {}
                Err(error) => {
                    failure.get_or_insert(error);
                    if began.elapsed() > LOST_AFTER {
                        break;
                    }
                }
            }
            if began.elapsed() > PATIENCE {
                let message = format!("a copy to the GPU was not done after {} s", PATIENCE.as_secs());
                return Err(Error::new(ErrorKind::Device, OP, message).advise("look at nvidia-smi"));
            }
            if began.elapsed() > SPIN {
                thread::sleep(PAUSE);
            }
        }
        (self.running[device], self.recorded[device]) = (false, false);
        failure.map_or(Ok(()), Err)
    }

    /// Copies may be on their way, and nobody knows when they end: the buffer is lost.
    pub fn hang(&self) -> bool {
        self.running.contains(&true)
    }
}
