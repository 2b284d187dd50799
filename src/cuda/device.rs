//! Devices and their primary contexts, which are those of CUDA's runtime and of PyTorch.
#![expect(unsafe_code, reason = "calls of the driver")]

use core::marker::PhantomData;

use super::api::{Api, CUcontext, CUdevice, CUevent};
use crate::error::{Error, ErrorKind, Result};
use crate::fork::ForkStamp;
use crate::sync::{Arc, Mutex, Weak};

const OP: &str = "open GPU";

/// How many queues of a device the driver spreads streams over; some programs set it to 1, to order kernels.
const CONNECTIONS: &str = "CUDA_DEVICE_MAX_CONNECTIONS";

/// Devices in use, by ordinal: all stores of a process share them.
static DEVICES: Mutex<Vec<Weak<Device>>> = Mutex::new(Vec::new());

/// A GPU, its primary context retained. Everything made of it keeps it.
pub struct Device {
    ordinal: u32,
    handle: CUdevice,
    context: CUcontext,
    pub(super) api: &'static Api,
    one_queue: bool,
    /// Events that nobody uses.
    events: Mutex<Vec<CUevent>>,
    stamp: ForkStamp,
}

// SAFETY: the driver's contexts and events may be used from any thread; nothing else of the struct is changed.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

impl Device {
    /// The device of that ordinal, as CUDA counts them in this process.
    ///
    /// # Errors
    ///
    /// `Unsupported` where there is no driver or no GPU; `InvalidArgument` for an ordinal that there is not; `Device`
    /// where the driver reports a failure.
    pub fn open(ordinal: u32) -> Result<Arc<Device>> {
        let mut devices = DEVICES.lock();
        devices.retain(|device| device.strong_count() > 0);
        let known = devices.iter().filter_map(Weak::upgrade);
        if let Some(device) =
            known.into_iter().find(|device| device.ordinal == ordinal && !device.is_forked())
        {
            return Ok(device);
        }
        let device = Arc::new(Device::retain(ordinal)?);
        devices.push(Arc::downgrade(&device));
        Ok(device)
    }

    fn retain(ordinal: u32) -> Result<Device> {
        let api = Api::get()?;
        let mut count = 0;
        // SAFETY: a place for a number.
        api.check(OP, unsafe { (api.device_count)(&raw mut count) })?;
        let index = i32::try_from(ordinal).ok().filter(|&index| index < count).ok_or_else(|| {
            let message = format!("there is no GPU {ordinal}: this process sees {count}");
            Error::new(ErrorKind::InvalidArgument, OP, message).advise("look at CUDA_VISIBLE_DEVICES")
        })?;
        let mut handle: CUdevice = 0;
        // SAFETY: a place for a device, and an ordinal that there is.
        api.check(OP, unsafe { (api.device_get)(&raw mut handle, index) })?;
        let mut context: CUcontext = core::ptr::null_mut();
        // SAFETY: a place for a context, and a device.
        api.check(OP, unsafe { (api.context_retain)(&raw mut context, handle) })?;
        // The driver has looked at it by now, too.
        let one_queue = std::env::var_os(CONNECTIONS).is_some_and(|number| number == "1");
        Ok(Device {
            ordinal,
            handle,
            context,
            api,
            one_queue,
            events: Mutex::new(Vec::new()),
            stamp: ForkStamp::now(),
        })
    }

    /// All streams share one queue of the device: what one waits for must not be enqueued behind its wait.
    pub fn has_one_queue(&self) -> bool {
        self.one_queue
    }

    /// Its streams can wait for words in memory and write some.
    pub fn has_words(&self) -> bool {
        self.api.words.is_some()
    }

    /// How the device addresses page-locked memory of the host.
    pub fn address_of(&self, memory: *const u8) -> Result<u64> {
        let _in_context = self.enter()?;
        let mut address = 0;
        // SAFETY: a place for an address; any may be asked for.
        let code = unsafe { (self.api.host_address)(&raw mut address, memory.cast_mut().cast(), 0) };
        self.api.check("address page-locked memory", code).map(|()| address)
    }

    /// An event that was let go of.
    pub(super) fn take_event(&self) -> Option<CUevent> {
        // A child's lock may be held for ever.
        if self.is_forked() {
            return None;
        }
        self.events.lock().pop()
    }

    /// An event that nobody uses any more.
    pub(super) fn keep_event(&self, event: CUevent) {
        if !self.is_forked() {
            self.events.lock().push(event);
        }
    }

    /// As CUDA counts devices in this process.
    pub fn ordinal(&self) -> u32 {
        self.ordinal
    }

    /// Makes its context the calling thread's, until the guard is dropped.
    pub fn enter(&self) -> Result<Entered<'_>> {
        self.stamp.check(OP)?;
        // SAFETY: retained as long as `self` lives.
        self.api.check("enter GPU context", unsafe { (self.api.context_push)(self.context) })?;
        Ok(Entered { device: self, _of_this_thread: PhantomData })
    }

    /// Whether a context is its own.
    pub(super) fn owns(&self, context: CUcontext) -> bool {
        self.context == context
    }

    /// In a forked child the driver cannot be used: what belongs to it is not given back there.
    pub(super) fn is_forked(&self) -> bool {
        self.stamp.is_forked()
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if !self.is_forked() {
            if let Ok(_in_context) = self.enter() {
                for event in self.events.lock().drain(..) {
                    // SAFETY: made in this context, and used by nobody.
                    let _ = unsafe { (self.api.event_destroy)(event) };
                }
            }
            // SAFETY: retained once in `retain`. What it answers changes nothing: the process may be ending.
            let _ = unsafe { (self.api.context_release)(self.handle) };
        }
    }
}

/// The calling thread is in a device's context; dropping returns it to the one before.
pub struct Entered<'a> {
    device: &'a Device,
    /// Contexts are a stack of each thread's own.
    _of_this_thread: PhantomData<*const ()>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let mut context: CUcontext = core::ptr::null_mut();
        // SAFETY: a place for a context; `enter` pushed one on this thread.
        let _ = unsafe { (self.device.api.context_pop)(&raw mut context) };
    }
}
