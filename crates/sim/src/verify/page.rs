//! A verification as one page that needs nothing else: pictures first.

use std::fmt::Write;

use crate::chart::{Band, Chart, Line, escaped};
use crate::page;
use crate::verify::report::{Hits, Verification, WorkerResult};

impl Verification {
    /// The page, as HTML.
    #[must_use]
    pub fn html(&self) -> String {
        let verdict = if self.passed() {
            r#"<p class="verdict ok">The predictions hold on these engines.</p>"#
        } else {
            r#"<p class="verdict bad">The predictions do not hold on these engines as they are set up now.</p>"#
        };
        let title = "What Foresee predicted, and what the engines say";
        let mut page = verdict.to_owned();
        page.push_str("<h2>Active blocks</h2>");
        page.push_str(
            "<p>What running requests pin, shared prefixes counted once. \
             <span class=\"key predicted\">predicted</span> by the router from what it sent and \
             saw; <span class=\"key held\">held</span> by the engine's own metrics.</p>",
        );
        for worker in &self.workers {
            page.push_str(&self.active_blocks(worker));
        }
        page.push_str(&self.cache_hits());
        page.push_str(&self.promises());
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
                class: "line held",
                points: active.held.clone(),
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
             {:.0}; worst {:.0}; {} readings. Where the engine counts the same requests, {}: mean \
             error {:.2} blocks</figcaption>{}</figure>",
            escaped(&worker.name),
            escaped(&worker.url),
            active.mean_error,
            active.error_share() * 100.0,
            active.peak,
            active.worst_error,
            active.samples,
            active.agreed,
            active.agreed_error,
            chart.svg()
        )
    }

    fn cache_hits(&self) -> String {
        let mut html = "<h2>Cache hits</h2><p>Blocks of the prompt that the router predicted to \
                        be cached, against <code>cached_tokens</code> of the answer.</p>\
                        <table><tr><th>at a time<th>prompt<th>requests<th>to the block<th>\
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
                    hits.equal_share() * 100.0,
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

    fn promises(&self) -> String {
        let mut html = "<h2>Promises</h2><table><tr><th><th>what<th>found<th>goal".to_owned();
        for check in &self.checks {
            let (class, mark) = match check.passed {
                Some(true) => ("ok", "✓"),
                Some(false) => ("bad", "✗"),
                None => ("", "?"),
            };
            let remedy = check.remedy.filter(|_| check.passed != Some(true));
            let _ = write!(
                html,
                "<tr><td class=\"{class}\">{mark}<td>{}<td>{}{}<td>{}",
                escaped(&check.what),
                escaped(&check.found),
                remedy.map_or(String::new(), |remedy| format!(
                    "<br><i>{}</i>",
                    escaped(remedy)
                )),
                escaped(&check.goal)
            );
        }
        html.push_str("</table>");
        html
    }

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

/// The shares of equal, over and under as a bar.
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
