use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::*;
use crate::subscribe::evidence::Claims;
use foresee_core::cache::Paths;
use foresee_engine::kv_events::{Layout, encode_batch, parse_message};

const BLOCK: NonZeroU32 = NonZeroU32::new(2).unwrap();

fn follower() -> Follower {
    Follower::new(BLOCK, "m".to_owned(), None)
}

fn payload(timestamp: f64, events: Vec<Event>) -> Vec<u8> {
    let batch = EventBatch {
        timestamp: Some(timestamp),
        events,
        ..EventBatch::default()
    };
    encode_batch(&batch, Layout::Map)
}

fn stored(parent: Option<u64>, hash: u64, tokens: [u32; 2]) -> Event {
    Event::Stored(BlockStored {
        hashes: vec![BlockKey(hash)],
        parent: parent.map(BlockKey),
        tokens: tokens.to_vec(),
        block_size: 2,
        ..BlockStored::default()
    })
}

fn receive(follower: &mut Follower, sequence: u64, payload: &[u8]) -> Received {
    follower.receive(&Message {
        topic: b"",
        sequence,
        payload,
    })
}

#[test]
fn blocks_are_found_as_requests_are_hashed() {
    let mut follower = follower();
    let events = vec![stored(None, 7, [1, 2]), stored(Some(7), 8, [3, 4])];
    let Received::Applied(changes) = receive(&mut follower, 0, &payload(1.0, events)) else {
        panic!("not applied");
    };
    let salt = sequence::salt("m", None, None);
    let prompt = sequence::Sequence::from_tokens(&[1, 2, 3, 4], BLOCK, salt);
    let added = changes.iter().flat_map(|it| it.added.told());
    assert!(added.eq(prompt.hashes().iter().copied()));
    assert!(follower.is_exact());
}

#[test]
fn what_is_missing_is_said_and_can_be_passed_over() {
    let mut follower = follower();
    let first = payload(1.0, vec![stored(None, 7, [1, 2])]);
    assert!(matches!(
        receive(&mut follower, 0, &first),
        Received::Applied(_)
    ));
    let third = payload(3.0, vec![stored(Some(7), 8, [3, 4])]);
    assert_eq!(receive(&mut follower, 2, &third), Received::Gap(1));
    follower.skip_to(2);
    assert!(matches!(
        receive(&mut follower, 2, &third),
        Received::Applied(_)
    ));
    assert!(!follower.is_exact());
    // Whatever was missed is gone with everything else.
    let cleared = payload(4.0, vec![Event::Cleared { medium: None }]);
    let Received::Applied(changes) = receive(&mut follower, 3, &cleared) else {
        panic!("not applied");
    };
    assert_eq!(changes[0].removed.len(), 2);
    assert!(follower.is_exact());
}

#[test]
fn a_lower_number_is_known_or_another_process() {
    let mut follower = follower();
    for (sequence, hash) in [(0, 7), (1, 8)] {
        let events = vec![stored(None, hash, [hash as u32, 0])];
        receive(
            &mut follower,
            sequence,
            &payload(10.0 + sequence as f64, events),
        );
    }
    let again = payload(10.0, vec![stored(None, 7, [7, 0])]);
    assert_eq!(receive(&mut follower, 0, &again), Received::Known);
    let new = payload(20.0, vec![stored(None, 9, [9, 0])]);
    let Received::Restarted(changes) = receive(&mut follower, 0, &new) else {
        panic!("not restarted");
    };
    assert_eq!(changes.removed.len(), 2);
    assert!(matches!(
        receive(&mut follower, 0, &new),
        Received::Applied(_)
    ));
    assert_eq!(follower.contents().added.len(), 1);
}

#[test]
fn what_cannot_be_used_is_a_fault() {
    let mut follower = follower();
    for sequence in 0..3 {
        assert_eq!(follower.fault(), None);
        receive(&mut follower, sequence, b"no batch");
    }
    assert!(follower.fault().unwrap().contains("cannot be read"));
    receive(&mut follower, 3, &payload(1.0, vec![]));
    assert_eq!(follower.fault(), None);

    let odd = Event::Stored(BlockStored {
        hashes: vec![BlockKey(1)],
        tokens: vec![1, 2, 3],
        block_size: 3,
        ..BlockStored::default()
    });
    receive(&mut follower, 4, &payload(2.0, vec![odd]));
    assert!(follower.fault().unwrap().contains("blocks of 3 tokens"));
}

fn batch_of(rank: u32, hash: u64) -> Vec<u8> {
    let batch = EventBatch {
        timestamp: Some(1.0),
        events: vec![stored(None, hash, [hash as u32, 0])],
        data_parallel_rank: Some(rank),
        ..EventBatch::default()
    };
    encode_batch(&batch, Layout::Map)
}

#[test]
fn two_ranks_are_never_taken_for_one() {
    let mut of_rank_1 = Follower::new(BLOCK, "m".to_owned(), Some(1));
    assert_eq!(receive(&mut of_rank_1, 0, &batch_of(0, 7)), Received::Known);
    assert!(of_rank_1.contents().added.is_empty());
    assert!(
        of_rank_1
            .fault()
            .unwrap()
            .contains("rank 0 come where rank 1")
    );

    let mut of_any = follower();
    for (rank, sequence) in [(3, 0), (4, 0), (4, 1)] {
        receive(&mut of_any, sequence, &batch_of(rank, 7 + u64::from(rank)));
    }
    assert_eq!(of_any.contents().added.len(), 1);
    assert!(of_any.fault().unwrap().contains("rank 4 come where rank 3"));
}

/// A block of a size and group of layers of the engine's choice.
fn stored_as(block_size: u32, group: Option<u32>) -> Event {
    Event::Stored(BlockStored {
        hashes: vec![BlockKey(7)],
        tokens: (0..block_size).collect(),
        block_size,
        group,
        ..BlockStored::default()
    })
}

/// The next process at the same address is of another release, or configured otherwise.
#[test]
fn nothing_learned_of_a_process_is_held_against_the_next() {
    for (before, then, stride) in [
        ((2, None), (2, Some(0)), 1),
        ((2, Some(1)), (2, None), 1),
        ((2, None), (4, None), 2),
        ((4, None), (2, None), 1),
        ((3, None), (2, None), 1),
    ] {
        let mut follower = follower();
        follower.apply(&batch_with(stored_as(before.0, before.1)));
        let contents = follower.contents();
        let removed = follower.clear();
        assert_eq!(removed.removed, contents.added);
        assert_eq!(removed.stride, contents.stride, "told as it was");
        follower.apply(&batch_with(stored_as(then.0, then.1)));
        assert_eq!(follower.fault(), None, "{before:?}, {then:?}");
        assert!(follower.is_exact(), "{before:?}, {then:?}");
        let contents = follower.contents();
        assert_eq!((contents.added.len(), contents.stride), (1, stride));
        assert_eq!(follower.engine_block_size(), then.0);
    }
}

fn batch_with(event: Event) -> EventBatch {
    EventBatch {
        events: vec![event],
        ..EventBatch::default()
    }
}

#[test]
fn who_speaks_first_on_a_new_connection_may_be_another_rank() {
    let mut of_any = follower();
    receive(&mut of_any, 0, &batch_of(3, 7));
    of_any.is_connected();
    let restarted = receive(&mut of_any, 0, &batch_of(4, 8));
    assert!(matches!(restarted, Received::Restarted(it) if it.removed.len() == 1));
    receive(&mut of_any, 0, &batch_of(4, 8));
    assert_eq!((of_any.fault(), of_any.contents().added.len()), (None, 1));
    receive(&mut of_any, 1, &batch_of(3, 9));
    assert!(of_any.fault().unwrap().contains("rank 3 come where rank 4"));

    // One that was told which it is waits for that one.
    let mut of_rank_1 = Follower::new(BLOCK, "m".to_owned(), Some(1));
    receive(&mut of_rank_1, 0, &batch_of(0, 7));
    for rank in [0, 1] {
        of_rank_1.is_connected();
        assert_eq!(of_rank_1.fault(), None);
        receive(&mut of_rank_1, 0, &batch_of(rank, 8));
        assert_eq!(of_rank_1.fault().is_some(), rank == 0);
    }
    of_rank_1.clear();
    receive(&mut of_rank_1, 0, &batch_of(0, 7));
    assert!(of_rank_1.fault().is_some(), "it is still of rank 1");
}

/// Whole messages recorded from engines that ran, and those of the folder that
/// `FORESEE_KV_CAPTURES` names.
fn recordings() -> Vec<(PathBuf, Vec<u8>)> {
    let ours = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/tests/kv_events/recorded");
    let further = std::env::var_os("FORESEE_KV_CAPTURES").map(PathBuf::from);
    let mut folders: Vec<PathBuf> = std::iter::once(ours).chain(further).collect();
    let mut recordings = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.to_string_lossy().ends_with(".stream.bin") {
                let bytes = std::fs::read(&path).unwrap();
                recordings.push((path, bytes));
            }
        }
    }
    recordings
}

/// A recording is messages of `u32` frames, each a `u32` length and as many bytes.
fn messages(mut rest: &[u8]) -> Vec<Vec<Vec<u8>>> {
    let mut take = |length: Option<usize>| {
        let length = length.unwrap_or(4);
        let (taken, after) = rest.split_at_checked(length)?;
        rest = after;
        Some(taken.to_vec())
    };
    let number = |bytes: Vec<u8>| u32::from_be_bytes(bytes.try_into().unwrap()) as usize;
    let mut messages = Vec::new();
    while let Some(frames) = take(None) {
        let frames = (0..number(frames)).map(|_| {
            let length = take(None).map(number);
            take(length).unwrap()
        });
        messages.push(frames.collect());
    }
    messages
}

#[test]
fn recorded_streams_leave_what_was_stored_and_not_removed() {
    let recordings = recordings();
    assert!(recordings.len() >= 2);
    for (path, bytes) in recordings {
        let mut follower = Follower::new(NonZeroU32::MIN, "m".to_owned(), None);
        let mut counts = HashMap::<BlockKey, i64>::new();
        let mut followed = None;
        for frames in messages(&bytes) {
            let message = parse_message(&frames).unwrap();
            if let Received::Gap(_) = follower.receive(&message) {
                follower.skip_to(message.sequence);
                assert!(matches!(follower.receive(&message), Received::Applied(_)));
            }
            for event in decode_batch(message.payload).unwrap().events {
                match event {
                    Event::Stored(it)
                        if it.attention != Attention::Other
                            && *followed.get_or_insert(it.group) == it.group =>
                    {
                        let hashes = it.hashes.into_iter();
                        hashes.for_each(|hash| *counts.entry(hash).or_default() += 1);
                    }
                    Event::Removed(it) if followed == Some(it.group) => {
                        let hashes = it.hashes.into_iter();
                        hashes.for_each(|hash| *counts.entry(hash).or_default() -= 1);
                    }
                    Event::Cleared { .. } => counts.clear(),
                    _ => {}
                }
            }
        }
        assert_eq!(follower.fault(), None, "{}", path.display());
        let left = counts.values().filter(|count| **count > 0).count();
        eprintln!(
            "{}: {left} blocks, {} followed, exact: {}",
            path.display(),
            follower.view.len(),
            follower.is_exact()
        );
        if follower.is_exact() {
            assert_eq!(follower.view.len(), left, "{}", path.display());
        }
    }
}

#[test]
fn a_prompt_of_one_block_is_stored_again_and_listed_blocks_are_not() {
    let mut follower = follower();
    let block = || payload(1.0, vec![stored(None, 7, [1, 2])]);
    let removed = payload(
        1.0,
        vec![Event::Removed(BlockRemoved {
            hashes: vec![BlockKey(7)],
            ..BlockRemoved::default()
        })],
    );
    receive(&mut follower, 0, &block());
    follower.take_back_repeats();
    let salt = sequence::salt("m", None, None);
    let prompt = sequence::Sequence::from_tokens(&[1, 2], BLOCK, salt);
    follower.expect(prompt.hashes()[0]);
    // The prompt itself, and a list.
    receive(&mut follower, 1, &block());
    receive(&mut follower, 2, &block());
    receive(&mut follower, 3, &removed);
    assert_eq!(follower.contents().added, Paths::whole(prompt.hashes()));
    receive(&mut follower, 4, &removed);
    assert!(follower.contents().added.is_empty());
}

/// What a request found cached, and how many batches had come before it was sent.
#[derive(serde::Deserialize)]
struct Found {
    batches: usize,
    cached_tokens: u32,
    prompt: Vec<u32>,
}

/// A vLLM 0.32 of 23 blocks, some of whose requests asked it to list what they found cached
/// (`kv_cache_report_mode: full`). Such lists are taken for what they are from the `asked`th
/// request on. Returns which requests were foretold wrong.
fn wrong_with_lists(asked: Option<usize>) -> Vec<usize> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../engine/tests/kv_events/recorded/full_report");
    let stream = std::fs::read(folder.join("full.stream.bin")).unwrap();
    let found = std::fs::read(folder.join("found.json")).unwrap();
    let found: Vec<Found> = serde_json::from_slice(&found).unwrap();
    assert!(found.len() >= 70);
    let engine_block = NonZeroU32::new(32).unwrap();
    let mut follower = Follower::new(engine_block, "m".to_owned(), None);
    let mut claims = Claims::default();
    let mut messages = messages(&stream).into_iter();
    let mut applied = 0;
    let mut wrong = Vec::new();
    for (number, found) in found.iter().enumerate() {
        for frames in messages.by_ref().take(found.batches - applied) {
            let message = parse_message(&frames).unwrap();
            let Received::Applied(changes) = follower.receive(&message) else {
                panic!("batch {} was not applied", message.sequence);
            };
            changes.iter().for_each(|it| claims.update(it));
        }
        applied = found.batches;
        if asked == Some(number) {
            let changes = follower.take_back_repeats();
            changes.iter().for_each(|it| claims.update(it));
        }
        let salt = sequence::salt("m", None, None);
        let prompt = sequence::Sequence::from_tokens(&found.prompt, engine_block, salt);
        let foretold = claims.depth(prompt.hashes()).min(prompt.reusable_blocks());
        if foretold * 32 != found.cached_tokens {
            wrong.push(number);
        }
    }
    assert!(asked.is_some() || follower.is_overfull(23));
    assert!(asked.is_none() || !follower.is_overfull(23));
    wrong
}

#[test]
fn lists_of_what_is_cached_are_no_stores() {
    let counted = wrong_with_lists(None);
    assert!(counted.len() >= 3, "{counted:?}");
    assert_eq!(wrong_with_lists(Some(0)), Vec::<usize>::new());
    // Late, but then all is put right.
    let late = wrong_with_lists(Some(40));
    assert!(late.iter().all(|number| *number < 40), "{late:?}");
    assert!(!late.is_empty());
}
