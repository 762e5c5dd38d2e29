//! Settings of discovery.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use http::Uri;

/// Returns a URL without a user and a query, which may have a password or a token.
pub(crate) fn shown_url(url: &Uri) -> String {
    let scheme = url.scheme_str().unwrap_or("http");
    let port = url.port().map(|port| format!(":{port}"));
    let (host, port) = (url.host().unwrap_or(""), port.unwrap_or_default());
    format!("{scheme}://{host}{port}{}", url.path())
}

/// Where workers are listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiscoveryConfig {
    /// Files in JSON or YAML, which are read again when they change.
    pub files: Vec<PathBuf>,
    /// `http://` and `https://` URLs, which are read in intervals.
    pub urls: Vec<Uri>,
    /// Certificates in PEM of the authorities that sign the URLs' servers; `None` for those that the
    /// system trusts.
    pub url_ca: Option<PathBuf>,
    /// Time between two requests to a URL.
    pub refresh: Duration,
    /// Whether an empty list removes the workers of its source.
    pub allows_empty: bool,
    /// Names in DNS.
    pub names: Vec<DnsName>,
    /// Server that resolves `names`; `None` for those of the operating system.
    pub dns_server: Option<SocketAddr>,
    /// Pods of Kubernetes.
    pub kubernetes: KubernetesConfig,
}

impl DiscoveryConfig {
    /// Returns whether workers are listed anywhere.
    #[must_use]
    pub fn has_sources(&self) -> bool {
        !self.files.is_empty()
            || !self.urls.is_empty()
            || !self.names.is_empty()
            || self.kubernetes.is_used()
    }
}

impl Default for DiscoveryConfig {
    fn default() -> Self {
        Self {
            files: Vec::new(),
            urls: Vec::new(),
            url_ca: None,
            refresh: Duration::from_secs(30),
            allows_empty: false,
            names: Vec::new(),
            dns_server: None,
            kubernetes: KubernetesConfig::default(),
        }
    }
}

/// Which pods of Kubernetes are workers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KubernetesConfig {
    /// Selector of labels, as `kubectl get pods --selector` reads it; `None` to follow pools alone.
    pub selector: Option<String>,
    /// InferencePools, whose selectors and ports are used.
    pub pools: Vec<PoolName>,
    /// Namespace of the pods of `selector` and of pools without one; `*` for all namespaces, and
    /// `None` for that of the service account or of the kubeconfig.
    pub namespace: Option<String>,
    /// Ports at which each pod of `selector` has an engine, unless its annotations say otherwise.
    pub ports: Vec<u16>,
    /// Time after which all pods are listed again, whatever the watch of changes says.
    pub resync: Duration,
    /// kubeconfig file; `None` for the service account of the pod, or else for the file of `kubectl`.
    pub kubeconfig: Option<PathBuf>,
}

impl KubernetesConfig {
    /// Returns whether pods are followed.
    #[must_use]
    pub fn is_used(&self) -> bool {
        self.selector.is_some() || !self.pools.is_empty()
    }
}

impl Default for KubernetesConfig {
    fn default() -> Self {
        Self {
            selector: None,
            pools: Vec::new(),
            namespace: None,
            ports: vec![8000],
            resync: Duration::from_secs(180),
            kubeconfig: None,
        }
    }
}

/// Name of an InferencePool, written `[NAMESPACE/]NAME`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PoolName {
    /// Namespace; `None` for that of the other settings.
    pub namespace: Option<String>,
    /// Name in the namespace.
    pub name: String,
}

impl fmt::Display for PoolName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.namespace {
            Some(namespace) => write!(f, "{namespace}/{}", self.name),
            None => f.write_str(&self.name),
        }
    }
}

impl FromStr for PoolName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (namespace, name) = match text.split_once('/') {
            Some((namespace, name)) => (Some(namespace), name),
            None => (None, text),
        };
        if !is_kubernetes_name(name) || !namespace.is_none_or(is_kubernetes_name) {
            return Err(format!(
                "`{text}` is not the name of an InferencePool: write NAME or NAMESPACE/NAME"
            ));
        }
        Ok(Self {
            namespace: namespace.map(str::to_owned),
            name: name.to_owned(),
        })
    }
}

/// Returns whether a text can be the name of an object of Kubernetes, and so a part of a path.
#[must_use]
pub fn is_kubernetes_name(text: &str) -> bool {
    let is_part = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    let is_valid = |label: &str| !label.is_empty() && label.bytes().all(is_part);
    text.len() <= 253 && text.split('.').all(is_valid)
}

/// A name in DNS, written `[SCHEME://]NAME:PORT` for its addresses, or `[SCHEME://]_SERVICE._tcp.NAME`
/// for its SRV records.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DnsName {
    /// Whether the workers speak HTTPS.
    pub is_https: bool,
    /// The name.
    pub name: String,
    /// Port of the engines; `None` for that of the SRV records.
    pub port: Option<u16>,
}

impl fmt::Display for DnsName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.is_https { "https://" } else { "" };
        write!(f, "{scheme}{}", self.name)?;
        match self.port {
            Some(port) => write!(f, ":{port}"),
            None => Ok(()),
        }
    }
}

impl FromStr for DnsName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let problem = || {
            format!(
                "`{text}` is not a name to discover: write NAME:PORT for its addresses, or \
                 _http._tcp.NAME for its SRV records, with https:// before it for TLS"
            )
        };
        let (is_https, rest) = match text.split_once("://") {
            None => (false, text),
            Some(("http", rest)) => (false, rest),
            Some(("https", rest)) => (true, rest),
            Some(_) => return Err(problem()),
        };
        let (name, port) = match rest.split_once(':') {
            Some((name, port)) => {
                let port = port.parse().ok().filter(|&port: &u16| port > 0);
                (name, Some(port.ok_or_else(problem)?))
            }
            None => (rest, None),
        };
        let is_part = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        let is_name = !name.is_empty() && name.len() <= 253 && name.bytes().all(is_part);
        if !is_name || name.starts_with('_') == port.is_some() {
            return Err(problem());
        }
        Ok(Self {
            is_https,
            name: name.to_owned(),
            port,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        for text in [
            "gpu:8000",
            "_http._tcp.gpu.svc",
            "https://gpu:1",
            "https://_x._tcp.gpu",
        ] {
            assert_eq!(text.parse::<DnsName>().unwrap().to_string(), text);
        }
        for text in [
            "gpu",
            "_http._tcp.gpu:1",
            "gpu:0",
            "gpu:x",
            "ftp://gpu:1",
            "a/b:1",
            ":1",
        ] {
            let error = text.parse::<DnsName>().unwrap_err();
            assert!(error.contains(text), "{error}");
        }
        for text in ["pool", "ns/pool"] {
            assert_eq!(text.parse::<PoolName>().unwrap().to_string(), text);
        }
        for text in ["", "a/b/c", "A", "/a", "a/", "..", "a?b"] {
            assert!(text.parse::<PoolName>().is_err(), "{text}");
        }
    }
}
