//! Decoding of recorded events, compared with the meaning that their recorder wrote.
//!
//! `recorded/` contains frames recorded from running engines, and samples of the layout of each
//! release: `<name>.bin` is one payload, `<name>.json` its meaning (digests as `0x…`),
//! `<name>.stream.bin` complete messages, `*replay*.json` exchanges with replay sockets,
//! `golden_*.json` digests with the engine hashes derived from them. Set `FORESEE_KV_CAPTURES` to a
//! folder with such files to check these too.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use foresee_engine::kv_events::{
    Adapter, Attention, BlockKey, BlockRemoved, BlockStored, Event, EventBatch, Medium, Replay,
    decode_batch, parse_message, parse_replay, replay_request,
};
use serde_json::Value as Json;

use super::written::is_whole;

fn recordings() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kv_events/recorded")
}

fn files_under(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(files_under(&path));
        } else {
            files.push(path);
        }
    }
    files.sort();
    files
}

/// Returns the payload of each recorded batch.
pub(crate) fn payloads() -> Vec<Vec<u8>> {
    let is_single_batch = |path: &PathBuf| {
        let name = path.to_string_lossy();
        name.ends_with(".bin") && !name.ends_with(".stream.bin")
    };
    let files = files_under(&recordings());
    files
        .iter()
        .filter(|path| is_single_batch(path))
        .map(|path| fs::read(path).unwrap())
        .collect()
}

pub(crate) fn hex(text: &str) -> Vec<u8> {
    let digits = text.as_bytes().chunks(2);
    digits
        .map(|pair| u8::from_str_radix(str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

fn key_of(hash: &Json) -> BlockKey {
    match hash {
        Json::String(digest) => {
            let digest = hex(digest.strip_prefix("0x").unwrap());
            BlockKey(u64::from_be_bytes(
                digest[digest.len() - 8..].try_into().unwrap(),
            ))
        }
        number => BlockKey(
            number
                .as_u64()
                .unwrap_or_else(|| number.as_i64().unwrap() as u64),
        ),
    }
}

fn keys_of(hashes: &Json) -> Vec<BlockKey> {
    hashes.as_array().unwrap().iter().map(key_of).collect()
}

fn u32_of(number: &Json) -> Option<u32> {
    number.as_u64().map(|number| number as u32)
}

fn medium_of(medium: &Json) -> Medium {
    match medium.as_str() {
        None | Some("GPU") => Medium::Gpu,
        Some(other) => panic!("unexpected in a recording: {other}"),
    }
}

/// Returns a function that looks up a field in either layout; a missing field is null.
fn fields_of(event: &Json) -> impl Fn(&str) -> Json {
    const STORED: &str = "type block_hashes parent_block_hash token_ids block_size lora_id medium \
        lora_name extra_keys group_idx kv_cache_spec_kind kv_cache_spec_sliding_window";
    const REMOVED: &str = "type block_hashes medium group_idx";
    move |name| match event {
        Json::Array(values) => {
            let names = if values[0] == "BlockStored" {
                STORED
            } else {
                REMOVED
            };
            let position = names.split_whitespace().position(|known| known == name);
            position
                .and_then(|position| values.get(position))
                .cloned()
                .unwrap_or_default()
        }
        event => event[name].clone(),
    }
}

fn event_of(event: &Json) -> Event {
    let field = fields_of(event);
    match field("type").as_str().unwrap() {
        "AllBlocksCleared" => Event::Cleared { medium: None },
        "BlockRemoved" => Event::Removed(BlockRemoved {
            hashes: keys_of(&field("block_hashes")),
            medium: medium_of(&field("medium")),
            group: u32_of(&field("group_idx")),
        }),
        "BlockStored" => {
            let adapter = match (field("lora_name").as_str(), field("lora_id")) {
                (Some(name), _) => Adapter::Named(name.into()),
                (None, Json::Null) => Adapter::Base,
                (None, _) => Adapter::Unnamed,
            };
            // The recordings have no media, so a key that is not the adapter is a salt.
            let mut salt = None;
            for (block, keys) in field("extra_keys")
                .as_array()
                .into_iter()
                .flatten()
                .enumerate()
            {
                for key in keys.as_array().into_iter().flatten() {
                    let key = key.as_str().unwrap();
                    if adapter != Adapter::Named(key.into()) {
                        assert_eq!((block, field("parent_block_hash")), (0, Json::Null));
                        salt = Some(key.into());
                    }
                }
            }
            Event::Stored(BlockStored {
                hashes: keys_of(&field("block_hashes")),
                parent: Some(field("parent_block_hash"))
                    .filter(|parent| !parent.is_null())
                    .map(|parent| key_of(&parent)),
                tokens: field("token_ids")
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|token| u32_of(token).unwrap())
                    .collect(),
                next_token: None,
                block_size: u32_of(&field("block_size")).unwrap(),
                adapter,
                cache_salt: salt,
                medium: medium_of(&field("medium")),
                group: u32_of(&field("group_idx")),
                attention: match field("kv_cache_spec_kind").as_str() {
                    None => Attention::Unspecified,
                    Some("full_attention") => Attention::Full,
                    Some(_) => Attention::Other,
                },
                sliding_window: u32_of(&field("kv_cache_spec_sliding_window")),
                extras: Vec::new(),
            })
        }
        other => panic!("unexpected in a recording: {other}"),
    }
}

fn batch_of(batch: &Json) -> EventBatch {
    EventBatch {
        timestamp: batch[0].as_f64(),
        events: batch[1].as_array().unwrap().iter().map(event_of).collect(),
        data_parallel_rank: u32_of(&batch[2]),
        ..EventBatch::default()
    }
}

/// Splits `[u32 frames, (u32 length, bytes)…]…`.
fn messages_of(mut stream: &[u8]) -> Vec<Vec<Vec<u8>>> {
    fn number(stream: &mut &[u8]) -> usize {
        let (number, rest) = stream.split_first_chunk().unwrap();
        *stream = rest;
        u32::from_be_bytes(*number) as usize
    }
    let mut messages = Vec::new();
    while !stream.is_empty() {
        let mut frames = Vec::new();
        for _ in 0..number(&mut stream) {
            let length = number(&mut stream);
            let (frame, rest) = stream.split_at(length);
            frames.push(frame.to_vec());
            stream = rest;
        }
        messages.push(frames);
    }
    messages
}

fn frames_of(frames: &Json) -> Vec<Vec<u8>> {
    let frames = frames.as_array().unwrap().iter();
    frames
        .map(|frame| hex(frame.as_str().unwrap().split("...").next().unwrap()))
        .collect()
}

fn check_batch(bin: &Path) {
    let payload = fs::read(bin).unwrap();
    let json: Json =
        serde_json::from_slice(&fs::read(bin.with_extension("json")).unwrap()).unwrap();
    let meaning = if json.is_array() {
        &json
    } else {
        &json["decoded"]
    };
    let mut batch = decode_batch(&payload).unwrap();
    let mut expected = batch_of(meaning);
    // A float parsed from JSON may differ in its last bit.
    let times = (batch.timestamp.take(), expected.timestamp.take());
    assert!(matches!(times, (Some(a), Some(b)) if (a - b).abs() < 1e-6));
    assert_eq!(batch, expected, "{}", bin.display());
    if json["frames_hex"].is_array() {
        let frames = frames_of(&json["frames_hex"]);
        let message = parse_message(&frames).unwrap();
        assert_eq!(message.topic, json["topic"].as_str().unwrap().as_bytes());
        assert_eq!(Some(message.sequence), json["seq"].as_u64());
        assert_eq!(message.payload, payload, "{}", bin.display());
    }
}

fn check_stream(path: &Path) {
    let messages = messages_of(&fs::read(path).unwrap());
    assert!(!messages.is_empty(), "{}", path.display());
    // If two engines connect to one socket, each has its own topic and sequence numbers.
    let mut last = HashMap::new();
    for frames in &messages {
        let message = parse_message(frames).unwrap();
        let before = last.insert(message.topic, message.sequence);
        assert!(before < Some(message.sequence), "{}", path.display());
        let batch = decode_batch(message.payload).unwrap();
        assert!(is_whole(&batch), "{}: {}", path.display(), message.sequence);
    }
}

/// Checks that the replies of each exchange start with a batch or the end marker, and that their
/// sequence numbers are the recorded ones.
fn check_replay(exchanges: &[Json]) {
    let complete_request = exchanges
        .iter()
        .find(|exchange| exchange["socket"] == "DEALER")
        .unwrap();
    let request = frames_of(&complete_request["request_frames_hex"]);
    let from = u64::from_be_bytes(request[1].as_slice().try_into().unwrap());
    assert_eq!(replay_request(from).to_vec(), request);
    for exchange in exchanges
        .iter()
        .filter(|exchange| exchange["n_replies"] != 0)
    {
        let sequences = exchange["seqs"].as_array().unwrap();
        for (frames, sequence) in [
            (&exchange["first_reply_frames"], sequences.first()),
            (&exchange["last_reply_frames"], sequences.last()),
        ] {
            let sequence = sequence.unwrap().as_u64().unwrap();
            match parse_replay(&frames_of(frames)).unwrap() {
                Replay::End => assert_eq!(sequence, u64::MAX),
                Replay::Batch(message) => {
                    assert_eq!(message.sequence, sequence);
                    let batch = decode_batch(message.payload).unwrap();
                    // Of long frames, the recording has the beginning followed by dots.
                    let is_cut = frames.to_string().contains("...");
                    assert_eq!((batch.truncated, is_whole(&batch)), (is_cut, !is_cut));
                }
            }
        }
    }
}

/// Checks that the digests of the engine's algorithm give the engine hashes of its events.
fn check_digests(vectors: &[Json]) {
    for vector in vectors {
        let digest = hex(vector["hash"].as_str().unwrap());
        assert_eq!(
            BlockKey::from_digest(&digest),
            key_of(&vector["event_value"])
        );
    }
}

/// Checks all files of a folder. Returns the numbers of batches, streams, replay files and lists of
/// digests.
fn check_folder(folder: &Path) -> [usize; 4] {
    let mut checked = [0; 4];
    let json = |path: &Path| -> Json { serde_json::from_slice(&fs::read(path).unwrap()).unwrap() };
    for path in files_under(folder) {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if name.ends_with(".stream.bin") {
            check_stream(&path);
            checked[1] += 1;
        } else if name.ends_with(".bin") {
            check_batch(&path);
            checked[0] += 1;
        } else if name.contains("replay") {
            check_replay(json(&path)["exchanges"].as_array().unwrap());
            checked[2] += 1;
        } else if name.starts_with("golden_") {
            check_digests(json(&path)["vectors"].as_array().unwrap());
            checked[3] += 1;
        }
    }
    checked
}

#[test]
fn recorded_events_have_their_recorded_meaning() {
    assert_eq!(check_folder(&recordings()), [29, 3, 3, 0]);
}

#[test]
fn further_recordings_have_their_recorded_meaning() {
    let Ok(folder) = std::env::var("FORESEE_KV_CAPTURES") else {
        return;
    };
    let [batches, streams, replays, digests] = check_folder(Path::new(&folder));
    assert!(
        batches + streams + replays + digests > 0,
        "no recordings in {folder}"
    );
    println!("{batches} batches, {streams} streams, {replays} replays, {digests} lists of digests");
}
