//! Integration tests of the simulated engine and the replays.

mod conditions;
mod engine;
mod estimated_cache;
mod faults;
mod fleet_size;
mod guard;
mod replay;

use std::num::NonZeroU32;

/// Block size of the simulated engines, in tokens.
const BLOCK: NonZeroU32 = NonZeroU32::new(16).unwrap();
