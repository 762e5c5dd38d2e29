//! Where a worker publishes its KV events, as it is written in the worker's description.

use std::fmt;
use std::str::FromStr;

use zeromq::Endpoint;

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
