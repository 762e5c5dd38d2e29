//! Snapshots of workers and costs, as Python's dicts.

use foresee_core::policy::Decision;
use foresee_core::workers::WorkerSnapshot;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use serde_json::{Value, json};

/// Returns the state of a worker: the fields of `foresee_router.WorkerSnapshot`. `events_exact` says
/// whether its KV events describe its cache exactly.
pub(crate) fn worker_json(worker: &WorkerSnapshot, events_exact: bool) -> Value {
    json!({
        "name": *worker.name,
        "state": worker.state.as_str(),
        "models": *worker.models,
        "requests": worker.requests,
        "active_blocks": worker.active_blocks,
        "context_tokens": worker.context_tokens,
        "prefill_tokens": worker.prefill_tokens,
        "cached_blocks": worker.cached_blocks,
        "cache_source": worker.cache_source.as_str(),
        "events_exact": events_exact,
        "capacity_blocks": worker.capacity_blocks,
        "capacity_source": worker.capacity_source.as_str(),
        "eviction": worker.eviction.as_str(),
        "prefill_backlog_seconds": worker.prefill_backlog.as_secs_f64(),
        "inter_token_latency_seconds": worker.inter_token_latency.as_secs_f64(),
    })
}

/// Returns the costs for which a worker was chosen: the fields of `foresee_router.Costs`.
pub(crate) fn costs<'py>(py: Python<'py>, decision: &Decision) -> PyResult<Bound<'py, PyDict>> {
    let costs = PyDict::new(py);
    costs.set_item("overlap_blocks", decision.cost.overlap_blocks)?;
    costs.set_item("cached_blocks", decision.prefix_match.cached_blocks)?;
    costs.set_item("active_blocks", decision.prefix_match.active_blocks)?;
    costs.set_item("prefill_blocks", decision.cost.prefill_blocks)?;
    costs.set_item("active_blocks_if_placed", decision.cost.active_blocks)?;
    costs.set_item("total", decision.cost.total)?;
    costs.set_item("best_overlap_blocks", decision.best_overlap_blocks)?;
    Ok(costs)
}

/// Returns a JSON value as Python's objects.
pub(crate) fn to_python<'py>(py: Python<'py>, value: &Value) -> PyResult<Bound<'py, PyAny>> {
    py.import("json")?
        .call_method1("loads", (value.to_string(),))
}
