//! The calls of the header, one variant each.

#[path = "others.rs"]
mod others;

use std::ffi::{c_char, CString};
use std::ptr::{null, null_mut};

use arbitrary::Arbitrary;
use pccheck::capi::checkpoint::*;
use pccheck::capi::dtype::*;
use pccheck::capi::health::*;
use pccheck::capi::infos::*;
use pccheck::capi::options::*;
use pccheck::capi::raw::*;
use pccheck::capi::read::*;
use pccheck::capi::save::*;
use pccheck::capi::status::*;
use pccheck::capi::store::*;
use pccheck::capi::text::*;
use pccheck::capi::tune::*;

use crate::args::{pairs, ptr_of, reads, tensors, Amount, Read, Size, Tensor, Text, Wait};
use crate::world::{c, checked, count, open_options, zeroed, Raw, Save, Store, World};

/// A handle: one that lives, or what is none of its kind.
#[derive(Arbitrary, Debug, Clone, Copy)]
pub enum Which {
    Live(u8),
    Null,
    OtherKind,
    Misaligned,
}

#[derive(Arbitrary, Debug, Clone, Copy)]
pub enum Where {
    Region,
    Other,
    Absent,
    Folder,
    Null,
    Empty,
}

#[derive(Arbitrary, Debug, Clone, Copy)]
pub struct OpenArgs {
    read_only: u8,
    medium: u8,
    backend: u8,
    durability: u8,
    max_in_flight: u8,
    keep: u8,
    hold: u8,
    threads: Amount,
    queue_depth: Amount,
    chunk: Amount,
    staging: Amount,
    rewrite_every: Amount,
    run_id: u8,
    /// Which of these are not as usual.
    odd: u16,
}

#[derive(Arbitrary, Debug, Clone)]
pub struct SaveArgs {
    size: Size,
    defaults: bool,
    wait: Wait,
    confirm: u8,
    pin: u8,
    snapshot: u8,
    flag_waits: u8,
}

#[derive(Arbitrary, Debug, Clone, Copy)]
pub enum Buffer {
    Null(Amount),
    Exact(u16),
}

#[derive(Arbitrary, Debug, Clone)]
pub enum Call {
    Format {
        at: Where,
        slots: u8,
        payload: Amount,
        force: u8,
        prewrite: u8,
        medium: u8,
        size: Size,
        striped: u8,
    },
    Grow {
        at: Where,
        slots: u8,
        payload: Amount,
        wait: Wait,
    },
    Open {
        at: Where,
        size: Size,
        args: OpenArgs,
        wait: Wait,
    },
    OpenSimply {
        read_only: bool,
    },
    Close(u8),
    Drain(Which, Wait),
    List {
        store: Which,
        capacity: u8,
        size: Size,
    },
    Pin(Which, Amount),
    Unpin(Which, Amount),
    MarkGlobal(Which, u8, u8),
    Abandon(Which, u8, u8, Wait),
    DiscardNewer(Which, Amount),
    Verify {
        store: Which,
        generation: Amount,
        size: Size,
        text: Buffer,
    },
    Repair(Which, Wait),
    Stats(Which, Size),
    Got(Which, Size),
    RecoveryText(Which, Buffer),
    SaveBegin {
        store: Which,
        step: u8,
        tensors: Vec<Tensor>,
        size: Size,
        metadata: Vec<(Text, Text)>,
        args: SaveArgs,
    },
    SaveSimply {
        step: u8,
        tensors: Vec<Tensor>,
    },
    CountTooLarge(Which, Amount),
    PayloadBytes(Vec<Tensor>, Size, Vec<(Text, Text)>),
    WaitCopied(Which, Wait),
    StreamWaitCopied(Which, Wait),
    WaitDurable(Which, Wait, Size),
    Confirm(Which),
    Progress(Which, Size),
    Cancel(Which),
    SaveError(Which, Buffer),
    EventFd(Which),
    OnEnd(Which, bool),
    FreeAtEnd(u8),
    SaveFree(u8),
    RawBegin {
        store: Which,
        step: u8,
        bytes: Amount,
        metadata: Vec<(Text, Text)>,
        args: SaveArgs,
    },
    RawPayloadBytes(Amount, Vec<(Text, Text)>),
    RawWrite(Which, Amount, Amount, bool),
    RawCommit(Which),
    RawProgress(Which, Size),
    RawCancel(Which),
    RawFree(u8),
    CheckpointOpen {
        store: Which,
        select: u8,
        value: Amount,
        verify: u8,
        size: Size,
    },
    Restore {
        store: Which,
        select: u8,
        value: Amount,
        tensors: Vec<Tensor>,
        size: Size,
        keep: bool,
    },
    CheckpointInfo(Which, Size),
    Rejected(Which, Buffer),
    MetadataCount(Which),
    MetadataGet(Which, Amount),
    MetadataFind(Which, Text),
    TensorCount(Which),
    TensorGet(Which, Amount, Size),
    TensorFind(Which, Text),
    Read(Which, Vec<Read>, Size),
    ReadPayload(Which, Amount, Amount),
    CheckpointVerify(Which),
    CheckpointClose(u8),
    Tune {
        store: Which,
        numbers: [Amount; 5],
        in_flight: u8,
        reserved: u8,
        size: Size,
    },
    LastError(u8, Buffer),
    InitOptions(u8, Size),
    Names(u32, i32, Text),
}

impl Which {
    fn pick<H>(self, live: &[*mut H], others: &World) -> *const H {
        match self {
            Which::Live(index) => {
                live.get(usize::from(index) % live.len().max(1)).map_or(null(), |handle| *handle)
            }
            Which::Null => null(),
            Which::OtherKind => {
                let other = if size_of_val(live) == 0 || others.stores.is_empty() {
                    others.saves.first().map_or(null(), |save| save.handle.cast_const().cast())
                } else {
                    others.stores[0].handle.cast_const().cast()
                };
                other
            }
            Which::Misaligned => live.first().map_or(null(), |handle| handle.wrapping_byte_add(1)),
        }
    }

    fn store(self, world: &World) -> *const pcc_store {
        self.pick(&world.stores.iter().map(|store| store.handle).collect::<Vec<_>>(), world)
    }

    fn save(self, world: &World) -> *const pcc_save {
        self.pick(&world.saves.iter().map(|save| save.handle).collect::<Vec<_>>(), world)
    }

    fn raw(self, world: &World) -> *const pcc_raw {
        self.pick(&world.raws.iter().map(|raw| raw.handle).collect::<Vec<_>>(), world)
    }

    fn checkpoint(self, world: &World) -> *const pcc_checkpoint {
        self.pick(&world.checkpoints, world)
    }
}

impl Where {
    fn path(self, world: &World) -> *const c_char {
        match self {
            Where::Region => world.paths[0].as_ptr(),
            Where::Other => world.paths[1].as_ptr(),
            Where::Absent => world.paths[2].as_ptr(),
            Where::Folder => world.paths[3].as_ptr(),
            Where::Null => null(),
            Where::Empty => c"".as_ptr(),
        }
    }
}

impl Buffer {
    /// Calls with a buffer of exactly the size that is told.
    fn with<T>(self, call: impl FnOnce(*mut c_char, u64) -> T) -> T {
        match self {
            Buffer::Null(cap) => call(null_mut(), cap.value()),
            Buffer::Exact(cap) => call(vec![0u8; cap.into()].as_mut_ptr().cast(), cap.into()),
        }
    }
}

/// Sizes that are allocated at once: small ones, or such as no system has.
fn allocated(amount: Amount, most: u64) -> u64 {
    let value = amount.value();
    if value > most && value < 1 << 50 {
        return value % most;
    }
    value
}

impl OpenArgs {
    fn options(&self, wait: Wait, ends: bool) -> pcc_open_options {
        let mut options = open_options();
        let odd = |bit: u16| self.odd & (1 << bit) != 0;
        options.read_only = (self.read_only % 3).into();
        options.max_in_flight = (self.max_in_flight % 4).into();
        options.keep = (self.keep % 4).into();
        options.hold = if self.hold > 250 { 2 } else { (self.hold % 2).into() };
        options.run_id = self.run_id.into();
        options.lock_wait_ms = wait.ms(ends);
        if odd(0) {
            options.medium = (self.medium % 5).into();
        }
        if odd(1) {
            options.backend = (self.backend % 4).into();
        }
        if odd(2) {
            options.required_durability = (self.durability % 4).into();
        }
        if odd(3) {
            // As many threads as are asked for are started.
            (options.writers, options.readers) =
                (allocated(self.threads, 8) as u32, (self.threads.value() >> 3) as u32);
        }
        if odd(4) {
            options.queue_depth = allocated(self.queue_depth, 64) as u32;
        }
        if odd(5) {
            options.chunk_bytes = self.chunk.value();
        }
        if odd(6) {
            options.staging_bytes = allocated(self.staging, 4 << 20);
        }
        if odd(7) {
            options.rewrite_every = self.rewrite_every.value() as u32;
        }
        if odd(8) {
            options.lock_memory = (self.backend % 3).into();
        }
        options
    }
}

impl SaveArgs {
    fn options(&self, world: &World) -> pcc_save_options {
        let reclaims = world.all_end()
            && world.stores.iter().all(|store| store.reclaims)
            && world.checkpoints.is_empty();
        pcc_save_options {
            wait_ms: self.wait.ms(reclaims).clamp(-9, 20),
            confirm: if self.confirm > 250 { 7 } else { (self.confirm % 2).into() },
            pin: if self.pin > 250 { 7 } else { u32::from(self.pin % 8 == 1) },
            snapshot: if self.snapshot > 240 { self.snapshot.into() } else { 0 },
            flag_waits: u32::from(self.flag_waits / 100),
            ..zeroed()
        }
    }

    /// What of the options reaches the library.
    fn ends(&self) -> bool {
        self.defaults || self.confirm % 2 == 0 || matches!(self.size, Size::Older(words) if words % 6 <= 3)
    }
}

/// An out-parameter that must be NULL after a failure.
fn handle<H>(call: impl FnOnce(*mut *mut H) -> pcc_status) -> Option<*mut H> {
    let mut out = std::ptr::dangling_mut();
    let good = checked(call(&mut out));
    assert_eq!(good, !out.is_null(), "a handle and a status that disagree");
    good.then_some(out)
}

/// Has a struct of `size` filled.
fn filled<T: Copy>(size: Size, call: impl FnOnce(*mut T) -> pcc_status) -> bool {
    let mut placed = size.place(&[zeroed::<T>()]);
    checked(call(placed.ptr()))
}

impl Call {
    pub fn make(&self, world: &mut World) {
        match self {
            Call::Format { at, slots, payload, force, prewrite, medium, size, striped } => {
                let stripe = [world.paths[1].as_ptr(), null()];
                let options = pcc_format_options {
                    force: (force % 3).into(),
                    prewrite: if *prewrite > 250 { 2 } else { u32::from(prewrite % 16 == 1) },
                    medium: if *medium > 200 { (*medium).into() } else { (medium % 4).into() },
                    stripe_paths: if *striped % 16 == 15 { null() } else { stripe.as_ptr() },
                    stripe_count: match striped % 16 {
                        count @ (1 | 2) => count.into(),
                        14 => u64::MAX,
                        _ => 0,
                    },
                    stripe_unit_bytes: if *striped > 127 { 2 << 20 } else { (striped & 64).into() },
                    ..zeroed()
                };
                let mut placed = size.place(&[options]);
                let slots = if *slots > 250 { u32::from(*slots) } else { (slots % 8).into() };
                let payload = allocated(*payload, 2 << 20);
                if checked(c!(pcc_format(at.path(world), slots, payload, placed.ptr()))) {
                    world.forget();
                }
            }
            Call::Grow { at, slots, payload, wait } => {
                let (wait, payload) = (wait.ms(!world.written_to()), allocated(*payload, 2 << 20));
                let mut left_out = 9;
                checked(c!(pcc_grow(at.path(world), (slots % 12).into(), payload, wait, &mut left_out)));
            }
            Call::Open { at, size, args, wait } => {
                let options = args.options(*wait, !world.written_to());
                let mut placed = size.place(&[options]);
                // Without its last fields the default staging pool and wait are what the library takes.
                if matches!(size, Size::Older(_)) || world.stores.len() > 2 {
                    return;
                }
                let opened = handle(|out| c!(pcc_open(at.path(world), placed.ptr(), out)));
                if let Some(handle) = opened {
                    let first = matches!(at, Where::Region);
                    let (writes, reclaims) = (options.read_only == 0, options.hold == 0);
                    world.stores.push(Store { handle, writes, first, reclaims });
                }
            }
            Call::OpenSimply { read_only } => {
                let options = pcc_open_options { read_only: (*read_only).into(), ..open_options() };
                if world.stores.len() < 3 {
                    let opened = handle(|out| c!(pcc_open(world.paths[0].as_ptr(), &options, out)));
                    let store = |handle| Store { handle, writes: !read_only, first: true, reclaims: true };
                    world.stores.extend(opened.map(store));
                }
            }
            Call::Close(index) => {
                if !world.stores.is_empty() {
                    let store = world.stores.swap_remove(usize::from(*index) % world.stores.len());
                    c!(pcc_close(store.handle));
                }
            }
            Call::Drain(store, wait) => {
                checked(c!(pcc_drain(store.store(world), wait.ms(world.all_end()))));
            }
            Call::List { store, capacity, size } => {
                let there = usize::from(*capacity) % 8;
                let mut placed = size.place(&vec![zeroed::<pcc_checkpoint_info>(); there.max(1)]);
                let info_bytes = c!(*placed.ptr::<u64>());
                // So many pass the end of memory, which is refused.
                let capacity = if *capacity > 250 { u64::MAX } else { there as u64 };
                let mut found = 9;
                checked(c!(pcc_list(store.store(world), placed.ptr(), info_bytes, capacity, &mut found)));
            }
            Call::Pin(store, generation) => {
                checked(c!(pcc_pin(store.store(world), generation.value())));
            }
            Call::Unpin(store, generation) => {
                checked(c!(pcc_unpin(store.store(world), generation.value())));
            }
            Call::MarkGlobal(store, run, step) => {
                let mut generation = 9;
                checked(c!(pcc_mark_global(
                    store.store(world),
                    (*run).into(),
                    (*step).into(),
                    &mut generation
                )));
            }
            Call::Abandon(store, run, step, wait) => {
                let mut discarded = 9;
                let (run, step, wait) = (u64::from(*run), u64::from(*step), wait.ms(true));
                checked(c!(pcc_abandon(store.store(world), run, step, wait, &mut discarded)));
                world.forget();
            }
            Call::DiscardNewer(store, generation) => {
                if checked(c!(pcc_discard_newer(store.store(world), generation.value(), null_mut()))) {
                    world.forget();
                }
            }
            Call::Verify { store, generation, size, text } => {
                let store = store.store(world);
                text.with(|buf, cap| {
                    filled::<pcc_verify_report>(*size, |out| {
                        c!(pcc_verify(store, generation.value(), out, buf, cap))
                    });
                });
            }
            Call::Repair(store, wait) => {
                checked(c!(pcc_repair(store.store(world), wait.ms(true), null_mut())));
            }
            Call::Stats(store, size) => {
                filled::<pcc_stats_info>(*size, |out| c!(pcc_stats(store.store(world), out)));
            }
            Call::Got(store, size) => {
                filled::<pcc_got_info>(*size, |out| c!(pcc_got(store.store(world), out)));
            }
            Call::RecoveryText(store, text) => {
                text.with(|buf, cap| c!(pcc_recovery_text(store.store(world), buf, cap)));
            }
            Call::SaveBegin { store, step, tensors, size, metadata, args } => {
                self::save(world, *store, *step, (tensors, *size), metadata, Some(args));
            }
            Call::SaveSimply { step, tensors } => {
                self::save(world, Which::Live(0), *step, (tensors, Size::Exact), &[], None);
            }
            Call::CountTooLarge(store, count) => {
                let mut save = null_mut();
                let count = count.value().max((1 << 20) + 1);
                let mut nothing = [0u64; 8];
                let (tensors, pairs) = (nothing.as_mut_ptr().cast(), nothing.as_mut_ptr().cast());
                let store = store.store(world);
                assert!(!checked(c!(pcc_save_begin(store, 1, tensors, count, null(), 0, null(), &mut save))));
                assert!(!checked(c!(pcc_save_begin(store, 1, null(), 0, pairs, count, null(), &mut save))));
            }
            Call::PayloadBytes(list, size, metadata) => {
                let (mut list, metadata) = (tensors(list, *size, 0), pairs(metadata));
                let (pairs, pair_count) = (metadata.pairs.as_ptr(), metadata.pairs.len() as u64);
                let mut bytes = 9;
                let good = checked(c!(pcc_payload_bytes(
                    list.placed.ptr(),
                    list.count,
                    pairs,
                    pair_count,
                    &mut bytes
                )));
                assert_eq!(good, bytes > 0);
            }
            Call::WaitCopied(save, wait) => {
                checked(c!(pcc_save_wait_copied(save.save(world), wait.ms(true))));
            }
            Call::StreamWaitCopied(save, wait) => {
                checked(c!(pcc_save_stream_wait_copied(save.save(world), null_mut(), wait.ms(true))));
            }
            Call::WaitDurable(save, wait, size) => {
                let save = save.save(world);
                let known = world.saves.iter().find(|known| known.handle.cast_const() == save);
                let (ends, generation) = known
                    .map_or((false, 0), |known| (known.ends, if known.first { known.generation } else { 0 }));
                if filled::<pcc_durable>(*size, |out| c!(pcc_save_wait_durable(save, wait.ms(ends), out))) {
                    world.ended_durably(generation);
                }
            }
            Call::Confirm(save) => {
                let save = save.save(world);
                if checked(c!(pcc_save_confirm(save))) {
                    let known = world.saves.iter_mut().find(|known| known.handle.cast_const() == save);
                    known.expect("a save that lives").ends = true;
                }
            }
            Call::Progress(save, size) => {
                filled::<pcc_progress>(*size, |out| c!(pcc_save_progress(save.save(world), out)));
            }
            Call::Cancel(save) => {
                checked(c!(pcc_save_cancel(save.save(world))));
            }
            Call::SaveError(save, text) => {
                text.with(|buf, cap| c!(pcc_save_error(save.save(world), buf, cap)));
            }
            Call::EventFd(save) => {
                let mut fd = 9;
                let good = checked(c!(pcc_save_event_fd(save.save(world), &mut fd)));
                assert_eq!(good, fd >= 0);
            }
            Call::OnEnd(save, set) => {
                let user = (&raw const *world.told).cast_mut().cast();
                checked(c!(pcc_save_on_end(save.save(world), set.then_some(count), user)));
            }
            Call::FreeAtEnd(index) => {
                if !world.saves.is_empty() {
                    world.free_at_end(usize::from(*index) % world.saves.len());
                }
            }
            Call::SaveFree(index) => {
                if !world.saves.is_empty() {
                    let save = world.saves.swap_remove(usize::from(*index) % world.saves.len());
                    c!(pcc_save_free(save.handle));
                }
            }
            call => others::make(call, world),
        }
    }
}

/// Begins a save of the tensors, and notes what it will hold.
fn save(
    world: &mut World,
    store: Which,
    step: u8,
    (list, size): (&[Tensor], Size),
    metadata: &[(Text, Text)],
    args: Option<&SaveArgs>,
) {
    let store = store.store(world);
    let first = world.stores.iter().any(|known| known.handle.cast_const() == store && known.first);
    let options = args.filter(|args| !args.defaults).map(|args| (args.options(world), args.size));
    let mut placed = options.map(|(options, size)| size.place(&[options]));
    // By default a begin waits a minute for a slot.
    let quick = pcc_save_options { wait_ms: 1, ..zeroed() };
    let mut quick = Size::Exact.place(&[quick]);
    let options = placed.as_mut().unwrap_or(&mut quick).ptr();
    let (mut list, metadata) = (tensors(list, size, step), pairs(metadata));
    let (pairs, pair_count) = (metadata.pairs.as_ptr(), metadata.pairs.len() as u64);
    let (data, count) = (list.placed.ptr(), list.count);
    let begun =
        handle(|out| c!(pcc_save_begin(store, step.into(), data, count, pairs, pair_count, options, out)));
    let Some(handle) = begun else { return };
    let mut progress = pcc_progress { struct_bytes: size_of::<pcc_progress>() as u64, ..zeroed() };
    assert!(checked(c!(pcc_save_progress(handle, &mut progress))));
    assert_eq!(progress.step, u64::from(step));
    if first {
        let named = list.names.iter().zip(&list.data);
        let content = named.map(|(name, data)| (name.clone().expect("it was taken"), data.clone())).collect();
        world.contents.insert(progress.generation, content);
    }
    // The memory must stay until the save is copied.
    world.memory.push(list);
    let ends = args.is_none_or(SaveArgs::ends);
    world.saves.push(Save { handle, generation: progress.generation, first, ends });
}
