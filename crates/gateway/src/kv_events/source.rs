//! Addresses of KV events, as a worker's description contains them.

use std::fmt;
use std::str::FromStr;

use zeromq::Endpoint;

/// Where the router looks for a worker's KV events.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum KvEvents {
    /// At the address that the engine reports, if it reports one: SGLang, and vLLM from 0.32 on.
    #[default]
    Discovered,
    /// Nowhere, even if the engine reports an address.
    Off,
    /// At this address.
    At(EventSource),
}

/// Where a worker publishes its KV events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventSource {
    /// Address of the worker's PUB socket or, if [`binds`](Self::binds), the local address that the
    /// worker connects to.
    pub endpoint: String,
    /// Whether the gateway binds `endpoint` and the worker connects to it. Each worker needs an
    /// address of its own, because sequence numbers are counted per worker.
    pub binds: bool,
    /// Address of the worker's ROUTER socket, which sends earlier event batches again; `None`
    /// without event replay.
    pub replay: Option<String>,
    /// Topic of the worker's messages, needed if several workers share an endpoint. An empty topic
    /// accepts all messages.
    pub topic: String,
}

impl EventSource {
    /// Returns the source with the host `to` in place of the host `from`. Addresses with another host
    /// are kept, and so is an address that the gateway binds.
    pub(crate) fn with_host(&self, from: &str, to: &str) -> Self {
        let replay = self.replay.as_deref();
        Self {
            endpoint: if self.binds {
                self.endpoint.clone()
            } else {
                replace_host(&self.endpoint, from, to)
            },
            replay: replay.map(|endpoint| replace_host(endpoint, from, to)),
            ..self.clone()
        }
    }

    /// Returns the addresses of rank `rank`, for an engine whose ranks publish on consecutive ports
    /// and whose rank 0 publishes here. For ranks other than 0, `None` if an address is not
    /// `tcp://` with a port, or the port would exceed 65535.
    pub(crate) fn for_rank(&self, rank: u32) -> Option<Self> {
        let replay = self.replay.as_deref();
        Some(Self {
            endpoint: offset_port(&self.endpoint, rank)?,
            replay: match replay {
                Some(endpoint) => Some(offset_port(endpoint, rank)?),
                None => None,
            },
            ..self.clone()
        })
    }
}

/// Returns `endpoint` with the host `to` if its host is `from`; otherwise unchanged.
fn replace_host(endpoint: &str, from: &str, to: &str) -> String {
    let parts = endpoint
        .strip_prefix("tcp://")
        .and_then(|address| address.rsplit_once(':'));
    match parts {
        Some((host, port)) if host.eq_ignore_ascii_case(from) => format!("tcp://{to}:{port}"),
        _ => endpoint.to_owned(),
    }
}

/// Returns `endpoint` with `offset` added to its port. Offset 0 returns any endpoint unchanged.
/// Otherwise `None` if the endpoint is not `tcp://HOST:PORT`, or the port would exceed 65535.
fn offset_port(endpoint: &str, offset: u32) -> Option<String> {
    if offset == 0 {
        return Some(endpoint.to_owned());
    }
    let (before, port) = endpoint
        .strip_prefix("tcp://")
        .and_then(|address| address.rsplit_once(':'))?;
    let port = u16::try_from(port.parse::<u32>().ok()?.checked_add(offset)?).ok()?;
    Some(format!("tcp://{before}:{port}"))
}

impl FromStr for EventSource {
    type Err = String;

    /// Parses `tcp://HOST:PORT` or `ipc://PATH`. The prefix `bind:` means that the gateway binds
    /// the address and the worker connects to it.
    fn from_str(text: &str) -> Result<Self, String> {
        let (binds, endpoint) = match text.strip_prefix("bind:") {
            Some(endpoint) => (true, endpoint),
            None => (false, text),
        };
        // `*` stands for all interfaces, as in libzmq.
        let endpoint = match endpoint.strip_prefix("tcp://*:") {
            Some(port) if binds => format!("tcp://0.0.0.0:{port}"),
            Some(_) => {
                return Err(
                    "cannot connect to host `*`; write the worker's host, or bind:tcp://*:PORT"
                        .to_owned(),
                );
            }
            None => endpoint.to_owned(),
        };
        check_endpoint(&endpoint)?;
        Ok(Self {
            endpoint,
            binds,
            replay: None,
            topic: String::new(),
        })
    }
}

/// Checks that `endpoint` is an address of ZeroMQ. The error says what to write instead. Opens no
/// connection.
pub(crate) fn check_endpoint(endpoint: &str) -> Result<(), String> {
    let parsed = endpoint.parse::<Endpoint>();
    parsed.map(|_| ()).map_err(|error| {
        format!(
            "`{endpoint}` is not a valid address ({error}); write tcp://HOST:PORT or ipc://PATH"
        )
    })
}

impl fmt::Display for EventSource {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bind = if self.binds { "bind:" } else { "" };
        write!(formatter, "{bind}{}", self.endpoint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_of_the_worker_is_replaced_and_others_are_kept() {
        let mut source: EventSource = "tcp://gpu1:5557".parse().unwrap();
        source.replay = Some("tcp://GPU1:5558".to_owned());
        let resolved = source.with_host("gpu1", "[2001:db8::7]");
        assert_eq!(resolved.endpoint, "tcp://[2001:db8::7]:5557");
        assert_eq!(resolved.replay.as_deref(), Some("tcp://[2001:db8::7]:5558"));
        for kept in [
            "tcp://gpu12:5557",
            "ipc:///tmp/gpu1",
            "bind:tcp://gpu1:5557",
        ] {
            let source: EventSource = kept.parse().unwrap();
            assert_eq!(source.with_host("gpu1", "10.0.0.7"), source);
        }
    }
}
