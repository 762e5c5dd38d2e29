//! Tests of engine blocks.

use super::*;

use proptest::prelude::*;

/// Returns the engine hash whose [`MixedHash`] is `mixed`.
fn engine_hash_of(mixed: u64) -> u64 {
    let product = mixed ^ mixed >> 32;
    let odd = 0x9E37_79B9_7F4A_7C15_u64;
    // Each step of Newton's iteration doubles the number of correct bits.
    let inverse = (0..6).fold(odd, |inverse: u64, _| {
        inverse.wrapping_mul(2_u64.wrapping_sub(odd.wrapping_mul(inverse)))
    });
    product.wrapping_mul(inverse)
}

#[derive(Clone, Debug, Default)]
struct Expected {
    stores: u32,
    parent: Option<u64>,
}

fn children(model: &HashMap<u64, Expected>, block: u64) -> usize {
    let parents = model.values().filter(|entry| entry.stores > 0);
    parents.filter(|entry| entry.parent == Some(block)).count()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// The engine hashes include pairs that agree in the bits stored by the table, in those
    /// stored by the block, or in neither.
    #[test]
    fn blocks_are_counted_by_engine_hash(
        steps in prop::collection::vec((0..16u64, 0..16u64, any::<bool>()), 1..200)
    ) {
        let engine_hash = |index: u64| engine_hash_of(((index / 4 * 0x1234_5678_9ABC) << ID_BITS) | (index % 4));
        let mut blocks = EngineBlocks::new();
        let mut model = HashMap::<u64, Expected>::new();
        for (block, parent, is_store) in steps {
            let lookup = blocks.find(engine_hash(block));
            let entry = model.entry(block).or_default();
            prop_assert_eq!(entry.stores > 0, lookup.id != NO_BLOCK && blocks.is_stored(lookup.id));
            if entry.stores > 0 && is_store {
                entry.stores += 1;
                blocks.increment_stores(lookup.id);
            } else if entry.stores > 0 {
                entry.stores -= 1;
                let is_last = entry.stores == 0;
                prop_assert_eq!(blocks.decrement_stores(lookup), is_last);
                blocks.recycle_removed();
            } else {
                let parent_id = blocks.find_stored(engine_hash(parent));
                entry.stores = 1;
                entry.parent = parent_id.map(|_| parent);
                let parent_id = parent_id.unwrap_or(NO_BLOCK);
                if lookup.id == NO_BLOCK {
                    blocks.insert(lookup, parent_id, block, true).unwrap();
                } else {
                    blocks.restore(lookup.id, parent_id, block);
                }
            }
            let mut tracked = 0;
            for block in 0..16 {
                let stores = model.get(&block).map_or(0, |entry| entry.stores);
                let children = children(&model, block);
                let id = blocks.find(engine_hash(block)).id;
                prop_assert_eq!(id != NO_BLOCK, stores > 0 || children > 0);
                if id != NO_BLOCK {
                    tracked += 1;
                    prop_assert_eq!(blocks.hash(id), block);
                    prop_assert_eq!(blocks.has_children(id), children > 0);
                }
            }
            prop_assert_eq!(blocks.len(), tracked);
            prop_assert!(blocks.tombstones.len() <= tracked);
        }
    }
}
