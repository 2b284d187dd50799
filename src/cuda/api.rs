//! The driver's calls, each loaded by its name once.
#![expect(unsafe_code, reason = "calls into a library that was loaded at run time")]

use core::ffi::{c_char, c_int, c_uint, c_void, CStr};

use cudarc::driver::sys;

use crate::error::{Error, ErrorKind, Result};
use crate::sync::OnceLock;

pub use sys::{
    CUcontext, CUdevice, CUdeviceptr, CUevent, CUfunction, CUmemcpyAttributes, CUmodule, CUstream,
};

/// The driver's numbers of what is told apart here.
pub const SUCCESS: c_int = 0;
pub const INVALID_VALUE: c_int = 1;
pub const OUT_OF_MEMORY: c_int = 2;
pub const NO_DEVICE: c_int = 100;
pub const INVALID_CONTEXT: c_int = 201;
pub const NO_CODE_FOR_DEVICE: c_int = 209;
pub const NO_COMPILER: c_int = 221;
pub const NEWER_CODE: c_int = 222;
pub const COMPILER_IS_OFF: c_int = 223;
pub const NOT_READY: c_int = 600;

/// `CU_STREAM_CAPTURE_MODE_RELAXED`.
pub const CAPTURE_RELAXED: c_uint = 2;

const OP: &str = "load CUDA driver";

macro_rules! api {
    ($($(#[$doc:meta])* $name:ident = $symbol:literal ( $($arg:ty),* );)*) => {
        /// The calls that are used, and those that older drivers lack.
        pub struct Api {
            $($(#[$doc])* pub $name: unsafe extern "C" fn($($arg),*) -> c_int,)*
            /// Many copies in one call: since CUDA 12.8.
            pub batch: Option<BatchCall>,
            /// Streams that wait for numbers in memory, and write some: since CUDA 11.7.
            pub words: Option<WordCalls>,
            /// Code that runs on devices. All drivers have it; what needs none of it does without.
            pub kernels: Option<KernelCalls>,
        }

        impl Api {
            fn load() -> Result<Api> {
                find_library()?;
                // SAFETY: it is there, so that this does not panic.
                let library = unsafe { sys::culib() };
                Ok(Api {
                    $($name: {
                        // SAFETY: the symbol is the driver's function of that name, whose signature this is: a version
                        // of it that takes other arguments has another name.
                        let found = unsafe { library.get::<unsafe extern "C" fn($($arg),*) -> c_int>($symbol) };
                        *found.map_err(|_| lacking($symbol))?
                    },)*
                    batch: {
                        // SAFETY: as above.
                        let found = unsafe { library.get::<BatchCall>(BATCH) };
                        found.ok().map(|call| *call)
                    },
                    words: WordCalls::find(),
                    kernels: KernelCalls::find(),
                })
            }
        }
    };
}

const BATCH: &CStr = c"cuMemcpyBatchAsync";

/// `cuMemcpyBatchAsync` of CUDA 12.8.
pub type BatchCall = unsafe extern "C" fn(
    *mut CUdeviceptr,
    *mut CUdeviceptr,
    *mut usize,
    usize,
    *mut CUmemcpyAttributes,
    *mut usize,
    usize,
    *mut usize,
    CUstream,
) -> c_int;

macro_rules! calls_together {
    ($(#[$what:meta])* $together:ident: $($(#[$doc:meta])* $name:ident = $symbol:literal ( $($arg:ty),* );)*) => {
        $(#[$what])*
        #[derive(Clone, Copy)]
        pub struct $together {
            $($(#[$doc])* pub $name: unsafe extern "C" fn($($arg),*) -> c_int,)*
        }

        impl $together {
            /// None where one of them is not there. The library is.
            fn find() -> Option<$together> {
                // SAFETY: it is there, so that this does not panic.
                let library = unsafe { sys::culib() };
                Some($together {
                    $($name: {
                        // SAFETY: as of the other calls.
                        let found = unsafe { library.get::<unsafe extern "C" fn($($arg),*) -> c_int>($symbol) };
                        *found.ok()?
                    },)*
                })
            }
        }
    };
}

calls_together! {
    /// The calls by which streams and the host tell each other in memory how far they are.
    WordCalls:
    wait = c"cuStreamWaitValue32_v2" (CUstream, CUdeviceptr, u32, c_uint);
    write = c"cuStreamWriteValue32_v2" (CUstream, CUdeviceptr, u32, c_uint);
}

calls_together! {
    /// The calls for code that runs on devices.
    KernelCalls:
    load = c"cuModuleLoadData" (*mut CUmodule, *const c_void);
    unload = c"cuModuleUnload" (CUmodule);
    function = c"cuModuleGetFunction" (*mut CUfunction, CUmodule, *const c_char);
    /// The function; the grid; a thread block; bytes of dynamic shared memory; the stream; the parameters.
    launch = c"cuLaunchKernel" (
        CUfunction, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, CUstream, *mut *mut c_void, *mut *mut c_void
    );
}

api! {
    init = c"cuInit" (c_uint);
    device_count = c"cuDeviceGetCount" (*mut c_int);
    device_get = c"cuDeviceGet" (*mut CUdevice, c_int);
    context_retain = c"cuDevicePrimaryCtxRetain" (*mut CUcontext, CUdevice);
    context_release = c"cuDevicePrimaryCtxRelease_v2" (CUdevice);
    context_push = c"cuCtxPushCurrent_v2" (CUcontext);
    context_pop = c"cuCtxPopCurrent_v2" (*mut CUcontext);
    exchange_capture_mode = c"cuThreadExchangeStreamCaptureMode" (*mut c_uint);
    stream_create = c"cuStreamCreateWithPriority" (*mut CUstream, c_uint, c_int);
    stream_destroy = c"cuStreamDestroy_v2" (CUstream);
    stream_query = c"cuStreamQuery" (CUstream);
    stream_wait_event = c"cuStreamWaitEvent" (CUstream, CUevent, c_uint);
    stream_is_capturing = c"cuStreamIsCapturing" (CUstream, *mut c_uint);
    stream_context = c"cuStreamGetCtx" (CUstream, *mut CUcontext);
    event_create = c"cuEventCreate" (*mut CUevent, c_uint);
    event_destroy = c"cuEventDestroy_v2" (CUevent);
    event_record = c"cuEventRecord" (CUevent, CUstream);
    event_query = c"cuEventQuery" (CUevent);
    memory_allocate = c"cuMemAlloc_v2" (*mut CUdeviceptr, usize);
    memory_free = c"cuMemFree_v2" (CUdeviceptr);
    memory_info = c"cuMemGetInfo_v2" (*mut usize, *mut usize);
    host_register = c"cuMemHostRegister_v2" (*mut c_void, usize, c_uint);
    host_unregister = c"cuMemHostUnregister" (*mut c_void);
    host_address = c"cuMemHostGetDevicePointer_v2" (*mut CUdeviceptr, *mut c_void, c_uint);
    copy_to_host = c"cuMemcpyDtoHAsync_v2" (*mut c_void, CUdeviceptr, usize, CUstream);
    copy_to_device = c"cuMemcpyHtoDAsync_v2" (CUdeviceptr, *const c_void, usize, CUstream);
    copy_on_device = c"cuMemcpyDtoDAsync_v2" (CUdeviceptr, CUdeviceptr, usize, CUstream);
    pointer_attributes = c"cuPointerGetAttributes" (c_uint, *mut c_uint, *mut *mut c_void, CUdeviceptr);
    error_name = c"cuGetErrorName" (c_int, *mut *const c_char);
    error_text = c"cuGetErrorString" (c_int, *mut *const c_char);
}

/// An error where the system has no driver: cudarc's own loader panics there.
fn find_library() -> Result<()> {
    // SAFETY: loading the driver runs its initialisers, which programs that use a GPU run anyhow.
    match unsafe { sys::is_culib_present() } {
        true => Ok(()),
        false => Err(Error::new(
            ErrorKind::Unsupported,
            OP,
            "memory of a GPU was given, and this system has no NVIDIA driver (libcuda.so.1 was not found)",
        )
        .advise("install the driver, or pass tensors in host memory")),
    }
}

fn lacking(symbol: &CStr) -> Error {
    let message = format!("the NVIDIA driver lacks {}", symbol.to_string_lossy());
    Error::new(ErrorKind::Unsupported, OP, message).advise("install a driver of CUDA 10.1 or later")
}

impl Api {
    /// The calls, once they are loaded and the driver is initialised. Failures are tried anew.
    pub fn get() -> Result<&'static Api> {
        static API: OnceLock<Api> = OnceLock::new();
        if let Some(api) = API.get() {
            return Ok(api);
        }
        let api = Api::load()?;
        // SAFETY: 0 is the only flag there is.
        let code = unsafe { (api.init)(0) };
        if code != SUCCESS {
            let kind = if code == NO_DEVICE { ErrorKind::Unsupported } else { ErrorKind::Device };
            return Err(api.error(OP, code).with_kind(kind).advise("look at nvidia-smi"));
        }
        Ok(API.get_or_init(|| api))
    }

    /// The result of a call.
    pub fn check(&self, op: &'static str, code: c_int) -> Result<()> {
        match code {
            SUCCESS => Ok(()),
            code => Err(self.error(op, code)),
        }
    }

    /// What a code says, in the driver's words.
    pub fn error(&self, op: &'static str, code: c_int) -> Error {
        let word = |call: unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int| {
            let mut text = core::ptr::null();
            // SAFETY: takes any number, and stores a static text or NULL.
            let found = unsafe { call(code, &raw mut text) };
            if found != SUCCESS || text.is_null() {
                return None;
            }
            // SAFETY: not NULL: a NUL-terminated text that lives as long as the library.
            Some(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
        };
        let name = word(self.error_name).unwrap_or_else(|| "an unknown error".to_string());
        let text = word(self.error_text).map_or(String::new(), |text| format!(": {text}"));
        let kind = if code == OUT_OF_MEMORY { ErrorKind::OutOfMemory } else { ErrorKind::Device };
        Error::new(kind, op, format!("the CUDA driver reports {name} ({code}){text}"))
    }

    /// Sets the calling thread's capture mode and returns the one before.
    pub(super) fn exchange_mode(&self, mode: c_uint) -> Result<c_uint> {
        let mut mode = mode;
        // SAFETY: a place that holds one of the three modes.
        let code = unsafe { (self.exchange_capture_mode)(&raw mut mode) };
        self.check("set capture mode", code).map(|()| mode)
    }
}
