//! Box plots as SVG: one box for each distribution, on a common logarithmic axis.

use std::fmt::Write;

use crate::chart::escaped;
use foresee_sim::outcome::Latency;

/// Width of the picture.
const WIDTH: f64 = 860.0;
/// Width of the column with the names of the distributions.
const LEFT: f64 = 130.0;
/// Right margin.
const RIGHT: f64 = 20.0;
/// Height of one distribution.
const ROW: f64 = 18.0;
/// Height of the axis with its label.
const BOTTOM: f64 = 34.0;

/// Returns an `<svg>` element with one row for each name and distribution, and `label` below the
/// axis.
///
/// A box reaches from the first to the third quartile, with a bar at the median. A whisker
/// continues to the 95th percentile. A dot marks the 99th percentile, a ring the mean. Values of 0
/// are drawn at the smallest positive value.
pub(crate) fn svg(label: &str, distributions: &[(&str, Latency)]) -> String {
    let values = |latency: &Latency| {
        let Latency {
            mean,
            p25,
            p50,
            p75,
            p95,
            p99,
            ..
        } = *latency;
        [mean, p25, p50, p75, p95, p99]
    };
    let positive_values = || {
        distributions
            .iter()
            .flat_map(|(_, latency)| values(latency))
            .filter(|&value| value > 0.0)
    };
    let smallest = positive_values().fold(f64::INFINITY, f64::min);
    let smallest = smallest.clamp(1e-6, 1e6);
    let largest = positive_values().fold(smallest * 1.01, f64::max);
    let (from, to) = (smallest.ln() - 0.05, largest.ln() + 0.05);
    let x_of = |seconds: f64| {
        let fraction = (seconds.max(smallest).ln() - from) / (to - from);
        LEFT + fraction * (WIDTH - LEFT - RIGHT)
    };
    let bottom = ROW * distributions.len() as f64 + 4.0;
    let height = bottom + BOTTOM;
    let mut svg = format!(r#"<svg viewBox="0 0 {WIDTH} {height}" role="img">"#);
    // Writing to a string cannot fail.
    let mut put = |text: std::fmt::Arguments<'_>| {
        let _ = svg.write_fmt(text);
    };
    for tick in log_ticks(smallest, largest) {
        let (x, y) = (x_of(tick), bottom + 14.0);
        put(format_args!(
            r#"<path class="grid" d="M{x:.1} 0V{bottom}"/><text class="middle" x="{x:.1}" y="{y:.1}">{tick}</text>"#
        ));
    }
    for (row, (name, latency)) in distributions.iter().enumerate() {
        let middle = ROW * (row as f64 + 0.5) + 2.0;
        let [mean, p25, p50, p75, p95, p99] = values(latency).map(x_of);
        let (name, x, y) = (escaped(name), LEFT - 8.0, middle + 4.0);
        put(format_args!(
            r#"<text class="end" x="{x}" y="{y:.1}">{name}</text>"#
        ));
        let (top, low, width) = (middle - 5.0, middle + 5.0, (p75 - p25).max(1.0));
        put(format_args!(
            r#"<path class="whisker" d="M{p75:.1} {middle:.1}H{p95:.1}"/><rect class="box" x="{p25:.1}" y="{top:.1}" width="{width:.1}" height="10"/><path class="median" d="M{p50:.1} {top:.1}V{low:.1}"/>"#
        ));
        put(format_args!(
            r#"<circle class="tail" cx="{p99:.1}" cy="{middle:.1}" r="2.5"/><circle class="mean" cx="{mean:.1}" cy="{middle:.1}" r="3"/>"#
        ));
    }
    let (x, y) = ((LEFT + WIDTH) / 2.0, height - 4.0);
    let label = escaped(label);
    put(format_args!(
        r#"<text class="middle" x="{x}" y="{y}">{label}</text></svg>"#
    ));
    svg
}

/// Returns round numbers between `smallest` and `largest`, which must be positive. A wider range
/// has fewer of them per decade.
fn log_ticks(smallest: f64, largest: f64) -> Vec<f64> {
    let powers = smallest.log10().floor() as i32..=largest.log10().ceil() as i32;
    let factors: &[f64] = match largest / smallest {
        ratio if ratio > 1e3 => &[1.0],
        ratio if ratio > 10.0 => &[1.0, 2.0, 5.0],
        _ => &[1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
    };
    let is_inside = |tick: &f64| (smallest..=largest).contains(tick);
    let ticks = powers.flat_map(|power| {
        // A negative power is applied as a division, so that 0.05 prints as 0.05.
        let scale = 10_f64.powi(power.abs());
        let tick = move |&factor: &f64| {
            if power < 0 {
                factor / scale
            } else {
                factor * scale
            }
        };
        factors.iter().map(tick)
    });
    ticks.filter(is_inside).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside_the_range() {
        assert_eq!(log_ticks(0.03, 2.5), [0.05, 0.1, 0.2, 0.5, 1.0, 2.0]);
        assert_eq!(log_ticks(0.03, 99.0), [0.1, 1.0, 10.0]);
        assert_eq!(log_ticks(4.0, 17.0), [4.0, 5.0, 6.0, 8.0, 10.0, 15.0]);
    }

    #[test]
    fn each_distribution_has_a_box_and_all_coordinates_are_finite() {
        let latency = Latency::of(&mut [0.1, 0.5, 3.0]);
        let svg = svg(
            "seconds",
            &[("a<b", latency), ("empty", Latency::default())],
        );
        assert_eq!(svg.matches("class=\"box\"").count(), 2);
        assert!(svg.contains("a&lt;b") && !svg.contains("NaN") && !svg.contains("inf"));
        let empty = super::svg("seconds", &[]);
        assert!(!empty.contains("NaN") && !empty.contains("inf"), "{empty}");
    }
}
