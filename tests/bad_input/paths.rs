//! Paths that are not what they should be, regions of other versions, regions in use, and no space.

use std::ffi::CString;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{symlink, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use pccheck::engine::{format_region, grow_region, Store};
use pccheck::format::{Superblock, BLOCK_BYTES, SUPERBLOCK_OFFSETS};
use pccheck::store::{FormatOptions, OpenOptions};
use pccheck::ErrorKind;

use super::bed::{self, options, reading, refused, refused_at, Bed, PAYLOAD_BYTES, SLOTS};
use super::common::{disk, scratch_in};

const ENV_HOLD: &str = "PCC_BAD_INPUT_HOLD";
/// Larger than any file system that this will ever run on.
const ABSURD_BYTES: u64 = 1 << 45;
/// Nobody's user id.
const NOBODY: libc::uid_t = 65_534;

fn format() -> FormatOptions {
    FormatOptions::new(SLOTS, PAYLOAD_BYTES)
}

fn forced() -> FormatOptions {
    FormatOptions { force: true, ..format() }
}

/// Both copies of the superblock, changed.
fn rewrite(bed: &Bed, change: impl FnOnce(&mut Superblock)) {
    let bytes = bed.read(SUPERBLOCK_OFFSETS[0], BLOCK_BYTES as usize);
    let mut superblock = Superblock::decode(bytes.first_chunk().expect("a block")).expect("a superblock");
    change(&mut superblock);
    for offset in SUPERBLOCK_OFFSETS {
        bed.write(offset, &superblock.encode());
    }
}

/// Every way to open and to grow refuses, nothing is touched, and undoing `damage` brings everything back.
fn refuses_everywhere(damage: impl FnOnce(&Bed), kind: ErrorKind, says: &[&str]) {
    let bed = Bed::new();
    let pristine = bed.bytes();
    damage(&bed);
    bed.assert_untouched(|| refused_at(Store::open(&bed.path, &reading()), &bed.path, kind, says));
    bed.assert_untouched(|| refused_at(Store::open(&bed.path, &options()), &bed.path, kind, says));
    bed.assert_untouched(|| {
        refused_at(grow_region(&bed.path, 9, PAYLOAD_BYTES, None), &bed.path, kind, says)
    });
    let file = bed.file();
    file.set_len(pristine.len() as u64).expect("size");
    bed.write(0, &pristine);
    bed.assert_intact();
}

#[test]
fn wrong_magic() {
    let damage = |bed: &Bed| SUPERBLOCK_OFFSETS.iter().for_each(|&offset| bed.write(offset, b"XCCHECK\0"));
    refuses_everywhere(damage, ErrorKind::NotARegion, &["PCCHECK", "XCCHECK", "expected", "found"]);
}

#[test]
fn newer_version() {
    let damage = |bed: &Bed| rewrite(bed, |superblock| superblock.format_version = 2);
    refuses_everywhere(damage, ErrorKind::UnsupportedVersion, &["expected format version 1", "found 2"]);
}

#[test]
fn unknown_incompat_bit() {
    let damage = |bed: &Bed| rewrite(bed, |superblock| superblock.incompat = 1 << 41);
    refuses_everywhere(damage, ErrorKind::UnsupportedFeature, &["bit 41"]);
}

#[test]
fn unknown_compat_bits_are_no_reason_to_refuse() {
    let bed = Bed::new();
    rewrite(&bed, |superblock| superblock.compat = 1 << 41);
    bed.assert_intact();
}

#[test]
fn truncated_files() {
    let whole = Bed::new().bytes().len() as u64;
    for left in [whole - 1, whole - BLOCK_BYTES, whole / 2, 2 << 20, 24 << 10, 8192] {
        let damage = |bed: &Bed| bed.file().set_len(left).expect("truncate");
        let says = ["expected", "found", &whole.to_string(), &left.to_string()];
        refuses_everywhere(damage, ErrorKind::Corrupt, &says);
    }
    for left in [8191, 4096, 100, 0] {
        let damage = |bed: &Bed| bed.file().set_len(left).expect("truncate");
        refuses_everywhere(damage, ErrorKind::NotARegion, &["expected", &left.to_string()]);
    }
}

#[test]
fn files_that_never_were_a_region() {
    let bed = Bed::new();
    let text = bed.dir.path().join("notes.txt");
    fs::write(&text, "dear diary\n".repeat(1000)).expect("write");
    let zeros = bed.dir.path().join("zeros");
    fs::write(&zeros, vec![0; 1 << 20]).expect("write");
    for path in [&text, &zeros] {
        for options in [options(), reading()] {
            refused_at(
                Store::open(path, &options),
                path,
                ErrorKind::NotARegion,
                &["expected", "found", "PCCHECK"],
            );
        }
    }
}

#[test]
fn paths_that_are_no_file() {
    let bed = Bed::new();
    let inside = |name: &str| bed.dir.path().join(name);
    let (link, dangling, pipe) = (inside("link"), inside("dangling"), inside("pipe"));
    symlink(&bed.path, &link).expect("symlink");
    symlink(inside("nowhere"), &dangling).expect("symlink");
    let name = CString::new(pipe.as_os_str().as_bytes()).expect("no NUL");
    // SAFETY: the name is a C string that lives through the call.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    let cases: [(PathBuf, ErrorKind, &str); 6] = [
        (bed.dir.path().to_path_buf(), ErrorKind::Unsupported, "regular file or a block device"),
        (pipe, ErrorKind::Unsupported, "regular file or a block device"),
        (PathBuf::from("/dev/null"), ErrorKind::Unsupported, "regular file or a block device"),
        (link, ErrorKind::InvalidArgument, "symbolic link"),
        (dangling, ErrorKind::NotFound, "No such file"),
        (inside("missing"), ErrorKind::NotFound, "No such file"),
    ];
    for (path, kind, says) in cases {
        for options in [options(), reading()] {
            // On a thread: opening a pipe could wait for ever.
            let (at, says) = (path.clone(), [says]);
            let opening = thread::spawn(move || Store::open(&at, &options).map(drop));
            refused_at(within(opening), &path, kind, &says);
        }
        if kind == ErrorKind::Unsupported {
            let at = path.clone();
            refused_at(within(thread::spawn(move || format_region(&at, &forced()))), &path, kind, &[says]);
        }
        assert_eq!(path.exists(), kind != ErrorKind::NotFound, "opening {} created it", path.display());
    }
    bed.assert_intact();
}

/// What the thread returns, soon.
fn within<T>(running: thread::JoinHandle<T>) -> T {
    const PATIENCE: Duration = Duration::from_secs(20);
    let began = std::time::Instant::now();
    while !running.is_finished() {
        assert!(began.elapsed() < PATIENCE, "a call that must not wait has not returned");
        thread::sleep(Duration::from_millis(1));
    }
    running.join().expect("no panic")
}

#[test]
fn an_unreadable_file() {
    let bed = Bed::new();
    let permit = |mode| fs::set_permissions(&bed.path, fs::Permissions::from_mode(mode)).expect("chmod");
    permit(0o000);
    for options in [options(), reading()] {
        let result = thread::scope(|scope| {
            let opening = scope.spawn(|| {
                // SAFETY: touches no memory. Of this thread alone, which ends with it; nothing for a user but root.
                unsafe { libc::setfsuid(NOBODY) };
                Store::open(&bed.path, &options).map(drop)
            });
            opening.join().expect("no panic")
        });
        let error = refused_at(result, &bed.path, ErrorKind::Io, &["Permission denied"]);
        assert_eq!(error.errno(), Some(libc::EACCES));
    }
    permit(0o600);
    bed.assert_intact();
}

#[test]
fn formatting_never_destroys_without_force() {
    let bed = Bed::new();
    let uuid = Store::open(&bed.path, &reading()).expect("open").region().superblock().uuid.to_string();
    bed.assert_untouched(|| {
        refused_at(
            format_region(&bed.path, &format()),
            &bed.path,
            ErrorKind::AlreadyExists,
            &[&uuid, "force"],
        )
    });
    // Even with force, not under a writer.
    let writer = Store::open(&bed.path, &options()).expect("open");
    let own = std::process::id().to_string();
    bed.assert_untouched(|| {
        refused_at(format_region(&bed.path, &forced()), &bed.path, ErrorKind::InUse, &["process", &own])
    });
    drop(writer);
    bed.assert_intact();
    format_region(&bed.path, &forced()).expect("forced");
    let store = Store::open(&bed.path, &options()).expect("open");
    assert!(store.checkpoints().expect("list").is_empty(), "a checkpoint of the old region came back");
    assert_ne!(store.region().superblock().uuid.to_string(), uuid);
    bed::save(&store, 5).expect("save");
}

#[test]
fn formatting_refuses_foreign_data_and_takes_what_is_empty() {
    let bed = Bed::new();
    let inside = |name: &str| bed.dir.path().join(name);
    let foreign = |name: &str, len: usize, at: usize| {
        let mut bytes = vec![0; len];
        bytes[at..at + 5].copy_from_slice(b"value");
        fs::write(inside(name), &bytes).expect("write");
        let path = inside(name);
        let error = refused_at(
            format_region(&path, &format()),
            &path,
            ErrorKind::AlreadyExists,
            &["not a pccheck region", "force"],
        );
        assert!(fs::read(&path).expect("read") == bytes, "{error}, and yet the data is gone");
    };
    foreign("short", 5, 0);
    foreign("file system", 1 << 20, 65_600);
    foreign("mark at the end", 5 << 20, (5 << 20) - 512);
    foreign("mark in the middle", 5 << 20, 5 << 19);
    fs::write(inside("empty"), []).expect("write");
    for name in ["empty", "short"] {
        let options = if name == "short" { forced() } else { format() };
        format_region(&inside(name), &options).unwrap_or_else(|error| panic!("{name}: {error}"));
        let store = Store::open(&inside(name), &bed::options()).expect("open");
        bed::save(&store, 1).expect("save");
    }
}

#[test]
fn no_space_is_found_before_anything_is_written() {
    let bed = Bed::new();
    for root in [disk(), Path::new("/dev/shm")] {
        let dir = scratch_in(root);
        let path = dir.path().join("huge");
        let huge = FormatOptions { payload_bytes: ABSURD_BYTES, ..format() };
        refused_at(format_region(&path, &huge), &path, ErrorKind::NoSpace, &["needed", "available"]);
        assert!(!path.exists(), "half a region was left behind");
        // A region that is in the way keeps what it has, force or not.
        let forced = FormatOptions { force: true, ..huge };
        bed.assert_untouched(|| {
            refused_at(
                format_region(&bed.path, &forced),
                &bed.path,
                ErrorKind::NoSpace,
                &["needed", "available"],
            )
        });
    }
    let growing = bed.assert_untouched(|| {
        refused(
            grow_region(&bed.path, SLOTS, ABSURD_BYTES, None),
            ErrorKind::NoSpace,
            &["needed", "available"],
        )
    });
    assert!(growing.advice().is_some());
    assert_eq!(fs::read_dir(bed.dir.path()).expect("list").count(), 1, "growing left something behind");
    bed.assert_intact();
}

#[test]
fn impossible_sizes_are_refused_at_format() {
    let bed = Bed::new();
    let path = bed.dir.path().join("new");
    let with = |slot_count, payload_bytes| FormatOptions { slot_count, payload_bytes, ..format() };
    let cases = [
        (with(1, 1), ErrorKind::InvalidArgument, ["slot_count is 1", "2 to 240"]),
        (with(241, 1), ErrorKind::InvalidArgument, ["slot_count is 241", "2 to 240"]),
        (with(u32::MAX, u64::MAX), ErrorKind::InvalidArgument, ["slot_count", "2 to 240"]),
        (with(2, 0), ErrorKind::InvalidArgument, ["payload_bytes is 0", "expected"]),
        (with(2, u64::MAX), ErrorKind::TooLarge, ["18446744073709551615", "largest region"]),
        (with(240, 1 << 62), ErrorKind::InvalidArgument, ["240 slots", "largest region"]),
    ];
    for (options, kind, says) in cases {
        refused(format_region(&path, &options), kind, &says);
        assert!(!path.exists());
    }
    let lost = bed.dir.path().join("no/such/directory/region");
    refused_at(format_region(&lost, &format()), &lost, ErrorKind::NotFound, &["directory"]);
    let shrink =
        refused(grow_region(&bed.path, 2, PAYLOAD_BYTES, None), ErrorKind::InvalidArgument, &["2", "3"]);
    assert_eq!(shrink.path(), Some(&*bed.path));
    bed.assert_intact();
}

#[test]
fn options_that_do_not_fit_the_region() {
    let bed = Bed::new();
    let open = |change: fn(&mut OpenOptions)| {
        let mut options = options();
        change(&mut options);
        Store::open(&bed.path, &options)
    };
    let invalid = ErrorKind::InvalidArgument;
    bed.assert_untouched(|| {
        let many = open(|options| options.keep = 3);
        refused_at(many, &bed.path, invalid, &["max_in_flight 1", "keep 3", "4 slots", "has 3"])
    });
    bed.assert_untouched(|| {
        let small = refused(
            open(|options| options.staging_bytes = 8191),
            invalid,
            &["staging_bytes is 8191", "at least 8192", "max_in_flight 1"],
        );
        assert!(small.advice().is_some());
        small
    });
    type Change = fn(&mut OpenOptions);
    let limits: [(Change, &str); 10] = [
        (|options| options.max_in_flight = 0, "max_in_flight is 0, expected 1"),
        (|options| options.max_in_flight = 1000, "max_in_flight is 1000, expected 1"),
        (|options| options.keep = 0, "keep is 0, expected 1"),
        (|options| options.writers = 0, "writers is 0, expected 1"),
        (|options| options.readers = 65, "readers is 65, expected 1 to 64"),
        (|options| options.queue_depth = 0, "queue_depth is 0, expected 1"),
        (|options| options.chunk_bytes = 0, "chunk_bytes is 0, expected 4096"),
        (|options| options.chunk_bytes = 5000, "chunk_bytes is 5000, expected a multiple of 4096"),
        (|options| options.chunk_bytes = u64::MAX, "chunk_bytes is 18446744073709551615, expected"),
        (|options| options.staging_bytes = 0, "staging_bytes is 0, expected at least"),
    ];
    for (change, says) in limits {
        bed.assert_untouched(|| refused(open(change), invalid, &[says]));
    }
    bed.assert_untouched(|| {
        refused(
            open(|options| options.staging_bytes = u64::MAX),
            ErrorKind::OutOfMemory,
            &["bytes of memory", "staging"],
        )
    });
    bed.assert_intact();
}

/// The other writer: opens the region, says so, and holds it until its standard input ends.
#[test]
fn holder_process() {
    let Some(path) = std::env::var_os(ENV_HOLD) else { return };
    let store = Store::open(Path::new(&path), &options()).expect("open");
    println!("\n@holding");
    let mut rest = Vec::new();
    std::io::stdin().read_to_end(&mut rest).expect("wait for the parent");
    drop(store);
}

#[test]
fn a_region_in_use_by_another_process() {
    let bed = Bed::new();
    let mut holder = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "paths::holder_process", "--nocapture", "--test-threads=1"])
        .env(ENV_HOLD, &bed.path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("start the other writer");
    let mut lines = BufReader::new(holder.stdout.take().expect("a pipe")).lines();
    assert!(
        lines.by_ref().map_while(Result::ok).any(|line| line == "@holding"),
        "the other writer could not open"
    );

    let pid = format!("process {}", holder.id());
    let says = [pid.as_str(), "another writer", "read-only"];
    bed.assert_untouched(|| {
        refused_at(Store::open(&bed.path, &options()), &bed.path, ErrorKind::InUse, &says)
    });
    bed.assert_untouched(|| {
        refused_at(format_region(&bed.path, &forced()), &bed.path, ErrorKind::InUse, &says)
    });
    let brief = Some(Duration::from_millis(50));
    bed.assert_untouched(|| {
        refused_at(grow_region(&bed.path, 9, PAYLOAD_BYTES, brief), &bed.path, ErrorKind::InUse, &says)
    });
    let waiting = OpenOptions { lock_wait: brief, ..options() };
    refused_at(Store::open(&bed.path, &waiting), &bed.path, ErrorKind::InUse, &says);
    assert_eq!(bed.newest_step().expect("readers are welcome"), bed::NEWEST);

    // A patient writer gets the region as soon as the other one lets go.
    let patient = OpenOptions { lock_wait: Some(Duration::from_secs(30)), ..options() };
    thread::scope(|scope| {
        let opening = scope.spawn(|| Store::open(&bed.path, &patient).map(drop));
        thread::sleep(Duration::from_millis(50));
        drop(holder.stdin.take());
        opening.join().expect("no panic").expect("the region is free");
    });
    assert_ne!(lines.count(), 0, "it reports its own success");
    assert!(holder.wait().expect("wait").success());
    bed.assert_intact();
}
