//! Addresses on this machine for servers that a test starts.

#![allow(clippy::unwrap_used)]

use std::net::TcpListener;
use std::sync::atomic::{AtomicU16, Ordering};

/// An address with a port that the system chooses.
pub(crate) const ANY_PORT: &str = "127.0.0.1:0";

/// Ports that [`free_port`] returns. They lie below those that the system chooses, so that no
/// connection or listener of another test takes one before its server listens.
const PORTS: std::ops::Range<u16> = 22_000..32_000;

/// Returns a port that was free when the function checked it, and that no other call returns.
pub(crate) fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Several processes with tests begin at different ports.
    let first = std::process::id() as u16 % 100 * 100;
    let count = PORTS.end - PORTS.start;
    let mut ports = std::iter::from_fn(|| {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        (number < count).then(|| PORTS.start + (first + number) % count)
    });
    let is_free = |port: &u16| TcpListener::bind(("127.0.0.1", *port)).is_ok();
    ports.find(is_free).unwrap()
}

/// Returns an endpoint for a ZeroMQ socket, on a port that was free when the function checked it.
pub(crate) fn free_endpoint() -> String {
    format!("tcp://127.0.0.1:{}", free_port())
}
