//! Bytes that arrived in staging buffers, on to the memory of GPUs.
#![expect(unsafe_code, reason = "buffers and destinations are lent to a device's copy engines")]

use std::collections::VecDeque;
use std::mem::{take, ManuallyDrop};
use std::time::{Duration, Instant};

use crate::cuda::{Copy, CopyList, Device, Direction, Event, Owners, Relaxed, Stream};
use crate::error::{Error, ErrorKind, Result};
use crate::staging::StagingBuffer;
use crate::store::Region;
use crate::sync::{thread, Arc};

/// A copy of one buffer that takes longer than this hangs.
const PATIENCE: Duration = Duration::from_secs(60);
/// Sleep after the first look at copies that are not done, and the longest one later. Every look takes a lock of the
/// driver's, which all reading threads and the copies themselves need.
const FIRST_PAUSE: Duration = Duration::from_micros(10);
const LONGEST_PAUSE: Duration = Duration::from_micros(50);
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
    /// Per device.
    lanes: Vec<Lane>,
    /// Of what was enqueued of the present buffer.
    marks: Vec<Mark>,
    /// Oldest first.
    late: VecDeque<Late>,
    _relaxed: Option<Relaxed>,
}

/// What the thread has for one device.
#[derive(Default)]
struct Lane {
    /// Once it was needed.
    stream: Option<Stream>,
    /// Copies of the present buffer that are not enqueued yet.
    list: CopyList,
    /// Events that were reached, to be recorded again.
    spare: Vec<Event>,
    /// Since when looks have met nothing but errors.
    failing: Option<Instant>,
}

/// Where the copies of one buffer to one device end.
struct Mark {
    device: usize,
    /// None: it could not be recorded behind them.
    event: Option<Event>,
}

/// A buffer that copies may still read.
struct Late {
    /// Given back only when the copies are known to have ended: however else this is dropped, the buffer is lost.
    buffer: ManuallyDrop<StagingBuffer>,
    marks: Vec<Mark>,
    since: Instant,
}

impl<'a> Uploads<'a> {
    pub fn new(targets: &'a Targets) -> Self {
        let count = targets.devices.len();
        Uploads {
            targets,
            lanes: (0..count).map(|_| Lane::default()).collect(),
            marks: Vec::new(),
            late: VecDeque::new(),
            // Where it is refused the copies will say why.
            _relaxed: (count > 0).then(Relaxed::enter).and_then(Result::ok),
        }
    }

    /// Adds a copy of bytes of the present buffer to a part's destination.
    pub fn add(&mut self, device: usize, part: usize, to: *mut u8, src: &[u8]) {
        let copy = Copy { to: to as u64, from: src.as_ptr() as u64, bytes: src.len() };
        self.lanes[device].list.push(part as u64, copy);
    }

    /// Enqueues what was added. Also after an error the buffer must stay as it is and be handed to [`Uploads::keep`].
    pub fn enqueue(&mut self) -> Result<()> {
        (0..self.lanes.len()).try_for_each(|device| self.enqueue_on(device))
    }

    fn enqueue_on(&mut self, device: usize) -> Result<()> {
        let (lane, target) = (&mut self.lanes[device], &self.targets.devices[device]);
        let copies = take(&mut lane.list);
        if copies.is_empty() {
            return Ok(());
        }
        let stream = match &mut lane.stream {
            Some(stream) => stream,
            none => none.insert(Stream::new(target)?),
        };
        let event = lane.spare.pop().map_or_else(|| Event::new(target), Ok)?;
        // SAFETY: the sources are in a staging buffer that the thread keeps and then hands to `keep`, from where it returns to
        // the pool only when the copies have ended; the destinations are disjoint memory of that device, lent by the
        // reader's caller until the read returns, which is when every thread has settled all that it enqueued.
        let copied = unsafe { stream.copy(Direction::ToDevice, copies.copies()) };
        let recorded = copied.and_then(|()| event.record(stream));
        self.marks.push(Mark { device, event: recorded.is_ok().then_some(event) });
        recorded
    }

    /// Takes the present buffer: back to the pool, or, where copies read it, until [`Uploads::settle`].
    pub fn keep(&mut self, buffer: StagingBuffer) {
        match take(&mut self.marks) {
            none if none.is_empty() => drop(buffer),
            marks => {
                let buffer = ManuallyDrop::new(buffer);
                self.late.push_back(Late { buffer, marks, since: Instant::now() });
            }
        }
    }

    /// How many buffers are kept for their copies.
    pub fn late(&self) -> usize {
        self.late.len()
    }

    /// Waits for the copies of the buffer that has been kept longest, and gives it back; where they hang it is lost.
    pub fn settle(&mut self) -> Result<()> {
        let Some(Late { buffer, marks, since }) = self.late.pop_front() else { return Ok(()) };
        let (mut ended, mut result) = (true, Ok(()));
        for Mark { device, event } in marks {
            let outcome = self.lanes[device].wait(event, since);
            ended &= outcome.is_ok();
            result = result.and(outcome.and_then(|end| end));
        }
        if ended {
            drop(ManuallyDrop::into_inner(buffer));
        }
        result
    }
}

impl Lane {
    /// Waits until copies have ended, and says how. The outer error: nobody knows when they will.
    fn wait(&mut self, event: Option<Event>, since: Instant) -> Result<Result<()>> {
        let (mut failure, mut pause) = (None, FIRST_PAUSE);
        loop {
            let reached = match (&event, &self.stream) {
                (Some(event), _) => event.reached(),
                // Nothing more is enqueued on a stream once that has failed: it comes to rest.
                (None, Some(stream)) => stream.idle(),
                (None, None) => Ok(true),
            };
            match reached {
                Ok(true) => {
                    self.failing = None;
                    self.spare.extend(event);
                    break;
                }
                Ok(false) => self.failing = None,
                Err(error) => {
                    failure.get_or_insert(error);
                    if self.failing.get_or_insert_with(Instant::now).elapsed() > LOST_AFTER {
                        break;
                    }
                }
            }
            if since.elapsed() > PATIENCE {
                let message = format!("a copy to the GPU was not done after {} s", PATIENCE.as_secs());
                return Err(Error::new(ErrorKind::Device, OP, message).advise("look at nvidia-smi"));
            }
            thread::sleep(pause);
            pause = LONGEST_PAUSE.min(pause * 3 / 2);
        }
        Ok(failure.map_or(Ok(()), Err))
    }
}
