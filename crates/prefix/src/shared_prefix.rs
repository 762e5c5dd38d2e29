//! Prefixes that prompts of one list have in common.

use crate::active_tree::{PrefixMatch, PrefixTree};
use crate::sequence::Sequence;

/// Returns for each prompt how many of its leading blocks an earlier prompt of the list has as well.
#[must_use]
pub fn blocks_shared_with_earlier<'a>(prompts: impl IntoIterator<Item = &'a Sequence>) -> Vec<u32> {
    // Pins the prompts one after the other on a single worker that starts empty.
    let mut tree = PrefixTree::default();
    let shared = prompts.into_iter().map(|prompt| {
        let mut prefix_matches = [PrefixMatch::default()];
        let chain = prompt.hash_chain();
        let position = tree.match_prefix(chain, false, &mut prefix_matches);
        tree.pin(position, chain, 0, 0);
        prefix_matches[0].active_blocks
    });
    shared.collect()
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::*;

    #[test]
    fn only_earlier_prompts_count() {
        let prompts = [&[1, 2, 3][..], &[1, 2, 4], &[5], &[1, 2, 4, 6]]
            .map(|tokens| Sequence::from_tokens(tokens, NonZeroU32::MIN, 0));
        assert_eq!(blocks_shared_with_earlier(&prompts), [0, 2, 0, 3]);
    }
}
