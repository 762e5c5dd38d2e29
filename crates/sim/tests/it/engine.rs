//! The simulated engine through its public interface: scheduling, sharing, preemption, release.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use crate::BLOCK;
use foresee_core::sequence::SequenceHash;
use foresee_sim::engine::{
    CacheEvent, Engine, EngineConfig, EngineRequest, InFlight, SubmitError, TokenEvent,
};
use foresee_sim::prompt::Prompt;
use foresee_sim::step_time::L40S_8B;
use proptest::prelude::*;

fn config(blocks: u32) -> EngineConfig {
    EngineConfig {
        blocks,
        cache_events: true,
        ..EngineConfig::from_preset(&L40S_8B, BLOCK)
    }
}

fn hashes(prompt: &Prompt) -> Arc<[SequenceHash]> {
    Arc::from(prompt.sequence(BLOCK).hashes())
}

fn request(id: u64, prompt: &Prompt, output_tokens: u32) -> EngineRequest {
    EngineRequest {
        id,
        hashes: hashes(prompt),
        prompt_tokens: prompt.len(),
        output_tokens,
    }
}

fn step(engine: &mut Engine) -> Vec<TokenEvent> {
    let step = engine.begin_step().expect("the engine has requests");
    engine.end_step(step)
}

/// Runs the engine until it is idle. Returns every event with the number of its step.
fn drain(engine: &mut Engine) -> Vec<(usize, TokenEvent)> {
    let mut events = Vec::new();
    for number in 1.. {
        let Some(step) = engine.begin_step() else {
            break;
        };
        events.extend(
            engine
                .end_step(step)
                .into_iter()
                .map(|event| (number, event)),
        );
    }
    events
}

#[test]
fn a_request_prefills_in_chunks_then_decodes() {
    let mut engine = Engine::new(config(1000));
    let prompt = Prompt::new().then(1, 5000);
    engine.submit(request(7, &prompt, 3)).unwrap();
    let events = drain(&mut engine);
    // 2048 + 2048 + 904 tokens; the third step generates the first output token.
    let steps: Vec<_> = events.iter().map(|(number, _)| *number).collect();
    assert_eq!(steps, [3, 4, 5]);
    let flags: Vec<_> = events
        .iter()
        .map(|(_, event)| (event.id, event.first, event.finished))
        .collect();
    assert_eq!(
        flags,
        [(7, true, false), (7, false, false), (7, false, true)]
    );
    assert!(!engine.has_work());
    assert_eq!(engine.pinned_blocks(), 0);
}

#[test]
fn blocks_are_pinned_from_the_start_of_the_first_step_to_the_end_of_the_last() {
    let mut engine = Engine::new(config(1000));
    engine
        .submit(request(1, &Prompt::new().then(1, 32), 1))
        .unwrap();
    assert_eq!(engine.pinned_blocks(), 0, "waiting requests have no blocks");
    let current_step = engine.begin_step().unwrap();
    assert_eq!(engine.pinned_blocks(), 2);
    assert!(current_step.duration > Duration::ZERO);
    engine.end_step(current_step);
    assert_eq!(engine.pinned_blocks(), 0);
}

#[test]
fn a_cache_hit_never_covers_the_whole_prompt() {
    let mut engine = Engine::new(config(1000));
    let aligned = Prompt::new().then(1, 64);
    let longer = Prompt::new().then(1, 65);
    for (id, prompt) in [(1, &aligned), (2, &aligned), (3, &longer)] {
        engine.submit(request(id, prompt, 1)).unwrap();
    }
    let cached: Vec<_> = drain(&mut engine)
        .iter()
        .map(|(_, event)| event.cached_tokens)
        .collect();
    assert_eq!(cached, [0, 48, 64]);
    // The last block of the aligned prompt was computed twice and is stored twice.
    let stores = engine
        .take_cache_events()
        .into_iter()
        .map(|event| match event {
            CacheEvent::Stored { request, blocks } => (request, blocks),
            CacheEvent::Removed { .. } => panic!("an unexpected eviction"),
        });
    assert_eq!(stores.collect::<Vec<_>>(), [(1, 0..4), (2, 3..4)]);
}

#[test]
fn requests_admitted_in_one_step_share_a_prefix() {
    let mut engine = Engine::new(config(1000));
    for id in 0..2 {
        engine
            .submit(request(id, &Prompt::new().then(9, 160).then(id, 160), 4))
            .unwrap();
    }
    let events = step(&mut engine);
    assert_eq!(
        events
            .iter()
            .map(|event| event.cached_tokens)
            .collect::<Vec<_>>(),
        [0, 160]
    );
    assert_eq!(engine.pinned_blocks(), 30);
}

#[test]
fn no_block_is_shared_without_prefix_caching() {
    let mut engine = Engine::new(EngineConfig {
        prefix_caching: false,
        ..config(1000)
    });
    for id in 0..2 {
        engine
            .submit(request(id, &Prompt::new().then(9, 160), 2))
            .unwrap();
    }
    assert!(
        step(&mut engine)
            .iter()
            .all(|event| event.cached_tokens == 0)
    );
    assert_eq!(engine.pinned_blocks(), 20);
    assert_eq!(engine.cached_hashes(), 0);
}

#[test]
fn the_next_turn_finds_the_known_output_in_the_cache() {
    let mut engine = Engine::new(config(1000));
    let first = Prompt::new().then(1, 40);
    let with_output = first.clone().then(2, 60);
    let mut turn = request(1, &with_output, 60);
    turn.prompt_tokens = first.len();
    engine.submit(turn).unwrap();
    drain(&mut engine);
    engine
        .submit(request(2, &with_output.then(3, 20), 1))
        .unwrap();
    // Token 100, the last of the output, was never computed. Its block is not full in any case.
    assert_eq!(drain(&mut engine)[0].1.cached_tokens, 96);
}

#[test]
fn the_last_admitted_request_is_preempted_and_computed_again() {
    // Two requests of 4 blocks that grow to 6 each, in 9 blocks.
    let mut engine = Engine::new(config(9));
    for id in 1..=2 {
        engine
            .submit(request(id, &Prompt::new().then(id, 64), 32))
            .unwrap();
    }
    let mut tokens: HashMap<u64, u32> = HashMap::new();
    let mut finished = Vec::new();
    while let Some(current_step) = engine.begin_step() {
        let waiting: Vec<_> = engine
            .in_flight()
            .filter(|request| !request.running)
            .collect();
        if engine.totals().preemptions > 0 && finished.is_empty() {
            let preempted = InFlight {
                id: 2,
                running: false,
                blocks: 0,
            };
            assert!(waiting.is_empty() || waiting == [preempted]);
        }
        for event in engine.end_step(current_step) {
            *tokens.entry(event.id).or_default() += 1;
            assert_eq!(event.first, tokens[&event.id] == 1);
            assert_eq!(
                event.cached_tokens, 0,
                "blocks found after a preemption are no hits of the prompt"
            );
            if event.finished {
                finished.push(event.id);
            }
        }
    }
    assert!(engine.totals().preemptions >= 1);
    assert_eq!(finished, [1, 2]);
    assert_eq!(tokens, HashMap::from([(1, 32), (2, 32)]));
    assert_eq!(engine.pinned_blocks(), 0);
    assert_eq!(engine.totals().prompt_tokens, 128);
}

#[test]
fn a_preempted_request_is_first_in_the_waiting_queue() {
    let mut engine = Engine::new(config(9));
    for id in 1..=3 {
        engine
            .submit(request(id, &Prompt::new().then(id, 64), 32))
            .unwrap();
    }
    while engine.totals().preemptions == 0 {
        step(&mut engine);
    }
    let waiting: Vec<_> = engine
        .in_flight()
        .filter(|request| !request.running)
        .map(|request| request.id)
        .collect();
    assert_eq!(waiting, [2, 3]);
}

#[test]
fn the_waiting_queue_is_first_come_first_served() {
    let mut engine = Engine::new(config(10));
    engine
        .submit(request(1, &Prompt::new().then(1, 96), 1))
        .unwrap();
    engine
        .submit(request(2, &Prompt::new().then(2, 80), 1))
        .unwrap();
    engine
        .submit(request(3, &Prompt::new().then(3, 16), 1))
        .unwrap();
    let current_step = engine.begin_step().unwrap();
    assert_eq!(
        (engine.running(), engine.waiting()),
        (1, 2),
        "request 3 would fit, but request 2 is first"
    );
    engine.end_step(current_step);
    assert_eq!(step(&mut engine).len(), 2);
}

#[test]
fn steps_respect_the_limits_on_sequences_and_tokens() {
    let mut engine = Engine::new(EngineConfig {
        max_num_seqs: 3,
        max_num_batched_tokens: 100,
        ..config(1000)
    });
    for id in 0..8 {
        engine
            .submit(request(id, &Prompt::new().then(id, 64), 5))
            .unwrap();
    }
    while let Some(current_step) = engine.begin_step() {
        assert!(current_step.load.scheduled_tokens <= 100);
        assert!(engine.running() <= 3);
        engine.end_step(current_step);
    }
    assert_eq!(engine.totals().output_tokens, 40);
}

#[test]
fn requests_that_can_never_run_are_rejected() {
    let mut engine = Engine::new(config(10));
    let too_long = engine.submit(request(1, &Prompt::new().then(1, 150), 11));
    assert_eq!(
        too_long,
        Err(SubmitError::NeverFits {
            needed: 11,
            capacity: 10
        })
    );
    let exactly = engine.submit(request(2, &Prompt::new().then(1, 150), 10));
    assert_eq!(exactly, Ok(()));
    let empty = engine.submit(request(3, &Prompt::new(), 1));
    assert_eq!(empty, Err(SubmitError::Empty));
    assert_eq!(drain(&mut engine).len(), 10);
    assert!(engine.begin_step().is_none());
}

#[test]
fn an_abort_releases_blocks_immediately_even_within_a_step() {
    let mut engine = Engine::new(config(10));
    engine
        .submit(request(1, &Prompt::new().then(1, 96), 50))
        .unwrap();
    engine
        .submit(request(2, &Prompt::new().then(2, 96), 50))
        .unwrap();
    let current_step = engine.begin_step().unwrap();
    assert!(engine.abort(1));
    assert!(engine.abort(2));
    assert!(!engine.abort(2));
    assert_eq!(engine.pinned_blocks(), 0);
    assert!(engine.end_step(current_step).is_empty());
    assert!(!engine.has_work());
}

/// A request of the property test.
#[derive(Clone, Debug)]
struct TestRequest {
    prefix: u64,
    prefix_tokens: u32,
    own_tokens: u32,
    output_tokens: u32,
    /// Number of steps before the next request is submitted.
    delay: usize,
    /// Number of steps after which the request is aborted.
    abort_after: Option<usize>,
}

fn test_request() -> impl Strategy<Value = TestRequest> {
    let lengths = (0..4_u64, 0..100_u32, 1..100_u32, 1..40_u32);
    let abort_after = prop_oneof![3 => Just(None), 1 => (0..20_usize).prop_map(Some)];
    (lengths, 0..4_usize, abort_after).prop_map(
        |((prefix, prefix_tokens, own_tokens, output_tokens), delay, abort_after)| TestRequest {
            prefix,
            prefix_tokens,
            own_tokens,
            output_tokens,
            delay,
            abort_after,
        },
    )
}

proptest! {
    /// For any requests, all blocks are released, all requests are served, and the events report
    /// exactly the cached blocks.
    #[test]
    fn every_request_is_served_and_every_block_is_released(
        requests in prop::collection::vec(test_request(), 1..30),
        blocks in 15..60_u32,
        budget in 20..200_u32,
    ) {
        let mut engine = Engine::new(EngineConfig {
            max_num_batched_tokens: budget,
            max_num_seqs: 6,
            ..config(blocks)
        });
        let mut chains: HashMap<u64, Arc<[SequenceHash]>> = HashMap::new();
        let mut expected: HashMap<u64, u32> = HashMap::new();
        let mut cached: HashMap<SequenceHash, u32> = HashMap::new();
        let mut aborts: Vec<(usize, u64)> = Vec::new();
        let mut requests = requests.into_iter().enumerate().peekable();
        let mut next_submit = 0;
        for number in 0.. {
            prop_assert!(number < 20_000, "no progress");
            while next_submit <= number && let Some((index, planned)) = requests.next() {
                let id = index as u64;
                let prompt = Prompt::new()
                    .then(planned.prefix, planned.prefix_tokens)
                    .then(100 + id, planned.own_tokens);
                let whole = prompt.clone().then(1000 + id, planned.output_tokens);
                chains.insert(id, hashes(&whole));
                let mut submitted = request(id, &whole, planned.output_tokens);
                submitted.prompt_tokens = prompt.len();
                engine.submit(submitted).expect("fits");
                expected.insert(id, planned.output_tokens);
                next_submit = number + planned.delay;
                aborts.extend(planned.abort_after.map(|steps| (number + steps, id)));
            }
            aborts.retain(|&(step, id)| {
                let is_due = step <= number;
                if is_due && engine.abort(id) {
                    expected.remove(&id);
                }
                !is_due
            });
            let Some(current_step) = engine.begin_step() else {
                if requests.peek().is_none() {
                    break;
                }
                continue;
            };
            prop_assert!(current_step.load.scheduled_tokens <= budget);
            for event in engine.take_cache_events() {
                match event {
                    CacheEvent::Stored { request, blocks } => {
                        for block in blocks {
                            *cached.entry(chains[&request][block]).or_default() += 1;
                        }
                    }
                    CacheEvent::Removed { hash } => {
                        let store_count = cached.get_mut(&hash).expect("was stored");
                        *store_count -= 1;
                        if *store_count == 0 {
                            cached.remove(&hash);
                        }
                    }
                }
            }
            prop_assert_eq!(engine.cached_hashes(), cached.len());
            // The prefix of a cached block is cached.
            for chain in chains.values() {
                let cached_blocks = chain.iter().take_while(|hash| cached.contains_key(hash)).count();
                prop_assert!(chain[cached_blocks..].iter().all(|hash| !cached.contains_key(hash)));
            }
            for event in engine.end_step(current_step) {
                let remaining = expected.get_mut(&event.id).expect("not aborted");
                *remaining -= 1;
                prop_assert_eq!(event.finished, *remaining == 0);
                if event.finished {
                    expected.remove(&event.id);
                }
            }
            // Pinned blocks are at most the sum over requests, because shared blocks count once.
            let sum: u32 = engine.in_flight().map(|request| request.blocks).sum();
            prop_assert!(engine.pinned_blocks() <= sum);
        }
        prop_assert!(expected.is_empty());
        prop_assert_eq!(engine.pinned_blocks(), 0);
    }
}
