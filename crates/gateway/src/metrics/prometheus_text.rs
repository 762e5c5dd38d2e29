//! The text format of Prometheus before OpenMetrics, for scrapers that accept only that.

/// Content type of the OpenMetrics text format.
pub(crate) const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Content type of the older text format.
pub(crate) const PROMETHEUS_TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Converts a page of metrics from the OpenMetrics text format to version 0.0.4 of Prometheus's
/// text format.
///
/// In the older format the name of a counter's family ends in `_total`, `unknown` is `untyped`, and
/// there are no units, no mark of the end and no exemplars. Series are the same. Info metrics and
/// state sets are not converted: the gateway has none.
pub(crate) fn prometheus_text(open_metrics: &str) -> String {
    let mut text = String::with_capacity(open_metrics.len());
    // The help of a family precedes its type, which decides the name of both.
    let mut help = None;
    for line in open_metrics.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            help = rest.split_once(' ');
        } else if let Some((name, kind)) = line
            .strip_prefix("# TYPE ")
            .and_then(|rest| rest.split_once(' '))
        {
            let suffix = if kind == "counter" { "_total" } else { "" };
            let kind = if kind == "unknown" { "untyped" } else { kind };
            if let Some((_, help)) = help.take().filter(|(helped, _)| *helped == name) {
                text += &format!("# HELP {name}{suffix} {help}\n");
            }
            text += &format!("# TYPE {name}{suffix} {kind}\n");
        } else if !line.starts_with('#') {
            text += without_exemplar(line);
            text.push('\n');
        }
    }
    text
}

/// Returns the line of a series without its exemplar. Only buckets have one, and its label has no text
/// of others.
fn without_exemplar(line: &str) -> &str {
    let exemplar = line.rfind(" # {").filter(|_| line.contains("_bucket{"));
    exemplar.map_or(line, |start| &line[..start])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_named_with_their_suffix_and_units_are_left_out() {
        let open_metrics = "# HELP a_seconds Time of a.\n# TYPE a_seconds counter\n\
                            # UNIT a_seconds seconds\na_seconds_total{w=\"x y\"} 3.5\n\
                            # HELP b Number of b.\n# TYPE b gauge\nb 1\n\
                            # TYPE c unknown\nc 2\n# TYPE d histogram\n\
                            d_bucket{le=\"1.0\"} 3 # {trace_id=\"0af7\"} 0.5 1.25\n# EOF\n";
        let expected = "# HELP a_seconds_total Time of a.\n# TYPE a_seconds_total counter\n\
                        a_seconds_total{w=\"x y\"} 3.5\n\
                        # HELP b Number of b.\n# TYPE b gauge\nb 1\n\
                        # TYPE c untyped\nc 2\n# TYPE d histogram\nd_bucket{le=\"1.0\"} 3\n";
        assert_eq!(prometheus_text(open_metrics), expected);
    }
}
