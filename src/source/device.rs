//! Memory of GPUs as the source of a save, perhaps beside host memory.
#![expect(unsafe_code, reason = "host memory within is that of `HostSource`")]

use super::host::{HostSegment, HostSource, Run};
use super::Source;
use crate::cuda::{Device, Event};
use crate::error::{Error, ErrorKind, Result};
use crate::persist::ChunkHasher;
use crate::sync::Arc;

/// A payload of which some segments are in the memory of GPUs.
///
/// Copiers read the chunks that are in host memory alone. All others are brought by the devices' copy engines, once the
/// devices have reached the events that the caller's streams were marked with.
pub struct DeviceSource {
    /// Header and all segments. Those of devices are never read through it.
    host: HostSource,
    /// Per segment, the index of its device in `devices`; none: host memory.
    owners: Vec<Option<usize>>,
    /// Payload bytes of devices, first and behind the last, in order: every chunk of a save is looked up here.
    runs: Vec<(u64, u64)>,
    devices: Vec<Arc<Device>>,
    after: Vec<Event>,
}

type Piece = (usize, Run, Option<(usize, usize)>);

/// A piece of a chunk that a device is to bring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fetch {
    /// Index among [`DeviceSource::devices`].
    pub device: usize,
    /// Index of the segment.
    pub segment: usize,
    /// Bytes of the segment before the piece.
    pub skip: u64,
    /// Where it goes, from the chunk's start.
    pub at: usize,
    /// How many bytes.
    pub bytes: usize,
}

impl DeviceSource {
    /// A payload of `header` and `segments`, as [`HostSource::new`]; `owners` says which device of `devices` holds each
    /// segment. Nothing is copied before the events `after`.
    ///
    /// # Safety
    ///
    /// As [`HostSource::new`], for segments in host memory. Those of devices must be memory of that device, and from the
    /// events on unchanged until the source is dropped.
    pub unsafe fn new(
        header: Vec<u8>,
        segments: Vec<HostSegment>,
        owned: Vec<u8>,
        owners: Vec<Option<usize>>,
        devices: Vec<Arc<Device>>,
        after: Vec<Event>,
    ) -> Self {
        // SAFETY: the caller's promise; what is a device's is never read through it: see `readable`.
        let host = unsafe { HostSource::new(header, segments, owned) };
        let mut runs: Vec<(u64, u64)> = Vec::new();
        let of_devices = host.places().zip(&owners).filter(|(_, owner)| owner.is_some());
        for ((first, behind), _) in of_devices {
            match runs.last_mut().filter(|last| last.1 == first) {
                Some(last) => last.1 = behind,
                None => runs.push((first, behind)),
            }
        }
        DeviceSource { host, owners, runs, devices, after }
    }

    /// The devices that hold parts of it.
    pub fn devices(&self) -> &[Arc<Device>] {
        &self.devices
    }

    /// What the copies come after.
    pub fn after(&self) -> &[Event] {
        &self.after
    }

    /// Segments on devices: index of the segment, index of the device, address, bytes.
    pub fn on_devices(&self) -> impl Iterator<Item = (usize, usize, u64, usize)> + '_ {
        let segments = self.host.segments().iter().zip(&self.owners).enumerate();
        segments.filter_map(|(index, (segment, owner))| {
            owner.map(|device| (index, device, segment.ptr as u64, segment.len))
        })
    }

    /// Whose memory a segment of a device is: the device, address, bytes.
    pub fn memory_of(&self, segment: usize) -> Option<(&Arc<Device>, u64, u64)> {
        let HostSegment { ptr, len } = self.host.segments()[segment];
        self.owners[segment].map(|device| (&self.devices[device], ptr as u64, len as u64))
    }

    /// What devices hold of the payload: first bytes and the bytes behind the last, in order.
    pub fn runs(&self) -> &[(u64, u64)] {
        &self.runs
    }

    /// Where a segment begins in the payload.
    pub fn start_of(&self, segment: usize) -> u64 {
        self.host.start_of(segment)
    }

    /// How many segments there are, of devices and of the host.
    pub fn segment_count(&self) -> usize {
        self.owners.len()
    }

    /// What is in host memory: first bytes in the payload and bytes behind the last, in order.
    pub fn in_host_memory(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let segments = self.host.places().zip(&self.owners);
        let header = (0, self.host.header_bytes());
        std::iter::once(header).chain(segments.filter(|(_, owner)| owner.is_none()).map(|(place, _)| place))
    }

    /// Copies what is in host memory of the payload bytes from `offset` on to its place in `dst`.
    pub fn copy_host(&self, offset: u64, dst: &mut [u8]) -> Result<()> {
        for (at, run, owner) in self.pieces(offset, dst.len()) {
            if owner.is_none() {
                dst[at..at + run.len].copy_from_slice(self.host.bytes_of(&run)?);
            }
        }
        Ok(())
    }

    /// What is in host memory of the payload bytes `offset..offset + len`, one piece behind the other.
    pub fn host_bytes(&self, offset: u64, len: usize) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        for (_, run, owner) in self.pieces(offset, len) {
            if owner.is_none() {
                bytes.extend_from_slice(self.host.bytes_of(&run)?);
            }
        }
        Ok(bytes)
    }

    /// Puts what [`host_bytes`](DeviceSource::host_bytes) gave to its places in `dst`.
    pub fn place_host(&self, offset: u64, dst: &mut [u8], mut bytes: &[u8]) {
        for (at, run, _) in self.pieces(offset, dst.len()).filter(|(_, _, owner)| owner.is_none()) {
            let (piece, rest) = bytes.split_at(run.len);
            dst[at..at + run.len].copy_from_slice(piece);
            bytes = rest;
        }
    }

    /// What devices are to bring of the payload bytes `offset..offset + len`, in order.
    pub fn fetches(&self, offset: u64, len: usize) -> impl Iterator<Item = Fetch> + '_ {
        self.pieces(offset, len).filter_map(|(at, run, owner)| {
            let (device, segment) = owner?;
            Some(Fetch { device, segment, skip: run.skip, at, bytes: run.len })
        })
    }

    /// Contiguous pieces, in order: each with its place from `offset` on, and, of a device's, the device and the segment.
    fn pieces(&self, offset: u64, len: usize) -> impl Iterator<Item = Piece> + '_ {
        let mut done = 0;
        std::iter::from_fn(move || {
            if done == len {
                return None;
            }
            let run = self.host.locate(offset + done as u64, len - done);
            let at = done;
            done += run.len;
            let owner = run.segment.and_then(|segment| self.owners[segment].map(|device| (device, segment)));
            Some((at, run, owner))
        })
    }

    fn readable(&self, offset: u64, len: usize) -> Result<()> {
        match self.is_fetched(offset, len) {
            false => Ok(()),
            true => Err(Error::new(ErrorKind::Internal, "save", "a chunk on a GPU was read as host memory")),
        }
    }
}

impl Source for DeviceSource {
    fn fill(&self, offset: u64, dst: &mut [u8], hasher: &mut ChunkHasher, write_back: bool) -> Result<()> {
        self.readable(offset, dst.len())?;
        self.host.fill(offset, dst, hasher, write_back)
    }

    fn hash(&self, offset: u64, len: usize, hasher: &mut ChunkHasher) -> Result<()> {
        self.readable(offset, len)?;
        self.host.hash(offset, len, hasher)
    }

    fn is_fetched(&self, offset: u64, len: usize) -> bool {
        let end = offset + len as u64;
        let next = self.runs.partition_point(|&(_, behind)| behind <= offset);
        self.runs.get(next).is_some_and(|&(first, _)| first < end)
    }
}
