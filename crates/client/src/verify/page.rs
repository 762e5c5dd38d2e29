//! A verification as an HTML page without external files: pictures first.

use std::fmt::Write;

use foresee_report::chart::{Band, Chart, Line, escaped};
use foresee_report::page;

use crate::verify::interval::Verdict;
use crate::verify::report::{Hits, Verification, WorkerResult};

impl Verification {
    /// Returns the page as HTML.
    #[must_use]
    pub fn html(&self) -> String {
        let class = match self.verdict() {
            Verdict::Holds => "verdict ok",
            Verdict::NotShown => "verdict",
            Verdict::Fails | Verdict::NotMeasured => "verdict bad",
        };
        let title = "Foresee's predictions compared with the engines' reports";
        let summary = self.summary();
        let lines = summary.lines().map(escaped).collect::<Vec<_>>();
        let mut page = format!("<p class=\"{class}\">{}</p>", lines.join("<br>"));
        page.push_str("<h2>Active blocks</h2>");
        page.push_str(
            "<p>Blocks that running requests pin; shared prefixes count once. \
             <span class=\"key predicted\">Predicted</span> by the router; \
             <span class=\"key reported\">reported</span> by the engine's metrics.</p>",
        );
        for worker in &self.workers {
            page.push_str(&self.active_blocks(worker));
        }
        page.push_str(&self.cache_hits());
        page.push_str(&self.goals());
        page.push_str(&self.wrong_predictions());
        let _ = write!(
            page,
            "<p class=\"small\">Blocks of {} tokens; seed {}; text matched by {}.</p>",
            self.block_size,
            self.seed,
            if self.has_tokenizer {
                "the engines' tokens"
            } else {
                "its bytes"
            }
        );
        page::framed(title, "", &page)
    }

    /// Returns a chart of a worker's predicted and reported active blocks over time, with the
    /// errors as its caption.
    fn active_blocks(&self, worker: &WorkerResult) -> String {
        let active = &worker.active;
        let bands = self.phases.iter().map(|phase| Band {
            from: phase.seconds.0,
            to: phase.seconds.1,
            name: format!("{} at a time", phase.concurrency),
        });
        let bands: Vec<Band> = bands.collect();
        let predicted = active.predicted.iter();
        let lines = [
            Line {
                class: "line reported",
                points: active.reported.clone(),
                steps: false,
                marks: Vec::new(),
            },
            Line {
                class: "line predicted",
                points: predicted.map(|&(at, blocks)| (at, blocks as f64)).collect(),
                steps: true,
                marks: Vec::new(),
            },
        ];
        let chart = Chart {
            x_label: "seconds",
            y_label: "blocks",
            bands: &bands,
            lines: &lines,
            ..Chart::default()
        };
        format!(
            "<figure><figcaption><b>{}</b> {}: mean error {:.2} blocks, {:.1} % of the peak of \
             {:.0}; worst {:.0}; {} readings. In the {} readings with the \
             same requests: mean error {:.2} blocks</figcaption>{}</figure>",
            escaped(&worker.name),
            escaped(&worker.url),
            active.mean_error,
            active.error_fraction() * 100.0,
            active.peak,
            active.worst_error,
            active.samples,
            active.agreed,
            active.agreed_error,
            chart.svg()
        )
    }

    /// Returns the table of predicted and reported cache hits, by phase and kind of prompt. Kinds
    /// without a compared response have no row.
    fn cache_hits(&self) -> String {
        let mut html = "<h2>Cache hits</h2><p>Blocks of the prompt that the router predicted to \
                        be cached, compared with <code>cached_tokens</code> of the response.</p>\
                        <table><tr><th>at a time<th>prompt<th>requests<th>exact<th>\
                        <th>over<th>under<th>precision<th>recall"
            .to_owned();
        for phase in &self.phases {
            for (kind, hits) in &phase.hits {
                let _ = write!(
                    html,
                    "<tr><td>{}<td>{}<td>{}<td>{:.1} %<td>{}<td>{}<td>{}<td>{:.1} %<td>{:.1} %",
                    phase.concurrency,
                    kind.name(),
                    hits.requests,
                    hits.equal_fraction() * 100.0,
                    bar(hits),
                    hits.over,
                    hits.under,
                    hits.precision() * 100.0,
                    hits.recall() * 100.0
                );
            }
        }
        html.push_str("</table>");
        html
    }

    /// Returns the table of goals and verdicts, with conclusions and advice.
    fn goals(&self) -> String {
        let mut html =
            "<h2>Goals</h2><table><tr><th>verdict<th>subject<th>found<th>goal".to_owned();
        for check in &self.checks {
            let class = match check.verdict {
                Verdict::Holds => "ok",
                Verdict::Fails => "bad",
                Verdict::NotShown | Verdict::NotMeasured => "",
            };
            let conclusion = check.conclusion();
            let notes = conclusion.as_deref().into_iter().chain(check.advice());
            let notes = notes.map(|note| format!("<br><i>{}</i>", escaped(note)));
            let _ = write!(
                html,
                "<tr><td class=\"{class}\">{}<td>{}<td>{}{}<td>{}",
                check.verdict.name(),
                escaped(&check.name),
                escaped(&check.found),
                notes.collect::<String>(),
                escaped(&check.goal)
            );
        }
        html.push_str("</table>");
        html
    }

    /// Returns the table of wrong predictions that were kept. Empty if there are none.
    fn wrong_predictions(&self) -> String {
        let mut rows = String::new();
        for phase in &self.phases {
            for it in &phase.differences {
                let _ = write!(
                    rows,
                    "<tr><td>{}<td>{}<td>{}<td>{}<td>{}<td>{}",
                    phase.concurrency,
                    it.kind.name(),
                    escaped(&it.worker),
                    it.prompt_tokens,
                    it.predicted,
                    it.actual
                );
            }
        }
        if rows.is_empty() {
            return String::new();
        }
        format!(
            "<h2>Wrong predictions</h2><p>The first of each phase, in blocks.</p><table><tr>\
             <th>at a time<th>prompt<th>worker<th>prompt tokens<th>predicted<th>cached{rows}</table>"
        )
    }
}

/// Returns a bar with the fractions of exact, over and under.
fn bar(hits: &Hits) -> String {
    let width = |part: usize| part as f64 / hits.requests.max(1) as f64 * 120.0;
    let (equal, over) = (width(hits.equal), width(hits.over));
    let (over_at, under_at) = (equal, equal + over);
    let under = width(hits.under);
    format!(
        "<svg class=\"bar\" viewBox=\"0 0 120 10\"><rect class=\"equal\" width=\"{equal:.1}\" \
         height=\"10\"/><rect class=\"over\" x=\"{over_at:.1}\" width=\"{over:.1}\" \
         height=\"10\"/><rect class=\"under\" x=\"{under_at:.1}\" width=\"{under:.1}\" \
         height=\"10\"/></svg>"
    )
}
