//! Every class of bad argument is refused with a status and a text, and nothing is lost by it.

use super::bed::*;

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
    bad(c!(pcc_grow(null(), 4, 1, 0, null_mut())));
    bad(c!(pcc_open(null(), null(), &mut null_mut())));
    bad(c!(pcc_open(c"x".as_ptr(), null(), null_mut())));
    bad(c!(pcc_drain(store, 0)));
    bad(c!(pcc_list(store, null_mut(), 80, 0, &mut 0)));
    bad(c!(pcc_pin(store, 1)));
    bad(c!(pcc_unpin(store, 1)));
    bad(c!(pcc_mark_global(store, 0, 1, null_mut())));
    bad(c!(pcc_abandon(store, 0, 1, 0, null_mut())));
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
    bad(c!(pcc_raw_payload_bytes(1, null(), 1, &mut 0)));
    bad(c!(pcc_raw_payload_bytes(1, null(), 0, null_mut())));
    bad(c!(pcc_save_wait_copied(save, 0)));
    bad(c!(pcc_save_wait_durable(save, 0, null_mut())));
    bad(c!(pcc_save_progress(save, &mut sized!(pcc_progress))));
    bad(c!(pcc_save_confirm(save)));
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
    bad(c!(pcc_save_options_init(null_mut(), 32)));
    bad(c!(pcc_select_options_init(null_mut(), 24)));
    bad(c!(pcc_tune_options_init(null_mut(), 56)));
    bad(c!(pcc_dtype_from_name(null(), &mut 0)));
    bad(c!(pcc_dtype_from_name(c"F32".as_ptr(), null_mut())));
    assert_eq!(pcc_last_error_errno(), 0);
}

/// Whatever a program tidies up with after a failure must be set, whyever the call failed.
#[test]
fn results_are_set_also_where_the_handle_is_none() {
    let store: *const pcc_store = null();
    let (mut save, mut raw, mut opened) = [(); 3].map(|()| 8 as *mut c_void).into();
    let bad = |status| fails(status, PCC_BAD_POINTER, &["pcc_store is NULL"]);
    bad(c!(pcc_save_begin(store, 0, null(), 0, null(), 0, null(), (&raw mut save).cast())));
    bad(c!(pcc_raw_begin(store, 0, 1, null(), 0, null(), (&raw mut raw).cast())));
    bad(c!(pcc_checkpoint_open(store, null(), (&raw mut opened).cast())));
    assert_eq!([save, raw, opened], [null_mut(); 3]);
    opened = 8 as *mut c_void;
    bad(c!(pcc_restore(store, null(), null(), 0, (&raw mut opened).cast())));
    assert!(opened.is_null());

    let (mut count, mut generation, mut discarded) = (9, 9, 9);
    bad(c!(pcc_list(store, null_mut(), 80, 0, &mut count)));
    bad(c!(pcc_mark_global(store, 0, 1, &mut generation)));
    bad(c!(pcc_discard_newer(store, 1, &mut discarded)));
    assert_eq!((count, generation, discarded), (0, 0, 0));
    discarded = 9;
    bad(c!(pcc_abandon(store, 0, 1, 0, &mut discarded)));
    assert_eq!(discarded, 0);
    discarded = 9;
    bad(c!(pcc_repair(store, 0, &mut discarded)));
    assert_eq!(discarded, 0);

    let mut fd = 9;
    fails(c!(pcc_save_event_fd(null(), &mut fd)), PCC_BAD_POINTER, &["pcc_save is NULL"]);
    assert_eq!(fd, -1);
    let checkpoint: *const pcc_checkpoint = null();
    let bad = |status| fails(status, PCC_BAD_POINTER, &["pcc_checkpoint is NULL"]);
    let (mut key, mut value, mut lengths) = (c"k".as_ptr(), c"v".as_ptr(), (9, 9));
    let (key_bytes, value_bytes) = (&mut lengths.0, &mut lengths.1);
    bad(c!(pcc_checkpoint_metadata_get(checkpoint, 0, &mut key, key_bytes, &mut value, value_bytes)));
    assert!(key.is_null() && value.is_null() && lengths == (0, 0));
    (value, lengths.1) = (c"v".as_ptr(), 9);
    bad(c!(pcc_checkpoint_metadata_find(checkpoint, c"k".as_ptr(), &mut value, &mut lengths.1)));
    assert!(value.is_null() && lengths.1 == 0);
    let mut index = 9;
    bad(c!(pcc_checkpoint_tensor_find(checkpoint, c"t".as_ptr(), &mut index)));
    assert_eq!(index, u64::MAX);
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
    refuse(&|t| t[1].device = 2, PCC_UNSUPPORTED, &["tensors[1]", "device kind 2"]);
    // Not a panic where there is no driver; where there is one, that is no memory of a GPU.
    match std::path::Path::new("/dev/nvidiactl").exists() {
        false => refuse(&|t| t[1].device = 1, PCC_UNSUPPORTED, &["no NVIDIA driver", "libcuda"]),
        true => refuse(&|t| t[1].device = 1, PCC_INVALID_ARGUMENT, &["no memory of a GPU"]),
    }
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
    for (options, text) in [
        (pcc_save_options { snapshot: 3, ..sized!(pcc_save_options) }, "snapshot is 3"),
        (pcc_save_options { flag_waits: 2, ..sized!(pcc_save_options) }, "flag_waits is 2"),
        (pcc_save_options { direct_storage: 3, ..sized!(pcc_save_options) }, "direct_storage is 3"),
        (pcc_save_options { reserved: 1, ..sized!(pcc_save_options) }, "reserved is 1"),
    ] {
        let status = c!(pcc_save_begin(store, 1, good.as_ptr(), 5, null(), 0, &options, &mut null_mut()));
        fails(status, PCC_INVALID_ARGUMENT, &[text]);
    }

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
    // Before there is memory, the size is known all the same; two such tensors share nothing.
    let unborn = pcc_tensor { data: null_mut(), ..large };
    let twins = [unborn, pcc_tensor { name: c"twin".as_ptr(), ..unborn }];
    let (mut one, mut two) = (0, 0);
    ok(c!(pcc_payload_bytes(&unborn, 1, null(), 0, &mut one)));
    ok(c!(pcc_payload_bytes(twins.as_ptr(), 2, null(), 0, &mut two)));
    assert_eq!((one, two), (needed, needed + shape[0]));
    let status = c!(pcc_save_begin(store, 1, &unborn, 1, null(), 0, null(), &mut null_mut()));
    fails(status, PCC_BAD_POINTER, &["tensors[0].data is NULL"]);
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
    refuse(&|o| o.rewrite_every = 1 << 17, PCC_INVALID_ARGUMENT, &["rewrite_every is 131072"]);
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
    let advice = text_of(|buf, cap| c!(pcc_last_error_advice(buf, cap)));
    assert!(advice.contains("force") && last_error().ends_with(&format!("({advice})")), "{advice}");
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

#[test]
fn versions_and_names_are_told() {
    assert_eq!(c!(CStr::from_ptr(pcc_version())).to_str().unwrap(), env!("CARGO_PKG_VERSION"));
    assert_eq!(pcc_abi_version(), PCC_ABI_MAJOR << 16 | PCC_ABI_MINOR);
    assert_eq!(c!(CStr::from_ptr(pcc_status_name(PCC_NO_SLOT))), c"PCC_NO_SLOT");
    let mut dtype = 0;
    fails(c!(pcc_dtype_from_name(c"F31".as_ptr(), &mut dtype)), PCC_NOT_FOUND, &["F31"]);
}
