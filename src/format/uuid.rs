//! The identity of a region.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, ErrorKind, Result};

/// 16 random bytes chosen when a region is formatted. Every structure of the region repeats them, so that
/// blocks left over from an earlier region in the same place are never taken for its own.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Uuid(pub [u8; 16]);

/// Bytes after which the textual form has a hyphen.
const HYPHEN_BEFORE: [usize; 4] = [4, 6, 8, 10];

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            if HYPHEN_BEFORE.contains(&index) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Uuid {
    type Err = Error;

    /// Takes the form that `Display` gives (8-4-4-4-12 hexadecimal digits of either case).
    fn from_str(text: &str) -> Result<Uuid> {
        let bad = || {
            Error::new(
                ErrorKind::InvalidArgument,
                "parse uuid",
                format!("expected 8-4-4-4-12 hexadecimal digits, found {text:?}"),
            )
        };
        let mut rest = text.as_bytes();
        let mut bytes = [0u8; 16];
        for (index, byte) in bytes.iter_mut().enumerate() {
            if HYPHEN_BEFORE.contains(&index) {
                rest = rest.strip_prefix(b"-").ok_or_else(bad)?;
            }
            let (pair, tail) = rest.split_at_checked(2).ok_or_else(bad)?;
            *byte = hex_digit(pair[0]).ok_or_else(bad)? << 4 | hex_digit(pair[1]).ok_or_else(bad)?;
            rest = tail;
        }
        if rest.is_empty() {
            Ok(Uuid(bytes))
        } else {
            Err(bad())
        }
    }
}

fn hex_digit(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trips_and_bad_text_is_refused() {
        let uuid = Uuid(std::array::from_fn(|index| (index * 17) as u8));
        let text = uuid.to_string();
        assert_eq!(text, "00112233-4455-6677-8899-aabbccddeeff");
        assert_eq!(text.parse::<Uuid>().unwrap(), uuid);
        assert_eq!(text.to_uppercase().parse::<Uuid>().unwrap(), uuid);
        for bad in
            ["", "0011", &text[1..], &format!("{text}0"), &text.replace('-', ""), &text.replace('f', "g")]
        {
            let error = bad.parse::<Uuid>().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{bad:?} was taken");
        }
    }
}
