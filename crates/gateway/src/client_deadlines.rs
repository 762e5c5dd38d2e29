//! How long a client waits, by the headers in which clients say so.

use std::str::FromStr;
use std::time::Duration;

use http::HeaderMap;

use crate::placement::hints::Deadlines;

/// Headers of llm-d with the time until the first token, in milliseconds; the second is the older name.
const SLO_TTFT: [&str; 2] = ["x-llm-d-slo-ttft-ms", "x-slo-ttft-ms"];
/// Header of llm-d with the time in the router's queue, as Go writes durations.
const QUEUE_TTL: &str = "x-llm-d-inference-ttl";
/// Header in which OpenAI's and Anthropic's libraries send their read timeout, in seconds.
const READ_TIMEOUT: &str = "x-stainless-read-timeout";

/// Returns how long the client of a request waits. `own` is the time until the first byte that the
/// request has in the router's own header. The shortest time counts. Headers of other programs whose
/// value is not a time are ignored.
pub(crate) fn deadlines(headers: &HeaderMap, own: Option<Duration>) -> Deadlines {
    // Go writes microseconds as `µs`, which is not ASCII.
    let value = |name: &str| {
        let value = std::str::from_utf8(headers.get(name)?.as_bytes()).ok();
        value.map(str::trim)
    };
    let slo = SLO_TTFT.into_iter().find_map(value);
    let slo = slo.and_then(|milliseconds| seconds(milliseconds, 1e-3));
    let timeout = value(READ_TIMEOUT).and_then(|timeout| seconds(timeout, 1.0));
    Deadlines {
        first_byte: [own, slo, timeout].into_iter().flatten().min(),
        queue: value(QUEUE_TTL).and_then(go_duration),
    }
}

/// Returns the time of a number above 0 in units of `unit` seconds.
fn seconds(number: &str, unit: f64) -> Option<Duration> {
    let number = f64::from_str(number).ok()?;
    let time = Duration::try_from_secs_f64(number * unit).ok()?;
    (!time.is_zero()).then_some(time)
}

/// Returns the time of a duration as Go writes it, such as `1500ms`, `1.5s` or `1m30s`; `None` for
/// another text, and for one that is not above 0.
fn go_duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let is_number = |character: char| character.is_ascii_digit() || character == '.';
        let (number, after) = rest.split_at(rest.find(|character| !is_number(character))?);
        let unit_end = after.find(is_number).unwrap_or(after.len());
        let (unit, after) = after.split_at(unit_end);
        let unit = match unit {
            "ns" => 1e-9,
            "us" | "µs" | "μs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        let part = f64::from_str(number).ok()? * unit;
        total = total.checked_add(Duration::try_from_secs_f64(part).ok()?)?;
        rest = after;
    }
    (!total.is_zero()).then_some(total)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(pairs: &[(&'static str, &str)], own: Option<Duration>) -> Deadlines {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.insert(*name, value.parse().unwrap());
        }
        deadlines(&headers, own)
    }

    #[test]
    fn the_shortest_time_to_the_first_byte_counts() {
        let milliseconds = |number| Some(Duration::from_millis(number));
        let pairs = [
            ("x-llm-d-slo-ttft-ms", "850.5"),
            ("x-stainless-read-timeout", "600"),
            ("x-llm-d-inference-ttl", "1m0.5s"),
        ];
        let found = read(&pairs, milliseconds(900));
        assert_eq!(found.first_byte, Some(Duration::from_micros(850_500)));
        assert_eq!(found.queue, milliseconds(60_500));
        let pairs = [
            ("x-slo-ttft-ms", "20"),
            ("x-stainless-read-timeout", "0.01"),
        ];
        assert_eq!(read(&pairs, None).first_byte, milliseconds(10));
        assert_eq!(read(&pairs, milliseconds(9)).first_byte, milliseconds(9));
    }

    #[test]
    fn microseconds_are_read_as_go_prints_them() {
        let mut headers = HeaderMap::new();
        let value = http::HeaderValue::from_bytes("250.5µs".as_bytes()).unwrap();
        headers.insert("x-llm-d-inference-ttl", value);
        let found = deadlines(&headers, None).queue;
        assert_eq!(found, Some(Duration::from_nanos(250_500)));
    }

    #[test]
    fn values_that_are_no_times_are_ignored() {
        for value in ["", "soon", "-1", "NaN", "inf", "0", "1e400"] {
            let pairs = [
                ("x-llm-d-slo-ttft-ms", value),
                ("x-stainless-read-timeout", value),
                ("x-llm-d-inference-ttl", value),
            ];
            assert_eq!(read(&pairs, None), Deadlines::default(), "{value}");
        }
    }

    proptest! {
        #[test]
        fn durations_are_read_as_go_writes_them(hours in 0_u64..100, minutes in 0_u64..60, nanoseconds in 1_u64..60_000_000_000) {
            let seconds = nanoseconds as f64 * 1e-9;
            let text = format!("{hours}h{minutes}m{seconds:.9}s");
            let expected = Duration::from_secs(hours * 3600 + minutes * 60) + Duration::from_nanos(nanoseconds);
            let found = go_duration(&text).unwrap();
            prop_assert!(found.abs_diff(expected) < Duration::from_nanos(10), "{} {:?}", text, found);
        }

        #[test]
        fn no_text_panics(text in "[0-9.hmsnuµ -]{0,20}") {
            let _ = go_duration(&text);
        }
    }
}
