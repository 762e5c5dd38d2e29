//! Integration tests of sequences and of the event index, one module per subject.

mod event_index;
mod sequence;
