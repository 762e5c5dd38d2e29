//! HTML page of a grid: one file without external resources, charts before tables.

use std::fmt::Write;

use foresee_core::DEFAULT_TTFT_WEIGHT;

use crate::box_plot;
use crate::chart::{Chart, Line, escaped};
use crate::grid::{
    END_TO_END, GOODPUT, Grid, GridMeasure, HITS, ITL, ITL_P99, MEASURES, OverRows, Row, TTFT,
    TTFT_P99,
};
use crate::page;
use crate::table::shown_mean;
use foresee_sim::measures::Summary;
use foresee_sim::outcome::{Latency, Outcome};

/// Classes of the lines of a chart, in the order of the policies.
const LINE_CLASSES: [&str; 24] = [
    "line c0",
    "line c1",
    "line c2",
    "line c3",
    "line c4",
    "line c5",
    "line c6",
    "line c7",
    "line c0 dash",
    "line c1 dash",
    "line c2 dash",
    "line c3 dash",
    "line c4 dash",
    "line c5 dash",
    "line c6 dash",
    "line c7 dash",
    "line c0 dots",
    "line c1 dots",
    "line c2 dots",
    "line c3 dots",
    "line c4 dots",
    "line c5 dots",
    "line c6 dots",
    "line c7 dots",
];

/// Value at which a line of a chart ends, relative to the smallest value of the chart. Beyond its
/// capacity, a policy's times depend only on how long the traffic lasts.
const CEILING_RATIO: f64 = 6.0;

impl Grid {
    /// Returns the page as HTML.
    #[must_use]
    pub fn html(&self) -> String {
        let title = match &self.rows[..] {
            [row] => format!("{}, {} workers", row.report.workload, row.report.workers),
            rows if rows.iter().all(|row| row.rate.is_some()) => {
                let workload = rows.first().map_or("", |row| &row.report.workload);
                format!("{workload} at {} rates", rows.len())
            }
            rows => format!("{} scenarios, {} policies", rows.len(), self.policies.len()),
        };
        let mut body = String::new();
        body.push_str(&self.by_rate());
        if self.rows.len() > 1 {
            for (measure, heading) in [
                (
                    END_TO_END,
                    "End-to-end latency, mean, relative to the best in the row",
                ),
                (GOODPUT, "Requests within the SLO, %"),
                (
                    TTFT_P99,
                    "Time to first token, 99th percentile, relative to the best in the row",
                ),
                (
                    TTFT,
                    "Time to first token, mean, relative to the best in the row",
                ),
                (
                    ITL_P99,
                    "Inter-token latency, 99th percentile, relative to the best in the row",
                ),
                (HITS, "Cached prompt tokens, %"),
            ] {
                body.push_str(&self.heat(measure, heading));
            }
        }
        body.push_str(&self.frontier());
        body.push_str(&self.ablations());
        body.push_str(&self.forecast_error_table());
        for row in &self.rows {
            body.push_str(&self.distributions(row));
        }
        body.push_str(&self.footer());
        page::framed(&title, "wide", &body)
    }

    /// Returns charts of the measures over the arrival rate, with a line for each policy. Empty
    /// unless there are several rows and all have a rate. Lines of times end at [`CEILING_RATIO`].
    fn by_rate(&self) -> String {
        if self.rows.len() < 2 || self.rows.iter().any(|row| row.rate.is_none()) {
            return String::new();
        }
        let mut html = String::from("<h2>By arrival rate</h2>");
        let policies = self.policies.iter().zip(LINE_CLASSES.iter().cycle());
        html.push_str("<p class=\"legend\">");
        for (policy, class) in policies.clone() {
            let policy = escaped(policy);
            let _ = write!(
                html,
                "<span><svg viewBox=\"0 0 26 10\"><path class=\"{class}\" d=\"M0 5H26\"/></svg>{policy}</span>"
            );
        }
        html.push_str("</p>");
        for (measure, label, scale) in [
            (END_TO_END, "end-to-end latency, mean, s", 1.0),
            (TTFT_P99, "time to first token, p99, s", 1.0),
            (ITL, "inter-token latency, mean, ms", 1e3),
            (GOODPUT, "requests within SLO, %", 100.0),
            (HITS, "cached prompt tokens, %", 100.0),
        ] {
            let line = |(policy, class): (&String, &&'static str)| {
                let point = |row: &Row| {
                    let value = row.report.summary_of(measure.name, policy)?.mean * scale;
                    Some((row.rate?, value))
                };
                let mut points: Vec<(f64, f64)> = self.rows.iter().filter_map(point).collect();
                points.sort_by(|a, b| a.0.total_cmp(&b.0));
                Line {
                    class,
                    points,
                    steps: false,
                    marks: Vec::new(),
                }
            };
            let lines: Vec<Line> = policies.clone().map(line).collect();
            let points = || lines.iter().flat_map(|line| &line.points);
            let smallest = points().map(|point| point.1).fold(f64::INFINITY, f64::min);
            let is_time = measure.over_rows == OverRows::Ratio;
            let chart = Chart {
                x_label: "arrival rate, relative to the traffic's own",
                y_label: label,
                lines: &lines,
                origin: (
                    points().map(|point| point.0).fold(f64::INFINITY, f64::min),
                    0.0,
                ),
                ceiling: is_time.then_some(CEILING_RATIO * smallest),
                ..Chart::default()
            };
            let _ = write!(html, "<figure>{}</figure>", chart.svg());
        }
        html
    }

    /// Returns a heat map of a measure: a table with a colour for each cell's distance to the best
    /// in its row. Every row must have a result of every policy. `heading` must be HTML.
    fn heat(&self, measure: GridMeasure, heading: &str) -> String {
        let mut html =
            format!("<h2>{heading}</h2><div class=\"scroll\"><table class=\"heat\"><tr><th>");
        for policy in &self.policies {
            let _ = write!(html, "<th class=\"up\"><span>{}</span>", escaped(policy));
        }
        for row in &self.rows {
            let (name, what) = (escaped(&row.name), escaped(&row.description));
            let _ = write!(html, "<tr><td title=\"{what}\">{name}");
            let summaries = || {
                let policies = self.policies.iter();
                policies.filter_map(|policy| row.report.summary_of(measure.name, policy))
            };
            let best = summaries().find(|summary| summary.is_best);
            let best = best.map_or(0.0, |summary| summary.mean);
            for summary in summaries() {
                html.push_str(&cell(measure, summary, best));
            }
        }
        let label = match measure.over_rows {
            OverRows::Ratio => format!("geometric mean, relative to {}", self.reference),
            OverRows::Points => format!("mean difference to {}, points", self.reference),
        };
        let _ = write!(html, "<tr class=\"sum\"><td>{}", escaped(&label));
        for policy in &self.policies {
            let value = self.over_rows(measure, policy, &self.reference);
            let value = value.map_or(String::new(), |value| format_comparison(measure, value));
            let _ = write!(html, "<td>{value}");
        }
        html.push_str("<tr><td>rows best or tied");
        for policy in &self.policies {
            let _ = write!(html, "<td>{}", self.firsts(measure, policy));
        }
        html.push_str("</table></div>");
        html
    }

    /// Returns a chart of time to first token over end-to-end latency, with a point for each weight
    /// of `marginal-delay`. Empty if there are fewer than two weights. Policies with another queue
    /// order than the first policy are left out.
    fn frontier(&self) -> String {
        // Only policies with the queue order of the first policy are comparable.
        let first = self.policies.first();
        let order = first.and_then(|policy| policy.find('+').map(|at| &policy[at..]));
        let weight = |policy: &str| match policy.strip_suffix(order.unwrap_or_default())? {
            "marginal-delay" => Some(DEFAULT_TTFT_WEIGHT),
            policy => policy
                .strip_prefix("marginal-delay:ttft=")?
                .parse::<f64>()
                .ok(),
        };
        let by_weight = self
            .policies
            .iter()
            .filter_map(|policy| Some((weight(policy)?, policy.as_str())));
        let mut by_weight: Vec<(f64, &str)> = by_weight.collect();
        by_weight.sort_by(|a, b| a.0.total_cmp(&b.0));
        if by_weight.len() < 2 {
            return String::new();
        }
        let line = |measure, class| {
            let compared = |measure, policy| self.over_rows(measure, policy, &self.reference);
            let policies = by_weight.iter();
            Line {
                class,
                points: policies
                    .filter_map(|(_, policy)| {
                        Some((compared(END_TO_END, policy)?, compared(measure, policy)?))
                    })
                    .collect(),
                steps: false,
                marks: by_weight
                    .iter()
                    .map(|(weight, _)| weight.to_string())
                    .collect(),
            }
        };
        let lines = [line(TTFT, LINE_CLASSES[0]), line(TTFT_P99, LINE_CLASSES[1])];
        let points = || lines.iter().flat_map(|line| &line.points);
        let chart = Chart {
            x_label: "end-to-end latency, mean, relative",
            y_label: "time to first token, relative",
            lines: &lines,
            origin: (
                points().map(|point| point.0).fold(f64::INFINITY, f64::min) - 0.002,
                points().map(|point| point.1).fold(f64::INFINITY, f64::min),
            ),
            ..Chart::default()
        };
        format!(
            "<h2>Effect of --ttft-weight</h2><p class=\"legend\"><span><svg viewBox=\"0 0 26 10\">\
             <path class=\"{}\" d=\"M0 5H26\"/></svg>mean</span><span><svg viewBox=\"0 0 26 10\">\
             <path class=\"{}\" d=\"M0 5H26\"/></svg>99th percentile</span><span>One point per \
             weight. Geometric means over all rows, relative to {}.</span></p><figure>{}</figure>",
            LINE_CLASSES[0],
            LINE_CLASSES[1],
            escaped(&self.reference),
            chart.svg()
        )
    }

    /// Returns a table of the policies `marginal-delay:no-*`, compared with `marginal-delay`. Empty
    /// if there are none. Cells are empty if a row has no result of `marginal-delay`.
    fn ablations(&self) -> String {
        let mut rows = String::new();
        for policy in self
            .policies
            .iter()
            .filter(|policy| policy.starts_with("marginal-delay:no-"))
        {
            let term = &policy["marginal-delay:no-".len()..];
            let _ = write!(rows, "<tr><td>{}", escaped(term));
            for measure in MEASURES {
                let value = self.over_rows(measure, policy, "marginal-delay");
                let value = value.map_or(String::new(), |value| format_comparison(measure, value));
                let _ = write!(rows, "<td>{value}");
            }
            let ratios = self.rows.iter().filter_map(|row| {
                let mean_of = |policy| Some(row.report.summary_of(END_TO_END.name, policy)?.mean);
                let ratio = mean_of(policy)? / mean_of("marginal-delay")?.max(1e-9);
                Some((ratio, &row.name))
            });
            let worst = ratios.max_by(|a, b| a.0.total_cmp(&b.0));
            if let Some((ratio, row)) = worst {
                let _ = write!(rows, "<td>{ratio:.2} {}", escaped(row));
            }
        }
        if rows.is_empty() {
            return String::new();
        }
        let mut html = String::from(
            "<h2>Ablations</h2><p><code>marginal-delay</code> without one of its terms, and \
             without replication, compared with <code>marginal-delay</code>. Times are geometric \
             means of the ratios over all rows, fractions are mean differences in percentage \
             points.</p>\
             <div class=\"scroll\"><table class=\"heat\"><tr><th>without",
        );
        for measure in MEASURES {
            let name = measure.name.split(',').next().unwrap_or_default();
            let _ = write!(html, "<th>{}", escaped(name));
        }
        let _ = write!(html, "<th>end to end, worst row{rows}</table></div>");
        html
    }

    /// Returns a table of the accuracy of the first policy's forecasts.
    fn forecast_error_table(&self) -> String {
        let (columns, rows) = self.forecast_errors();
        let policy = escaped(self.policies.first().map_or("", String::as_str));
        let mut html = format!(
            "<h2>Forecast errors</h2><p>Mean absolute errors of the router's forecasts under \
             <code>{policy}</code>, in % of the true value: prefill time of a prompt of 1,000 \
             tokens, duration of a decode step, time to first token, and number of output tokens. \
             <i>New speed</i> is the time until a worker's changed speed is known to 10 %, in \
             seconds. <i>Actual/forecast</i> is the ratio of generated to forecast output tokens.\
             </p><div class=\"scroll\"><table class=\"heat\"><tr><th>"
        );
        for column in columns {
            let _ = write!(html, "<th>{}", escaped(column));
        }
        for (row, cells) in rows {
            let _ = write!(html, "<tr><td>{}", escaped(row));
            for cell in cells {
                let _ = write!(html, "<td>{}", escaped(&cell));
            }
        }
        html.push_str("</table></div>");
        html
    }

    /// Returns box plots of a row's latencies with the first seed. If it is the only row, fractions
    /// and active blocks follow; otherwise the plots are folded under the row's name.
    fn distributions(&self, row: &Row) -> String {
        let seeds = row.report.seeds.max(1);
        let first_seeds = || row.report.outcomes.iter().step_by(seeds);
        let mut html = String::new();
        for (label, latency_of) in [
            (
                "time to first token, s",
                (|outcome| outcome.time_to_first_token) as LatencyOf,
            ),
            ("inter-token latency, s", |outcome| {
                outcome.inter_token_latency
            }),
            ("end-to-end latency, s", |outcome| outcome.end_to_end),
        ] {
            let outcomes = first_seeds();
            let distributions: Vec<_> = outcomes
                .map(|outcome| (outcome.policy.as_str(), latency_of(outcome)))
                .collect();
            let plot = box_plot::svg(label, &distributions);
            let _ = write!(html, "<figure>{plot}</figure>");
        }
        if self.rows.len() == 1 {
            html.push_str(&self.fractions(row));
            html.push_str(&active_blocks(row));
            return format!("{}{html}", Self::LEGEND);
        }
        let (name, what) = (escaped(&row.name), escaped(&row.description));
        format!(
            "<details><summary><b>{name}</b> {what}</summary>{}{html}</details>",
            Self::LEGEND
        )
    }

    /// Legend of the box plots.
    const LEGEND: &str = "<p class=\"small\">Box: first to third quartile. Bar: median. \
        Ring: mean. Line: up to the 95th percentile. Dot: 99th percentile. Seed 0.</p>";

    /// Returns a table of the measures that have no box plot. A fraction without a result is shown
    /// as 0.
    fn fractions(&self, row: &Row) -> String {
        let mut html = String::from(
            "<table><tr><th>policy<th>requests within SLO<th><th>cached prompt tokens<th>\
             <th>output tokens/s<th>preemptions",
        );
        for policy in &self.policies {
            let _ = write!(html, "<tr><td>{}", escaped(policy));
            for measure in [GOODPUT, HITS] {
                let summary = row.report.summary_of(measure.name, policy);
                let fraction = summary.map_or(0.0, |summary| summary.mean);
                let fraction = fraction.clamp(0.0, 1.0);
                let width = fraction * 120.0;
                let _ = write!(
                    html,
                    "<td>{:.1} %<td><svg class=\"meter\" viewBox=\"0 0 120 8\"><rect class=\"empty\" \
                     width=\"120\" height=\"8\"/><rect width=\"{width:.1}\" height=\"8\"/></svg>",
                    fraction * 100.0
                );
            }
            for measure in ["output tokens/s", "preemptions"] {
                let summary = row.report.summary_of(measure, policy);
                let _ = write!(html, "<td>{}", summary.map_or(String::new(), shown_mean));
            }
        }
        html.push_str("</table>");
        html
    }

    /// Returns the notes at the end of the page: SLO, seeds, skipped cases and speed.
    fn footer(&self) -> String {
        let mut html = String::from("<p class=\"small\">");
        if let Some(row) = self.rows.first() {
            let seeds = row.report.seeds;
            let _ = write!(
                html,
                "SLO {}; means over {seeds} seeds. ",
                escaped(&row.report.slo.to_string())
            );
        }
        let _ = write!(
            html,
            "Bold: best in the row, or not significantly worse (95 %, paired by seed). {:.0} s of \
             traffic simulated in {:.0} s, {:.0} times real time.",
            self.virtual_seconds,
            self.real_seconds,
            self.virtual_seconds / self.real_seconds.max(1e-9)
        );
        for note in &self.skipped {
            let _ = write!(html, " Left out: {}.", escaped(note));
        }
        html.push_str("</p>");
        html
    }
}

/// Selects a distribution of an outcome.
type LatencyOf = fn(&Outcome) -> Latency;

/// Returns a cell of a heat map: its colour shows how far the value is from `best`, the mean of the
/// row's best policy. Times are shown relative to it, fractions as they are.
fn cell(measure: GridMeasure, summary: &Summary, best: f64) -> String {
    let (text, limits, distance) = match measure.over_rows {
        OverRows::Ratio => {
            let ratio = summary.mean / best.max(1e-9);
            let text = if ratio < 9.995 {
                format!("{ratio:.2}")
            } else {
                format!("{ratio:.0}")
            };
            (text, [1.01, 1.03, 1.1, 1.25, 1.6, 2.5], ratio)
        }
        OverRows::Points => {
            let difference = best - summary.mean;
            let limits = [0.005, 0.02, 0.05, 0.1, 0.2, 0.4];
            (shown_mean(summary), limits, difference)
        }
    };
    let heat = limits.iter().filter(|&&limit| distance > limit).count();
    let first = if summary.is_first() { " first" } else { "" };
    format!(
        "<td class=\"h{heat}{first}\" title=\"{}\">{text}",
        shown_mean(summary)
    )
}

/// Formats a ratio, or a difference in percentage points.
fn format_comparison(measure: GridMeasure, value: f64) -> String {
    match measure.over_rows {
        OverRows::Ratio => format!("{value:.3}"),
        OverRows::Points => format!("{:+.1}", value * 100.0),
    }
}

/// Returns a chart of each worker's active blocks over time, predicted and actual, under the first
/// policy with the first seed. Empty if they were not recorded.
fn active_blocks(row: &Row) -> String {
    let Some(outcome) = row
        .report
        .outcomes
        .first()
        .filter(|outcome| !outcome.active_blocks.is_empty())
    else {
        return String::new();
    };
    let mut html = format!(
        "<h2>Active blocks under {}</h2><p>Blocks that requests pin, shared prefixes counted once: \
         <span class=\"key predicted\">predicted</span> by the router, and \
         <span class=\"key reported\">pinned</span> in the engine. The prediction includes requests \
         that still wait in the engine.</p>",
        escaped(&outcome.policy)
    );
    for worker in 0..row.report.workers {
        let points = |blocks_of: fn(&(u64, u32)) -> f64| {
            let instants = outcome.active_blocks.iter();
            instants
                .filter_map(|instant| {
                    let blocks = blocks_of(instant.workers.get(worker)?);
                    Some((instant.seconds, blocks))
                })
                .collect()
        };
        let line = |class, points| Line {
            class,
            points,
            steps: false,
            marks: Vec::new(),
        };
        let lines = [
            line("line reported", points(|(_, pinned)| f64::from(*pinned))),
            line("line predicted", points(|(predicted, _)| *predicted as f64)),
        ];
        let chart = Chart {
            x_label: "seconds",
            y_label: "blocks",
            lines: &lines,
            ..Chart::default()
        };
        let _ = write!(
            html,
            "<figure><figcaption><b>worker {worker}</b></figcaption>{}</figure>",
            chart.svg()
        );
    }
    html
}
