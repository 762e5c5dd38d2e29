//! Python bindings of Foresee's router: the module `foresee_router._foresee_router`.
//!
//! The bindings convert arguments and results and call the Rust crates. They decide nothing: a choice
//! is that of [`foresee_core`], a prompt is read by [`foresee_engine`]. The interpreter's lock is
//! released wherever a prompt is read or the router's lock is taken.
//!
//! | module | question |
//! |---|---|
//! | `router_methods` | Which methods does `Router` have? |
//! | `booking` | Which methods does `Booking` have? |
//! | `router` | What does a `Router` consist of? |
//! | `prompt` | Here are arguments of a call; what is the request? |
//! | `fleet` | Which workers are there, and by which name? |
//! | `events` | Here is a message of KV events; what does the router learn? |
//! | `snapshot` | Here is the state of the workers; how does Python see it? |
//! | `clock` | What time is it? |
//! | `errors` | Which exception is raised? |

mod booking;
mod clock;
mod errors;
mod events;
mod fleet;
mod prompt;
mod router;
mod router_methods;
mod snapshot;

/// The module `foresee_router._foresee_router`.
#[pyo3::pymodule]
mod _foresee_router {
    #[pymodule_export]
    use crate::booking::Booking;
    #[pymodule_export]
    use crate::router::Router;
}
