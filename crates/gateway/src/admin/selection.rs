//! The selection API: a proxy of another team asks for a worker, sends the request itself, and reports
//! its progress.
//!
//! `POST /admin/select` books the request on a worker and returns the worker with a *reservation*.
//! Reports of progress grow the booking and renew the reservation; `DELETE` releases it. A
//! reservation that is not renewed in time is released, so a client that fails occupies no worker.
//!
//! This is a front end on [`placement`](crate::placement), beside the proxy: it reads its own HTTP
//! requests, and a reservation is an observed response whose progress the client reports.

mod request;
mod reservations;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use foresee_api::explanation::explanation_json;
use foresee_core::outlier::ExchangeResult;
use foresee_core::router::Explanation;
use foresee_core::workers::WorkerId;
use foresee_engine::error::ApiError;
use foresee_engine::usage::Usage;
use http::request::Parts;
use http::{Method, Response, StatusCode};
use hyper::body::Incoming;
use prometheus_client::metrics::counter::Counter;
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use super::access::{quoted, refusal};
use super::body;
use super::parts::AdminParts;
use crate::clock::Clock;
use crate::log_limit::warn_limited;
use crate::metrics::Outcome;
use crate::parse_pool::ParsePool;
use crate::placement::Placement;
use crate::placement::dispatch::announce;
use crate::placement::hints::{Deadlines, RequestHints, tenant_hash};
use crate::placement::parsed_request::BodyForm;
use crate::placement::placed_request::PlacedRequest;
use crate::placement::response_observer::{ResponseForm, ResponseObserver};
use crate::reply::{self, Body};
use crate::request_body::{RequestBodies, RequestBody};
use crate::shutdown::{ShutdownPhase, ShutdownSignal, shutting_down};
use crate::workers::registry::WorkerRegistry;
use crate::workers::worker::Worker;
use request::{ProgressReport, ReportedEnd, SelectRequest, parse_end};
use reservations::{ReservationId, Reservations};

/// Maximum number of selections at a time, selections that wait for a dispatch included. Lower than the
/// number of connections, so that health checks and metrics are served meanwhile.
const MAX_CONCURRENT_SELECTIONS: usize = 128;

/// Maximum size of a report of progress, in bytes.
const MAX_REPORT_BYTES: usize = 4 << 10;

/// Maximum size of a body that is parsed at once, in bytes. A longer one would delay other requests
/// to the admin listener.
const MAX_INLINE_PARSE_BYTES: usize = 64 << 10;

/// Time after which a refused client should try again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The selection API.
#[derive(Debug)]
pub(crate) struct SelectionApi {
    placement: Arc<Placement>,
    registry: Arc<WorkerRegistry>,
    /// Reader of request bodies, which counts their bytes.
    bodies: Arc<RequestBodies>,
    parse_pool: Arc<ParsePool>,
    shutdown: Arc<ShutdownSignal>,
    clock: Clock,
    /// Observation of the response of each reservation, which owns the bookings.
    reservations: Arc<Reservations<ResponseObserver>>,
    /// Permits of concurrent selections.
    permits: Semaphore,
}

impl SelectionApi {
    /// Creates the API of a gateway with at most `max_reservations` at a time.
    pub(super) fn new(parts: &AdminParts, max_reservations: usize) -> Self {
        Self {
            placement: Arc::clone(&parts.placement),
            registry: Arc::clone(parts.workers.registry()),
            bodies: Arc::clone(&parts.bodies),
            parse_pool: Arc::clone(&parts.parse_pool),
            shutdown: Arc::clone(&parts.shutdown),
            clock: parts.clock,
            reservations: Arc::new(Reservations::new(max_reservations)),
            permits: Semaphore::new(MAX_CONCURRENT_SELECTIONS),
        }
    }

    /// Returns the number of reservations.
    pub(super) fn reservation_count(&self) -> usize {
        self.reservations.len()
    }

    /// Releases all reservations, because the gateway ends, and accepts no further ones.
    pub(super) fn close(&self) {
        for mut observer in self.reservations.close() {
            observer.release(Outcome::ShutDown);
        }
    }

    /// Releases reservations as they expire, until the selection API is closed. Counts them in
    /// `expired`.
    pub(super) fn expire(&self, expired: Counter) -> impl Future<Output = ()> + use<> {
        let (reservations, clock) = (Arc::clone(&self.reservations), self.clock);
        async move {
            while reservations.until_next_deadline(|| clock.now()).await {
                while let Some(observer) = reservations.remove_expired(clock.now()) {
                    expired.inc();
                    let context = observer.context();
                    let id = context.map_or("", |context| &context.request_id);
                    warn_limited!(
                        key: "", reservation = id,
                        "reservation expired and was released; report the progress of a request \
                         more often, set a longer ttl, or delete reservations of requests that ended"
                    );
                    drop(observer);
                    // Many reservations can expire at once.
                    tokio::task::yield_now().await;
                }
            }
        }
    }

    /// Books the request in `body` on a worker, and responds with the worker and a reservation.
    ///
    /// # Errors
    /// Fails with a 400 for an invalid body, with a 429 if there are too many reservations or
    /// selections or no worker has room in time, with a 503 during a shutdown, and otherwise with
    /// the errors of the public API.
    pub(super) async fn select(
        &self,
        head: &Parts,
        body: Incoming,
    ) -> Result<Response<Body>, ApiError> {
        if self.shutdown.phase() >= ShutdownPhase::Draining {
            return Err(shutting_down());
        }
        let reservations = &self.reservations;
        if reservations.len() >= reservations.limit() {
            return Err(self.too_many_reservations());
        }
        let Ok(_permit) = self.permits.try_acquire() else {
            let message = "Too many selections are running. Repeat the request.";
            return Err(ApiError::overloaded(message, RETRY_AFTER));
        };
        let arrived_at = self.clock.now();
        let RequestBody {
            bytes,
            permit: _bytes_permit,
        } = self.bodies.read(head, body).await?;
        let request = if bytes.len() <= MAX_INLINE_PARSE_BYTES {
            SelectRequest::parse(&bytes)?
        } else {
            let parsing = self.parse_pool.run(move || SelectRequest::parse(&bytes));
            parsing.await.map_err(|error| error.into_response())??
        };
        let (placed, explanation) = self.place_selected(&request, arrived_at).await?;
        self.reserve(placed, explanation.as_ref(), request.ttl)
    }

    /// Reads and books the request of a selection, and waits until it may be sent. Returns the costs
    /// of all candidates, if they are wanted, as they were just before.
    async fn place_selected(
        &self,
        request: &SelectRequest,
        arrived_at: Duration,
    ) -> Result<(PlacedRequest, Option<Explanation>), ApiError> {
        let (form, body) = (BodyForm::plain_json(), request.body.clone());
        let session = request.session.as_deref().map(str::as_bytes);
        let parsed = self.placement.read(request.endpoint, form, body, session);
        let mut parsed = parsed.await?;
        parsed.hints = RequestHints {
            expected_output_tokens: request.expected_output_tokens,
            priority: request.priority,
            tenant: match &request.tenant {
                Some(tenant) => tenant_hash(tenant.as_bytes()),
                None => 0,
            },
            deadlines: Deadlines::default(),
            excluded_workers: self.ids_of(&request.excluded_workers)?,
        };
        self.placement.apply_affinity(&mut parsed, None);
        let explanation = request.explain.then(|| self.placement.explain(&parsed));
        let explanation = explanation.transpose()?;
        let mut placed = self.placement.place(request.endpoint, parsed, arrived_at)?;
        match request.wait {
            None => placed.batch.mark_sent(self.clock.now()),
            Some(max_wait) => {
                let excluded = &placed.parsed.hints.excluded_workers;
                self.placement
                    .wait_in_queue(&mut placed.batch, excluded, max_wait, None)
                    .await?;
            }
        }
        Ok((placed, explanation))
    }

    /// Returns the ids of the workers with these names. Fails with a 400 for an unknown name.
    fn ids_of(&self, names: &[String]) -> Result<Vec<WorkerId>, ApiError> {
        if names.is_empty() {
            return Ok(Vec::new());
        }
        let workers = self.registry.all();
        if names.len() > workers.len() {
            let message = "`exclude` must list names of workers, each at most once.";
            return Err(ApiError::bad_request(message, Some("exclude")));
        }
        let id_of = |name: &String| {
            let mut workers = workers.iter();
            let found = workers.find(|worker| worker.config.name == *name);
            found.map(|worker| worker.id).ok_or_else(|| {
                let message = format!(
                    "`exclude` must list names of workers; no worker is named `{}`.",
                    quoted(name)
                );
                ApiError::bad_request(message, Some("exclude"))
            })
        };
        names.iter().map(id_of).collect()
    }

    /// Makes a reservation of a request that is booked and may be sent now, and responds with it.
    fn reserve(
        &self,
        mut placed: PlacedRequest,
        explanation: Option<&Explanation>,
        ttl: Duration,
    ) -> Result<Response<Body>, ApiError> {
        let Some(worker) = self.registry.get(placed.batch.worker()) else {
            // The worker was removed after it was chosen.
            return Err(ApiError::no_worker(
                "The selected worker was removed. Repeat the request.",
                Some(RETRY_AFTER),
            ));
        };
        let full_report_mode = placed.parsed.full_report_mode;
        let predicted_tokens = announce(&worker, &mut placed.batch, full_report_mode);
        let model = placed.parsed.model.clone();
        let (prompt_tokens, overlap_tokens) = (
            placed.parsed.sequences.prompt_tokens,
            placed.overlap_tokens(),
        );
        let reservations = &self.reservations;
        let id = reservations.new_id();
        let context = self.placement.begin_response(
            placed,
            Arc::clone(&worker),
            predicted_tokens,
            id.to_string(),
        );
        let observer = ResponseObserver::new(ResponseForm::Reported, Outcome::Ok, context);
        let added = reservations.add(id, observer, ttl, self.clock.now());
        added.map_err(|_| self.too_many_reservations())?;
        let body = json!({
            "reservation": id.to_string(),
            "ttl_seconds": ttl.as_secs_f64(),
            "expires_at": timestamp_after(ttl),
            "worker": worker_json(&worker),
            "model": model,
            "prompt_tokens": prompt_tokens,
            "overlap_tokens": overlap_tokens,
            "decision": explanation.map(explanation_json),
        });
        Ok(reply::json(StatusCode::OK, body.to_string()))
    }

    /// Handles the paths below `/admin/reservations/`: reports of progress, and releases. Fails with
    /// a 404 for any other path, and for an unknown reservation.
    pub(super) async fn change_reservation(
        &self,
        head: &Parts,
        rest: &str,
        body: Incoming,
    ) -> Result<Response<Body>, ApiError> {
        match (&head.method, rest.split_once('/')) {
            (&Method::POST, Some((id, "progress"))) => {
                let body = body::read(&head.headers, body, MAX_REPORT_BYTES).await?;
                self.report_progress(id, &ProgressReport::parse(&body)?)
            }
            (&Method::DELETE, None) => {
                let (end, counts) = parse_end(head.uri.query())?;
                self.end_reservation(rest, end, counts)
            }
            _ => {
                let (method, path) = (head.method.as_str(), head.uri.path());
                Err(ApiError::path_not_found(method, path))
            }
        }
    }

    /// Renews a reservation and applies a report of its progress.
    fn report_progress(
        &self,
        id: &str,
        report: &ProgressReport,
    ) -> Result<Response<Body>, ApiError> {
        let reservations = &self.reservations;
        let parsed = parse_id(id)?;
        let renewed = reservations.renew(parsed, report.ttl, self.clock.now());
        let (held, ttl) = renewed.ok_or_else(|| unknown_reservation(id))?;
        let mut observer = held.lock();
        let observer = observer.as_mut().ok_or_else(|| unknown_reservation(id))?;
        observer.on_report(report.counts, report.has_first_token);
        let body = json!({
            "reservation": id,
            "ttl_seconds": ttl.as_secs_f64(),
            "expires_at": timestamp_after(ttl),
        });
        Ok(reply::json(StatusCode::OK, body.to_string()))
    }

    /// Releases a reservation with its last token `counts`. The forecasts learn from a completed
    /// request, and a failed one counts against its worker.
    fn end_reservation(
        &self,
        id: &str,
        end: ReportedEnd,
        counts: Usage,
    ) -> Result<Response<Body>, ApiError> {
        let reservations = &self.reservations;
        let observer = reservations.remove(parse_id(id)?);
        let mut observer = observer.ok_or_else(|| unknown_reservation(id))?;
        observer.on_report(counts, false);
        match end {
            ReportedEnd::Completed => {
                observer.end();
            }
            ReportedEnd::Failed => {
                let error = "the client of the selection API reports a failure";
                observer.fail(&error, ExchangeResult::Failure);
            }
            ReportedEnd::Abandoned => observer.release(Outcome::ClientLeft),
        }
        let body = json!({ "reservation": id, "outcome": end.as_str() });
        Ok(reply::json(StatusCode::OK, body.to_string()))
    }

    /// Returns the response to a selection for which there is no room.
    fn too_many_reservations(&self) -> ApiError {
        if self.shutdown.phase() >= ShutdownPhase::Draining {
            return shutting_down();
        }
        let limit = self.reservations.limit();
        let message = format!(
            "There are {limit} reservations, which is the limit. Delete each reservation when its \
             request ends, or raise --max-reservations."
        );
        ApiError {
            code: Some("too_many_reservations"),
            ..ApiError::overloaded(message, RETRY_AFTER)
        }
    }
}

/// Parses the id of a reservation. Fails with a 404.
fn parse_id(id: &str) -> Result<ReservationId, ApiError> {
    id.parse().map_err(|()| unknown_reservation(id))
}

/// Returns the response to a request that names a reservation that does not exist.
fn unknown_reservation(id: &str) -> ApiError {
    let message = format!(
        "There is no reservation `{}`: it was released or has expired. Report progress before \
         `ttl_seconds` have passed, and select a worker again for another request.",
        quoted(id)
    );
    refusal(404, "reservation_not_found", message)
}

/// Returns a selected worker.
fn worker_json(worker: &Worker) -> Value {
    json!({
        "name": worker.config.name,
        "url": worker.config.url(),
        "address": worker.address.resolved_ip(),
        "rank": worker.config.rank,
    })
}

/// Returns the time in `ttl` from now, as text (RFC 3339).
fn timestamp_after(ttl: Duration) -> String {
    humantime::format_rfc3339_millis(SystemTime::now() + ttl).to_string()
}
