//! A job's answer as the engine brings it forth: streamed, or at once when all is there.

use std::io;

use bytes::Bytes;
use foresee_engine::error::ApiError;
use foresee_engine::request::Endpoint;
use foresee_engine::stream::error_event;
use futures_util::stream;
use http_body_util::{BodyExt, StreamBody};
use hyper::Response;
use hyper::body::Frame;

use crate::engine::SubmitError;
use crate::server::clockwork::{Clockwork, Generation, Progress, Stopped};
use crate::server::job::Job;
use crate::server::wire::{self, EventWriter, Usage};
use crate::server::{EVENTS, JSON, ResponseBody, respond_with, response, stopping};

/// Submits the job and answers it. Dropping the future, or the body of the response, aborts it.
pub(super) async fn answer(
    clockwork: &Clockwork,
    mut job: Job,
) -> Result<Response<ResponseBody>, ApiError> {
    let generation = clockwork.submit(std::mem::take(&mut job.requests));
    if job.stream {
        return Ok(respond_with(EVENTS, stream_answer(job, generation)));
    }
    let progress = finish(generation).await?;
    let usage = usage(&job, &progress);
    let body = if job.endpoint == Endpoint::Embeddings {
        wire::embeddings(&job, usage)
    } else {
        wire::completion(&job, usage)
    };
    Ok(response(JSON, body))
}

async fn finish(mut generation: Generation) -> Result<Vec<Progress>, ApiError> {
    let mut progress = Vec::new();
    loop {
        let advanced = generation.advance(&mut progress).await.map_err(stopping)?;
        advanced.map_err(refused)?;
        if progress.iter().all(|choice| choice.finished) {
            return Ok(progress);
        }
    }
}

fn refused(error: SubmitError) -> ApiError {
    ApiError::bad_request(error.to_string(), None)
}

fn usage(job: &Job, progress: &[Progress]) -> Usage {
    Usage {
        prompt_tokens: job.prompt_tokens,
        completion_tokens: progress.iter().map(|choice| choice.generated).sum(),
        cached_tokens: progress.first().map_or(0, |choice| choice.cached_tokens),
    }
}

fn stream_answer(job: Job, generation: Generation) -> ResponseBody {
    let answer = StreamedAnswer {
        writer: EventWriter::new(&job),
        sent: vec![0; job.answers.len()],
        progress: Vec::new(),
        ended: false,
        job,
        generation,
    };
    let frames = stream::unfold(answer, |mut answer| async {
        let events = answer.next_events().await?;
        Some((events.map(Frame::data), answer))
    });
    StreamBody::new(frames).boxed_unsync()
}

/// A stream of events, and how much of each choice is sent.
struct StreamedAnswer {
    job: Job,
    writer: EventWriter,
    generation: Generation,
    progress: Vec<Progress>,
    sent: Vec<u32>,
    ended: bool,
}

impl StreamedAnswer {
    /// The events since last time. An error cuts the connection, as an engine that dies does.
    async fn next_events(&mut self) -> Option<io::Result<Bytes>> {
        if self.ended {
            return None;
        }
        match self.generation.advance(&mut self.progress).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                self.ended = true;
                return Some(Ok(error_event(&refused(error)).into()));
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
            if self.job.usage_at_end {
                let usage = usage(&self.job, &self.progress);
                self.writer.write_usage(&mut events, usage);
            }
            self.writer.write_done(&mut events);
        }
        Some(Ok(events.into()))
    }

    fn write_choice(&mut self, events: &mut String, choice: usize) {
        let now = self.progress[choice];
        let sent = std::mem::replace(&mut self.sent[choice], now.generated);
        if sent == now.generated {
            return;
        }
        let usage = |completion_tokens| {
            self.job.usage_in_each_event.then_some(Usage {
                prompt_tokens: self.job.prompt_tokens,
                completion_tokens,
                cached_tokens: now.cached_tokens,
            })
        };
        if sent == 0 && self.writer.begins_with_role() {
            self.writer.write_role(events, choice, usage(0));
        }
        let planned = self.job.answers[choice];
        let text = planned.answer.text(sent..now.generated);
        let finish_reason = now.finished.then_some(planned.finish_reason);
        let usage = usage(now.generated);
        self.writer
            .write_text(events, choice, &text, finish_reason, usage);
    }
}
