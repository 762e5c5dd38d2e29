//! What a worker's Prometheus text tells a router that meets it: how its cache is laid out.

/// A worker's KV cache, as it describes it. What it does not say is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheConfig {
    /// Tokens per block.
    pub block_size: Option<u32>,
    /// Blocks of all engines behind the address together. vLLM never uses one block of each.
    pub blocks: Option<u32>,
    /// How many engines (data-parallel ranks) described themselves.
    pub engines: u32,
    /// Whether blocks are kept for later prompts.
    pub prefix_caching: Option<bool>,
}

/// One family of metrics and the labels in which it hides numbers.
struct Dialect {
    metric: &'static str,
    block_size: &'static str,
    blocks: &'static str,
}

const DIALECTS: [Dialect; 2] = [
    Dialect {
        metric: "vllm:cache_config_info",
        block_size: "block_size",
        blocks: "num_gpu_blocks",
    },
    Dialect {
        metric: "sglang:cache_config_info",
        block_size: "page_size",
        blocks: "num_pages",
    },
];

impl CacheConfig {
    /// Reads the text of `/metrics`. Lines that are not understood are skipped; `None` if no
    /// line describes a cache.
    #[must_use]
    pub fn parse(metrics: &str) -> Option<Self> {
        let mut found: Option<Self> = None;
        for line in metrics.lines() {
            let Some((dialect, labels)) = DIALECTS.iter().find_map(|dialect| {
                let rest = line.strip_prefix(dialect.metric)?.trim_start();
                Some((dialect, rest.strip_prefix('{')?))
            }) else {
                continue;
            };
            let config = found.get_or_insert_default();
            config.engines = config.engines.saturating_add(1);
            for (name, value) in Labels(labels) {
                let number = || value.parse::<u32>().ok().filter(|&number| number > 0);
                if name == dialect.block_size {
                    config.block_size = config.block_size.or(number());
                } else if name == dialect.blocks {
                    let sum = number().map(|n| n.saturating_add(config.blocks.unwrap_or(0)));
                    config.blocks = sum.or(config.blocks);
                } else if name == "enable_prefix_caching" {
                    config.prefix_caching = match value {
                        "True" | "true" => Some(true),
                        "False" | "false" => Some(false),
                        _ => config.prefix_caching,
                    };
                }
            }
        }
        found
    }
}

/// The labels after `{`: `name="value",…}`. Values are given as written, escapes and all.
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

    const VLLM: &str = r#"# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="16",cache_dtype="auto",calculate_kv_scales="False",cpu_offload_gb="0",enable_prefix_caching="True",engine="0",gpu_memory_utilization="0.9",is_attention_free="False",num_cpu_blocks="None",num_gpu_blocks="27411",num_gpu_blocks_override="None",prefix_caching_hash_algo="sha256",sliding_window="None",swap_space="4"} 1.0
# HELP vllm:num_requests_running Number of requests in model execution batches.
vllm:num_requests_running{engine="0",model_name="Qwen/Qwen3-8B"} 3.0
"#;

    #[test]
    fn vllm_describes_its_cache() {
        let expected = CacheConfig {
            block_size: Some(16),
            blocks: Some(27_411),
            engines: 1,
            prefix_caching: Some(true),
        };
        assert_eq!(CacheConfig::parse(VLLM), Some(expected));
    }

    #[test]
    fn sglang_describes_its_cache() {
        let text = r#"sglang:cache_config_info{model_name="q",page_size="64",num_pages="900"} 1.0"#;
        let config = CacheConfig::parse(text).unwrap();
        assert_eq!((config.block_size, config.blocks), (Some(64), Some(900)));
        assert_eq!(config.prefix_caching, None);
    }

    #[test]
    fn the_blocks_of_ranks_add_up() {
        let text = r#"vllm:cache_config_info{engine="0",block_size="16",num_gpu_blocks="100"} 1
vllm:cache_config_info{engine="1",block_size="16",num_gpu_blocks="90"} 1"#;
        let config = CacheConfig::parse(text).unwrap();
        assert_eq!((config.engines, config.blocks), (2, Some(190)));
    }

    #[test]
    fn what_is_not_said_is_not_known() {
        let text = r#"vllm:cache_config_info{block_size="0", num_gpu_blocks="None"} 1"#;
        let config = CacheConfig::parse(text).unwrap();
        assert_eq!((config.block_size, config.blocks), (None, None));
        assert_eq!(CacheConfig::parse("vllm:cache_config_info 1"), None);
        assert_eq!(CacheConfig::parse("up 1"), None);
    }

    #[test]
    fn a_quote_inside_a_label_does_not_end_it() {
        let text = r#"vllm:cache_config_info{dtype="a\",block_size=\"7",block_size="32"} 1"#;
        assert_eq!(CacheConfig::parse(text).unwrap().block_size, Some(32));
    }

    proptest! {
        #[test]
        fn any_text_is_survived(tail in "[a-z_=\",\\\\{} 0-9\n]{0,80}", any_text in ".*") {
            let _ = CacheConfig::parse(&format!("vllm:cache_config_info{{{tail}"));
            let _ = CacheConfig::parse(&any_text);
        }
    }
}
