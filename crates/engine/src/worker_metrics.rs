//! What a worker's Prometheus text tells of each engine behind its address: how its cache is laid
//! out, and how much of it running requests pin.
//!
//! A vLLM or SGLang with several data-parallel ranks shows them all in one text, told apart by a
//! label. Every reading here is of one of them.

use std::collections::BTreeMap;

/// Ranks above this are not believed.
const MAX_RANK: u32 = 4095;

/// One engine's KV cache, as it describes it. What it does not say is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheConfig {
    /// Tokens per block.
    pub block_size: Option<u32>,
    /// Blocks that requests can use.
    pub blocks: Option<u32>,
    /// Whether blocks are kept for later prompts.
    pub prefix_caching: Option<bool>,
}

impl CacheConfig {
    /// Reads the text of `/metrics`: the engines that describe their cache, with their ranks, in
    /// order. Lines that are not understood are skipped.
    #[must_use]
    pub fn parse(metrics: &str) -> Vec<(u32, Self)> {
        let engines = read_engines(metrics).into_iter();
        let described = engines.map(|(rank, engine)| (rank, engine.cache));
        described
            .filter(|(_, cache)| *cache != Self::default())
            .collect()
    }
}

/// What one engine carried when its metrics were written.
///
/// vLLM writes them after every step. SGLang does after every prefill and every 40th decode step
/// (`--decode-log-interval`), and what its last requests pinned may stay written for half a minute
/// after they ended.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct EngineLoad {
    /// Blocks pinned by running requests, shared ones once; blocks that are only cached are not
    /// among them.
    pub active_blocks: f64,
    /// Requests that hold blocks.
    pub running: u32,
    /// Requests that hold none yet.
    pub waiting: u32,
}

impl EngineLoad {
    /// Reads the text of `/metrics`: the engines that tell how many blocks are pinned, with their
    /// ranks, in order. SGLang does not before its first request.
    #[must_use]
    pub fn parse(metrics: &str) -> Vec<(u32, Self)> {
        let engines = read_engines(metrics).into_iter();
        let loads = engines.filter_map(|(rank, engine)| Some((rank, engine.load()?)));
        loads.collect()
    }
}

/// What is said of one engine.
#[derive(Clone, Copy, Debug, Default)]
struct Engine {
    cache: CacheConfig,
    /// vLLM: what share of the usable blocks is pinned.
    pinned_share: Option<f64>,
    /// SGLang: tokens of pages that are neither free nor evictable.
    pinned_tokens: Option<f64>,
    running: Option<f64>,
    waiting: Option<f64>,
}

impl Engine {
    fn load(&self) -> Option<EngineLoad> {
        let of_share = || Some(self.pinned_share? * f64::from(self.cache.blocks?));
        let of_tokens = || Some(self.pinned_tokens? / f64::from(self.cache.block_size?));
        Some(EngineLoad {
            active_blocks: of_share().or_else(of_tokens)?,
            running: self.running.unwrap_or(0.0) as u32,
            waiting: self.waiting.unwrap_or(0.0) as u32,
        })
    }
}

fn read_engines(metrics: &str) -> BTreeMap<u32, Engine> {
    let mut engines = BTreeMap::<u32, Engine>::new();
    let mut vllm_blocks = BTreeMap::<u32, u32>::new();
    for sample in metrics.lines().filter_map(Sample::read) {
        let Some(rank) = sample.rank() else {
            continue;
        };
        let engine = engines.entry(rank).or_default();
        match sample.name {
            "vllm:cache_config_info" => {
                if let Some(blocks) = sample.whole("num_gpu_blocks") {
                    vllm_blocks.insert(rank, blocks);
                }
                engine.cache.block_size = sample.whole("block_size");
                engine.cache.prefix_caching = match sample.label("enable_prefix_caching") {
                    Some("True" | "true") => Some(true),
                    Some("False" | "false") => Some(false),
                    _ => None,
                };
            }
            "sglang:cache_config_info" => {
                engine.cache.block_size = sample.whole("page_size");
                engine.cache.blocks = sample.whole("num_pages");
            }
            "sglang:page_size" => engine.cache.block_size = sample.positive(),
            "sglang:num_pages" => engine.cache.blocks = sample.positive(),
            "vllm:kv_cache_usage_perc" => engine.pinned_share = Some(sample.value),
            "vllm:gpu_cache_usage_perc" => {
                engine.pinned_share.get_or_insert(sample.value);
            }
            "sglang:kv_used_tokens" => engine.pinned_tokens = Some(sample.value),
            // The same in releases that do not have the former; the larger pool's, if there are
            // two.
            "sglang:num_used_tokens" => {
                engine.pinned_tokens.get_or_insert(sample.value);
            }
            "vllm:num_requests_running" | "sglang:num_running_reqs" => {
                engine.running = Some(sample.value);
            }
            "vllm:num_requests_waiting" | "sglang:num_queue_reqs" => {
                engine.waiting = Some(sample.value);
            }
            _ => {}
        }
    }
    // Each of several vLLM ranks tells the sum of all, and each keeps one block to itself.
    let ranks = u32::try_from(vllm_blocks.len()).unwrap_or(u32::MAX);
    for (rank, blocks) in vllm_blocks {
        if let Some(engine) = engines.get_mut(&rank) {
            engine.cache.blocks = (blocks / ranks).checked_sub(1);
        }
    }
    engines
}

/// One line: `name{label="value",…} number`.
#[derive(Clone, Copy, Debug)]
struct Sample<'t> {
    name: &'t str,
    labels: Labels<'t>,
    value: f64,
}

impl<'t> Sample<'t> {
    /// Reads a line, if it may be one that matters.
    fn read(line: &'t str) -> Option<Self> {
        if !line.starts_with("vllm:") && !line.starts_with("sglang:") {
            return None;
        }
        let (name, rest) = line.split_once('{')?;
        let labels = Labels(rest);
        let mut rest = labels;
        while rest.next().is_some() {}
        let value = rest.0.trim_start_matches([',', ' ']).strip_prefix('}')?;
        let value: f64 = value.split_whitespace().next()?.parse().ok()?;
        (value.is_finite() && value >= 0.0).then_some(Self {
            name: name.trim_end(),
            labels,
            value,
        })
    }

    fn label(&self, name: &str) -> Option<&'t str> {
        let mut labels = self.labels;
        labels.find_map(|(known, value)| (known == name).then_some(value))
    }

    /// A label's value, if it is a whole number above 0.
    fn whole(&self, name: &str) -> Option<u32> {
        self.label(name)?.parse().ok().filter(|&number| number > 0)
    }

    /// The sample's value, if it is a whole number above 0.
    fn positive(&self) -> Option<u32> {
        (self.value >= 1.0).then_some(self.value as u32)
    }

    /// Which engine it is of. `None` if it is of a part of what one carries: with priorities,
    /// SGLang counts requests of each as well.
    fn rank(&self) -> Option<u32> {
        if self.label("priority").is_some_and(|it| !it.is_empty()) {
            return None;
        }
        let rank = self.label("engine").or_else(|| self.label("dp_rank"));
        rank.map_or(Some(0), |rank| rank.parse().ok())
            .filter(|&rank| rank <= MAX_RANK)
    }
}

/// The labels after `{`: `name="value",…}`. Values are given as written, escapes and all.
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
    fn releases_that_describe_their_cache_in_labels() {
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
    fn requests_of_one_priority_are_not_all_requests() {
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
    fn what_is_not_said_is_not_known() {
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
        fn any_text_is_survived(tail in "[a-z_=\",\\\\{} 0-9\n]{0,80}", any_text in ".*") {
            for text in [format!("vllm:cache_config_info{{{tail}"), any_text] {
                let _ = CacheConfig::parse(&text);
                let _ = EngineLoad::parse(&text);
            }
        }
    }
}
