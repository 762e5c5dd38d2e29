//! Flags of the discovery of workers.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;
use foresee_gateway::{
    DiscoveryConfig, DnsName, KubernetesConfig, PoolName, Uri, is_kubernetes_name,
};

use crate::flags::{DEFAULTS, Switch};
use crate::values::positive_duration;

/// Lists of workers.
#[derive(Args, Debug)]
#[command(next_help_heading = "Discovery")]
pub(super) struct DiscoveryArgs {
    /// Names a file that lists workers, in the form of Prometheus's file_sd or of llm-d's endpoints
    ///
    /// The file is JSON or YAML and is read again when it changes: workers that it adds are added,
    /// and workers that it no longer lists are drained and removed. Labels that begin with foresee_
    /// are options of --worker: foresee_kv_events for kv-events.
    #[arg(
        long,
        value_name = "FILE",
        value_delimiter = ',',
        env = "FORESEE_DISCOVERY_FILE"
    )]
    discovery_file: Vec<PathBuf>,
    /// Names an http:// or https:// URL that lists workers, in the same forms
    #[arg(
        long,
        value_name = "URL",
        value_delimiter = ',',
        value_parser = list_url,
        env = "FORESEE_DISCOVERY_URL"
    )]
    discovery_url: Vec<Uri>,
    /// Names a file of certificates (PEM) of the authorities that sign those of --discovery-url
    ///
    /// The default are the authorities that the system trusts.
    #[arg(long, value_name = "FILE", env = "FORESEE_DISCOVERY_CA")]
    discovery_ca: Option<PathBuf>,
    /// Sets the time between two requests to --discovery-url
    #[arg(
        long,
        default_value_t = DEFAULTS.discovery.refresh.into(),
        value_name = "DURATION",
        value_parser = positive_duration,
        env = "FORESEE_DISCOVERY_REFRESH"
    )]
    discovery_refresh: humantime::Duration,
    /// Selects whether an empty list removes all workers of its source
    #[arg(
        long,
        default_value_t = Switch::Off,
        default_missing_value = "on",
        num_args = 0..=1,
        require_equals = true,
        value_name = "SWITCH",
        env = "FORESEE_DISCOVERY_ALLOW_EMPTY"
    )]
    discovery_allow_empty: Switch,
    /// Names workers by DNS: NAME:PORT for each address of a name, _http._tcp.NAME for SRV records
    ///
    /// Prefix https:// for workers with TLS; their certificates must be those of the name. Records are
    /// looked up again when they expire, after at least 1 s and at most 30 s.
    #[arg(
        long,
        value_name = "NAME",
        value_delimiter = ',',
        env = "FORESEE_DISCOVERY_DNS"
    )]
    discovery_dns: Vec<DnsName>,
    /// Sets the DNS server that resolves --discovery-dns
    ///
    /// The default are the servers of /etc/resolv.conf.
    #[arg(long, value_name = "IP:PORT", env = "FORESEE_DISCOVERY_DNS_SERVER")]
    discovery_dns_server: Option<SocketAddr>,
    #[command(flatten)]
    kubernetes: KubernetesArgs,
}

/// Pods of Kubernetes.
#[derive(Args, Debug)]
#[command(next_help_heading = "Kubernetes")]
struct KubernetesArgs {
    /// Selects the pods that are workers by their labels, as kubectl's --selector does: app=vllm
    ///
    /// Needs a program that was built with the feature `kubernetes`. Annotations of a pod, such as
    /// foresee.dev/port, describe its worker.
    #[arg(long, value_name = "SELECTOR", value_parser = selector, env = "FORESEE_KUBERNETES_SELECTOR")]
    kubernetes_selector: Option<String>,
    /// Names an InferencePool whose pods are workers, as NAME or NAMESPACE/NAME
    ///
    /// Its selector and its target ports are used.
    #[arg(
        long,
        value_name = "NAME",
        value_delimiter = ',',
        env = "FORESEE_KUBERNETES_POOL"
    )]
    kubernetes_pool: Vec<PoolName>,
    /// Sets the namespace of the pods; * selects all namespaces
    ///
    /// The default is that of the service account, or of the kubeconfig.
    #[arg(long, value_name = "NAME", value_parser = namespace, env = "FORESEE_KUBERNETES_NAMESPACE")]
    kubernetes_namespace: Option<String>,
    /// Sets the ports at which each pod of --kubernetes-selector has an engine
    ///
    /// Each port is a worker, such as the ranks of a data-parallel engine. Annotations of a pod win.
    #[arg(
        long,
        value_name = "PORT",
        value_delimiter = ',',
        default_values_t = DEFAULTS.discovery.kubernetes.ports.clone(),
        value_parser = clap::value_parser!(u16).range(1..),
        env = "FORESEE_KUBERNETES_PORTS"
    )]
    kubernetes_ports: Vec<u16>,
    /// Sets the time after which all pods are listed again, whatever the API server has sent
    #[arg(
        long,
        default_value_t = DEFAULTS.discovery.kubernetes.resync.into(),
        value_name = "DURATION",
        value_parser = positive_duration,
        env = "FORESEE_KUBERNETES_RESYNC"
    )]
    kubernetes_resync: humantime::Duration,
    /// Names a kubeconfig file with the API server and the credentials
    ///
    /// The default is the service account of the router's pod, or else what kubectl would use.
    #[arg(long, value_name = "FILE", env = "FORESEE_KUBERNETES_CONFIG")]
    kubernetes_config: Option<PathBuf>,
}

impl KubernetesArgs {
    /// Returns which pods are workers.
    fn config(self) -> KubernetesConfig {
        KubernetesConfig {
            selector: self.kubernetes_selector,
            pools: self.kubernetes_pool,
            namespace: self.kubernetes_namespace,
            ports: self.kubernetes_ports,
            resync: self.kubernetes_resync.into(),
            kubeconfig: self.kubernetes_config,
        }
    }
}

impl DiscoveryArgs {
    /// Returns the lists of workers.
    pub(super) fn config(self) -> DiscoveryConfig {
        DiscoveryConfig {
            files: self.discovery_file,
            urls: self.discovery_url,
            refresh: self.discovery_refresh.into(),
            allows_empty: self.discovery_allow_empty == Switch::On,
            url_ca: self.discovery_ca,
            names: self.discovery_dns,
            dns_server: self.discovery_dns_server,
            kubernetes: self.kubernetes.config(),
        }
    }
}

/// Parses the URL of a list.
fn list_url(text: &str) -> Result<Uri, String> {
    let url = Uri::from_str(text).ok();
    let is_known = |url: &Uri| {
        let authority = url.authority().map(|authority| authority.as_str());
        matches!(url.scheme_str(), Some("http" | "https"))
            && authority.is_some_and(|authority| !authority.contains('@'))
    };
    url.filter(is_known).ok_or_else(|| {
        format!(
            "`{text}` is not an http:// or https:// URL without a user name, such as \
             http://host:8000/targets"
        )
    })
}

/// Parses a selector of labels, which the API server checks.
fn selector(text: &str) -> Result<String, String> {
    if text.trim().is_empty() {
        return Err("an empty selector would select all pods".to_owned());
    }
    Ok(text.to_owned())
}

/// Parses the name of a namespace, or `*`.
fn namespace(text: &str) -> Result<String, String> {
    if text == "*" || is_kubernetes_name(text) {
        return Ok(text.to_owned());
    }
    Err(format!(
        "`{text}` is not a namespace; write * for all namespaces"
    ))
}
