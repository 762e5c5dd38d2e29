//! Encodes batches of KV events in vLLM's layouts.

use foresee_engine::kv_events::{Adapter, BlockKey, BlockStored, Event, EventBatch, Medium};
use rmpv::Value;
use rmpv::encode::write_value;

/// The layout of the events in a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Layout {
    /// Maps, the layout of vLLM since 0.24.
    #[default]
    Map,
    /// Arrays, the layout of vLLM 0.18.
    Array,
}

/// Encodes a batch as a payload that [`decode_batch`](foresee_engine::kv_events::decode_batch)
/// reads.
///
/// Of a [`BlockStored`] only the fields of a plain model are written: hashes, parent, tokens, block
/// size, adapter, salt and medium. Groups, windows, media and token pairs are left out, and so are
/// the group of removed blocks and the medium that was cleared. A missing timestamp is written as
/// 0. The salt is written only for the first block of a sequence.
#[must_use]
pub fn encode_batch(batch: &EventBatch, layout: Layout) -> Vec<u8> {
    let events = batch.events.iter().map(|event| event_value(event, layout));
    let mut values = vec![
        Value::from(batch.timestamp.unwrap_or(0.0)),
        Value::Array(events.collect()),
    ];
    values.extend(batch.data_parallel_rank.map(Value::from));
    let mut payload = Vec::new();
    // Writing to a vector cannot fail.
    let _ = write_value(&mut payload, &Value::Array(values));
    payload
}

/// Returns one event with its tag: a map, or an array of the fields' values in their order.
fn event_value(event: &Event, layout: Layout) -> Value {
    let (tag, fields) = match event {
        Event::Stored(stored) => ("BlockStored", stored_fields(stored)),
        Event::Removed(removed) => {
            let fields = vec![
                ("block_hashes", hashes(&removed.hashes)),
                ("medium", medium_name(removed.medium).into()),
            ];
            ("BlockRemoved", fields)
        }
        Event::Cleared { .. } => ("AllBlocksCleared", Vec::new()),
    };
    match layout {
        Layout::Map => {
            let fields = std::iter::once(("type", tag.into())).chain(fields);
            Value::Map(fields.map(|(name, value)| (name.into(), value)).collect())
        }
        Layout::Array => {
            let values = fields.into_iter().map(|(_, value)| value);
            Value::Array(std::iter::once(tag.into()).chain(values).collect())
        }
    }
}

/// Returns the fields of stored blocks that a plain model has. An adapter without a name is written
/// like the weights of the model.
fn stored_fields(stored: &BlockStored) -> Vec<(&'static str, Value)> {
    let parent = stored.parent.map(|BlockKey(hash)| hash.into());
    let tokens = stored.tokens.iter().copied().map(Value::from);
    let adapter = adapter_name(&stored.adapter).map(Value::from);
    vec![
        ("block_hashes", hashes(&stored.hashes)),
        ("parent_block_hash", parent.unwrap_or(Value::Nil)),
        ("token_ids", Value::Array(tokens.collect())),
        ("block_size", stored.block_size.into()),
        ("lora_id", Value::Nil),
        ("medium", medium_name(stored.medium).into()),
        ("lora_name", adapter.unwrap_or(Value::Nil)),
        ("extra_keys", extra_keys(stored)),
    ]
}

/// Returns, for each block, the inputs of its hash besides tokens: the adapter and, for the first
/// block of a sequence, the salt. Nil for the whole field if there is neither.
fn extra_keys(stored: &BlockStored) -> Value {
    let adapter = adapter_name(&stored.adapter);
    let salt = stored.cache_salt.as_deref();
    let salt = salt.filter(|_| stored.parent.is_none());
    if adapter.is_none() && salt.is_none() {
        return Value::Nil;
    }
    let blocks = (0..stored.hashes.len()).map(|block| {
        let salt = salt.filter(|_| block == 0);
        let keys: Vec<Value> = adapter.into_iter().chain(salt).map(Value::from).collect();
        if keys.is_empty() {
            Value::Nil
        } else {
            Value::Array(keys)
        }
    });
    Value::Array(blocks.collect())
}

fn hashes(hashes: &[BlockKey]) -> Value {
    Value::Array(hashes.iter().map(|&BlockKey(hash)| hash.into()).collect())
}

/// Returns the name of an adapter; `None` for the weights of the model.
fn adapter_name(adapter: &Adapter) -> Option<&str> {
    match adapter {
        Adapter::Named(name) => Some(name),
        Adapter::Base | Adapter::Unnamed => None,
    }
}

/// Returns the name that vLLM uses for a medium.
fn medium_name(medium: Medium) -> &'static str {
    match medium {
        Medium::Gpu => "GPU",
        Medium::Host => "CPU",
        Medium::Disk => "DISK",
        Medium::External => "EXTERNAL",
        Medium::Other => "OTHER",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use foresee_engine::kv_events::{BlockRemoved, decode_batch};
    use proptest::prelude::*;

    fn event() -> impl Strategy<Value = Event> {
        let hashes = || prop::collection::vec(any::<u64>().prop_map(BlockKey), 1..20);
        let text = || prop::option::of("[a-z]{1,40}");
        let stored = (
            hashes(),
            prop::option::of(any::<u64>().prop_map(BlockKey)),
            prop::collection::vec(any::<u32>(), 0..400),
            any::<u32>(),
            text(),
            text(),
        );
        let stored = stored.prop_map(|(hashes, parent, tokens, block_size, lora, salt)| {
            Event::Stored(BlockStored {
                hashes,
                tokens,
                block_size,
                adapter: lora.map_or(Adapter::Base, |name| Adapter::Named(name.into())),
                cache_salt: salt.filter(|_| parent.is_none()).map(Into::into),
                parent,
                ..BlockStored::default()
            })
        });
        let removed = hashes().prop_map(|hashes| {
            Event::Removed(BlockRemoved {
                hashes,
                ..BlockRemoved::default()
            })
        });
        prop_oneof![stored, removed, Just(Event::Cleared { medium: None })]
    }

    proptest! {
        #[test]
        fn decoding_an_encoded_batch_returns_it(
            events in prop::collection::vec(event(), 0..20),
            rank in prop::option::of(any::<u32>()),
            seconds in 0.0..2e9,
        ) {
            let batch = EventBatch {
                timestamp: Some(seconds),
                events,
                data_parallel_rank: rank,
                ..EventBatch::default()
            };
            for layout in [Layout::Map, Layout::Array] {
                prop_assert_eq!(decode_batch(&encode_batch(&batch, layout)), Ok(batch.clone()));
            }
        }
    }
}
