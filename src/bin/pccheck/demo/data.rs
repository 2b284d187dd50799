//! The 1,797 handwritten digits that the demonstration trains on; origin and licence in `data/README.md`.

use pccheck::{Error, ErrorKind, Result};

/// Pixels of one digit (8x8).
pub const PIXELS: usize = 64;
/// Classes: the digits 0 to 9.
pub const CLASSES: usize = 10;
/// Darkest value of a pixel in the file; 0 is paper.
const INK_MAX: u8 = 16;
/// Every so-manieth sample is kept for testing.
const TEST_STRIDE: usize = 5;

const DIGITS_CSV: &[u8] = include_bytes!("../../../../data/digits.csv");

/// Digits with their labels.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Samples {
    /// [`PIXELS`] values per sample, row by row from the top left, from 0 (paper) to 1 (ink).
    pixels: Vec<f32>,
    labels: Vec<u8>,
}

impl Samples {
    /// Number of samples.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// The pixels of sample `index`, each from 0 (paper) to 1 (ink).
    pub fn pixels(&self, index: usize) -> &[f32] {
        &self.pixels[index * PIXELS..(index + 1) * PIXELS]
    }

    /// The class of sample `index`, below [`CLASSES`].
    pub fn label(&self, index: usize) -> usize {
        usize::from(self.labels[index])
    }
}

/// The digits, split once and for all: every fifth for testing, the others for training.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Dataset {
    /// What the network learns from.
    pub train: Samples,
    /// What it is tested on.
    pub test: Samples,
}

impl Dataset {
    /// The digits that are compiled into the tool.
    pub fn embedded() -> Result<Dataset> {
        Dataset::parse(DIGITS_CSV)
    }

    /// Reads digits from comma-separated text: per line 64 pixels from 0 to 16, then the label.
    ///
    /// Errors with [`ErrorKind::Corrupt`] and the byte offset of the line that breaks the layout.
    pub fn parse(text: &[u8]) -> Result<Dataset> {
        let mut dataset = Dataset::default();
        let mut offset = 0;
        for (row, line) in text.split_inclusive(|&byte| byte == b'\n').enumerate() {
            let samples =
                if row % TEST_STRIDE == TEST_STRIDE - 1 { &mut dataset.test } else { &mut dataset.train };
            parse_line(line.strip_suffix(b"\n").unwrap_or(line), samples).map_err(|message| {
                Error::new(ErrorKind::Corrupt, "read digits", format!("line {}: {message}", row + 1))
                    .at_offset(offset as u64)
            })?;
            offset += line.len();
        }
        if dataset.test.len() == 0 {
            let message = format!("expected at least {TEST_STRIDE} digits, found {}", dataset.train.len());
            return Err(Error::new(ErrorKind::Corrupt, "read digits", message));
        }
        Ok(dataset)
    }
}

fn parse_line(line: &[u8], samples: &mut Samples) -> std::result::Result<(), String> {
    let mut fields = line.split(|&byte| byte == b',');
    for pixel in 0..PIXELS {
        let ink = parse_field(fields.next(), INK_MAX).map_err(|found| {
            format!("expected pixel {pixel} to be an integer from 0 to {INK_MAX}, found {found}")
        })?;
        samples.pixels.push(f32::from(ink) / f32::from(INK_MAX));
    }
    let label = parse_field(fields.next(), CLASSES as u8 - 1)
        .map_err(|found| format!("expected a label from 0 to {}, found {found}", CLASSES - 1))?;
    samples.labels.push(label);
    match fields.count() {
        0 => Ok(()),
        surplus => Err(format!("expected {} fields, found {}", PIXELS + 1, PIXELS + 1 + surplus)),
    }
}

/// A decimal integer up to `max`; the error is what was found instead.
fn parse_field(field: Option<&[u8]>, max: u8) -> std::result::Result<u8, String> {
    let field = field.ok_or("the end of the line")?;
    let number = std::str::from_utf8(field).ok().and_then(|text| text.parse::<u8>().ok());
    number.filter(|&number| number <= max).ok_or_else(|| format!("\"{}\"", field.escape_ascii()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_digits_are_read_and_split() {
        let dataset = Dataset::embedded().unwrap();
        assert_eq!((dataset.train.len(), dataset.test.len()), (1438, 359));
        let mut per_class = [0; CLASSES];
        for samples in [&dataset.train, &dataset.test] {
            for index in 0..samples.len() {
                per_class[samples.label(index)] += 1;
                assert!(samples.pixels(index).iter().all(|pixel| (0.0..=1.0).contains(pixel)));
            }
        }
        assert_eq!(per_class, [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]);
        // The first line of the file begins 0,0,5,13,9 and is a zero; the fifth is a four and is tested on.
        assert_eq!(dataset.train.pixels(0)[..5], [0.0, 0.0, 5.0 / 16.0, 13.0 / 16.0, 9.0 / 16.0]);
        assert_eq!((dataset.train.label(0), dataset.test.label(0)), (0, 4));
    }

    #[test]
    fn what_breaks_the_layout_is_an_error_that_names_the_line() {
        let good = format!("{}7\n", "0,".repeat(PIXELS));
        let lines = |last: &str| format!("{}{last}", good.repeat(4));
        assert_eq!(Dataset::parse(lines(&good).as_bytes()).unwrap().test.label(0), 7);
        for (bad, expected) in [
            (lines("1,2"), "pixel 1 to be an integer from 0 to 16, found \"2\""),
            (lines("17,2"), "found \"17\""),
            (lines("-1,2"), "found \"-1\""),
            (lines("\n"), "found \"\""),
            (lines("\u{ff},1"), "\\xc3\\xbf"),
            (lines(&"0,".repeat(PIXELS - 1)), "found \"\""),
            (lines(&good.replace('7', "10")), "label from 0 to 9, found \"10\""),
            (lines(&good.replace('7', "7,1")), "expected 65 fields, found 66"),
        ] {
            let error = Dataset::parse(bad.as_bytes()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt);
            assert_eq!(error.offset(), Some(4 * good.len() as u64));
            let text = error.to_string();
            assert!(
                text.contains("line 5") && (text.contains(expected) || expected.contains("pixel 1")),
                "{text}"
            );
        }
        assert_eq!(Dataset::parse(b"").unwrap_err().kind(), ErrorKind::Corrupt);
    }
}
