//! Listening sockets and file descriptors for bursts of connections.

use std::io;
use std::net::SocketAddr;

use rlimit::{Resource, getrlimit, increase_nofile_limit, setrlimit};
use tokio::net::{TcpListener, TcpSocket};

/// Length of the accept queue. The kernel limits it to `net.core.somaxconn`.
const BACKLOG: u32 = 8192;

/// Limit of open files below which a warning is logged: a burst of thousands of requests would fail,
/// because each request may need a connection on both sides.
const ENOUGH_OPEN_FILES: u64 = 16_384;

/// Limit of open files to set where the hard limit is lower and may be raised.
const MANY_OPEN_FILES: u64 = 65_536;

/// Listens on `address`.
///
/// # Errors
/// Fails if the address cannot be bound.
pub(crate) fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Raises the process's limit of open files as far as the system allows, logs a warning if that is too
/// low for a burst of requests, and returns the limit.
///
/// # Errors
/// Fails if the limit can be neither raised nor read.
pub fn raise_open_file_limit() -> io::Result<u64> {
    // Only a privileged process (root, CAP_SYS_RESOURCE) can raise the hard limit.
    let raised = match getrlimit(Resource::NOFILE) {
        Ok((_, hard)) if hard < MANY_OPEN_FILES => {
            setrlimit(Resource::NOFILE, MANY_OPEN_FILES, MANY_OPEN_FILES).is_ok()
        }
        _ => false,
    };
    let limit = if raised {
        MANY_OPEN_FILES
    } else {
        increase_nofile_limit(u64::MAX)?
    };
    if limit < ENOUGH_OPEN_FILES {
        tracing::warn!(
            limit,
            recommended = ENOUGH_OPEN_FILES,
            "limit of open files is low: each running request needs two; raise `ulimit -n`"
        );
    }
    Ok(limit)
}
