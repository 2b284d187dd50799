//! Aligned tables of plain text.

use std::fmt::Write;

use pccheck::error::Harmless;

/// Columns that a table may take; the last column is broken into lines to fit.
const WIDTH: usize = 100;
/// The last column is never broken narrower than this.
const LAST_WIDTH_MIN: usize = 24;
/// Between two columns.
const GAP: &str = "  ";

/// A table: a head, and rows of as many cells.
pub struct Table {
    head: Vec<String>,
    /// Per column: aligned to the left.
    left: Vec<bool>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// Columns by name; those whose name starts with `<` are aligned to the left, others to the right.
    pub fn new(columns: &[&str]) -> Table {
        Table {
            head: columns.iter().map(|name| name.trim_start_matches('<').to_string()).collect(),
            left: columns.iter().map(|name| name.starts_with('<')).collect(),
            rows: Vec::new(),
        }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: Vec<String>) {
        debug_assert_eq!(cells.len(), self.head.len());
        self.rows.push(cells.iter().map(|cell| harmless(cell)).collect());
    }

    /// The table as lines, each ended.
    pub fn render(&self) -> String {
        let columns = self.head.len();
        let widths: Vec<usize> = (0..columns)
            .map(|column| {
                let cells = self.rows.iter().chain([&self.head]);
                cells.map(|row| row[column].chars().count()).max().unwrap_or(0)
            })
            .collect();
        let before: usize = widths[..columns - 1].iter().map(|width| width + GAP.len()).sum();
        let last_width = WIDTH.saturating_sub(before).max(LAST_WIDTH_MIN);
        let mut text = String::new();
        for row in [&self.head].into_iter().chain(&self.rows) {
            let mut line = String::new();
            for (column, cell) in row[..columns - 1].iter().enumerate() {
                line += &self.align(column, cell, widths[column]);
                line += GAP;
            }
            let pieces = break_words(&row[columns - 1], last_width);
            for (number, piece) in pieces.iter().enumerate() {
                if number > 0 {
                    line = " ".repeat(before);
                }
                line += &self.align(columns - 1, piece, widths[columns - 1].min(last_width));
                text += line.trim_end();
                text.push('\n');
            }
        }
        text
    }

    fn align(&self, column: usize, cell: &str, width: usize) -> String {
        match self.left[column] {
            true => format!("{cell:<width$}"),
            false => format!("{cell:>width$}"),
        }
    }
}

/// Names and values, one per line, the values aligned.
pub fn pairs(pairs: &[(&str, String)]) -> String {
    let width = pairs.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for (name, value) in pairs {
        for (number, piece) in break_words(&harmless(value), WIDTH - width - GAP.len()).iter().enumerate() {
            let name = if number == 0 { name } else { "" };
            text += format!("{name:<width$}{GAP}{piece}").trim_end();
            text.push('\n');
        }
    }
    text
}

/// What a region says is printed as it is only where that does nothing to the terminal, nor to the table.
fn harmless(text: &str) -> String {
    let mut plain = Harmless(String::with_capacity(text.len()));
    // A string takes everything.
    let _ = plain.write_str(text);
    plain.0
}

/// Breaks at spaces into lines of at most `width` characters; longer words stay whole.
fn break_words(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    let mut used = 0;
    for word in text.split(' ') {
        let length = word.chars().count();
        if used > 0 && used + 1 + length > width {
            lines.push(String::new());
            used = 0;
        }
        let Some(line) = lines.last_mut() else { break };
        if used > 0 {
            line.push(' ');
            used += 1;
        }
        line.push_str(word);
        used += length;
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align_and_the_last_one_is_broken() {
        let mut table = Table::new(&["n", "<name", "<why"]);
        table.row(vec!["7".into(), "größe".into(), "x".into()]);
        table.row(vec!["10".into(), "b".into(), "word ".repeat(30).trim_end().into()]);
        let text = table.render();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], " n  name   why");
        assert_eq!(lines[1], " 7  größe  x");
        assert!(lines[2].starts_with("10  b      word word"));
        assert!(lines[3].starts_with("           word"));
        assert!(lines.iter().all(|line| line.chars().count() <= WIDTH && line.trim_end() == *line));
    }
}
