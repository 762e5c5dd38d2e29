//! What an engine says of itself, and where it publishes KV events: an SGLang at `/server_info`
//! (`/get_server_info` in older releases), a vLLM from 0.32 on at `/kv_event_sources`.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

/// What one SGLang server says of itself. What it does not say is `None`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerInfo {
    /// Tokens per page, which is what others call a block.
    pub page_size: Option<u32>,
    /// Pages of each rank that requests can use.
    pub pages: Option<u32>,
    /// Data-parallel ranks behind the address.
    pub ranks: u32,
    /// Where its KV events are.
    pub kv_events: Published,
}

/// Where a server's KV events are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Published {
    /// It publishes none, or where nobody can reach them.
    Nowhere,
    /// It listens for subscribers.
    Listens {
        /// The host as it was configured, which may be `*` and the like.
        host: String,
        /// Of rank 0, if it was said for all ranks: rank `r` is at this port + `r`.
        port: u16,
        /// The replay socket's, in the same way, if there is one.
        replay_port: Option<u16>,
        /// What its messages begin with; empty if nothing.
        topic: String,
    },
    /// It connects to a subscriber that listens at this endpoint.
    Dials(String),
}

impl ServerInfo {
    /// Reads the body of an answer; `None` if it is not an SGLang's.
    #[must_use]
    pub fn parse(body: &[u8]) -> Option<Self> {
        /// Fields are looked at one by one, so that one of another type hides no other.
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

/// Reads where each rank of a vLLM publishes; `None` if that is not what the body says.
///
/// A vLLM binds wildcards and dials the rest, but what it bound with a port of the system's choice
/// it tells as an address of its own: `is_own` says whether a host is that.
#[must_use]
pub fn parse_event_sources(
    body: &[u8],
    is_own: impl Fn(&str) -> bool,
) -> Option<BTreeMap<u32, Published>> {
    let sources: BTreeMap<u32, Value> = serde_json::from_slice(body).ok()?;
    let read = |source: &Value| {
        let endpoint = source["endpoint"].as_str().unwrap_or("");
        let binds = |host: &str| endpoint.contains('*') || endpoint.contains("::") || is_own(host);
        match host_and_port(endpoint) {
            Some((host, _)) if !binds(host) => Published::Dials(endpoint.to_owned()),
            Some((host, port)) => Published::Listens {
                host: host.to_owned(),
                port,
                replay_port: source["replay_endpoint"]
                    .as_str()
                    .and_then(host_and_port)
                    .map(|(_, port)| port),
                topic: source["topic"].as_str().unwrap_or("").to_owned(),
            },
            None => Published::Nowhere,
        }
    };
    Some(sources.iter().map(|(&rank, it)| (rank, read(it))).collect())
}

/// The configuration says how its socket is opened; the description of newer releases, where it
/// ended up.
fn read_kv_events(config: &Value, described: &Value) -> Published {
    let config: Value = match config {
        Value::String(json) => serde_json::from_str(json).unwrap_or_default(),
        other => other.clone(),
    };
    let publishes = |value: &Value| value["publisher"].as_str() == Some("zmq");
    if !publishes(&config) && !publishes(described) {
        return Published::Nowhere;
    }
    // As SGLang has it where nothing is said.
    let endpoint = config["endpoint"].as_str().unwrap_or("tcp://*:5557");
    let Some((host, port)) = host_and_port(endpoint) else {
        return Published::Nowhere;
    };
    let binds_by_itself = ["*", "0.0.0.0", "::"]
        .iter()
        .any(|it| endpoint.contains(it));
    if !config["bind"].as_bool().unwrap_or(binds_by_itself) {
        return Published::Dials(endpoint.to_owned());
    }
    let described_port = |key: &str| u16::try_from(described[key].as_u64()?).ok();
    let replay = config["replay_endpoint"].as_str().and_then(host_and_port);
    Published::Listens {
        host: host.to_owned(),
        port: described_port("endpoint_port_base").unwrap_or(port),
        replay_port: described_port("replay_endpoint_port_base").or(replay.map(|(_, port)| port)),
        topic: config["topic"].as_str().unwrap_or("").to_owned(),
    }
}

fn host_and_port(endpoint: &str) -> Option<(&str, u16)> {
    let (host, port) = endpoint.strip_prefix("tcp://")?.rsplit_once(':')?;
    Some((host, port.parse().ok().filter(|&port| port > 0)?))
}

fn positive(value: &Value) -> Option<u32> {
    let number = u32::try_from(value.as_u64()?).ok()?;
    (number > 0).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn kv_events(config: &Value) -> Published {
        let body = json!({"page_size": 64, "kv_events_config": config.to_string()});
        let info = ServerInfo::parse(body.to_string().as_bytes()).unwrap();
        info.kv_events
    }

    #[test]
    fn releases_that_show_only_their_configuration() {
        let config = json!({"publisher": "zmq", "endpoint": "tcp://*:6000", "topic": "kv",
            "replay_endpoint": "tcp://*:6100"});
        let listens = Published::Listens {
            host: "*".to_owned(),
            port: 6000,
            replay_port: Some(6100),
            topic: "kv".to_owned(),
        };
        assert_eq!(kv_events(&config), listens);
        let by_default = Published::Listens {
            host: "*".to_owned(),
            port: 5557,
            replay_port: None,
            topic: String::new(),
        };
        assert_eq!(kv_events(&json!({"publisher": "zmq"})), by_default);
    }

    #[test]
    fn a_concrete_host_is_dialled_unless_it_is_bound() {
        let mut config = json!({"publisher": "zmq", "endpoint": "tcp://router:6000"});
        let dials = Published::Dials("tcp://router:6000".to_owned());
        assert_eq!(kv_events(&config), dials);
        config["bind"] = json!(true);
        assert!(matches!(kv_events(&config), Published::Listens { .. }));
        config["endpoint"] = json!("tcp://*:6000");
        config["bind"] = json!(false);
        assert!(matches!(kv_events(&config), Published::Dials(_)));
    }

    #[test]
    fn what_nobody_can_reach_is_nowhere() {
        for config in [
            json!(null),
            json!({"publisher": "null"}),
            json!({"publisher": "zmq", "endpoint": "inproc://cache"}),
            json!({"publisher": "zmq", "endpoint": "tcp://*:0"}),
            json!([]),
        ] {
            assert_eq!(kv_events(&config), Published::Nowhere, "{config}");
        }
    }

    #[test]
    fn other_servers_are_none() {
        for body in ["", "{}", "[]", r#"{"vllm_config": {}}"#, "null"] {
            assert_eq!(ServerInfo::parse(body.as_bytes()), None, "{body}");
        }
        for body in ["", "[]", "null", r#"{"detail": "Not Found"}"#] {
            let sources = parse_event_sources(body.as_bytes(), |_| true);
            assert_eq!(sources, None, "{body}");
        }
    }

    #[test]
    fn vllm_binds_wildcards_and_its_own_addresses_and_dials_the_rest() {
        let body = json!({
            "3": {"endpoint": "tcp://*:5560", "topic": ""},
            "4": {"endpoint": "tcp://router:5561"},
            "5": {"endpoint": "ipc:///tmp/kv"},
            "6": {"endpoint": "tcp://10.0.0.7:41000", "replay_endpoint": "tcp://10.0.0.7:41001"},
        });
        let is_own = |host: &str| host == "10.0.0.7";
        let sources = parse_event_sources(body.to_string().as_bytes(), is_own).unwrap();
        let listens = |host: &str, port, replay_port| Published::Listens {
            host: host.to_owned(),
            port,
            replay_port,
            topic: String::new(),
        };
        let dials = Published::Dials("tcp://router:5561".to_owned());
        let expected = [
            (3, listens("*", 5560, None)),
            (4, dials),
            (5, Published::Nowhere),
            (6, listens("10.0.0.7", 41000, Some(41001))),
        ];
        assert_eq!(sources, expected.into());
        assert_eq!(parse_event_sources(b"{}", is_own), Some(BTreeMap::new()));
    }

    proptest! {
        #[test]
        fn any_value_is_survived(page_size in ".{0,9}", config in ".{0,40}", described in ".{0,40}") {
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
