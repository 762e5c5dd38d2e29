//! An engine's Prometheus metrics: the layout of each rank's cache, and the load on it.
//!
//! A vLLM or SGLang with several data-parallel ranks reports all ranks in one text and
//! distinguishes them by a label. Each value returned here belongs to one rank.

use std::collections::BTreeMap;

/// Highest rank that is accepted; samples of higher ranks are ignored.
const MAX_RANK: u32 = 4095;

/// The KV cache of one rank as the engine describes it. A value that it does not report is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheConfig {
    /// Tokens per block.
    pub block_size: Option<u32>,
    /// Number of blocks that requests can use.
    pub blocks: Option<u32>,
    /// Whether the engine keeps blocks for later prompts.
    pub prefix_caching: Option<bool>,
}

impl CacheConfig {
    /// Parses the text of `/metrics`. Returns the ranks whose cache is described, in order. Lines
    /// of unknown form are skipped.
    #[must_use]
    pub fn parse(metrics: &str) -> Vec<(u32, Self)> {
        let ranks = read_ranks(metrics).into_iter();
        let described = ranks.map(|(rank, entry)| (rank, entry.cache));
        described
            .filter(|(_, cache)| *cache != Self::default())
            .collect()
    }
}

/// The load of one rank at the time at which the engine updated its metrics.
///
/// vLLM updates them after every step. SGLang updates them after every prefill and every 40th
/// decode step (`--decode-log-interval`); the blocks of its last requests may remain in the metrics
/// for half a minute after these ended.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct EngineLoad {
    /// Active blocks, pinned by running requests. A shared block counts once; a block that is only
    /// cached does not count.
    pub active_blocks: f64,
    /// Number of requests that have blocks.
    pub running: u32,
    /// Number of requests that have no blocks yet.
    pub waiting: u32,
}

impl EngineLoad {
    /// Parses the text of `/metrics`. Returns the ranks whose pinned blocks are reported, in order.
    /// SGLang reports none before its first request.
    #[must_use]
    pub fn parse(metrics: &str) -> Vec<(u32, Self)> {
        let ranks = read_ranks(metrics).into_iter();
        let loads = ranks.filter_map(|(rank, entry)| Some((rank, entry.load()?)));
        loads.collect()
    }
}

/// The samples of one rank.
#[derive(Clone, Copy, Debug, Default)]
struct RankMetrics {
    cache: CacheConfig,
    /// vLLM: fraction of the usable blocks that is pinned.
    pinned_fraction: Option<f64>,
    /// SGLang: tokens of pages that are neither free nor evictable.
    pinned_tokens: Option<f64>,
    /// Number of running requests.
    running: Option<f64>,
    /// Number of requests in the engine's queue.
    waiting: Option<f64>,
}

impl RankMetrics {
    /// Returns the load; `None` if the metrics do not determine the pinned blocks. A number of
    /// requests that is not reported counts as 0.
    fn load(&self) -> Option<EngineLoad> {
        let from_fraction = || Some(self.pinned_fraction? * f64::from(self.cache.blocks?));
        let from_tokens = || Some(self.pinned_tokens? / f64::from(self.cache.block_size?));
        let active_blocks = from_fraction().or_else(from_tokens)?;
        // The product of two finite numbers can be infinite.
        active_blocks.is_finite().then_some(EngineLoad {
            active_blocks,
            running: self.running.unwrap_or(0.0) as u32,
            waiting: self.waiting.unwrap_or(0.0) as u32,
        })
    }
}

/// Collects the samples of all ranks, by rank. The number of vLLM's blocks is reduced to the blocks
/// that one rank can use. If an old and a new name of a metric are both present, the value of the
/// new name is used.
fn read_ranks(metrics: &str) -> BTreeMap<u32, RankMetrics> {
    let mut ranks = BTreeMap::<u32, RankMetrics>::new();
    let mut vllm_blocks = BTreeMap::<u32, u32>::new();
    for sample in metrics.lines().filter_map(Sample::read) {
        let Some(rank) = sample.rank() else {
            continue;
        };
        let entry = ranks.entry(rank).or_default();
        match sample.name {
            "vllm:cache_config_info" => {
                if let Some(blocks) = sample.label_u32("num_gpu_blocks") {
                    vllm_blocks.insert(rank, blocks);
                }
                entry.cache.block_size = sample.label_u32("block_size");
                entry.cache.prefix_caching = match sample.label("enable_prefix_caching") {
                    Some("True" | "true") => Some(true),
                    Some("False" | "false") => Some(false),
                    _ => None,
                };
            }
            "sglang:cache_config_info" => {
                entry.cache.block_size = sample.label_u32("page_size");
                entry.cache.blocks = sample.label_u32("num_pages");
            }
            "sglang:page_size" => entry.cache.block_size = sample.positive(),
            "sglang:num_pages" => entry.cache.blocks = sample.positive(),
            "vllm:kv_cache_usage_perc" => entry.pinned_fraction = Some(sample.value),
            "vllm:gpu_cache_usage_perc" => {
                entry.pinned_fraction.get_or_insert(sample.value);
            }
            "sglang:kv_used_tokens" => entry.pinned_tokens = Some(sample.value),
            // The pinned tokens in releases without `kv_used_tokens`. If there are two pools, the
            // tokens of the larger one.
            "sglang:num_used_tokens" => {
                entry.pinned_tokens.get_or_insert(sample.value);
            }
            "vllm:num_requests_running" | "sglang:num_running_reqs" => {
                entry.running = Some(sample.value);
            }
            "vllm:num_requests_waiting" | "sglang:num_queue_reqs" => {
                entry.waiting = Some(sample.value);
            }
            _ => {}
        }
    }
    // Each vLLM rank reports the sum over all ranks, and reserves one of its own blocks.
    let rank_count = u32::try_from(vllm_blocks.len()).unwrap_or(u32::MAX);
    for (rank, blocks) in vllm_blocks {
        if let Some(entry) = ranks.get_mut(&rank) {
            entry.cache.blocks = (blocks / rank_count).checked_sub(1);
        }
    }
    ranks
}

/// One line of metrics: `name{label="value",…} number`.
#[derive(Clone, Copy, Debug)]
struct Sample<'t> {
    name: &'t str,
    labels: Labels<'t>,
    value: f64,
}

impl<'t> Sample<'t> {
    /// Parses a line; `None` if it is not a finite, nonnegative sample of vLLM or SGLang with
    /// labels.
    fn read(line: &'t str) -> Option<Self> {
        if !line.starts_with("vllm:") && !line.starts_with("sglang:") {
            return None;
        }
        let (name, rest) = line.split_once('{')?;
        let labels = Labels(rest);
        let mut remaining = labels;
        while remaining.next().is_some() {}
        let value = remaining
            .0
            .trim_start_matches([',', ' '])
            .strip_prefix('}')?;
        let value: f64 = value.split_whitespace().next()?.parse().ok()?;
        (value.is_finite() && value >= 0.0).then_some(Self {
            name: name.trim_end(),
            labels,
            value,
        })
    }

    /// Returns the value of a label.
    fn label(&self, name: &str) -> Option<&'t str> {
        let mut labels = self.labels;
        labels.find_map(|(label, value)| (label == name).then_some(value))
    }

    /// Returns the value of a label, if it is a positive integer.
    fn label_u32(&self, name: &str) -> Option<u32> {
        self.label(name)?.parse().ok().filter(|&number| number > 0)
    }

    /// Returns the sample's value without its fraction, if it is at least 1.
    fn positive(&self) -> Option<u32> {
        (self.value >= 1.0).then_some(self.value as u32)
    }

    /// Returns the rank that the sample belongs to, which is 0 without a label of the rank. `None`
    /// if the rank is invalid, or if the sample covers only part of a rank's load: with priorities,
    /// SGLang also reports the requests of each priority.
    fn rank(&self) -> Option<u32> {
        if self
            .label("priority")
            .is_some_and(|priority| !priority.is_empty())
        {
            return None;
        }
        let rank = self.label("engine").or_else(|| self.label("dp_rank"));
        rank.map_or(Some(0), |rank| rank.parse().ok())
            .filter(|&rank| rank <= MAX_RANK)
    }
}

/// The labels of a sample, after the `{`: `name="value",…}`. Values are returned as written, with
/// their escapes.
#[derive(Clone, Copy, Debug)]
struct Labels<'t>(&'t str);

impl<'t> Iterator for Labels<'t> {
    type Item = (&'t str, &'t str);

    fn next(&mut self) -> Option<Self::Item> {
        let (name, rest) = self.0.split_once("=\"")?;
        let mut escaped = false;
        let end = rest.bytes().position(|byte| {
            let closes = byte == b'"' && !escaped;
            escaped = byte == b'\\' && !escaped;
            closes
        })?;
        let (value, rest) = rest.split_at_checked(end)?;
        self.0 = rest.get(1..)?;
        Some((name.trim_matches([',', ' ']), value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_infinite_number_of_blocks_is_not_a_load() {
        let text = "sglang:num_pages{x=\"\"} 3\nvllm:kv_cache_usage_perc{x=\"\"} 1e308\n";
        assert_eq!(EngineLoad::parse(text), []);
        let text = text.replace("1e308", "0.5");
        assert_eq!(EngineLoad::parse(&text)[0].1.active_blocks, 1.5);
    }

    #[test]
    fn a_cache_described_in_labels_is_parsed() {
        let text = r#"vllm:cache_config_info{block_size="16",enable_prefix_caching="True",num_gpu_blocks="27411"} 1.0
vllm:gpu_cache_usage_perc{model_name="q"} 0.5"#;
        let expected = CacheConfig {
            block_size: Some(16),
            blocks: Some(27_410),
            prefix_caching: Some(true),
        };
        assert_eq!(CacheConfig::parse(text), [(0, expected)]);
        assert_eq!(EngineLoad::parse(text)[0].1.active_blocks, 13_705.0);
        let text = r#"sglang:cache_config_info{model_name="q",page_size="64",num_pages="900"} 1.0
sglang:num_used_tokens{model_name="q"} 640"#;
        let expected = CacheConfig {
            block_size: Some(64),
            blocks: Some(900),
            prefix_caching: None,
        };
        assert_eq!(CacheConfig::parse(text), [(0, expected)]);
        assert_eq!(EngineLoad::parse(text)[0].1.active_blocks, 10.0);
    }

    #[test]
    fn samples_of_a_single_priority_are_ignored() {
        let text = r#"sglang:page_size{dp_rank="3",priority=""} 1
sglang:kv_used_tokens{dp_rank="3",priority=""} 7
sglang:num_running_reqs{dp_rank="3",priority=""} 5
sglang:num_running_reqs{dp_rank="3",priority="1"} 2"#;
        let expected = EngineLoad {
            active_blocks: 7.0,
            running: 5,
            waiting: 0,
        };
        assert_eq!(EngineLoad::parse(text), [(3, expected)]);
    }

    #[test]
    fn invalid_and_missing_values_are_none() {
        let text = r#"vllm:cache_config_info{block_size="0", num_gpu_blocks="None"} 1
vllm:kv_cache_usage_perc{engine="0"} 0.5
vllm:kv_cache_usage_perc{engine="x"} 0.5
sglang:num_pages{dp_rank="4096"} 5
sglang:num_pages{dp_rank="1"} NaN
up 1"#;
        assert_eq!(CacheConfig::parse(text), []);
        assert_eq!(EngineLoad::parse(text), []);
    }

    #[test]
    fn a_quote_inside_a_label_does_not_end_it() {
        let text = r#"vllm:cache_config_info{dtype="a\",block_size=\"7",block_size="32"} 1"#;
        assert_eq!(CacheConfig::parse(text)[0].1.block_size, Some(32));
    }

    proptest! {
        #[test]
        fn no_text_causes_a_panic(tail in "[a-z_=\",\\\\{} 0-9\n]{0,80}", any_text in ".*") {
            for text in [format!("vllm:cache_config_info{{{tail}"), any_text] {
                let _ = CacheConfig::parse(&text);
                let _ = EngineLoad::parse(&text);
            }
        }
    }
}
