//! A slow reader of event streams, written after the definition of the format
//! (<https://html.spec.whatwg.org/multipage/server-sent-events.html>), as a model of the fast one.

/// One complete event of a stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SlowEvent {
    /// The type of the event; empty if it has none.
    kind: Vec<u8>,
    /// The values of its `data` lines.
    data: Vec<Vec<u8>>,
}

/// Returns the complete events of a stream that have data.
pub(crate) fn read_events(stream: &[u8]) -> Vec<SlowEvent> {
    let mut events = Vec::new();
    let mut event = SlowEvent::default();
    for line in complete_lines(stream) {
        if line.is_empty() {
            let ended = std::mem::take(&mut event);
            if !ended.data.is_empty() {
                events.push(ended);
            }
            continue;
        }
        let colon = line.iter().position(|&byte| byte == b':');
        let (field, value) = match colon {
            Some(colon) => (&line[..colon], &line[colon + 1..]),
            None => (line.as_slice(), [].as_slice()),
        };
        let value = value.strip_prefix(b" ").unwrap_or(value);
        match field {
            b"data" => event.data.push(value.to_vec()),
            b"event" => event.kind = value.to_vec(),
            _ => {}
        }
    }
    events
}

/// Returns the events as a stream in which each line ends with `\n`, and which has no comments and
/// no other fields.
pub(crate) fn write_events(events: &[SlowEvent]) -> Vec<u8> {
    let mut stream = Vec::new();
    for event in events {
        if !event.kind.is_empty() {
            stream.extend_from_slice(&[b"event: ", event.kind.as_slice(), b"\n"].concat());
        }
        for data in &event.data {
            stream.extend_from_slice(&[b"data: ", data.as_slice(), b"\n"].concat());
        }
        stream.push(b'\n');
    }
    stream
}

/// Returns the lines of a stream that have ended, without their ends: `\n`, `\r` or both.
fn complete_lines(stream: &[u8]) -> Vec<Vec<u8>> {
    let mut lines = Vec::new();
    let mut line = Vec::new();
    let mut previous = None;
    for &byte in stream {
        match (byte, previous) {
            (b'\n', Some(b'\r')) => {}
            (b'\n' | b'\r', _) => lines.push(std::mem::take(&mut line)),
            _ => line.push(byte),
        }
        previous = Some(byte);
    }
    lines
}
