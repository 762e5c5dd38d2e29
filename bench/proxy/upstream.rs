//! Engine of the proxy benchmark: responds to chat completions from prepared bytes. One thread serves
//! one connection. Standard library only: `rustc -O upstream.rs`, then `./upstream PORT`.
//!
//! A body with `"stream":true` gets 16 events in two writes, or 16 writes 5 ms apart if it also has
//! `"gap_ms":5`. Any other body gets one JSON document.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

/// Number of events of one stream, the end mark included.
const EVENTS: usize = 16;

/// Time between two events of a slow stream.
const GAP: Duration = Duration::from_millis(5);

/// Time between the two writes of a fast stream, so that they are two reads for a proxy.
const HALF_TIME: Duration = Duration::from_millis(1);

const EMPTY: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
const NOT_FOUND: &[u8] = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n";
const STREAM_HEAD: &[u8] =
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";

fn main() -> io::Result<()> {
    let port = std::env::args().nth(1).expect("a port");
    let listener = TcpListener::bind(format!("127.0.0.1:{port}"))?;
    for stream in listener.incoming() {
        let stream = stream?;
        stream.set_nodelay(true)?;
        thread::Builder::new()
            .stack_size(64 << 10)
            // An error means that the proxy has closed the connection.
            .spawn(move || serve(stream).unwrap_or_default())?;
    }
    Ok(())
}

/// Serves the requests of one connection until it is closed.
fn serve(mut stream: TcpStream) -> io::Result<()> {
    let chunks = chunks();
    let whole = whole();
    let mut request = Vec::new();
    loop {
        request.clear();
        let Some(body_start) = read_request(&mut stream, &mut request)? else {
            return Ok(());
        };
        let (head, body) = request.split_at(body_start);
        if head.starts_with(b"GET /health ") {
            stream.write_all(EMPTY)?;
        } else if !head.starts_with(b"POST ") {
            stream.write_all(NOT_FOUND)?;
        } else if !contains(body, br#""stream":true"#) {
            stream.write_all(&whole)?;
        } else if contains(body, br#""gap_ms":5"#) {
            stream.write_all(STREAM_HEAD)?;
            for (number, chunk) in chunks.iter().enumerate() {
                if number > 0 {
                    thread::sleep(GAP);
                }
                stream.write_all(chunk)?;
            }
        } else {
            let (first, second) = chunks.split_at(EVENTS / 2);
            stream.write_all(&[STREAM_HEAD, &first.concat()].concat())?;
            thread::sleep(HALF_TIME);
            stream.write_all(&second.concat())?;
        }
    }
}

/// Reads one request with a `content-length` or without a body. Returns where its body starts; `None`
/// at the end of the connection.
fn read_request(stream: &mut TcpStream, request: &mut Vec<u8>) -> io::Result<Option<usize>> {
    let mut buffer = [0; 8 << 10];
    let mut end = None;
    loop {
        if end.is_none() {
            if let Some(head_end) = find(request, b"\r\n\r\n") {
                let head = String::from_utf8_lossy(&request[..head_end]).to_ascii_lowercase();
                let length = head
                    .lines()
                    .find_map(|line| line.strip_prefix("content-length:"));
                let length: usize = length.map_or(0, |text| text.trim().parse().expect("a length"));
                end = Some((head_end + 4, head_end + 4 + length));
            }
        }
        if let Some((body_start, body_end)) = end {
            if request.len() >= body_end {
                return Ok(Some(body_start));
            }
        }
        match stream.read(&mut buffer)? {
            0 => return Ok(None),
            length => request.extend_from_slice(&buffer[..length]),
        }
    }
}

/// Returns the chunks of a stream, encoded: one for each event. The last one also ends the body.
fn chunks() -> Vec<Vec<u8>> {
    let event = |number| {
        if number + 1 == EVENTS {
            return "data: [DONE]\n\n".to_owned();
        }
        let finish_reason = match number + 2 == EVENTS {
            true => r#""length""#,
            false => "null",
        };
        format!(
            "data: {{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1,\
             \"model\":\"m\",\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\" word{number}\"}},\
             \"logprobs\":null,\"finish_reason\":{finish_reason}}}]}}\n\n"
        )
    };
    let mut chunks: Vec<Vec<u8>> = (0..EVENTS)
        .map(event)
        .map(|event| format!("{:x}\r\n{event}\r\n", event.len()).into_bytes())
        .collect();
    if let Some(last) = chunks.last_mut() {
        last.extend_from_slice(b"0\r\n\r\n");
    }
    chunks
}

/// Returns a whole response that is not streamed.
fn whole() -> Vec<u8> {
    let text = "word ".repeat(EVENTS);
    let body = format!(
        "{{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion\",\"created\":1,\"model\":\"m\",\
         \"choices\":[{{\"index\":0,\"message\":{{\"role\":\"assistant\",\"content\":\"{text}\"}},\
         \"finish_reason\":\"length\"}}],\"usage\":{{\"prompt_tokens\":480,\
         \"completion_tokens\":16,\"total_tokens\":496}}}}"
    );
    let length = body.len();
    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length:";
    format!("{head} {length}\r\n\r\n{body}").into_bytes()
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    find(bytes, part).is_some()
}

fn find(bytes: &[u8], part: &[u8]) -> Option<usize> {
    bytes.windows(part.len()).position(|window| window == part)
}
