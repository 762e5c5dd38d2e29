//! Where a worker publishes its KV events, as it is written in the worker's description.

use std::fmt;
use std::str::FromStr;

use zeromq::Endpoint;

/// How the router learns what a worker caches.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum KvEvents {
    /// From its events, if it says by itself where they are, as SGLang does.
    #[default]
    Discovered,
    /// Not from events, whatever it says.
    Off,
    /// From the events that are here.
    At(EventSource),
}

/// Where a worker publishes its KV events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventSource {
    /// Where its PUB socket is, or where it dials.
    pub endpoint: String,
    /// Whether the worker dials us: we bind. One address is for one worker, whose sequence
    /// numbers are its own.
    pub binds: bool,
    /// Where its ROUTER socket is, which sends batches again.
    pub replay: Option<String>,
    /// The topic its messages are published under, if others share the endpoint; empty takes
    /// all.
    pub topic: String,
}

impl EventSource {
    /// Where one of several ranks publishes: they listen at consecutive ports. `None` if there
    /// is no such port.
    pub(crate) fn of_rank(&self, rank: u32) -> Option<Self> {
        let replay = self.replay.as_deref();
        Some(Self {
            endpoint: later_port(&self.endpoint, rank)?,
            replay: match replay {
                Some(endpoint) => Some(later_port(endpoint, rank)?),
                None => None,
            },
            ..self.clone()
        })
    }
}

/// The endpoint with its port moved on.
fn later_port(endpoint: &str, by: u32) -> Option<String> {
    if by == 0 {
        return Some(endpoint.to_owned());
    }
    let (before, port) = endpoint
        .strip_prefix("tcp://")
        .and_then(|address| address.rsplit_once(':'))?;
    let port = u16::try_from(port.parse::<u32>().ok()?.checked_add(by)?).ok()?;
    Some(format!("tcp://{before}:{port}"))
}

impl FromStr for EventSource {
    type Err = String;

    /// Reads `tcp://HOST:PORT` or `ipc://PATH`, with `bind:` before it if the worker dials us.
    fn from_str(given: &str) -> Result<Self, String> {
        let (binds, endpoint) = match given.strip_prefix("bind:") {
            Some(endpoint) => (true, endpoint),
            None => (false, given),
        };
        // As libzmq has it, `*` is every interface.
        let endpoint = match endpoint.strip_prefix("tcp://*:") {
            Some(port) if binds => format!("tcp://0.0.0.0:{port}"),
            Some(_) => return Err("`*` is no host to connect to".to_owned()),
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

/// Says what is wrong with an address.
pub(crate) fn check_endpoint(endpoint: &str) -> Result<(), String> {
    let parsed = endpoint.parse::<Endpoint>();
    parsed.map(|_| ()).map_err(|error| {
        format!("`{endpoint}` is no address ({error}); write tcp://HOST:PORT or ipc://PATH")
    })
}

impl fmt::Display for EventSource {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bind = if self.binds { "bind:" } else { "" };
        write!(formatter, "{bind}{}", self.endpoint)
    }
}
