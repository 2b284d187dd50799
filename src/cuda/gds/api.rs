//! cuFile's calls, each loaded by its name once.
//!
//! Types and signatures are those of `cufile.h` as in the wheels `nvidia-cufile-cu12` 1.14.1 (CUDA 12.9) and
//! `nvidia-cufile` 1.20.0 (CUDA 13), which agree in all that is declared here.
#![expect(unsafe_code, reason = "calls into a library that was loaded at run time")]

use core::ffi::{c_int, c_uint, c_void, CStr};
use core::mem;
use std::path::Path;

use super::codes;
use crate::error::{Error, ErrorKind, Result};
use crate::fork::{without_forks, ForkStamp};
use crate::sync::{Mutex, OnceLock};

const OP: &str = "load cuFile";

/// Names of the library, the one of its soname first: what the program has loaded, as PyTorch does, is found by it.
const LIBRARIES: &[&CStr] = &[c"libcufile.so.0", c"libcufile.so"];

/// There while the kernel module is loaded without which cuFile takes only a few file systems directly.
const NVIDIA_FS: &str = "/proc/driver/nvidia-fs/version";

const MODULES: &str = "/proc/modules";

/// `CUfileHandle_t`.
pub type Handle = *mut c_void;

/// `CUfileError_t`: cuFile's number, and the CUDA driver's where that is [`codes`]' `CUDA_DRIVER`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Status {
    pub err: c_int,
    cu_err: c_int,
}

/// `CUfileDescr_t`.
#[repr(C)]
pub struct Descriptor {
    pub kind: c_int,
    pub handle: Place,
    /// `CUfileFSOps_t`, of file systems in user space.
    pub operations: *const c_void,
}

/// `CU_FILE_HANDLE_TYPE_OPAQUE_FD`.
pub const KIND_FD: c_int = 1;

/// The union in `CUfileDescr_t`.
#[repr(C)]
pub union Place {
    pub fd: c_int,
    /// Of Windows, and what gives the union its size.
    _handle: *mut c_void,
}

/// `CUfileDrvProps_t`, of which only what is looked at has a name.
#[repr(C)]
struct Properties {
    nvfs_major: c_uint,
    nvfs_minor: c_uint,
    poll_threshold: usize,
    max_direct_io: usize,
    status_flags: c_uint,
    control_flags: c_uint,
    feature_flags: c_uint,
    /// Sizes of caches and batches, and room for what a later version may add.
    _rest: [c_uint; 64],
}

/// `1 << CU_FILE_P2P_SUPPORTED`: the kernel itself moves bytes between devices.
const FEATURE_P2P: c_uint = 1 << 4;

macro_rules! calls {
    ($($name:ident = $symbol:literal ( $($arg:ty),* ) $(-> $result:ty)?;)*) => {
        /// cuFile, loaded and open.
        pub struct Gds {
            $(pub(super) $name: unsafe extern "C" fn($($arg),*) $(-> $result)?,)*
            properties: Option<unsafe extern "C" fn(*mut Properties) -> Status>,
            stamp: ForkStamp,
        }

        impl Gds {
            fn load(stamp: ForkStamp) -> Result<Gds> {
                let library = find_library()?;
                Ok(Gds {
                    // SAFETY: the signature is that of the header.
                    $($name: unsafe { find(library, $symbol) }.ok_or_else(|| lacking($symbol))?,)*
                    // SAFETY: as above.
                    properties: unsafe { find(library, c"cuFileDriverGetProperties") },
                    stamp,
                })
            }
        }
    };
}

calls! {
    open = c"cuFileDriverOpen" () -> Status;
    register_file = c"cuFileHandleRegister" (*mut Handle, *mut Descriptor) -> Status;
    deregister_file = c"cuFileHandleDeregister" (Handle);
    register_buffer = c"cuFileBufRegister" (*const c_void, usize, c_int) -> Status;
    deregister_buffer = c"cuFileBufDeregister" (*const c_void) -> Status;
    write = c"cuFileWrite" (Handle, *const c_void, usize, i64, i64) -> isize;
}

impl Gds {
    /// The library, loaded and its driver opened, which happens once in a process. Failures are tried anew.
    ///
    /// # Errors
    ///
    /// `Unsupported` where there is no library or where it cannot work on this system; others with cuFile's number where it
    /// cannot be opened; `Forked` in a child of the process that opened it.
    pub fn get() -> Result<&'static Gds> {
        static GDS: OnceLock<Gds> = OnceLock::new();
        static OPENING: Mutex<()> = Mutex::new(());
        let gds = match GDS.get() {
            Some(gds) => gds,
            None => {
                let _alone = OPENING.lock();
                match GDS.get() {
                    Some(gds) => gds,
                    None => {
                        let gds = Gds::open()?;
                        GDS.get_or_init(|| gds)
                    }
                }
            }
        };
        gds.stamp.check(OP)?;
        Ok(gds)
    }

    fn open() -> Result<Gds> {
        check_modules()?;
        // With the handlers that let a child know that it is one.
        let stamp = without_forks(|| Ok(ForkStamp::now()))?;
        let gds = Gds::load(stamp)?;
        // SAFETY: takes nothing. It is never closed: others in the process may use it, and it ends with the process.
        let status = unsafe { (gds.open)() };
        match status.err {
            codes::ALREADY_OPEN => Ok(gds),
            _ => check("open cuFile", status).map(|()| gds),
        }
    }

    /// Whether bytes go from device to device where the file allows it: the kernel module nvidia-fs is there, or cuFile knows
    /// another way. Otherwise cuFile copies through host memory.
    pub fn is_direct(&self) -> bool {
        if Path::new(NVIDIA_FS).exists() {
            return true;
        }
        let Some(call) = self.properties.filter(|_| !self.stamp.is_forked()) else { return false };
        // SAFETY: numbers, of which zeros are some.
        let mut found: Properties = unsafe { mem::zeroed() };
        // SAFETY: a place for the properties, and more.
        let status = unsafe { call(&raw mut found) };
        status.err == 0 && (found.nvfs_major != 0 || found.feature_flags & FEATURE_P2P != 0)
    }

    /// In a forked child the library cannot be used: what belongs to it is not given back there.
    pub(super) fn is_forked(&self) -> bool {
        self.stamp.is_forked()
    }

    /// An error in a forked child.
    pub(super) fn check_process(&self, op: &'static str) -> Result<()> {
        self.stamp.check(op)
    }
}

/// The result of a call.
pub fn check(op: &'static str, status: Status) -> Result<()> {
    match status.err {
        0 => Ok(()),
        code => Err(codes::error(op, code, Some(status.cu_err))),
    }
}

/// Opening cuFile reads a list of the kernel's modules, for ever where there is none, as in some sandboxes. The tests' stand-in does not.
fn check_modules() -> Result<()> {
    if cfg!(feature = "sim") || Path::new(MODULES).exists() {
        return Ok(());
    }
    let message = format!("this system has no {MODULES}, without which cuFile does not open");
    Err(Error::new(ErrorKind::Unsupported, OP, message).advise("save without direct_storage"))
}

fn find_library() -> Result<*mut c_void> {
    for name in LIBRARIES {
        // SAFETY: a name. Loading the library runs its initialisers, which programs that use it run anyhow. It stays loaded.
        let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if !library.is_null() {
            return Ok(library);
        }
    }
    let message = "this system has no cuFile (libcufile.so.0 was not found)";
    Err(Error::new(ErrorKind::Unsupported, OP, message).advise(
        "install GPUDirect Storage of the CUDA toolkit, or the wheel nvidia-cufile and have the loader find its library",
    ))
}

/// A function of the library, where it has it.
///
/// # Safety
///
/// `F` must be the type of a pointer to the function of that name.
unsafe fn find<F: Copy>(library: *mut c_void, name: &CStr) -> Option<F> {
    const { assert!(mem::size_of::<F>() == mem::size_of::<*mut c_void>()) };
    // SAFETY: a library that is loaded, and a name.
    let found = unsafe { libc::dlsym(library, name.as_ptr()) };
    // SAFETY: not null: a function of the type that the caller says, and pointers have one size.
    (!found.is_null()).then(|| unsafe { mem::transmute_copy::<*mut c_void, F>(&found) })
}

fn lacking(name: &CStr) -> Error {
    let message = format!("libcufile lacks {}", name.to_string_lossy());
    Error::new(ErrorKind::Unsupported, OP, message).advise("install a later version of cuFile")
}
