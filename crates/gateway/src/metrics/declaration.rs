//! Declaration of metrics from one table: fields, registration and reference.

use std::sync::atomic::AtomicU64;

use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::exemplar::HistogramWithExemplars;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Metric, Registry, Unit};

/// Label whose values are known at compile time.
pub(super) type FixedLabel = [(&'static str, &'static str); 1];
/// Label with the name of a worker.
pub(super) type WorkerLabel = [(&'static str, String); 1];
/// Labels with the name of an alias, and of a model.
pub(super) type AliasLabels = [(&'static str, String); 2];
/// Label with a source of workers. Another type than the label with a worker, because its series stay
/// when workers leave.
pub(crate) type SourceLabel = Vec<(&'static str, String)>;
/// Counter with one series for each source of workers.
pub(super) type CounterBySource = Family<SourceLabel, Counter>;
/// Gauge with one series for each source of workers.
pub(super) type GaugeBySource = Family<SourceLabel, Gauge>;
/// Gauge of a real number with one series for each source of workers.
pub(super) type FloatGaugeBySource = Family<SourceLabel, FloatGauge>;
/// Counter with one series for each value of a fixed label.
pub(super) type CounterByLabel = Family<FixedLabel, Counter>;
/// Counter with one series for each model of each alias.
pub(super) type CounterByAlias = Family<AliasLabels, Counter>;
/// Counter with one series for each worker.
pub(super) type CounterByWorker = Family<WorkerLabel, Counter>;
/// Gauge with one series for each worker.
pub(super) type GaugeByWorker = Family<WorkerLabel, Gauge>;
/// Label by which an observation names the trace of its request.
pub(crate) type Exemplar = [(&'static str, String); 1];
/// Histogram whose buckets name the trace of a sampled request.
pub(crate) type TracedHistogram = HistogramWithExemplars<Exemplar>;
/// Gauge that is 1, with labels that describe the build.
pub(super) type BuildInfo = Family<[(&'static str, &'static str); 3], Gauge>;
/// Gauge of a real number.
pub(super) type FloatGauge = Gauge<f64, AtomicU64>;
/// Gauge of a real number with one series for each worker.
pub(super) type FloatGaugeByWorker = Family<WorkerLabel, FloatGauge>;

/// Label of a metric, for the reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LabelInfo {
    /// Name of the label.
    pub name: &'static str,
    /// All values; empty if they are known only at run time, such as the names of workers.
    pub values: &'static [&'static str],
}

/// Description of a metric, for the reference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetricInfo {
    /// Name of the metric family as in the `# TYPE` line of the exposition, `foresee_` included. The
    /// series of a counter have the suffix `_total`, those of a histogram `_bucket`, `_sum` and
    /// `_count`.
    pub name: String,
    /// OpenMetrics type: `counter`, `gauge` or `histogram`.
    pub kind: &'static str,
    /// Unit of the values.
    pub unit: &'static str,
    /// Labels of each series.
    pub labels: &'static [LabelInfo],
    /// Quantity that is measured; the `# HELP` line of the exposition.
    pub help: &'static str,
}

/// Declares [`Metrics`], its registration and its reference. Each row has the metric's name without
/// prefix, its type, the expression that creates it if that is not `Default`, its unit, its labels
/// and its help text.
macro_rules! declare_metrics {
    ($($visibility:vis $name:ident: $type:ty $(= $new:expr)?, $unit:literal, $labels:ident, $help:literal;)*) => {
        /// All metrics of one gateway.
        #[derive(Debug)]
        pub(crate) struct Metrics {
            registry: Registry,
            /// Held during an exposition, which clears gauges and sets them again: a concurrent
            /// scrape must not see them in between.
            exposition: Mutex<()>,
            $(#[doc = $help] $visibility $name: $type,)*
        }

        impl Metrics {
            /// Creates and registers all metrics, with a series for each value of the labels whose
            /// values are known.
            pub(crate) fn new() -> Self {
                let mut registry = Registry::with_prefix(PREFIX);
                $(
                    let $name: $type = declare_metrics!(@new $($new)?);
                    $name.create_series($labels);
                    register(&mut registry, stringify!($name), $unit, $help, $name.clone());
                )*
                Self { registry, exposition: Mutex::new(()), $($name,)* }
            }

            /// Creates the series of a worker's counters, so that its first event is an increase.
            pub(crate) fn add_worker(&self, worker: &str) {
                $(self.$name.add_worker(worker);)*
            }

            /// Removes all series of a worker, so that their number does not grow as workers come
            /// and go.
            pub(crate) fn remove_worker(&self, worker: &str) {
                $(self.$name.remove_worker(worker);)*
            }
        }

        /// Returns the description of every metric, in the order of the reference page.
        #[must_use]
        pub fn metric_reference() -> Vec<MetricInfo> {
            vec![$(MetricInfo {
                name: format!("{PREFIX}_{}", stringify!($name)),
                kind: type_name(<$type as TypedMetric>::TYPE),
                unit: $unit,
                labels: $labels,
                help: $help,
            }),*]
        }
    };
    (@new) => { Default::default() };
    (@new $new:expr) => { $new };
}

pub(super) use declare_metrics;

/// Registers a metric. The exposition declares the unit if the name ends with it.
pub(super) fn register(
    registry: &mut Registry,
    name: &str,
    unit: &str,
    help: &str,
    metric: impl Metric,
) {
    let stem = name.strip_suffix(unit);
    match stem.and_then(|stem| stem.strip_suffix('_')) {
        Some(stem) => {
            registry.register_with_unit(stem, help, Unit::Other(unit.to_owned()), metric);
        }
        None => registry.register(name, help, metric),
    }
}

pub(super) const fn type_name(metric_type: MetricType) -> &'static str {
    match metric_type {
        MetricType::Counter => "counter",
        MetricType::Gauge => "gauge",
        MetricType::Histogram => "histogram",
        MetricType::Info => "info",
        MetricType::Unknown => "unknown",
    }
}

/// Series that are created and removed by their labels. A metric without labels has one series, which
/// always exists.
pub(super) trait Series {
    /// Creates a series for each known value of the labels.
    fn create_series(&self, _labels: &[LabelInfo]) {}
    /// Creates the series of a worker, if it is a counter's.
    fn add_worker(&self, _worker: &str) {}
    /// Removes the series of a worker.
    fn remove_worker(&self, _worker: &str) {}
}

impl Series for Counter {}
impl Series for Histogram {}
impl Series for BuildInfo {}
impl Series for TracedHistogram {}
impl<N, A> Series for Gauge<N, A> {}

impl Series for CounterBySource {}
impl<N, A> Series for Family<SourceLabel, Gauge<N, A>> {}

impl Series for CounterByLabel {
    fn create_series(&self, labels: &[LabelInfo]) {
        for label in labels {
            for value in label.values {
                drop(self.get_or_create(&[(label.name, value)]));
            }
        }
    }
}

impl Series for CounterByAlias {}

impl Series for CounterByWorker {
    fn add_worker(&self, worker: &str) {
        drop(self.get_or_create(&[("worker", worker.to_owned())]));
    }

    fn remove_worker(&self, worker: &str) {
        self.remove(&[("worker", worker.to_owned())]);
    }
}

impl<N, A> Series for Family<WorkerLabel, Gauge<N, A>> {
    fn remove_worker(&self, worker: &str) {
        self.remove(&[("worker", worker.to_owned())]);
    }
}
