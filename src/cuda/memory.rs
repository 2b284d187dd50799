//! Page-locked host memory and device memory.
#![expect(unsafe_code, reason = "calls of the driver")]

use core::ffi::c_void;

use super::api::{CUdeviceptr, SUCCESS};
use super::device::Device;
use super::stream::enter_to_drop;
use crate::error::{Error, ErrorKind, Result};
use crate::sync::Arc;

/// `CU_MEMHOSTREGISTER_PORTABLE` and `..._DEVICEMAP`: page-locked for all devices, which can address it.
const PORTABLE: u32 = 1 | 2;
/// `CU_POINTER_ATTRIBUTE_MEMORY_TYPE` and `..._DEVICE_ORDINAL`.
const MEMORY_TYPE: u32 = 2;
const DEVICE_ORDINAL: u32 = 9;
/// `CU_MEMORYTYPE_DEVICE`.
const TYPE_DEVICE: u32 = 2;

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

/// Which device the memory at an address belongs to; none where it is no device's. Asked in the context of `device`, as the
/// calling thread may have none.
pub fn owner_of(device: &Device, address: u64) -> Result<Option<u32>> {
    let _in_context = device.enter()?;
    let api = device.api;
    let ask = |attribute: u32| {
        let mut value = 0_u32;
        // SAFETY: both attributes are numbers of 32 bits; any address may be asked for.
        let code = unsafe { (api.pointer_attribute)((&raw mut value).cast::<c_void>(), attribute, address) };
        (code == SUCCESS).then_some(value)
    };
    match ask(MEMORY_TYPE) {
        Some(TYPE_DEVICE) => Ok(ask(DEVICE_ORDINAL)),
        _ => Ok(None),
    }
}
