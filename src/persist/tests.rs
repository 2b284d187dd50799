//! Prevents: a copy that misses, repeats or overruns bytes at some alignment or length, on some instruction path
//! that the machine of whoever changed it does not choose by itself.

use super::*;

const GUARD: u8 = 0xa5;

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 131 + i / 251) as u8 | 1).collect()
}

fn check(persister: Persister, durable: bool, source: &[u8], dst_skew: usize, src_skew: usize, len: usize) {
    let mut arena = vec![GUARD; len + dst_skew + 3 * LINE_BYTES];
    let base = arena.as_mut_ptr().align_offset(LINE_BYTES) + dst_skew;
    let src = &source[src_skew..src_skew + len];
    let dst = arena[base..base + len].as_mut_ptr();
    if durable {
        // SAFETY: two slices of `len` bytes, of different vectors.
        unsafe { persister.copy_durable(dst, src.as_ptr(), len) };
    } else {
        // SAFETY: as above.
        unsafe { persister.copy_streaming(dst, src.as_ptr(), len) };
    }
    persister.fence();
    let what = format!("{persister:?} durable {durable} dst+{dst_skew} src+{src_skew} len {len}");
    assert_eq!(&arena[base..base + len], src, "{what}");
    assert!(arena[..base].iter().all(|b| *b == GUARD), "{what}: wrote before");
    assert!(arena[base + len..].iter().all(|b| *b == GUARD), "{what}: wrote after");
}

#[test]
fn every_alignment_and_length_on_every_path() {
    let source = pattern(4096);
    for persister in Persister::available() {
        for dst_skew in 0..LINE_BYTES {
            for len in (0..200).chain([255, 256, 257, 319, 320, 321, 511, 512, 640, 1023, 1024, 1100]) {
                check(persister, true, &source, dst_skew, (dst_skew * 7 + len) % LINE_BYTES, len);
            }
        }
        for src_skew in 0..LINE_BYTES {
            for len in [1, 63, 64, 65, 255, 256, 577, 2048] {
                check(persister, false, &source, 0, src_skew, len);
                check(persister, false, &source, 13, src_skew, len);
            }
        }
    }
}

#[test]
fn large_copies_are_exact() {
    let source = pattern((1 << 20) + 64);
    for persister in Persister::available() {
        for (dst_skew, src_skew, len) in [(0, 0, 1 << 20), (5, 3, (1 << 20) - 77), (63, 1, 700_001)] {
            check(persister, true, &source, dst_skew, src_skew, len);
        }
    }
}

#[test]
fn flush_leaves_the_bytes_and_covers_any_range() {
    let data = pattern(1000);
    let copy = data.clone();
    for persister in Persister::available() {
        for start in [0, 1, 63, 64, 65, 500] {
            for len in [0, 1, 64, 65, 400] {
                // SAFETY: inside `data`.
                unsafe { persister.flush_lines(data[start..].as_ptr(), len) };
            }
        }
        persister.fence();
    }
    assert_eq!(data, copy);
}

#[test]
fn detection_takes_the_first_available_and_every_path_has_a_name() {
    let available = Persister::available();
    assert_eq!(available[0], Persister::detect());
    assert!(available.iter().all(|p| !p.name().is_empty()));
    #[cfg(all(target_arch = "x86_64", not(pcc_portable)))]
    {
        let names: Vec<_> = available.iter().map(Persister::name).collect();
        assert!(names.contains(&"sse2"), "{names:?}");
        assert_eq!(names.contains(&"avx512"), std::is_x86_feature_detected!("avx512f"));
        assert_eq!(names.contains(&"avx2"), std::is_x86_feature_detected!("avx2"));
    }
}
