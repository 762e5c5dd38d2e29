//! Sequences: hashes are equal exactly where prefixes are equal.

#![allow(clippy::unwrap_used)]

use std::num::NonZeroU32;

use foresee_prefix::sequence::{BytesPerToken, PartialBlock, Sequence, prefix_salt};
use proptest::prelude::*;

const FOUR: NonZeroU32 = NonZeroU32::new(4).unwrap();

#[test]
fn salts_differ_by_model_adapter_and_cache_salt() {
    let parts = [
        ("a", None, None),
        ("b", None, None),
        ("ab", None, None),
        ("a", Some("b"), None),
        ("a", None, Some("b")),
        ("a", Some(""), None),
        ("a", None, Some("")),
        ("a", Some("b"), Some("c")),
        ("a", Some("bc"), Some("")),
        ("a", Some("c"), Some("b")),
        ("", None, None),
    ];
    let prompt: Vec<u32> = (0..40).collect();
    for (i, &(model, lora, cache_salt)) in parts.iter().enumerate() {
        let first = Sequence::from_tokens(&prompt, FOUR, prefix_salt(model, lora, cache_salt));
        assert_eq!(first.hashes().len(), 10);
        for &(model, lora, cache_salt) in &parts[..i] {
            let second = Sequence::from_tokens(&prompt, FOUR, prefix_salt(model, lora, cache_salt));
            let pairs = first.hashes().iter().zip(second.hashes());
            assert_eq!(pairs.filter(|(a, b)| a == b).count(), 0);
        }
    }
}

#[test]
fn partial_blocks_count_and_have_no_hash() {
    for (tokens, blocks, hashes, reusable) in [
        (0, 0, 0, 0),
        (1, 1, 0, 0),
        (4, 1, 1, 0),
        (5, 2, 1, 1),
        (8, 2, 2, 1),
        (9, 3, 2, 2),
    ] {
        let sequence = Sequence::from_tokens(&vec![1; tokens], FOUR, 0);
        assert_eq!(sequence.tokens() as usize, tokens);
        assert_eq!(sequence.blocks(), blocks);
        assert_eq!(sequence.hashes().len(), hashes);
        assert_eq!(sequence.max_reusable_blocks(), reusable);
    }
}

#[test]
fn an_unhashed_tail_counts_and_matches_nothing() {
    let head = Sequence::from_tokens(&[7; 10], FOUR, 0);
    let whole = head.clone().with_unhashed_tail(90);
    assert_eq!(whole.hashes(), head.hashes());
    assert_eq!((whole.tokens(), whole.blocks()), (100, 25));
    assert_eq!(whole.with_unhashed_tail(u32::MAX).tokens(), u32::MAX);
    assert!(Sequence::unhashed(1000, FOUR).hashes().is_empty());
}

/// Returns the length of the common prefix of two slices.
fn common_len<T: PartialEq>(a: &[T], b: &[T]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

proptest! {
    /// Splits a prompt anywhere, and extends its first part by its second.
    #[test]
    fn an_extended_sequence_equals_the_whole_sequence(
        tokens in prop::collection::vec(any::<u32>(), 0..60),
        bytes_per_token in 0.3..6.0_f64,
        cut in any::<prop::sample::Index>(),
    ) {
        let cut = cut.index(tokens.len() + 1);
        let (prompt, more) = tokens.split_at(cut);
        let end = PartialBlock::from_tokens(prompt, FOUR, 7);
        let extended = Sequence::from_tokens(prompt, FOUR, 7).extended_with_tokens(&end, more);
        prop_assert_eq!(extended, Sequence::from_tokens(&tokens, FOUR, 7));

        let text: Vec<u8> = tokens.iter().map(|&token| token as u8).collect();
        let (prompt, more) = text.split_at(cut);
        let end = PartialBlock::from_text(prompt, bytes_per_token, FOUR, 7);
        let sequence = Sequence::from_text(prompt, bytes_per_token, FOUR, 7);
        let extended = sequence.extended_with_text(&end, more);
        prop_assert_eq!(extended, Sequence::from_text(&text, bytes_per_token, FOUR, 7));
    }

    /// Two sequences have as many common hashes as common full blocks.
    #[test]
    fn equal_prefixes_have_equal_hashes(
        a in prop::collection::vec(0..2_u32, 0..60),
        b in prop::collection::vec(0..2_u32, 0..60),
        keep in 0..60_usize,
        block_size in 1..9_u32,
        salt in any::<u64>(),
    ) {
        let b: Vec<u32> = a.iter().take(keep).chain(&b).copied().collect();
        let block_size = NonZeroU32::new(block_size).unwrap();
        let hash = |tokens: &[u32]| Sequence::from_tokens(tokens, block_size, salt);
        let blocks = common_len(&a, &b) / block_size.get() as usize;
        prop_assert_eq!(common_len(hash(&a).hashes(), hash(&b).hashes()), blocks);
    }

    /// Two texts have as many common hashes as common text blocks. For every block size there are at
    /// most as many hashes as full blocks.
    #[test]
    fn equal_text_prefixes_have_equal_hashes(
        a in prop::collection::vec(0..2_u8, 0..300),
        b in prop::collection::vec(0..2_u8, 0..300),
        keep in 0..300_usize,
        bytes_per_token in prop_oneof![
            0.25..8.0,
            Just(0.0), Just(-1.0), Just(1e-9), Just(1e30), Just(f64::NAN), Just(f64::INFINITY),
        ],
        block_size in prop_oneof![1..9_u32, Just(u32::MAX)],
    ) {
        let b: Vec<u8> = a.iter().take(keep).chain(&b).copied().collect();
        let block_size = NonZeroU32::new(block_size).unwrap();
        let hash = |text: &[u8]| Sequence::from_text(text, bytes_per_token, block_size, 3);
        let (first, second) = (hash(&a), hash(&b));
        for sequence in [&first, &second] {
            let full = sequence.tokens() / block_size.get();
            prop_assert!(sequence.hashes().len() <= full as usize);
        }
        let text_block = ((bytes_per_token * f64::from(block_size.get())).round() as usize).max(1);
        let max_blocks = (u32::MAX / block_size.get()) as usize;
        let blocks = (common_len(&a, &b) / text_block).min(max_blocks);
        prop_assert_eq!(common_len(first.hashes(), second.hashes()), blocks);
    }
}

#[test]
fn token_counts_of_text_are_estimated_from_bytes() {
    let sequence = Sequence::from_text(&[b'x'; 1000], 4.0, FOUR, 0);
    assert_eq!((sequence.tokens(), sequence.blocks()), (250, 63));
    assert_eq!(sequence.hashes().len(), 62);
    let coarser = Sequence::from_text(&[b'x'; 1000], 5.0, FOUR, 0);
    assert_eq!(coarser.tokens(), 200);
    assert_eq!(common_len(sequence.hashes(), coarser.hashes()), 0);
}

#[test]
fn bytes_per_token_follow_large_changes_and_ignore_small_ones() {
    let mut ratio = BytesPerToken::default();
    assert_eq!(ratio.ratio(), 4.0);
    for _ in 0..100 {
        assert!(
            !ratio.observe(4_400, 1_000),
            "a difference of 10 % changes nothing"
        );
    }
    assert_eq!(ratio.ratio(), 4.0);

    let mut ratio = BytesPerToken::default();
    let changes: Vec<usize> = (0..300).filter(|_| ratio.observe(2_000, 1_000)).collect();
    assert_eq!(changes, [15], "one change, after enough observations");
    assert_eq!(ratio.ratio(), 2.0);
    let changes = (0..1000).filter(|_| ratio.observe(6_000, 1_000)).count();
    assert!(changes < 12, "{changes} changes on the way from 2 to 6");
    assert!(
        (ratio.ratio() / 6.0 - 1.0).abs() < 0.16,
        "{}",
        ratio.ratio()
    );
}

#[test]
fn bytes_per_token_ignore_empty_observations() {
    let mut ratio = BytesPerToken::default();
    for _ in 0..100 {
        assert!(!ratio.observe(0, 10));
        assert!(!ratio.observe(10, 0));
    }
    assert_eq!(ratio.ratio(), 4.0);
    for _ in 0..100 {
        ratio.observe(usize::MAX, 1);
    }
    assert_eq!(ratio.ratio(), 64.0);
}
