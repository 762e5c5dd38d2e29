//! vLLM's `extra_keys`: for each block, the inputs of its hash besides tokens.
//!
//! The list contains adapter, media and salt without labels. They are distinguished by position and
//! form: the adapter's name is first, media are pairs of identifier and offset (plain texts in
//! older releases), and the salt is the last text, present only in the first block of a sequence.

use super::{BlockExtra, ExtraKey};
use crate::msgpack::{Malformed, Reader, Value};

/// The fields of the event that are needed to decode its extra keys.
#[derive(Clone, Copy, Debug)]
pub(super) struct Context<'p> {
    /// Name of the adapter, which extra keys repeat.
    pub(super) lora_name: Option<&'p str>,
    /// Whether the event's first block is the first of its sequence.
    pub(super) starts_sequence: bool,
}

/// The decoded extra keys of one event.
#[derive(Debug, Default)]
pub(super) struct ExtraKeys {
    /// Inputs other than adapter and salt.
    pub(super) extras: Vec<BlockExtra>,
    /// The salt, if the event's first block has one.
    pub(super) cache_salt: Option<Box<str>>,
}

/// Decodes the value of the field, in which nil means that no block has extra keys. The number of
/// entries is not compared with the number of hashes.
///
/// # Errors
/// If the value is neither nil nor a list, or is cut off.
pub(super) fn read(reader: &mut Reader<'_>, context: Context<'_>) -> Result<ExtraKeys, Malformed> {
    let mut found = ExtraKeys::default();
    let blocks = reader.array_or_nil()?.unwrap_or(0);
    for block in 0..u32::try_from(blocks).map_err(|_| Malformed)? {
        read_block(reader, block, context, &mut found.extras)?;
        if block == 0 && context.starts_sequence {
            let salt = found
                .extras
                .iter()
                .rposition(|extra| matches!(extra.key, ExtraKey::Text(_)));
            if let Some(BlockExtra {
                key: ExtraKey::Text(salt),
                ..
            }) = salt.map(|index| found.extras.remove(index))
            {
                found.cache_salt = Some(salt);
            }
        }
    }
    Ok(found)
}

/// Decodes the keys of one block and appends them to `extras`, without the name of the adapter. A
/// key of unknown form is kept in its encoding: the block depends on it, so the block must differ
/// from one without that key.
fn read_block(
    reader: &mut Reader<'_>,
    block: u32,
    context: Context<'_>,
    extras: &mut Vec<BlockExtra>,
) -> Result<(), Malformed> {
    let start = *reader;
    let keys = match reader.next()? {
        Value::Nil => return Ok(()),
        Value::Array(keys) => keys,
        _ => {
            *reader = start;
            let key = ExtraKey::Encoded(reader.raw()?.into());
            extras.push(BlockExtra { block, key });
            return Ok(());
        }
    };
    for index in 0..keys {
        let key = read_key(reader)?;
        let is_adapter = index == 0
            && matches!((&key, context.lora_name), (ExtraKey::Text(text), Some(name)) if **text == *name);
        if !is_adapter {
            extras.push(BlockExtra { block, key });
        }
    }
    Ok(())
}

/// Decodes one key. A key of unknown form is kept in its encoding.
fn read_key(reader: &mut Reader<'_>) -> Result<ExtraKey, Malformed> {
    let mut ahead = *reader;
    let encoded = reader.raw()?;
    let decoded = match ahead.next()? {
        Value::Text(text) => str::from_utf8(text)
            .ok()
            .map(|text| ExtraKey::Text(text.into())),
        Value::Array(2) => media(&mut ahead),
        _ => None,
    };
    Ok(decoded.unwrap_or_else(|| ExtraKey::Encoded(encoded.into())))
}

/// Decodes the two elements of a pair of identifier and offset; `None` if their types differ from
/// that.
fn media(pair: &mut Reader<'_>) -> Option<ExtraKey> {
    let id = pair.text_or_nil().ok()??.into();
    let offset = match pair.next().ok()? {
        Value::Unsigned(offset) => i64::try_from(offset).ok()?,
        Value::Negative(offset) => offset,
        _ => return None,
    };
    Some(ExtraKey::Media { id, offset })
}
