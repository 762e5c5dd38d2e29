//! The routing decision.
pub mod sequence;
