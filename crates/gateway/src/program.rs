//! Parts of the program that runs a gateway, which the admin API reads and changes.

use std::fmt;
use std::sync::Arc;

use crate::reload::ConfigSource;

/// Filter of the program's log.
pub trait LogFilter: Send + Sync {
    /// Returns the text of the filter in force.
    fn current(&self) -> String;

    /// Replaces the filter until the program ends. Lines with the target `foresee::audit` must be
    /// logged by any filter.
    ///
    /// # Errors
    /// Fails if the text is no filter, with a message for the client. The filter then stays.
    fn replace(&self, text: &str) -> Result<(), String>;
}

/// Parts of the program that runs a gateway. Without a part, the admin API refuses the requests that
/// need it.
#[derive(Clone, Default)]
pub struct ProgramParts {
    /// Reads the configuration for a reload.
    pub config_source: Option<ConfigSource>,
    /// Filter of the log.
    pub log_filter: Option<Arc<dyn LogFilter>>,
}

impl fmt::Debug for ProgramParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProgramParts").finish_non_exhaustive()
    }
}
