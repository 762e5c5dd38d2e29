//! Parsing of server information recorded from real engines, without the model's path and SGLang's
//! `internal_states`, which repeat the other fields.

use foresee_engine::server_info::{KvEventEndpoint, ServerInfo, parse_event_sources};

const SGLANG: &str = include_str!("../server_info/sglang-0.5.23.json");
const VLLM_TWO_RANKS: &str = include_str!("../server_info/vllm-0.32-dp2.json");

/// `--page-size 16 --max-total-tokens 2304`, events bound at 127.0.0.1:8901, replay at 9401.
#[test]
fn sglang_reports_its_pages_and_its_event_endpoint() {
    let expected = ServerInfo {
        page_size: Some(16),
        pages: Some(144),
        ranks: 1,
        kv_events: KvEventEndpoint::Bind {
            host: "127.0.0.1".to_owned(),
            port: 8901,
            replay_port: Some(9401),
            topic: "kv-events".to_owned(),
        },
    };
    assert_eq!(ServerInfo::parse(SGLANG.as_bytes()), Some(expected));
}

/// `--data-parallel-size 2`, events at `tcp://*:8903`, replay at 9403.
#[test]
fn vllm_reports_the_event_endpoint_of_each_rank() {
    let endpoint = |rank: u16| KvEventEndpoint::Bind {
        host: "*".to_owned(),
        port: 8903 + rank,
        replay_port: Some(9403 + rank),
        topic: "kv-events".to_owned(),
    };
    let expected = [(0, endpoint(0)), (1, endpoint(1))];
    assert_eq!(
        parse_event_sources(VLLM_TWO_RANKS.as_bytes(), |_| false),
        Some(expected.into())
    );
}
