//! Spare memory of a device, which snapshots go to.
#![expect(unsafe_code, reason = "cuFile reads memory of the device")]

use crate::cuda::gds::{GdsBuffer, GdsFile};
use crate::cuda::{Device, DeviceBuffer};
use crate::error::{Error, ErrorKind, Result};
use crate::sync::Arc;

/// What cuFile does not take directly it copies first: its first byte is at a multiple of this, of which the driver promises
/// only a part.
const ALIGN_BYTES: u64 = 4096;

/// Memory of a device that belongs to the engine, and to one save at a time.
pub(crate) struct Spare {
    // Before the memory: dropped first.
    registered: Option<GdsBuffer>,
    memory: DeviceBuffer,
    len: u64,
}

impl Spare {
    pub fn new(device: &Arc<Device>, bytes: u64) -> Result<Spare> {
        let memory = DeviceBuffer::new(device, bytes.saturating_add(ALIGN_BYTES))?;
        Ok(Spare { registered: None, memory, len: bytes })
    }

    /// First byte, on the device.
    pub fn address(&self) -> u64 {
        self.memory.address().next_multiple_of(ALIGN_BYTES)
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Makes it known to cuFile, once.
    pub fn register(&mut self) -> Result<()> {
        if self.registered.is_none() {
            let bytes = usize::try_from(self.len()).unwrap_or(usize::MAX);
            // SAFETY: the memory lives as long as the field, which goes first.
            let buffer = unsafe { GdsBuffer::register(self.memory.device(), self.address(), bytes) }?;
            self.registered = Some(buffer);
        }
        Ok(())
    }

    /// Has cuFile write `bytes` of it from `at` on to a file.
    ///
    /// # Safety
    ///
    /// They have been copied there, in no stream's order any more, and stay as they are during the call.
    pub unsafe fn write(&self, at: u64, bytes: usize, file: &GdsFile, file_offset: u64) -> Result<()> {
        let unknown = || Error::new(ErrorKind::Internal, "save", "spare memory that cuFile does not know");
        // SAFETY: the caller's promise.
        unsafe { self.registered.as_ref().ok_or_else(unknown)?.write(at, bytes, file, file_offset) }
    }
}
