//! Chunks are hashed on the GPU as the engine hashes them. The stand-in runs the kernel's own source.

use std::sync::Arc;

use pccheck::cuda::{Device, DeviceBuffer, Hasher, Stream};
use pccheck::persist::ChunkHasher;
use pccheck::{ErrorKind, Result};

use super::bed::until;
use super::standin::{self, Standin};

const HASH_BYTES: u64 = 16;
/// Of memory around what is hashed, and around hashes.
const AROUND: u64 = 64;
const GUARD: u8 = 0xa5;

fn random(mut seed: u64, bytes: u64) -> Vec<u8> {
    let word = |_| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes()
    };
    (0..bytes / 8).flat_map(word).collect()
}

/// Chunks in a GPU's memory, and a place for their hashes.
struct Bed<'a> {
    standin: &'a Standin,
    stream: Stream,
    chunks: DeviceBuffer,
    hashes: DeviceBuffer,
    chunk_bytes: u64,
    count: u64,
}

impl<'a> Bed<'a> {
    fn new(standin: &'a Standin, device: &Arc<Device>, chunk_bytes: u64, count: u64) -> Bed<'a> {
        let buffer = |bytes: u64| {
            let buffer = DeviceBuffer::new(device, bytes + 2 * AROUND).expect("memory");
            standin.write(buffer.address(), &vec![GUARD; buffer.len() as usize]);
            buffer
        };
        let stream = Stream::new(device).expect("stream");
        let (chunks, hashes) = (buffer(chunk_bytes * count), buffer(HASH_BYTES * count));
        Bed { standin, stream, chunks, hashes, chunk_bytes, count }
    }

    fn base(&self) -> u64 {
        self.chunks.address() + AROUND
    }

    fn out(&self) -> u64 {
        self.hashes.address() + AROUND
    }

    fn fill(&self, seed: u64) -> Vec<u8> {
        let bytes = random(seed, self.chunk_bytes * self.count);
        self.standin.write(self.base(), &bytes);
        bytes
    }

    fn hash(&self, hasher: &Hasher) -> Result<()> {
        // SAFETY: both are this bed's, which waits for the stream before it lets them go.
        unsafe { hasher.hash(&self.stream, self.base(), self.chunk_bytes, self.count, self.out()) }
    }

    fn settle(&self) {
        until("hashed", || self.stream.idle().expect("no failure"));
    }

    /// What stands there now. Around it nothing has been written.
    fn found(&self) -> Vec<u128> {
        let all = self.standin.bytes(self.hashes.address(), self.hashes.len() as usize);
        let (before, rest) = all.split_at(AROUND as usize);
        let (hashes, behind) = rest.split_at((HASH_BYTES * self.count) as usize);
        assert!(before.iter().chain(behind).all(|&byte| byte == GUARD), "written beside the hashes");
        hashes.as_chunks::<16>().0.iter().map(|hash| u128::from_le_bytes(*hash)).collect()
    }

    fn right(&self, bytes: &[u8]) -> Vec<u128> {
        let hash = |chunk: &[u8]| {
            let mut hasher = ChunkHasher::new();
            hasher.update(chunk);
            hasher.finish()
        };
        bytes.chunks_exact(self.chunk_bytes as usize).map(hash).collect()
    }
}

fn hasher(device: &Arc<Device>) -> Hasher {
    Hasher::new(device).expect("loaded")
}

#[test]
fn hashes_are_those_of_the_engine() {
    let standin = Standin::take();
    {
        let device = Device::open(1).expect("device");
        let hasher = hasher(&device);
        // Also a tile's worth, one less, one more; and several tiles with a rest.
        let sizes = [4096, 8192, 12_288, 61_440, 65_536, 69_632, 131_072, 200_704, 1 << 20, (1 << 20) + 4096];
        for (at, chunk_bytes) in sizes.into_iter().enumerate() {
            for count in [1, 2, 5] {
                let bed = Bed::new(&standin, &device, chunk_bytes, count);
                let bytes = bed.fill(1 + at as u64);
                bed.hash(&hasher).expect("enqueued");
                bed.settle();
                assert_eq!(bed.found(), bed.right(&bytes), "{count} chunks of {chunk_bytes} bytes");
            }
        }
        // More than other dimensions of a grid than the first can have.
        let bed = Bed::new(&standin, &device, 4096, 70_000);
        let bytes = bed.fill(99);
        bed.hash(&hasher).expect("enqueued");
        bed.settle();
        assert!(bed.found() == bed.right(&bytes), "many chunks");
    }
    standin.assert_clean("hashes");
}

#[test]
fn every_byte_counts() {
    let standin = Standin::take();
    let device = Device::open(0).expect("device");
    let hasher = hasher(&device);
    let bed = Bed::new(&standin, &device, 8192, 1);
    let mut bytes = bed.fill(7);
    for at in (0..bytes.len()).step_by(61).chain([0, 8191]) {
        bytes[at] ^= 1;
        standin.write(bed.base(), &bytes);
        bed.hash(&hasher).expect("enqueued");
        bed.settle();
        assert_eq!(bed.found(), bed.right(&bytes), "byte {at}");
    }
}

#[test]
fn hashes_come_in_the_order_of_the_stream() {
    let standin = Standin::take();
    let device = Device::open(0).expect("device");
    let hasher = hasher(&device);
    let bed = Bed::new(&standin, &device, 12_288, 3);
    let first = bed.fill(1);
    standin.hold(true);
    bed.hash(&hasher).expect("enqueued");
    // What is there when the stream comes to it is what is hashed.
    let second = bed.fill(2);
    assert!(!bed.stream.idle().expect("no failure"));
    assert_eq!(bed.found(), [u128::from_le_bytes([GUARD; 16]); 3]);
    standin.hold(false);
    bed.settle();
    assert_eq!(bed.found(), bed.right(&second));
    assert_ne!(bed.found(), bed.right(&first));
}

/// Loading may wait for what runs. Launching must not: it happens while streams wait for what comes of it.
#[test]
fn a_launch_waits_for_nothing_and_loads_nothing() {
    let standin = Standin::take();
    let device = Device::open(0).expect("device");
    let hasher = hasher(&device);
    let loads = ["cuModuleLoadData", "cuModuleGetFunction"];
    let before = loads.map(|call| standin.calls(call));
    let bed = Bed::new(&standin, &device, 4096, 2);
    let bytes = bed.fill(3);
    standin.allocations_wait(true);
    standin.hold(true);
    bed.hash(&hasher).expect("enqueued");
    bed.hash(&hasher).expect("enqueued again");
    standin.hold(false);
    bed.settle();
    assert_eq!(bed.found(), bed.right(&bytes));
    assert_eq!(loads.map(|call| standin.calls(call)), before);
    assert_eq!(standin.calls("cuLaunchKernel"), 2);
}

#[test]
fn what_cannot_be_hashed_is_refused_before_anything_is_enqueued() {
    let standin = Standin::take();
    let (device, other) = (Device::open(0).expect("device"), Device::open(1).expect("device"));
    let hasher = hasher(&device);
    let bed = Bed::new(&standin, &device, 4096, 1);
    let elsewhere = Stream::new(&other).expect("stream");
    let (base, out) = (bed.base(), bed.out());
    let (invalid, large) = (ErrorKind::InvalidArgument, ErrorKind::TooLarge);
    let refused = [
        (&bed.stream, base, 0, 1, out, invalid),
        (&bed.stream, base, 1024, 1, out, invalid),
        (&bed.stream, base, 4095, 1, out, invalid),
        (&bed.stream, base + 8, 4096, 1, out, invalid),
        (&bed.stream, base, 4096, 1, out + 8, invalid),
        (&bed.stream, 0, 4096, 1, out, invalid),
        (&bed.stream, base, 4096, 1, 0, invalid),
        (&elsewhere, base, 4096, 1, out, invalid),
        (&bed.stream, base, 4096, 1 << 31, out, large),
        (&bed.stream, base, 1 << 50, 1 << 20, out, large),
        (&bed.stream, base, u64::MAX - 4095, 1, out, large),
        (&bed.stream, base, 4096, 1, u64::MAX - 15, large),
    ];
    for (at, (stream, base, chunk_bytes, count, out, kind)) in refused.into_iter().enumerate() {
        // SAFETY: nothing is read or written.
        let error = unsafe { hasher.hash(stream, base, chunk_bytes, count, out) }.expect_err("refused");
        assert_eq!(error.kind(), kind, "{at}: {error}");
    }
    // SAFETY: as above.
    unsafe { hasher.hash(&bed.stream, base, 4096, 0, out) }.expect("nothing to do");
    assert_eq!(standin.calls("cuLaunchKernel"), 0);
}

#[test]
fn code_that_cannot_be_loaded_is_an_error_that_says_why() {
    let standin = Standin::take();
    {
        let device = Device::open(0).expect("device");
        let codes = [
            (2, ErrorKind::OutOfMemory, "OUT_OF_MEMORY"),
            (209, ErrorKind::Unsupported, "Turing"),
            (218, ErrorKind::Device, "INVALID_PTX"),
            (221, ErrorKind::Unsupported, "ptxjitcompiler"),
            (222, ErrorKind::Unsupported, "driver of CUDA 12.0"),
            (223, ErrorKind::Unsupported, "CUDA_DISABLE_PTX_JIT"),
            (719, ErrorKind::Device, "LAUNCH_FAILED"),
        ];
        for call in ["cuModuleLoadData", "cuModuleGetFunction"] {
            for (code, kind, words) in codes {
                standin.fail(call, 1, code, false);
                let error = Hasher::new(&device).err().expect("refused");
                assert_eq!(error.kind(), kind, "{call}: {error}");
                assert!(error.to_string().contains(words), "{call}: {error}");
            }
        }
        assert_eq!(standin.calls("cuModuleUnload"), codes.len() as u64);
        drop(hasher(&device));
    }
    standin.assert_clean("failed loads");
}

#[test]
fn launches_and_kernels_that_fail_are_errors() {
    let standin = Standin::take();
    {
        let device = Device::open(0).expect("device");
        let hasher = hasher(&device);
        let bed = Bed::new(&standin, &device, 4096, 2);
        let bytes = bed.fill(5);
        standin.fail("cuLaunchKernel", 1, 719, false);
        let error = bed.hash(&hasher).expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Device, "{error}");
        assert!(error.to_string().contains("LAUNCH_FAILED"), "{error}");
        standin.fail_work(1, 700);
        bed.hash(&hasher).expect("enqueued");
        until("the kernel has failed", || bed.stream.idle().is_err());
        let error = bed.stream.idle().expect_err("failed");
        assert_eq!(error.kind(), ErrorKind::Device, "{error}");
        standin.reset();
        bed.hash(&hasher).expect("enqueued");
        bed.settle();
        assert_eq!(bed.found(), bed.right(&bytes));
    }
    standin.assert_clean("failed launches");
}

/// Runs with either stand-in.
#[test]
fn a_driver_that_lacks_the_calls_is_not_supported() {
    let _standin = Standin::take();
    let device = Device::open(0).expect("device");
    let kind = Hasher::new(&device).err().map(|error| error.kind());
    let lacks = std::env::var_os(standin::LACKING).is_some();
    assert_eq!(kind, lacks.then_some(ErrorKind::Unsupported));
}
