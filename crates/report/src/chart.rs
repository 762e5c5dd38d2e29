//! Line charts as SVG elements without scripts. The style sheet of the page sets their colours by
//! class.

use std::fmt::Write;

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 240.0;
const LEFT: f64 = 52.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 40.0;

/// A line of a chart.
#[derive(Clone, Debug)]
pub struct Line {
    /// Class of the style sheet.
    pub class: &'static str,
    /// Points (x, y), in increasing x.
    pub points: Vec<(f64, f64)>,
    /// `true`: the value is constant until the next point. `false`: points are connected.
    pub steps: bool,
    /// Labels of the points, in their order; empty for no labels.
    pub marks: Vec<String>,
}

/// A highlighted, named interval of the horizontal axis.
#[derive(Clone, Debug)]
pub struct Band {
    /// Start of the interval.
    pub from: f64,
    /// End of the interval.
    pub to: f64,
    /// Label at the top of the band.
    pub name: String,
}

/// A chart: lines over one pair of axes.
#[derive(Clone, Debug, Default)]
pub struct Chart<'c> {
    /// Label of the horizontal axis.
    pub x_label: &'c str,
    /// Label of the vertical axis.
    pub y_label: &'c str,
    /// Highlighted intervals, behind the lines.
    pub bands: &'c [Band],
    /// Lines, the later ones on top.
    pub lines: &'c [Line],
    /// Smallest x and y of the axes.
    pub origin: (f64, f64),
    /// Value at which a line ends when it rises above it; `None` for no limit.
    pub ceiling: Option<f64>,
}

impl Chart<'_> {
    /// Returns the chart as an `<svg>` element. Labels are escaped. The points of the lines, also
    /// those above the ceiling, determine the end of the horizontal axis; bands do not extend it.
    pub fn svg(&self) -> String {
        let ceiling = self.ceiling.unwrap_or(f64::INFINITY);
        let lines: Vec<_> = self
            .lines
            .iter()
            .map(|line| cut_at_ceiling(&line.points, ceiling))
            .collect();
        let points = || lines.iter().flatten();
        let bands = self.bands.iter().map(|band| band.to);
        let (x_start, y_start) = self.origin;
        let uncut_points = self.lines.iter().flat_map(|line| &line.points);
        let x_end = uncut_points.map(|point| point.0).fold(x_start, f64::max);
        let y_end = points().map(|point| point.1).fold(y_start, f64::max);
        let x_ticks = ticks(x_start, bands.fold(x_end, f64::max), 8.0);
        let y_ticks = ticks(y_start, y_end, 5.0);
        let has_marks = self.lines.iter().any(|line| !line.marks.is_empty());
        let mark_width = if has_marks {
            0.05 * (x_end - x_start)
        } else {
            0.0
        };
        let x_end = (x_end + mark_width).max(x_ticks[1]);
        let (y_start, y_end) = (y_ticks[0], *y_ticks.last().unwrap_or(&1.0));
        let x_of = |x: f64| LEFT + (x - x_start) / (x_end - x_start) * (WIDTH - LEFT - RIGHT);
        let y_of =
            |y: f64| HEIGHT - BOTTOM - (y - y_start) / (y_end - y_start) * (HEIGHT - TOP - BOTTOM);
        let (bottom, right) = (y_of(y_start), x_of(x_end));

        let mut svg = format!(r#"<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">"#);
        // Writing to a string cannot fail.
        let mut put = |text: std::fmt::Arguments<'_>| {
            let _ = svg.write_fmt(text);
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
        for value in x_ticks
            .iter()
            .filter(|&&tick| tick >= x_start && tick <= x_end)
        {
            let (x, y) = (x_of(*value), bottom + 16.0);
            put(format_args!(
                r#"<text class="middle" x="{x:.1}" y="{y:.1}">{value}</text>"#
            ));
        }
        for (line, points) in self.lines.iter().zip(&lines) {
            let class = line.class;
            put(format_args!(r#"<path class="{class}" d=""#));
            for (number, &(x, y)) in points.iter().enumerate() {
                let (x, y) = (x_of(x), y_of(y));
                match (number, line.steps) {
                    (0, _) => put(format_args!("M{x:.1} {y:.1}")),
                    (_, true) => put(format_args!("H{x:.1}V{y:.1}")),
                    (_, false) => put(format_args!("L{x:.1} {y:.1}")),
                }
            }
            put(format_args!(r#""/>"#));
            for (mark, &(x, y)) in line.marks.iter().zip(points) {
                let (x, y, mark) = (x_of(x), y_of(y), escaped(mark));
                put(format_args!(
                    r#"<circle class="{class}" cx="{x:.1}" cy="{y:.1}" r="3"/>"#
                ));
                let (x, y) = (x + 5.0, y - 5.0);
                put(format_args!(r#"<text x="{x:.1}" y="{y:.1}">{mark}</text>"#));
            }
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

/// Returns the part of a line before it first rises above `ceiling`, with the point at which it
/// crosses the ceiling. Empty if the first point is above it.
fn cut_at_ceiling(points: &[(f64, f64)], ceiling: f64) -> Vec<(f64, f64)> {
    let Some(above) = points.iter().position(|point| point.1 > ceiling) else {
        return points.to_vec();
    };
    let mut kept = points[..above].to_vec();
    if let Some(&(x, y)) = kept.last() {
        let (next_x, next_y) = points[above];
        let fraction = (ceiling - y) / (next_y - y);
        kept.push((x + fraction * (next_x - x), ceiling));
    }
    kept
}

/// Returns about `count` or fewer equidistant round numbers, at least two. They cover the range
/// from `smallest` to `largest`; if that is not finite, a range of length 1.
pub fn ticks(smallest: f64, largest: f64, count: f64) -> Vec<f64> {
    let span = largest - smallest;
    let span = if span.is_finite() {
        span.max(1e-6)
    } else {
        1.0
    };
    let rough = span / count;
    let power = 10_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power);
    let step = step
        .into_iter()
        .find(|&step| step >= rough)
        .unwrap_or(rough);
    let first = (smallest / step + 1e-9).floor();
    let steps = ((smallest + span) / step - first - 1e-9).ceil() as u32;
    // Each tick is a multiple of the step, rounded to the step's digits: repeated addition would
    // accumulate rounding errors.
    let digits = 10_f64.powf(-power.log10());
    (0..=steps.max(1))
        .map(|number| ((first + f64::from(number)) * step * digits).round() / digits)
        .collect()
}

/// Escapes text for HTML content and attributes.
pub fn escaped(text: &str) -> String {
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
    fn ticks_are_round_and_cover_the_range() {
        assert_eq!(ticks(0.0, 70.0, 5.0), [0.0, 20.0, 40.0, 60.0, 80.0]);
        assert_eq!(ticks(0.0, 0.3, 5.0), [0.0, 0.1, 0.2, 0.3]);
        assert_eq!(ticks(0.0, 0.0, 5.0).len(), 6);
        assert_eq!(ticks(0.92, 1.13, 5.0), [0.9, 0.95, 1.0, 1.05, 1.1, 1.15]);
        for largest in [1e-9, 0.07, 1.0, 3.3, 99.0, 1e9, f64::NAN, f64::INFINITY] {
            let ticks = ticks(0.0, largest, 8.0);
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
                class: "reported",
                points: vec![(0.0, 1.0), (5.0, 9.0)],
                steps: false,
                marks: vec!["here".to_owned()],
            },
            Line {
                class: "predicted",
                points: vec![],
                steps: true,
                marks: vec![],
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
            ..Chart::default()
        }
        .svg();
        assert_eq!(svg.matches(r#"<path class="reported""#).count(), 1);
        assert!(svg.contains("1 &lt; 2") && !svg.contains("NaN"));
        assert!(svg.contains(">here</text>"));
    }

    #[test]
    fn a_line_ends_where_it_crosses_the_ceiling() {
        let line = [(1.0, 2.0), (2.0, 4.0), (3.0, 8.0), (4.0, 1.0)];
        let cut = cut_at_ceiling(&line, 5.0);
        assert_eq!(cut, [(1.0, 2.0), (2.0, 4.0), (2.25, 5.0)]);
        assert_eq!(cut_at_ceiling(&line, 9.0), line);
        assert_eq!(cut_at_ceiling(&line, 1.0), []);
    }
}
