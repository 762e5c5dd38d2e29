//! The clock of a router: time since the router was created, or what a function of the caller says.

use std::time::{Duration, Instant};

use pyo3::prelude::*;

use crate::errors::Error;

/// Clock of a router and of its bookings.
#[derive(Debug)]
pub(crate) enum Clock {
    /// Monotonic time since this instant.
    Monotonic(Instant),
    /// Function without arguments that returns seconds.
    Function(Py<PyAny>),
}

/// The time of one call, to be read without the interpreter's lock.
#[derive(Clone, Copy, Debug)]
pub(crate) enum CallTime {
    /// Time since this instant.
    Since(Instant),
    /// This time.
    Fixed(Duration),
}

impl Clock {
    /// Returns the clock that calls `function`, or the monotonic clock for `None`.
    pub(crate) fn new(function: Option<Py<PyAny>>) -> Self {
        function.map_or_else(|| Self::Monotonic(Instant::now()), Self::Function)
    }

    /// Returns the function, if the clock is one.
    pub(crate) fn function(&self) -> Option<&Py<PyAny>> {
        match self {
            Self::Monotonic(_) => None,
            Self::Function(function) => Some(function),
        }
    }

    /// Returns the time of a call. Calls the function, if the clock is one.
    ///
    /// # Errors
    /// If the function fails, or its result is not a number of seconds from 0 on.
    pub(crate) fn at_call(&self, py: Python<'_>) -> PyResult<CallTime> {
        let function = match self {
            Self::Monotonic(start) => return Ok(CallTime::Since(*start)),
            Self::Function(function) => function,
        };
        let seconds = function.call0(py)?.extract::<f64>(py)?;
        let time = Duration::try_from_secs_f64(seconds).map_err(|_| Error::Clock(seconds))?;
        Ok(CallTime::Fixed(time))
    }
}

impl CallTime {
    /// Returns the time now.
    pub(crate) fn now(self) -> Duration {
        match self {
            Self::Since(start) => start.elapsed(),
            Self::Fixed(time) => time,
        }
    }
}
