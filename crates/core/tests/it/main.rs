//! Integration tests of the router core, one module per subject.

mod batches;
mod bookings;
mod bounds;
mod event_index;
mod full_queue;
mod hit_audit;
mod lifetimes;
mod naive;
mod outlier;
mod outlier_limits;
mod pending_evictions;
mod progress_estimator;
mod queue;
mod replication;
mod routing;
mod sglang_eviction;
