//! A region over several real files. Prevents: bytes that come back from the wrong member or the wrong place, a set
//! that opens although a member is lost, foreign, exchanged, too short or damaged, an error that does not say which one,
//! and a format that destroys, or leaves half a set behind.

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{save_one, scratch, scratch_in, WAIT};
use pccheck::engine::{format_region, grow_region, Select, Store};
use pccheck::format::{LABEL_AREA_BYTES, LABEL_OFFSETS};
use pccheck::medium::{relocate_member, Durability, IoBackend, MediumKind, Requested, Stripes};
use pccheck::store::{FormatOptions, OpenOptions};
use pccheck::{Error, ErrorKind};

const UNIT: u64 = 2 << 20;
/// Several units, the last one not full: every member holds some of a checkpoint.
const STATE_BYTES: usize = (9 << 20) + 12345;

/// Every medium that files on a disk can have.
const MEDIA: [(Requested, IoBackend, MediumKind); 3] = [
    (Requested::Direct, IoBackend::Uring, MediumKind::Direct),
    (Requested::Direct, IoBackend::Threads, MediumKind::Direct),
    (Requested::Mmap, IoBackend::Auto, MediumKind::Mmap),
];

/// The files of a set, in a folder of their own.
struct Set {
    dir: tempfile::TempDir,
    paths: Vec<PathBuf>,
}

impl Set {
    fn unformatted(dir: tempfile::TempDir, members: usize) -> Set {
        let paths = (0..members).map(|index| dir.path().join(format!("member{index}"))).collect();
        Set { dir, paths }
    }

    fn new(members: usize) -> Set {
        let set = Set::unformatted(scratch(), members);
        format_region(&set.paths[0], &set.format()).expect("format");
        set
    }

    fn format(&self) -> FormatOptions {
        FormatOptions {
            stripe: self.paths[1..].to_vec(),
            stripe_unit_bytes: UNIT,
            medium: Requested::Direct,
            ..FormatOptions::new(3, STATE_BYTES as u64 + 8192)
        }
    }

    fn open(&self) -> Result<Store, Error> {
        Store::open(&self.paths[0], &options())
    }

    fn save(&self, step: u64) {
        let store = self.open().expect("open");
        save_one(&store, step, &state(step), &[]).expect("save").wait_durable(WAIT).expect("durable");
    }

    /// The error of opening; it names the member's index and path.
    #[track_caller]
    fn refused(&self, member: usize) -> String {
        let error = self.open().err().expect("a set that must not open");
        assert_eq!(error.kind(), ErrorKind::Member, "{error}");
        let text = error.to_string();
        let path = self.paths[member].display().to_string();
        assert!(text.contains(&format!("member {member}")) && text.contains(&path), "{text}");
        // A reader must not take what a writer refuses.
        let reader = OpenOptions { read_only: true, ..options() };
        assert_eq!(Store::open(&self.paths[0], &reader).err().expect("read-only").kind(), ErrorKind::Member);
        text
    }
}

fn options() -> OpenOptions {
    OpenOptions {
        medium: Requested::Direct,
        required: Durability::Process,
        max_in_flight: 2,
        chunk_bytes: 512 << 10,
        staging_bytes: 8 << 20,
        lock_wait: Some(Duration::from_secs(5)),
        ..OpenOptions::default()
    }
}

fn state(step: u64) -> Vec<u8> {
    (0..STATE_BYTES as u64)
        .map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as u8 ^ step as u8)
        .collect()
}

#[track_caller]
fn check_newest(store: &Store, step: u64) {
    let opened = store.open_checkpoint(Select::Newest, true).expect("newest");
    assert_eq!(opened.checkpoint.record().step, step);
    assert!(opened.rejected.is_empty(), "{:?}", opened.rejected);
    assert!(opened.checkpoint.read_tensor("w").expect("read") == state(step), "came back changed");
}

fn overwrite(path: &Path, offset: u64, bytes: &[u8]) {
    fs::OpenOptions::new().write(true).open(path).expect("open").write_all_at(bytes, offset).expect("write");
}

#[test]
fn what_is_saved_over_members_comes_back_by_every_medium() {
    for members in [2, 3] {
        let set = Set::new(members);
        let mut step = 0;
        for (medium, backend, kind) in MEDIA {
            let options = OpenOptions { medium, backend, required: Durability::Power, ..options() };
            let store = Store::open(&set.paths[0], &options).expect("open");
            let info = store.medium_info();
            assert_eq!(info.kind, kind);
            assert_eq!(info.stripes, Some(Stripes { members: members as u32, unit_bytes: UNIT }));
            // Two at once, every slot twice.
            for _ in 0..3 {
                let saves =
                    [step + 1, step + 2].map(|step| save_one(&store, step, &state(step), &[]).expect("save"));
                for save in saves {
                    save.wait_durable(WAIT).expect("durable");
                }
                step += 2;
            }
            check_newest(&store, step);
            // Beside the live writer, by each medium.
            for (medium, backend, _) in MEDIA {
                let reader = OpenOptions { read_only: true, medium, backend, ..options.clone() };
                check_newest(&Store::open(&set.paths[0], &reader).expect("read-only"), step);
            }
        }
        check_newest(&set.open().expect("open again"), step);
        // Each member holds its part of the state, and not the whole of it.
        let newest = state(step);
        for path in &set.paths {
            let bytes = fs::read(path).expect("read");
            let held = newest
                .chunks_exact(4096)
                .skip(1)
                .step_by(16)
                .filter(|block| bytes.chunks_exact(4096).any(|found| found == *block));
            let (held, all) = (held.count(), newest.len() / 4096 / 16);
            assert!(held > 0 && held < all, "{} holds {held} of {all} blocks", path.display());
        }
    }
}

/// Otherwise every chunk would be two transfers, one of them blocking.
#[test]
fn slots_take_whole_units_so_that_no_chunk_straddles_members() {
    for unit in [UNIT, 4 * UNIT] {
        let set = Set::unformatted(scratch(), 2);
        format_region(&set.paths[0], &FormatOptions { stripe_unit_bytes: unit, ..set.format() })
            .expect("format");
        let store = set.open().expect("open");
        let layout = *store.region().layout();
        assert!(layout.slot_bytes > STATE_BYTES as u64);
        for slot in 0..layout.slot_count {
            assert!(
                layout.slot_offset(slot).is_multiple_of(unit),
                "slot {slot} at {}",
                layout.slot_offset(slot)
            );
        }
    }
}

/// Of several files, an error must say which one.
#[test]
fn errors_in_use_name_the_member() {
    let set = Set::new(2);
    set.save(1);
    for medium in [Requested::Direct, Requested::Mmap] {
        let reader = OpenOptions { read_only: true, medium, ..options() };
        let store = Store::open(&set.paths[0], &reader).expect("open");
        let member = fs::OpenOptions::new().write(true).open(&set.paths[1]).expect("open");
        let len = member.metadata().expect("length").len();
        member.set_len(LABEL_AREA_BYTES).expect("cut");
        let error = store.open_checkpoint(Select::Newest, true).map(drop).expect_err("half of it is gone");
        let (text, path) = (error.to_string(), set.paths[1].display().to_string());
        assert!(text.contains("member 1") && text.contains(&path), "{medium:?}: {text}");
        member.set_len(len).expect("as long as before");
    }
}

#[test]
fn members_in_memory_are_striped_too() {
    let set = Set::unformatted(scratch_in(Path::new("/dev/shm")), 2);
    let auto = FormatOptions { medium: Requested::Auto, ..set.format() };
    format_region(&set.paths[0], &auto).expect("format");
    let options = OpenOptions { medium: Requested::Auto, ..options() };
    let store = Store::open(&set.paths[0], &options).expect("open");
    assert_eq!(
        (store.medium_info().kind, store.medium_info().durability),
        (MediumKind::Mmap, Durability::Process)
    );
    save_one(&store, 7, &state(7), &[]).expect("save").wait_durable(WAIT).expect("durable");
    check_newest(&store, 7);
}

/// The weakest member decides what a durable save survives, and the kind that all can be is taken.
#[test]
fn one_member_in_memory_makes_the_region_no_more_durable_than_that() {
    let (disk, memory) = (scratch(), scratch_in(Path::new("/dev/shm")));
    let paths = [disk.path().join("r0"), memory.path().join("r1")];
    let format = FormatOptions {
        stripe: vec![paths[1].clone()],
        stripe_unit_bytes: UNIT,
        ..FormatOptions::new(3, STATE_BYTES as u64 + 8192)
    };
    format_region(&paths[0], &format).expect("format");
    let power = OpenOptions { medium: Requested::Auto, required: Durability::Power, ..options() };
    let error = Store::open(&paths[0], &power).err().expect("power is more than tmpfs gives");
    assert_eq!(error.kind(), ErrorKind::Durability);
    assert!(error.to_string().contains(&paths[1].display().to_string()), "{error}");
    let store =
        Store::open(&paths[0], &OpenOptions { required: Durability::Process, ..power }).expect("open");
    assert_eq!(
        (store.medium_info().kind, store.medium_info().durability),
        (MediumKind::Mmap, Durability::Process)
    );
    save_one(&store, 1, &state(1), &[]).expect("save").wait_durable(WAIT).expect("durable");
    check_newest(&store, 1);
}

#[test]
fn a_lost_member_is_named_and_found_again_once_the_region_is_told() {
    let set = Set::new(3);
    set.save(5);
    let elsewhere = scratch();
    let moved = elsewhere.path().join("moved");
    fs::rename(&set.paths[2], &moved).expect("move");
    let text = set.refused(2);
    assert!(text.contains("lost") && text.contains("pccheck relocate"), "{text}");

    // Not just any file: it must be that member.
    let wait = Duration::ZERO;
    for wrong in [&set.paths[0], &set.paths[1]] {
        let error = relocate_member(&set.paths[0], 2, wrong, wait).expect_err("another member");
        assert_eq!(error.kind(), ErrorKind::Member, "{error}");
    }
    for index in [0, 3] {
        let error = relocate_member(&set.paths[0], index, &moved, wait).expect_err("no such member");
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
    }
    assert_eq!(relocate_member(&set.paths[1], 2, &moved, wait).unwrap_err().kind(), ErrorKind::Member);
    set.refused(2);
    relocate_member(&set.paths[0], 2, &moved, wait).expect("relocate");
    check_newest(&set.open().expect("open"), 5);
    // Either copy of the new label is enough.
    for damaged in LABEL_OFFSETS {
        let intact = fs::read(&set.paths[0]).expect("read")[..8192].to_vec();
        overwrite(&set.paths[0], damaged + 200, b"damage");
        check_newest(&set.open().expect("open"), 5);
        overwrite(&set.paths[0], 0, &intact);
    }
    // A writer has it open: nothing is changed under its feet.
    let writer = set.open().expect("open");
    assert_eq!(relocate_member(&set.paths[0], 2, &moved, wait).unwrap_err().kind(), ErrorKind::InUse);
    drop(writer);
}

#[test]
fn another_member_is_not_the_region_and_names_the_one_that_is() {
    let set = Set::new(2);
    let error = Store::open(&set.paths[1], &options()).err().expect("member 1 is no region");
    let text = error.to_string();
    assert_eq!(error.kind(), ErrorKind::Member);
    assert!(text.contains("member 1") && text.contains(&set.paths[0].display().to_string()), "{text}");
    assert_eq!(grow_region(&set.paths[1], 4, 1 << 20, None).unwrap_err().kind(), ErrorKind::Member);
}

#[test]
fn foreign_exchanged_short_and_damaged_members_are_named() {
    let set = Set::new(3);
    set.save(3);
    let other = Set::new(3);
    let keep = |path: &Path| {
        let kept = path.with_extension("kept");
        fs::rename(path, &kept).expect("move");
        kept
    };
    let back = |kept: &Path, path: &Path| fs::rename(kept, path).expect("move back");

    // Of another set,
    let kept = keep(&set.paths[1]);
    fs::copy(&other.paths[1], &set.paths[1]).expect("copy");
    assert!(set.refused(1).contains("foreign"));
    // no member at all,
    fs::write(&set.paths[1], vec![0; 64 << 20]).expect("write");
    assert!(set.refused(1).contains("no member's label"));
    // of this set, but another one,
    fs::copy(&set.paths[2], &set.paths[1]).expect("copy");
    assert!(set.refused(1).contains("found member 2"));
    // and cut short.
    fs::copy(&kept, &set.paths[1]).expect("copy");
    let len = fs::metadata(&set.paths[1]).expect("length").len();
    fs::OpenOptions::new().write(true).open(&set.paths[1]).expect("open").set_len(len - 1).expect("cut");
    assert!(set.refused(1).contains("too short"));
    for len in [0, 100, 4096] {
        fs::write(&set.paths[1], vec![1; len]).expect("write");
        assert!(set.refused(1).contains("too short"));
    }
    back(&kept, &set.paths[1]);
    check_newest(&set.open().expect("open"), 3);

    // Member 0 itself, cut short.
    let len = fs::metadata(&set.paths[0]).expect("length").len();
    let file = fs::OpenOptions::new().write(true).open(&set.paths[0]).expect("open");
    file.set_len(len - UNIT).expect("cut");
    assert!(set.refused(0).contains("too short"));
    file.set_len(len).expect("as long as before");

    // One damaged copy of a label is survived, on every member; two are named.
    for (member, path) in set.paths.iter().enumerate() {
        let intact = fs::read(path).expect("read")[..8192].to_vec();
        for offset in LABEL_OFFSETS {
            overwrite(path, offset + 64, b"damage");
            set.open().expect("one copy is enough");
            overwrite(path, 0, &intact);
        }
        LABEL_OFFSETS.iter().for_each(|offset| overwrite(path, offset + 64, b"damage"));
        if member > 0 {
            assert!(set.refused(member).contains("damaged"));
        } else {
            let error = set.open().err().expect("member 0 has no label left");
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        }
        overwrite(path, 0, &intact);
    }
}

#[test]
fn members_that_move_or_are_copied_together_find_one_another() {
    let set = Set::new(2);
    set.save(1);
    // Copied: the copies belong together, and the originals are left alone.
    let copy = Set::unformatted(scratch(), 2);
    for (from, to) in set.paths.iter().zip(&copy.paths) {
        fs::copy(from, to).expect("copy");
    }
    copy.save(2);
    check_newest(&copy.open().expect("the copies"), 2);
    check_newest(&set.open().expect("the originals"), 1);
    // Moved, and seen from a relative path.
    let moved = Set::unformatted(scratch(), 2);
    set.paths.iter().zip(&moved.paths).for_each(|(from, to)| fs::rename(from, to).expect("move"));
    check_newest(&moved.open().expect("moved"), 1);
    drop(set.dir);
    let error = Set { paths: set.paths, dir: scratch() }.open().err().expect("gone");
    assert_eq!(error.kind(), ErrorKind::NotFound, "member 0 is where the region is: {error}");
}

#[test]
fn every_member_is_locked_and_the_holder_is_named() {
    let set = Set::new(2);
    let held = fs::OpenOptions::new().write(true).open(&set.paths[1]).expect("open");
    held.try_lock().expect("lock");
    let impatient = OpenOptions { lock_wait: Some(Duration::ZERO), ..options() };
    let error = Store::open(&set.paths[0], &impatient).err().expect("member 1 is locked");
    assert_eq!(error.kind(), ErrorKind::InUse);
    let (text, path) = (error.to_string(), set.paths[1].display().to_string());
    assert!(text.contains(&std::process::id().to_string()) && text.contains("member 1"), "{text}");
    assert!(text.contains(&path), "{text}");
    drop(held);
    let store = set.open().expect("open");
    for path in &set.paths {
        let beside = fs::OpenOptions::new().write(true).open(path).expect("open");
        assert!(beside.try_lock().is_err(), "{} is not locked", path.display());
    }
    drop(store);
    set.open().expect("all locks were given back");
}

#[test]
fn formatting_destroys_nothing_unasked_and_leaves_no_half_set() {
    let set = Set::unformatted(scratch(), 3);
    fs::write(&set.paths[2], b"somebody's data").expect("write");
    let error = format_region(&set.paths[0], &set.format()).expect_err("member 2 holds data");
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    assert!(error.to_string().contains("member2"), "{error}");
    assert!(!set.paths[0].exists() && !set.paths[1].exists(), "half a set was left behind");
    assert_eq!(fs::read(&set.paths[2]).expect("read"), b"somebody's data");
    fs::remove_file(&set.paths[2]).expect("remove");

    // The last member cannot be made: the ones before it go.
    let nowhere = FormatOptions {
        stripe: vec![set.paths[1].clone(), set.dir.path().join("no/such/folder/r2")],
        ..set.format()
    };
    assert_eq!(format_region(&set.paths[0], &nowhere).unwrap_err().kind(), ErrorKind::NotFound);
    assert!(!set.paths[0].exists() && !set.paths[1].exists(), "half a set was left behind");

    format_region(&set.paths[0], &set.format()).expect("format");
    set.save(1);
    for path in &set.paths {
        let error = format_region(path, &FormatOptions::new(2, 4096)).expect_err("a member is there");
        assert_eq!(error.kind(), ErrorKind::AlreadyExists);
        assert!(error.to_string().contains("striped region"), "{error}");
    }
    // By force: a region of its own where a member was, and the set says so.
    let force = FormatOptions { force: true, ..FormatOptions::new(3, 4096) };
    format_region(&set.paths[1], &force).expect("by force");
    assert_eq!(Store::open(&set.paths[1], &options()).expect("open").medium_info().stripes, None);
    set.refused(1);
    let again = FormatOptions { force: true, ..set.format() };
    format_region(&set.paths[0], &again).expect("by force");
    assert!(set.open().expect("open").checkpoints().expect("list").is_empty());
}

#[test]
fn impossible_sets_are_refused_before_anything_is_made() {
    let set = Set::unformatted(scratch(), 2);
    let check = |change: &dyn Fn(&mut FormatOptions), kind: ErrorKind| {
        let mut format = set.format();
        change(&mut format);
        assert_eq!(format_region(&set.paths[0], &format).unwrap_err().kind(), kind);
        assert_eq!(fs::read_dir(set.dir.path()).expect("list").count(), 0, "something was left behind");
    };
    check(&|format| format.stripe = vec![set.paths[0].clone()], ErrorKind::InvalidArgument);
    check(&|format| format.stripe = vec![set.paths[1].clone(); 2], ErrorKind::InvalidArgument);
    check(&|format| format.stripe_unit_bytes = 1 << 20, ErrorKind::InvalidArgument);
    check(&|format| format.stripe_unit_bytes = 3 << 20, ErrorKind::InvalidArgument);
    check(
        &|format| format.stripe = (0..16).map(|i| set.dir.path().join(i.to_string())).collect(),
        ErrorKind::InvalidArgument,
    );
    let deep = "x".repeat(200) + "/";
    check(&|format| format.stripe = vec![set.dir.path().join(deep.repeat(20) + "r")], ErrorKind::TooLarge);
}

#[test]
fn what_cannot_work_on_stripes_is_refused_with_advice() {
    let set = Set::new(2);
    let error = grow_region(&set.paths[0], 6, 1 << 20, Some(Duration::ZERO)).expect_err("in place");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.advice().is_some_and(|advice| advice.contains("import")), "{error}");
    let chunky = OpenOptions { chunk_bytes: 4 << 20, staging_bytes: 64 << 20, ..options() };
    let error = Store::open(&set.paths[0], &chunky).err().expect("chunks that straddle members");
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert!(error.to_string().contains(&UNIT.to_string()), "{error}");
    // A reader takes buffers of any size: it writes no chunks.
    set.save(4);
    let reader = OpenOptions { read_only: true, ..chunky };
    check_newest(&Store::open(&set.paths[0], &reader).expect("read-only"), 4);
    let uneven = OpenOptions { chunk_bytes: 12288, ..options() };
    assert!(Store::open(&set.paths[0], &uneven).is_err());
}

/// A member whose file system fills up under it, which preallocation must not let happen in mid-save.
#[test]
fn a_member_without_room_is_found_at_format() {
    let set = Set::unformatted(scratch(), 2);
    let huge = FormatOptions { payload_bytes: 1 << 50, ..set.format() };
    let error = format_region(&set.paths[0], &huge).expect_err("nobody has a pebibyte");
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
    assert_eq!(fs::read_dir(set.dir.path()).expect("list").count(), 0, "something was left behind");
}

/// What the label area is for: nothing but labels lies there, and the region's superblock does not.
#[test]
fn a_member_begins_with_its_label_and_zeros() {
    let set = Set::new(2);
    for path in &set.paths {
        let bytes = fs::read(path).expect("read");
        for offset in LABEL_OFFSETS {
            assert_eq!(bytes[offset as usize..][..8], *b"PCCMEMB\0");
        }
        assert!(bytes[8192..LABEL_AREA_BYTES as usize].iter().all(|&byte| byte == 0));
    }
    let region = fs::read(&set.paths[0]).expect("read");
    assert_eq!(region[LABEL_AREA_BYTES as usize..][..8], *b"PCCHECK\0");
}
