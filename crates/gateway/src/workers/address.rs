//! Where connections to a worker go: to the host of its URL, or to the address that the gateway
//! resolved it to.

use std::net::{IpAddr, SocketAddr};

use http::HeaderValue;
use http::uri::Authority;
use tokio::sync::watch;

use crate::workers::worker_config::WorkerConfig;

/// State of a worker's address.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Resolution {
    /// The URL is used as it is: its host is an address, or is resolved for each connection.
    NotNeeded,
    /// The first look-up of the host name has not ended.
    Pending,
    /// The host name was never resolved; the error of the last look-up.
    Failed(String),
    /// Connections go to this address. Later failures of look-ups do not change that.
    Resolved {
        ip: IpAddr,
        /// Host and port of the connections.
        authority: Authority,
    },
}

/// Address of one worker.
#[derive(Debug)]
pub(crate) struct WorkerAddress {
    /// Host and port of the URL.
    configured: Authority,
    host: String,
    port: u16,
    /// Value of the `host` header; `None` if that follows from the URL of the request.
    host_header: Option<HeaderValue>,
    resolution: watch::Sender<Resolution>,
}

impl WorkerAddress {
    /// Returns the address of a worker with this description, before any look-up.
    pub(crate) fn new(config: &WorkerConfig) -> Self {
        let is_resolved = config.is_resolved_in_background();
        // As HTTP clients write it: the port is left out if it is the scheme's.
        let host = match config.port() {
            80 => config.authority.host().to_owned(),
            port => format!("{}:{port}", config.authority.host()),
        };
        Self {
            configured: config.authority.clone(),
            host: config.host().to_owned(),
            port: config.port(),
            host_header: is_resolved
                .then(|| HeaderValue::try_from(host).ok())
                .flatten(),
            resolution: watch::Sender::new(if is_resolved {
                Resolution::Pending
            } else {
                Resolution::NotNeeded
            }),
        }
    }

    /// Sets the address of later connections. Open connections stay as they are.
    pub(crate) fn resolve_to(&self, ip: IpAddr) {
        let text = SocketAddr::new(ip, self.port).to_string();
        // The text of a socket address is a valid authority.
        let authority = text.parse().unwrap_or_else(|_| self.configured.clone());
        self.resolution
            .send_replace(Resolution::Resolved { ip, authority });
    }

    /// Records that a look-up failed. Has no effect if an address is known.
    pub(crate) fn fail_look_up(&self, error: &str) {
        self.resolution.send_if_modified(|resolution| {
            let is_unresolved = matches!(resolution, Resolution::Pending | Resolution::Failed(_));
            if is_unresolved {
                *resolution = Resolution::Failed(error.to_owned());
            }
            is_unresolved
        });
    }

    /// Waits until the first look-up of the host name has ended, if one is needed. The resolver's
    /// time limit bounds the wait.
    pub(crate) async fn until_looked_up(&self) {
        let mut resolution = self.resolution.subscribe();
        // The worker owns the sender, so waiting does not fail.
        let _ = resolution
            .wait_for(|resolution| *resolution != Resolution::Pending)
            .await;
    }

    /// Returns the host and port for a request's URL: the resolved address, or else those of the
    /// worker's URL.
    pub(crate) fn authority(&self) -> Authority {
        match &*self.resolution.borrow() {
            Resolution::Resolved { authority, .. } => authority.clone(),
            _ => self.configured.clone(),
        }
    }

    /// Returns the value of the `host` header of requests; `None` if it follows from their URL.
    pub(crate) fn host_header(&self) -> Option<&HeaderValue> {
        self.host_header.as_ref()
    }

    /// Returns the host of connections, an IPv6 address without brackets, and their port.
    pub(crate) fn host_and_port(&self) -> (String, u16) {
        match &*self.resolution.borrow() {
            Resolution::Resolved { ip, .. } => (ip.to_string(), self.port),
            _ => (self.host.clone(), self.port),
        }
    }

    /// Returns the host of connections as a part of a URL: an IPv6 address has brackets.
    pub(crate) fn url_host(&self) -> String {
        match &*self.resolution.borrow() {
            Resolution::Resolved {
                ip: IpAddr::V6(ip), ..
            } => format!("[{ip}]"),
            Resolution::Resolved { ip, .. } => ip.to_string(),
            _ => self.configured.host().to_owned(),
        }
    }

    /// Returns the address that the host name was resolved to; `None` for other workers and before
    /// the first successful look-up.
    pub(crate) fn resolved_ip(&self) -> Option<IpAddr> {
        match &*self.resolution.borrow() {
            Resolution::Resolved { ip, .. } => Some(*ip),
            _ => None,
        }
    }

    /// Returns why no connection can be opened yet; `None` if one can.
    pub(crate) fn unresolved_error(&self) -> Option<String> {
        match &*self.resolution.borrow() {
            Resolution::Pending => Some(format!("host name {} is not resolved yet", self.host)),
            Resolution::Failed(error) => {
                Some(format!("cannot resolve host name {}: {error}", self.host))
            }
            Resolution::NotNeeded | Resolution::Resolved { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(url: &str) -> WorkerAddress {
        WorkerAddress::new(&url.parse().unwrap())
    }

    #[test]
    fn a_resolved_name_stays_in_the_host_header() {
        let worker = address("gpu1:8000");
        assert!(worker.unresolved_error().unwrap().contains("gpu1"));
        worker.resolve_to("10.0.0.7".parse().unwrap());
        assert_eq!(worker.authority(), "10.0.0.7:8000");
        assert_eq!(worker.host_header().unwrap(), "gpu1:8000");
        assert_eq!(worker.unresolved_error(), None);
        worker.resolve_to("2001:db8::7".parse().unwrap());
        assert_eq!(worker.authority(), "[2001:db8::7]:8000");
        assert_eq!(worker.url_host(), "[2001:db8::7]");
        assert_eq!(worker.host_and_port(), ("2001:db8::7".to_owned(), 8000));
        assert_eq!(address("gpu1").host_header().unwrap(), "gpu1");
    }

    #[test]
    fn a_failed_look_up_keeps_a_known_address() {
        let worker = address("gpu1:8000");
        worker.fail_look_up("no such host");
        assert!(worker.unresolved_error().unwrap().contains("no such host"));
        worker.resolve_to("10.0.0.7".parse().unwrap());
        worker.fail_look_up("no such host");
        assert_eq!(worker.unresolved_error(), None);
        assert_eq!(worker.authority(), "10.0.0.7:8000");
    }

    #[test]
    fn an_address_is_used_as_it_is() {
        for url in ["10.0.0.7:8000", "[::1]:8000", "gpu1:8000,resolve=off"] {
            let worker = address(url);
            worker.fail_look_up("ignored");
            assert_eq!(worker.unresolved_error(), None);
            assert_eq!(worker.authority(), url.split(',').next().unwrap());
            assert_eq!(worker.host_header(), None);
        }
    }
}
