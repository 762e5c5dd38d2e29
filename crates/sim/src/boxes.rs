//! Distributions side by side as SVG: a box for each, on one logarithmic axis.

use std::fmt::Write;

use crate::chart::escaped;
use crate::report::Latency;

const WIDTH: f64 = 860.0;
const LEFT: f64 = 130.0;
const RIGHT: f64 = 20.0;
const ROW: f64 = 18.0;
const BOTTOM: f64 = 34.0;

/// What is drawn of each: from the first quartile to the third, a line at the median and one on to
/// the 95th percentile, a dot at the 99th, and a ring at the mean.
pub(crate) fn svg(label: &str, distributions: &[(&str, Latency)]) -> String {
    let values = |it: &Latency| [it.mean, it.p25, it.p50, it.p75, it.p95, it.p99];
    let all = || {
        distributions
            .iter()
            .flat_map(|(_, it)| values(it))
            .filter(|&it| it > 0.0)
    };
    let least = all().fold(f64::INFINITY, f64::min).clamp(1e-6, 1e6);
    let most = all().fold(least * 1.01, f64::max);
    let (from, to) = (least.ln() - 0.05, most.ln() + 0.05);
    let x_of = |seconds: f64| {
        let share = (seconds.max(least).ln() - from) / (to - from);
        LEFT + share * (WIDTH - LEFT - RIGHT)
    };
    let bottom = ROW * distributions.len() as f64 + 4.0;
    let height = bottom + BOTTOM;
    let mut svg = format!(r#"<svg viewBox="0 0 {WIDTH} {height}" role="img">"#);
    // Writing to a string does not fail.
    let mut put = |piece: std::fmt::Arguments<'_>| {
        let _ = svg.write_fmt(piece);
    };
    for tick in log_ticks(least, most) {
        let (x, y) = (x_of(tick), bottom + 14.0);
        put(format_args!(
            r#"<path class="grid" d="M{x:.1} 0V{bottom}"/><text class="middle" x="{x:.1}" y="{y:.1}">{tick}</text>"#
        ));
    }
    for (number, (name, it)) in distributions.iter().enumerate() {
        let middle = ROW * (number as f64 + 0.5) + 2.0;
        let [mean, p25, p50, p75, p95, p99] = values(it).map(x_of);
        let (name, at, text) = (escaped(name), LEFT - 8.0, middle + 4.0);
        put(format_args!(
            r#"<text class="end" x="{at}" y="{text:.1}">{name}</text>"#
        ));
        let (top, low, wide) = (middle - 5.0, middle + 5.0, (p75 - p25).max(1.0));
        put(format_args!(
            r#"<path class="whisker" d="M{p75:.1} {middle:.1}H{p95:.1}"/><rect class="box" x="{p25:.1}" y="{top:.1}" width="{wide:.1}" height="10"/><path class="median" d="M{p50:.1} {top:.1}V{low:.1}"/>"#
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

/// Round numbers in a range, the fewer the wider it is.
fn log_ticks(least: f64, most: f64) -> Vec<f64> {
    let powers = least.log10().floor() as i32..=most.log10().ceil() as i32;
    let factors: &[f64] = match most / least {
        wide if wide > 1e3 => &[1.0],
        wide if wide > 10.0 => &[1.0, 2.0, 5.0],
        _ => &[1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
    };
    let inside = |tick: &f64| (least..=most).contains(tick);
    let ticks = powers.flat_map(|power| {
        // Divided, so that 0.05 is written as it is.
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
    ticks.filter(inside).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(log_ticks(0.03, 2.5), [0.05, 0.1, 0.2, 0.5, 1.0, 2.0]);
        assert_eq!(log_ticks(0.03, 99.0), [0.1, 1.0, 10.0]);
        assert_eq!(log_ticks(4.0, 17.0), [4.0, 5.0, 6.0, 8.0, 10.0, 15.0]);
    }

    #[test]
    fn each_distribution_has_a_box_and_nothing_is_beside_the_axes() {
        let some = Latency::of(&mut [0.1, 0.5, 3.0]);
        let svg = svg("seconds", &[("a<b", some), ("empty", Latency::default())]);
        assert_eq!(svg.matches("class=\"box\"").count(), 2);
        assert!(svg.contains("a&lt;b") && !svg.contains("NaN") && !svg.contains("inf"));
        let nothing = super::svg("seconds", &[]);
        assert!(
            !nothing.contains("NaN") && !nothing.contains("inf"),
            "{nothing}"
        );
    }
}
