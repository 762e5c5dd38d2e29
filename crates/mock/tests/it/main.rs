//! Integration tests of the mock engine.

mod serving;
