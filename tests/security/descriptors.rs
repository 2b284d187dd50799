//! Descriptors: every one that the library opens is closed in programs that the process starts.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::RawFd;
use std::process::Command;

use pccheck::engine::{format_region, Select, Store};
use pccheck::medium::{Durability, IoBackend, Requested};
use pccheck::store::{FormatOptions, OpenOptions};

use super::common::{disk_is_dax, save_one, scratch, WAIT};
use super::in_child;

const PAYLOAD_BYTES: u64 = 9 << 20;

/// Descriptors of this process and what they lead to.
fn open_now() -> BTreeMap<RawFd, String> {
    let entries = fs::read_dir("/proc/self/fd").expect("list");
    let number = |name: std::ffi::OsString| name.to_str()?.parse().ok();
    let found = entries.filter_map(|entry| {
        let entry = entry.ok()?;
        // The one by which the folder is read is gone by the time that it is looked at.
        let target = fs::read_link(entry.path()).ok()?;
        Some((number(entry.file_name())?, target.display().to_string()))
    });
    found.filter(|(_, target)| !target.ends_with("/fd")).collect()
}

/// Those of `now` that `before` lacks and that a program would inherit.
fn inherited(before: &BTreeMap<RawFd, String>, now: &BTreeMap<RawFd, String>) -> Vec<String> {
    let kept = |fd: &RawFd| {
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).expect("fdinfo");
        let flags =
            info.lines().find_map(|line| line.strip_prefix("flags:")).expect("flags").trim().to_string();
        let flags = libc::c_int::from_str_radix(&flags, 8).expect("octal");
        flags & libc::O_CLOEXEC == 0
    };
    let new = now.iter().filter(|(fd, target)| before.get(fd) != Some(target));
    new.filter(|(fd, _)| kept(fd)).map(|(_, target)| target.clone()).collect()
}

/// In a child, which has no descriptors but these.
#[test]
fn programs_inherit_no_descriptor_of_a_store() {
    if !in_child("descriptors::programs_inherit_no_descriptor_of_a_store", |_| ()) {
        return;
    }
    let mut media = vec![
        (Requested::Direct, IoBackend::Uring),
        (Requested::Direct, IoBackend::Threads),
        (Requested::Mmap, IoBackend::Auto),
    ];
    if disk_is_dax() {
        media.push((Requested::Dax, IoBackend::Auto));
    }
    for ((medium, backend), members) in media.into_iter().flat_map(|medium| [(medium, 1), (medium, 3)]) {
        let dir = scratch();
        let inside = |index: usize| dir.path().join(format!("region{index}"));
        let format = FormatOptions {
            medium,
            stripe: (1..members).map(inside).collect(),
            stripe_unit_bytes: 2 << 20,
            ..FormatOptions::new(3, PAYLOAD_BYTES)
        };
        format_region(&inside(0), &format).expect("format");
        let before = open_now();
        let options = OpenOptions {
            medium,
            backend,
            required: Durability::Process,
            chunk_bytes: 1 << 20,
            staging_bytes: 8 << 20,
            ..OpenOptions::default()
        };
        let store = Store::open(&inside(0), &options).expect("open");
        let save = save_one(&store, 1, &vec![5; 8 << 20], &[]).expect("save");
        let during = open_now();
        save.wait_durable(WAIT).expect("durable");
        let reader = Store::open(&inside(0), &OpenOptions { read_only: true, ..options }).expect("open");
        let opened = reader.open_checkpoint(Select::Newest, true).expect("open checkpoint");
        let now = open_now();
        assert_eq!(inherited(&before, &during), [""; 0], "{medium:?} {backend:?}, {members} members, saving");
        assert_eq!(inherited(&before, &now), [""; 0], "{medium:?} {backend:?}, {members} members");

        // There is something to see, and a program that is started does not see it.
        let here = dir.path().display().to_string();
        let ours = |target: &&String| target.starts_with(&here) || target.contains("[io_uring]");
        let files = now.values().filter(|target| target.starts_with(&here)).count();
        let rings = now.values().filter(|target| target.contains("[io_uring]")).count();
        assert_eq!(files, 2 * members, "{now:?}");
        assert_eq!(rings, if backend == IoBackend::Uring { 2 * members } else { 0 }, "{now:?}");
        let listed = Command::new("ls").args(["-l", "/proc/self/fd"]).output().expect("ls");
        let listed = String::from_utf8(listed.stdout).expect("UTF-8");
        for target in now.values().filter(ours) {
            assert!(!listed.contains(target.as_str()), "{target} reached another program: {listed}");
        }
        drop(opened);
    }
    // A descriptor that is inherited is noticed.
    let before = open_now();
    // SAFETY: touches no memory.
    let copy = unsafe { libc::dup(0) };
    assert!(copy >= 0);
    assert_eq!(inherited(&before, &open_now()).len(), 1);
}
