//! The loss curve of a run that was killed and resumed, over that of one that was not, as an SVG picture.
//!
//! Colours are from the palette of Okabe and Ito, told apart with any kind of colour vision; lines differ in width
//! and lightness as well, so that the picture survives grey printing.

use std::fmt::Write;

/// What one process did between its start (or resume) and its death (or the end).
#[derive(Debug, Clone, PartialEq)]
pub struct Life {
    /// Number of the first iteration that it ran.
    pub first_iteration: u64,
    /// Training loss in nats of each iteration that it ran.
    pub losses: Vec<f32>,
}

impl Life {
    /// The iteration after the last one that it ran.
    fn end(&self) -> u64 {
        self.first_iteration + self.losses.len() as u64
    }
}

/// What the picture shows.
#[derive(Debug, Clone, PartialEq)]
pub struct Curve {
    /// First line.
    pub title: String,
    /// Second line, smaller.
    pub subtitle: String,
    /// Training loss in nats of the uninterrupted run, from iteration 0.
    pub uninterrupted: Vec<f32>,
    /// The killed run: one life per process, in the order of time. Every end but the last is a kill.
    pub lives: Vec<Life>,
}

impl Curve {
    /// Per kill the iteration that it fell in, and how many iterations had to be run again.
    pub fn kills(&self) -> Vec<(u64, u64)> {
        let pairs = self.lives.iter().zip(self.lives.iter().skip(1));
        pairs.map(|(life, next)| (life.end(), life.end().saturating_sub(next.first_iteration))).collect()
    }
}

const WIDTH: f64 = 1120.0;
const LEFT: f64 = 84.0;
const RIGHT: f64 = 1088.0;
const TOP: f64 = 164.0;
const BOTTOM: f64 = 520.0;
/// Height of the bar of one life, and distance from one to the next.
const LIFE_BAR: f64 = 9.0;
const LIFE_PITCH: f64 = 14.0;
/// Shortest mark of lost iterations, so that one among thousands is still seen.
const AGAIN_BAR_MIN: f64 = 2.5;
/// Beyond so many lives the bars are drawn in so many rows by turns.
const LIFE_ROWS_MAX: usize = 12;
/// Rows of labels above the plot; a label that finds no room is left out, its mark is not.
const LABEL_ROWS: usize = 3;
const LABEL_PITCH: f64 = 17.0;
/// Average width of a character of 12 px type.
const CHARACTER: f64 = 6.4;
/// Losses below are drawn at this value: the logarithm needs a floor.
const LOSS_MIN: f64 = 1e-6;

const INK: &str = "#1f2933";
const MUTED: &str = "#5f6b7a";
const GRID: &str = "#e4e8ee";
const UNINTERRUPTED: &str = "#f0b429";
const RESUMED: &str = "#0b4f8a";
const AGAIN: &str = "#d55e00";

/// Where values lie in the picture.
struct Scale {
    iterations: f64,
    log_min: f64,
    log_max: f64,
}

impl Scale {
    fn new(curve: &Curve) -> Self {
        let runs = std::iter::once(&curve.uninterrupted).chain(curve.lives.iter().map(|life| &life.losses));
        let (mut min, mut max) = (f64::INFINITY, f64::NEG_INFINITY);
        for loss in runs.flatten().filter(|loss| loss.is_finite()) {
            let loss = f64::from(*loss).max(LOSS_MIN);
            (min, max) = (min.min(loss), max.max(loss));
        }
        if min > max {
            (min, max) = (0.1, 1.0);
        }
        let ends = curve.lives.iter().map(Life::end).chain([curve.uninterrupted.len() as u64]);
        Scale {
            iterations: ends.max().unwrap_or(0).max(1) as f64,
            log_min: min.log10() - 0.08,
            log_max: max.log10() + 0.08,
        }
    }

    fn x(&self, iteration: f64) -> f64 {
        LEFT + (RIGHT - LEFT) * iteration / self.iterations
    }

    fn y(&self, loss: f64) -> f64 {
        let share = (loss.max(LOSS_MIN).log10() - self.log_min) / (self.log_max - self.log_min);
        BOTTOM - (BOTTOM - TOP) * share
    }

    /// Path commands through `losses`; the line is broken where a loss is not a number. Where several iterations
    /// fall on one pixel, only the lowest and the highest of them are drawn.
    fn path(&self, first_iteration: u64, losses: &[f32]) -> String {
        let per_pixel = (self.iterations / (RIGHT - LEFT)).ceil().max(1.0) as usize;
        let mut path = String::new();
        let mut command = 'M';
        for (bucket, group) in losses.chunks(per_pixel).enumerate() {
            let at = |offset: usize| (first_iteration as f64) + (bucket * per_pixel + offset) as f64;
            let finite = || group.iter().copied().enumerate().filter(|(_, loss)| loss.is_finite());
            let low = finite().min_by(|a, b| a.1.total_cmp(&b.1));
            let high = finite().max_by(|a, b| a.1.total_cmp(&b.1));
            let (Some(low), Some(high)) = (low, high) else {
                command = 'M';
                continue;
            };
            let (first, second) = if low.0 <= high.0 { (low, high) } else { (high, low) };
            for (offset, loss) in [first, second].into_iter().take(if low.0 == high.0 { 1 } else { 2 }) {
                let _ = write!(path, "{command}{:.1} {:.1}", self.x(at(offset)), self.y(f64::from(loss)));
                command = 'L';
            }
        }
        path
    }
}

/// The picture as an SVG document, complete in itself. Loss is on a logarithmic axis.
pub fn render_svg(curve: &Curve) -> String {
    let scale = Scale::new(curve);
    let kills = curve.kills();
    let rows = curve.lives.len().min(LIFE_ROWS_MAX);
    let lives_top = BOTTOM + 76.0;
    let height = lives_top + rows as f64 * LIFE_PITCH + 34.0;
    let mut svg = String::new();
    let again: u64 = kills.iter().map(|kill| kill.1).sum();
    let _ = write!(
        svg,
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" font-family="Inter, 'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif" font-size="12" fill="{INK}" role="img">
<title>{}</title>
<desc>{} kills, {again} iterations run again. {}</desc>
<rect width="{WIDTH}" height="{height}" fill="white"/>
"#,
        escape(&curve.title),
        kills.len(),
        escape(&curve.subtitle)
    );
    text(&mut svg, LEFT, 34.0, r#"font-size="20" font-weight="600""#, &curve.title);
    text(&mut svg, LEFT, 57.0, &format!(r#"font-size="13.5" fill="{MUTED}""#), &curve.subtitle);
    legend(&mut svg);
    axes(&mut svg, &scale);
    curves(&mut svg, &scale, curve);
    kill_marks(&mut svg, &scale, &kills);
    lives(&mut svg, &scale, curve, lives_top, rows);
    svg.push_str("</svg>\n");
    svg
}

fn text(svg: &mut String, x: f64, y: f64, style: &str, content: &str) {
    let _ = writeln!(svg, r#"<text x="{x:.1}" y="{y:.1}" {style}>{}</text>"#, escape(content));
}

/// A line or, thick and without caps, a bar.
fn line(svg: &mut String, from: (f64, f64), to: (f64, f64), style: &str) {
    let ((x1, y1), (x2, y2)) = (from, to);
    let _ = writeln!(svg, r#"<path d="M{x1:.1} {y1:.1}L{x2:.1} {y2:.1}" {style}/>"#);
}

fn legend(svg: &mut String) {
    let y = 84.0;
    let entries = [
        (UNINTERRUPTED, r#"stroke-width="6""#, "uninterrupted run"),
        (RESUMED, r#"stroke-width="1.8""#, "killed and resumed run"),
        (AGAIN, r#"stroke-width="4.5""#, "iterations lost at a kill and run again"),
        (INK, r#"stroke-width="1.2" stroke-dasharray="4 3""#, "SIGKILL"),
    ];
    let mut x = LEFT;
    for (colour, style, label) in entries {
        line(svg, (x, y), (x + 28.0, y), &format!(r#"stroke="{colour}" {style}"#));
        text(svg, x + 36.0, y + 4.2, r#"font-size="12.5""#, label);
        x += 36.0 + label.len() as f64 * 6.5 + 24.0;
    }
}

fn axes(svg: &mut String, scale: &Scale) {
    let decades = scale.log_max - scale.log_min;
    let multiples: &[f64] = if decades < 2.2 { &[1.0, 2.0, 5.0] } else { &[1.0] };
    for decade in scale.log_min.floor() as i32..=scale.log_max.ceil() as i32 {
        for multiple in multiples {
            let loss = multiple * 10f64.powi(decade);
            if loss.log10() < scale.log_min || loss.log10() > scale.log_max {
                continue;
            }
            let y = scale.y(loss);
            line(svg, (LEFT, y), (RIGHT, y), &format!(r#"stroke="{GRID}""#));
            let label = if decade < -3 {
                format!("{loss:e}")
            } else {
                format!("{loss:.*}", (-decade).max(0) as usize)
            };
            text(svg, LEFT - 10.0, y + 4.2, r#"text-anchor="end""#, &label);
        }
    }
    let step = nice_step(scale.iterations, 10.0);
    let mut iteration = 0;
    while iteration as f64 <= scale.iterations {
        let x = scale.x(iteration as f64);
        line(svg, (x, TOP), (x, BOTTOM), &format!(r#"stroke="{GRID}""#));
        line(svg, (x, BOTTOM), (x, BOTTOM + 5.0), &format!(r#"stroke="{MUTED}""#));
        text(svg, x, BOTTOM + 20.0, r#"text-anchor="middle""#, &thousands(iteration));
        iteration += step;
    }
    line(svg, (LEFT, BOTTOM), (RIGHT, BOTTOM), &format!(r#"stroke="{MUTED}" stroke-width="1.2""#));
    let centre = (LEFT + RIGHT) / 2.0;
    text(svg, centre, BOTTOM + 40.0, r#"text-anchor="middle" font-size="13""#, "iteration");
    let middle = (TOP + BOTTOM) / 2.0;
    let turned = format!(r#"text-anchor="middle" font-size="13" transform="rotate(-90 26 {middle})""#);
    text(svg, 26.0, middle, &turned, "training loss of the batch (nats, log scale)");
}

fn curves(svg: &mut String, scale: &Scale, curve: &Curve) {
    let mut draw = |colour: &str, width: f64, opacity: f64, path: String| {
        let _ = writeln!(
            svg,
            r#"<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-opacity="{opacity}" stroke-linejoin="round" stroke-linecap="round"/>"#
        );
    };
    draw(UNINTERRUPTED, 6.0, 0.75, scale.path(0, &curve.uninterrupted));
    for (life, next) in curve.lives.iter().zip(curve.lives.iter().skip(1)) {
        // What was lost, from the last iteration that was kept: one segment even if only one was lost.
        let kept = next.first_iteration.saturating_sub(life.first_iteration).saturating_sub(1) as usize;
        if next.first_iteration < life.end() {
            let from = kept.min(life.losses.len());
            draw(AGAIN, 4.5, 1.0, scale.path(life.first_iteration + from as u64, &life.losses[from..]));
        }
    }
    for life in &curve.lives {
        draw(RESUMED, 1.6, 1.0, scale.path(life.first_iteration, &life.losses));
    }
}

fn kill_marks(svg: &mut String, scale: &Scale, kills: &[(u64, u64)]) {
    let mut row_ends = [f64::NEG_INFINITY; LABEL_ROWS];
    let mut labels = String::new();
    for (index, &(iteration, lost)) in kills.iter().enumerate() {
        let x = scale.x(iteration as f64);
        let label = format!("kill {}: {lost} lost", index + 1);
        let half = label.chars().count() as f64 * CHARACTER / 2.0;
        let centre = x.clamp(LEFT + half, RIGHT - half);
        let row = row_ends.iter().position(|end| centre - half > *end + 8.0);
        let mark_top = row.map_or(TOP, |row| TOP - 6.0 - row as f64 * LABEL_PITCH);
        let style =
            format!(r#"stroke="{INK}" stroke-width="1.2" stroke-dasharray="4 3" stroke-opacity="0.75""#);
        line(svg, (x, mark_top), (x, BOTTOM), &style);
        if let Some(row) = row {
            row_ends[row] = centre + half;
            // White behind the label, for the marks that reach up to the rows above.
            let middle = mark_top - 9.0;
            let white = r#"stroke="white" stroke-width="15""#;
            line(&mut labels, (centre - half, middle), (centre + half, middle), white);
            text(&mut labels, centre, mark_top - 5.0, r#"text-anchor="middle""#, &label);
        }
    }
    svg.push_str(&labels);
}

/// One bar per life under the plot: where bars overlap, iterations were run again.
fn lives(svg: &mut String, scale: &Scale, curve: &Curve, top: f64, rows: usize) {
    if rows == 0 {
        return;
    }
    text(svg, LEFT, top - 9.0, r#"font-weight="600""#, "One bar per process, from resume to kill");
    for (index, life) in curve.lives.iter().enumerate() {
        let y = top + (index % rows) as f64 * LIFE_PITCH + LIFE_BAR / 2.0;
        let (start, end) = (scale.x(life.first_iteration as f64), scale.x(life.end() as f64));
        let mut bar = |from: f64, to: f64, colour: &str| {
            line(svg, (from, y), (to, y), &format!(r#"stroke="{colour}" stroke-width="{LIFE_BAR}""#));
        };
        bar(start, end, RESUMED);
        if let Some(next) = curve.lives.get(index + 1).filter(|next| next.first_iteration < life.end()) {
            bar(scale.x(next.first_iteration as f64).min(end - AGAIN_BAR_MIN).max(start), end, AGAIN);
        }
        if curve.lives.len() <= LIFE_ROWS_MAX {
            text(
                svg,
                LEFT - 10.0,
                y + 4.0,
                &format!(r#"text-anchor="end" fill="{MUTED}""#),
                &(index + 1).to_string(),
            );
        }
    }
}

/// The smallest of 1, 2, 5, 10, 20, ... that divides `range` into at most about `count` parts.
fn nice_step(range: f64, count: f64) -> u64 {
    let raw = (range / count).max(1.0);
    let decade = 10f64.powf(raw.log10().floor());
    let multiple = [1.0, 2.0, 5.0].into_iter().find(|multiple| multiple * decade >= raw).unwrap_or(10.0);
    (multiple * decade).round() as u64
}

/// Digits in groups of three.
fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// Text as XML shows it unchanged; control characters, which XML cannot hold, become spaces.
fn escape(text: &str) -> String {
    let mut escaped = String::new();
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            control if control.is_control() => escaped.push(' '),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(lives: &[(u64, usize)]) -> Curve {
        let loss = |iteration: u64| 2.3 * (-(iteration as f32) / 50.0).exp();
        let life = |&(first_iteration, count): &(u64, usize)| Life {
            first_iteration,
            losses: (0..count as u64).map(|offset| loss(first_iteration + offset)).collect(),
        };
        Curve {
            title: "a < b & \"c\"\u{7}".to_string(),
            subtitle: "sub".to_string(),
            uninterrupted: (0..300).map(loss).collect(),
            lives: lives.iter().map(life).collect(),
        }
    }

    #[test]
    fn kills_and_what_they_cost_are_counted_and_labelled() {
        let curve = curve(&[(0, 100), (97, 50), (147, 153)]);
        assert_eq!(curve.kills(), [(100, 3), (147, 0)]);
        let svg = render_svg(&curve);
        assert!(svg.contains("kill 1: 3 lost") && svg.contains("kill 2: 0 lost"));
        // In the legend, on the curve and on the bar of the first life; the second kill lost nothing.
        assert_eq!(svg.matches(AGAIN).count(), 3);
        assert!(svg.contains("a &lt; b &amp; &quot;c&quot; <"));
    }

    #[test]
    fn numbers_that_are_none_and_empty_runs_leave_a_whole_picture() {
        let mut broken = curve(&[(0, 5), (3, 0), (3, 10)]);
        broken.lives[0].losses[2] = f32::NAN;
        broken.lives[2].losses[1] = f32::INFINITY;
        broken.uninterrupted[7] = 0.0;
        let empty =
            Curve { title: String::new(), subtitle: String::new(), uninterrupted: vec![], lives: vec![] };
        for curve in [broken, empty, curve(&[(50, 10), (0, 300)])] {
            let svg = render_svg(&curve);
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
            assert!(svg.ends_with("</svg>\n"));
        }
    }

    #[test]
    fn long_runs_and_many_kills_stay_small_and_unlabelled_where_crowded() {
        let lives: Vec<(u64, usize)> = (0..200).map(|life| (life * 500, 501)).collect();
        let svg = render_svg(&curve(&lives));
        assert!(svg.len() < 300_000, "{} bytes", svg.len());
        assert!(svg.matches("kill ").count() < 60);
        assert_eq!(svg.matches("stroke-dasharray").count(), 1 + 199);
    }

    #[test]
    fn ticks_are_round_numbers() {
        for (range, step) in
            [(1.0, 1), (10.0, 1), (11.0, 2), (45.0, 5), (300.0, 50), (1001.0, 200), (99_000.0, 10_000)]
        {
            assert_eq!(nice_step(range, 10.0), step, "for {range}");
        }
        assert_eq!([0, 999, 1000, 1_234_567].map(thousands), ["0", "999", "1,000", "1,234,567"]);
    }
}
