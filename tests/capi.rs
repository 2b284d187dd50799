//! The C ABI as a program meets it: every class of bad argument is refused with a status and a text, and nothing is
//! lost by it; saves, raw saves, restores, waits, callbacks, threads and forks do what the header says. A regression
//! here crashes trainers, or silently restores the wrong state.

mod common;

use std::ffi::{c_char, c_void, CStr, CString};
use std::path::Path;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use common::scratch;
use pccheck::capi::checkpoint::*;
use pccheck::capi::codes::*;
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

const WAIT_MS: i64 = 60_000;

/// Calls an exported function.
macro_rules! c {
    ($call:expr) => {
        // SAFETY: the arguments are what the header asks for, or what it promises to refuse.
        unsafe { $call }
    };
}

/// A zeroed struct with its size set, as C programs make it.
macro_rules! sized {
    ($type:ident) => {{
        let mut value: $type = zeroed();
        value.struct_bytes = size_of::<$type>() as u64;
        value
    }};
}

/// A struct of the header with all its bytes zero.
fn zeroed<T: Copy>() -> T {
    // SAFETY: used for structs of integers and pointers only.
    unsafe { std::mem::zeroed() }
}

fn text_of(fill: impl Fn(*mut c_char, u64) -> u64) -> String {
    let needed = fill(null_mut(), 0);
    let mut buffer = vec![0u8; needed as usize + 1];
    assert_eq!(fill(buffer.as_mut_ptr().cast(), buffer.len() as u64), needed);
    let text = CStr::from_bytes_until_nul(&buffer).expect("a final NUL").to_str().expect("UTF-8").to_string();
    assert_eq!(needed, if needed == 0 { 0 } else { text.len() as u64 + 1 });
    text
}

fn last_error() -> String {
    text_of(|buf, cap| c!(pcc_last_error(buf, cap)))
}

#[track_caller]
fn ok(status: pcc_status) {
    assert_eq!(status, PCC_OK, "{}", last_error());
}

/// The call fails so, and its text says all of `parts`.
#[track_caller]
fn fails(status: pcc_status, expected: pcc_status, parts: &[&str]) {
    let text = last_error();
    assert_eq!(status, expected, "{text}");
    assert_eq!(pcc_last_error_status(), expected);
    for part in parts {
        assert!(text.contains(part), "{text:?} does not say {part:?}");
    }
}

struct Region {
    _dir: tempfile::TempDir,
    path: CString,
}

fn region(slots: u32, payload_bytes: u64) -> Region {
    let dir = scratch();
    let path = CString::new(dir.path().join("region").to_str().expect("UTF-8")).expect("a path");
    ok(c!(pcc_format(path.as_ptr(), slots, payload_bytes, null())));
    Region { _dir: dir, path }
}

fn open_options() -> pcc_open_options {
    let mut options = sized!(pcc_open_options);
    ok(c!(pcc_open_options_init(&mut options, size_of::<pcc_open_options>() as u64)));
    options.chunk_bytes = 64 << 10;
    options.staging_bytes = 1 << 20;
    options.required_durability = PCC_DURABILITY_PROCESS;
    options
}

fn open_with(region: &Region, options: &pcc_open_options) -> *mut pcc_store {
    let mut store = null_mut();
    ok(c!(pcc_open(region.path.as_ptr(), options, &mut store)));
    assert!(!store.is_null());
    store
}

fn open(region: &Region) -> *mut pcc_store {
    open_with(region, &open_options())
}

/// Tensors that own what they point to.
struct State {
    names: Vec<CString>,
    shapes: Vec<[u64; 2]>,
    data: Vec<Vec<f32>>,
}

impl State {
    fn new(seed: u32) -> State {
        let sizes = [(3u64, 5u64), (1, 1), (200, 321), (0, 7), (64, 256)];
        let value = |i: usize, k: u64| (seed as f32) + (i as f32) * 0.5 + (k as f32) * 0.25;
        State {
            names: (0..sizes.len()).map(|i| CString::new(format!("läyer.{i}")).unwrap()).collect(),
            shapes: sizes.iter().map(|&(a, b)| [a, b]).collect(),
            data: (0..sizes.len())
                .map(|i| (0..sizes[i].0 * sizes[i].1).map(|k| value(i, k)).collect())
                .collect(),
        }
    }

    fn zeroed(&self) -> State {
        let data = self.data.iter().map(|data| vec![0.0; data.len()]).collect();
        State { names: self.names.clone(), shapes: self.shapes.clone(), data }
    }

    fn tensors(&mut self) -> Vec<pcc_tensor> {
        let parts = self.names.iter().zip(&self.shapes).zip(&mut self.data);
        parts
            .map(|((name, shape), data)| pcc_tensor {
                name: name.as_ptr(),
                shape: shape.as_ptr(),
                rank: 2,
                dtype: PCC_DTYPE_F32,
                data: data.as_mut_ptr().cast(),
                bytes: (data.len() * 4) as u64,
                ..sized!(pcc_tensor)
            })
            .collect()
    }
}

fn begin(store: *const pcc_store, step: u64, state: &mut State) -> *mut pcc_save {
    let tensors = state.tensors();
    let pairs = [pcc_pair { key: c"epoch".as_ptr(), value: c"drei".as_ptr() }];
    let mut save = null_mut();
    let count = tensors.len() as u64;
    ok(c!(pcc_save_begin(store, step, tensors.as_ptr(), count, pairs.as_ptr(), 1, null(), &mut save)));
    save
}

fn save_durably(store: *const pcc_store, step: u64, state: &mut State) -> u64 {
    let save = begin(store, step, state);
    ok(c!(pcc_save_wait_copied(save, WAIT_MS)));
    let mut durable = sized!(pcc_durable);
    ok(c!(pcc_save_wait_durable(save, WAIT_MS, &mut durable)));
    c!(pcc_save_free(save));
    assert!(durable.durable_ns >= durable.copied_ns && durable.copied_ns > 0);
    durable.generation
}

fn restores(store: *const pcc_store, expected: &State) -> pcc_checkpoint_info {
    let mut found = expected.zeroed();
    let tensors = found.tensors();
    let mut checkpoint = null_mut();
    ok(c!(pcc_restore(store, null(), tensors.as_ptr(), tensors.len() as u64, &mut checkpoint)));
    assert!(found.data == expected.data, "the state came back changed");
    let mut info = sized!(pcc_checkpoint_info);
    ok(c!(pcc_checkpoint_get_info(checkpoint, &mut info)));
    c!(pcc_checkpoint_close(checkpoint));
    info
}

// ---- the main path ------------------------------------------------------------------------------------------

#[test]
fn what_was_saved_is_listed_read_and_restored_after_reopening() {
    let region = region(4, 1 << 20);
    let mut states: Vec<State> = (0..5).map(State::new).collect();
    let store = open(&region);
    for (step, state) in states.iter_mut().enumerate() {
        assert_eq!(save_durably(store, step as u64 * 10, state), step as u64 + 1);
    }
    ok(c!(pcc_drain(store, 0)));
    let mut stats = sized!(pcc_stats_info);
    ok(c!(pcc_stats(store, &mut stats)));
    assert_eq!((stats.saves_begun, stats.saves_durable, stats.in_flight), (5, 5, 0));
    assert_eq!(stats.newest_generation, 5);
    assert!(stats.busy_ns >= stats.durable_ns / 2 && stats.durable_ns >= stats.copied_ns);
    c!(pcc_close(store));

    let store = open(&region);
    let mut infos = [sized!(pcc_checkpoint_info); 2];
    let mut count = 0;
    ok(c!(pcc_list(store, infos.as_mut_ptr(), size_of::<pcc_checkpoint_info>() as u64, 2, &mut count)));
    assert!(count >= 1 && infos[0].generation == 5 && infos[0].step == 40, "the newest comes first");
    assert_eq!(infos[0].struct_bytes, size_of::<pcc_checkpoint_info>() as u64);
    let info = restores(store, &states[4]);
    assert_eq!((info.step, info.rejected, info.tensor_count), (40, 0, 5));
    let mut got = sized!(pcc_got_info);
    ok(c!(pcc_got(store, &mut got)));
    assert_eq!((got.slot_count, got.max_in_flight, got.keep), (4, 2, 1));
    assert_eq!(got.staging_bytes, 1 << 20);
    assert!(!c!(CStr::from_ptr(got.path_text)).is_empty());
    let recovery = text_of(|buf, cap| c!(pcc_recovery_text(store, buf, cap)));
    assert!(recovery.contains("checkpoint, generation 5 step 40"), "{recovery}");
    c!(pcc_close(store));
}

#[test]
fn tensors_and_metadata_can_be_enumerated_found_and_read_in_pieces() {
    let region = region(4, 1 << 20);
    let store = open(&region);
    let mut state = State::new(7);
    save_durably(store, 1, &mut state);
    let mut checkpoint = null_mut();
    ok(c!(pcc_checkpoint_open(store, null(), &mut checkpoint)));
    assert_eq!(c!(pcc_checkpoint_metadata_count(checkpoint)), 1);
    let (mut key, mut value, mut bytes) = (null(), null(), 0);
    ok(c!(pcc_checkpoint_metadata_get(checkpoint, 0, &mut key, null_mut(), &mut value, &mut bytes)));
    assert_eq!((c!(CStr::from_ptr(key)), c!(CStr::from_ptr(value)), bytes), (c"epoch", c"drei", 4));
    ok(c!(pcc_checkpoint_metadata_find(checkpoint, c"epoch".as_ptr(), &mut value, null_mut())));
    assert_eq!(c!(CStr::from_ptr(value)), c"drei");
    let status = c!(pcc_checkpoint_metadata_find(checkpoint, c"era".as_ptr(), &mut value, null_mut()));
    fails(status, PCC_NOT_FOUND, &["era"]);
    assert!(value.is_null());

    assert_eq!(c!(pcc_checkpoint_tensor_count(checkpoint)), 5);
    for (name, (shape, data)) in state.names.iter().zip(state.shapes.iter().zip(&state.data)) {
        let mut index = 0;
        ok(c!(pcc_checkpoint_tensor_find(checkpoint, name.as_ptr(), &mut index)));
        let mut info = sized!(pcc_tensor_info);
        ok(c!(pcc_checkpoint_tensor_get(checkpoint, index, &mut info)));
        assert_eq!(c!(CStr::from_ptr(info.name)), name.as_c_str());
        assert_eq!(info.name_bytes, name.as_bytes().len() as u64);
        assert_eq!((info.dtype, info.rank, info.bytes), (PCC_DTYPE_F32, 2, data.len() as u64 * 4));
        assert_eq!(c!(std::slice::from_raw_parts(info.shape, 2)), shape);
        assert!(info.tied_to.is_null());
    }
    let mut piece = [0f32; 1000];
    let mut read = pcc_read {
        name: state.names[2].as_ptr(),
        offset: 60_000 * 4,
        bytes: 4000,
        dst: piece.as_mut_ptr().cast(),
        ..sized!(pcc_read)
    };
    ok(c!(pcc_checkpoint_read(checkpoint, &read, 1)));
    assert!(piece == state.data[2][60_000..61_000]);
    read.offset = 64_000 * 4;
    fails(c!(pcc_checkpoint_read(checkpoint, &read, 1)), PCC_INVALID_ARGUMENT, &["4000 bytes at 256000"]);
    read.offset = u64::MAX;
    fails(c!(pcc_checkpoint_read(checkpoint, &read, 1)), PCC_INVALID_ARGUMENT, &["reads[0]"]);
    let overlapping = [pcc_read { offset: 0, bytes: 8, ..read }, pcc_read { offset: 8, bytes: 8, ..read }];
    fails(c!(pcc_checkpoint_read(checkpoint, overlapping.as_ptr(), 2)), PCC_INVALID_ARGUMENT, &["overlap"]);
    ok(c!(pcc_checkpoint_verify(checkpoint)));

    let mut header_bytes = [0u8; 8];
    ok(c!(pcc_checkpoint_read_payload(checkpoint, 0, header_bytes.as_mut_ptr().cast(), 8)));
    assert_eq!((u64::from_le_bytes(header_bytes) + 8) % 4096, 0, "the payload is a safetensors file");
    c!(pcc_checkpoint_close(checkpoint));
    c!(pcc_close(store));
}

#[test]
fn tied_tensors_restore_into_one_memory_or_into_two() {
    let region = region(4, 1 << 20);
    let store = open(&region);
    let mut state = State::new(3);
    let mut tensors = state.tensors();
    tensors.truncate(3);
    tensors[2] = pcc_tensor { name: c"tied".as_ptr(), ..tensors[0] };
    let mut save = null_mut();
    ok(c!(pcc_save_begin(store, 1, tensors.as_ptr(), 3, null(), 0, null(), &mut save)));
    ok(c!(pcc_save_wait_durable(save, WAIT_MS, null_mut())));
    c!(pcc_save_free(save));
    let expected = state.data[0].clone();
    state.data[0].fill(0.0);
    ok(c!(pcc_restore(store, null(), tensors.as_ptr(), 3, null_mut())));
    assert_eq!(state.data[0], expected);
    let mut second = vec![0f32; expected.len()];
    tensors[2].data = second.as_mut_ptr().cast();
    ok(c!(pcc_restore(store, null(), tensors.as_ptr(), 3, null_mut())));
    assert_eq!((&second, &state.data[0]), (&expected, &expected));
    let mut checkpoint = null_mut();
    ok(c!(pcc_checkpoint_open(store, null(), &mut checkpoint)));
    let mut index = 0;
    ok(c!(pcc_checkpoint_tensor_find(checkpoint, c"tied".as_ptr(), &mut index)));
    let mut info = sized!(pcc_tensor_info);
    ok(c!(pcc_checkpoint_tensor_get(checkpoint, index, &mut info)));
    assert_eq!(c!(CStr::from_ptr(info.tied_to)), state.names[0].as_c_str());
    c!(pcc_checkpoint_close(checkpoint));
    c!(pcc_close(store));
}

#[test]
fn a_restore_into_another_model_is_refused_and_writes_nothing() {
    let region = region(4, 1 << 20);
    let store = open(&region);
    save_durably(store, 1, &mut State::new(1));
    let mut other = State::new(1).zeroed();
    other.shapes[2] = [321, 200];
    let tensors = other.tensors();
    let mut checkpoint: *mut pcc_checkpoint = std::ptr::dangling_mut();
    let status = c!(pcc_restore(store, null(), tensors.as_ptr(), 5, &mut checkpoint));
    fails(status, PCC_INVALID_ARGUMENT, &["läyer.2", "[321, 200]", "[200, 321]"]);
    assert!(checkpoint.is_null());
    assert!(other.data.iter().flatten().all(|&x| x == 0.0));
    let missing = pcc_tensor { name: c"bias".as_ptr(), ..other.tensors()[0] };
    fails(c!(pcc_restore(store, null(), &missing, 1, null_mut())), PCC_NOT_FOUND, &["bias"]);
    c!(pcc_close(store));
}

#[test]
fn raw_saves_take_bytes_from_many_threads_and_report_gaps() {
    let region = region(4, 1 << 20);
    let store = open(&region);
    let data: Vec<u8> = (0..500_001u32).map(|i| (i * 7 + i / 251) as u8).collect();
    let mut raw = null_mut();
    ok(c!(pcc_raw_begin(store, 3, data.len() as u64, null(), 0, null(), &mut raw)));
    let shared = raw as usize;
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let data = &data;
            scope.spawn(move || {
                for (i, piece) in data.chunks(9001).enumerate().filter(|(i, _)| i % 4 == thread && *i != 30) {
                    let raw = shared as *const pcc_raw;
                    let bytes = piece.len() as u64;
                    ok(c!(pcc_raw_write(raw, i as u64 * 9001, piece.as_ptr().cast(), bytes)));
                }
            });
        }
    });
    let mut save = std::ptr::dangling_mut();
    fails(c!(pcc_raw_commit(raw, &mut save)), PCC_INVALID_STATE, &["270030"]);
    assert!(save.is_null());
    let one = data.as_ptr().cast::<c_void>();
    fails(c!(pcc_raw_write(raw, 0, one, 1)), PCC_INVALID_ARGUMENT, &["written before"]);
    fails(c!(pcc_raw_write(raw, 500_001, one, 1)), PCC_INVALID_ARGUMENT, &["pass the announced"]);
    fails(c!(pcc_raw_write(raw, 270_030, null(), 1)), PCC_BAD_POINTER, &["data is NULL"]);
    ok(c!(pcc_raw_write(raw, 270_030, data[270_030..].as_ptr().cast(), 9001)));
    let mut progress = sized!(pcc_progress);
    ok(c!(pcc_raw_progress(raw, &mut progress)));
    assert_eq!((progress.step, progress.copied), (3, 1));
    ok(c!(pcc_raw_commit(raw, &mut save)));
    fails(c!(pcc_raw_commit(raw, &mut null_mut())), PCC_INVALID_STATE, &["already committed"]);
    fails(c!(pcc_raw_write(raw, 0, one, 1)), PCC_INVALID_STATE, &["committed"]);
    c!(pcc_raw_free(raw));
    ok(c!(pcc_save_wait_durable(save, WAIT_MS, null_mut())));
    c!(pcc_save_free(save));
    let mut found = vec![0u8; data.len()];
    let shape = [data.len() as u64];
    let tensor = pcc_tensor {
        name: c"raw".as_ptr(),
        shape: shape.as_ptr(),
        rank: 1,
        dtype: PCC_DTYPE_U8,
        data: found.as_mut_ptr().cast(),
        bytes: data.len() as u64,
        ..sized!(pcc_tensor)
    };
    ok(c!(pcc_restore(store, null(), &tensor, 1, null_mut())));
    assert!(found == data);
    c!(pcc_close(store));
}

// ---- damage -------------------------------------------------------------------------------------------------

#[test]
fn damage_is_reported_named_and_passed_over() {
    use std::os::unix::fs::FileExt;
    let region = region(4, 1 << 20);
    let mut options = open_options();
    options.keep = 2;
    let store = open_with(&region, &options);
    let mut states = [State::new(1), State::new(2)];
    save_durably(store, 1, &mut states[0]);
    save_durably(store, 2, &mut states[1]);
    let mut info = sized!(pcc_checkpoint_info);
    ok(c!(pcc_list(store, &mut info, info.struct_bytes, 1, &mut 0)));
    let mut got = sized!(pcc_got_info);
    ok(c!(pcc_got(store, &mut got)));
    c!(pcc_close(store));
    let path = Path::new(region.path.to_str().unwrap());
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    // Slots end where the file ends; the byte is in the middle of the large tensor.
    let slot_offset = file.metadata().unwrap().len() - u64::from(4 - info.slot) * got.slot_bytes;
    let mut byte = [0];
    file.read_exact_at(&mut byte, slot_offset + 150_000).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], slot_offset + 150_000).unwrap();
    file.sync_all().unwrap();

    let store = open_with(&region, &options);
    let mut report = sized!(pcc_verify_report);
    let mut text = [0u8; 1024];
    let status = c!(pcc_verify(store, 0, &mut report, text.as_mut_ptr().cast(), 1024));
    fails(status, PCC_CORRUPT, &["does not match its hash"]);
    assert!(pcc_last_error_offset() != PCC_NO_OFFSET, "the error says where");
    assert_eq!(text_of(|buf, cap| c!(pcc_last_error_path(buf, cap))), region.path.to_str().unwrap());
    assert_eq!((report.intact, report.damaged), (1, 1));
    let lines = CStr::from_bytes_until_nul(&text).unwrap().to_str().unwrap();
    assert_eq!(report.text_bytes, lines.len() as u64 + 1);
    assert!(lines.contains("generation 2 step 2") && lines.contains("generation 1 step 1"), "{lines}");
    ok(c!(pcc_verify(store, 1, null_mut(), null_mut(), 0)));
    fails(c!(pcc_verify(store, 99, null_mut(), null_mut(), 0)), PCC_NOT_FOUND, &["99"]);

    assert_eq!(restores(store, &states[0]).rejected, 1);
    let mut checkpoint = null_mut();
    ok(c!(pcc_checkpoint_open(store, null(), &mut checkpoint)));
    let rejected = text_of(|buf, cap| c!(pcc_checkpoint_rejected(checkpoint, buf, cap)));
    assert!(rejected.contains("generation 2 step 2: verify checkpoint"), "{rejected}");
    c!(pcc_checkpoint_close(checkpoint));
    let select = pcc_select_options {
        select: PCC_SELECT_GENERATION,
        value: 2,
        verify: 1,
        ..sized!(pcc_select_options)
    };
    fails(c!(pcc_checkpoint_open(store, &select, &mut checkpoint)), PCC_CORRUPT, &[]);
    assert!(checkpoint.is_null());
    c!(pcc_close(store));
}

// ---- bad arguments ------------------------------------------------------------------------------------------

#[test]
fn null_is_refused_everywhere_and_freeing_it_is_nothing() {
    c!(pcc_close(null_mut()));
    c!(pcc_save_free(null_mut()));
    c!(pcc_raw_free(null_mut()));
    c!(pcc_checkpoint_close(null_mut()));
    let (store, save): (*const pcc_store, *const pcc_save) = (null(), null());
    let (raw, checkpoint): (*const pcc_raw, *const pcc_checkpoint) = (null(), null());
    let bad = |status| fails(status, PCC_BAD_POINTER, &["NULL"]);
    bad(c!(pcc_format(null(), 4, 1, null())));
    bad(c!(pcc_grow(null(), 4, 1, 0)));
    bad(c!(pcc_open(null(), null(), &mut null_mut())));
    bad(c!(pcc_open(c"x".as_ptr(), null(), null_mut())));
    bad(c!(pcc_drain(store, 0)));
    bad(c!(pcc_list(store, null_mut(), 80, 0, &mut 0)));
    bad(c!(pcc_pin(store, 1)));
    bad(c!(pcc_unpin(store, 1)));
    bad(c!(pcc_mark_global(store, 0, 1, null_mut())));
    bad(c!(pcc_abandon(store, 0, 1, null_mut())));
    bad(c!(pcc_discard_newer(store, 1, null_mut())));
    bad(c!(pcc_verify(store, 0, null_mut(), null_mut(), 0)));
    bad(c!(pcc_repair(store, 0, null_mut())));
    bad(c!(pcc_stats(store, &mut sized!(pcc_stats_info))));
    bad(c!(pcc_got(store, &mut sized!(pcc_got_info))));
    assert_eq!(c!(pcc_recovery_text(store, null_mut(), 0)), 0);
    bad(pcc_last_error_status());
    bad(c!(pcc_save_begin(store, 0, null(), 0, null(), 0, null(), &mut null_mut())));
    bad(c!(pcc_payload_bytes(null(), 1, null(), 0, &mut 0)));
    bad(c!(pcc_payload_bytes(null(), 0, null(), 0, null_mut())));
    bad(c!(pcc_save_wait_copied(save, 0)));
    bad(c!(pcc_save_wait_durable(save, 0, null_mut())));
    bad(c!(pcc_save_progress(save, &mut sized!(pcc_progress))));
    bad(c!(pcc_save_cancel(save)));
    assert_eq!(c!(pcc_save_error(save, null_mut(), 0)), 0);
    bad(c!(pcc_save_event_fd(save, &mut 0)));
    bad(c!(pcc_save_on_end(save, None, null_mut())));
    bad(c!(pcc_raw_begin(store, 0, 1, null(), 0, null(), &mut null_mut())));
    bad(c!(pcc_raw_write(raw, 0, null(), 0)));
    bad(c!(pcc_raw_commit(null_mut(), &mut null_mut())));
    bad(c!(pcc_raw_progress(raw, &mut sized!(pcc_progress))));
    bad(c!(pcc_raw_cancel(raw)));
    bad(c!(pcc_checkpoint_open(store, null(), &mut null_mut())));
    bad(c!(pcc_restore(store, null(), null(), 0, null_mut())));
    bad(c!(pcc_checkpoint_get_info(checkpoint, &mut sized!(pcc_checkpoint_info))));
    assert_eq!(c!(pcc_checkpoint_rejected(checkpoint, null_mut(), 0)), 0);
    assert_eq!(c!(pcc_checkpoint_metadata_count(checkpoint)), 0);
    assert_eq!(c!(pcc_checkpoint_tensor_count(checkpoint)), 0);
    let (mut key, mut value) = (null(), null());
    bad(c!(pcc_checkpoint_metadata_get(checkpoint, 0, &mut key, null_mut(), &mut value, null_mut())));
    bad(c!(pcc_checkpoint_metadata_find(checkpoint, c"k".as_ptr(), &mut value, null_mut())));
    bad(c!(pcc_checkpoint_tensor_get(checkpoint, 0, &mut sized!(pcc_tensor_info))));
    bad(c!(pcc_checkpoint_tensor_find(checkpoint, c"t".as_ptr(), &mut 0)));
    bad(c!(pcc_checkpoint_read(checkpoint, null(), 0)));
    bad(c!(pcc_checkpoint_read_payload(checkpoint, 0, null_mut(), 0)));
    bad(c!(pcc_checkpoint_verify(checkpoint)));
    bad(c!(pcc_tune(store, null(), &mut sized!(pcc_tuning))));
    bad(c!(pcc_open_options_init(null_mut(), 88)));
    bad(c!(pcc_format_options_init(null_mut(), 24)));
    bad(c!(pcc_save_options_init(null_mut(), 24)));
    bad(c!(pcc_select_options_init(null_mut(), 24)));
    bad(c!(pcc_tune_options_init(null_mut(), 56)));
    bad(c!(pcc_dtype_from_name(null(), &mut 0)));
    bad(c!(pcc_dtype_from_name(c"F32".as_ptr(), null_mut())));
    assert_eq!(pcc_last_error_errno(), 0);
}

#[test]
fn handles_of_the_wrong_kind_and_freed_ones_are_noticed() {
    let region = region(4, 1 << 20);
    let store = open(&region);
    fails(c!(pcc_save_cancel(store.cast())), PCC_BAD_POINTER, &["pcc_save"]);
    fails(c!(pcc_checkpoint_verify(store.cast())), PCC_BAD_POINTER, &["pcc_checkpoint"]);
    c!(pcc_save_free(store.cast()));
    assert_eq!(pcc_last_error_status(), PCC_BAD_POINTER);
    let misaligned = (store as usize + 1) as *const pcc_store;
    fails(c!(pcc_drain(misaligned, 0)), PCC_BAD_POINTER, &["multiple of 8"]);
    ok(c!(pcc_drain(store, 0)));
    c!(pcc_close(store));
}

#[test]
fn bad_tensors_are_refused_by_name_and_leave_the_store_usable() {
    let region = region(4, 1 << 20);
    let store = open(&region);
    let mut state = State::new(1);
    let good = state.tensors();
    let refuse = |change: &dyn Fn(&mut Vec<pcc_tensor>), status: pcc_status, parts: &[&str]| {
        let mut tensors = good.clone();
        change(&mut tensors);
        let mut save = std::ptr::dangling_mut();
        let count = tensors.len() as u64;
        let result = c!(pcc_save_begin(store, 1, tensors.as_ptr(), count, null(), 0, null(), &mut save));
        fails(result, status, parts);
        assert!(save.is_null());
    };
    refuse(&|t| t[1].name = null(), PCC_BAD_POINTER, &["tensors[1].name is NULL"]);
    refuse(&|t| t[1].name = c"".as_ptr(), PCC_INVALID_ARGUMENT, &[]);
    refuse(&|t| t[1].name = c"a\xff".as_ptr(), PCC_INVALID_ARGUMENT, &["not UTF-8 at byte 1"]);
    refuse(&|t| t[1].name = t[0].name, PCC_INVALID_ARGUMENT, &["läyer.0"]);
    refuse(&|t| t[1].name = c"__metadata__".as_ptr(), PCC_INVALID_ARGUMENT, &[]);
    refuse(&|t| t[1].name = c"__pccheck_x".as_ptr(), PCC_INVALID_ARGUMENT, &[]);
    refuse(&|t| t[1].shape = null(), PCC_BAD_POINTER, &["tensors[1].shape is NULL"]);
    refuse(&|t| t[1].shape = (t[1].shape as usize + 4) as *const u64, PCC_BAD_POINTER, &["multiple of 8"]);
    refuse(&|t| t[1].rank = 65, PCC_INVALID_ARGUMENT, &["tensors[1].rank is 65"]);
    refuse(&|t| t[1].dtype = 0, PCC_INVALID_ARGUMENT, &["tensors[1].dtype", "is 0"]);
    refuse(&|t| t[1].dtype = 24, PCC_INVALID_ARGUMENT, &["is 24"]);
    refuse(&|t| t[1].data = null_mut(), PCC_BAD_POINTER, &["tensors[1].data is NULL"]);
    refuse(&|t| t[1].bytes = 5, PCC_INVALID_ARGUMENT, &["läyer.1"]);
    refuse(&|t| t[1].bytes = u64::MAX, PCC_BAD_POINTER, &["pass the end of memory"]);
    refuse(&|t| t[1].bytes = i64::MAX as u64 + 1, PCC_BAD_POINTER, &["pass the end of memory"]);
    refuse(&|t| t[1].device = 2, PCC_UNSUPPORTED, &["tensors[1]", "host memory"]);
    refuse(&|t| t[1].device_index = 1, PCC_INVALID_ARGUMENT, &["device_index"]);
    refuse(&|t| t[0].struct_bytes = 0, PCC_INVALID_ARGUMENT, &["struct_bytes is 0"]);
    refuse(&|t| t[0].struct_bytes = 55, PCC_INVALID_ARGUMENT, &["struct_bytes is 55"]);
    refuse(&|t| t[3].struct_bytes = 64, PCC_INVALID_ARGUMENT, &["tensors[3].struct_bytes is 64"]);
    static HUGE: [u64; 2] = [1 << 40, 1 << 40];
    refuse(&|t| t[1].shape = HUGE.as_ptr(), PCC_INVALID_ARGUMENT, &["overflow"]);

    let begin_count =
        |count: u64| c!(pcc_save_begin(store, 1, good.as_ptr(), count, null(), 0, null(), &mut null_mut()));
    fails(begin_count(u64::MAX), PCC_TOO_LARGE, &["at most"]);
    let pairs = [
        pcc_pair { key: c"k".as_ptr(), value: c"1".as_ptr() },
        pcc_pair { key: c"k".as_ptr(), value: c"2".as_ptr() },
        pcc_pair { key: c"pccheck.raw".as_ptr(), value: c"1".as_ptr() },
        pcc_pair { key: c"v".as_ptr(), value: null() },
    ];
    let with_pairs = |pairs: &[pcc_pair]| {
        let count = pairs.len() as u64;
        c!(pcc_save_begin(store, 1, good.as_ptr(), 5, pairs.as_ptr(), count, null(), &mut null_mut()))
    };
    fails(with_pairs(&pairs[..2]), PCC_INVALID_ARGUMENT, &["k"]);
    fails(with_pairs(&pairs[2..3]), PCC_INVALID_ARGUMENT, &["pccheck.raw"]);
    fails(with_pairs(&pairs[3..]), PCC_BAD_POINTER, &["metadata[0].value is NULL"]);
    let stream = pcc_save_options { stream: 8 as *mut c_void, ..sized!(pcc_save_options) };
    let status = c!(pcc_save_begin(store, 1, good.as_ptr(), 5, null(), 0, &stream, &mut null_mut()));
    fails(status, PCC_UNSUPPORTED, &["stream"]);

    let large = vec![0u8; 3 << 20];
    let shape = [large.len() as u64];
    let large = pcc_tensor {
        name: c"large".as_ptr(),
        shape: shape.as_ptr(),
        rank: 1,
        dtype: PCC_DTYPE_U8,
        data: large.as_ptr().cast_mut().cast(),
        bytes: shape[0],
        ..sized!(pcc_tensor)
    };
    let status = c!(pcc_save_begin(store, 1, &large, 1, null(), 0, null(), &mut null_mut()));
    fails(status, PCC_TOO_LARGE, &["slot holds", "grow"]);
    let mut needed = 0;
    ok(c!(pcc_payload_bytes(&large, 1, null(), 0, &mut needed)));
    assert!(needed > shape[0] && needed < shape[0] + 8192);
    save_durably(store, 2, &mut state);
    restores(store, &state);
    c!(pcc_close(store));
}

#[test]
fn larger_elements_of_a_newer_program_are_taken_while_their_tail_is_zero() {
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Newer {
        known: pcc_tensor,
        unknown: u64,
    }
    let region = region(4, 1 << 20);
    let store = open(&region);
    let mut state = State::new(9);
    let mut tensors: Vec<Newer> =
        state.tensors().into_iter().map(|known| Newer { known, unknown: 0 }).collect();
    for tensor in &mut tensors {
        tensor.known.struct_bytes = size_of::<Newer>() as u64;
    }
    let mut save = null_mut();
    ok(c!(pcc_save_begin(store, 1, tensors.as_ptr().cast(), 5, null(), 0, null(), &mut save)));
    ok(c!(pcc_save_wait_durable(save, WAIT_MS, null_mut())));
    c!(pcc_save_free(save));
    restores(store, &state);
    tensors[4].unknown = 1;
    let status = c!(pcc_save_begin(store, 1, tensors.as_ptr().cast(), 5, null(), 0, null(), &mut save));
    fails(status, PCC_UNSUPPORTED, &["newer than this library"]);
    c!(pcc_close(store));
}

#[test]
fn bad_options_and_paths_are_refused() {
    let region = region(4, 1 << 20);
    let mut store = std::ptr::dangling_mut();
    let mut refuse = |change: &dyn Fn(&mut pcc_open_options), status, parts: &[&str]| {
        let mut options = open_options();
        change(&mut options);
        fails(c!(pcc_open(region.path.as_ptr(), &options, &mut store)), status, parts);
        assert!(store.is_null());
        store = std::ptr::dangling_mut();
    };
    refuse(&|o| o.struct_bytes = 0, PCC_INVALID_ARGUMENT, &["struct_bytes is 0"]);
    refuse(&|o| o.struct_bytes = 4, PCC_INVALID_ARGUMENT, &["struct_bytes is 4"]);
    refuse(&|o| o.read_only = 2, PCC_INVALID_ARGUMENT, &["read_only is 2"]);
    refuse(&|o| o.hold = 7, PCC_INVALID_ARGUMENT, &["hold is 7"]);
    refuse(&|o| o.medium = 9, PCC_INVALID_ARGUMENT, &["medium is 9"]);
    refuse(&|o| o.backend = 3, PCC_INVALID_ARGUMENT, &["backend is 3"]);
    refuse(&|o| o.required_durability = 0, PCC_INVALID_ARGUMENT, &["required_durability is 0"]);
    refuse(&|o| o.reserved = 1, PCC_INVALID_ARGUMENT, &["reserved is 1"]);
    refuse(&|o| o.max_in_flight = 0, PCC_INVALID_ARGUMENT, &["max_in_flight is 0"]);
    refuse(&|o| o.max_in_flight = 4, PCC_INVALID_ARGUMENT, &["5 slots", "has 4"]);
    refuse(&|o| o.chunk_bytes = 100, PCC_INVALID_ARGUMENT, &["chunk_bytes is 100"]);
    refuse(&|o| o.staging_bytes = 0, PCC_INVALID_ARGUMENT, &["staging_bytes is 0"]);

    let mut store = null_mut();
    fails(
        c!(pcc_open(c"/nonexistent/region".as_ptr(), null(), &mut store)),
        PCC_NOT_FOUND,
        &["/nonexistent"],
    );
    assert_eq!(pcc_last_error_errno(), libc::ENOENT);
    assert!(!text_of(|buf, cap| c!(pcc_last_error_operation(buf, cap))).is_empty());
    fails(c!(pcc_open(c"".as_ptr(), null(), &mut store)), PCC_INVALID_ARGUMENT, &["path is empty"]);
    fails(c!(pcc_format(region.path.as_ptr(), 4, 1 << 20, null())), PCC_ALREADY_EXISTS, &["force"]);
    fails(c!(pcc_format(region.path.as_ptr(), 1, 1 << 20, null())), PCC_INVALID_ARGUMENT, &["slot_count"]);
    let writer = open(&region);
    let mut options = open_options();
    options.lock_wait_ms = 0;
    fails(c!(pcc_open(region.path.as_ptr(), &options, &mut store)), PCC_IN_USE, &[]);
    options.read_only = 1;
    let reader = open_with(&region, &options);
    fails(c!(pcc_pin(reader, 1)), PCC_READ_ONLY, &[]);
    fails(c!(pcc_raw_begin(reader, 1, 1, null(), 0, null(), &mut null_mut())), PCC_READ_ONLY, &[]);
    fails(c!(pcc_checkpoint_open(reader, null(), &mut null_mut())), PCC_NOT_FOUND, &["no checkpoint yet"]);
    c!(pcc_close(reader));
    c!(pcc_close(writer));
}

#[test]
fn error_text_is_cut_at_characters_and_kept_per_thread() {
    let mut store = null_mut();
    fails(c!(pcc_open(c"/nonexistent/äöü".as_ptr(), null(), &mut store)), PCC_NOT_FOUND, &["äöü"]);
    let whole = last_error();
    for cap in 1..whole.len() + 2 {
        let mut buffer = vec![0x55u8; cap + 1];
        assert_eq!(c!(pcc_last_error(buffer.as_mut_ptr().cast(), cap as u64)), whole.len() as u64 + 1);
        let text = CStr::from_bytes_until_nul(&buffer).unwrap().to_str().expect("cut at a character");
        assert!(whole.starts_with(text) && text.len() + 4 > cap.min(whole.len()));
        assert_eq!(buffer[cap], 0x55, "nothing is written beyond cap");
    }
    std::thread::scope(|scope| {
        scope.spawn(|| {
            assert_eq!((c!(pcc_last_error(null_mut(), 0)), pcc_last_error_status()), (0, PCC_OK));
        });
    });
    ok(c!(pcc_payload_bytes(null(), 0, null(), 0, &mut 0)));
    assert_eq!(last_error(), whole, "success leaves the last error as it is");
}

// ---- waits, callbacks, ends ---------------------------------------------------------------------------------

/// A raw save that was begun and not committed keeps its slot for as long as a test likes.
fn occupy(store: *const pcc_store) -> *mut pcc_raw {
    let mut raw = null_mut();
    ok(c!(pcc_raw_begin(store, 1, 100, null(), 0, null(), &mut raw)));
    raw
}

#[test]
fn waits_keep_their_time() {
    let region = region(3, 1 << 20);
    let mut options = open_options();
    options.max_in_flight = 1;
    let store = open_with(&region, &options);
    let raw = occupy(store);
    let mut wait = sized!(pcc_save_options);
    let begun = Instant::now();
    let status = c!(pcc_raw_begin(store, 2, 1, null(), 0, &wait, &mut null_mut()));
    fails(status, PCC_NO_SLOT, &["max_in_flight 1"]);
    fails(c!(pcc_drain(store, 0)), PCC_TIMED_OUT, &[]);
    assert!(begun.elapsed() < Duration::from_secs(5), "0 only looks");
    wait.wait_ms = 80;
    let begun = Instant::now();
    fails(c!(pcc_raw_begin(store, 2, 1, null(), 0, &wait, &mut null_mut())), PCC_NO_SLOT, &[]);
    fails(c!(pcc_drain(store, 80)), PCC_TIMED_OUT, &[]);
    assert!(begun.elapsed() >= Duration::from_millis(160));
    // For ever ends when the save does.
    let shared = raw as usize;
    std::thread::scope(|scope| {
        scope.spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            ok(c!(pcc_raw_cancel(shared as *const pcc_raw)));
        });
        ok(c!(pcc_drain(store, -1)));
    });
    fails(c!(pcc_raw_write(raw, 0, [0u8; 1].as_ptr().cast(), 1)), PCC_CANCELLED, &[]);
    c!(pcc_raw_free(raw));
    let mut state = State::new(1);
    let save = begin(store, 3, &mut state);
    ok(c!(pcc_save_wait_copied(save, -1)));
    ok(c!(pcc_save_wait_durable(save, -1, null_mut())));
    ok(c!(pcc_save_wait_durable(save, 0, null_mut())));
    assert_eq!(c!(pcc_save_error(save, null_mut(), 0)), 0);
    c!(pcc_save_free(save));
    c!(pcc_close(store));
}

#[test]
fn closing_ends_what_is_in_flight_and_saves_outlive_their_store() {
    let region = region(4, 1 << 20);
    let store = open(&region);
    let mut state = State::new(1);
    let raw = occupy(store);
    ok(c!(pcc_raw_write(raw, 0, [7u8; 100].as_ptr().cast(), 100)));
    let mut save = null_mut();
    ok(c!(pcc_raw_commit(raw, &mut save)));
    let other = occupy(store);
    let tensors = begin(store, 5, &mut state);
    c!(pcc_close(store));
    for save in [save, tensors] {
        let status = c!(pcc_save_wait_durable(save, WAIT_MS, null_mut()));
        assert!([PCC_OK, PCC_CANCELLED].contains(&status), "{}", last_error());
        let text = text_of(|buf, cap| c!(pcc_save_error(save, buf, cap)));
        assert_eq!(text.is_empty(), status == PCC_OK, "{text:?}");
        let mut progress = sized!(pcc_progress);
        ok(c!(pcc_save_progress(save, &mut progress)));
        assert_eq!(progress.ended, 1);
        c!(pcc_save_free(save));
    }
    fails(c!(pcc_raw_write(other, 0, [7u8; 100].as_ptr().cast(), 100)), PCC_CANCELLED, &["closed"]);
    c!(pcc_raw_free(other));
    c!(pcc_raw_free(raw));
    let store = open(&region);
    c!(pcc_close(store));
}

static CALLS: AtomicU32 = AtomicU32::new(0);

unsafe extern "C" fn count_call(user: *mut c_void) {
    assert_eq!(user as usize, 42);
    CALLS.fetch_add(1, Ordering::SeqCst);
}

/// `user` points to the save, which the callback frees.
unsafe extern "C" fn free_from_callback(user: *mut c_void) {
    let save: *mut pcc_save = user.cast();
    assert_eq!(c!(pcc_save_wait_durable(save, 0, null_mut())), PCC_OK);
    c!(pcc_save_free(save));
    CALLS.fetch_add(100, Ordering::SeqCst);
}

#[test]
fn the_end_is_told_once_by_callback_and_by_descriptor() {
    let region = region(4, 1 << 20);
    let store = open(&region);
    let mut state = State::new(1);
    let readable = |fd: i32, timeout_ms: i32| {
        let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        // SAFETY: one element.
        let count = unsafe { libc::poll(&mut poll, 1, timeout_ms) };
        count == 1 && poll.revents & libc::POLLIN != 0
    };
    let raw = occupy(store);
    ok(c!(pcc_raw_write(raw, 0, [7u8; 100].as_ptr().cast(), 100)));
    let mut save = null_mut();
    ok(c!(pcc_raw_commit(raw, &mut save)));
    c!(pcc_raw_free(raw));
    ok(c!(pcc_save_on_end(save, Some(count_call), 42 as *mut c_void)));
    let (mut fd, mut again) = (-1, -1);
    ok(c!(pcc_save_event_fd(save, &mut fd)));
    ok(c!(pcc_save_event_fd(save, &mut again)));
    assert!(fd >= 0 && fd == again);
    assert!(readable(fd, WAIT_MS as i32), "the end makes the descriptor readable");
    ok(c!(pcc_save_wait_durable(save, 0, null_mut())));
    let deadline = Instant::now() + Duration::from_secs(60);
    while CALLS.load(Ordering::SeqCst) == 0 && Instant::now() < deadline {
        std::thread::yield_now();
    }
    assert_eq!(CALLS.load(Ordering::SeqCst), 1);
    // After the end: at once, on this thread, and once more only because it is another callback.
    ok(c!(pcc_save_on_end(save, Some(count_call), 42 as *mut c_void)));
    assert_eq!(CALLS.load(Ordering::SeqCst), 2);
    c!(pcc_save_free(save));

    let save = begin(store, 2, &mut state);
    ok(c!(pcc_save_wait_durable(save, WAIT_MS, null_mut())));
    let mut fd = -1;
    ok(c!(pcc_save_event_fd(save, &mut fd)));
    assert!(readable(fd, 0), "a descriptor that is asked for after the end is readable at once");
    ok(c!(pcc_save_on_end(save, Some(free_from_callback), save.cast())));
    assert_eq!(CALLS.load(Ordering::SeqCst), 102);

    // A callback that was taken back by freeing is not called.
    let raw = occupy(store);
    c!(pcc_raw_free(raw));
    ok(c!(pcc_drain(store, WAIT_MS)));
    c!(pcc_close(store));
    assert_eq!(CALLS.load(Ordering::SeqCst), 102);
}

#[test]
fn one_store_serves_many_threads() {
    let region = region(8, 1 << 20);
    let mut options = open_options();
    options.max_in_flight = 4;
    let store = open_with(&region, &options);
    let shared = store as usize;
    std::thread::scope(|scope| {
        for thread in 0..4u32 {
            scope.spawn(move || {
                let store = shared as *const pcc_store;
                for round in 0..8 {
                    save_durably(store, u64::from(thread * 100 + round), &mut State::new(thread));
                    let mut stats = sized!(pcc_stats_info);
                    ok(c!(pcc_stats(store, &mut stats)));
                    let mut checkpoint = null_mut();
                    match c!(pcc_checkpoint_open(store, null(), &mut checkpoint)) {
                        PCC_OK => {
                            let mut info = sized!(pcc_checkpoint_info);
                            ok(c!(pcc_checkpoint_get_info(checkpoint, &mut info)));
                            let expected = State::new((info.step / 100) as u32);
                            let mut first = vec![0f32; expected.data[4].len()];
                            let read = pcc_read {
                                name: c"läyer.4".as_ptr(),
                                bytes: first.len() as u64 * 4,
                                dst: first.as_mut_ptr().cast(),
                                ..sized!(pcc_read)
                            };
                            ok(c!(pcc_checkpoint_read(checkpoint, &read, 1)));
                            assert!(first == expected.data[4]);
                        }
                        // It was reclaimed between the list and the opening, or readers hold too much.
                        status => assert!([PCC_RECLAIMED, PCC_NO_SLOT].contains(&status), "{}", last_error()),
                    }
                    c!(pcc_checkpoint_close(checkpoint));
                }
            });
        }
    });
    let mut stats = sized!(pcc_stats_info);
    ok(c!(pcc_stats(store, &mut stats)));
    assert_eq!((stats.saves_durable, stats.saves_failed), (32, 0));
    c!(pcc_close(store));
}

#[test]
fn pins_marks_and_discards_reach_the_store() {
    let region = region(6, 1 << 20);
    let mut options = open_options();
    options.max_in_flight = 1;
    options.hold = 1;
    options.run_id = 7;
    let store = open_with(&region, &options);
    for step in 1..=3 {
        save_durably(store, step, &mut State::new(step as u32));
    }
    let count = || {
        let mut count = 0;
        ok(c!(pcc_list(store, null_mut(), 0, 0, &mut count)));
        count
    };
    assert_eq!(count(), 3);
    ok(c!(pcc_pin(store, 1)));
    let (mut generation, mut discarded) = (0, 9);
    ok(c!(pcc_mark_global(store, 7, 2, &mut generation)));
    assert_eq!((generation, count()), (2, 3), "1 is pinned, 2 is marked, 3 is newer");
    ok(c!(pcc_unpin(store, 1)));
    assert_eq!(count(), 2);
    fails(c!(pcc_abandon(store, 7, 2, &mut discarded)), PCC_INVALID_STATE, &["marked"]);
    assert_eq!(discarded, 0);
    ok(c!(pcc_discard_newer(store, 2, &mut discarded)));
    assert_eq!((discarded, count()), (1, 1));
    fails(c!(pcc_mark_global(store, 8, 2, null_mut())), PCC_NOT_FOUND, &["run 8"]);
    let mut repaired = 9;
    ok(c!(pcc_repair(store, 1000, &mut repaired)));
    assert_eq!(repaired, 0);
    c!(pcc_close(store));
    ok(c!(pcc_grow(region.path.as_ptr(), 8, 4 << 20, 0)));
    let store = open(&region);
    restores(store, &State::new(2));
    c!(pcc_close(store));
}

#[test]
fn tuning_uses_what_the_store_measured_or_what_it_is_told() {
    let mut options = sized!(pcc_tune_options);
    ok(c!(pcc_tune_options_init(&mut options, options.struct_bytes)));
    options.state_bytes = 1_000_000_000;
    options.iteration_ns = 100_000_000;
    let mut tuning = sized!(pcc_tuning);
    fails(c!(pcc_tune(null(), &options, &mut tuning)), PCC_BAD_POINTER, &["durable_bytes_per_s"]);
    options.durable_bytes_per_s = 1_000_000_000;
    options.stall_ns = 0;
    options.max_in_flight = 2;
    ok(c!(pcc_tune(null(), &options, &mut tuning)));
    assert_eq!((tuning.interval_iterations, tuning.durable_ns), (10, 2_000_000_000));
    let region = region(4, 1 << 20);
    let store = open(&region);
    options.durable_bytes_per_s = 0;
    fails(c!(pcc_tune(store, &options, &mut tuning)), PCC_INVALID_STATE, &["no save"]);
    save_durably(store, 1, &mut State::new(1));
    options.stall_ns = u64::MAX;
    options.max_in_flight = 0;
    ok(c!(pcc_tune(store, &options, &mut tuning)));
    assert!(tuning.interval_iterations >= 1 && tuning.worst_lost_ns > tuning.expected_lost_ns);
    c!(pcc_close(store));
}

// ---- fork ---------------------------------------------------------------------------------------------------

#[test]
fn a_forked_child_is_refused_can_free_everything_and_leaves_the_parent_alone() {
    let region = region(4, 1 << 20);
    let store = open(&region);
    let mut state = State::new(4);
    save_durably(store, 1, &mut state);
    let mut checkpoint = null_mut();
    ok(c!(pcc_checkpoint_open(store, null(), &mut checkpoint)));
    let raw = occupy(store);
    let save = begin(store, 2, &mut state);
    // SAFETY: the child calls only the library, whose calls the header allows there, and `_exit`.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let refused = [
            c!(pcc_drain(store, -1)),
            c!(pcc_pin(store, 1)),
            c!(pcc_save_wait_durable(save, -1, null_mut())),
            c!(pcc_save_cancel(save)),
            c!(pcc_raw_write(raw, 0, [0u8; 1].as_ptr().cast(), 1)),
            c!(pcc_checkpoint_verify(checkpoint)),
        ];
        let all = refused.iter().all(|&status| status == PCC_FORKED) && pcc_last_error_status() == PCC_FORKED;
        c!(pcc_checkpoint_close(checkpoint));
        c!(pcc_save_free(save));
        c!(pcc_raw_free(raw));
        c!(pcc_close(store));
        // SAFETY: ends the child without running the parent's exit handlers.
        unsafe { libc::_exit(if all { 0 } else { 1 }) };
    }
    assert!(child > 0);
    let mut status = 0;
    // SAFETY: waits for the child just made.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(status, 0, "the child was not refused everywhere, or died");
    ok(c!(pcc_save_wait_durable(save, WAIT_MS, null_mut())));
    ok(c!(pcc_checkpoint_verify(checkpoint)));
    c!(pcc_checkpoint_close(checkpoint));
    c!(pcc_save_free(save));
    c!(pcc_raw_free(raw));
    restores(store, &state);
    c!(pcc_close(store));
}

#[test]
fn versions_and_names_are_told() {
    assert_eq!(c!(CStr::from_ptr(pcc_version())).to_str().unwrap(), env!("CARGO_PKG_VERSION"));
    assert_eq!(pcc_abi_version(), PCC_ABI_MAJOR << 16 | PCC_ABI_MINOR);
    assert_eq!(c!(CStr::from_ptr(pcc_status_name(PCC_NO_SLOT))), c"PCC_NO_SLOT");
    let mut dtype = 0;
    fails(c!(pcc_dtype_from_name(c"F31".as_ptr(), &mut dtype)), PCC_NOT_FOUND, &["F31"]);
}
