//! The flags of outlier ejection, failure charge and warm-up limit.

use clap::Args;
use foresee_core::outlier::OutlierConfig;

use crate::flags::DEFAULTS;
use crate::values::{Fraction, duration, positive_duration};

/// Settings by which workers that fail get fewer requests.
#[derive(Args, Debug)]
#[command(next_help_heading = "Failing workers")]
pub(crate) struct OutlierArgs {
    /// Sets the number of failures in a row after which a worker is ejected; 0 disables this rule
    #[arg(
        long,
        default_value_t = DEFAULTS.router.outlier.consecutive_failures,
        value_name = "FAILURES",
        env = "FORESEE_EJECTION_CONSECUTIVE_FAILURES"
    )]
    ejection_consecutive_failures: u32,
    /// Sets the fraction of failed requests from which a worker is ejected; 0 disables this rule
    #[arg(
        long,
        default_value_t = Fraction(DEFAULTS.router.outlier.failure_rate),
        value_name = "FRACTION",
        env = "FORESEE_EJECTION_FAILURE_RATE"
    )]
    ejection_failure_rate: Fraction,
    /// Sets the duration of a worker's first ejection; the n-th one lasts n times as long
    #[arg(
        long,
        default_value_t = DEFAULTS.router.outlier.base_ejection.into(),
        value_name = "DURATION",
        value_parser = positive_duration,
        env = "FORESEE_EJECTION_TIME"
    )]
    ejection_time: humantime::Duration,
    /// Sets the longest duration of an ejection
    #[arg(
        long,
        default_value_t = DEFAULTS.router.outlier.max_ejection.into(),
        value_name = "DURATION",
        value_parser = positive_duration,
        env = "FORESEE_MAX_EJECTION_TIME"
    )]
    max_ejection_time: humantime::Duration,
    /// Sets the largest fraction of a model's healthy workers that are ejected at the same time
    #[arg(
        long,
        default_value_t = Fraction(DEFAULTS.router.outlier.max_ejected_fraction),
        value_name = "FRACTION",
        env = "FORESEE_MAX_EJECTED_FRACTION"
    )]
    max_ejected_fraction: Fraction,
    /// Sets the time between two requests that test whether an ejected worker has recovered
    #[arg(
        long,
        default_value_t = DEFAULTS.router.outlier.trial_interval.into(),
        value_name = "DURATION",
        value_parser = positive_duration,
        env = "FORESEE_TRIAL_INTERVAL"
    )]
    trial_interval: humantime::Duration,
    /// Sets the time constant with which the cost of failed requests decays; 0s disables this cost
    #[arg(
        long,
        default_value_t = DEFAULTS.router.outlier.charge_decay.into(),
        value_name = "DURATION",
        value_parser = duration,
        env = "FORESEE_FAILURE_CHARGE_DECAY"
    )]
    failure_charge_decay: humantime::Duration,
    /// Sets the number of requests on a worker until its first output; 0 means no limit
    #[arg(
        long,
        default_value_t = DEFAULTS.router.outlier.warm_up_requests,
        value_name = "REQUESTS",
        env = "FORESEE_WARM_UP_REQUESTS"
    )]
    warm_up_requests: u32,
}

impl OutlierArgs {
    /// Returns the settings that the flags describe.
    pub(crate) fn config(&self) -> OutlierConfig {
        OutlierConfig {
            consecutive_failures: self.ejection_consecutive_failures,
            failure_rate: self.ejection_failure_rate.0,
            base_ejection: self.ejection_time.into(),
            max_ejection: self.max_ejection_time.into(),
            max_ejected_fraction: self.max_ejected_fraction.0,
            trial_interval: self.trial_interval.into(),
            charge_decay: self.failure_charge_decay.into(),
            warm_up_requests: self.warm_up_requests,
            ..OutlierConfig::default()
        }
    }
}
