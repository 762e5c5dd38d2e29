//! The engine model seen from outside: what it schedules, shares, preempts and frees.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use crate::BLOCK;
use foresee_core::sequence::SequenceHash;
use foresee_sim::engine::{
    CacheEvent, Engine, EngineConfig, EngineRequest, InFlight, SubmitError, TokenEvent,
};
use foresee_sim::law::L40S_8B;
use foresee_sim::prompt::Prompt;
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
    let step = engine.begin_step().expect("there is work");
    engine.end_step(step)
}

/// Steps until idle; every event with the number of its step.
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
    // 2048 + 2048 + 904 tokens, the third of which brings the first token.
    let steps: Vec<_> = events.iter().map(|(number, _)| *number).collect();
    assert_eq!(steps, [3, 4, 5]);
    let flags: Vec<_> = events
        .iter()
        .map(|(_, it)| (it.id, it.first, it.finished))
        .collect();
    assert_eq!(
        flags,
        [(7, true, false), (7, false, false), (7, false, true)]
    );
    assert!(!engine.has_work());
    assert_eq!(engine.pinned_blocks(), 0);
}

#[test]
fn blocks_are_held_from_the_beginning_of_a_step_to_the_end_of_the_last() {
    let mut engine = Engine::new(config(1000));
    engine
        .submit(request(1, &Prompt::new().then(1, 32), 1))
        .unwrap();
    assert_eq!(engine.pinned_blocks(), 0, "waiting requests hold none");
    let under_way = engine.begin_step().unwrap();
    assert_eq!(engine.pinned_blocks(), 2);
    assert!(under_way.duration > Duration::ZERO);
    engine.end_step(under_way);
    assert_eq!(engine.pinned_blocks(), 0);
}

#[test]
fn a_hit_is_never_the_whole_prompt() {
    let mut engine = Engine::new(config(1000));
    let aligned = Prompt::new().then(1, 64);
    let longer = Prompt::new().then(1, 65);
    for (id, prompt) in [(1, &aligned), (2, &aligned), (3, &longer)] {
        engine.submit(request(id, prompt, 1)).unwrap();
    }
    let cached: Vec<_> = drain(&mut engine)
        .iter()
        .map(|(_, it)| it.cached_tokens)
        .collect();
    assert_eq!(cached, [0, 48, 64]);
    // The last block of the aligned prompt was computed twice and is held twice.
    let stores = engine
        .take_cache_events()
        .into_iter()
        .map(|event| match event {
            CacheEvent::Stored { request, blocks } => (request, blocks),
            CacheEvent::Removed { .. } => panic!("nothing was evicted"),
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
        events.iter().map(|it| it.cached_tokens).collect::<Vec<_>>(),
        [0, 160]
    );
    assert_eq!(engine.pinned_blocks(), 30);
}

#[test]
fn nothing_is_shared_without_prefix_caching() {
    let mut engine = Engine::new(EngineConfig {
        prefix_caching: false,
        ..config(1000)
    });
    for id in 0..2 {
        engine
            .submit(request(id, &Prompt::new().then(9, 160), 2))
            .unwrap();
    }
    assert!(step(&mut engine).iter().all(|it| it.cached_tokens == 0));
    assert_eq!(engine.pinned_blocks(), 20);
    assert_eq!(engine.cached_hashes(), 0);
}

#[test]
fn known_answers_are_found_by_the_next_turn() {
    let mut engine = Engine::new(config(1000));
    let first = Prompt::new().then(1, 40);
    let with_answer = first.clone().then(2, 60);
    let mut turn = request(1, &with_answer, 60);
    turn.prompt_tokens = first.len();
    engine.submit(turn).unwrap();
    drain(&mut engine);
    engine
        .submit(request(2, &with_answer.then(3, 20), 1))
        .unwrap();
    // Token 100, the last of the answer, was never computed, but its block is not full anyway.
    assert_eq!(drain(&mut engine)[0].1.cached_tokens, 96);
}

#[test]
fn the_last_admitted_is_preempted_and_computes_again() {
    // Two requests of 4 blocks that grow to 6 each, in 9 blocks.
    let mut engine = Engine::new(config(9));
    for id in 1..=2 {
        engine
            .submit(request(id, &Prompt::new().then(id, 64), 32))
            .unwrap();
    }
    let mut tokens: HashMap<u64, u32> = HashMap::new();
    let mut finished = Vec::new();
    while let Some(under_way) = engine.begin_step() {
        let waiting: Vec<_> = engine.in_flight().filter(|it| !it.running).collect();
        if engine.totals().preemptions > 0 && finished.is_empty() {
            let preempted = InFlight {
                id: 2,
                running: false,
                blocks: 0,
            };
            assert!(waiting.is_empty() || waiting == [preempted]);
        }
        for event in engine.end_step(under_way) {
            *tokens.entry(event.id).or_default() += 1;
            assert_eq!(event.first, tokens[&event.id] == 1);
            assert_eq!(
                event.cached_tokens, 0,
                "what it finds again is no hit of its prompt"
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
fn a_preempted_request_goes_before_those_that_wait() {
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
        .filter(|it| !it.running)
        .map(|it| it.id)
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
    let under_way = engine.begin_step().unwrap();
    assert_eq!(
        (engine.running(), engine.waiting()),
        (1, 2),
        "3 would fit, but 2 is first"
    );
    engine.end_step(under_way);
    assert_eq!(step(&mut engine).len(), 2);
}

#[test]
fn limits_on_sequences_and_tokens_hold() {
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
    while let Some(under_way) = engine.begin_step() {
        assert!(under_way.load.scheduled_tokens <= 100);
        assert!(engine.running() <= 3);
        engine.end_step(under_way);
    }
    assert_eq!(engine.totals().output_tokens, 40);
}

#[test]
fn impossible_requests_are_refused() {
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
fn an_abort_frees_at_once_even_within_a_step() {
    let mut engine = Engine::new(config(10));
    engine
        .submit(request(1, &Prompt::new().then(1, 96), 50))
        .unwrap();
    engine
        .submit(request(2, &Prompt::new().then(2, 96), 50))
        .unwrap();
    let under_way = engine.begin_step().unwrap();
    assert!(engine.abort(1));
    assert!(engine.abort(2));
    assert!(!engine.abort(2));
    assert_eq!(engine.pinned_blocks(), 0);
    assert!(engine.end_step(under_way).is_empty());
    assert!(!engine.has_work());
}

#[derive(Clone, Debug)]
struct Job {
    prefix: u64,
    prefix_tokens: u32,
    own_tokens: u32,
    output_tokens: u32,
    /// Steps before it is submitted.
    delay: usize,
    /// Aborted this many steps after submission.
    abort_after: Option<usize>,
}

fn job() -> impl Strategy<Value = Job> {
    let lengths = (0..4_u64, 0..100_u32, 1..100_u32, 1..40_u32);
    let abort_after = prop_oneof![3 => Just(None), 1 => (0..20_usize).prop_map(Some)];
    (lengths, 0..4_usize, abort_after).prop_map(
        |((prefix, prefix_tokens, own_tokens, output_tokens), delay, abort_after)| Job {
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
    /// Whatever comes, blocks are conserved, everyone is served, and the events tell exactly
    /// what is cached.
    #[test]
    fn everyone_is_served_and_every_block_comes_back(
        jobs in prop::collection::vec(job(), 1..30),
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
        let mut jobs = jobs.into_iter().enumerate().peekable();
        let mut next_submit = 0;
        for number in 0.. {
            prop_assert!(number < 20_000, "no progress");
            while next_submit <= number && let Some((index, job)) = jobs.next() {
                let id = index as u64;
                let prompt = Prompt::new()
                    .then(job.prefix, job.prefix_tokens)
                    .then(100 + id, job.own_tokens);
                let whole = prompt.clone().then(1000 + id, job.output_tokens);
                chains.insert(id, hashes(&whole));
                let mut submitted = request(id, &whole, job.output_tokens);
                submitted.prompt_tokens = prompt.len();
                engine.submit(submitted).expect("fits");
                expected.insert(id, job.output_tokens);
                next_submit = number + job.delay;
                aborts.extend(job.abort_after.map(|steps| (number + steps, id)));
            }
            aborts.retain(|&(when, id)| {
                let due = when <= number;
                if due && engine.abort(id) {
                    expected.remove(&id);
                }
                !due
            });
            let Some(under_way) = engine.begin_step() else {
                if jobs.peek().is_none() {
                    break;
                }
                continue;
            };
            prop_assert!(under_way.load.scheduled_tokens <= budget);
            for event in engine.take_cache_events() {
                match event {
                    CacheEvent::Stored { request, blocks } => {
                        for block in blocks {
                            *cached.entry(chains[&request][block]).or_default() += 1;
                        }
                    }
                    CacheEvent::Removed { hash } => {
                        let holders = cached.get_mut(&hash).expect("was stored");
                        *holders -= 1;
                        if *holders == 0 {
                            cached.remove(&hash);
                        }
                    }
                }
            }
            prop_assert_eq!(engine.cached_hashes(), cached.len());
            // Prefix caches are closed under prefixes.
            for chain in chains.values() {
                let depth = chain.iter().take_while(|hash| cached.contains_key(hash)).count();
                prop_assert!(chain[depth..].iter().all(|hash| !cached.contains_key(hash)));
            }
            for event in engine.end_step(under_way) {
                let left = expected.get_mut(&event.id).expect("not aborted");
                *left -= 1;
                prop_assert_eq!(event.finished, *left == 0);
                if event.finished {
                    expected.remove(&event.id);
                }
            }
            // Blocks held are at most the sum of what each holds: shared ones count once.
            let held: u32 = engine.in_flight().map(|it| it.blocks).sum();
            prop_assert!(engine.pinned_blocks() <= held);
        }
        prop_assert!(expected.is_empty());
        prop_assert_eq!(engine.pinned_blocks(), 0);
    }
}
