//! The ZMQ frames around batches: live ones, and those asked for again.

use thiserror::Error;

/// One batch as it travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message<'f> {
    /// What subscribers filter by; often empty.
    pub topic: &'f [u8],
    /// Counts up from 0 in each engine process and rank.
    pub sequence: u64,
    /// For [`decode_batch`](super::decode_batch).
    pub payload: &'f [u8],
}

/// One answer to a request for replay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replay<'f> {
    /// A batch the engine still had. The first one's sequence may be above the one asked for:
    /// what is older is gone.
    Batch(Message<'f>),
    /// There are no more.
    End,
}

/// The frames are not a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum FrameError {
    /// There are too few or too many.
    #[error("{0} frames do not make a batch")]
    Count(usize),
    /// The frame before the last is no sequence number.
    #[error("a sequence number has 8 bytes, not {0}")]
    Sequence(usize),
}

/// The sequence number that ends a replay.
const END: u64 = u64::MAX;

/// Understands what a SUB socket receives: topic, sequence number, payload.
///
/// # Errors
/// If the frames are not these three.
pub fn parse_message<F: AsRef<[u8]>>(frames: &[F]) -> Result<Message<'_>, FrameError> {
    match frames {
        [topic, sequence, payload] => message(topic.as_ref(), sequence.as_ref(), payload.as_ref()),
        _ => Err(FrameError::Count(frames.len())),
    }
}

/// The frames a DEALER socket sends to ask for all batches from a sequence number on. Without
/// the empty first one the engine does not answer.
#[must_use]
pub fn replay_request(from: u64) -> [Vec<u8>; 2] {
    [Vec::new(), from.to_be_bytes().to_vec()]
}

/// Understands what a DEALER socket receives in answer: an empty frame, then sequence number and
/// payload (vLLM up to 0.25, older SGLang), or topic, sequence number and payload.
///
/// A REQ socket, which removes the empty frame, is understood as well, but it will only ever see
/// the first answer.
///
/// # Errors
/// If the frames are neither a batch nor the end.
pub fn parse_replay<F: AsRef<[u8]>>(frames: &[F]) -> Result<Replay<'_>, FrameError> {
    let (topic, sequence, payload) = match frames {
        // The first frame is empty or, to a REQ socket, the topic.
        [topic, sequence, payload] | [_, topic, sequence, payload] => {
            (topic.as_ref(), sequence, payload)
        }
        [sequence, payload] => (&[][..], sequence, payload),
        _ => return Err(FrameError::Count(frames.len())),
    };
    let message = message(topic, sequence.as_ref(), payload.as_ref())?;
    Ok(match message.sequence {
        END => Replay::End,
        _ => Replay::Batch(message),
    })
}

fn message<'f>(
    topic: &'f [u8],
    sequence: &[u8],
    payload: &'f [u8],
) -> Result<Message<'f>, FrameError> {
    let sequence = sequence
        .try_into()
        .map_err(|_| FrameError::Sequence(sequence.len()))?;
    Ok(Message {
        topic,
        sequence: u64::from_be_bytes(sequence),
        payload,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEVEN: &[u8] = &[0, 0, 0, 0, 0, 0, 0, 7];
    const LAST: &[u8] = &[0xff; 8];

    fn seven(topic: &[u8]) -> Message<'_> {
        Message {
            topic,
            sequence: 7,
            payload: b"events",
        }
    }

    #[test]
    fn a_live_batch_has_three_frames() {
        assert_eq!(parse_message(&[b"kv", SEVEN, b"events"]), Ok(seven(b"kv")));
        assert_eq!(parse_message(&[b"", SEVEN, b"events"]), Ok(seven(b"")));
        let two: [&[u8]; 2] = [SEVEN, b"events"];
        assert_eq!(parse_message(&two), Err(FrameError::Count(2)));
        let short: [&[u8]; 3] = [b"", b"7", b"events"];
        assert_eq!(parse_message(&short), Err(FrameError::Sequence(1)));
    }

    #[test]
    fn replay_is_understood_with_and_without_topic() {
        let parse = |frames: &[&'static [u8]]| {
            parse_replay(frames).map(|replay| match replay {
                Replay::Batch(message) => Some((message.topic.to_vec(), message.sequence)),
                Replay::End => None,
            })
        };
        assert_eq!(parse(&[b"", SEVEN, b"e"]), Ok(Some((vec![], 7))));
        assert_eq!(
            parse(&[b"", b"kv", SEVEN, b"e"]),
            Ok(Some((b"kv".to_vec(), 7)))
        );
        assert_eq!(parse(&[b"", b"", SEVEN, b"e"]), Ok(Some((vec![], 7))));
        assert_eq!(parse(&[b"", LAST, b""]), Ok(None));
        assert_eq!(parse(&[b"", b"", LAST, b""]), Ok(None));
        // A REQ socket's view.
        assert_eq!(parse(&[SEVEN, b"e"]), Ok(Some((vec![], 7))));
        assert_eq!(parse(&[b"kv", SEVEN, b"e"]), Ok(Some((b"kv".to_vec(), 7))));

        assert_eq!(parse(&[]), Err(FrameError::Count(0)));
        assert_eq!(
            parse(&[b"", b"", b"", SEVEN, b"e"]),
            Err(FrameError::Count(5))
        );
        assert_eq!(parse(&[b"", b"", b""]), Err(FrameError::Sequence(0)));
    }

    #[test]
    fn a_replay_request_is_eight_bytes_after_an_empty_frame() {
        assert_eq!(replay_request(7), [vec![], SEVEN.to_vec()]);
    }
}
