//! Decoding of event batches. The bytes are read once, from front to back.

use thiserror::Error;

use super::extra_keys::{self, Context};
use super::{Adapter, Attention, BlockKey, BlockRemoved, BlockStored, Event, EventBatch, Medium};
use crate::msgpack::{Malformed, Reader, Value};

/// Why a payload is not an event batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum DecodeError {
    /// The payload is neither a MessagePack array nor a map.
    #[error("payload is not an event batch: neither an array nor a map")]
    NotABatch,
    /// The payload contains no list of events, or ends before it.
    #[error("payload is not an event batch: no list of events")]
    NoEvents,
}

/// Length of the shortest useful event, an array of a tag and one hash. Bounds how many events a
/// payload can contain.
const MIN_EVENT_BYTES: usize = 15;

/// Decodes the payload of one message. Bytes after the batch are ignored.
///
/// Time and memory are bounded by the payload's length, for any contents.
///
/// # Errors
/// If the payload contains no list of events. Faults after the start of that list are not errors:
/// all events before the fault are decoded, and the batch states what is missing.
pub fn decode_batch(payload: &[u8]) -> Result<EventBatch, DecodeError> {
    let mut reader = Reader::new(payload);
    let (length, is_map) = match reader.next() {
        Ok(Value::Array(length)) => (length, false),
        Ok(Value::Map(length)) => (length, true),
        _ => return Err(DecodeError::NotABatch),
    };
    let mut batch = EventBatch::default();
    let mut has_events = false;
    for position in 0..length {
        let part = if is_map {
            Part::from_name(&mut reader)
        } else {
            Ok(Part::from_position(position))
        };
        has_events |= matches!(
            (part, reader.peek()),
            (Ok(Part::Events), Ok(Value::Array(_)))
        );
        if part
            .and_then(|part| part.read(&mut reader, &mut batch))
            .is_err()
        {
            batch.truncated = true;
            break;
        }
    }
    has_events.then_some(batch).ok_or(DecodeError::NoEvents)
}

/// A field of a batch, given by its position in an array or its name in a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Timestamp,
    Events,
    Rank,
    Unknown,
}

impl Part {
    fn from_position(position: u32) -> Self {
        match position {
            0 => Self::Timestamp,
            1 => Self::Events,
            2 => Self::Rank,
            _ => Self::Unknown,
        }
    }

    /// Reads a key of a map. Any value other than a known name is [`Unknown`](Self::Unknown).
    ///
    /// # Errors
    /// If the bytes are not MessagePack.
    fn from_name(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(match reader.next_skipping_children()? {
            Value::Text(b"ts") => Self::Timestamp,
            Value::Text(b"events") => Self::Events,
            // The name in vLLM, and in SGLang.
            Value::Text(b"data_parallel_rank" | b"attn_dp_rank") => Self::Rank,
            _ => Self::Unknown,
        })
    }

    /// Reads the value of the field into `batch`. A value of an unexpected type is skipped. After
    /// an error the position of the reader is undefined.
    ///
    /// # Errors
    /// If the bytes are not MessagePack or end too early. `batch` then contains the events before
    /// the fault.
    fn read(self, reader: &mut Reader<'_>, batch: &mut EventBatch) -> Result<(), Malformed> {
        if self == Self::Events && matches!(reader.peek()?, Value::Array(_)) {
            return read_events(reader, batch);
        }
        match (self, reader.next_skipping_children()?) {
            (Self::Timestamp, Value::Float(seconds)) => batch.timestamp = Some(seconds),
            (Self::Timestamp, Value::Unsigned(seconds)) => batch.timestamp = Some(seconds as f64),
            (Self::Rank, Value::Unsigned(rank)) => {
                batch.data_parallel_rank = u32::try_from(rank).ok();
            }
            _ => {}
        }
        Ok(())
    }
}

/// Reads the list of events. Events that cannot be decoded are counted and skipped.
///
/// # Errors
/// If the end of an event cannot be found. `batch` then contains the events before that one.
fn read_events(reader: &mut Reader<'_>, batch: &mut EventBatch) -> Result<(), Malformed> {
    let Value::Array(length) = reader.next()? else {
        return Err(Malformed);
    };
    let possible = reader.remaining() / MIN_EVENT_BYTES;
    let expected = usize::try_from(length).unwrap_or(usize::MAX);
    batch.events.reserve_exact(expected.min(possible));
    for _ in 0..length {
        let start = *reader;
        match read_event(reader) {
            Ok(event) => batch.events.push(event),
            Err(error) => {
                let count = match error {
                    EventError::Unknown => &mut batch.unknown,
                    EventError::Malformed => &mut batch.malformed,
                };
                *count = count.saturating_add(1);
                // The headers of the event's values show where it ends, whatever their meaning.
                *reader = start;
                reader.skip()?;
            }
        }
    }
    Ok(())
}

/// Why an event is left out of its batch.
#[derive(Clone, Copy, Debug)]
enum EventError {
    Unknown,
    Malformed,
}

impl From<Malformed> for EventError {
    fn from(_: Malformed) -> Self {
        Self::Malformed
    }
}

/// Reads one event, as an array that starts with the tag or as a map. After an error the reader may
/// be at any position inside it.
///
/// # Errors
/// `Unknown` if the type is unknown. `Malformed` if the type is missing, or a field that identifies
/// blocks is missing or has another type.
fn read_event(reader: &mut Reader<'_>) -> Result<Event, EventError> {
    let mut fields = Fields::default();
    match reader.next()? {
        Value::Array(length) => {
            let Some(last) = length.checked_sub(1) else {
                return Err(EventError::Malformed);
            };
            let tag = Tag::read(reader)?;
            fields.tag = Some(tag);
            for position in 0..last {
                fields.read(tag.field_at(position), reader)?;
            }
        }
        Value::Map(length) => {
            for _ in 0..length {
                let field = match reader.next_skipping_children()? {
                    Value::Text(name) => Field::from_name(name),
                    _ => Field::Unknown,
                };
                fields.read(field, reader)?;
            }
        }
        _ => return Err(EventError::Malformed),
    }
    fields.into_event()
}

/// The type of an event.
#[derive(Clone, Copy, Debug)]
enum Tag {
    Stored,
    Removed,
    Cleared,
}

impl Tag {
    /// Reads the type of an event. A text that names no known type is the error `Unknown`, any
    /// other value is `Malformed`.
    fn read(reader: &mut Reader<'_>) -> Result<Self, EventError> {
        match reader.next()? {
            Value::Text(b"BlockStored") => Ok(Self::Stored),
            Value::Text(b"BlockRemoved") => Ok(Self::Removed),
            Value::Text(b"AllBlocksCleared") => Ok(Self::Cleared),
            Value::Text(_) => Err(EventError::Unknown),
            _ => Err(EventError::Malformed),
        }
    }

    /// Returns the field at a position after the tag in an array; `Unknown` for a position after
    /// the known fields. Releases have only added fields at the end.
    fn field_at(self, position: u32) -> Field {
        const STORED: [Field; 11] = [
            Field::Hashes,
            Field::Parent,
            Field::Tokens,
            Field::BlockSize,
            Field::LoraId,
            Field::Medium,
            Field::LoraName,
            Field::ExtraKeys,
            Field::Group,
            Field::Kind,
            Field::Window,
        ];
        const REMOVED: [Field; 3] = [Field::Hashes, Field::Medium, Field::Group];
        const CLEARED: [Field; 1] = [Field::Medium];
        let fields: &[Field] = match self {
            Self::Stored => &STORED,
            Self::Removed => &REMOVED,
            Self::Cleared => &CLEARED,
        };
        usize::try_from(position)
            .ok()
            .and_then(|position| fields.get(position))
            .copied()
            .unwrap_or(Field::Unknown)
    }
}

/// A field of an event, given by its position in an array or its name in a map.
#[derive(Clone, Copy, Debug)]
enum Field {
    Tag,
    Hashes,
    Parent,
    Tokens,
    BlockSize,
    LoraId,
    LoraName,
    CacheSalt,
    Medium,
    ExtraKeys,
    Group,
    Kind,
    Window,
    Unknown,
}

impl Field {
    /// Returns the field with this key in a map, for any type of event; `Unknown` if there is none.
    fn from_name(name: &[u8]) -> Self {
        match name {
            b"type" => Self::Tag,
            b"block_hashes" => Self::Hashes,
            b"parent_block_hash" => Self::Parent,
            b"token_ids" => Self::Tokens,
            b"block_size" => Self::BlockSize,
            b"lora_id" => Self::LoraId,
            b"lora_name" => Self::LoraName,
            b"cache_salt" => Self::CacheSalt,
            b"medium" => Self::Medium,
            b"extra_keys" => Self::ExtraKeys,
            b"group_idx" => Self::Group,
            b"kv_cache_spec_kind" => Self::Kind,
            b"kv_cache_spec_sliding_window" => Self::Window,
            _ => Self::Unknown,
        }
    }
}

/// The values read so far of one event; the union of the fields of all event types.
#[derive(Default)]
struct Fields<'p> {
    tag: Option<Tag>,
    hashes: Option<Vec<BlockKey>>,
    parent: Option<BlockKey>,
    tokens: Vec<u32>,
    next_token: Option<u32>,
    block_size: Option<u32>,
    has_lora_id: bool,
    lora_name: Option<&'p str>,
    cache_salt: Option<&'p str>,
    medium: Option<Medium>,
    /// A reader at the start of the value. It is decoded last, because that requires other fields.
    extra_keys: Option<Reader<'p>>,
    group: Option<u32>,
    attention: Attention,
    sliding_window: Option<u32>,
}

impl<'p> Fields<'p> {
    /// Reads the value of a field, which replaces an earlier value of that field. A field that
    /// identifies blocks must have the expected type, because otherwise the event would mean other
    /// blocks. A field that only describes them may have any type. Extra keys are skipped here and
    /// decoded by [`into_event`](Self::into_event).
    fn read(&mut self, field: Field, reader: &mut Reader<'p>) -> Result<(), EventError> {
        match field {
            Field::Tag => self.tag = Some(Tag::read(reader)?),
            Field::Hashes => self.hashes = Some(read_hashes(reader)?),
            Field::Parent => {
                self.parent = match reader.next()? {
                    Value::Nil => None,
                    hash => Some(block_key(hash)?),
                }
            }
            Field::Tokens => self.read_tokens(reader)?,
            Field::BlockSize => self.block_size = reader.u32_or_nil()?,
            // SGLang sends texts, which differ from process to process.
            Field::LoraId => {
                self.has_lora_id = !matches!(
                    reader.next_skipping_children()?,
                    Value::Nil | Value::Unsigned(0)
                );
            }
            Field::LoraName => self.lora_name = reader.text_or_nil()?,
            Field::CacheSalt => self.cache_salt = reader.text_or_nil()?,
            Field::Medium => self.medium = reader.text_or_nil()?.map(Medium::from_name),
            Field::ExtraKeys => {
                self.extra_keys = Some(*reader);
                reader.skip()?;
            }
            Field::Group => self.group = reader.u32_or_nil()?,
            Field::Kind => {
                self.attention = match reader.next_skipping_children()? {
                    Value::Nil => Attention::Unspecified,
                    Value::Text(kind) => Attention::from_kind(kind),
                    _ => Attention::Other,
                }
            }
            Field::Window => {
                self.sliding_window = match reader.next_skipping_children()? {
                    Value::Unsigned(tokens) => u32::try_from(tokens).ok(),
                    _ => None,
                }
            }
            Field::Unknown => reader.skip()?,
        }
        Ok(())
    }

    /// Reads the token ids, which may be a list of ids or of pairs; nil is an empty list. A list of
    /// both is malformed.
    fn read_tokens(&mut self, reader: &mut Reader<'_>) -> Result<(), Malformed> {
        let count = reader.array_or_nil()?.unwrap_or(0);
        let mut tokens = Vec::with_capacity(count);
        let mut next_token = None;
        reader.u32_run(count, &mut tokens);
        while tokens.len() < count {
            match reader.next()? {
                // A pair; all earlier elements were pairs too.
                Value::Array(2) if tokens.is_empty() || next_token.is_some() => {
                    tokens.push(token(reader.next()?)?);
                    next_token = Some(token(reader.next()?)?);
                }
                number if next_token.is_none() => {
                    tokens.push(token(number)?);
                    reader.u32_run(count - tokens.len(), &mut tokens);
                }
                _ => return Err(Malformed),
            }
        }
        self.tokens = tokens;
        self.next_token = next_token;
        Ok(())
    }

    /// Builds the event once all fields were read. Values of fields that the event type does not
    /// have are dropped; a missing medium is the GPU.
    ///
    /// # Errors
    /// `Malformed` if the event has no type, no list of hashes although its type requires one, or
    /// extra keys that are neither a list nor nil.
    fn into_event(mut self) -> Result<Event, EventError> {
        let tag = self.tag.ok_or(EventError::Malformed)?;
        if let Tag::Cleared = tag {
            let medium = self.medium;
            return Ok(Event::Cleared { medium });
        }
        let hashes = self.hashes.take().ok_or(EventError::Malformed)?;
        if let Tag::Removed = tag {
            return Ok(Event::Removed(BlockRemoved {
                hashes,
                medium: self.medium.unwrap_or_default(),
                group: self.group,
            }));
        }
        let context = Context {
            lora_name: self.lora_name,
            starts_sequence: self.parent.is_none(),
        };
        let extra_keys = match &mut self.extra_keys {
            Some(reader) => extra_keys::read(reader, context)?,
            None => extra_keys::ExtraKeys::default(),
        };
        let adapter = match self.lora_name {
            Some(name) if !name.is_empty() => Adapter::Named(name.into()),
            _ if self.has_lora_id => Adapter::Unnamed,
            _ => Adapter::Base,
        };
        Ok(Event::Stored(BlockStored {
            hashes,
            parent: self.parent,
            tokens: self.tokens,
            next_token: self.next_token,
            block_size: self.block_size.unwrap_or(0),
            adapter,
            cache_salt: self.cache_salt.map(Into::into).or(extra_keys.cache_salt),
            medium: self.medium.unwrap_or_default(),
            group: self.group,
            attention: self.attention,
            sliding_window: self.sliding_window,
            extras: extra_keys.extras,
        }))
    }
}

/// Reads a list of hashes. Nil or any other type is malformed.
fn read_hashes(reader: &mut Reader<'_>) -> Result<Vec<BlockKey>, Malformed> {
    let count = reader.array_or_nil()?.ok_or(Malformed)?;
    let mut hashes = Vec::with_capacity(count);
    for _ in 0..count {
        hashes.push(block_key(reader.next()?)?);
    }
    Ok(hashes)
}

/// Returns the key of a hash, which must be an integer or a digest that is not empty.
fn block_key(hash: Value<'_>) -> Result<BlockKey, Malformed> {
    match hash {
        Value::Unsigned(number) => Ok(BlockKey(number)),
        // A signed number with the same 64 bits is the same hash.
        Value::Negative(number) => Ok(BlockKey(number.cast_unsigned())),
        Value::Bytes(digest) if !digest.is_empty() => Ok(BlockKey::from_digest(digest)),
        _ => Err(Malformed),
    }
}

/// Returns a token id; only the low 32 bits of a larger number are kept.
fn token(id: Value<'_>) -> Result<u32, Malformed> {
    match id {
        Value::Unsigned(id) => Ok(id as u32),
        Value::Negative(id) => Ok(id as u32),
        _ => Err(Malformed),
    }
}
