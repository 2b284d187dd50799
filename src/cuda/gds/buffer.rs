//! Memory of a GPU that cuFile has pinned.
#![expect(unsafe_code, reason = "calls of cuFile")]

use core::ffi::c_void;

use super::api::{check, Gds};
use super::file::GdsFile;
use crate::cuda::device::Device;
use crate::cuda::stream::enter_to_drop;
use crate::error::{Error, ErrorKind, Result};
use crate::sync::Arc;

/// Memory of a device, registered with cuFile until this is dropped.
pub struct GdsBuffer {
    address: u64,
    len: usize,
    device: Arc<Device>,
    gds: &'static Gds,
}

impl GdsBuffer {
    /// Registers memory of the device. It takes as much of the GPU's BAR1 as the memory is long, for which there may be no
    /// room: what is not registered can be written all the same, through buffers of cuFile's own.
    ///
    /// # Safety
    ///
    /// The memory must stay allocated until the value is dropped.
    pub unsafe fn register(device: &Arc<Device>, address: u64, len: usize) -> Result<GdsBuffer> {
        const OP: &str = "register GPU memory with cuFile";
        let gds = Gds::get()?;
        // cuFile's calls on memory of a GPU must be made in a context.
        let _in_context = device.enter()?;
        // SAFETY: cuFile looks whether it is memory of a GPU; it stays so, as the caller promises.
        let status = unsafe { (gds.register_buffer)(address as *const c_void, len, 0) };
        check(OP, status).map_err(|error| error.within(&format!("{len} bytes at {address:#x}")))?;
        Ok(GdsBuffer { address, len, device: device.clone(), gds })
    }

    /// First byte, on the device.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// No bytes: never.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where it is.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Writes `len` bytes of it from `offset` on to the file at `file_offset`, as [`GdsFile::write`] does.
    ///
    /// # Safety
    ///
    /// The bytes are complete, in no stream's order, and nothing changes them during the call.
    pub unsafe fn write(&self, offset: u64, len: usize, file: &GdsFile, file_offset: u64) -> Result<()> {
        let end = offset.checked_add(len as u64);
        if end.is_none_or(|end| end > self.len as u64) {
            let message = format!(
                "expected a part of a buffer of {} bytes, found {len} bytes from {offset} on",
                self.len
            );
            return Err(
                Error::new(ErrorKind::InvalidArgument, "write by cuFile", message).at_offset(file_offset)
            );
        }
        // SAFETY: within the buffer, which is allocated, by `register`'s contract; the rest is the caller's promise.
        unsafe { file.write(&self.device, self.address, len, file_offset, offset) }
    }
}

impl Drop for GdsBuffer {
    fn drop(&mut self) {
        if self.gds.is_forked() {
            return;
        }
        if let Some(_in_context) = enter_to_drop(&self.device) {
            // SAFETY: registered in `register`, and written by nobody any more. What it answers changes nothing.
            let _ = unsafe { (self.gds.deregister_buffer)(self.address as *const c_void) };
        }
    }
}
