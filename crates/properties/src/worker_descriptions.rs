//! Descriptions of workers, as `--worker` and the admin API take them.

use std::collections::HashSet;
use std::fmt::Write;

use foresee_gateway::{ApiKeySource, KvEvents, WorkerConfig};

/// Checks a description. Panics if the parse of an accepted one, formatted with all its options,
/// gives another worker, if an error does not quote the description, or if the workers of an engine
/// are not one for each rank with names of their own.
pub fn check(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let config: WorkerConfig = match text.parse() {
        Ok(config) => config,
        Err(error) => {
            // A key in the place of its source is not shown.
            let may_have_key = text.contains("api-key=");
            assert!(may_have_key || error.to_string().contains(text), "{error}");
            return;
        }
    };
    let Ok(again) = describe(&config).parse::<WorkerConfig>() else {
        panic!("`{}` cannot be parsed again", describe(&config));
    };
    assert_eq!(again, config);
    assert!(config.name.bytes().all(|byte| byte.is_ascii_graphic()));
    assert!(!config.name.is_empty() && config.name.len() <= text.len());
    let workers = config.workers();
    let rank_count = config.ranks.map_or(1, |ranks| ranks.get() as usize);
    assert_eq!(workers.len(), rank_count);
    let names: HashSet<&str> = workers.iter().map(|worker| worker.name.as_str()).collect();
    assert_eq!(names.len(), rank_count);
    for worker in &workers {
        assert_eq!(worker.url(), config.url());
        let keeps_source = matches!(
            (&worker.kv_events, &config.kv_events),
            (KvEvents::At(_), KvEvents::At(_))
                | (KvEvents::Off, KvEvents::Off)
                | (KvEvents::Discovered, KvEvents::Discovered)
        );
        assert!(keeps_source, "{worker:?}");
    }
}

/// Returns the description with all options that differ from the defaults.
fn describe(config: &WorkerConfig) -> String {
    let mut text = format!("{},name={}", config.url(), config.name);
    let switch = |is_on| if is_on { "on" } else { "off" };
    let mut add = |key: &str, value: String| {
        // Writing to a string does not fail.
        let _ = write!(text, ",{key}={value}");
    };
    if let Some(ranks) = config.ranks {
        add("ranks", ranks.to_string());
    }
    if let Some(blocks) = config.blocks {
        add("blocks", blocks.to_string());
    }
    if let Some(is_on) = config.prefix_caching {
        add("prefix-caching", switch(is_on).to_owned());
    }
    if let Some(eviction) = config.eviction {
        add("eviction", eviction.as_str().to_owned());
    }
    match &config.kv_events {
        KvEvents::Discovered => {}
        KvEvents::Off => add("kv-events", "off".to_owned()),
        KvEvents::At(source) => {
            add("kv-events", source.to_string());
            if let Some(replay) = &source.replay {
                add("replay", replay.clone());
            }
            if !source.topic.is_empty() {
                add("topic", source.topic.clone());
            }
        }
    }
    if let Some(path) = &config.health_path {
        add("health-path", path.to_string());
    }
    match &config.api_key {
        Some(ApiKeySource::File(path)) => add("api-key", format!("file:{}", path.display())),
        Some(ApiKeySource::Variable(name)) => add("api-key", format!("env:{name}")),
        Some(ApiKeySource::Value(_)) => panic!("a description has a key"),
        None => {}
    }
    add("resolve", switch(config.resolve).to_owned());
    text
}
