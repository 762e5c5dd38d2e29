//! Line charts as SVG, to be put into a page: no script, colours by the page's classes.

use std::fmt::Write;

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 240.0;
const LEFT: f64 = 52.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 40.0;

/// One line.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    /// The class that says how it looks.
    pub(crate) class: &'static str,
    /// From left to right.
    pub(crate) points: Vec<(f64, f64)>,
    /// Whether a value holds until the next one, rather than growing towards it.
    pub(crate) steps: bool,
}

/// A stretch of the horizontal axis with a name.
#[derive(Clone, Debug)]
pub(crate) struct Band {
    pub(crate) from: f64,
    pub(crate) to: f64,
    pub(crate) name: String,
}

/// Lines over one pair of axes, both from zero.
#[derive(Clone, Debug)]
pub(crate) struct Chart<'c> {
    pub(crate) x_label: &'c str,
    pub(crate) y_label: &'c str,
    pub(crate) bands: &'c [Band],
    pub(crate) lines: &'c [Line],
}

impl Chart<'_> {
    /// The chart as an `<svg>` element.
    pub(crate) fn svg(&self) -> String {
        let points = || self.lines.iter().flat_map(|line| &line.points);
        let bands = self.bands.iter().map(|band| band.to);
        let x_ticks = ticks(
            points()
                .map(|point| point.0)
                .chain(bands)
                .fold(0.0, f64::max),
            8.0,
        );
        let y_ticks = ticks(points().map(|point| point.1).fold(0.0, f64::max), 5.0);
        let x_end = points().map(|point| point.0).fold(x_ticks[1], f64::max);
        let y_end = *y_ticks.last().unwrap_or(&1.0);
        let x_of = |x: f64| LEFT + x / x_end * (WIDTH - LEFT - RIGHT);
        let y_of = |y: f64| HEIGHT - BOTTOM - y / y_end * (HEIGHT - TOP - BOTTOM);
        let (bottom, right) = (y_of(0.0), x_of(x_end));

        let mut svg = format!(r#"<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">"#);
        // Writing to a string does not fail.
        let mut put = |piece: std::fmt::Arguments<'_>| {
            let _ = svg.write_fmt(piece);
        };
        for (number, band) in self.bands.iter().enumerate() {
            let (from, width) = (x_of(band.from), x_of(band.to) - x_of(band.from));
            let height = bottom - TOP;
            let class = if number % 2 == 0 {
                "band"
            } else {
                "band other"
            };
            put(format_args!(
                r#"<rect class="{class}" x="{from:.1}" y="{TOP}" width="{width:.1}" height="{height:.1}"/>"#
            ));
            let name = escaped(&band.name);
            let (x, y) = (from + 4.0, TOP + 12.0);
            put(format_args!(r#"<text x="{x:.1}" y="{y:.1}">{name}</text>"#));
        }
        for tick in y_ticks.iter().map(|&tick| (tick, y_of(tick))) {
            let ((value, y), x) = (tick, LEFT - 6.0);
            put(format_args!(
                r#"<path class="grid" d="M{LEFT} {y:.1}H{right:.1}"/>"#
            ));
            let y = y + 4.0;
            put(format_args!(
                r#"<text class="end" x="{x:.1}" y="{y:.1}">{value}</text>"#
            ));
        }
        for value in x_ticks.iter().filter(|&&tick| tick <= x_end) {
            let (x, y) = (x_of(*value), bottom + 16.0);
            put(format_args!(
                r#"<text class="middle" x="{x:.1}" y="{y:.1}">{value}</text>"#
            ));
        }
        for line in self.lines {
            let class = line.class;
            put(format_args!(r#"<path class="{class}" d=""#));
            for (number, &(x, y)) in line.points.iter().enumerate() {
                let (x, y) = (x_of(x), y_of(y));
                match (number, line.steps) {
                    (0, _) => put(format_args!("M{x:.1} {y:.1}")),
                    (_, true) => put(format_args!("H{x:.1}V{y:.1}")),
                    (_, false) => put(format_args!("L{x:.1} {y:.1}")),
                }
            }
            put(format_args!(r#""/>"#));
        }
        let (middle, low) = ((LEFT + right) / 2.0, HEIGHT - 6.0);
        let (x_label, y_label) = (escaped(self.x_label), escaped(self.y_label));
        put(format_args!(
            r#"<text class="middle" x="{middle:.1}" y="{low:.1}">{x_label}</text>"#
        ));
        let (x, y) = (14.0, (TOP + bottom) / 2.0);
        put(format_args!(
            r#"<text class="middle" transform="translate({x},{y:.1}) rotate(-90)">{y_label}</text>"#
        ));
        svg.push_str("</svg>");
        svg
    }
}

/// Round numbers from zero to `largest` or just beyond, at most about `count` of them.
fn ticks(largest: f64, count: f64) -> Vec<f64> {
    let largest = if largest.is_finite() {
        largest.max(1e-6)
    } else {
        1.0
    };
    let rough = largest / count;
    let power = 10_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power);
    let step = step
        .into_iter()
        .find(|&step| step >= rough)
        .unwrap_or(rough);
    let steps = (largest / step).ceil() as u32;
    // Multiplied, not added up, and rounded to the step's own digits.
    let digits = 10_f64.powf(-power.log10());
    (0..=steps.max(1))
        .map(|number| (f64::from(number) * step * digits).round() / digits)
        .collect()
}

/// Text that may stand in HTML.
pub(crate) fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            _ => escaped.push(letter),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_reach_the_largest() {
        assert_eq!(ticks(70.0, 5.0), [0.0, 20.0, 40.0, 60.0, 80.0]);
        assert_eq!(ticks(0.3, 5.0), [0.0, 0.1, 0.2, 0.3]);
        assert_eq!(ticks(0.0, 5.0).len(), 6);
        for largest in [1e-9, 0.07, 1.0, 3.3, 99.0, 1e9, f64::NAN, f64::INFINITY] {
            let ticks = ticks(largest, 8.0);
            assert!(
                ticks.len() >= 2 && ticks.len() <= 12,
                "{largest}: {ticks:?}"
            );
        }
    }

    #[test]
    fn a_chart_draws_every_line_and_names_its_bands() {
        let lines = [
            Line {
                class: "held",
                points: vec![(0.0, 1.0), (5.0, 9.0)],
                steps: false,
            },
            Line {
                class: "predicted",
                points: vec![],
                steps: true,
            },
        ];
        let bands = [Band {
            from: 0.0,
            to: 4.0,
            name: "1 < 2".to_owned(),
        }];
        let svg = Chart {
            x_label: "seconds",
            y_label: "blocks",
            bands: &bands,
            lines: &lines,
        }
        .svg();
        assert_eq!(svg.matches(r#"<path class="held""#).count(), 1);
        assert!(svg.contains("1 &lt; 2") && !svg.contains("NaN"));
    }
}
