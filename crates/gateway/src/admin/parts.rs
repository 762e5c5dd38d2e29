//! Parts of the gateway that the admin listener's front ends use.

use std::sync::Arc;

use foresee_core::router::Router;

use crate::clock::Clock;
use crate::keys::KeyRing;
use crate::metrics::{Metrics, MetricsCompat};
use crate::parse_pool::ParsePool;
use crate::placement::Placement;
use crate::program::ProgramParts;
use crate::reload::Reloader;
use crate::request_body::RequestBodies;
use crate::shutdown::ShutdownSignal;
use crate::workers::Workers;
use crate::workers::removals::Removals;

/// Parts of the gateway that the admin API shows and changes.
#[derive(Debug)]
pub(crate) struct AdminParts {
    pub(crate) router: Router,
    pub(crate) workers: Arc<Workers>,
    /// Drained workers that are to be removed.
    pub(crate) removals: Arc<Removals>,
    pub(crate) reloader: Arc<Reloader>,
    pub(crate) program: ProgramParts,
    pub(crate) placement: Arc<Placement>,
    pub(crate) metrics: Arc<Metrics>,
    /// Names of another program that the page of metrics has as well.
    pub(crate) metrics_compat: Option<MetricsCompat>,
    pub(crate) clock: Clock,
    /// Keys of clients, some of which open the admin listener.
    pub(crate) keys: Arc<KeyRing>,
    /// Reader of request bodies, which counts their bytes.
    pub(crate) bodies: Arc<RequestBodies>,
    /// Threads that parse long bodies.
    pub(crate) parse_pool: Arc<ParsePool>,
    /// Shutdown of the public listener.
    pub(crate) shutdown: Arc<ShutdownSignal>,
}
