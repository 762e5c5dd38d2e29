//! Differences between two configurations, and which of them a reload applies.

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

/// Declares the settings that a reload applies.
macro_rules! live_settings {
    ($($key:literal: $($field:ident).+),* $(,)?) => {
        /// Returns the keys of these settings that differ between two configurations.
        fn live_differences(old: &GatewayConfig, new: &GatewayConfig) -> Vec<String> {
            differences! { old, new, $($key: $($field).+),* }
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

impl SettingChanges {
    /// Compares two configurations. A new setting belongs here or above; the test of the command line
    /// that changes every key fails without it.
    pub(super) fn between(old: &GatewayConfig, new: &GatewayConfig) -> Self {
        let mut changes = Self::of_fields(old, new);
        let ratio = |config: &GatewayConfig| config.traces.as_ref()?.sample_ratio;
        let endpoint = |config: &GatewayConfig| Some(config.traces.as_ref()?.endpoint.clone());
        for (key, has_changed) in [
            ("otlp-endpoint", endpoint(old) != endpoint(new)),
            ("trace-sample-ratio", ratio(old) != ratio(new)),
        ] {
            changes.fixed.extend(has_changed.then(|| key.to_owned()));
        }
        changes
    }

    /// Compares the settings that are a field each.
    fn of_fields(old: &GatewayConfig, new: &GatewayConfig) -> Self {
        Self {
            live: live_differences(old, new),
            fixed: differences! { old, new,
                "listen": listen,
                "admin-listen": admin_listen,
                "admin-tls": admin_tls,
                "max-reservations": admin.max_reservations,
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
                "state": state,
                "metrics-compat": metrics_compat,
                "slo-ttft": autoscaling.slo_ttft,
                "slo-itl": autoscaling.slo_itl,
                "scale-horizon": autoscaling.horizon,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
