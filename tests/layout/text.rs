//! Rust source as text: comments and literals blanked out, items for tests cut away.

/// A source file without what must not be judged. Line numbers are those of the file.
pub struct Text {
    /// Code alone: comments, literals and test items are blanks.
    pub code: String,
    /// The file as it is.
    pub raw: String,
}

/// A module that is compiled for tests only: its name, and its file where an attribute names one.
#[derive(Debug, PartialEq, Eq)]
pub struct TestModule {
    pub name: String,
    pub path: Option<String>,
}

impl Text {
    pub fn new(raw: &str) -> Text {
        let blanked = blank(raw);
        Text { code: cut_test_items(&blanked), raw: raw.to_string() }
    }

    /// Line of a byte offset, counted from 1.
    pub fn line_of(&self, offset: usize) -> usize {
        1 + self.code[..offset].matches('\n').count()
    }

    /// Offsets at which `word` stands in the code, not as a part of a longer name.
    pub fn words<'a>(&'a self, word: &'a str) -> impl Iterator<Item = usize> + 'a {
        let of_name = |c: char| c.is_alphanumeric() || c == '_';
        self.code.match_indices(word).map(|(at, _)| at).filter(move |&at| {
            let before = self.code[..at].chars().next_back();
            let after = self.code[at + word.len()..].chars().next();
            let starts = word.starts_with(of_name);
            let ends = word.ends_with(of_name);
            let longer_left = starts && before.is_some_and(of_name);
            let longer_right = ends && after.is_some_and(of_name);
            !longer_left && !longer_right
        })
    }
}

/// The modules declared for tests only.
pub fn test_modules(raw: &str) -> Vec<TestModule> {
    let code = blank(raw);
    let mut found = Vec::new();
    for start in test_attributes(&code) {
        let item = skip_attributes(&code, start);
        let Some(rest) = code[item..].trim_start_matches("pub(crate) ").strip_prefix("mod ") else {
            continue;
        };
        let Some((name, _)) = rest.split_once(';').filter(|(name, _)| !name.contains('{')) else { continue };
        // Literals are blank in `code`, so the path is taken from the file itself.
        let attributes = &raw[start..item];
        let path = attributes.split_once("#[path").and_then(|(_, rest)| rest.split('"').nth(1));
        found.push(TestModule { name: name.trim().to_string(), path: path.map(str::to_string) });
    }
    found
}

fn test_attributes(code: &str) -> impl Iterator<Item = usize> + '_ {
    ["#[cfg(test)]", "#[cfg(all(test,"]
        .into_iter()
        .flat_map(|mark| code.match_indices(mark).map(|(at, _)| at))
}

/// Past all attributes from `at` on, and the blanks after them.
fn skip_attributes(code: &str, mut at: usize) -> usize {
    loop {
        at += code[at..].len() - code[at..].trim_start().len();
        if !code[at..].starts_with("#[") {
            return at;
        }
        at = close(code, at + 1, b'[', b']');
    }
}

/// Past the bracket that closes the one at `at`.
fn close(code: &str, at: usize, open: u8, shut: u8) -> usize {
    let mut depth = 0usize;
    for (index, byte) in code.bytes().enumerate().skip(at) {
        if byte == open {
            depth += 1;
        } else if byte == shut {
            depth -= 1;
            if depth == 0 {
                return index + 1;
            }
        }
    }
    code.len()
}

fn cut_test_items(code: &str) -> String {
    let mut kept = code.as_bytes().to_vec();
    for start in test_attributes(code) {
        let item = skip_attributes(code, start);
        let (brace, semicolon) = (code[item..].find('{'), code[item..].find(';'));
        let end = match (brace, semicolon) {
            (Some(brace), None) => close(code, item + brace, b'{', b'}'),
            (Some(brace), Some(semicolon)) if brace < semicolon => close(code, item + brace, b'{', b'}'),
            (_, Some(semicolon)) => item + semicolon + 1,
            (None, None) => code.len(),
        };
        kept[start..end].iter_mut().filter(|byte| **byte != b'\n').for_each(|byte| *byte = b' ');
    }
    String::from_utf8(kept).expect("blanked by whole characters")
}

/// Comments and the insides of literals become blanks; every byte keeps its place.
fn blank(raw: &str) -> String {
    let bytes = raw.as_bytes();
    let mut out = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let end = match bytes[at] {
            b'/' if bytes[at..].starts_with(b"//") => line_end(bytes, at),
            b'/' if bytes[at..].starts_with(b"/*") => comment_end(bytes, at),
            b'"' => string_end(bytes, at, 0),
            b'r' if !of_name_before(bytes, at) => match raw_string_hashes(bytes, at) {
                Some(hashes) => raw_string_end(bytes, at, hashes),
                None => at + 1,
            },
            b'\'' => char_end(bytes, at),
            _ => at + 1,
        };
        if end > at + 1 {
            out[at..end].iter_mut().filter(|byte| **byte != b'\n').for_each(|byte| *byte = b' ');
        }
        at = end;
    }
    // What was not blanked is unchanged, and what was is ASCII.
    String::from_utf8(out).expect("blanked by whole characters")
}

fn of_name_before(bytes: &[u8], at: usize) -> bool {
    let before = at.checked_sub(1).map(|before| bytes[before]);
    before.is_some_and(|byte| byte != b'b' && (byte == b'_' || byte.is_ascii_alphanumeric()))
}

fn line_end(bytes: &[u8], at: usize) -> usize {
    bytes[at..].iter().position(|&byte| byte == b'\n').map_or(bytes.len(), |len| at + len)
}

fn comment_end(bytes: &[u8], start: usize) -> usize {
    let (mut at, mut depth) = (start, 0);
    while at < bytes.len() {
        if bytes[at..].starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if bytes[at..].starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    bytes.len()
}

fn string_end(bytes: &[u8], start: usize, prefix: usize) -> usize {
    let mut at = start + prefix + 1;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 2,
            b'"' => return at + 1,
            _ => at += 1,
        }
    }
    bytes.len()
}

fn raw_string_hashes(bytes: &[u8], at: usize) -> Option<usize> {
    let hashes = bytes[at + 1..].iter().take_while(|&&byte| byte == b'#').count();
    (bytes.get(at + 1 + hashes) == Some(&b'"')).then_some(hashes)
}

fn raw_string_end(bytes: &[u8], start: usize, hashes: usize) -> usize {
    let mut closing = vec![b'"'];
    closing.resize(1 + hashes, b'#');
    let body = start + 2 + hashes;
    (body..bytes.len())
        .find(|&at| bytes[at..].starts_with(&closing))
        .map_or(bytes.len(), |at| at + closing.len())
}

/// Past a character literal; one byte on for a lifetime.
fn char_end(bytes: &[u8], at: usize) -> usize {
    const LONGEST: usize = 12;
    match bytes.get(at + 1) {
        Some(b'\\') => {
            let rest = &bytes[at + 3..bytes.len().min(at + 3 + LONGEST)];
            rest.iter().position(|&byte| byte == b'\'').map_or(at + 1, |len| at + 4 + len)
        }
        Some(first) => {
            let len = match first {
                0..=0x7F => 1,
                0x80..=0xDF => 2,
                0xE0..=0xEF => 3,
                _ => 4,
            };
            if bytes.get(at + 1 + len) == Some(&b'\'') {
                at + len + 2
            } else {
                at + 1
            }
        }
        None => at + 1,
    }
}
