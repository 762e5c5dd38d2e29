//! Sockets that take a burst: a long accept queue, and a file descriptor for everyone.

use std::io;
use std::net::SocketAddr;

use rlimit::{Resource, getrlimit, increase_nofile_limit, setrlimit};
use tokio::net::{TcpListener, TcpSocket};

/// Connections that may wait to be accepted. The kernel's `net.core.somaxconn` caps it.
const BACKLOG: u32 = 8192;

/// Open files below which a burst of thousands would be refused: each request may hold a
/// connection on both sides.
const ENOUGH_OPEN_FILES: u64 = 16_384;

/// Open files asked for where the hard limit is lower and may be raised.
const MANY_OPEN_FILES: u64 = 65_536;

/// Listens on `address`.
///
/// # Errors
/// If the address cannot be bound.
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

/// Raises the limit of open files as far as the system allows, and warns if that is too little
/// for a burst. Returns the limit.
///
/// # Errors
/// If the limit can be neither raised nor read.
pub fn raise_open_file_limit() -> io::Result<u64> {
    // Beyond the hard limit with the right to (root, CAP_SYS_RESOURCE); else up to it.
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
            "few open files allowed: each running request needs two; raise `ulimit -n`"
        );
    }
    Ok(limit)
}
