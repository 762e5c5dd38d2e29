//! Errors, and the exceptions of `foresee_router.errors` that they become.

use foresee_api::state_file::ReadError;
use foresee_core::policy::UnknownPolicy;
use foresee_core::router::{ConfigError, RouteError};
use foresee_core::workers::WorkerError;
use foresee_engine::request::BodyError;
use foresee_engine::tokenizer::TokenizerError;
use pyo3::exceptions::{PyIndexError, PyOSError, PyValueError};
use pyo3::prelude::*;

mod exceptions {
    //! The exceptions, which are defined in Python.

    use pyo3::import_exception;

    import_exception!(foresee_router.errors, BackpressureError);
    import_exception!(foresee_router.errors, BodyError);
    import_exception!(foresee_router.errors, BookingEndedError);
    import_exception!(foresee_router.errors, ConfigError);
    import_exception!(foresee_router.errors, EventsError);
    import_exception!(foresee_router.errors, NoWorkerError);
    import_exception!(foresee_router.errors, RouteError);
    import_exception!(foresee_router.errors, StateFileError);
    import_exception!(foresee_router.errors, TokenizerError);
    import_exception!(foresee_router.errors, UnknownModelError);
    import_exception!(foresee_router.errors, UnknownWorkerError);
    import_exception!(foresee_router.errors, WorkerError);
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Route(#[from] RouteError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Policy(#[from] UnknownPolicy),
    #[error("`{field}` is `{value}`: use one of {allowed}")]
    Choice {
        field: &'static str,
        value: String,
        allowed: &'static str,
    },
    #[error(transparent)]
    Worker(#[from] WorkerError),
    #[error("there is no worker named `{0}`")]
    UnknownWorker(String),
    #[error("the chosen worker was removed meanwhile: route the request again")]
    RemovedMeanwhile,
    #[error(
        "KV events need the model of worker `{0}`, whose name is part of its blocks' hashes: add it \
         as Worker(name, models=[...])"
    )]
    EventsWithoutModel(String),
    #[error("{fault}")]
    Events { fault: String },
    #[error(transparent)]
    Body(#[from] BodyError),
    #[error("`{0}` is not a path of an inference API with a JSON body")]
    Path(String),
    #[error("pass exactly one of `tokens`, `text` and `body`")]
    Content,
    #[error("`{field}` contains a number that is not a token id: {reason}")]
    Tokens { field: &'static str, reason: String },
    #[error("{0}")]
    Unsupported(&'static str),
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    #[error(transparent)]
    StateFile(#[from] ReadError),
    #[error("the router has workers already: load what was learned before workers are added")]
    LoadedLate,
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error("the booking has ended")]
    BookingEnded,
    #[error("the booking has no choice {0}, or it has ended")]
    Choices(usize),
    #[error("the clock says {0}: it must return seconds from 0 on")]
    Clock(f64),
    #[error("`{field}` is {value}: it must be a number of seconds from 0 on")]
    Seconds { field: &'static str, value: f64 },
}

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        use exceptions as python;
        let message = error.to_string();
        match error {
            Error::Route(RouteError::Backpressure { retry_after }) => {
                python::BackpressureError::new_err((message, retry_after.as_secs_f64()))
            }
            Error::Route(RouteError::UnknownModel(_)) => {
                python::UnknownModelError::new_err(message)
            }
            Error::Route(RouteError::NoWorker(_)) | Error::RemovedMeanwhile => {
                python::NoWorkerError::new_err(message)
            }
            Error::Route(_) => python::RouteError::new_err(message),
            Error::Config(_) | Error::Policy(_) | Error::Choice { .. } => {
                python::ConfigError::new_err(message)
            }
            Error::Worker(_) | Error::EventsWithoutModel(_) => {
                python::WorkerError::new_err(message)
            }
            Error::UnknownWorker(_) => python::UnknownWorkerError::new_err(message),
            Error::Events { .. } => python::EventsError::new_err(message),
            Error::Body(_) => python::BodyError::new_err(message),
            Error::Tokenizer(_) => python::TokenizerError::new_err(message),
            Error::StateFile(ReadError::Io(error)) | Error::Io(error) => {
                error.raw_os_error().map_or_else(
                    || PyOSError::new_err(message),
                    |code| PyOSError::new_err((code, error.to_string())),
                )
            }
            Error::StateFile(_) | Error::LoadedLate => python::StateFileError::new_err(message),
            Error::BookingEnded => python::BookingEndedError::new_err(message),
            Error::Choices(_) => PyIndexError::new_err(message),
            Error::Path(_)
            | Error::Content
            | Error::Tokens { .. }
            | Error::Unsupported(_)
            | Error::Clock(_)
            | Error::Seconds { .. } => PyValueError::new_err(message),
        }
    }
}
