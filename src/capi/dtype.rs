//! Names and sizes of dtypes, for programs that cannot read the header's constants.
#![expect(unsafe_code, reason = "exported functions")]
#![expect(clippy::missing_safety_doc, reason = "the contract of exported functions is the header")]

use core::ffi::c_char;

use super::codes::*;
use super::guard::{self, Caller};
use super::status::pcc_status;
use crate::error::{Error, ErrorKind};
use crate::format::Dtype;

/// The safetensors name of a dtype code, such as "BF16"; NULL for a number that is none.
///
/// Durability: none.
/// Threads: any.
/// Ownership: static text, never freed.
/// Errors: none.
#[no_mangle]
pub extern "C" fn pcc_dtype_name(dtype: u32) -> *const c_char {
    let name = match dtype {
        PCC_DTYPE_BOOL => c"BOOL",
        PCC_DTYPE_U8 => c"U8",
        PCC_DTYPE_I8 => c"I8",
        PCC_DTYPE_U16 => c"U16",
        PCC_DTYPE_I16 => c"I16",
        PCC_DTYPE_U32 => c"U32",
        PCC_DTYPE_I32 => c"I32",
        PCC_DTYPE_U64 => c"U64",
        PCC_DTYPE_I64 => c"I64",
        PCC_DTYPE_F16 => c"F16",
        PCC_DTYPE_BF16 => c"BF16",
        PCC_DTYPE_F32 => c"F32",
        PCC_DTYPE_F64 => c"F64",
        PCC_DTYPE_C64 => c"C64",
        PCC_DTYPE_C128 => c"C128",
        PCC_DTYPE_F8_E4M3 => c"F8_E4M3",
        PCC_DTYPE_F8_E5M2 => c"F8_E5M2",
        PCC_DTYPE_F8_E8M0 => c"F8_E8M0",
        PCC_DTYPE_F8_E4M3FNUZ => c"F8_E4M3FNUZ",
        PCC_DTYPE_F8_E5M2FNUZ => c"F8_E5M2FNUZ",
        PCC_DTYPE_F6_E2M3 => c"F6_E2M3",
        PCC_DTYPE_F6_E3M2 => c"F6_E3M2",
        PCC_DTYPE_F4 => c"F4",
        _ => return core::ptr::null(),
    };
    name.as_ptr()
}

/// Bits of one element of a dtype; 0 for a number that is none.
///
/// Durability: none.
/// Threads: any.
/// Ownership: none.
/// Errors: none.
#[no_mangle]
pub extern "C" fn pcc_dtype_bits(dtype: u32) -> u32 {
    Dtype::try_from(dtype).map_or(0, |dtype| dtype.bits() as u32)
}

/// The PCC_DTYPE_ code of a safetensors name (NUL-terminated), such as "BF16": for programs that cannot read this
/// header's constants.
///
/// Durability: none.
/// Threads: any.
/// Ownership: `dtype` receives the code, or 0.
/// Errors: PCC_NOT_FOUND for a name that is none; PCC_BAD_POINTER; PCC_INVALID_ARGUMENT for text that is not UTF-8.
#[no_mangle]
pub unsafe extern "C" fn pcc_dtype_from_name(name: *const c_char, dtype: *mut u32) -> pcc_status {
    let body = |caller: &Caller| {
        let dtype = caller.out("dtype", dtype, 0)?;
        let name = caller.text("name", name)?;
        let found = Dtype::from_name(name).ok_or_else(|| {
            Error::new(ErrorKind::NotFound, caller.op(), format!("no dtype is called {name:?}"))
        })?;
        dtype.set(found.code());
        Ok(())
    };
    // SAFETY: the header binds the caller.
    unsafe { guard::call("pcc_dtype_from_name", body) }
}

#[cfg(test)]
mod tests {
    use super::super::status::PCC_OK;
    use super::*;

    #[test]
    fn dtype_codes_and_names_are_those_of_the_format() {
        let codes = [
            PCC_DTYPE_BOOL,
            PCC_DTYPE_U8,
            PCC_DTYPE_I8,
            PCC_DTYPE_U16,
            PCC_DTYPE_I16,
            PCC_DTYPE_U32,
            PCC_DTYPE_I32,
            PCC_DTYPE_U64,
            PCC_DTYPE_I64,
            PCC_DTYPE_F16,
            PCC_DTYPE_BF16,
            PCC_DTYPE_F32,
            PCC_DTYPE_F64,
            PCC_DTYPE_C64,
            PCC_DTYPE_C128,
            PCC_DTYPE_F8_E4M3,
            PCC_DTYPE_F8_E5M2,
            PCC_DTYPE_F8_E8M0,
            PCC_DTYPE_F8_E4M3FNUZ,
            PCC_DTYPE_F8_E5M2FNUZ,
            PCC_DTYPE_F6_E2M3,
            PCC_DTYPE_F6_E3M2,
            PCC_DTYPE_F4,
        ];
        assert_eq!(codes.len(), Dtype::ALL.len());
        for (code, dtype) in codes.into_iter().zip(Dtype::ALL) {
            assert_eq!(code, dtype.code());
            assert_eq!(u64::from(pcc_dtype_bits(code)), dtype.bits());
            let mut found = 0;
            // SAFETY: a static NUL-terminated name and a local.
            let status = unsafe { pcc_dtype_from_name(pcc_dtype_name(code), &mut found) };
            assert_eq!((status, found), (PCC_OK, code), "{}", dtype.name());
        }
        assert!(pcc_dtype_name(0).is_null() && pcc_dtype_name(24).is_null());
    }
}
