//! What cuFile's numbers say. The words are in its header as an inline function, so that no library has them to load.

use core::ffi::c_int;

use crate::cuda::api::Api;
use crate::error::Error;
use crate::error::ErrorKind::{self, Device, InvalidArgument, InvalidState, Io, OutOfMemory, Unsupported};

/// `CUFILEOP_BASE_ERR`: cuFile's own numbers are above it.
pub const BASE: c_int = 5000;
/// `CU_FILE_CUDA_DRIVER_ERROR`: the other number of the result is the driver's.
const CUDA_DRIVER: c_int = BASE + 11;
/// `CU_FILE_DRIVER_ALREADY_OPEN`: someone else in the process has opened it.
pub const ALREADY_OPEN: c_int = BASE + 26;

/// Number above [`BASE`], name without `CU_FILE_`, what it means, and the kind of error. Those that reading, batches and
/// streams have to themselves are left out.
const CODES: &[(c_int, &str, &str, ErrorKind)] = &[
    (1, "DRIVER_NOT_INITIALIZED", "no nvidia-fs, and compatibility mode is off", Unsupported),
    (2, "DRIVER_INVALID_PROPS", "a property in cufile.json is invalid", Unsupported),
    (3, "DRIVER_UNSUPPORTED_LIMIT", "a property in cufile.json is out of range", Unsupported),
    (4, "DRIVER_VERSION_MISMATCH", "nvidia-fs has another version", Unsupported),
    (5, "DRIVER_VERSION_READ_ERROR", "the version of nvidia-fs cannot be read", Unsupported),
    (6, "DRIVER_CLOSING", "it is being closed", InvalidState),
    (7, "PLATFORM_NOT_SUPPORTED", "this platform is not supported", Unsupported),
    (8, "IO_NOT_SUPPORTED", "this file is not supported", Unsupported),
    (9, "DEVICE_NOT_SUPPORTED", "this GPU is not supported", Unsupported),
    (10, "NVFS_DRIVER_ERROR", "nvidia-fs refused a call", Io),
    (11, "CUDA_DRIVER_ERROR", "the CUDA driver refused a call", Device),
    (12, "CUDA_POINTER_INVALID", "no address of a GPU's memory", InvalidArgument),
    (13, "CUDA_MEMORY_TYPE_INVALID", "not this kind of memory", InvalidArgument),
    (14, "CUDA_POINTER_RANGE_ERROR", "the range exceeds its allocation", InvalidArgument),
    (15, "CUDA_CONTEXT_MISMATCH", "the memory belongs to another context", InvalidArgument),
    (16, "INVALID_MAPPING_SIZE", "more than may be pinned", OutOfMemory),
    (17, "INVALID_MAPPING_RANGE", "beyond what is mapped", InvalidArgument),
    (18, "INVALID_FILE_TYPE", "not this kind of file", Unsupported),
    (19, "INVALID_FILE_OPEN_FLAG", "the file is opened in an unsupported way", Unsupported),
    (20, "DIO_NOT_SET", "the file is not opened with O_DIRECT", Unsupported),
    (22, "INVALID_VALUE", "an invalid argument", InvalidArgument),
    (23, "MEMORY_ALREADY_REGISTERED", "the memory is registered already", InvalidState),
    (24, "MEMORY_NOT_REGISTERED", "the memory is not registered", InvalidState),
    (25, "PERMISSION_DENIED", "access to nvidia-fs or to the file is denied", Io),
    (26, "DRIVER_ALREADY_OPEN", "it is open already", InvalidState),
    (27, "HANDLE_NOT_REGISTERED", "the file is not registered", InvalidState),
    (28, "HANDLE_ALREADY_REGISTERED", "the file is registered already", InvalidState),
    (29, "DEVICE_NOT_FOUND", "the GPU was not found", Device),
    (30, "INTERNAL_ERROR", "an internal error", Io),
    (31, "GETNEWFD_FAILED", "no new file descriptor", Io),
    (33, "NVFS_SETUP_ERROR", "nvidia-fs could not be set up", Unsupported),
    (34, "IO_DISABLED", "disabled for this file by cufile.json", Unsupported),
    (36, "GPU_MEMORY_PINNING_FAILED", "the GPU's memory could not be pinned", OutOfMemory),
    (43, "NOMEM_ERROR", "out of memory", OutOfMemory),
    (44, "IO_ERROR", "an I/O error", Io),
    (45, "INTERNAL_BUF_REGISTER_ERROR", "the memory could not be registered", Io),
    (47, "INVALID_CONTEXT_ERROR", "an invalid context", InvalidArgument),
    (48, "NVFS_INTERNAL_DRIVER_ERROR", "an internal error of nvidia-fs", Io),
];

/// The error for a result that is no success; `driver` is the CUDA driver's number beside it, where there is one.
pub fn error(op: &'static str, code: c_int, driver: Option<c_int>) -> Error {
    let known = CODES.iter().find(|(number, ..)| BASE + number == code);
    let (name, words, kind) = match known {
        Some(&(_, name, words, kind)) => (format!("CU_FILE_{name}"), words, kind),
        None => ("an unknown error".to_string(), "", Io),
    };
    let colon = if words.is_empty() { "" } else { ": " };
    let message = format!("cuFile reports {name} ({code}){colon}{words}");
    if let (CUDA_DRIVER, Some(driver)) = (code, driver) {
        // Its own words, where it is there to be asked.
        if let Ok(api) = Api::get() {
            return api.error(op, driver).within(&message);
        }
    }
    let error = Error::new(kind, op, message);
    match kind {
        Unsupported => error.advise(
            "look at cufile.log in the working directory, and at properties.allow_compat_mode in /etc/cufile.json or the \
             file that CUFILE_ENV_PATH_JSON names",
        ),
        _ => error.advise("look at cufile.log in the working directory"),
    }
}
