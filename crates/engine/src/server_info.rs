//! Descriptions that engines give of themselves, with the endpoint of their KV events: SGLang at
//! `/server_info` (`/get_server_info` in older releases), vLLM since 0.32 at `/kv_event_sources`.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

/// The description of one SGLang server. A value that the server does not report is `None`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerInfo {
    /// Tokens per page. SGLang calls a block a page.
    pub page_size: Option<u32>,
    /// Number of pages of each rank that requests can use.
    pub pages: Option<u32>,
    /// Number of data-parallel ranks at this address, at least 1.
    pub ranks: u32,
    /// The endpoint of the server's KV events.
    pub kv_events: KvEventEndpoint,
}

/// The ZeroMQ endpoint at which a server publishes KV events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KvEventEndpoint {
    /// The server publishes no KV events, or not at an endpoint that another process can reach.
    None,
    /// The server binds a socket, to which subscribers connect.
    Bind {
        /// The configured host, which may be a wildcard such as `*`.
        host: String,
        /// The port. If the server reports one port for all ranks, it is the port of rank 0, and
        /// rank `r` uses this port + `r`.
        port: u16,
        /// The port of the socket for event replay, if there is one. Ranks use it like `port`.
        replay_port: Option<u16>,
        /// Prefix of the server's messages; may be empty.
        topic: String,
    },
    /// The server connects to a subscriber that binds this endpoint.
    Connect(String),
}

impl ServerInfo {
    /// Parses the body of a response; `None` if it is not the description of an SGLang server,
    /// which is a JSON object with a `page_size`. A field of an unexpected type counts as not
    /// reported.
    #[must_use]
    pub fn parse(body: &[u8]) -> Option<Self> {
        /// The fields as untyped values, so that one field of an unexpected type does not hide the
        /// others.
        #[derive(Deserialize)]
        struct Fields {
            page_size: Value,
            #[serde(default)]
            max_total_num_tokens: Value,
            #[serde(default)]
            dp_size: Value,
            #[serde(default)]
            kv_events_config: Value,
            #[serde(default)]
            kv_events: Value,
        }
        let fields: Fields = serde_json::from_slice(body).ok()?;
        let page_size = positive(&fields.page_size);
        let tokens = positive(&fields.max_total_num_tokens);
        Some(Self {
            page_size,
            pages: tokens.zip(page_size).map(|(tokens, size)| tokens / size),
            ranks: positive(&fields.kv_events["dp_size"])
                .or(positive(&fields.dp_size))
                .unwrap_or(1),
            kv_events: read_kv_events(&fields.kv_events_config, &fields.kv_events),
        })
    }
}

/// Parses the endpoint at which each rank of a vLLM publishes KV events, by rank; `None` if the
/// body does not contain such a list. A rank whose endpoint is missing or is not a TCP endpoint has
/// [`KvEventEndpoint::None`].
///
/// vLLM binds endpoints with a wildcard host and connects to all others. If it bound a port chosen
/// by the system, it reports that endpoint with its own address. `is_own` returns whether a host is
/// an address of that vLLM.
#[must_use]
pub fn parse_event_sources(
    body: &[u8],
    is_own: impl Fn(&str) -> bool,
) -> Option<BTreeMap<u32, KvEventEndpoint>> {
    let sources: BTreeMap<u32, Value> = serde_json::from_slice(body).ok()?;
    let parse_endpoint = |source: &Value| {
        let endpoint = source["endpoint"].as_str().unwrap_or("");
        let binds = |host: &str| endpoint.contains('*') || endpoint.contains("::") || is_own(host);
        match host_and_port(endpoint) {
            Some((host, _)) if !binds(host) => KvEventEndpoint::Connect(endpoint.to_owned()),
            Some((host, port)) => KvEventEndpoint::Bind {
                host: host.to_owned(),
                port,
                replay_port: source["replay_endpoint"]
                    .as_str()
                    .and_then(host_and_port)
                    .map(|(_, port)| port),
                topic: source["topic"].as_str().unwrap_or("").to_owned(),
            },
            None => KvEventEndpoint::None,
        }
    };
    let endpoints = sources.iter();
    Some(
        endpoints
            .map(|(&rank, source)| (rank, parse_endpoint(source)))
            .collect(),
    )
}

/// Returns the endpoint of an SGLang's KV events; [`KvEventEndpoint::None`] if it does not publish
/// over ZeroMQ, or if the endpoint is not a TCP endpoint.
///
/// `config` is the configuration, as JSON text or as an object, which determines how the socket is
/// opened. `described` is the description that newer releases add, which contains the ports that
/// are in use. These ports take precedence.
fn read_kv_events(config: &Value, described: &Value) -> KvEventEndpoint {
    let config: Value = match config {
        Value::String(json) => serde_json::from_str(json).unwrap_or_default(),
        config => config.clone(),
    };
    let publishes = |value: &Value| value["publisher"].as_str() == Some("zmq");
    if !publishes(&config) && !publishes(described) {
        return KvEventEndpoint::None;
    }
    // The default of SGLang.
    let endpoint = config["endpoint"].as_str().unwrap_or("tcp://*:5557");
    let Some((host, port)) = host_and_port(endpoint) else {
        return KvEventEndpoint::None;
    };
    let has_wildcard = ["*", "0.0.0.0", "::"]
        .iter()
        .any(|wildcard| endpoint.contains(wildcard));
    if !config["bind"].as_bool().unwrap_or(has_wildcard) {
        return KvEventEndpoint::Connect(endpoint.to_owned());
    }
    let described_port = |key: &str| u16::try_from(described[key].as_u64()?).ok();
    let replay = config["replay_endpoint"].as_str().and_then(host_and_port);
    KvEventEndpoint::Bind {
        host: host.to_owned(),
        port: described_port("endpoint_port_base").unwrap_or(port),
        replay_port: described_port("replay_endpoint_port_base").or(replay.map(|(_, port)| port)),
        topic: config["topic"].as_str().unwrap_or("").to_owned(),
    }
}

/// Splits a TCP endpoint; `None` for another transport or without a port above 0.
fn host_and_port(endpoint: &str) -> Option<(&str, u16)> {
    let (host, port) = endpoint.strip_prefix("tcp://")?.rsplit_once(':')?;
    Some((host, port.parse().ok().filter(|&port| port > 0)?))
}

/// Returns a value that is a positive integer.
fn positive(value: &Value) -> Option<u32> {
    let number = u32::try_from(value.as_u64()?).ok()?;
    (number > 0).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn kv_events(config: &Value) -> KvEventEndpoint {
        let body = json!({"page_size": 64, "kv_events_config": config.to_string()});
        let info = ServerInfo::parse(body.to_string().as_bytes()).unwrap();
        info.kv_events
    }

    #[test]
    fn the_endpoint_is_taken_from_the_configuration_alone() {
        let config = json!({"publisher": "zmq", "endpoint": "tcp://*:6000", "topic": "kv",
            "replay_endpoint": "tcp://*:6100"});
        let binds = KvEventEndpoint::Bind {
            host: "*".to_owned(),
            port: 6000,
            replay_port: Some(6100),
            topic: "kv".to_owned(),
        };
        assert_eq!(kv_events(&config), binds);
        let by_default = KvEventEndpoint::Bind {
            host: "*".to_owned(),
            port: 5557,
            replay_port: None,
            topic: String::new(),
        };
        assert_eq!(kv_events(&json!({"publisher": "zmq"})), by_default);
    }

    #[test]
    fn a_concrete_host_is_connected_to_unless_the_configuration_binds_it() {
        let mut config = json!({"publisher": "zmq", "endpoint": "tcp://router:6000"});
        let connects = KvEventEndpoint::Connect("tcp://router:6000".to_owned());
        assert_eq!(kv_events(&config), connects);
        config["bind"] = json!(true);
        assert!(matches!(kv_events(&config), KvEventEndpoint::Bind { .. }));
        config["endpoint"] = json!("tcp://*:6000");
        config["bind"] = json!(false);
        assert!(matches!(kv_events(&config), KvEventEndpoint::Connect(_)));
    }

    #[test]
    fn an_unreachable_endpoint_is_none() {
        for config in [
            json!(null),
            json!({"publisher": "null"}),
            json!({"publisher": "zmq", "endpoint": "inproc://cache"}),
            json!({"publisher": "zmq", "endpoint": "tcp://*:0"}),
            json!([]),
        ] {
            assert_eq!(kv_events(&config), KvEventEndpoint::None, "{config}");
        }
    }

    #[test]
    fn responses_of_other_servers_are_none() {
        for body in ["", "{}", "[]", r#"{"vllm_config": {}}"#, "null"] {
            assert_eq!(ServerInfo::parse(body.as_bytes()), None, "{body}");
        }
        for body in ["", "[]", "null", r#"{"detail": "Not Found"}"#] {
            let sources = parse_event_sources(body.as_bytes(), |_| true);
            assert_eq!(sources, None, "{body}");
        }
    }

    #[test]
    fn vllm_binds_wildcards_and_its_own_addresses_and_connects_to_all_others() {
        let body = json!({
            "3": {"endpoint": "tcp://*:5560", "topic": ""},
            "4": {"endpoint": "tcp://router:5561"},
            "5": {"endpoint": "ipc:///tmp/kv"},
            "6": {"endpoint": "tcp://10.0.0.7:41000", "replay_endpoint": "tcp://10.0.0.7:41001"},
        });
        let is_own = |host: &str| host == "10.0.0.7";
        let sources = parse_event_sources(body.to_string().as_bytes(), is_own).unwrap();
        let bound_at = |host: &str, port, replay_port| KvEventEndpoint::Bind {
            host: host.to_owned(),
            port,
            replay_port,
            topic: String::new(),
        };
        let connects = KvEventEndpoint::Connect("tcp://router:5561".to_owned());
        let expected = [
            (3, bound_at("*", 5560, None)),
            (4, connects),
            (5, KvEventEndpoint::None),
            (6, bound_at("10.0.0.7", 41000, Some(41001))),
        ];
        assert_eq!(sources, expected.into());
        assert_eq!(parse_event_sources(b"{}", is_own), Some(BTreeMap::new()));
    }

    proptest! {
        #[test]
        fn no_value_causes_a_panic(page_size in ".{0,9}", config in ".{0,40}", described in ".{0,40}") {
            let _ = parse_event_sources(format!(r#"{{"0":{config}}}"#).as_bytes(), |_| false);
            for body in [
                format!(r#"{{"page_size":{page_size},"kv_events_config":{config}}}"#),
                format!(r#"{{"page_size":1,"kv_events_config":{config:?},"kv_events":{described}}}"#),
                json!({"page_size": 1, "kv_events_config": config, "kv_events": described}).to_string(),
            ] {
                let _ = ServerInfo::parse(body.as_bytes());
            }
        }
    }
}
