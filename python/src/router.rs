//! `Router`: chooses a worker for each request and books the request there.

use foresee_core::router::Router as CoreRouter;
use pyo3::prelude::*;

use crate::clock::Clock;
use crate::fleet::Fleet;
use crate::prompt::PromptReader;

/// Chooses a worker for each request and books the request there.
#[pyclass(frozen, module = "foresee_router")]
#[derive(Debug)]
pub(crate) struct Router {
    pub(crate) core: CoreRouter,
    pub(crate) reader: PromptReader,
    pub(crate) fleet: Fleet,
    pub(crate) clock: Clock,
}
