//! A region on a real block device: it cannot be created, sized, grown or renamed like a file, and its exclusive
//! claim is another mechanism than a file's lock. Run by scripts/test, which makes a loop device.

mod common;

use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{save_one, scratch, WAIT};
use pccheck::engine::{format_region, grow_region, Select, Store};
use pccheck::medium::{Durability, IoBackend, MediumKind, Requested};
use pccheck::store::{FormatOptions, OpenOptions};
use pccheck::ErrorKind;

fn device() -> PathBuf {
    PathBuf::from(
        std::env::var_os("PCC_BLOCK_DEVICE").expect("PCC_BLOCK_DEVICE names a block device to overwrite"),
    )
}

fn options(backend: IoBackend) -> OpenOptions {
    OpenOptions {
        medium: Requested::Direct,
        backend,
        required: Durability::Process,
        chunk_bytes: 256 << 10,
        staging_bytes: 4 << 20,
        lock_wait: Some(Duration::from_secs(5)),
        ..OpenOptions::default()
    }
}

/// One test, since there is one device.
#[test]
fn a_device_holds_a_region_like_a_file() {
    let path = device();
    let mut format = FormatOptions::new(3, 8 << 20);
    format.force = true;
    format_region(&path, &format).expect("format the device");
    format.force = false;
    let error = format_region(&path, &format).expect_err("a region is there");
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);

    for (round, backend) in [IoBackend::Auto, IoBackend::Threads].into_iter().enumerate() {
        let data: Vec<u8> = (0..5_000_001u32).map(|i| (i as usize * 7 + round) as u8).collect();
        let store = Store::open(&path, &options(backend)).expect("open");
        assert_eq!(store.medium_info().kind, MediumKind::Direct);
        for step in 0..4 {
            save_one(&store, step, &data, &[]).expect("save").wait_durable(WAIT).expect("durable");
        }
        let again = OpenOptions { lock_wait: Some(Duration::ZERO), ..options(backend) };
        assert_eq!(Store::open(&path, &again).err().expect("claimed").kind(), ErrorKind::InUse);
        let reader =
            Store::open(&path, &OpenOptions { read_only: true, ..options(backend) }).expect("beside");
        drop(store);
        for store in [reader, Store::open(&path, &options(backend)).expect("open again")] {
            let opened = store.open_checkpoint(Select::Newest, true).expect("newest");
            assert_eq!(opened.checkpoint.record().step, 3);
            assert!(opened.checkpoint.read_tensor("w").expect("read") == data, "came back changed");
        }
    }
    let error = grow_region(&path, 4, 8 << 20, WAIT).expect_err("a device cannot grow");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    let larger = FormatOptions { force: true, ..FormatOptions::new(3, 1 << 30) };
    let error = format_region(&path, &larger).expect_err("the device is smaller");
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    assert!(Store::open(&path, &options(IoBackend::Auto)).is_ok(), "a format that failed must not destroy");
    striped_over_a_file_and_the_device(&path);
}

/// A member that is a device has no length of its own choosing, and one that is full says so by name.
fn striped_over_a_file_and_the_device(device: &Path) {
    let dir = scratch();
    let file = dir.path().join("member0");
    let set = |payload_bytes: u64, force: bool| FormatOptions {
        force,
        stripe: vec![device.to_path_buf()],
        stripe_unit_bytes: 2 << 20,
        ..FormatOptions::new(3, payload_bytes)
    };
    let error = format_region(&file, &set(8 << 20, false)).expect_err("a region is on the device");
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    let error = format_region(&file, &set(1 << 30, true)).expect_err("the device is smaller");
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    assert!(error.to_string().contains(&device.display().to_string()), "{error}");
    assert!(Store::open(device, &options(IoBackend::Auto)).is_ok(), "a format that failed must not destroy");
    assert!(!file.exists(), "half a set was left behind");

    format_region(&file, &set(8 << 20, true)).expect("format");
    let data: Vec<u8> = (0..8_000_000u32).map(|i| (i >> 7) as u8).collect();
    let store = Store::open(&file, &options(IoBackend::Auto)).expect("open");
    assert_eq!(store.medium_info().stripes.map(|stripes| stripes.members), Some(2));
    for step in 0..4 {
        save_one(&store, step, &data, &[]).expect("save").wait_durable(WAIT).expect("durable");
    }
    let opened = store.open_checkpoint(Select::Newest, true).expect("newest");
    assert!(opened.checkpoint.read_tensor("w").expect("read") == data, "came back changed");
    drop((opened, store));
    let error = Store::open(device, &options(IoBackend::Auto)).err().expect("member 1 is no region");
    assert_eq!(error.kind(), ErrorKind::Member);
}
