//! Parsing of `/metrics` recorded from real engines, without histogram buckets.

use foresee_engine::worker_metrics::{CacheConfig, EngineLoad};

const VLLM_TWO_RANKS: &str = include_str!("../worker_metrics/vllm-0.32-dp2.txt");
const SGLANG: &str = include_str!("../worker_metrics/sglang-0.5.23.txt");
const SGLANG_UNUSED: &str = include_str!("../worker_metrics/sglang-0.5.23-unused.txt");

/// `--data-parallel-size 2 --num-gpu-blocks-override 72`: each rank reports 144 blocks.
#[test]
fn the_ranks_of_vllm_are_distinguished() {
    let cache = CacheConfig {
        block_size: Some(32),
        blocks: Some(71),
        prefix_caching: Some(true),
    };
    assert_eq!(CacheConfig::parse(VLLM_TWO_RANKS), [(0, cache), (1, cache)]);
    // 0.3661971830985915 and 0.619718309859155 of 71.
    let loads = EngineLoad::parse(VLLM_TWO_RANKS);
    let rounded: Vec<_> = loads
        .iter()
        .map(|(rank, load)| {
            (
                *rank,
                load.active_blocks.round(),
                load.running,
                load.waiting,
            )
        })
        .collect();
    assert_eq!(rounded, [(0, 26.0, 1, 0), (1, 44.0, 2, 0)]);
    for (_, load) in loads {
        assert!((load.active_blocks - load.active_blocks.round()).abs() < 1e-9);
    }
}

/// `--page-size 16 --max-total-tokens 2304`, two requests running, one queued.
#[test]
fn sglang_reports_pinned_pages() {
    let cache = CacheConfig {
        block_size: Some(16),
        blocks: Some(144),
        prefix_caching: None,
    };
    assert_eq!(CacheConfig::parse(SGLANG), [(0, cache)]);
    let load = EngineLoad {
        active_blocks: 70.0,
        running: 2,
        waiting: 1,
    };
    assert_eq!(EngineLoad::parse(SGLANG), [(0, load)]);
    // Before its first request, SGLang reports no load.
    assert_eq!(CacheConfig::parse(SGLANG_UNUSED), [(0, cache)]);
    assert_eq!(EngineLoad::parse(SGLANG_UNUSED), []);
}
