//! Forecast of the load of a whole fleet: how many requests will arrive per second some time from now,
//! and how long they are.
//!
//! Arrivals are counted in intervals of ten seconds. The forecast is Holt's linear method with a damped
//! trend (Gardner and McKenzie, 1985): a level and a trend that follow the counts, and a forecast of
//! the level plus the trend, which loses a tenth of its size with every interval.

use std::time::Duration;

use crate::MeanLengths;

/// Length of an interval in which arrivals are counted, in seconds.
const INTERVAL_SECONDS: f64 = 10.0;

/// Weight of the latest interval in the level.
const LEVEL_WEIGHT: f64 = 0.3;

/// Weight of the latest change of the level in the trend.
const TREND_WEIGHT: f64 = 0.2;

/// Fraction of the trend that is left after each interval.
const DAMPING: f64 = 0.9;

/// Number of intervals without an arrival after which the level and the trend are 0. By then, the
/// level is below a millionth of what it was.
const MAX_EMPTY_INTERVALS: u64 = 64;

/// Number of requests that the mean lengths remember: a request counts `1 - 1/200` times as much after
/// the next one.
const LENGTH_MEMORY: f64 = 200.0;

/// Arrivals and lengths of requests, and their forecast. All memory is constant.
#[derive(Clone, Debug, Default)]
pub struct DemandForecast {
    /// Number of the interval in which arrivals are counted.
    interval: u64,
    /// Arrivals in it so far.
    arrivals: u64,
    /// Requests per second; `None` before the end of the first interval with an arrival.
    level: Option<f64>,
    /// Change of the level in an interval.
    trend: f64,
    /// Sums of lengths, each request weighted by its age in requests.
    sums: MeanLengths,
    /// Sum of these weights.
    weight: f64,
}

impl DemandForecast {
    /// Counts a request that arrives `now`, whether it is served or not.
    pub fn observe_arrival(&mut self, now: Duration) {
        self.advance(now);
        self.arrivals += 1;
    }

    /// Adds the lengths of a request that has ended.
    pub fn observe_lengths(&mut self, prompt_tokens: u32, new_tokens: u32, output_tokens: u32) {
        let keep = 1.0 - 1.0 / LENGTH_MEMORY;
        let add = |sum: &mut f64, tokens: u32| *sum = *sum * keep + f64::from(tokens);
        add(&mut self.sums.prompt_tokens, prompt_tokens);
        add(&mut self.sums.new_tokens, new_tokens.min(prompt_tokens));
        add(&mut self.sums.output_tokens, output_tokens);
        self.weight = self.weight * keep + 1.0;
    }

    /// Returns the mean lengths of recent requests; `None` before the first one has ended.
    #[must_use]
    pub fn mean_lengths(&self) -> Option<MeanLengths> {
        (self.weight > 0.0).then(|| MeanLengths {
            prompt_tokens: self.sums.prompt_tokens / self.weight,
            new_tokens: self.sums.new_tokens / self.weight,
            output_tokens: self.sums.output_tokens / self.weight,
        })
    }

    /// Returns the forecast of requests per second at `horizon` after `now`: at least 0, and at most
    /// twice the present level.
    ///
    /// Before the end of the first interval, this is the number of arrivals so far over the time of an
    /// interval.
    pub fn requests_per_second(&mut self, now: Duration, horizon: Duration) -> f64 {
        self.advance(now);
        let Some(level) = self.level else {
            return self.arrivals as f64 / INTERVAL_SECONDS;
        };
        let intervals = horizon.as_secs_f64() / INTERVAL_SECONDS;
        // The sum of DAMPING + DAMPING² + …, for a number of intervals that need not be whole.
        let changes = DAMPING * (1.0 - DAMPING.powf(intervals)) / (1.0 - DAMPING);
        (level + changes * self.trend).clamp(0.0, 2.0 * level)
    }

    /// Ends the intervals that are over at `now`. Earlier times than before have no effect.
    fn advance(&mut self, now: Duration) {
        let interval = (now.as_secs_f64() / INTERVAL_SECONDS) as u64;
        let ended = interval.saturating_sub(self.interval);
        if ended == 0 {
            return;
        }
        self.interval = interval;
        if self.level.is_none() && self.arrivals == 0 {
            return;
        }
        self.end_interval();
        if ended > MAX_EMPTY_INTERVALS {
            (self.level, self.trend) = (Some(0.0), 0.0);
        } else {
            (1..ended).for_each(|_| self.end_interval());
        }
    }

    /// Ends one interval: adds its arrivals to the level and the trend.
    fn end_interval(&mut self) {
        let rate = std::mem::take(&mut self.arrivals) as f64 / INTERVAL_SECONDS;
        let Some(before) = self.level else {
            self.level = Some(rate);
            return;
        };
        let expected = before + DAMPING * self.trend;
        let level = (expected + LEVEL_WEIGHT * (rate - expected)).max(0.0);
        let change = level - before;
        self.trend = DAMPING * self.trend + TREND_WEIGHT * (change - DAMPING * self.trend);
        self.level = Some(level);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    /// Adds arrivals whose rate at each time is `rate`, and returns the forecast for `horizon` seconds
    /// after the end.
    fn forecast(seconds: u32, horizon: f64, rate: impl Fn(f64) -> f64) -> f64 {
        let mut demand = DemandForecast::default();
        let mut due = 0.0;
        for tenth in 0..seconds * 10 {
            let now = f64::from(tenth) / 10.0;
            due += rate(now) / 10.0;
            while due >= 1.0 {
                demand.observe_arrival(at(now));
                due -= 1.0;
            }
        }
        demand.requests_per_second(at(f64::from(seconds)), at(horizon))
    }

    #[test]
    fn a_steady_rate_is_its_own_forecast() {
        let steady = forecast(300, 60.0, |_| 7.0);
        assert!((steady - 7.0).abs() < 0.1, "{steady}");
        // Before the end of the first interval, the arrivals so far count.
        let early = forecast(5, 60.0, |_| 8.0);
        assert!((early - 4.0).abs() < 0.3, "{early}");
    }

    #[test]
    fn a_rising_rate_is_forecast_to_rise_further_and_not_without_bound() {
        let rising = |now: f64| 5.0 + now / 60.0;
        let now = forecast(600, 0.0, rising);
        let later = forecast(600, 60.0, rising);
        assert!((13.5..=15.5).contains(&now), "{now}");
        assert!(later > now + 0.3 && later < 16.5, "{later}");
        assert!(forecast(600, 1e6, |now| 0.1 * now * now) <= 2.0 * 36_000.0);
    }

    #[test]
    fn the_forecast_falls_to_zero_when_nothing_arrives() {
        let mut demand = DemandForecast::default();
        assert_eq!(demand.requests_per_second(at(1e4), at(60.0)), 0.0);
        for arrival in 0..1000 {
            demand.observe_arrival(at(1e4 + f64::from(arrival) / 10.0));
        }
        let mut rate = |now: f64| demand.requests_per_second(at(now), at(60.0));
        let busy = rate(10_100.0);
        assert!((9.0..=11.5).contains(&busy), "{busy}");
        assert!(rate(10_200.0) < 0.5);
        assert_eq!(rate(20_000.0), 0.0);
        // A clock that does not move, or jumps back, has no effect.
        assert_eq!(rate(0.0), 0.0);
    }

    #[test]
    fn mean_lengths_follow_recent_requests() {
        let mut demand = DemandForecast::default();
        assert_eq!(demand.mean_lengths(), None);
        demand.observe_lengths(100, 200, 10);
        let first = demand.mean_lengths().unwrap();
        assert_eq!((first.prompt_tokens, first.new_tokens), (100.0, 100.0));
        for _ in 0..2000 {
            demand.observe_lengths(1000, 300, 50);
        }
        let later = demand.mean_lengths().unwrap();
        assert!((later.prompt_tokens - 1000.0).abs() < 1.0, "{later:?}");
        assert!((later.output_tokens - 50.0).abs() < 0.1, "{later:?}");
    }
}
