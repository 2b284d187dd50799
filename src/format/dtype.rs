//! Element types: frozen codes for the C ABI, names and sizes of safetensors.

use safetensors::Dtype as StoredDtype;

use crate::error::{Error, ErrorKind, Result};

/// The element type of a tensor. The numbers are frozen: never changed, never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
#[allow(non_camel_case_types, missing_docs)] // The names are those of safetensors, and say all there is.
pub enum Dtype {
    BOOL = 1,
    U8 = 2,
    I8 = 3,
    U16 = 4,
    I16 = 5,
    U32 = 6,
    I32 = 7,
    U64 = 8,
    I64 = 9,
    F16 = 10,
    BF16 = 11,
    F32 = 12,
    F64 = 13,
    C64 = 14,
    C128 = 15,
    F8_E4M3 = 16,
    F8_E5M2 = 17,
    F8_E8M0 = 18,
    F8_E4M3FNUZ = 19,
    F8_E5M2FNUZ = 20,
    F6_E2M3 = 21,
    F6_E3M2 = 22,
    F4 = 23,
}

impl Dtype {
    /// Every element type, in the order of the codes.
    pub const ALL: [Dtype; 23] = [
        Dtype::BOOL,
        Dtype::U8,
        Dtype::I8,
        Dtype::U16,
        Dtype::I16,
        Dtype::U32,
        Dtype::I32,
        Dtype::U64,
        Dtype::I64,
        Dtype::F16,
        Dtype::BF16,
        Dtype::F32,
        Dtype::F64,
        Dtype::C64,
        Dtype::C128,
        Dtype::F8_E4M3,
        Dtype::F8_E5M2,
        Dtype::F8_E8M0,
        Dtype::F8_E4M3FNUZ,
        Dtype::F8_E5M2FNUZ,
        Dtype::F6_E2M3,
        Dtype::F6_E3M2,
        Dtype::F4,
    ];

    /// The frozen code.
    pub fn code(self) -> u32 {
        self as u32
    }

    /// Bits of one element.
    pub fn bits(self) -> u64 {
        match self {
            Dtype::F4 => 4,
            Dtype::F6_E2M3 | Dtype::F6_E3M2 => 6,
            Dtype::BOOL
            | Dtype::U8
            | Dtype::I8
            | Dtype::F8_E4M3
            | Dtype::F8_E5M2
            | Dtype::F8_E8M0
            | Dtype::F8_E4M3FNUZ
            | Dtype::F8_E5M2FNUZ => 8,
            Dtype::U16 | Dtype::I16 | Dtype::F16 | Dtype::BF16 => 16,
            Dtype::U32 | Dtype::I32 | Dtype::F32 => 32,
            Dtype::U64 | Dtype::I64 | Dtype::F64 | Dtype::C64 => 64,
            Dtype::C128 => 128,
        }
    }

    /// Bytes to which an element is naturally aligned; 1 for elements of less than a byte.
    pub fn alignment(self) -> u64 {
        (self.bits() / 8).max(1)
    }

    /// The safetensors name; `C128`, which safetensors lacks, has the name it would have there.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::BOOL => "BOOL",
            Dtype::U8 => "U8",
            Dtype::I8 => "I8",
            Dtype::U16 => "U16",
            Dtype::I16 => "I16",
            Dtype::U32 => "U32",
            Dtype::I32 => "I32",
            Dtype::U64 => "U64",
            Dtype::I64 => "I64",
            Dtype::F16 => "F16",
            Dtype::BF16 => "BF16",
            Dtype::F32 => "F32",
            Dtype::F64 => "F64",
            Dtype::C64 => "C64",
            Dtype::C128 => "C128",
            Dtype::F8_E4M3 => "F8_E4M3",
            Dtype::F8_E5M2 => "F8_E5M2",
            Dtype::F8_E8M0 => "F8_E8M0",
            Dtype::F8_E4M3FNUZ => "F8_E4M3FNUZ",
            Dtype::F8_E5M2FNUZ => "F8_E5M2FNUZ",
            Dtype::F6_E2M3 => "F6_E2M3",
            Dtype::F6_E3M2 => "F6_E3M2",
            Dtype::F4 => "F4",
        }
    }

    /// The element type called `name` by [`name`](Dtype::name).
    pub fn from_name(name: &str) -> Option<Dtype> {
        Dtype::ALL.into_iter().find(|dtype| dtype.name() == name)
    }

    /// The type under which safetensors stores this one: itself, or F64 for each half of a C128.
    pub(crate) fn stored(self) -> StoredDtype {
        match self {
            Dtype::BOOL => StoredDtype::BOOL,
            Dtype::U8 => StoredDtype::U8,
            Dtype::I8 => StoredDtype::I8,
            Dtype::U16 => StoredDtype::U16,
            Dtype::I16 => StoredDtype::I16,
            Dtype::U32 => StoredDtype::U32,
            Dtype::I32 => StoredDtype::I32,
            Dtype::U64 => StoredDtype::U64,
            Dtype::I64 => StoredDtype::I64,
            Dtype::F16 => StoredDtype::F16,
            Dtype::BF16 => StoredDtype::BF16,
            Dtype::F32 => StoredDtype::F32,
            Dtype::F64 | Dtype::C128 => StoredDtype::F64,
            Dtype::C64 => StoredDtype::C64,
            Dtype::F8_E4M3 => StoredDtype::F8_E4M3,
            Dtype::F8_E5M2 => StoredDtype::F8_E5M2,
            Dtype::F8_E8M0 => StoredDtype::F8_E8M0,
            Dtype::F8_E4M3FNUZ => StoredDtype::F8_E4M3FNUZ,
            Dtype::F8_E5M2FNUZ => StoredDtype::F8_E5M2FNUZ,
            Dtype::F6_E2M3 => StoredDtype::F6_E2M3,
            Dtype::F6_E3M2 => StoredDtype::F6_E3M2,
            Dtype::F4 => StoredDtype::F4,
        }
    }

    /// The element type of a stored tensor; `None` for one that a later safetensors added.
    pub(crate) fn from_stored(stored: StoredDtype) -> Option<Dtype> {
        Dtype::ALL.into_iter().find(|dtype| *dtype != Dtype::C128 && dtype.stored() == stored)
    }

    /// Bytes of a tensor of this type and shape.
    ///
    /// # Errors
    ///
    /// What is wrong: the count overflows (also on the way to a zero, as in every safetensors reader), or
    /// elements of less than a byte do not fill whole bytes.
    pub(crate) fn tensor_bytes(self, shape: &[u64]) -> Result<u64, String> {
        let bits = shape
            .iter()
            .try_fold(1u64, |count, &dimension| count.checked_mul(dimension))
            .and_then(|count| count.checked_mul(self.bits()))
            .ok_or_else(|| format!("the size of shape {shape:?} of {} overflows", self.name()))?;
        if bits % 8 != 0 {
            return Err(format!("shape {shape:?} of {} does not fill whole bytes", self.name()));
        }
        Ok(bits / 8)
    }
}

impl TryFrom<u32> for Dtype {
    type Error = Error;

    fn try_from(code: u32) -> Result<Dtype> {
        Dtype::ALL.into_iter().find(|dtype| dtype.code() == code).ok_or_else(|| {
            Error::new(
                ErrorKind::InvalidArgument,
                "read dtype",
                format!("expected a dtype code from 1 to {}, found {code}", Dtype::ALL.len()),
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_names_and_sizes_agree_with_safetensors() {
        for (index, dtype) in Dtype::ALL.into_iter().enumerate() {
            assert_eq!(dtype.code() as usize, index + 1);
            assert_eq!(Dtype::try_from(dtype.code()).unwrap(), dtype);
            assert_eq!(Dtype::from_name(dtype.name()), Some(dtype));
            if dtype != Dtype::C128 {
                assert_eq!(dtype.name(), dtype.stored().to_string());
                assert_eq!(dtype.bits(), dtype.stored().bitsize() as u64);
                assert_eq!(Dtype::from_stored(dtype.stored()), Some(dtype));
            }
        }
        for code in [0, 24, u32::MAX] {
            assert!(Dtype::try_from(code).is_err());
        }
    }

    #[test]
    fn sizes_are_checked() {
        assert_eq!(Dtype::F32.tensor_bytes(&[]), Ok(4));
        assert_eq!(Dtype::F32.tensor_bytes(&[3, 0, 5]), Ok(0));
        assert_eq!(Dtype::F4.tensor_bytes(&[3, 2]), Ok(3));
        assert_eq!(Dtype::F6_E3M2.tensor_bytes(&[4]), Ok(3));
        assert_eq!(Dtype::C128.tensor_bytes(&[2]), Ok(32));
        assert!(Dtype::F4.tensor_bytes(&[]).is_err());
        assert!(Dtype::F6_E2M3.tensor_bytes(&[3]).is_err());
        assert!(Dtype::U8.tensor_bytes(&[u64::MAX, 2]).is_err());
        assert!(Dtype::F64.tensor_bytes(&[1 << 61]).is_err());
    }
}
