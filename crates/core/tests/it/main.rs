//! Integration tests of the routing decision.

mod batches;
mod bookings;
mod cache;
mod copies;
mod foreseen;
mod lifetimes;
mod naive;
mod queue;
mod radix;
mod reports;
mod routing;
mod sequence;
mod unwatched;
