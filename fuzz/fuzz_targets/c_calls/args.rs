//! Arguments as a wrong C program may pass them: within what the header says of memory, anything; each in memory of exactly
//! its size, so that the address sanitizer sees every byte beyond.

use std::ffi::{c_char, CString};
use std::ptr::null;

use arbitrary::Arbitrary;
use pccheck::capi::options::{pcc_pair, pcc_read, pcc_tensor};

/// Memory that is this much or less is really there; what is larger is refused before it is touched.
const THERE_BYTES: u64 = 4 << 20;

/// `struct_bytes` of a struct.
#[derive(Arbitrary, Debug, Clone, Copy)]
pub enum Size {
    Exact,
    /// So many words of it.
    Older(u8),
    /// So many words more, zero or not.
    Newer(u8, bool),
    Zero,
    Odd(u8),
    Huge(u64),
}

/// A struct of `T` with a size of its own, in memory of that size.
pub struct Placed(Vec<u64>);

impl Placed {
    pub fn ptr<T>(&mut self) -> *mut T {
        self.0.as_mut_ptr().cast()
    }
}

impl Size {
    fn bytes<T>(self) -> u64 {
        let exact = size_of::<T>() as u64;
        match self {
            Size::Exact => exact,
            Size::Older(words) => (u64::from(words) * 8 % exact).max(8),
            Size::Newer(words, _) => exact + u64::from(words % 32) * 8,
            Size::Zero => 0,
            Size::Odd(bytes) => u64::from(bytes) | 1,
            // Larger than any that is believed.
            Size::Huge(bytes) => bytes.max(4097),
        }
    }

    /// The words of `values`, one after the other as C has them.
    pub fn place<T: Copy>(self, values: &[T]) -> Placed {
        let bytes = self.bytes::<T>();
        let known = bytes.is_multiple_of(8) && (8..=4096).contains(&bytes);
        // Of an impossible struct only its first field is looked at.
        let stride = if known { bytes as usize } else { size_of::<T>().next_multiple_of(8) };
        let mut words = vec![0u64; stride / 8 * values.len()];
        for (value, place) in values.iter().zip(words.chunks_exact_mut(stride / 8)) {
            let len = size_of::<T>().min(stride);
            // SAFETY: `T` is a struct of the header, without padding; `place` has room for `len` bytes.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    (value as *const T).cast::<u8>(),
                    place.as_mut_ptr().cast(),
                    len,
                )
            };
            if let Size::Newer(_, true) = self {
                place[size_of::<T>() / 8..].fill(1);
            }
            place[0] = bytes;
        }
        Placed(words)
    }

    pub fn is_exact(self) -> bool {
        matches!(self, Size::Exact)
    }
}

/// A wait in milliseconds.
#[derive(Arbitrary, Debug, Clone, Copy)]
pub enum Wait {
    Look,
    Short(u8),
    ForEver(i64),
}

impl Wait {
    /// `ends`: what is waited for ends by itself, so that a wait for ever must, too.
    pub fn ms(self, ends: bool) -> i64 {
        match self {
            Wait::Look => 0,
            Wait::Short(ms) => i64::from(ms % 16) + 1,
            Wait::ForEver(ms) if ends => ms | i64::MIN,
            Wait::ForEver(_) => 2,
        }
    }
}

#[derive(Arbitrary, Debug, Clone)]
pub enum Text {
    Numbered(u8),
    Layer(u8),
    Weight,
    Bias,
    Null,
    Empty,
    NotUtf8,
    Long(u16),
    Reserved(u8),
    Free(Vec<u8>),
}

impl Text {
    /// None is NULL.
    pub fn c(&self) -> Option<CString> {
        let bytes = match self {
            Text::Numbered(number) => format!("t{}", number % 4).into_bytes(),
            Text::Layer(number) => format!("läyer.{}", number % 4).into_bytes(),
            Text::Weight => b"weight".to_vec(),
            Text::Bias => b"bias".to_vec(),
            Text::Null => return None,
            Text::Empty => Vec::new(),
            Text::NotUtf8 => b"a\xff".to_vec(),
            Text::Long(len) => vec![b'x'; usize::from(*len) % 5000],
            Text::Reserved(which) => {
                let reserved = ["__metadata__", "__pccheck_metadata__", "pccheck.raw", "pccheck.tied", "raw"];
                reserved[usize::from(*which) % reserved.len()].into()
            }
            Text::Free(bytes) => bytes.iter().copied().filter(|&byte| byte != 0).collect(),
        };
        Some(CString::new(bytes).expect("no NUL"))
    }
}

pub fn ptr_of(text: &Option<CString>) -> *const c_char {
    text.as_ref().map_or(null(), |text| text.as_ptr())
}

#[derive(Arbitrary, Debug, Clone, Copy)]
pub enum Amount {
    Small(u8),
    Some(u16),
    Large(u32),
    Power(u8, i8),
    Any(u64),
}

impl Amount {
    pub fn value(self) -> u64 {
        match self {
            Amount::Small(value) => value.into(),
            Amount::Some(value) => value.into(),
            Amount::Large(value) => u64::from(value) % (8 << 20),
            Amount::Power(shift, more) => (1u64 << (shift % 64)).wrapping_add_signed(more.into()),
            Amount::Any(value) => value,
        }
    }
}

/// One tensor.
#[derive(Arbitrary, Debug, Clone)]
pub struct Tensor {
    name: Text,
    dtype: u8,
    shape: Vec<Amount>,
    /// Mostly nothing.
    oddity: u8,
    odd: Odd,
    tied: bool,
}

impl Tensor {
    fn odd(&self) -> Option<Odd> {
        (self.oddity > 200).then_some(self.odd)
    }
}

/// What is wrong with it.
#[derive(Arbitrary, Debug, Clone, Copy)]
enum Odd {
    Rank(u32),
    NoShape,
    Dtype(u32),
    Bytes(Amount),
    NoData,
    Device(u32, u32),
    Misaligned,
}

/// Tensors in the form of the header, and the memory that they point to.
pub struct Tensors {
    pub placed: Placed,
    pub count: u64,
    pub names: Vec<Option<CString>>,
    pub data: Vec<Vec<u8>>,
    _shapes: Vec<Vec<u64>>,
}

/// `seed` tells apart what the tensors hold.
pub fn tensors(list: &[Tensor], size: Size, seed: u8) -> Tensors {
    let list = &list[..list.len().min(6)];
    let names: Vec<Option<CString>> = list.iter().map(|tensor| tensor.name.c()).collect();
    let shapes: Vec<Vec<u64>> = list
        .iter()
        .map(|tensor| tensor.shape.iter().take(65).map(|dimension| dimension.value()).collect())
        .collect();
    let mut data: Vec<Vec<u8>> = Vec::new();
    let mut values: Vec<pcc_tensor> = Vec::new();
    for ((tensor, name), shape) in list.iter().zip(&names).zip(&shapes) {
        let dtype = u32::from(tensor.dtype) % 23 + 1;
        let bits = shape
            .iter()
            .try_fold(u64::from(pccheck::capi::dtype::pcc_dtype_bits(dtype)), |bits, &dimension| {
                bits.checked_mul(dimension)
            });
        let mut value = pcc_tensor {
            struct_bytes: 0,
            name: ptr_of(name),
            shape: shape.as_ptr(),
            data: std::ptr::null_mut(),
            bytes: bits.unwrap_or(u64::MAX) / 8,
            dtype,
            rank: shape.len() as u32,
            device: 0,
            device_index: 0,
        };
        match tensor.odd() {
            // Beyond the limit, or no more than are there.
            Some(Odd::Rank(rank)) => value.rank = if rank > 64 { rank } else { rank.min(shape.len() as u32) },
            Some(Odd::NoShape) => value.shape = null(),
            Some(Odd::Dtype(dtype)) => value.dtype = dtype,
            Some(Odd::Bytes(amount)) => value.bytes = amount.value(),
            Some(Odd::Device(device, index)) => (value.device, value.device_index) = (device, index),
            Some(Odd::Misaligned) => value.shape = value.shape.wrapping_byte_add(4),
            Some(Odd::NoData) | None => {}
        }
        let there = if value.bytes <= THERE_BYTES { value.bytes as usize } else { 1 };
        let fill = |at: usize| (at as u8).wrapping_mul(31).wrapping_add(seed) ^ (at >> 8) as u8;
        let mut memory: Vec<u8> = (0..there).map(fill).collect();
        let tied = values.iter().find(|other| tensor.tied && other.bytes == value.bytes);
        value.data = match (tied, tensor.odd()) {
            (_, Some(Odd::NoData)) => std::ptr::null_mut(),
            (Some(other), _) => other.data,
            (None, _) => memory.as_mut_ptr().cast(),
        };
        data.push(memory);
        values.push(value);
    }
    Tensors { placed: size.place(&values), count: values.len() as u64, names, data, _shapes: shapes }
}

/// Entries of metadata.
pub struct Pairs {
    pub pairs: Vec<pcc_pair>,
    _texts: Vec<Option<CString>>,
}

pub fn pairs(list: &[(Text, Text)]) -> Pairs {
    let texts: Vec<Option<CString>> =
        list.iter().take(4).flat_map(|(key, value)| [key.c(), value.c()]).collect();
    let pair = |pair: &[Option<CString>]| pcc_pair { key: ptr_of(&pair[0]), value: ptr_of(&pair[1]) };
    Pairs { pairs: texts.chunks_exact(2).map(pair).collect(), _texts: texts }
}

/// One piece to read.
#[derive(Arbitrary, Debug, Clone)]
pub struct Read {
    name: Option<Text>,
    index: Amount,
    offset: Amount,
    bytes: Amount,
    device: u8,
    overlaps: bool,
    no_memory: bool,
}

pub struct Reads {
    pub placed: Placed,
    pub count: u64,
    _names: Vec<Option<CString>>,
    _memory: Vec<Vec<u8>>,
}

pub fn reads(list: &[Read], size: Size) -> Reads {
    let list = &list[..list.len().min(4)];
    let names: Vec<Option<CString>> = list.iter().map(|read| read.name.as_ref().and_then(Text::c)).collect();
    let mut memory: Vec<Vec<u8>> = Vec::new();
    let mut values: Vec<pcc_read> = Vec::new();
    for (read, name) in list.iter().zip(&names) {
        let bytes = read.bytes.value();
        let mut there = vec![0; if bytes <= THERE_BYTES { bytes as usize } else { 1 }];
        let before =
            values.last().filter(|before| read.overlaps && before.bytes >= bytes).map(|before| before.dst);
        values.push(pcc_read {
            struct_bytes: 0,
            name: ptr_of(name),
            index: read.index.value(),
            offset: read.offset.value(),
            bytes,
            dst: if read.no_memory {
                std::ptr::null_mut()
            } else {
                before.unwrap_or(there.as_mut_ptr().cast())
            },
            device: (read.device / 64).into(),
            device_index: (read.device % 64 / 63).into(),
        });
        memory.push(there);
    }
    Reads { placed: size.place(&values), count: values.len() as u64, _names: names, _memory: memory }
}
