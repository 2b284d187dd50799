//! Structs that grow by versions: a library and a program of different versions tell which fields the other knows.
#![expect(unsafe_code, reason = "the structs are read from and written to foreign memory")]

use super::{Caller, Outcome};
use crate::error::{Error, ErrorKind};

/// Largest `struct_bytes` that is believed: beyond it the field was not initialised.
pub(in crate::capi) const MAX_STRUCT_BYTES: u64 = 4096;
/// Unit of `struct_bytes`, and alignment of every struct.
const STRUCT_ALIGN_BYTES: u64 = 8;

/// A struct that grows by versions. Its first field is `struct_bytes`.
///
/// # Safety
///
/// `repr(C)`, aligned to 8, its size a multiple of 8, no padding, nothing but integers and pointers and
/// arrays of them, so that any bytes are a value; the first field is a `u64`.
pub(in crate::capi) unsafe trait Versioned: Copy {
    /// What an initialised struct holds, `struct_bytes` included.
    fn initial() -> Self;
    const NAME: &'static str;
}

/// Makes structs of the header [`Versioned`]: name, size in bytes, and the fields whose initial value is not zero.
macro_rules! versioned {
    ($type:ident, $bytes:literal, {$($field:ident: $value:expr),* $(,)?}) => {
        const _: () = assert!(size_of::<$type>() == $bytes && align_of::<$type>() == 8 && $bytes % 8 == 0);

        // SAFETY: `repr(C)` and made of integers, pointers and byte arrays; the size is asserted above, and the test
        // of the header adds up the fields; the first is `struct_bytes`.
        unsafe impl $crate::capi::guard::Versioned for $type {
            const NAME: &'static str = stringify!($type);

            fn initial() -> Self {
                // SAFETY: zero is a value of every integer and pointer.
                let zero: Self = unsafe { core::mem::zeroed() };
                Self { struct_bytes: $bytes, $($field: $value,)* ..zero }
            }
        }
    };
}
pub(in crate::capi) use versioned;

impl Caller {
    /// Initialises a struct of which the caller knows `struct_bytes` bytes.
    pub fn init<T: Versioned>(&self, out: *mut T, struct_bytes: u64) -> Outcome<()> {
        self.check(T::NAME, out)?;
        self.check_struct_bytes(T::NAME, struct_bytes)?;
        self.put(out, T::initial(), struct_bytes);
        Ok(())
    }

    /// Reads a struct of any version; NULL gives the defaults.
    pub fn options<T: Versioned>(&self, options: *const T) -> Outcome<T> {
        if options.is_null() {
            return Ok(T::initial());
        }
        self.check(T::NAME, options)?;
        // SAFETY: not NULL, aligned; every version begins with `struct_bytes`.
        let struct_bytes = unsafe { *options.cast::<u64>() };
        self.check_struct_bytes(T::NAME, struct_bytes)?;
        self.get(T::NAME, options, struct_bytes)
    }

    /// Reads an array of structs of any version; all have the same `struct_bytes`, which is also their distance.
    pub fn options_array<T: Versioned>(&self, what: &str, array: *const T, count: u64) -> Outcome<Vec<T>> {
        if count == 0 {
            return Ok(Vec::new());
        }
        self.check(what, array)?;
        // SAFETY: not NULL, aligned; every version begins with `struct_bytes`.
        let struct_bytes = unsafe { *array.cast::<u64>() };
        self.check_struct_bytes(what, struct_bytes)?;
        let total = count.saturating_mul(struct_bytes);
        self.check_span(what, array as usize, total)?;
        (0..count as usize)
            .map(|index| {
                // SAFETY: within the array, whose span was checked.
                let element: *const T = unsafe { array.byte_add(index * struct_bytes as usize) };
                // SAFETY: aligned, since `struct_bytes` is a multiple of 8; begins with `struct_bytes`.
                let its_bytes = unsafe { *element.cast::<u64>() };
                if its_bytes != struct_bytes {
                    let message =
                        format!("{what}[{index}].struct_bytes is {its_bytes}, [0] has {struct_bytes}");
                    return Err(self.invalid(message));
                }
                self.get(what, element, struct_bytes)
            })
            .collect()
    }

    /// Fills a struct whose `struct_bytes` its caller has set.
    pub fn fill<T: Versioned>(&self, out: *mut T, value: T) -> Outcome<()> {
        let struct_bytes = self.out_struct_bytes(out)?;
        self.put(out, value, struct_bytes);
        Ok(())
    }

    /// [`Caller::fill`], where NULL means that the caller does not want it.
    pub fn fill_optional<T: Versioned>(&self, out: *mut T, value: T) -> Outcome<()> {
        match out.is_null() {
            true => Ok(()),
            false => self.fill(out, value),
        }
    }

    /// Checks a struct that will be filled after the work is done: before it, so that a bad one costs nothing.
    pub fn check_fillable<T: Versioned>(&self, out: *mut T) -> Outcome<()> {
        match out.is_null() {
            true => Ok(()),
            false => self.out_struct_bytes(out).map(|_| ()),
        }
    }

    /// Fills elements of an array that are `struct_bytes` apart.
    pub fn fill_array<T: Versioned>(
        &self,
        array: *mut T,
        struct_bytes: u64,
        capacity: u64,
        values: impl Iterator<Item = T>,
    ) -> Outcome<()> {
        if capacity == 0 {
            return Ok(());
        }
        self.check(T::NAME, array)?;
        self.check_struct_bytes(T::NAME, struct_bytes)?;
        let total = capacity.saturating_mul(struct_bytes);
        self.check_span(T::NAME, array as usize, total)?;
        for (index, value) in values.take(capacity as usize).enumerate() {
            // SAFETY: within the array, whose span was checked.
            let element: *mut T = unsafe { array.byte_add(index * struct_bytes as usize) };
            self.put(element, value, struct_bytes);
        }
        Ok(())
    }

    fn out_struct_bytes<T: Versioned>(&self, out: *mut T) -> Outcome<u64> {
        self.check(T::NAME, out)?;
        // SAFETY: not NULL, aligned; by the promise its `struct_bytes` was set.
        let struct_bytes = unsafe { *out.cast::<u64>() };
        self.check_struct_bytes(T::NAME, struct_bytes)?;
        Ok(struct_bytes)
    }

    fn check_struct_bytes(&self, what: &str, struct_bytes: u64) -> Outcome<()> {
        let known = (STRUCT_ALIGN_BYTES..=MAX_STRUCT_BYTES).contains(&struct_bytes);
        if known && struct_bytes.is_multiple_of(STRUCT_ALIGN_BYTES) {
            return Ok(());
        }
        Err(self.invalid(format!(
            "{what}: struct_bytes is {struct_bytes}, expected the size of the struct, a multiple of 8 up to \
             {MAX_STRUCT_BYTES}"
        )))
    }

    /// Known fields from the caller, the rest by default; what is unknown here must be zero.
    fn get<T: Versioned>(&self, what: &str, from: *const T, struct_bytes: u64) -> Outcome<T> {
        let known = size_of::<T>().min(struct_bytes as usize);
        let mut value = T::initial();
        // SAFETY: by the promise `struct_bytes` bytes are readable; any bytes are a value of T.
        unsafe { core::ptr::copy_nonoverlapping(from.cast::<u8>(), (&raw mut value).cast::<u8>(), known) };
        // SAFETY: within the struct.
        let tail: *const u8 = unsafe { from.cast::<u8>().add(known) };
        // SAFETY: the rest of the `struct_bytes` readable bytes.
        let tail = unsafe { core::slice::from_raw_parts(tail, struct_bytes as usize - known) };
        match tail.iter().position(|&byte| byte != 0) {
            None => Ok(value),
            Some(at) => Err(Error::new(
                ErrorKind::Unsupported,
                self.op,
                format!(
                    "{what}: byte {} of the struct asks for something newer than this library",
                    known + at
                ),
            )
            .into()),
        }
    }

    /// Known fields to the caller, zeros beyond; `struct_bytes` stays the caller's.
    fn put<T: Versioned>(&self, to: *mut T, value: T, struct_bytes: u64) {
        let known = size_of::<T>().min(struct_bytes as usize);
        let to = to.cast::<u8>();
        // SAFETY: by the promise `struct_bytes` bytes are writable.
        unsafe { core::ptr::write_bytes(to, 0, struct_bytes as usize) };
        // SAFETY: as above; `value` is a local of at least `known` bytes, without padding.
        unsafe { core::ptr::copy_nonoverlapping((&raw const value).cast::<u8>(), to, known) };
        // SAFETY: aligned to 8 as every struct; the first field.
        unsafe { to.cast::<u64>().write(struct_bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capi::status::PCC_INVALID_ARGUMENT;

    #[derive(Clone, Copy, PartialEq, Debug)]
    #[repr(C)]
    struct Grown {
        struct_bytes: u64,
        a: u64,
        b: u64,
    }

    // SAFETY: three u64.
    unsafe impl Versioned for Grown {
        const NAME: &'static str = "grown";
        fn initial() -> Self {
            Grown { struct_bytes: 24, a: 1, b: 2 }
        }
    }

    fn read(bytes: &[u64]) -> Outcome<Grown> {
        Caller { op: "test" }.options(bytes.as_ptr().cast::<Grown>())
    }

    #[test]
    fn structs_of_other_versions_are_read_with_care() {
        assert_eq!(read(&[16, 7]).unwrap(), Grown { struct_bytes: 16, a: 7, b: 2 });
        assert_eq!(read(&[24, 7, 8]).unwrap(), Grown { struct_bytes: 24, a: 7, b: 8 });
        assert_eq!(read(&[32, 7, 8, 0]).unwrap().b, 8);
        let newer = read(&[32, 7, 8, 1 << 40]).unwrap_err();
        assert_eq!(newer.error.kind(), ErrorKind::Unsupported);
        assert!(newer.error.message().contains("byte 29"), "{}", newer.error);
        for size in [0, 1, 7, 17, 4104, u64::MAX] {
            assert_eq!(read(&[size, 0, 0]).unwrap_err().status, PCC_INVALID_ARGUMENT, "size {size}");
        }
    }

    #[test]
    fn structs_of_other_versions_are_filled_with_care() {
        let fill = |bytes: &mut [u64]| {
            Caller { op: "test" }.fill(bytes.as_mut_ptr().cast::<Grown>(), Grown::initial()).unwrap();
        };
        let mut small = [16, 9, 99];
        fill(&mut small);
        assert_eq!(small, [16, 1, 99]);
        let mut large = [32, 9, 9, 9, 99];
        fill(&mut large);
        assert_eq!(large, [32, 1, 2, 0, 99]);
    }
}
