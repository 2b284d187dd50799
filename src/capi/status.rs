//! Status numbers: frozen, never changed, never reused.
#![expect(unsafe_code, reason = "exported functions")]

use core::ffi::{c_char, CStr};

use crate::error::ErrorKind;

/// Result of a call: `PCC_OK` or one of the negative numbers below. More may be added; none ever changes.
#[allow(non_camel_case_types)] // The name in C.
pub type pcc_status = i32;

/// Success.
pub const PCC_OK: i32 = 0;
/// An argument breaks the documented contract of the call.
pub const PCC_INVALID_ARGUMENT: i32 = -1;
/// The call is not allowed in the present state of the object (for example commit before all bytes).
pub const PCC_INVALID_STATE: i32 = -2;
/// No checkpoint, tensor, metadata entry or file of that name, index, step or generation exists.
pub const PCC_NOT_FOUND: i32 = -3;
/// The path already holds a region (or other data) and force was not given.
pub const PCC_ALREADY_EXISTS: i32 = -4;
/// The file is not a region: neither of its superblocks bears the magic number. Where one does, but both are
/// damaged, it is PCC_CORRUPT.
pub const PCC_NOT_A_REGION: i32 = -5;
/// The region was written by a newer, incompatible version of the format.
pub const PCC_UNSUPPORTED_VERSION: i32 = -6;
/// The region uses a feature that this library does not know.
pub const PCC_UNSUPPORTED_FEATURE: i32 = -7;
/// The medium, kernel, file system or this build cannot do what was asked.
pub const PCC_UNSUPPORTED: i32 = -8;
/// The medium cannot give the durability that the caller requires.
pub const PCC_DURABILITY: i32 = -9;
/// Another writer holds the region's lock.
pub const PCC_IN_USE: i32 = -10;
/// The device or file system has no room.
pub const PCC_NO_SPACE: i32 = -11;
/// The state does not fit in a slot, or a documented limit is passed.
pub const PCC_TOO_LARGE: i32 = -12;
/// No slot became claimable in the time given.
pub const PCC_NO_SLOT: i32 = -13;
/// The time given ran out; the operation goes on and can be waited for again.
pub const PCC_TIMED_OUT: i32 = -14;
/// The save was cancelled before it became durable.
pub const PCC_CANCELLED: i32 = -15;
/// The checkpoint was overwritten by its writer (another process) while it was being read.
pub const PCC_RECLAIMED: i32 = -16;
/// Stored bytes do not match their checksum.
pub const PCC_CORRUPT: i32 = -17;
/// The operating system reported an I/O error.
pub const PCC_IO: i32 = -18;
/// A flush failed: the durability of what was written is unknown, and the slot is quarantined.
pub const PCC_DURABILITY_UNKNOWN: i32 = -19;
/// The store was opened read-only.
pub const PCC_READ_ONLY: i32 = -20;
/// The handle was made before this process was forked, and cannot be used here.
pub const PCC_FORKED: i32 = -21;
/// Memory could not be allocated.
pub const PCC_OUT_OF_MEMORY: i32 = -22;
/// A defect of the library itself; the store refuses further saves, its durable checkpoints are intact.
pub const PCC_INTERNAL: i32 = -23;
/// A pointer is NULL where it may not be, misaligned, passes the end of memory, or is not a handle of the
/// expected kind.
pub const PCC_BAD_POINTER: i32 = -24;
/// A member of a striped region is lost, foreign, in the wrong place, too short or damaged, or the path is that of a
/// member other than the first. The text names the member.
pub const PCC_MEMBER: i32 = -25;
/// The driver of a GPU reported a failure.
pub const PCC_DEVICE: i32 = -26;

struct Entry {
    status: pcc_status,
    name: &'static CStr,
    text: &'static CStr,
}

const fn entry(status: pcc_status, name: &'static CStr, text: &'static CStr) -> Entry {
    Entry { status, name, text }
}

/// Every status, at the index of its absolute value.
const TABLE: [Entry; 27] = [
    entry(PCC_OK, c"PCC_OK", c"success"),
    entry(PCC_INVALID_ARGUMENT, c"PCC_INVALID_ARGUMENT", c"an argument breaks the contract of the call"),
    entry(
        PCC_INVALID_STATE,
        c"PCC_INVALID_STATE",
        c"the call is not allowed in the present state of the object",
    ),
    entry(PCC_NOT_FOUND, c"PCC_NOT_FOUND", c"no such checkpoint, tensor, metadata entry or file"),
    entry(PCC_ALREADY_EXISTS, c"PCC_ALREADY_EXISTS", c"the path already holds data and force was not given"),
    entry(PCC_NOT_A_REGION, c"PCC_NOT_A_REGION", c"not a region: neither superblock bears the magic number"),
    entry(
        PCC_UNSUPPORTED_VERSION,
        c"PCC_UNSUPPORTED_VERSION",
        c"the region has a newer, incompatible format",
    ),
    entry(
        PCC_UNSUPPORTED_FEATURE,
        c"PCC_UNSUPPORTED_FEATURE",
        c"the region uses a feature unknown to this library",
    ),
    entry(PCC_UNSUPPORTED, c"PCC_UNSUPPORTED", c"not supported by the medium, the system or this build"),
    entry(PCC_DURABILITY, c"PCC_DURABILITY", c"the medium cannot give the durability required"),
    entry(PCC_IN_USE, c"PCC_IN_USE", c"another writer holds the region's lock"),
    entry(PCC_NO_SPACE, c"PCC_NO_SPACE", c"no room on the device or file system"),
    entry(PCC_TOO_LARGE, c"PCC_TOO_LARGE", c"the state does not fit in a slot, or a limit is passed"),
    entry(PCC_NO_SLOT, c"PCC_NO_SLOT", c"no slot became claimable in the time given"),
    entry(PCC_TIMED_OUT, c"PCC_TIMED_OUT", c"the time given ran out; the operation goes on"),
    entry(PCC_CANCELLED, c"PCC_CANCELLED", c"cancelled before it became durable"),
    entry(PCC_RECLAIMED, c"PCC_RECLAIMED", c"the checkpoint was overwritten while it was being read"),
    entry(PCC_CORRUPT, c"PCC_CORRUPT", c"stored bytes do not match their checksum"),
    entry(PCC_IO, c"PCC_IO", c"the operating system reported an I/O error"),
    entry(PCC_DURABILITY_UNKNOWN, c"PCC_DURABILITY_UNKNOWN", c"a flush failed; durability is unknown"),
    entry(PCC_READ_ONLY, c"PCC_READ_ONLY", c"the store was opened read-only"),
    entry(PCC_FORKED, c"PCC_FORKED", c"the handle was made before this process was forked"),
    entry(PCC_OUT_OF_MEMORY, c"PCC_OUT_OF_MEMORY", c"memory could not be allocated"),
    entry(PCC_INTERNAL, c"PCC_INTERNAL", c"a defect of the library"),
    entry(
        PCC_BAD_POINTER,
        c"PCC_BAD_POINTER",
        c"a pointer is NULL, misaligned, out of range or of the wrong kind",
    ),
    entry(PCC_MEMBER, c"PCC_MEMBER", c"a member of a striped region is lost, foreign or damaged"),
    entry(PCC_DEVICE, c"PCC_DEVICE", c"the driver of a GPU reported a failure"),
];

fn find(status: pcc_status) -> Option<&'static Entry> {
    TABLE.iter().find(|entry| entry.status == status)
}

/// The number of an error kind.
pub(crate) fn status_of(kind: ErrorKind) -> pcc_status {
    match kind {
        ErrorKind::InvalidArgument => PCC_INVALID_ARGUMENT,
        ErrorKind::InvalidState => PCC_INVALID_STATE,
        ErrorKind::NotFound => PCC_NOT_FOUND,
        ErrorKind::AlreadyExists => PCC_ALREADY_EXISTS,
        ErrorKind::NotARegion => PCC_NOT_A_REGION,
        ErrorKind::UnsupportedVersion => PCC_UNSUPPORTED_VERSION,
        ErrorKind::UnsupportedFeature => PCC_UNSUPPORTED_FEATURE,
        ErrorKind::Unsupported => PCC_UNSUPPORTED,
        ErrorKind::Durability => PCC_DURABILITY,
        ErrorKind::Member => PCC_MEMBER,
        ErrorKind::InUse => PCC_IN_USE,
        ErrorKind::NoSpace => PCC_NO_SPACE,
        ErrorKind::TooLarge => PCC_TOO_LARGE,
        ErrorKind::NoSlot => PCC_NO_SLOT,
        ErrorKind::TimedOut => PCC_TIMED_OUT,
        ErrorKind::Cancelled => PCC_CANCELLED,
        ErrorKind::Reclaimed => PCC_RECLAIMED,
        ErrorKind::Corrupt => PCC_CORRUPT,
        ErrorKind::Io => PCC_IO,
        ErrorKind::Device => PCC_DEVICE,
        ErrorKind::DurabilityUnknown => PCC_DURABILITY_UNKNOWN,
        ErrorKind::ReadOnly => PCC_READ_ONLY,
        ErrorKind::Forked => PCC_FORKED,
        ErrorKind::OutOfMemory => PCC_OUT_OF_MEMORY,
        ErrorKind::Internal => PCC_INTERNAL,
    }
}

/// The name of a status as it is spelled in this header, such as "PCC_NO_SLOT"; "PCC_UNKNOWN" for a number that this
/// library does not know.
///
/// Durability: none.
/// Threads: any.
/// Ownership: static text, never freed.
/// Errors: none.
#[no_mangle]
pub extern "C" fn pcc_status_name(status: pcc_status) -> *const c_char {
    find(status).map_or(c"PCC_UNKNOWN", |entry| entry.name).as_ptr()
}

/// What a status means, in a few English words. `pcc_last_error` says more of one failure.
///
/// Durability: none.
/// Threads: any.
/// Ownership: static text, never freed.
/// Errors: none.
#[no_mangle]
pub extern "C" fn pcc_status_text(status: pcc_status) -> *const c_char {
    find(status).map_or(c"a status that this library does not know", |entry| entry.text).as_ptr()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A program compiled against any earlier header must still understand every number.
    #[test]
    fn numbers_never_change() {
        let frozen = [
            (0, "PCC_OK"),
            (-1, "PCC_INVALID_ARGUMENT"),
            (-2, "PCC_INVALID_STATE"),
            (-3, "PCC_NOT_FOUND"),
            (-4, "PCC_ALREADY_EXISTS"),
            (-5, "PCC_NOT_A_REGION"),
            (-6, "PCC_UNSUPPORTED_VERSION"),
            (-7, "PCC_UNSUPPORTED_FEATURE"),
            (-8, "PCC_UNSUPPORTED"),
            (-9, "PCC_DURABILITY"),
            (-10, "PCC_IN_USE"),
            (-11, "PCC_NO_SPACE"),
            (-12, "PCC_TOO_LARGE"),
            (-13, "PCC_NO_SLOT"),
            (-14, "PCC_TIMED_OUT"),
            (-15, "PCC_CANCELLED"),
            (-16, "PCC_RECLAIMED"),
            (-17, "PCC_CORRUPT"),
            (-18, "PCC_IO"),
            (-19, "PCC_DURABILITY_UNKNOWN"),
            (-20, "PCC_READ_ONLY"),
            (-21, "PCC_FORKED"),
            (-22, "PCC_OUT_OF_MEMORY"),
            (-23, "PCC_INTERNAL"),
            (-24, "PCC_BAD_POINTER"),
            (-25, "PCC_MEMBER"),
            (-26, "PCC_DEVICE"),
        ];
        assert_eq!(TABLE.len(), frozen.len());
        for (index, (entry, (status, name))) in TABLE.iter().zip(frozen).enumerate() {
            assert_eq!((entry.status, entry.name.to_str()), (status, Ok(name)));
            assert_eq!(entry.status, -(index as i32));
            assert!(!entry.text.is_empty());
        }
    }

    #[test]
    fn unknown_numbers_have_a_name_too() {
        for status in [1, -27, i32::MIN] {
            assert!(find(status).is_none());
            assert!(!pcc_status_name(status).is_null() && !pcc_status_text(status).is_null());
        }
    }
}
