//! Builders of encoded events and of their expected meaning.

use foresee_engine::kv_events::{
    BlockKey, BlockRemoved, BlockStored, Event, EventBatch, decode_batch,
};
use rmpv::Value;

pub(crate) fn encode(value: &Value) -> Vec<u8> {
    let mut bytes = Vec::new();
    rmpv::encode::write_value(&mut bytes, value).unwrap();
    bytes
}

pub(crate) fn list<T: Into<Value>>(values: impl IntoIterator<Item = T>) -> Value {
    Value::Array(values.into_iter().map(Into::into).collect())
}

pub(crate) fn map<const N: usize>(fields: [(&str, Value); N]) -> Value {
    let fields = fields.into_iter().map(|(name, value)| (name.into(), value));
    Value::Map(fields.collect())
}

fn batch(events: impl IntoIterator<Item = Value>) -> Vec<u8> {
    encode(&list([Value::F64(1.5), list(events), Value::from(3)]))
}

pub(crate) fn decode(events: impl IntoIterator<Item = Value>) -> EventBatch {
    decode_batch(&batch(events)).unwrap()
}

/// Decodes a batch of one valid event.
pub(crate) fn decode_one(event: Value) -> Event {
    let mut batch = decode([event]);
    assert!(is_whole(&batch));
    batch.events.remove(0)
}

pub(crate) fn stored(event: Value) -> BlockStored {
    match decode_one(event) {
        Event::Stored(stored) => stored,
        other => panic!("{other:?}"),
    }
}

pub(crate) fn store<const N: usize>(further: [(&str, Value); N]) -> Value {
    let mut event = map([
        ("type", "BlockStored".into()),
        ("block_hashes", list([7, 8])),
        ("token_ids", list([1, 2, 3, 4])),
        ("block_size", 2.into()),
    ]);
    if let (Value::Map(fields), Value::Map(further)) = (&mut event, map(further)) {
        fields.extend(further);
    }
    event
}

pub(crate) fn remove(hash: u64) -> Value {
    map([
        ("type", "BlockRemoved".into()),
        ("block_hashes", list([hash])),
    ])
}

pub(crate) fn removed(hash: u64) -> Event {
    Event::Removed(BlockRemoved {
        hashes: vec![BlockKey(hash)],
        ..BlockRemoved::default()
    })
}

/// Returns whether all events of a batch were decoded.
pub(crate) fn is_whole(batch: &EventBatch) -> bool {
    (batch.malformed, batch.unknown, batch.truncated) == (0, 0, false)
}
