//! Raw saves, checkpoints, and calls without a handle.

use super::*;

pub fn make(call: &Call, world: &mut World) {
    match call {
        Call::RawBegin { store, step, bytes, metadata, args } => {
            let store = store.store(world);
            let mut options = args.options(world);
            // What this bounds is also each wait for the pool.
            options.wait_ms = options.wait_ms.clamp(1, 20);
            let mut placed = args.size.place(&[options]);
            let metadata = pairs(metadata);
            let (pairs, count) = (metadata.pairs.as_ptr(), metadata.pairs.len() as u64);
            let (step, bytes) = (u64::from(*step), bytes.value());
            if matches!(args.size, Size::Older(words) if words % 6 <= 1) {
                // Without `wait_ms` a begin waits a minute.
                return;
            }
            let first = world.stores.iter().any(|known| known.handle.cast_const() == store && known.first);
            let begun = handle(|out| c!(pcc_raw_begin(store, step, bytes, pairs, count, placed.ptr(), out)));
            let raw = |handle| Raw { handle, committed: false, ends: args.ends(), first };
            world.raws.extend(begun.map(raw));
        }
        Call::RawPayloadBytes(bytes, metadata) => {
            let metadata = pairs(metadata);
            let mut payload = 9;
            let (pairs, count) = (metadata.pairs.as_ptr(), metadata.pairs.len() as u64);
            let good = checked(c!(pcc_raw_payload_bytes(bytes.value(), pairs, count, &mut payload)));
            assert_eq!(good, payload > bytes.value());
        }
        Call::RawWrite(raw, offset, bytes, no_memory) => {
            let bytes = bytes.value();
            if bytes > 4 << 20 && isize::try_from(bytes).is_ok() && !no_memory {
                return;
            }
            let data = vec![7u8; if bytes <= 4 << 20 { bytes as usize } else { 1 }];
            let data = if *no_memory { null() } else { data.as_ptr().cast() };
            checked(c!(pcc_raw_write(raw.raw(world), offset.value(), data, bytes)));
        }
        Call::RawCommit(raw) => {
            let raw = raw.raw(world).cast_mut();
            let Some(handle) = handle(|out| c!(pcc_raw_commit(raw, out))) else { return };
            let known =
                world.raws.iter_mut().find(|known| known.handle == raw).expect("a raw save that lives");
            known.committed = true;
            let mut progress = pcc_progress { struct_bytes: size_of::<pcc_progress>() as u64, ..zeroed() };
            assert!(checked(c!(pcc_save_progress(handle, &mut progress))));
            let (first, ends, generation) = (known.first, known.ends, progress.generation);
            if first {
                world.contents.insert(generation, Vec::new());
            }
            world.saves.push(Save { handle, generation, first, ends });
        }
        Call::RawProgress(raw, size) => {
            filled::<pcc_progress>(*size, |out| c!(pcc_raw_progress(raw.raw(world), out)));
        }
        Call::RawCancel(raw) => {
            checked(c!(pcc_raw_cancel(raw.raw(world))));
        }
        Call::RawFree(index) => {
            if !world.raws.is_empty() {
                let raw = world.raws.swap_remove(usize::from(*index) % world.raws.len());
                c!(pcc_raw_free(raw.handle));
            }
        }
        Call::CheckpointOpen { store, select, value, verify, size } => {
            let options = select_options(*select, *value, *verify);
            let mut placed = size.place(&[options]);
            if world.checkpoints.len() < 6 {
                let opened = handle(|out| c!(pcc_checkpoint_open(store.store(world), placed.ptr(), out)));
                world.checkpoints.extend(opened);
            }
        }
        Call::Restore { store, select, value, tensors: list, size, keep } => {
            let mut placed = size.place(&[select_options(*select, *value, 1)]);
            let mut list = tensors(list, *size, 0);
            let (data, count) = (list.placed.ptr(), list.count);
            let store = store.store(world);
            if !keep || world.checkpoints.len() > 5 {
                checked(c!(pcc_restore(store, placed.ptr(), data, count, null_mut())));
            } else {
                world
                    .checkpoints
                    .extend(handle(|out| c!(pcc_restore(store, placed.ptr(), data, count, out))));
            }
        }
        Call::CheckpointInfo(checkpoint, size) => {
            filled::<pcc_checkpoint_info>(*size, |out| {
                c!(pcc_checkpoint_get_info(checkpoint.checkpoint(world), out))
            });
        }
        Call::Rejected(checkpoint, text) => {
            text.with(|buf, cap| c!(pcc_checkpoint_rejected(checkpoint.checkpoint(world), buf, cap)));
        }
        Call::MetadataCount(checkpoint) => {
            c!(pcc_checkpoint_metadata_count(checkpoint.checkpoint(world)));
        }
        Call::MetadataGet(checkpoint, index) => {
            let checkpoint = checkpoint.checkpoint(world);
            let (mut key, mut value) = (null(), null());
            let mut lengths = [0, 0];
            let [key_bytes, value_bytes] = &mut lengths;
            let index = index.value();
            let (key_at, value_at) = (&mut key, &mut value);
            if checked(c!(pcc_checkpoint_metadata_get(
                checkpoint,
                index,
                key_at,
                key_bytes,
                value_at,
                value_bytes
            ))) {
                is_text(key, lengths[0]);
                is_text(value, lengths[1]);
            }
        }
        Call::MetadataFind(checkpoint, key) => {
            let (key, mut value, mut bytes) = (key.c(), null(), 0);
            let checkpoint = checkpoint.checkpoint(world);
            if checked(c!(pcc_checkpoint_metadata_find(checkpoint, ptr_of(&key), &mut value, &mut bytes))) {
                is_text(value, bytes);
            }
        }
        Call::TensorCount(checkpoint) => {
            c!(pcc_checkpoint_tensor_count(checkpoint.checkpoint(world)));
        }
        Call::TensorGet(checkpoint, index, size) => {
            let checkpoint = checkpoint.checkpoint(world);
            let mut placed = size.place(&[zeroed::<pcc_tensor_info>()]);
            if checked(c!(pcc_checkpoint_tensor_get(checkpoint, index.value(), placed.ptr())))
                && size.is_exact()
            {
                let info = c!(*placed.ptr::<pcc_tensor_info>());
                is_text(info.name, info.name_bytes);
                assert!(info.rank <= 64);
                // SAFETY: the library says that so many are there.
                let shape = unsafe { std::slice::from_raw_parts(info.shape, info.rank as usize) };
                let bits = u128::from(pcc_dtype_bits(info.dtype));
                let all = shape.iter().fold(bits, |bits, &dimension| bits * u128::from(dimension));
                assert_eq!(all, u128::from(info.bytes) * 8);
            }
        }
        Call::TensorFind(checkpoint, name) => {
            let (name, mut index) = (name.c(), 9);
            checked(c!(pcc_checkpoint_tensor_find(checkpoint.checkpoint(world), ptr_of(&name), &mut index)));
        }
        Call::Read(checkpoint, list, size) => {
            let mut list = reads(list, *size);
            checked(c!(pcc_checkpoint_read(checkpoint.checkpoint(world), list.placed.ptr(), list.count)));
        }
        Call::ReadPayload(checkpoint, offset, bytes) => {
            // What is more than any slot holds is refused before it is touched.
            let bytes = bytes.value();
            let mut dst = vec![0u8; if bytes <= 4 << 20 { bytes as usize } else { 1 }];
            let (checkpoint, dst) = (checkpoint.checkpoint(world), dst.as_mut_ptr().cast());
            checked(c!(pcc_checkpoint_read_payload(checkpoint, offset.value(), dst, bytes)));
        }
        Call::CheckpointVerify(checkpoint) => {
            checked(c!(pcc_checkpoint_verify(checkpoint.checkpoint(world))));
        }
        Call::CheckpointClose(index) => {
            if !world.checkpoints.is_empty() {
                let at = usize::from(*index) % world.checkpoints.len();
                c!(pcc_checkpoint_close(world.checkpoints.swap_remove(at)));
            }
        }
        Call::Tune { store, numbers, in_flight, reserved, size } => {
            let [state_bytes, iteration_ns, durable_bytes_per_s, stall_ns, max_slowdown_ppm] =
                numbers.map(Amount::value);
            let mut options = size.place(&[pcc_tune_options {
                state_bytes,
                iteration_ns,
                durable_bytes_per_s,
                stall_ns,
                max_slowdown_ppm,
                max_in_flight: (*in_flight).into(),
                reserved: u32::from(*reserved > 250),
                ..zeroed()
            }]);
            filled::<pcc_tuning>(*size, |out| c!(pcc_tune(store.store(world), options.ptr(), out)));
        }
        Call::LastError(which, text) => {
            text.with(|buf, cap| {
                c!(match which % 4 {
                    0 => pcc_last_error(buf, cap),
                    1 => pcc_last_error_operation(buf, cap),
                    2 => pcc_last_error_path(buf, cap),
                    _ => pcc_last_error_advice(buf, cap),
                })
            });
            (pcc_last_error_errno(), pcc_last_error_offset());
        }
        Call::InitOptions(which, size) => init_options(*which, *size),
        Call::Names(code, status, text) => names(*code, *status, text),
        // All others are made where this is called from.
        _ => {}
    }
}

fn select_options(select: u8, value: Amount, verify: u8) -> pcc_select_options {
    let select = if select > 250 { select.into() } else { (select % 5).into() };
    let verify = if verify > 250 { 2 } else { (verify % 2).into() };
    pcc_select_options { value: value.value(), select, verify, ..zeroed() }
}

/// What C gets is as long as it is told, with a NUL behind it, and UTF-8.
fn is_text(text: *const c_char, bytes: u64) {
    // SAFETY: the library says that so many bytes and a NUL are there.
    let bytes = unsafe { std::slice::from_raw_parts(text.cast::<u8>(), bytes as usize + 1) };
    assert_eq!(bytes.last(), Some(&0));
    assert!(std::str::from_utf8(bytes).is_ok());
}

fn init_options(which: u8, size: Size) {
    let mut place = size.place(&[[0u64; 16]]);
    // Of an impossible size nothing may be written.
    let bytes = c!(*place.ptr::<u64>());
    checked(c!(match which % 5 {
        0 => pcc_format_options_init(place.ptr(), bytes),
        1 => pcc_open_options_init(place.ptr(), bytes),
        2 => pcc_save_options_init(place.ptr(), bytes),
        3 => pcc_select_options_init(place.ptr(), bytes),
        _ => pcc_tune_options_init(place.ptr(), bytes),
    }));
}

fn names(code: u32, status: i32, text: &Text) {
    let name = pcc_dtype_name(code);
    assert_eq!(name.is_null(), pcc_dtype_bits(code) == 0);
    let (text, mut found): (Option<CString>, u32) = (text.c(), 9);
    let good = checked(c!(pcc_dtype_from_name(ptr_of(&text), &mut found)));
    assert_eq!(good, found != 0);
    if !name.is_null() {
        assert!(checked(c!(pcc_dtype_from_name(name, &mut found))) && found == code);
    }
    for text in [pcc_status_name(status), pcc_status_text(status), pcc_version()] {
        // SAFETY: static text.
        assert!(!unsafe { std::ffi::CStr::from_ptr(text) }.is_empty());
    }
}
