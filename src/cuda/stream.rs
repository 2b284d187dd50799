//! Streams and events.
#![expect(unsafe_code, reason = "calls of the driver")]

use super::api::{self, CUcontext, CUevent, CUstream};
use super::device::{Device, Entered};
use crate::error::{Error, ErrorKind, Result};
use crate::sync::Arc;

/// `CU_STREAM_NON_BLOCKING`: takes no part in the ordering of the legacy default stream.
const NON_BLOCKING: u32 = 1;
/// `CU_EVENT_DISABLE_TIMING`.
const NO_TIMING: u32 = 2;
/// `CU_STREAM_WAIT_VALUE_GEQ`.
const WAIT_GREATER_OR_EQUAL: u32 = 0;

/// `CU_STREAM_WRITE_VALUE_DEFAULT`.
const WRITE_IN_ORDER: u32 = 0;

const OP_WORDS: &str = "order copies and buffers";

/// A stream of the engine. It never waits for the legacy default stream, nor that one for it.
pub struct Stream {
    pub(super) handle: CUstream,
    device: Arc<Device>,
}

// SAFETY: streams may be used from any thread.
unsafe impl Send for Stream {}
// SAFETY: as above: each call of the driver on a stream takes its own lock.
unsafe impl Sync for Stream {}

impl Stream {
    /// A new stream of the device.
    pub fn new(device: &Arc<Device>) -> Result<Stream> {
        let _in_context = device.enter()?;
        let mut handle: CUstream = core::ptr::null_mut();
        // SAFETY: a place for a stream; its context is entered.
        let code = unsafe { (device.api.stream_create)(&raw mut handle, NON_BLOCKING, 0) };
        device.api.check("create stream", code)?;
        Ok(Stream { handle, device: device.clone() })
    }

    /// The device that it belongs to.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Whether everything that was enqueued has been done. An error says that the device has failed: nothing more will be.
    pub fn idle(&self) -> Result<bool> {
        let _in_context = self.device.enter()?;
        // SAFETY: it lives.
        match unsafe { (self.device.api.stream_query)(self.handle) } {
            api::NOT_READY => Ok(false),
            code => self.device.api.check("look at stream", code).map(|()| true),
        }
    }

    /// What is enqueued from now on runs after what the event was recorded behind. The event may be another device's.
    pub fn wait(&self, event: &Event) -> Result<()> {
        let _in_context = self.device.enter()?;
        // SAFETY: both live.
        let code = unsafe { (self.device.api.stream_wait_event)(self.handle, event.handle, 0) };
        self.device.api.check("order copies", code)
    }

    /// What is enqueued from now on runs once the word holds `word.value` or has come past it.
    ///
    /// # Safety
    ///
    /// The word is page-locked until the stream has come past this.
    pub unsafe fn wait_word(&self, word: Word) -> Result<()> {
        let calls = self.device.api.words.ok_or_else(lacking_words)?;
        let _in_context = self.device.enter()?;
        // SAFETY: the caller's promise.
        let code = unsafe { (calls.wait)(self.handle, word.address, word.value, WAIT_GREATER_OR_EQUAL) };
        self.device.api.check(OP_WORDS, code)
    }

    /// Once everything that was enqueued is done, and can be seen by whoever sees this, the word is set.
    ///
    /// # Safety
    ///
    /// The word is page-locked until the stream has come past this, and nobody else writes it.
    pub unsafe fn write_word(&self, word: Word) -> Result<()> {
        let calls = self.device.api.words.ok_or_else(lacking_words)?;
        let _in_context = self.device.enter()?;
        // SAFETY: the caller's promise.
        let code = unsafe { (calls.write)(self.handle, word.address, word.value, WRITE_IN_ORDER) };
        self.device.api.check(OP_WORDS, code)
    }
}

/// A word of page-locked memory, as a device addresses it, and a value of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Word {
    /// Where it is, a multiple of 4.
    pub address: u64,
    /// What it is to hold.
    pub value: u32,
}

fn lacking_words() -> Error {
    Error::new(ErrorKind::Unsupported, OP_WORDS, "the driver knows no words that streams wait for")
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Some(_in_context) = enter_to_drop(&self.device) {
            // SAFETY: made by `new`, used by nobody any more; what was enqueued still runs.
            let _ = unsafe { (self.device.api.stream_destroy)(self.handle) };
        }
    }
}

/// The context in which something is given back; none where that is impossible.
pub(super) fn enter_to_drop(device: &Device) -> Option<Entered<'_>> {
    if device.is_forked() {
        return None;
    }
    device.enter().ok()
}

/// A point in a stream, which is reached or not.
///
/// Dropping it makes no call of the driver, which may hold up a thread that must not be: the device keeps it for the next one.
pub struct Event {
    handle: CUevent,
    device: Arc<Device>,
}

// SAFETY: events may be used from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// An event of the device, to be recorded.
    pub fn new(device: &Arc<Device>) -> Result<Event> {
        if let Some(handle) = device.take_event() {
            return Ok(Event { handle, device: device.clone() });
        }
        let _in_context = device.enter()?;
        let mut handle: CUevent = core::ptr::null_mut();
        // SAFETY: a place for an event; its context is entered.
        let code = unsafe { (device.api.event_create)(&raw mut handle, NO_TIMING) };
        device.api.check("create event", code)?;
        Ok(Event { handle, device: device.clone() })
    }

    /// The device that it belongs to.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Moves it behind everything that was enqueued on the stream so far. Waits that were enqueued before are for the
    /// place where it was then.
    pub fn record(&self, stream: &Stream) -> Result<()> {
        let _in_context = self.device.enter()?;
        // SAFETY: both live.
        let code = unsafe { (self.device.api.event_record)(self.handle, stream.handle) };
        self.device.api.check("record event", code)
    }

    /// Whether everything before it has been done. An error says that the device has failed: nothing more will be done.
    pub fn reached(&self) -> Result<bool> {
        let _in_context = self.device.enter()?;
        // SAFETY: it lives.
        match unsafe { (self.device.api.event_query)(self.handle) } {
            api::NOT_READY => Ok(false),
            code => self.device.api.check("look at event", code).map(|()| true),
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // Waits that were enqueued for it stay what they are when it is recorded anew.
        self.device.keep_event(self.handle);
    }
}

/// A stream of the program, by its handle (`CUstream`, `cudaStream_t`); null is the legacy default stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UserStream(*mut core::ffi::c_void);

// SAFETY: a handle, which is only handed to the driver.
unsafe impl Send for UserStream {}
// SAFETY: as above.
unsafe impl Sync for UserStream {}

impl UserStream {
    /// The stream of that handle.
    ///
    /// # Safety
    ///
    /// It must be a live stream of a primary context (CUDA's runtime and PyTorch make no others), or one of the driver's
    /// names for a default stream (null, 1, 2), whenever this value is used.
    pub unsafe fn new(handle: *mut core::ffi::c_void) -> UserStream {
        UserStream(handle)
    }

    fn handle(self) -> CUstream {
        self.0.cast()
    }

    /// Whether it is one of the names for a default stream, which every device has.
    fn is_default(self) -> bool {
        self.0 as usize <= 2
    }

    /// Records new events behind everything that was enqueued on it so far: one, or, of a default stream, one on each of the
    /// devices.
    ///
    /// # Errors
    ///
    /// `InvalidArgument` where it is a stream of none of the devices, `InvalidState` while it captures a graph.
    pub fn marks(self, devices: &[Arc<Device>]) -> Result<Vec<Event>> {
        if self.is_default() {
            return devices.iter().map(|device| self.mark(device)).collect();
        }
        match self.device_among(devices)? {
            Some(device) => Ok(vec![self.mark(device)?]),
            None => {
                let message = "the stream belongs to a GPU that holds none of the tensors";
                Err(Error::new(ErrorKind::InvalidArgument, "begin save", message).advise(
                    "give a stream of a GPU that does, and have it wait for the others' streams before",
                ))
            }
        }
    }

    /// Records a new event of the device, which the stream belongs to.
    fn mark(self, device: &Arc<Device>) -> Result<Event> {
        let event = Event::new(device)?;
        let _in_context = device.enter()?;
        self.refuse_capture(device)?;
        // SAFETY: `new`'s contract; the device's context is entered, which default streams go by.
        let code = unsafe { (device.api.event_record)(event.handle, self.handle()) };
        device.api.check("record event on the caller's stream", code)?;
        Ok(event)
    }

    /// What is enqueued on it from now on runs after what the event was recorded behind.
    pub fn wait(self, event: &Event) -> Result<()> {
        let device = &event.device;
        let _in_context = device.enter()?;
        self.refuse_capture(device)?;
        // SAFETY: as in `mark`; the event lives.
        let code = unsafe { (device.api.stream_wait_event)(self.handle(), event.handle, 0) };
        device.api.check("let the caller's stream wait", code)
    }

    /// Which of the devices it belongs to.
    fn device_among(self, devices: &[Arc<Device>]) -> Result<Option<&Arc<Device>>> {
        let Some(first) = devices.first() else { return Ok(None) };
        let mut context: CUcontext = core::ptr::null_mut();
        // SAFETY: `new`'s contract, and a place for a context.
        let code = unsafe { (first.api.stream_context)(self.handle(), &raw mut context) };
        first.api.check("look at the caller's stream", code)?;
        Ok(devices.iter().find(|device| device.owns(context)))
    }

    /// A save waits for what is in its stream; in a graph that is being captured nothing runs.
    fn refuse_capture(self, device: &Device) -> Result<()> {
        let mut status = 0;
        // SAFETY: `new`'s contract, and a place for the status.
        let code = unsafe { (device.api.stream_is_capturing)(self.handle(), &raw mut status) };
        device.api.check("look at the caller's stream", code)?;
        if status == 0 {
            return Ok(());
        }
        Err(Error::new(ErrorKind::InvalidState, "begin save", "the stream is capturing a graph")
            .advise("save between captures and replays"))
    }
}
