//! The stand-in for cuFile: built, loaded where the engine will look for the library, and controlled.

use std::ffi::{c_char, CString};
use std::sync::OnceLock;

use super::standin::{call_in, compile, load, Standin};

/// Names a variant of the library; of a process that has it set, nothing is loaded until a test loads it.
pub const VARIANT: &str = "PCC_STANDIN_CUFILE";

/// Lacks `cuFileDriverGetProperties`.
pub const WITHOUT_PROPERTIES: &str = "without-properties";
/// Lacks `cuFileWrite`.
pub const WITHOUT_WRITE: &str = "without-write";

/// The stand-in, of a test that has that for the driver to itself.
pub struct Cufile<'a> {
    _standin: &'a Standin,
}

/// The library of the variant that this process has.
fn library() -> usize {
    static LIBRARY: OnceLock<usize> = OnceLock::new();
    *LIBRARY.get_or_init(|| {
        let variant = std::env::var(VARIANT).unwrap_or_default();
        let renamed = match variant.as_str() {
            WITHOUT_PROPERTIES => "-DcuFileDriverGetProperties=cuFileRemoved",
            WITHOUT_WRITE => "-DcuFileWrite=cuFileRemoved",
            _ => "-DSTANDIN_WHOLE",
        };
        let flags = ["-shared", "-fPIC", "-Wl,-soname,libcufile.so.0", renamed];
        load(&compile(&format!("cufile-{variant}/libcufile.so.0"), "cufile", &flags))
    })
}

macro_rules! call {
    ($($called:tt)*) => { call_in!(library(), $($called)*) };
}

fn name(text: &str) -> CString {
    CString::new(text).expect("no NUL")
}

impl<'a> Cufile<'a> {
    /// Loads it where it is not, and takes back all that tests set.
    pub fn take(standin: &'a Standin) -> Cufile<'a> {
        let cufile = Cufile { _standin: standin };
        cufile.reset();
        cufile
    }

    pub fn reset(&self) {
        call!("cufile_reset"() -> ());
    }

    /// The nth call from now on returns the code, with the driver's beside it.
    pub fn fail(&self, function: &str, nth: u64, code: i32, driver: i32, sticky: bool) {
        call!("cufile_fail"(
            name(function).as_ptr() => *const c_char, nth => u64, code => i32, driver => i32, u32::from(sticky) => u32
        ) -> ());
    }

    /// The nth write from now on fails in the file system.
    pub fn fail_write(&self, nth: u64, errno: i32, sticky: bool) {
        self.fail("cuFileWrite", nth, 1, errno, sticky);
    }

    pub fn calls(&self, function: &str) -> u64 {
        call!("cufile_calls"(name(function).as_ptr() => *const c_char) -> u64)
    }

    pub fn live(&self, kind: &str) -> u64 {
        call!("cufile_live"(name(kind).as_ptr() => *const c_char) -> u64)
    }

    pub fn most_bytes(&self, bytes: u64) {
        call!("cufile_most_bytes"(bytes => u64) -> ());
    }

    pub fn delay_us(&self, us: u64) {
        call!("cufile_delay_us"(us => u64) -> ());
    }

    pub fn unaligned(&self) -> u64 {
        call!("cufile_unaligned"() -> u64)
    }

    pub fn unregistered(&self) -> u64 {
        call!("cufile_unregistered"() -> u64)
    }

    pub fn set_properties(&self, nvfs_major: u32, feature_flags: u32) {
        call!("cufile_set_properties"(nvfs_major => u32, feature_flags => u32) -> ());
    }

    /// Nothing is registered any more, and nothing was done that must not be.
    pub fn assert_clean(&self, what: &str) {
        assert_eq!(call!("cufile_misuses"() -> u64), 0, "misuses by {what}");
        for kind in ["file", "buffer"] {
            assert_eq!(self.live(kind), 0, "{kind} left registered by {what}");
        }
    }
}
