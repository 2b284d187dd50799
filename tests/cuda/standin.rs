//! The stand-in: built, loaded where the engine will look for the driver, and controlled.

use std::collections::BTreeSet;
use std::ffi::{c_char, c_void, CString};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

/// Exclusive use of the stand-in, whose state is the process's.
pub struct Standin {
    _alone: MutexGuard<'static, ()>,
    /// What tests before have left: where a GPU hangs some things are never given back.
    before: Vec<u64>,
}

/// Kinds of objects that are counted.
const KINDS: [&str; 5] = ["event", "memory", "registered", "module", "context"];

/// A stream of the program under test.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stream(pub usize);

/// The driver's name for the legacy default stream.
pub const LEGACY: Stream = Stream(0);

/// Set where the stand-in is to lack `cuMemcpyBatchAsync` and the calls for kernels and for words.
pub const LACKING: &str = "PCC_STANDIN_LACKING";

/// Compiles `tests/standin/cuda`. Its name is the one that loaders of the driver ask for first, so that no real driver
/// is taken.
pub fn build(folder: &str, flags: &[&str]) -> PathBuf {
    let flags: Vec<&str> = [&["-shared", "-fPIC", "-Wl,-soname,libcuda.so"], flags].concat();
    compile(&format!("{folder}/libcuda.so"), "cuda", &flags)
}

/// Compiles the files of a folder of `tests/standin` to a library or program. Others see only the names that are marked in
/// it: the library is loaded for the whole process.
pub fn compile(target: &str, sources: &str, flags: &[&str]) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/standin").join(sources);
    let is_source = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "c");
    let files = std::fs::read_dir(folder).expect("list").map(|entry| entry.expect("entry").path());
    let files: BTreeSet<PathBuf> = files.filter(is_source).collect();
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("standin").join(target);
    std::fs::create_dir_all(target.parent().expect("a folder")).expect("folder");
    // Several tests may build it at once.
    static BUILDS: AtomicU32 = AtomicU32::new(0);
    let number = BUILDS.fetch_add(1, Ordering::Relaxed);
    let beside = target.with_extension(format!("{}-{number}", std::process::id()));
    let built = Command::new("cc")
        .args(["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden", "-pthread"])
        .args(flags)
        .arg("-o")
        .arg(&beside)
        .args(files)
        .arg("-ldl")
        .status()
        .expect("cc");
    assert!(built.success(), "{sources} does not compile");
    std::fs::rename(&beside, &target).expect("rename");
    target
}

fn library() -> usize {
    static LIBRARY: OnceLock<usize> = OnceLock::new();
    *LIBRARY.get_or_init(|| {
        let path = match std::env::var_os(LACKING) {
            Some(_) => build(
                "lacking",
                &["-DSTANDIN_WITHOUT_BATCH", "-DSTANDIN_WITHOUT_KERNELS", "-DSTANDIN_WITHOUT_WORDS"],
            ),
            None => build("whole", &[]),
        };
        load(&path)
    })
}

/// Loads a library for the whole process, where the engine finds it by its soname.
pub fn load(path: &Path) -> usize {
    let path = CString::new(path.to_str().expect("UTF-8")).expect("no NUL");
    // SAFETY: our own library, whose constructor does nothing.
    let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    assert!(!handle.is_null(), "the stand-in does not load");
    handle as usize
}

/// A function of a library that is loaded.
macro_rules! call_in {
    ($library:expr, $name:literal($($value:expr => $type:ty),*) -> $result:ty) => {{
        let name = std::ffi::CString::new($name).expect("no NUL");
        // SAFETY: the library is loaded.
        let found = unsafe { libc::dlsym($library as *mut std::ffi::c_void, name.as_ptr()) };
        assert!(!found.is_null(), "the stand-in lacks {}", $name);
        // SAFETY: the function of that name has this signature.
        let function: extern "C" fn($($type),*) -> $result = unsafe { std::mem::transmute(found) };
        function($($value),*)
    }};
}
pub(crate) use call_in;

/// A function of the stand-in.
macro_rules! call {
    ($($called:tt)*) => { call_in!(library(), $($called)*) };
}

fn check(what: &str, code: i32) {
    assert_eq!(code, 0, "{what}");
}

impl Standin {
    /// Waits for other tests to be done with it, and takes back all that they set.
    pub fn take() -> Standin {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut standin = Standin { _alone: alone, before: Vec::new() };
        standin.reset();
        check("init", call!("cuInit"(0 => u32) -> i32));
        standin.before = KINDS.map(|kind| standin.live(kind)).to_vec();
        standin
    }

    pub fn reset(&self) {
        call!("standin_reset"() -> ());
    }

    fn enter<T>(&self, device: i32, work: impl FnOnce() -> T) -> T {
        let mut context: *mut c_void = ptr::null_mut();
        check(
            "retain",
            call!("cuDevicePrimaryCtxRetain"(&raw mut context => *mut *mut c_void, device => i32) -> i32),
        );
        check("push", call!("cuCtxPushCurrent_v2"(context => *mut c_void) -> i32));
        let result = work();
        check("pop", call!("cuCtxPopCurrent_v2"(&raw mut context => *mut *mut c_void) -> i32));
        check("release", call!("cuDevicePrimaryCtxRelease_v2"(device => i32) -> i32));
        result
    }

    /// A stream of a device that takes part in the ordering of the legacy default stream.
    pub fn stream(&self, device: u32) -> Stream {
        self.enter(device as i32, || {
            let mut stream: *mut c_void = ptr::null_mut();
            check("stream", call!("cuStreamCreate"(&raw mut stream => *mut *mut c_void, 0 => u32) -> i32));
            Stream(stream as usize)
        })
    }

    pub fn destroy(&self, stream: Stream) {
        check("destroy", call!("cuStreamDestroy_v2"(stream.0 as *mut c_void => *mut c_void) -> i32));
    }

    pub fn allocate(&self, device: u32, bytes: usize) -> u64 {
        self.enter(device as i32, || {
            let mut address = 0_u64;
            check("allocate", call!("cuMemAlloc_v2"(&raw mut address => *mut u64, bytes => usize) -> i32));
            address
        })
    }

    pub fn free(&self, device: u32, address: u64) {
        self.enter(device as i32, || check("free", call!("cuMemFree_v2"(address => u64) -> i32)));
    }

    /// Has a kernel fill memory once everything before it on the stream is done, and so many microseconds later.
    pub fn fill(&self, device: u32, stream: Stream, address: u64, bytes: usize, seed: u64, delay_us: u64) {
        let code = self.enter(device as i32, || {
            call!("standin_fill"(
                stream.0 as *mut c_void => *mut c_void, address => u64, bytes as u64 => u64, seed => u64, delay_us => u64
            ) -> i32)
        });
        check("fill", code);
    }

    pub fn synchronize(&self, device: u32, stream: Stream) {
        let code = self.enter(
            device as i32,
            || call!("cuStreamSynchronize"(stream.0 as *mut c_void => *mut c_void) -> i32),
        );
        check("synchronize", code);
    }

    /// Everything that was enqueued on the stream has been done.
    pub fn is_idle(&self, device: u32, stream: Stream) -> bool {
        let code = self
            .enter(device as i32, || call!("cuStreamQuery"(stream.0 as *mut c_void => *mut c_void) -> i32));
        code == 0
    }

    /// What [`Standin::fill`] fills with.
    pub fn pattern(&self, seed: u64, bytes: usize) -> Vec<u8> {
        (0..bytes as u64).map(|at| call!("standin_pattern"(seed => u64, at => u64) -> u8)).collect()
    }

    /// The bytes of device memory.
    pub fn bytes(&self, address: u64, bytes: usize) -> Vec<u8> {
        let shadow = call!("standin_shadow"(address => u64) -> *const u8);
        assert!(!shadow.is_null(), "{address:#x} is no device memory");
        // SAFETY: the stand-in's memory behind that address; nothing is running.
        unsafe { std::slice::from_raw_parts(shadow, bytes) }.to_vec()
    }

    /// Puts bytes into device memory.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        let shadow = call!("standin_shadow"(address => u64) -> *mut u8);
        assert!(!shadow.is_null(), "{address:#x} is no device memory");
        // SAFETY: as of `bytes`, and the caller's allocation is as large.
        unsafe { std::slice::from_raw_parts_mut(shadow, bytes.len()) }.copy_from_slice(bytes);
    }

    pub fn fail(&self, function: &str, nth: u64, code: i32, sticky: bool) {
        let name = CString::new(function).expect("no NUL");
        call!("standin_fail"(name.as_ptr() => *const c_char, nth => u64, code => i32, u32::from(sticky) => u32) -> ());
    }

    pub fn stall(&self, function: &str, on: bool) {
        let name = CString::new(function).expect("no NUL");
        call!("standin_stall"(name.as_ptr() => *const c_char, u32::from(on) => u32) -> ());
    }

    pub fn fail_work(&self, nth: u64, code: i32) {
        call!("standin_fail_work"(nth => u64, code => i32) -> ());
    }

    pub fn fail_device(&self, device: u32, code: i32) {
        call!("standin_fail_device"(device => u32, code => i32) -> ());
    }

    pub fn calls(&self, function: &str) -> u64 {
        let name = CString::new(function).expect("no NUL");
        call!("standin_calls"(name.as_ptr() => *const c_char) -> u64)
    }

    pub fn delay_us(&self, us: u64) {
        call!("standin_delay_us"(us => u64) -> ());
    }

    /// So many pieces of work that are not done have room on a stream; 0: any number.
    pub fn queue_limit(&self, most: u64) {
        call!("standin_queue_limit"(most => u64) -> ());
    }

    /// How often a call had to wait for room, and all others with it.
    pub fn jams(&self) -> u64 {
        call!("standin_jams"() -> u64)
    }

    pub fn allocations_wait(&self, on: bool) {
        call!("standin_allocations_wait"(u32::from(on) => u32) -> ());
    }

    pub fn hold(&self, on: bool) {
        call!("standin_hold"(u32::from(on) => u32) -> ());
    }

    pub fn hold_stream(&self, stream: Stream, on: bool) {
        call!("standin_hold_stream"(stream.0 as *mut c_void => *mut c_void, u32::from(on) => u32) -> ());
    }

    pub fn capture(&self, stream: Stream, on: bool) {
        call!("standin_capture"(stream.0 as *mut c_void => *mut c_void, u32::from(on) => u32) -> ());
    }

    pub fn capture_invalidated(&self) -> bool {
        call!("standin_capture_invalidated"() -> u32) != 0
    }

    /// Nothing is left of what was made since.
    pub fn assert_clean(&self, what: &str) {
        // Events go once the streams have come past them.
        let deadline = Instant::now() + Duration::from_secs(5);
        // A store that was closed while its GPU hung keeps the device for ever, and that its events for the next ones.
        let kept = KINDS.iter().zip(&self.before).any(|(&kind, &before)| kind == "context" && before > 0);
        let kinds = KINDS.iter().zip(&self.before).filter(|(&kind, _)| !(kept && kind == "event"));
        for (kind, before) in kinds {
            while self.live(kind) > *before && Instant::now() < deadline {
                std::thread::yield_now();
            }
            assert_eq!(self.live(kind), *before, "{kind} left behind by {what}");
        }
    }

    fn live(&self, kind: &str) -> u64 {
        let kind = CString::new(kind).expect("no NUL");
        call!("standin_live"(kind.as_ptr() => *const c_char) -> u64)
    }

    pub fn copies(&self) -> u64 {
        call!("standin_copies"() -> u64)
    }
}
