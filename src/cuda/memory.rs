//! Page-locked host memory and device memory.
#![expect(unsafe_code, reason = "calls of the driver")]

use core::ffi::{c_uint, c_void};
use std::collections::BTreeMap;

use super::api::{CUdeviceptr, INVALID_CONTEXT, INVALID_VALUE};
use super::device::Device;
use super::stream::enter_to_drop;
use crate::error::{Error, ErrorKind, Result};
use crate::sync::Arc;

/// `CU_MEMHOSTREGISTER_PORTABLE` and `..._DEVICEMAP`: page-locked for all devices, which can address it.
const PORTABLE: u32 = 1 | 2;
/// `CU_POINTER_ATTRIBUTE_MEMORY_TYPE`, `..._DEVICE_ORDINAL`, `..._RANGE_START_ADDR` and `..._RANGE_SIZE`.
const MEMORY_TYPE: c_uint = 2;
const DEVICE_ORDINAL: c_uint = 9;
const RANGE_START: c_uint = 11;
const RANGE_BYTES: c_uint = 12;
/// `CU_MEMORYTYPE_DEVICE`.
const TYPE_DEVICE: u32 = 2;

/// More allocations than this are not remembered: a program that makes new ones for each save would add to them for ever.
const ALLOCATIONS_MAX: usize = 1 << 16;

/// Host memory that is page-locked for all devices, until this is dropped.
pub struct Registered {
    base: *mut u8,
    device: Arc<Device>,
}

// SAFETY: `base` is only handed to the driver.
unsafe impl Send for Registered {}
// SAFETY: as above.
unsafe impl Sync for Registered {}

impl Registered {
    /// Page-locks memory.
    ///
    /// # Safety
    ///
    /// It must stay mapped until the value is dropped.
    pub unsafe fn new(device: &Arc<Device>, base: *mut u8, len: usize) -> Result<Registered> {
        let _in_context = device.enter()?;
        // SAFETY: mapped, as the caller promises; the driver only pins it.
        let code = unsafe { (device.api.host_register)(base.cast::<c_void>(), len, PORTABLE) };
        device.api.check("page-lock the staging pool", code)?;
        Ok(Registered { base, device: device.clone() })
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        if let Some(_in_context) = enter_to_drop(&self.device) {
            // SAFETY: registered in `new`, and still mapped.
            let _ = unsafe { (self.device.api.host_unregister)(self.base.cast::<c_void>()) };
        }
    }
}

/// Memory of a device.
pub struct DeviceBuffer {
    address: CUdeviceptr,
    len: u64,
    device: Arc<Device>,
}

impl DeviceBuffer {
    /// Allocates; `OutOfMemory` where the device has not so much.
    pub fn new(device: &Arc<Device>, len: u64) -> Result<DeviceBuffer> {
        let too_large = || Error::new(ErrorKind::TooLarge, "allocate GPU memory", format!("{len} bytes"));
        let bytes = usize::try_from(len).map_err(|_| too_large())?;
        let _in_context = device.enter()?;
        let mut address = 0;
        // SAFETY: a place for an address; the context is entered.
        let code = unsafe { (device.api.memory_allocate)(&raw mut address, bytes) };
        device.api.check("allocate GPU memory", code)?;
        Ok(DeviceBuffer { address, len, device: device.clone() })
    }

    /// First byte, on the device.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
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
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        if let Some(_in_context) = enter_to_drop(&self.device) {
            // SAFETY: allocated in `new`; the driver waits for what still uses it.
            let _ = unsafe { (self.device.api.memory_free)(self.address) };
        }
    }
}

/// Bytes of the device that are free, and that it has.
pub fn free_memory(device: &Device) -> Result<(u64, u64)> {
    let _in_context = device.enter()?;
    let (mut free, mut total) = (0, 0);
    // SAFETY: two places for numbers; the context is entered.
    let code = unsafe { (device.api.memory_info)(&raw mut free, &raw mut total) };
    device.api.check("ask for free GPU memory", code)?;
    Ok((free as u64, total as u64))
}

/// Whose memory addresses are. The driver is asked once for each allocation: tensors share them, and each question is a call.
#[derive(Debug, Clone, Default)]
pub struct Owners {
    /// By their first bytes: the bytes behind the last, and whose they are.
    allocations: BTreeMap<u64, (u64, Option<u32>)>,
}

impl Owners {
    /// Which device the bytes from an address on belong to, as far as the driver was asked before.
    pub fn known(&self, address: u64, bytes: u64) -> Option<Option<u32>> {
        let end = address.saturating_add(bytes);
        let before = self.allocations.range(..=address).next_back();
        before.filter(|(_, &(behind, _))| end <= behind).map(|(_, &(_, owner))| owner)
    }

    /// Which device the bytes from an address on belong to; none where they are no device's. Asked in the context of `device`, as
    /// the calling thread may have none.
    pub fn of(&mut self, device: &Device, address: u64, bytes: u64) -> Result<Option<u32>> {
        if let Some(owner) = self.known(address, bytes) {
            return Ok(owner);
        }
        let (owner, start, len) = ask(device, address)?;
        // Where the driver does not tell the allocation, what is asked next is asked anew.
        self.allocations.insert(start, (start.saturating_add(len), owner));
        Ok(owner)
    }

    /// Refuses bytes of a tensor that are not the memory of the device that they are said to be: copies would read them without a
    /// word.
    pub fn check(&mut self, said: &Device, address: u64, bytes: u64) -> Result<()> {
        let found = self.of(said, address, bytes)?;
        if found == Some(said.ordinal()) {
            return Ok(());
        }
        let (said, found) = (said.ordinal(), Owners::describe(found));
        let message = format!("the tensor at {address:#x} is said to be on GPU {said}; that is {found}");
        Err(Error::new(ErrorKind::InvalidArgument, "begin save", message))
    }

    /// Takes over what another has found.
    pub fn learn(&mut self, other: &Owners) {
        if self.allocations.len() + other.allocations.len() > ALLOCATIONS_MAX {
            self.allocations.clear();
        }
        self.allocations.extend(&other.allocations);
    }

    /// What [`of`](Owners::of) found, for errors.
    pub fn describe(owner: Option<u32>) -> String {
        owner.map_or("no memory of a GPU".to_string(), |owner| format!("memory of GPU {owner}"))
    }
}

/// Whose memory an address is, and the first byte and size of its allocation.
fn ask(device: &Device, address: u64) -> Result<(Option<u32>, u64, u64)> {
    let _in_context = device.enter()?;
    let mut attributes = [MEMORY_TYPE, DEVICE_ORDINAL, RANGE_START, RANGE_BYTES];
    let (mut kind, mut ordinal, mut start, mut bytes) = (0_u32, 0_u32, 0_u64, 0_usize);
    let mut places: [*mut c_void; 4] =
        [(&raw mut kind).cast(), (&raw mut ordinal).cast(), (&raw mut start).cast(), (&raw mut bytes).cast()];
    let count = attributes.len() as c_uint;
    // SAFETY: a place of its type for each attribute; any address may be asked for.
    let code = unsafe {
        (device.api.pointer_attributes)(count, attributes.as_mut_ptr(), places.as_mut_ptr(), address)
    };
    // Of an address that it does not know the driver says so either by the type, which is none, or by these.
    if matches!(code, INVALID_VALUE | INVALID_CONTEXT) {
        return Ok((None, address, 0));
    }
    device.api.check("ask whose memory a tensor is", code)?;
    Ok(((kind == TYPE_DEVICE).then_some(ordinal), start, bytes as u64))
}
