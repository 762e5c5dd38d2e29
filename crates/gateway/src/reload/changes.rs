//! Settings: their values in force, differences between two configurations, and which of them a
//! reload applies.

use foresee_api::dashboard::Setting;
use http::Uri;

use super::shown_setting::ShownSetting;
use crate::config::GatewayConfig;

/// Settings that differ between two configurations, apart from the workers, by their keys in a
/// configuration file.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct SettingChanges {
    /// Settings that a reload applies.
    pub(super) live: Vec<String>,
    /// Settings that only a restart applies.
    pub(super) fixed: Vec<String>,
}

/// Returns the keys whose fields differ between two configurations.
macro_rules! differences {
    ($old:expr, $new:expr, $($key:literal: $($field:ident).+),* $(,)?) => {{
        let mut keys: Vec<String> = Vec::new();
        $(if $old.$($field).+ != $new.$($field).+ {
            keys.push($key.to_owned());
        })*
        keys
    }};
}

/// Returns the settings of a configuration.
macro_rules! settings {
    ($config:expr, $is_live:literal, $($key:literal: $($field:ident).+),* $(,)?) => {{
        let (config, default) = ($config, GatewayConfig::default());
        vec![$(Setting {
            key: $key.to_owned(),
            value: config.$($field).+.shown(),
            is_changed: config.$($field).+ != default.$($field).+,
            is_live: $is_live,
        }),*]
    }};
}

/// Declares the settings that a reload applies.
macro_rules! live_settings {
    ($($key:literal: $($field:ident).+),* $(,)?) => {
        /// Returns the keys of these settings that differ between two configurations.
        fn live_differences(old: &GatewayConfig, new: &GatewayConfig) -> Vec<String> {
            differences! { old, new, $($key: $($field).+),* }
        }

        /// Returns these settings of a configuration.
        fn live_settings(config: &GatewayConfig) -> Vec<Setting> {
            settings! { config, true, $($key: $($field).+),* }
        }

        impl GatewayConfig {
            /// Takes over the workers and these settings. Keeps all others.
            pub(super) fn take_live_settings(&mut self, new: &Self) {
                self.workers.clone_from(&new.workers);
                $(self.$($field).+.clone_from(&new.$($field).+);)*
            }
        }
    };
}

live_settings! {
    "admin-host": admin.hosts,
    "admin-key-file": admin.key,
    "metrics-key-file": admin.metrics_key,
    "admin-open": admin.open,
    "key": keys,
    "tls": tls,
    "overlap-weight": router.overlap_weight,
    "ttft-weight": router.ttft_weight,
    "temperature": router.temperature,
    "queue-limit": queue_limit,
    "tenant-header": tenant_header,
    "pass-through": pass_through,
    "model-alias": model_aliases,
    "trusted-proxies": client_trust.proxies,
    "trust-client-headers": client_trust.control_headers,
    "first-byte-timeout": first_byte_timeout,
    "min-first-byte-timeout": min_first_byte_timeout,
    "stream-idle-timeout": stream_idle_timeout,
    "shutdown-delay": shutdown.delay,
    "shutdown-timeout": shutdown_timeout,
}

/// Declares the settings that only a restart applies.
macro_rules! fixed_settings {
    ($($key:literal: $($field:ident).+),* $(,)?) => {
        /// Returns the keys of these settings that differ between two configurations.
        fn fixed_differences(old: &GatewayConfig, new: &GatewayConfig) -> Vec<String> {
            differences! { old, new, $($key: $($field).+),* }
        }

        /// Returns these settings of a configuration.
        fn fixed_settings(config: &GatewayConfig) -> Vec<Setting> {
            settings! { config, false, $($key: $($field).+),* }
        }
    };
}

fixed_settings! {
    "listen": listen,
    "admin-listen": admin_listen,
    "admin-tls": admin_tls,
    "max-reservations": admin.max_reservations,
    "dashboard": admin.dashboard,
    "worker-api-key-file": worker_key.source,
    "worker-api-key-for-clients": worker_key.for_clients,
    "worker-tls-ca": worker_tls.ca,
    "worker-tls-certificate": worker_tls.identity,
    "dns-refresh": dns.refresh,
    "health-path": health.path,
    "health-method": health.method,
    "healthy-threshold": health.healthy_threshold,
    "unhealthy-threshold": health.unhealthy_threshold,
    "health-timeout": health.timeout,
    "tokenizer": tokenizer,
    "prefix-caching": prefix_caching,
    "policy": router.policy,
    "block-size": router.block_size,
    "seed": router.seed,
    "queue": router.queue_order,
    "dry-run": dry_run,
    "ejection-consecutive-failures": router.outlier.consecutive_failures,
    "ejection-failure-rate": router.outlier.failure_rate,
    "ejection-time": router.outlier.base_ejection,
    "max-ejection-time": router.outlier.max_ejection,
    "max-ejected-fraction": router.outlier.max_ejected_fraction,
    "trial-interval": router.outlier.trial_interval,
    "failure-charge-decay": router.outlier.charge_decay,
    "warm-up-requests": router.outlier.warm_up_requests,
    "expose-worker-header": expose_worker_header,
    "max-body-size": max_body_bytes,
    "probe-interval": probe_interval,
    "connect-timeout": connect_timeout,
    "discovery-file": discovery.files,
    "discovery-url": discovery.urls,
    "discovery-refresh": discovery.refresh,
    "discovery-allow-empty": discovery.allows_empty,
    "discovery-ca": discovery.url_ca,
    "discovery-dns": discovery.names,
    "discovery-dns-server": discovery.dns_server,
    "kubernetes-selector": discovery.kubernetes.selector,
    "kubernetes-pool": discovery.kubernetes.pools,
    "kubernetes-namespace": discovery.kubernetes.namespace,
    "kubernetes-ports": discovery.kubernetes.ports,
    "kubernetes-resync": discovery.kubernetes.resync,
    "kubernetes-config": discovery.kubernetes.kubeconfig,
    "io-threads": io_threads,
    "max-connections": connections.max_connections,
    "client-head-timeout": connections.head_timeout,
    "client-idle-timeout": connections.idle_timeout,
    "client-write-timeout": connections.write_timeout,
    "body-idle-timeout": bodies.idle_timeout,
    "max-body-bytes-in-flight": bodies.max_bytes_in_flight,
    "engine-metrics-interval": engine_metrics_interval,
    "record": record,
    "access-log": access_log,
    "access-log-sample-ratio": access_log_sample_ratio,
    "state": state,
    "metrics-compat": metrics_compat,
    "slo-ttft": autoscaling.slo_ttft,
    "slo-itl": autoscaling.slo_itl,
    "scale-horizon": autoscaling.horizon,
}

/// Returns all settings apart from the workers: those that a reload applies, and then the others.
pub(crate) fn settings_in_force(config: &GatewayConfig) -> Vec<Setting> {
    let mut settings = live_settings(config);
    settings.extend(fixed_settings(config));
    settings.extend(trace_settings(config));
    settings
}

/// Returns the settings of traces, which only a restart applies.
fn trace_settings(config: &GatewayConfig) -> [Setting; 2] {
    let traces = config.traces.as_ref();
    let endpoint = traces.and_then(|traces| traces.endpoint.as_str().parse::<Uri>().ok());
    let ratio = traces.and_then(|traces| traces.sample_ratio);
    [
        ("otlp-endpoint", endpoint.shown(), endpoint.is_some()),
        ("trace-sample-ratio", ratio.shown(), ratio.is_some()),
    ]
    .map(|(key, value, is_changed)| Setting {
        key: key.to_owned(),
        value,
        is_changed,
        is_live: false,
    })
}

impl SettingChanges {
    /// Compares two configurations. A new setting belongs into one of the lists above; the test of the
    /// command line that changes every key fails without it.
    pub(super) fn between(old: &GatewayConfig, new: &GatewayConfig) -> Self {
        let mut changes = Self::of_fields(old, new);
        let traces = trace_settings(old).into_iter().zip(trace_settings(new));
        let changed = traces.filter(|(old, new)| old.value != new.value);
        changes.fixed.extend(changed.map(|(_, new)| new.key));
        changes
    }

    /// Compares the settings that are a field each.
    fn of_fields(old: &GatewayConfig, new: &GatewayConfig) -> Self {
        Self {
            live: live_differences(old, new),
            fixed: fixed_differences(old, new),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::key::AdminKey;
    use crate::traces::config::TraceConfig;
    use crate::workers::api_key::ApiKeySource;

    #[test]
    fn settings_that_need_a_restart_keep_their_values() {
        let mut config = GatewayConfig::default();
        let new = GatewayConfig {
            max_body_bytes: 7,
            queue_limit: Some(9),
            ..GatewayConfig::default()
        };
        let changes = SettingChanges::between(&config, &new);
        assert_eq!(changes.live, ["queue-limit"]);
        assert_eq!(changes.fixed, ["max-body-size"]);
        config.take_live_settings(&new);
        assert_eq!(config.queue_limit, Some(9));
        // The next reload names it again.
        let changes = SettingChanges::between(&config, &new);
        assert_eq!(
            (changes.live, changes.fixed),
            (vec![], vec!["max-body-size".to_owned()])
        );
    }

    #[test]
    fn settings_are_shown_without_secrets() {
        let mut config = GatewayConfig::default();
        config.admin.key = Some(AdminKey::new("s3cret").unwrap());
        config.worker_key.source = Some(ApiKeySource::Value("s3cret".to_owned()));
        let url = "http://user:s3cret@lists:9/workers?token=s3cret";
        config.discovery.urls = vec![url.parse().unwrap()];
        config.router.ttft_weight = 2.5;
        config.traces = Some(TraceConfig::new("http://collector:4318".parse().unwrap()));
        let settings = settings_in_force(&config);
        let text = format!("{settings:?}");
        assert!(!text.contains("s3cret"), "{text}");
        let of = |key: &str| settings.iter().find(|setting| setting.key == key).unwrap();
        assert_eq!(of("admin-key-file").value, "set");
        assert_eq!(of("discovery-url").value, "http://lists:9/workers");
        let weight = of("ttft-weight");
        assert_eq!(
            (&*weight.value, weight.is_changed, weight.is_live),
            ("2.5", true, true)
        );
        let policy = of("policy");
        assert_eq!((policy.is_changed, policy.is_live), (false, false));
        assert_eq!(of("probe-interval").value, "1s");
        assert_eq!(of("otlp-endpoint").value, "http://collector:4318/v1/traces");
        assert_eq!(of("trace-sample-ratio").value, "not set");
    }
}
