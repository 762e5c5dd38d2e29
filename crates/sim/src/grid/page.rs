//! A grid as one page that needs nothing else: pictures first.

use std::fmt::Write;

use foresee_core::DEFAULT_TTFT_WEIGHT;

use crate::boxes;
use crate::chart::{Chart, Line, escaped};
use crate::grid::{
    END_TO_END, GOODPUT, Grid, HITS, ITL, ITL_P99, OverRows, Row, SHOWN, Shown, TTFT, TTFT_P99,
};
use crate::page;
use crate::report::Summary;

/// How the lines of a chart look, in the order of the policies.
const LINES: [&str; 24] = [
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

/// Lines end at so many times the least of a chart: beyond the knee, how far they rise says only
/// how long the traffic lasts.
const CEILING: f64 = 6.0;

impl Grid {
    /// The page, as HTML.
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
            for (shown, heading) in [
                (
                    END_TO_END,
                    "Mean time from arrival to last token, over the best in its row",
                ),
                (GOODPUT, "Requests within the SLO, %"),
                (
                    TTFT_P99,
                    "99th percentile of the time to first token, over the best in its row",
                ),
                (TTFT, "Mean time to first token, over the best in its row"),
                (
                    ITL_P99,
                    "99th percentile of the time between tokens, over the best in its row",
                ),
                (HITS, "Prompt tokens found in a cache, %"),
            ] {
                body.push_str(&self.heat(shown, heading));
            }
        }
        body.push_str(&self.frontier());
        body.push_str(&self.ablations());
        body.push_str(&self.what_was_learned());
        for row in &self.rows {
            body.push_str(&self.distributions(row));
        }
        body.push_str(&self.footer());
        page::framed(&title, "wide", &body)
    }

    /// A line for each policy, where rows are rates.
    fn by_rate(&self) -> String {
        if self.rows.len() < 2 || self.rows.iter().any(|row| row.rate.is_none()) {
            return String::new();
        }
        let mut html = String::from("<h2>Against rate</h2>");
        let policies = self.policies.iter().zip(LINES.iter().cycle());
        html.push_str("<p class=\"legend\">");
        for (policy, class) in policies.clone() {
            let policy = escaped(policy);
            let _ = write!(
                html,
                "<span><svg viewBox=\"0 0 26 10\"><path class=\"{class}\" d=\"M0 5H26\"/></svg>{policy}</span>"
            );
        }
        html.push_str("</p>");
        for (shown, label, scale) in [
            (END_TO_END, "end to end, mean, s", 1.0),
            (TTFT_P99, "TTFT, p99, s", 1.0),
            (ITL, "ITL, mean, ms", 1e3),
            (GOODPUT, "within SLO, %", 100.0),
            (HITS, "prefix hits, %", 100.0),
        ] {
            let line = |(policy, class): (&String, &&'static str)| {
                let point = |row: &Row| {
                    let value = row.report.summary_of(shown.measure, policy)?.mean * scale;
                    Some((row.rate?, value))
                };
                let mut points: Vec<(f64, f64)> = self.rows.iter().filter_map(point).collect();
                points.sort_by(|one, other| one.0.total_cmp(&other.0));
                Line {
                    class,
                    points,
                    steps: false,
                    marks: Vec::new(),
                }
            };
            let lines: Vec<Line> = policies.clone().map(line).collect();
            let points = || lines.iter().flat_map(|line| &line.points);
            let least = points().map(|point| point.1).fold(f64::INFINITY, f64::min);
            let is_share = shown.over_rows == OverRows::Points;
            let chart = Chart {
                x_label: "rate, times the traffic's own",
                y_label: label,
                lines: &lines,
                origin: (
                    points().map(|point| point.0).fold(f64::INFINITY, f64::min),
                    0.0,
                ),
                ceiling: (!is_share).then_some(CEILING * least),
                ..Chart::default()
            };
            let _ = write!(html, "<figure>{}</figure>", chart.svg());
        }
        html
    }

    /// A table whose cells are the darker the worse.
    fn heat(&self, shown: Shown, heading: &str) -> String {
        let mut html =
            format!("<h2>{heading}</h2><div class=\"scroll\"><table class=\"heat\"><tr><th>");
        for policy in &self.policies {
            let _ = write!(html, "<th class=\"up\"><span>{}</span>", escaped(policy));
        }
        for row in &self.rows {
            let (name, what) = (escaped(&row.name), escaped(&row.what));
            let _ = write!(html, "<tr><td title=\"{what}\">{name}");
            let summaries = || {
                let policies = self.policies.iter();
                policies.filter_map(|policy| row.report.summary_of(shown.measure, policy))
            };
            let best = summaries().find(|it| it.is_best).map_or(0.0, |it| it.mean);
            for summary in summaries() {
                html.push_str(&cell(shown, summary, best));
            }
        }
        let label = match shown.over_rows {
            OverRows::Ratio => format!("geometric mean, over {}", self.reference),
            OverRows::Points => format!("mean, less {}'s", self.reference),
        };
        let _ = write!(html, "<tr class=\"sum\"><td>{}", escaped(&label));
        for policy in &self.policies {
            let over = self.over_rows(shown, policy, &self.reference);
            let _ = write!(
                html,
                "<td>{}",
                over.map_or(String::new(), |it| compared(shown, it))
            );
        }
        html.push_str("<tr><td>rows first or tied");
        for policy in &self.policies {
            let _ = write!(html, "<td>{}", self.firsts(shown, policy));
        }
        html.push_str("</table></div>");
        html
    }

    /// How time to first token and time to the end trade against each other.
    fn frontier(&self) -> String {
        // Those in one order of sending, that of the first policy.
        let first = self.policies.first();
        let order = first.and_then(|it| it.find('+').map(|at| &it[at..]));
        let weight = |policy: &str| match policy.strip_suffix(order.unwrap_or_default())? {
            "delay" => Some(DEFAULT_TTFT_WEIGHT),
            policy => policy.strip_prefix("delay:ttft=")?.parse::<f64>().ok(),
        };
        let weighed = self
            .policies
            .iter()
            .filter_map(|it| Some((weight(it)?, it.as_str())));
        let mut weighed: Vec<(f64, &str)> = weighed.collect();
        weighed.sort_by(|one, other| one.0.total_cmp(&other.0));
        if weighed.len() < 2 {
            return String::new();
        }
        let line = |shown, class| {
            let over = |shown, policy| self.over_rows(shown, policy, &self.reference);
            let points = weighed.iter();
            Line {
                class,
                points: points
                    .filter_map(|(_, policy)| {
                        Some((over(END_TO_END, policy)?, over(shown, policy)?))
                    })
                    .collect(),
                steps: false,
                marks: weighed
                    .iter()
                    .map(|(weight, _)| weight.to_string())
                    .collect(),
            }
        };
        let lines = [line(TTFT, LINES[0]), line(TTFT_P99, LINES[1])];
        let points = || lines.iter().flat_map(|line| &line.points);
        let chart = Chart {
            x_label: "mean time from arrival to last token",
            y_label: "time to first token",
            lines: &lines,
            origin: (
                points().map(|point| point.0).fold(f64::INFINITY, f64::min) - 0.002,
                points().map(|point| point.1).fold(f64::INFINITY, f64::min),
            ),
            ..Chart::default()
        };
        format!(
            "<h2>What --ttft-weight buys</h2><p class=\"legend\"><span><svg viewBox=\"0 0 26 10\">\
             <path class=\"{}\" d=\"M0 5H26\"/></svg>mean</span><span><svg viewBox=\"0 0 26 10\">\
             <path class=\"{}\" d=\"M0 5H26\"/></svg>99th percentile</span><span>each point a \
             weight; geometric means over all rows, over {}</span></p><figure>{}</figure>",
            LINES[0],
            LINES[1],
            escaped(&self.reference),
            chart.svg()
        )
    }

    /// What each term of the cost in seconds is worth.
    fn ablations(&self) -> String {
        let mut rows = String::new();
        for policy in self
            .policies
            .iter()
            .filter(|it| it.starts_with("delay:no-"))
        {
            let _ = write!(rows, "<tr><td>{}", escaped(&policy["delay:no-".len()..]));
            for shown in SHOWN {
                let over = self.over_rows(shown, policy, "delay");
                let _ = write!(
                    rows,
                    "<td>{}",
                    over.map_or(String::new(), |it| compared(shown, it))
                );
            }
            let worst = self.rows.iter().filter_map(|row| {
                let of = |policy| row.report.summary_of(END_TO_END.measure, policy);
                Some((of(policy)?.mean / of("delay")?.mean.max(1e-9), &row.name))
            });
            let worst = worst.max_by(|one, other| one.0.total_cmp(&other.0));
            if let Some((ratio, row)) = worst {
                let _ = write!(rows, "<td>{ratio:.2} {}", escaped(row));
            }
        }
        if rows.is_empty() {
            return String::new();
        }
        let mut html = String::from(
            "<h2>What each term is worth</h2><p><code>delay</code> without it, over \
             <code>delay</code>: times in geometric mean over all rows, shares in points.</p>\
             <div class=\"scroll\"><table class=\"heat\"><tr><th>without",
        );
        for shown in SHOWN {
            let name = shown.measure.split(',').next().unwrap_or_default();
            let _ = write!(html, "<th>{}", escaped(name));
        }
        let _ = write!(html, "<th>end to end, worst row{rows}</table></div>");
        html
    }

    /// How far what was learned is from the truth.
    fn what_was_learned(&self) -> String {
        let (columns, rows) = self.learned();
        let policy = escaped(self.policies.first().map_or("", String::as_str));
        let mut html = format!(
            "<h2>What was learned</h2><p>What the router of <code>{policy}</code> took its workers \
             to take, less what they took, in % of that: for a prompt of 1,000 tokens and for a \
             step that decodes (means over workers and time), until a first token, and how long \
             answers were; and how soon it knew a worker's new speed to a tenth.</p>\
             <div class=\"scroll\"><table class=\"heat\"><tr><th>"
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

    /// How times spread under each policy, and how a fleet's memory was used.
    fn distributions(&self, row: &Row) -> String {
        let seeds = row.report.seeds.max(1);
        let firsts = || row.report.outcomes.iter().step_by(seeds);
        let mut html = String::new();
        for (label, of) in [
            (
                "time to first token, s",
                (|it| it.time_to_first_token) as Of,
            ),
            ("time between tokens, s", |it| it.inter_token_latency),
            ("from arrival to last token, s", |it| it.end_to_end),
        ] {
            let each: Vec<_> = firsts().map(|it| (it.policy.as_str(), of(it))).collect();
            let _ = write!(html, "<figure>{}</figure>", boxes::svg(label, &each));
        }
        if self.rows.len() == 1 {
            html.push_str(&self.shares(row));
            html.push_str(&active_blocks(row));
            return format!("{}{html}", Self::LEGEND);
        }
        let (name, what) = (escaped(&row.name), escaped(&row.what));
        format!(
            "<details><summary><b>{name}</b> {what}</summary>{}{html}</details>",
            Self::LEGEND
        )
    }

    const LEGEND: &str = "<p class=\"small\">Boxes reach from the first quartile to the third, \
        lines from there to the 95th percentile, with a dot at the 99th; a bar at the median, a \
        ring at the mean. Seed 0.</p>";

    fn shares(&self, row: &Row) -> String {
        let mut html = String::from(
            "<table><tr><th>policy<th>within SLO<th><th>prefix hits<th><th>output tokens/s\
             <th>preemptions",
        );
        for policy in &self.policies {
            let _ = write!(html, "<tr><td>{}", escaped(policy));
            for shown in [GOODPUT, HITS] {
                let summary = row.report.summary_of(shown.measure, policy);
                let share = summary.map_or(0.0, |it| it.mean).clamp(0.0, 1.0);
                let wide = share * 120.0;
                let _ = write!(
                    html,
                    "<td>{:.1} %<td><svg class=\"meter\" viewBox=\"0 0 120 8\"><rect class=\"empty\" \
                     width=\"120\" height=\"8\"/><rect width=\"{wide:.1}\" height=\"8\"/></svg>",
                    share * 100.0
                );
            }
            for measure in ["output tokens/s", "preemptions"] {
                let summary = row.report.summary_of(measure, policy);
                let _ = write!(
                    html,
                    "<td>{}",
                    summary.map_or(String::new(), Summary::shown)
                );
            }
        }
        html.push_str("</table>");
        html
    }

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
            "Bold: the best of its row, or as good but for luck (95 %, paired by seed). {:.0} s of \
             traffic in {:.0} s, {:.0} times real time.",
            self.virtual_seconds,
            self.real_seconds,
            self.virtual_seconds / self.real_seconds.max(1e-9)
        );
        for note in &self.left_out {
            let _ = write!(html, " Left out: {}.", escaped(note));
        }
        html.push_str("</p>");
        html
    }
}

/// One of an outcome's distributions.
type Of = fn(&crate::report::Outcome) -> crate::report::Latency;

fn cell(shown: Shown, summary: &Summary, best: f64) -> String {
    let (text, limits, worse) = match shown.over_rows {
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
            let behind = best - summary.mean;
            (summary.shown(), [0.005, 0.02, 0.05, 0.1, 0.2, 0.4], behind)
        }
    };
    let heat = limits.iter().filter(|&&limit| worse > limit).count();
    let first = if summary.is_first() { " first" } else { "" };
    format!(
        "<td class=\"h{heat}{first}\" title=\"{}\">{text}",
        summary.shown()
    )
}

fn compared(shown: Shown, value: f64) -> String {
    match shown.over_rows {
        OverRows::Ratio => format!("{value:.3}"),
        OverRows::Points => format!("{:+.1}", value * 100.0),
    }
}

/// Of the first policy, and the first seed, each worker's blocks over time.
fn active_blocks(row: &Row) -> String {
    let Some(outcome) = row
        .report
        .outcomes
        .first()
        .filter(|it| !it.active_blocks.is_empty())
    else {
        return String::new();
    };
    let mut html = format!(
        "<h2>Active blocks under {}</h2><p>What running requests pin, shared prefixes counted once: \
         <span class=\"key predicted\">predicted</span> by the router, which counts requests that \
         still wait in an engine too, and <span class=\"key held\">held</span> by the engine.</p>",
        escaped(&outcome.policy)
    );
    for worker in 0..row.report.workers {
        let points = |of: fn(&(u64, u32)) -> f64| {
            let instants = outcome.active_blocks.iter();
            instants
                .filter_map(|it| Some((it.seconds, of(it.workers.get(worker)?))))
                .collect()
        };
        let line = |class, points| Line {
            class,
            points,
            steps: false,
            marks: Vec::new(),
        };
        let lines = [
            line("line held", points(|it| f64::from(it.1))),
            line("line predicted", points(|it| it.0 as f64)),
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
