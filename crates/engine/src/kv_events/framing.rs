//! ZeroMQ frames around event batches: live batches, and the exchange of an event replay.

use thiserror::Error;

/// An event batch with its topic and sequence number, as sent over ZeroMQ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message<'f> {
    /// Prefix by which subscribers filter; often empty.
    pub topic: &'f [u8],
    /// Sequence number of the batch; starts at 0 in each engine process and rank.
    pub sequence: u64,
    /// The encoded batch, see [`decode_batch`](super::decode_batch).
    pub payload: &'f [u8],
}

/// One message of an event replay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replay<'f> {
    /// A batch that the engine still had. The first batch may have a higher sequence number than
    /// requested: older batches are lost.
    Batch(Message<'f>),
    /// The end of the replay.
    End,
}

/// Why frames are not an event batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum FrameError {
    /// The number of frames is wrong. Contains that number.
    #[error("message is not an event batch: it has {0} frames")]
    Count(usize),
    /// The frame before the last is not a sequence number. Contains its length in bytes.
    #[error("sequence number must have 8 bytes, got {0}")]
    Sequence(usize),
}

/// The sequence number that ends a replay.
const END_OF_REPLAY: u64 = u64::MAX;

/// Parses the frames that a SUB socket receives: topic, sequence number, payload. The payload is
/// not decoded.
///
/// # Errors
/// If there are not exactly these three frames, or the sequence number does not have 8 bytes.
pub fn parse_message<F: AsRef<[u8]>>(frames: &[F]) -> Result<Message<'_>, FrameError> {
    match frames {
        [topic, sequence, payload] => message(topic.as_ref(), sequence.as_ref(), payload.as_ref()),
        _ => Err(FrameError::Count(frames.len())),
    }
}

/// Returns the frames with which a DEALER socket requests all batches from a sequence number on.
/// The engine does not respond to a request without the empty first frame.
#[must_use]
pub fn replay_request(from: u64) -> [Vec<u8>; 2] {
    [Vec::new(), from.to_be_bytes().to_vec()]
}

/// Parses a replay request, as a ROUTER socket receives it after the identity of the requester.
/// Returns the sequence number to start at; `None` if the frames are no replay request, which vLLM
/// leaves without a response.
#[must_use]
pub fn parse_replay_request<F: AsRef<[u8]>>(frames: &[F]) -> Option<u64> {
    let [empty, from] = frames else {
        return None;
    };
    let from = from.as_ref().try_into().ok().map(u64::from_be_bytes);
    from.filter(|_| empty.as_ref().is_empty())
}

/// Returns the frames that end a replay in vLLM since 0.26: an empty frame, an empty topic, the
/// highest sequence number, and an empty payload.
#[must_use]
pub fn replay_end() -> [Vec<u8>; 4] {
    [
        Vec::new(),
        Vec::new(),
        END_OF_REPLAY.to_be_bytes().to_vec(),
        Vec::new(),
    ]
}

/// Parses a message of a replay, as a DEALER socket receives it: an empty frame, then sequence
/// number and payload (vLLM up to 0.25, older SGLang), or topic, sequence number and payload. The
/// highest sequence number is the end of the replay, whatever the payload.
///
/// The frames that a REQ socket receives, which removes the empty frame, are parsed as well. A REQ
/// socket receives only the first message of a replay.
///
/// # Errors
/// If the number of frames is another one, or the sequence number does not have 8 bytes.
pub fn parse_replay<F: AsRef<[u8]>>(frames: &[F]) -> Result<Replay<'_>, FrameError> {
    let (topic, sequence, payload) = match frames {
        // The first frame is empty or, on a REQ socket, the topic.
        [topic, sequence, payload] | [_, topic, sequence, payload] => {
            (topic.as_ref(), sequence, payload)
        }
        [sequence, payload] => (&[][..], sequence, payload),
        _ => return Err(FrameError::Count(frames.len())),
    };
    let message = message(topic, sequence.as_ref(), payload.as_ref())?;
    Ok(match message.sequence {
        END_OF_REPLAY => Replay::End,
        _ => Replay::Batch(message),
    })
}

/// Builds a message from its three frames.
///
/// # Errors
/// If the sequence number does not have 8 bytes.
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
    fn a_replay_is_parsed_with_and_without_topic() {
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
        // The frames of a REQ socket.
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
        assert_eq!(parse_replay_request(&replay_request(7)), Some(7));
        assert_eq!(parse_replay_request(&[SEVEN]), None);
        assert_eq!(parse_replay_request(&[b"x", SEVEN]), None);
        assert_eq!(parse_replay_request(&[&b""[..], b"short"]), None);
        assert_eq!(parse_replay(&replay_end()), Ok(Replay::End));
    }
}
