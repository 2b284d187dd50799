//! Files of regions: whose they are, and that no link leads anywhere else.

use std::fs;
use std::os::unix::fs::{symlink, PermissionsExt};
use std::path::{Path, PathBuf};

use pccheck::engine::{format_region, grow_region, Store};
use pccheck::medium::{relocate_member, Durability, Requested};
use pccheck::store::{FormatOptions, OpenOptions};
use pccheck::{Error, ErrorKind};
use std::time::Duration;

use super::common::{save_one, scratch, WAIT};
use super::in_child;

const PAYLOAD_BYTES: u64 = 100_000;

fn format() -> FormatOptions {
    FormatOptions { medium: Requested::Mmap, ..FormatOptions::new(3, PAYLOAD_BYTES) }
}

fn forced() -> FormatOptions {
    FormatOptions { force: true, ..format() }
}

fn striped(other: &Path) -> FormatOptions {
    FormatOptions { stripe: vec![other.to_path_buf()], stripe_unit_bytes: 2 << 20, ..format() }
}

fn options(read_only: bool) -> OpenOptions {
    OpenOptions {
        read_only,
        required: Durability::Process,
        max_in_flight: 1,
        staging_bytes: 8 << 20,
        lock_wait: Some(Duration::ZERO),
        ..OpenOptions::default()
    }
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).expect("stat").permissions().mode() & 0o7777
}

/// In a child: the mask is the process's.
#[test]
fn regions_are_their_owners_alone_whatever_the_umask() {
    if !in_child("files::regions_are_their_owners_alone_whatever_the_umask", |_| ()) {
        return;
    }
    for mask in [0, 0o002, 0o022, 0o077] {
        let dir = scratch();
        let inside = |name: &str| dir.path().join(name);
        // SAFETY: touches no memory.
        unsafe { libc::umask(mask) };
        format_region(&inside("plain"), &format()).expect("format");
        format_region(&inside("first"), &striped(&inside("second"))).expect("format");
        grow_region(&inside("plain"), 4, PAYLOAD_BYTES, None).expect("grow");
        for name in ["plain", "first", "second"] {
            assert_eq!(mode(&inside(name)), 0o600, "{name} under the mask {mask:03o}");
        }
    }
}

/// Names in a folder, and what the files hold.
fn contents(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let entries = fs::read_dir(dir).expect("list").map(|entry| entry.expect("entry").path());
    let mut found: Vec<_> = entries.map(|path| (path.clone(), fs::read(&path).unwrap_or_default())).collect();
    found.sort();
    found
}

#[track_caller]
fn refused<T>(result: Result<T, Error>, kind: ErrorKind, says: &str) {
    let error = result.err().expect("it was accepted");
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.to_string().contains(says) && error.advice().is_some(), "{error} does not say {says:?}");
}

#[test]
fn links_are_refused_and_what_they_lead_to_stays_as_it_was() {
    let (dir, elsewhere) = (scratch(), scratch());
    let inside = |name: &str| dir.path().join(name);
    let (region, notes, nothing) =
        (elsewhere.path().join("region"), elsewhere.path().join("notes"), elsewhere.path().join("nothing"));
    format_region(&region, &format()).expect("format");
    save_one(&Store::open(&region, &options(false)).expect("open"), 1, &[7; 1000], &[])
        .expect("save")
        .wait_durable(WAIT)
        .expect("durable");
    fs::write(&notes, "dear diary").expect("write");
    for (name, to) in [("region", &region), ("notes", &notes), ("nothing", &nothing)] {
        symlink(to, inside(name)).expect("symlink");
    }
    let before = contents(elsewhere.path());
    let link = "symbolic link";
    let invalid = ErrorKind::InvalidArgument;
    for name in ["region", "notes"] {
        for read_only in [false, true] {
            refused(Store::open(&inside(name), &options(read_only)), invalid, link);
        }
        refused(grow_region(&inside(name), 5, PAYLOAD_BYTES, None), invalid, link);
    }
    for name in ["region", "notes", "nothing"] {
        for options in [format(), forced()] {
            refused(format_region(&inside(name), &options), invalid, link);
        }
        let options = FormatOptions { force: true, ..striped(&inside(name)) };
        refused(format_region(&inside("first"), &options), invalid, link);
        assert!(!inside("first").exists(), "half a set was left behind");
    }
    assert!(contents(elsewhere.path()) == before, "what a link leads to was changed");
}

/// A set that is told to look for a member behind a link is not led astray either.
#[test]
fn a_member_behind_a_link_is_no_member() {
    let dir = scratch();
    let inside = |name: &str| dir.path().join(name);
    format_region(&inside("first"), &striped(&inside("second"))).expect("format");
    fs::rename(inside("second"), inside("moved")).expect("rename");
    symlink(inside("moved"), inside("second")).expect("symlink");
    refused(Store::open(&inside("first"), &options(false)), ErrorKind::InvalidArgument, "symbolic link");
    let relocated = relocate_member(&inside("first"), 1, &inside("second"), Duration::ZERO);
    refused(relocated, ErrorKind::InvalidArgument, "symbolic link");
    relocate_member(&inside("first"), 1, &inside("moved"), Duration::ZERO).expect("the file itself");
    Store::open(&inside("first"), &options(false)).expect("open");
}

/// The copy to grow into once replaced whatever had its name: another region, or anybody's file.
#[test]
fn growing_replaces_its_own_leftover_and_nothing_else() {
    let dir = scratch();
    let (path, beside) = (dir.path().join("run"), dir.path().join("run.growing"));
    format_region(&path, &format()).expect("format");
    let others: [(&str, &dyn Fn()); 4] = [
        ("another region", &|| format_region(&beside, &format()).expect("format")),
        ("a file", &|| fs::write(&beside, "dear diary").expect("write")),
        ("a link to nothing", &|| symlink(dir.path().join("nothing"), &beside).expect("symlink")),
        ("a link to a file", &|| symlink(&path, &beside).expect("symlink")),
    ];
    for (what, make) in others {
        make();
        let before = contents(dir.path());
        let error = grow_region(&path, 5, PAYLOAD_BYTES, None).expect_err(what);
        assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{what}: {error}");
        assert_eq!(error.path(), Some(&*beside), "{what}: {error}");
        assert!(contents(dir.path()) == before, "{what} was destroyed by: {error}");
        assert!(fs::symlink_metadata(&beside).is_ok(), "{what} is gone");
        fs::remove_file(&beside).expect("remove");
    }
    // What an attempt that was killed leaves: space, then data, and the superblocks at its end.
    let leftovers: [(&str, &dyn Fn()); 3] = [
        ("nothing yet", &|| fs::write(&beside, []).expect("write")),
        ("no superblock yet", &|| fs::write(&beside, vec![0; 5 << 20]).expect("write")),
        ("all of it", &|| {
            fs::copy(&path, &beside).expect("copy");
        }),
    ];
    for (slots, (what, make)) in (4..).zip(leftovers) {
        make();
        grow_region(&path, slots, PAYLOAD_BYTES, None).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert!(!beside.exists(), "{what}");
        let store = Store::open(&path, &options(true)).expect("open");
        assert_eq!(store.region().layout().slot_count, slots);
    }
}
