//! Sizes, rates and times as people write and read them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

const BINARY: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];

/// Bytes from `4096`, `64K`, `10M`, `1.5GiB`, `2GB`; for clap.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let bad = || {
        format!("expected a size such as 4096, 64K, 10M, 1.5GiB or 2GB of at least one byte, found {text:?}")
    };
    let text_trimmed = text.trim();
    let split = text_trimmed.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text_trimmed.len());
    let (number, unit) = text_trimmed.split_at(split);
    let unit_bytes = unit_bytes(unit.trim()).ok_or_else(bad)?;
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(unit_bytes).filter(|&bytes| bytes > 0).ok_or_else(bad);
    }
    let bytes = number.parse::<f64>().map_err(|_| bad())? * unit_bytes as f64;
    match bytes.is_finite() && (1.0..u64::MAX as f64).contains(&bytes) {
        true => Ok(bytes.round() as u64),
        false => Err(bad()),
    }
}

fn unit_bytes(unit: &str) -> Option<u64> {
    let unit = unit.to_ascii_lowercase();
    let (prefix, base) = match unit.as_bytes() {
        [] | [b'b'] => return Some(1),
        [prefix] | [prefix, b'i', b'b'] => (*prefix, 1024u64),
        [prefix, b'b'] => (*prefix, 1000),
        _ => return None,
    };
    let power = 1 + "kmgt".bytes().position(|known| known == prefix)? as u32;
    Some(base.pow(power))
}

/// `1.50 GiB`; exact where it is a whole number of a unit.
pub fn size(bytes: u64) -> String {
    let mut unit = 0;
    let mut value = bytes as f64;
    while value >= 1024.0 && unit + 1 < BINARY.len() {
        value /= 1024.0;
        unit += 1;
    }
    match value.fract() == 0.0 {
        true => format!("{value:.0} {}", BINARY[unit]),
        false => format!("{value:.2} {}", BINARY[unit]),
    }
}

/// Bytes per second in powers of 1000.
pub fn rate(bytes: u64, time: Duration) -> String {
    format!("{:.2} GB/s", gb_per_s(bytes, time.as_secs_f64()))
}

/// 10^9 bytes per second; 0 where no time was measured.
pub fn gb_per_s(bytes: u64, seconds: f64) -> f64 {
    if seconds > 0.0 {
        bytes as f64 / seconds / 1e9
    } else {
        0.0
    }
}

/// `350 us`, `12.3 ms`, `4.56 s`, `2 min 5 s`, `3 h 20 min`, `5 d 1 h`.
pub fn time(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    let whole = time.as_secs();
    match seconds {
        s if s < 1e-3 => format!("{:.0} us", s * 1e6),
        s if s < 1.0 => format!("{:.1} ms", s * 1e3),
        s if s < 60.0 => format!("{s:.2} s"),
        s if s < 3600.0 => format!("{} min {} s", whole / 60, whole % 60),
        s if s < 86_400.0 => format!("{} h {} min", whole / 3600, whole / 60 % 60),
        _ => format!("{} d {} h", whole / 86_400, whole / 3600 % 24),
    }
}

/// How long ago a wall-clock time is; `in the future` where clocks disagree.
pub fn age(unix_ns: u64) -> String {
    let then = UNIX_EPOCH + Duration::from_nanos(unix_ns);
    SystemTime::now().duration_since(then).map_or_else(|_| "in the future".to_string(), time)
}

/// `2025-03-31 14:05:09 UTC`.
pub fn utc(unix_ns: u64) -> String {
    let seconds = unix_ns / 1_000_000_000;
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Days since 0000-03-01, so that leap days end the year; 400 years have 146,097 days.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02} UTC", rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_written() {
        let good = [
            ("4096", 4096),
            ("64K", 65_536),
            ("10M", 10 << 20),
            ("1.5GiB", 3 << 29),
            ("2GB", 2_000_000_000),
            ("1 kib", 1024),
            ("0.5k", 512),
            ("7b", 7),
        ];
        for (text, bytes) in good {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "M", "-1", "0", "1X", "1.2.3M", "99999999T", "1e3", "0.1", "1kb2", "nan"] {
            assert!(parse_size(text).is_err(), "{text} was taken");
        }
        assert_eq!([0, 1023, 1024, 3 << 29].map(size), ["0 B", "1023 B", "1 KiB", "1.50 GiB"]);
    }

    #[test]
    fn times_are_written_for_people() {
        let written = [0.000_35, 0.0123, 4.56, 125.0, 12_000.0, 435_600.0]
            .map(|seconds| time(Duration::from_secs_f64(seconds)));
        assert_eq!(written, ["350 us", "12.3 ms", "4.56 s", "2 min 5 s", "3 h 20 min", "5 d 1 h"]);
        assert_eq!(utc(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(utc(951_827_696_000_000_000), "2000-02-29 12:34:56 UTC");
        assert_eq!(utc(1_735_689_599_999_999_999), "2024-12-31 23:59:59 UTC");
    }
}
