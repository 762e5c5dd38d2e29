//! The response to a request: a stream of events, or one body when all outputs are finished.

use std::io;

use bytes::Bytes;
use foresee_engine::error::ApiError;
use foresee_engine::request::Endpoint;
use foresee_engine::stream::error_event;
use foresee_engine::usage::Usage;
use foresee_sim::engine::SubmitError;
use futures_util::stream;
use http_body_util::{BodyExt, StreamBody};
use hyper::Response;
use hyper::body::Frame;

use crate::engine_loop::{ChoiceProgress, EngineLoop, Generation, Stopped};
use crate::reply::{EVENTS, JSON, ResponseBody, reply, reply_with, stopping};
use crate::request::CompletionRequest;
use crate::wire::{self, EventWriter};

/// Submits a request and returns its response. Dropping the future or the body of the response
/// aborts the request.
///
/// # Errors
/// If the engine rejects a request that is not streamed, or stops before such a request is
/// finished. A streamed response begins at once: a rejection becomes an event, and a stop cuts the
/// connection.
pub(crate) async fn respond(
    engine_loop: &EngineLoop,
    mut completion: CompletionRequest,
) -> Result<Response<ResponseBody>, ApiError> {
    let generation = engine_loop.submit(std::mem::take(&mut completion.requests));
    if completion.stream {
        return Ok(reply_with(EVENTS, stream_response(completion, generation)));
    }
    let progress = finish(generation).await?;
    let usage = usage(&completion, &progress);
    let body = if completion.endpoint == Endpoint::Embeddings {
        wire::embeddings(&completion, usage)
    } else {
        wire::completion(&completion, usage)
    };
    Ok(reply(JSON, body))
}

/// Waits until all choices are finished, and returns the final progress of each.
///
/// # Errors
/// Status 400 if the engine rejected the request, and status 503 if the engine is shutting down.
async fn finish(mut generation: Generation) -> Result<Vec<ChoiceProgress>, ApiError> {
    let mut progress = Vec::new();
    loop {
        let advanced = generation.advance(&mut progress).await.map_err(stopping)?;
        advanced.map_err(submit_error)?;
        if progress.iter().all(|choice| choice.finished) {
            return Ok(progress);
        }
    }
}

fn submit_error(error: SubmitError) -> ApiError {
    ApiError::bad_request(error.to_string(), None)
}

fn usage(completion: &CompletionRequest, progress: &[ChoiceProgress]) -> Usage {
    Usage {
        prompt_tokens: Some(completion.prompt_tokens),
        completion_tokens: Some(progress.iter().map(|choice| choice.generated).sum()),
        cached_tokens: Some(progress.first().map_or(0, |choice| choice.cached_tokens)),
    }
}

/// Returns the body of a streamed response. Dropping the body aborts the request.
fn stream_response(completion: CompletionRequest, generation: Generation) -> ResponseBody {
    let response = StreamedResponse {
        writer: EventWriter::new(&completion),
        sent: vec![0; completion.outputs.len()],
        progress: Vec::new(),
        ended: false,
        completion,
        generation,
    };
    let frames = stream::unfold(response, |mut response| async {
        let events = response.next_events().await?;
        Some((events.map(Frame::data), response))
    });
    StreamBody::new(frames).boxed_unsync()
}

/// A response that is a stream of events.
struct StreamedResponse {
    completion: CompletionRequest,
    writer: EventWriter,
    generation: Generation,
    progress: Vec<ChoiceProgress>,
    /// Tokens sent of each choice.
    sent: Vec<u32>,
    ended: bool,
}

impl StreamedResponse {
    /// Waits for progress and returns the events since the last call; `None` after the end. A
    /// request that the engine rejected gets one error event. An error means that the engine has
    /// stopped; it cuts the connection, as a crash of the engine does.
    async fn next_events(&mut self) -> Option<io::Result<Bytes>> {
        if self.ended {
            return None;
        }
        match self.generation.advance(&mut self.progress).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                self.ended = true;
                return Some(Ok(error_event(&submit_error(error)).into()));
            }
            Err(Stopped) => {
                self.ended = true;
                return Some(Err(io::ErrorKind::ConnectionAborted.into()));
            }
        }
        let mut events = String::new();
        for choice in 0..self.progress.len() {
            self.write_choice(&mut events, choice);
        }
        if self.progress.iter().all(|choice| choice.finished) {
            self.ended = true;
            if self.completion.usage_at_end {
                let usage = usage(&self.completion, &self.progress);
                self.writer.write_usage(&mut events, usage);
            }
            self.writer.write_done(&mut events);
        }
        Some(Ok(events.into()))
    }

    /// Writes an event with the tokens of a choice that were not sent yet, if there are any, and
    /// counts them as sent. In a chat, an event with the role precedes the first tokens.
    fn write_choice(&mut self, events: &mut String, choice: usize) {
        let progress = self.progress[choice];
        let sent = std::mem::replace(&mut self.sent[choice], progress.generated);
        if sent == progress.generated {
            return;
        }
        let usage = |completion_tokens| {
            self.completion.usage_in_each_event.then_some(Usage {
                prompt_tokens: Some(self.completion.prompt_tokens),
                completion_tokens: Some(completion_tokens),
                cached_tokens: Some(progress.cached_tokens),
            })
        };
        if sent == 0 && self.writer.starts_with_role() {
            self.writer.write_role(events, choice, usage(0));
        }
        let planned = self.completion.outputs[choice];
        let text = planned.output.text(sent..progress.generated);
        let finish_reason = progress.finished.then_some(planned.finish_reason);
        let usage = usage(progress.generated);
        self.writer
            .write_text(events, choice, &text, finish_reason, usage);
    }
}
