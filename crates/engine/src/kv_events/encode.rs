//! Encoding of event batches in vLLM's layouts, for the mock engine.

use super::{Adapter, BlockKey, BlockStored, Event, EventBatch, Medium};
use crate::msgpack::Writer;

/// The layout of the events in a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Layout {
    /// Maps, the layout of vLLM since 0.24.
    #[default]
    Map,
    /// Arrays, the layout of vLLM 0.18.
    Array,
}

/// Encodes a batch as a payload that [`decode_batch`](super::decode_batch) reads.
///
/// Of a [`BlockStored`] only the fields of a plain model are written: hashes, parent, tokens, block
/// size, adapter, salt and medium. Groups, windows, media and token pairs are left out, and so are
/// the group of removed blocks and the medium that was cleared. A missing timestamp is written as
/// 0. The salt is written only for the first block of a sequence.
#[must_use]
pub fn encode_batch(batch: &EventBatch, layout: Layout) -> Vec<u8> {
    let mut writer = Writer::default();
    writer.array(2 + usize::from(batch.data_parallel_rank.is_some()));
    writer.float(batch.timestamp.unwrap_or(0.0));
    writer.array(batch.events.len());
    for event in &batch.events {
        write_event(&mut writer, event, layout);
    }
    if let Some(rank) = batch.data_parallel_rank {
        writer.unsigned(rank.into());
    }
    writer.into_bytes()
}

/// Writes one event with its tag. The group of removed blocks and the medium that was cleared are
/// left out.
fn write_event(writer: &mut Writer, event: &Event, layout: Layout) {
    match event {
        Event::Stored(stored) => write_stored(writer, stored, layout),
        Event::Removed(removed) => {
            let mut fields = Fields::begin(writer, "BlockRemoved", 2, layout);
            write_hashes(fields.field("block_hashes"), &removed.hashes);
            fields.field("medium").text(medium_name(removed.medium));
        }
        Event::Cleared { .. } => {
            Fields::begin(writer, "AllBlocksCleared", 0, layout);
        }
    }
}

/// Writes the fields of stored blocks that a plain model has. An adapter without a name is written
/// like the weights of the model.
fn write_stored(writer: &mut Writer, stored: &BlockStored, layout: Layout) {
    let mut fields = Fields::begin(writer, "BlockStored", 8, layout);
    write_hashes(fields.field("block_hashes"), &stored.hashes);
    let parent = fields.field("parent_block_hash");
    match stored.parent {
        Some(BlockKey(hash)) => parent.unsigned(hash),
        None => parent.nil(),
    }
    let tokens = fields.field("token_ids");
    tokens.array(stored.tokens.len());
    for &token in &stored.tokens {
        tokens.unsigned(token.into());
    }
    fields
        .field("block_size")
        .unsigned(stored.block_size.into());
    fields.field("lora_id").nil();
    fields.field("medium").text(medium_name(stored.medium));
    let lora_name = fields.field("lora_name");
    match &stored.adapter {
        Adapter::Named(name) => lora_name.text(name),
        Adapter::Base | Adapter::Unnamed => lora_name.nil(),
    }
    write_extra_keys(fields.field("extra_keys"), stored);
}

/// Writes, for each block, the inputs of its hash besides tokens: the adapter and, for the first
/// block of a sequence, the salt. Writes nil for the field if there is neither.
fn write_extra_keys(writer: &mut Writer, stored: &BlockStored) {
    let adapter = match &stored.adapter {
        Adapter::Named(name) => Some(&**name),
        Adapter::Base | Adapter::Unnamed => None,
    };
    let salt = stored.cache_salt.as_deref();
    let salt = salt.filter(|_| stored.parent.is_none());
    if adapter.is_none() && salt.is_none() {
        return writer.nil();
    }
    writer.array(stored.hashes.len());
    for block in 0..stored.hashes.len() {
        let salt = salt.filter(|_| block == 0);
        let keys = adapter.into_iter().chain(salt);
        match keys.clone().count() {
            0 => writer.nil(),
            count => {
                writer.array(count);
                keys.for_each(|key| writer.text(key));
            }
        }
    }
}

fn write_hashes(writer: &mut Writer, hashes: &[BlockKey]) {
    writer.array(hashes.len());
    for &BlockKey(hash) in hashes {
        writer.unsigned(hash);
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

/// Writes the fields of one event, with their names if the layout contains names.
struct Fields<'w> {
    writer: &'w mut Writer,
    layout: Layout,
}

impl<'w> Fields<'w> {
    /// Starts an event of type `tag` with `count` fields, which must follow in the order of the
    /// array layout.
    fn begin(writer: &'w mut Writer, tag: &str, count: usize, layout: Layout) -> Self {
        match layout {
            Layout::Map => {
                writer.map(count + 1);
                writer.text("type");
            }
            Layout::Array => writer.array(count + 1),
        }
        writer.text(tag);
        Self { writer, layout }
    }

    /// Starts the next field and returns the writer for its value.
    fn field(&mut self, name: &str) -> &mut Writer {
        if self.layout == Layout::Map {
            self.writer.text(name);
        }
        self.writer
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv_events::{BlockRemoved, decode_batch};
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
