//! cuFile: from a GPU to a file, whole or an error, and nothing is left registered.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pccheck::cuda::gds::{Gds, GdsBuffer, GdsFile};
use pccheck::cuda::Device;
use pccheck::{Error, ErrorKind, Result};

use super::cufile::{Cufile, VARIANT, WITHOUT_PROPERTIES, WITHOUT_WRITE};
use super::standin::{Standin, LEGACY};

const BYTES: usize = 100_000;
const SEED: u64 = 7;

/// Memory of a GPU that holds the pattern, from a multiple of 4096 on.
struct Memory<'a> {
    standin: &'a Standin,
    ordinal: u32,
    allocation: u64,
    address: u64,
    device: Arc<Device>,
}

impl<'a> Memory<'a> {
    fn on(standin: &'a Standin, ordinal: u32) -> Memory<'a> {
        let allocation = standin.allocate(ordinal, BYTES + 4096);
        let address = allocation.next_multiple_of(4096);
        standin.fill(ordinal, LEGACY, address, BYTES, SEED, 0);
        standin.synchronize(ordinal, LEGACY);
        Memory { standin, ordinal, allocation, address, device: Device::open(ordinal).expect("device") }
    }

    fn register(&self) -> Result<GdsBuffer> {
        // SAFETY: it lives longer than what is made of it.
        unsafe { GdsBuffer::register(&self.device, self.address, BYTES) }
    }
}

impl Drop for Memory<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.standin.free(self.ordinal, self.allocation);
        }
    }
}

fn open(path: &Path, flags: i32) -> Arc<File> {
    let mut options = OpenOptions::new();
    Arc::new(options.read(true).write(true).create(true).custom_flags(flags).open(path).expect("open"))
}

fn in_folder(work: impl FnOnce(&Path)) {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("folder");
    work(&folder.path().join("file"));
}

/// What a write of a buffer does. Nothing changes the memory of these tests meanwhile.
fn write(buffer: &GdsBuffer, file: &GdsFile, at: u64, len: usize, file_offset: u64) -> Result<()> {
    // SAFETY: see above.
    unsafe { buffer.write(at, len, file, file_offset) }
}

/// Runs a test in a process of its own, in which cuFile is neither loaded nor open when it begins.
pub fn alone(test: &str, variant: &str, work: impl FnOnce()) {
    if std::env::var_os(VARIANT).is_some() {
        return work();
    }
    let mut again = Command::new(std::env::current_exe().expect("this test"));
    let again = again.args(["--exact", test]).env(VARIANT, variant).output().expect("run");
    let said = String::from_utf8_lossy(&again.stdout);
    assert!(again.status.success(), "{said}{}", String::from_utf8_lossy(&again.stderr));
    assert!(said.contains("1 passed"), "{said}");
}

#[test]
fn bytes_of_a_gpu_are_written_where_they_belong() {
    let standin = Standin::take();
    let right = standin.pattern(SEED, BYTES);
    for (device, flags) in [(0, libc::O_DIRECT), (1, 0)] {
        let cufile = Cufile::take(&standin);
        in_folder(|path| {
            let memory = Memory::on(&standin, device);
            let buffer = memory.register().expect("register");
            let file = GdsFile::register(open(path, flags)).expect("register");
            let mut expected = vec![0; 3 * BYTES];
            // The last two are aligned for no device.
            let parts = [
                (0, 8192, 4096),
                (4096, 40_960, 16_384),
                (8192, 0, 1),
                (60_001, 17, 100_001),
                (0, BYTES, 200_000),
            ];
            for (at, len, file_offset) in parts {
                write(&buffer, &file, at as u64, len, file_offset as u64).expect("write");
                expected[file_offset..file_offset + len].copy_from_slice(&right[at..at + len]);
            }
            assert_eq!((cufile.unaligned(), cufile.unregistered()), (2, 0));
            drop(buffer);
            // Memory that is not registered, from the middle of an allocation on.
            // SAFETY: it is memory of the device, and nothing changes it.
            unsafe { file.write(&memory.device, memory.address + 512, 4096, 65_536, 100) }.expect("write");
            expected[65_536..65_536 + 4096].copy_from_slice(&right[612..612 + 4096]);
            assert_eq!(cufile.unregistered(), 1);
            drop(file);
            expected.truncate(300_000);
            assert!(std::fs::read(path).expect("read") == expected, "device {device}");
        });
        cufile.assert_clean("writes");
    }
    standin.assert_clean("writes");
}

#[test]
fn short_writes_go_on_and_useless_ones_end() {
    let standin = Standin::take();
    let cufile = Cufile::take(&standin);
    let memory = Memory::on(&standin, 0);
    in_folder(|path| {
        let buffer = memory.register().expect("register");
        let file = GdsFile::register(open(path, 0)).expect("register");
        let mut calls = 0;
        // An odd end is written again, so that what follows stays aligned.
        for (most, needed) in [(4096, 25), (5000, 25), (10_000, 12), (99_999, 2), (100_000, 1)] {
            cufile.most_bytes(most);
            write(&buffer, &file, 0, BYTES, 0).expect("write");
            assert_eq!(cufile.calls("cuFileWrite") - calls, needed, "at most {most} bytes");
            calls = cufile.calls("cuFileWrite");
            assert!(
                std::fs::read(path).expect("read") == standin.pattern(SEED, BYTES),
                "at most {most} bytes"
            );
            file_is_emptied(path);
        }
        cufile.most_bytes(100);
        let error = write(&buffer, &file, 4096, 8192, 512).expect_err("no progress");
        assert_eq!((error.kind(), error.offset()), (ErrorKind::Io, Some(512)), "{error}");
        assert!(error.message().contains("8192") && error.message().contains("100"), "{error}");
        assert_eq!(cufile.calls("cuFileWrite") - calls, 65);
        calls = cufile.calls("cuFileWrite");
        // After a signal, and where there is no room just now, it is called again, but not for ever.
        cufile.most_bytes(0);
        for errno in [libc::EINTR, libc::EAGAIN] {
            cufile.fail_write(1, errno, false);
            write(&buffer, &file, 0, BYTES, 0).expect("write");
            assert_eq!(cufile.calls("cuFileWrite") - calls, 2);
            cufile.fail_write(1, errno, true);
            let error = write(&buffer, &file, 0, BYTES, 0).expect_err("never");
            assert_eq!((error.kind(), error.errno()), (ErrorKind::Io, Some(errno)), "{error}");
            cufile.reset();
            calls = 0;
        }
    });
    cufile.assert_clean("short writes");
}

fn file_is_emptied(path: &Path) {
    OpenOptions::new().write(true).open(path).expect("open").set_len(0).expect("empty");
}

/// Call, cuFile's number, the driver's, and what is to be told.
type Failure = (&'static str, i32, i32, ErrorKind, &'static str);

const FAILURES: &[Failure] = &[
    ("cuFileHandleRegister", 5008, 0, ErrorKind::Unsupported, "CU_FILE_IO_NOT_SUPPORTED (5008)"),
    ("cuFileHandleRegister", 5027, 0, ErrorKind::Unsupported, "run udevd"),
    ("cuFileHandleRegister", 5030, 0, ErrorKind::Unsupported, "CU_FILE_INTERNAL_ERROR (5030)"),
    ("cuFileHandleRegister", 5028, 0, ErrorKind::InvalidState, "cufile.log"),
    ("cuFileBufRegister", 5030, 0, ErrorKind::Io, "cufile.log"),
    ("cuFileBufRegister", 5036, 0, ErrorKind::OutOfMemory, "CU_FILE_GPU_MEMORY_PINNING_FAILED (5036)"),
    ("cuFileBufRegister", 5011, 2, ErrorKind::OutOfMemory, "CUDA_ERROR_OUT_OF_MEMORY (2)"),
    ("cuFileBufRegister", 5011, 719, ErrorKind::Device, "CU_FILE_CUDA_DRIVER_ERROR (5011)"),
    ("cuFileBufRegister", 5999, 0, ErrorKind::Io, "an unknown error (5999)"),
    (
        "cuFileWrite",
        1,
        libc::ENOSPC,
        ErrorKind::NoSpace,
        "expected to write 100000 bytes, got 8192: No space",
    ),
    (
        "cuFileWrite",
        1,
        libc::EIO,
        ErrorKind::Io,
        "expected to write 100000 bytes, got 8192: Input/output error",
    ),
    ("cuFileWrite", 1, 5019, ErrorKind::Io, "got 8192: cuFile reports CU_FILE_INVALID_FILE_OPEN_FLAG (5019)"),
    ("cuFileWrite", 5008, 0, ErrorKind::Io, "got 8192: cuFile reports CU_FILE_IO_NOT_SUPPORTED (5008)"),
    ("cuFileWrite", 5011, 0, ErrorKind::Io, "got 8192: cuFile reports CU_FILE_CUDA_DRIVER_ERROR (5011)"),
];

#[test]
fn a_call_that_fails_is_told_and_leaves_nothing() {
    let standin = Standin::take();
    for &(call, code, driver, kind, words) in FAILURES {
        let what = format!("{call} failing with {code} and {driver}");
        let cufile = Cufile::take(&standin);
        let memory = Memory::on(&standin, 0);
        in_folder(|path| {
            cufile.most_bytes(8192);
            cufile.fail(call, if call == "cuFileWrite" { 2 } else { 1 }, code, driver, false);
            let attempt = || -> Result<()> {
                let file = GdsFile::register(open(path, 0))?;
                let buffer = memory.register()?;
                write(&buffer, &file, 0, BYTES, 12_288)
            };
            let error: Error = attempt().expect_err(&what);
            assert_eq!(error.kind(), kind, "{what}: {error}");
            assert!(error.to_string().contains(words), "{what}: {error}");
            let offset = (call == "cuFileWrite").then_some(12_288 + 8192);
            assert_eq!(error.offset(), offset, "{what}: {error}");
            cufile.assert_clean(&what);
            // The next attempt is like any other.
            attempt().expect("nothing fails any more");
        });
        drop(memory);
        cufile.assert_clean(&what);
        standin.assert_clean(&what);
    }
}

#[test]
fn what_is_not_in_the_buffer_is_not_written() {
    let standin = Standin::take();
    let cufile = Cufile::take(&standin);
    let memory = Memory::on(&standin, 0);
    in_folder(|path| {
        let buffer = memory.register().expect("register");
        let file = GdsFile::register(open(path, 0)).expect("register");
        let end = BYTES as u64;
        let beyond = [(0, BYTES + 1), (1, BYTES), (end, 1), (end + 1, 0), (u64::MAX, 2), (2, usize::MAX)];
        let beyond = beyond.map(|(at, len)| (at, len, 0));
        for (at, len, file_offset) in
            beyond.into_iter().chain([(0, 10, i64::MAX as u64 - 9), (0, 1, u64::MAX)])
        {
            let error = write(&buffer, &file, at, len, file_offset).expect_err("refused");
            assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{len} bytes from {at} on: {error}");
        }
        assert_eq!(cufile.calls("cuFileWrite"), 0);
        // SAFETY: it is refused; nothing is read.
        let error = unsafe { file.write(&memory.device, u64::MAX - 4096, 8192, 0, 0) }.expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
        assert_eq!(cufile.calls("cuFileWrite"), 0);
        write(&buffer, &file, end, 0, 0).expect("nothing");
        write(&buffer, &file, end - 1, 1, 0).expect("the last byte");
        assert_eq!(cufile.calls("cuFileWrite"), 1);
    });
    cufile.assert_clean("refusals");
}

#[test]
fn calls_are_made_in_the_context_of_the_gpu() {
    let standin = Standin::take();
    let cufile = Cufile::take(&standin);
    let (here, there) = (Memory::on(&standin, 0), Memory::on(&standin, 1));
    in_folder(|path| {
        let file = GdsFile::register(open(path, 0)).expect("register");
        let _inside = there.device.enter().expect("enter");
        let buffer = here.register().expect("register");
        write(&buffer, &file, 0, BYTES, 0).expect("write");
        drop(buffer);
        // SAFETY: it is refused.
        let error =
            unsafe { GdsBuffer::register(&there.device, here.address, BYTES) }.err().expect("refused");
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
        assert!(error.to_string().contains("CONTEXT_MISMATCH"), "{error}");
    });
    cufile.assert_clean("two GPUs");
}

#[test]
fn several_threads_write_at_once() {
    const THREADS: usize = 4;
    let standin = Standin::take();
    let cufile = Cufile::take(&standin);
    let memory = Memory::on(&standin, 0);
    in_folder(|path| {
        let buffer = memory.register().expect("register");
        let file = GdsFile::register(open(path, 0)).expect("register");
        cufile.delay_us(500_000);
        let began = Instant::now();
        std::thread::scope(|scope| {
            for at in 0..THREADS {
                let (buffer, file) = (&buffer, &file);
                scope.spawn(move || write(buffer, file, 0, BYTES, (at * BYTES) as u64).expect("write"));
            }
        });
        assert!(began.elapsed() < Duration::from_millis(1500), "one after the other: {:?}", began.elapsed());
        assert!(std::fs::read(path).expect("read") == standin.pattern(SEED, BYTES).repeat(THREADS));
    });
    cufile.assert_clean("threads");
}

#[test]
fn in_a_forked_child_nothing_is_called() {
    let standin = Standin::take();
    let cufile = Cufile::take(&standin);
    let memory = Memory::on(&standin, 0);
    in_folder(|path| {
        let opened = open(path, 0);
        let (file, buffer) =
            (GdsFile::register(opened.clone()).expect("file"), memory.register().expect("memory"));
        let counted = || {
            ["cuFileHandleDeregister", "cuFileBufDeregister", "cuFileWrite"].map(|call| cufile.calls(call))
        };
        let before = counted();
        // SAFETY: the child looks at memory, and ends.
        let child = unsafe { libc::fork() };
        assert!(child >= 0, "fork");
        if child == 0 {
            let forked = |result: Result<()>| result.is_err_and(|error| error.kind() == ErrorKind::Forked);
            let refused = forked(Gds::get().map(drop)) && forked(write(&buffer, &file, 0, BYTES, 0));
            drop((buffer, file));
            let fine = refused && counted() == before;
            // SAFETY: the child ends without the handlers of its parent.
            unsafe { libc::_exit(i32::from(!fine)) };
        }
        let mut status = -1;
        // SAFETY: our own child, and a place for its status.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert_eq!(status, 0, "the child");
        assert!(opened.as_raw_fd() >= 0);
        write(&buffer, &file, 0, BYTES, 0).expect("the parent goes on");
    });
    cufile.assert_clean("a fork");
}

#[test]
fn it_is_known_whether_bytes_go_directly() {
    if Path::new("/proc/driver/nvidia-fs/version").exists() {
        return;
    }
    let standin = Standin::take();
    let cufile = Cufile::take(&standin);
    let gds = Gds::get().expect("there");
    for (nvfs_major, feature_flags, direct) in
        [(0, 0, false), (2, 0, true), (0, 1 << 4, true), (0, 0b1111, false)]
    {
        cufile.set_properties(nvfs_major, feature_flags);
        assert_eq!(gds.is_direct(), direct, "nvidia-fs {nvfs_major}, features {feature_flags:#x}");
    }
    cufile.set_properties(2, 0);
    cufile.fail("cuFileDriverGetProperties", 1, 5001, 0, false);
    assert!(!gds.is_direct());
}

#[test]
fn without_the_library_it_is_unsupported_until_there_is_one() {
    alone("gds::without_the_library_it_is_unsupported_until_there_is_one", "late", || {
        let standin = Standin::take();
        match Gds::get() {
            Ok(_) => return println!("this system has a cuFile of its own"),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
                assert!(error.message().contains("libcufile.so.0"), "{error}");
                assert!(error.advice().is_some_and(|advice| advice.contains("install")), "{error}");
            }
        }
        in_folder(|path| {
            let error = GdsFile::register(open(path, 0)).err().expect("no library");
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        });
        let cufile = Cufile::take(&standin);
        Gds::get().expect("now it is there");
        assert_eq!(cufile.calls("cuFileDriverOpen"), 1);
    });
}

#[test]
fn it_is_opened_once_and_failures_are_told() {
    alone("gds::it_is_opened_once_and_failures_are_told", "failing", || {
        let standin = Standin::take();
        let cufile = Cufile::take(&standin);
        for (code, driver, kind, words) in [
            (5001, 0, ErrorKind::Unsupported, "allow_compat_mode"),
            (5033, 0, ErrorKind::Unsupported, "CU_FILE_NVFS_SETUP_ERROR (5033)"),
            (5011, 100, ErrorKind::Device, "CUDA_ERROR_NO_DEVICE"),
            (5007, 0, ErrorKind::Unsupported, "this platform is not supported"),
        ] {
            cufile.fail("cuFileDriverOpen", 1, code, driver, false);
            let error = Gds::get().err().expect("it fails");
            assert_eq!(error.kind(), kind, "{error}");
            assert!(error.to_string().contains(words), "{error}");
        }
        let before = cufile.calls("cuFileDriverOpen");
        cufile.delay_us(100_000);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| Gds::get().expect("open"));
            }
        });
        assert_eq!(cufile.calls("cuFileDriverOpen") - before, 1);
        cufile.assert_clean("opening");
    });
}

#[test]
fn a_driver_that_somebody_else_has_opened_is_open() {
    alone("gds::a_driver_that_somebody_else_has_opened_is_open", "open", || {
        let standin = Standin::take();
        let cufile = Cufile::take(&standin);
        cufile.fail("cuFileDriverOpen", 1, 5026, 0, false);
        Gds::get().expect("open");
        Gds::get().expect("open");
        assert_eq!(cufile.calls("cuFileDriverOpen"), 1);
    });
}

#[test]
fn a_library_that_lacks_a_call_is_unsupported() {
    alone("gds::a_library_that_lacks_a_call_is_unsupported", WITHOUT_WRITE, || {
        let standin = Standin::take();
        let cufile = Cufile::take(&standin);
        let error = Gds::get().err().expect("lacking");
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert!(error.message().contains("cuFileWrite"), "{error}");
        assert_eq!(cufile.calls("cuFileDriverOpen"), 0);
    });
}

#[test]
fn older_libraries_do_not_tell_their_properties() {
    alone("gds::older_libraries_do_not_tell_their_properties", WITHOUT_PROPERTIES, || {
        let standin = Standin::take();
        let _cufile = Cufile::take(&standin);
        let direct = Gds::get().expect("open").is_direct();
        assert_eq!(direct, Path::new("/proc/driver/nvidia-fs/version").exists());
    });
}
