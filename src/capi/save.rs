//! `pcc_save`: saves of named tensors, waiting for them, and being told of their end.
#![expect(unsafe_code, reason = "exported functions; a callback into C; an event descriptor")]
#![expect(clippy::missing_safety_doc, reason = "the contract of exported functions is the header")]

use core::ffi::{c_char, c_void};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use super::codes::wait_of;
use super::guard::{self, Caller, Opaque, Out, Outcome, Versioned};
use super::infos::{pcc_durable, pcc_progress};
use super::options::{pcc_pair, pcc_save_options, pcc_tensor};
use super::status::pcc_status;
use super::store::{pcc_store, StoreInner};
use crate::engine::{Store, TensorAt};
use crate::error::{Error, ErrorKind};
use crate::format::{Dtype, MAX_RANK, MAX_TENSORS};
use crate::save::Save;
use crate::sync::{thread, Arc, Condvar, Mutex, Weak};

/// One save, in flight or ended.
#[allow(non_camel_case_types)]
pub struct pcc_save {
    _opaque: [u8; 0],
}

/// Called with `user` when a save has ended. It may ask for the outcome (`pcc_save_wait_durable` with 0), begin no
/// save, wait for none, and close nothing but may free the save it is told of.
#[allow(non_camel_case_types)]
pub type pcc_end_callback = Option<unsafe extern "C" fn(user: *mut c_void)>;

/// What stands behind a [`pcc_save`].
pub(super) struct SaveInner {
    save: Save,
    ending: Arc<Ending>,
    store: Weak<Store>,
}

impl SaveInner {
    pub fn new(save: Save, store: Weak<Store>) -> SaveInner {
        let ending = Arc::new(Ending::default());
        let told = ending.clone();
        save.on_end(Box::new(move || told.ended()));
        SaveInner { save, ending, store }
    }
}

impl Drop for SaveInner {
    fn drop(&mut self) {
        self.ending.forget_callback();
    }
}

impl Opaque for pcc_save {
    type Inner = SaveInner;
    const TAG: u64 = u64::from_le_bytes(*b"pcc_save");
    const NAME: &'static str = "pcc_save";

    fn store(inner: &SaveInner) -> Option<Arc<Store>> {
        inner.store.upgrade()
    }
}

/// Who is told of the end of a save.
#[derive(Default)]
struct Ending {
    state: Mutex<EndingState>,
    called: Condvar,
}

#[derive(Default)]
struct EndingState {
    ended: bool,
    event: Option<OwnedFd>,
    callback: Option<Callback>,
    /// The thread that is inside the callback.
    calling: Option<thread::ThreadId>,
}

struct Callback {
    function: unsafe extern "C" fn(*mut c_void),
    user: *mut c_void,
}

// SAFETY: the header says that the callback runs on another thread, with this pointer.
unsafe impl Send for Callback {}

impl Ending {
    fn ended(&self) {
        let mut state = self.state.lock();
        state.ended = true;
        if let Some(event) = &state.event {
            signal(event);
        }
        drop(state);
        self.call();
    }

    /// Runs the callback if the save has ended and nobody has run it.
    fn call(&self) {
        let callback = {
            let mut state = self.state.lock();
            if !state.ended {
                return;
            }
            let Some(callback) = state.callback.take() else { return };
            state.calling = Some(thread::current().id());
            callback
        };
        // SAFETY: the header asks that function and `user` stay valid until the save's handle is freed; freeing waits
        // for this call.
        unsafe { (callback.function)(callback.user) };
        self.state.lock().calling = None;
        self.called.notify_all();
    }

    /// No call begins after this, and none on another thread is running.
    fn forget_callback(&self) {
        let mut state = self.state.lock();
        state.callback = None;
        while state.calling.is_some_and(|caller| caller != thread::current().id()) {
            state = self.called.wait(state);
        }
    }

    /// `ended`: the save has; this may be known before `ended` is called.
    fn set_callback(&self, callback: Option<Callback>, ended: bool) {
        {
            let mut state = self.state.lock();
            state.callback = callback;
            state.ended |= ended;
        }
        self.call();
    }

    /// The event descriptor, made when it is first asked for. `ended` as in `set_callback`.
    fn event(&self, op: &'static str, ended: bool) -> Outcome<i32> {
        let mut state = self.state.lock();
        state.ended |= ended;
        let ended = state.ended;
        if let Some(event) = &state.event {
            return Ok(event.as_raw_fd());
        }
        // SAFETY: a system call without pointers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(Error::last_os(op).into());
        }
        // SAFETY: just opened, and owned by nobody else.
        let event = unsafe { OwnedFd::from_raw_fd(fd) };
        if ended {
            signal(&event);
        }
        state.event = Some(event);
        Ok(fd)
    }
}

fn signal(event: &OwnedFd) {
    let one = 1u64;
    // SAFETY: eight bytes of a local. It cannot fail: the counter starts at 0, and this is done twice at most.
    let _ = unsafe { libc::write(event.as_raw_fd(), (&raw const one).cast(), size_of::<u64>()) };
}

/// Begins a save of `tensor_count` tensors and `metadata_count` entries of metadata under the trainer's `step`; waits
/// for a slot as long as `options->wait_ms` says, then returns while the save goes on. What is saved is the memory as it
/// is now; of GPUs, as it is when `options->stream` has done what was enqueued on it before, which is not waited for here.
/// Tensors with the same address, size, dtype and shape are stored once and restored under all their names.
///
/// Durability: none yet: see `pcc_save_wait_durable`.
/// Threads: any number at once; up to N saves are in flight.
/// Ownership: the memory of every tensor must stay valid and unchanged until `pcc_save_wait_copied` has returned
/// anything but PCC_TIMED_OUT, or the save is freed, or the store is closed; memory of GPUs may be changed by work that
/// is enqueued after `pcc_save_stream_wait_copied` on its stream, but not be freed before then. Names, shapes, metadata and the arrays are
/// copied at once. `save` receives a handle to be given to `pcc_save_free`, or NULL on failure. `options` may be NULL.
/// Errors: PCC_NO_SLOT, also at once where there is no room for `options->pin`; PCC_TOO_LARGE; PCC_INVALID_ARGUMENT for
/// empty, duplicate or reserved names, wrong sizes, and options that are neither 0 nor 1;
/// PCC_IO where the region's file was deleted, replaced or cut short;
/// PCC_UNSUPPORTED for memory of a GPU where this system or this build has none; PCC_INVALID_ARGUMENT for memory that is
/// not that GPU's (what a save before was of is looked at later: then the save fails so); PCC_INVALID_STATE while the stream captures a graph; PCC_DEVICE; PCC_READ_ONLY, PCC_DURABILITY_UNKNOWN, PCC_INTERNAL, PCC_FORKED,
/// PCC_BAD_POINTER.
#[no_mangle]
pub unsafe extern "C" fn pcc_save_begin(
    store: *const pcc_store,
    step: u64,
    tensors: *const pcc_tensor,
    tensor_count: u64,
    metadata: *const pcc_pair,
    metadata_count: u64,
    options: *const pcc_save_options,
    save: *mut *mut pcc_save,
) -> pcc_status {
    let places = |caller: &Caller| caller.out_handle("save", save);
    let body = |caller: &Caller, inner: &StoreInner, out: Out<*mut pcc_save>| {
        let options = caller.save_options(options)?;
        let tensors = caller.tensors(tensors, tensor_count)?;
        let tensors: Vec<TensorAt<'_>> = tensors.iter().map(TensorArg::at).collect();
        let metadata = caller.metadata(metadata, metadata_count)?;
        // SAFETY: the header asks the caller to keep the memory valid and unchanged until the save is copied.
        let save = unsafe { inner.store.begin_save(step, &tensors, &metadata, options) }?;
        out.set(guard::new_handle(SaveInner::new(save, Arc::downgrade(&inner.store))));
        Ok(())
    };
    // SAFETY: the header binds the caller.
    unsafe { guard::results_on("pcc_save_begin", store, places, body) }
}

/// Stores in `payload_bytes` what a save of these tensors and this metadata takes: the `payload_bytes` to format a
/// region for. No memory of tensors is read: their `data` may be NULL, and each such tensor then counts in full, where
/// tensors with one address are stored once.
///
/// Durability: none.
/// Threads: any.
/// Ownership: nothing is kept.
/// Errors: PCC_INVALID_ARGUMENT and PCC_TOO_LARGE as `pcc_save_begin`; PCC_BAD_POINTER.
#[no_mangle]
pub unsafe extern "C" fn pcc_payload_bytes(
    tensors: *const pcc_tensor,
    tensor_count: u64,
    metadata: *const pcc_pair,
    metadata_count: u64,
    payload_bytes: *mut u64,
) -> pcc_status {
    let body = |caller: &Caller| {
        let out = caller.out("payload_bytes", payload_bytes, 0)?;
        let tensors = caller.tensor_sizes(tensors, tensor_count)?;
        let tensors: Vec<TensorAt<'_>> = tensors.iter().map(TensorArg::at).collect();
        out.set(Store::payload_bytes(&tensors, &caller.metadata(metadata, metadata_count)?)?);
        Ok(())
    };
    // SAFETY: the header binds the caller.
    unsafe { guard::call("pcc_payload_bytes", body) }
}

/// Waits until every byte of the state has left the caller's memory: the trainer may then update it. The save goes on
/// to durable by itself. Waits for at most `timeout_ms` (negative: for ever, 0: only looks).
///
/// Durability: none yet.
/// Threads: any number at once.
/// Ownership: after any status but PCC_TIMED_OUT the tensors' memory is the caller's again.
/// Errors: PCC_TIMED_OUT; otherwise why the save failed, as `pcc_save_wait_durable`.
#[no_mangle]
pub unsafe extern "C" fn pcc_save_wait_copied(save: *const pcc_save, timeout_ms: i64) -> pcc_status {
    let body = |_: &Caller, inner: &SaveInner| Ok(inner.save.wait_copied(wait_of(timeout_ms))?);
    // SAFETY: the header binds the caller.
    unsafe { guard::on("pcc_save_wait_copied", save, body) }
}

/// Makes a CUDA stream wait until every byte of the state has left the caller's memory, so that what is enqueued on it from
/// now on may update the state. The calling thread waits, for at most `timeout_ms` (negative: for ever), only until all
/// copies are enqueued: not at all worth speaking of where the state goes into spare memory of its GPU or finds room in the
/// staging pool, or where the save was begun with `flag_waits`, else until all but the last pool's worth has passed through it;
/// of a state of more tensors than the driver queues copies of (about 1800) also until all but those are copied, for which the
/// stream given at begin must have come so far; and for tensors in host memory until they are copied. Where the stream cannot
/// be made to wait (it captures a graph, the driver refuses), the calling thread waits until all is copied. `stream` NULL is
/// the legacy default stream. For tensors on several GPUs each stream that may update one of them is to wait.
///
/// Durability: none yet.
/// Threads: any number at once.
/// Ownership: after PCC_OK the tensors' memory is the caller's again for work on that stream.
/// Errors: PCC_TIMED_OUT: the memory must still not change; otherwise why the save failed, as `pcc_save_wait_durable`: the
/// memory is the caller's again.
#[no_mangle]
pub unsafe extern "C" fn pcc_save_stream_wait_copied(
    save: *const pcc_save,
    stream: *mut c_void,
    timeout_ms: i64,
) -> pcc_status {
    let body = |_: &Caller, inner: &SaveInner| {
        #[cfg(feature = "cuda")]
        // SAFETY: the header asks for a live stream.
        unsafe { inner.save.stream_wait_copied(stream as usize, wait_of(timeout_ms)) }?;
        #[cfg(not(feature = "cuda"))]
        {
            // All tensors are in host memory: there is nothing that a stream could wait for.
            let _ = stream;
            inner.save.wait_copied(wait_of(timeout_ms))?;
        }
        Ok(())
    };
    // SAFETY: the header binds the caller.
    unsafe { guard::on("pcc_save_stream_wait_copied", save, body) }
}

/// Waits until the save has ended, for at most `timeout_ms` (negative: for ever, 0: only looks). PCC_OK means that the
/// checkpoint will be found after a crash of the kind that the store's durability names. `durable` (may be NULL, else
/// with its `struct_bytes` set) receives the particulars. A save that was begun with `confirm` ends only after
/// `pcc_save_confirm`, or by being cancelled: waiting for it for ever is for another thread than the one that confirms.
///
/// Durability: durable on PCC_OK, and only then.
/// Threads: any number at once; all get the same outcome.
/// Ownership: `durable` is the caller's.
/// Errors: PCC_TIMED_OUT: it goes on; PCC_CANCELLED: cancelled, or the store was closed; PCC_IO, PCC_NO_SPACE,
/// PCC_DEVICE, PCC_DURABILITY_UNKNOWN, PCC_INTERNAL: it failed, and earlier checkpoints are intact; PCC_INVALID_ARGUMENT: so it
/// did, as memory of the state was unmapped before it was copied, or is not that of its GPU any more; PCC_UNSUPPORTED,
/// PCC_OUT_OF_MEMORY: so it did, as what its options require is not to be had; PCC_FORKED, PCC_BAD_POINTER.
#[no_mangle]
pub unsafe extern "C" fn pcc_save_wait_durable(
    save: *const pcc_save,
    timeout_ms: i64,
    durable: *mut pcc_durable,
) -> pcc_status {
    let body = |caller: &Caller, inner: &SaveInner| {
        caller.check_fillable(durable)?;
        let found = inner.save.wait_durable(wait_of(timeout_ms))?;
        let value = pcc_durable {
            generation: found.generation,
            superseded_by: found.superseded_by.unwrap_or(0),
            copied_ns: ns(found.copied_after),
            durable_ns: ns(found.durable_after),
            slot: found.slot,
            ..pcc_durable::initial()
        };
        caller.fill_optional(durable, value)
    };
    // SAFETY: the header binds the caller.
    unsafe { guard::on("pcc_save_wait_durable", save, body) }
}

/// Lets a save commit that was begun with `confirm`: before it is copied or after it, at any time; calling it again does
/// no harm. PCC_OK without any effect for every other save. If a newer save is durable by then, this one ends superseded
/// unless it is to be pinned or still among the newest K.
///
/// Durability: none yet: see `pcc_save_wait_durable`. A save that is not confirmed is never found after a crash.
/// Threads: any number at once.
/// Ownership: none.
/// Errors: why the save has failed, as `pcc_save_wait_durable`: PCC_CANCELLED also where the store was closed;
/// PCC_FORKED, PCC_BAD_POINTER.
#[no_mangle]
pub unsafe extern "C" fn pcc_save_confirm(save: *const pcc_save) -> pcc_status {
    let body = |_: &Caller, inner: &SaveInner| Ok(inner.save.confirm()?);
    // SAFETY: the header binds the caller.
    unsafe { guard::on("pcc_save_confirm", save, body) }
}

/// How far the save is. Never blocks. Set `progress->struct_bytes` before.
///
/// Durability: none.
/// Threads: any number at once.
/// Ownership: `progress` is the caller's.
/// Errors: PCC_FORKED, PCC_BAD_POINTER, PCC_INVALID_ARGUMENT for an impossible size.
#[no_mangle]
pub unsafe extern "C" fn pcc_save_progress(save: *const pcc_save, progress: *mut pcc_progress) -> pcc_status {
    let body = |caller: &Caller, inner: &SaveInner| {
        let now = inner.save.progress();
        let value = pcc_progress {
            generation: inner.save.generation(),
            step: inner.save.step(),
            ..progress_of(&now)
        };
        caller.fill(progress, value)
    };
    // SAFETY: the header binds the caller.
    unsafe { guard::on("pcc_save_progress", save, body) }
}

/// Asks for the save to end without a checkpoint. It comes too late where the save is already being committed: wait to
/// learn how it ended.
///
/// Durability: none.
/// Threads: any number at once.
/// Ownership: the tensors' memory is the caller's again once `pcc_save_wait_copied` returns.
/// Errors: PCC_FORKED, PCC_BAD_POINTER.
#[no_mangle]
pub unsafe extern "C" fn pcc_save_cancel(save: *const pcc_save) -> pcc_status {
    let body = |_: &Caller, inner: &SaveInner| {
        inner.save.cancel();
        Ok(())
    };
    // SAFETY: the header binds the caller.
    unsafe { guard::on("pcc_save_cancel", save, body) }
}

/// Copies why the save failed, as `pcc_last_error` does; kept until the save is freed. Returns 0 where it has not
/// failed.
///
/// Durability: none.
/// Threads: any number at once.
/// Ownership: the text is copied to `buf` (`cap` bytes); NULL or 0 only ask for the size.
/// Errors: returns 0; PCC_FORKED or PCC_BAD_POINTER in `pcc_last_error_status`.
#[no_mangle]
pub unsafe extern "C" fn pcc_save_error(save: *const pcc_save, buf: *mut c_char, cap: u64) -> u64 {
    let body = |caller: &Caller, inner: &SaveInner| {
        if !inner.save.progress().ended {
            caller.copy_text(buf, cap, "");
            return Ok(0);
        }
        Ok(match inner.save.wait_durable(Some(Duration::ZERO)) {
            Ok(_) => {
                caller.copy_text(buf, cap, "");
                0
            }
            Err(error) => caller.text_to(buf, cap, &error.to_string()),
        })
    };
    // SAFETY: the header binds the caller.
    unsafe { guard::value_on("pcc_save_error", save, 0, body) }
}

/// Stores in `fd` an eventfd that becomes readable when the save has ended, for poll, epoll, select or an event loop.
/// The same one on every call.
///
/// Durability: readable does not mean durable: ask `pcc_save_wait_durable` with 0.
/// Threads: any number at once.
/// Ownership: the descriptor belongs to the save: do not close it, nor use it after `pcc_save_free`.
/// Errors: PCC_IO where the system has no descriptors left; PCC_FORKED, PCC_BAD_POINTER.
#[no_mangle]
pub unsafe extern "C" fn pcc_save_event_fd(save: *const pcc_save, fd: *mut i32) -> pcc_status {
    let places = |caller: &Caller| caller.out("fd", fd, -1);
    let body = |caller: &Caller, inner: &SaveInner, out: Out<i32>| {
        out.set(inner.ending.event(caller.op(), inner.save.progress().ended)?);
        Ok(())
    };
    // SAFETY: the header binds the caller.
    unsafe { guard::results_on("pcc_save_event_fd", save, places, body) }
}

/// Has `callback` called once with `user` when the save has ended: on a thread of the library, or at once on this thread
/// if it has ended already. Replaces an earlier one that was not called yet; NULL only takes that back.
///
/// Durability: the end is not success: ask `pcc_save_wait_durable` with 0.
/// Threads: any number at once. The callback holds up other saves while it runs: keep it short, and call no function of CUDA in it,
/// nor wait for a thread that does: that may wait for copies, and they for this.
/// Ownership: function and `user` must stay valid until it was called or `pcc_save_free` has returned, which waits for
/// a call that is running on another thread, and after which none begins: a save that is freed early tells nobody.
/// Errors: PCC_FORKED, PCC_BAD_POINTER.
#[no_mangle]
pub unsafe extern "C" fn pcc_save_on_end(
    save: *const pcc_save,
    callback: pcc_end_callback,
    user: *mut c_void,
) -> pcc_status {
    const OP: &str = "pcc_save_on_end";
    let callback = callback.map(|function| Callback { function, user });
    // The callback may free the save: by then nothing here may borrow from it.
    let mut ending = None;
    let find = |_: &Caller, inner: &SaveInner| {
        ending = Some((inner.ending.clone(), inner.save.progress().ended));
        Ok(())
    };
    // SAFETY: the header binds the caller.
    let status = unsafe { guard::on(OP, save, find) };
    let Some((ending, ended)) = ending else { return status };
    let set = |_: &Caller| {
        ending.set_callback(callback, ended);
        Ok(())
    };
    // SAFETY: as above.
    unsafe { guard::call(OP, set) }
}

/// Frees a save's handle; NULL is fine. A save that is copied (and confirmed, where it was begun with `confirm`) goes on
/// to durable by itself; any other is cancelled, and this waits until the library has stopped reading the caller's
/// memory.
///
/// Durability: commits nothing, and takes nothing back.
/// Threads: no other call may use the handle meanwhile or later.
/// Ownership: frees `save`. In a forked child it only forgets it.
/// Errors: none.
#[no_mangle]
pub unsafe extern "C" fn pcc_save_free(save: *mut pcc_save) {
    // SAFETY: the header binds the caller.
    unsafe { guard::free("pcc_save_free", save) }
}

/// Nanoseconds, as far as they fit.
pub(super) fn ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Progress without generation and step.
pub(super) fn progress_of(now: &crate::save::Progress) -> pcc_progress {
    pcc_progress {
        total_bytes: now.total_bytes,
        copied_bytes: now.copied_bytes,
        written_bytes: now.written_bytes,
        copied: now.copied.into(),
        ended: now.ended.into(),
        ..pcc_progress::initial()
    }
}

/// A checked [`pcc_tensor`].
pub(super) struct TensorArg<'a> {
    pub name: &'a str,
    pub dtype: Dtype,
    pub shape: &'a [u64],
    pub data: *mut c_void,
    pub bytes: u64,
    pub device: Option<u32>,
}

impl<'a> TensorArg<'a> {
    fn at(&self) -> TensorAt<'a> {
        let (name, dtype, shape) = (self.name, self.dtype, self.shape);
        TensorAt {
            name,
            dtype,
            shape,
            ptr: self.data.cast_const().cast(),
            bytes: self.bytes,
            device: self.device,
        }
    }
}

impl Caller {
    /// Checks everything about tensors but what the format checks: names, sizes, ties.
    pub fn tensors<'a>(&'a self, tensors: *const pcc_tensor, count: u64) -> Outcome<Vec<TensorArg<'a>>> {
        let checked = self.tensor_sizes(tensors, count)?;
        for (index, tensor) in checked.iter().enumerate().filter(|(_, tensor)| tensor.bytes > 0) {
            // Only looked at, not read: NULL and the end of memory.
            self.check_memory(&format!("tensors[{index}].data"), tensor.data, tensor.bytes)?;
        }
        Ok(checked)
    }

    /// As [`Caller::tensors`], of tensors whose memory need not exist.
    fn tensor_sizes<'a>(&'a self, tensors: *const pcc_tensor, count: u64) -> Outcome<Vec<TensorArg<'a>>> {
        self.limit("tensors", count)?;
        let tensors = self.options_array("tensors", tensors, count)?;
        tensors.iter().enumerate().map(|(index, tensor)| self.tensor(index, tensor)).collect()
    }

    fn tensor<'a>(&'a self, index: usize, tensor: &pcc_tensor) -> Outcome<TensorArg<'a>> {
        let field = |name: &str| format!("tensors[{index}].{name}");
        let device = self.device(&format!("tensors[{index}]"), tensor.device, tensor.device_index)?;
        if tensor.rank as usize > MAX_RANK {
            return Err(self.invalid(format!(
                "{} is {}, expected at most {MAX_RANK}",
                field("rank"),
                tensor.rank
            )));
        }
        let name = self.text(&field("name"), tensor.name)?;
        let dtype = Dtype::try_from(tensor.dtype).map_err(|_| {
            self.invalid(format!(
                "{} of {name:?} is {}, expected PCC_DTYPE_... (1 to {})",
                field("dtype"),
                tensor.dtype,
                Dtype::ALL.len()
            ))
        })?;
        let shape = self.array(&field("shape"), tensor.shape, tensor.rank.into())?;
        Ok(TensorArg { name, dtype, shape, data: tensor.data, bytes: tensor.bytes, device })
    }

    /// Key and value pairs.
    pub fn metadata(&self, pairs: *const pcc_pair, count: u64) -> Outcome<Vec<(&str, &str)>> {
        self.limit("metadata", count)?;
        let pairs = self.array("metadata", pairs, count)?;
        pairs
            .iter()
            .enumerate()
            .map(|(index, pair)| {
                let key = self.text(&format!("metadata[{index}].key"), pair.key)?;
                Ok((key, self.text(&format!("metadata[{index}].value"), pair.value)?))
            })
            .collect()
    }

    /// Refuses array lengths that no checkpoint can have, before anything is allocated for them.
    pub fn limit(&self, what: &str, count: u64) -> Outcome<()> {
        if count <= MAX_TENSORS as u64 {
            return Ok(());
        }
        let message = format!("{what}: {count} elements, expected at most {MAX_TENSORS}");
        Err(Error::new(ErrorKind::TooLarge, self.op(), message).into())
    }
}
