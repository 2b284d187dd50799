//! What was saved is what is listed, enumerated, read and restored; damage is reported and passed over.

use crate::common::scratch;
use std::path::Path;

use super::bed::*;

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
fn a_region_is_striped_over_the_members_that_are_named() {
    let dir = scratch();
    let name = |index: u32| {
        CString::new(dir.path().join(format!("r{index}")).to_str().expect("UTF-8")).expect("a path")
    };
    let names = [name(0), name(1), name(2)];
    let stripe: Vec<*const c_char> = names[1..].iter().map(|name| name.as_ptr()).collect();
    let mut options = sized!(pcc_format_options);
    ok(c!(pcc_format_options_init(&mut options, size_of::<pcc_format_options>() as u64)));
    options.stripe_count = 2;
    let format = |options: &pcc_format_options| c!(pcc_format(names[0].as_ptr(), 3, 1 << 20, options));
    fails(format(&options), PCC_BAD_POINTER, &["stripe_paths is NULL"]);
    let with_null = [stripe[0], null()];
    options.stripe_paths = with_null.as_ptr();
    fails(format(&options), PCC_BAD_POINTER, &["stripe_paths[1]"]);
    let with_empty = [c"".as_ptr(), stripe[0]];
    options.stripe_paths = with_empty.as_ptr();
    fails(format(&options), PCC_INVALID_ARGUMENT, &["stripe_paths[0] is empty"]);
    options.stripe_paths = stripe.as_ptr();
    options.stripe_count = 16;
    fails(format(&options), PCC_INVALID_ARGUMENT, &["stripe_count is 16"]);
    options.stripe_count = 2;
    options.stripe_unit_bytes = 4096;
    fails(format(&options), PCC_INVALID_ARGUMENT, &["4096"]);
    options.stripe_unit_bytes = 0;
    ok(format(&options));

    let mut store = null_mut();
    ok(c!(pcc_open(names[0].as_ptr(), &open_options(), &mut store)));
    let mut state = State::new(3);
    save_durably(store, 1, &mut state);
    restores(store, &state);
    let mut got = sized!(pcc_got_info);
    ok(c!(pcc_got(store, &mut got)));
    assert_eq!((got.members, got.stripe_unit_bytes), (3, 4 << 20));
    c!(pcc_close(store));
    fails(c!(pcc_open(names[1].as_ptr(), &open_options(), &mut store)), PCC_MEMBER, &["member 1", "r0"]);
    std::fs::remove_file(dir.path().join("r2")).expect("remove");
    fails(c!(pcc_open(names[0].as_ptr(), &open_options(), &mut store)), PCC_MEMBER, &["member 2", "r2"]);
    // A program of before members were known asks for none, and is told of none.
    let mut old = sized!(pcc_format_options);
    old.struct_bytes = 24;
    ok(c!(pcc_format(name(9).as_ptr(), 3, 1 << 20, &old)));
    ok(c!(pcc_open(name(9).as_ptr(), &open_options(), &mut store)));
    got.struct_bytes = 104;
    got.members = 77;
    ok(c!(pcc_got(store, &mut got)));
    assert_eq!((got.slot_count, got.members), (3, 77));
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

/// It once left a handle that nobody had: the slot was never freed again, and the region locked beyond closing.
#[test]
fn a_restore_that_wants_no_handle_leaves_none() {
    let region = region(2, 1 << 20);
    let mut options = open_options();
    options.max_in_flight = 1;
    options.lock_wait_ms = 0;
    let store = open_with(&region, &options);
    let mut state = State::new(3);
    for step in 1..6 {
        save_durably(store, step, &mut state);
        let tensors = state.tensors();
        ok(c!(pcc_restore(store, null(), tensors.as_ptr(), tensors.len() as u64, null_mut())));
    }
    c!(pcc_close(store));
    c!(pcc_close(open_with(&region, &options)));
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
    fails(c!(pcc_restore(store, null(), &missing, 1, null_mut())), PCC_INVALID_ARGUMENT, &["bias"]);
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
