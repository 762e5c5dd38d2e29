//! Addresses on this machine for servers that a test starts.

#![allow(clippy::unwrap_used)]

use std::net::TcpListener;

/// An address with a port that the system chooses.
pub(crate) const ANY_PORT: &str = "127.0.0.1:0";

/// Returns a port that was free when the function checked it.
pub(crate) fn free_port() -> u16 {
    let listener = TcpListener::bind(ANY_PORT).unwrap();
    listener.local_addr().unwrap().port()
}

/// Returns an endpoint for a ZeroMQ socket, on a port that was free when the function checked it.
pub(crate) fn free_endpoint() -> String {
    format!("tcp://127.0.0.1:{}", free_port())
}
