//! Listening sockets, opened or inherited, and file descriptors for bursts of connections.

use std::io;
use std::net::SocketAddr;

use listenfd::ListenFd;
use rlimit::{Resource, getrlimit, increase_nofile_limit, setrlimit};
use tokio::net::{TcpListener, TcpSocket};

/// Length of the accept queue. The kernel limits it to `net.core.somaxconn`.
const BACKLOG: u32 = 8192;

/// Limit of open files below which a warning is logged: a burst of thousands of requests would fail,
/// because each request may need a connection on both sides.
const ENOUGH_OPEN_FILES: u64 = 16_384;

/// Limit of open files to set where the hard limit is lower and may be raised.
const MANY_OPEN_FILES: u64 = 65_536;

/// Open files that are not connections of clients or to workers: listeners, event sources, the
/// recording, and connections for health checks.
const OTHER_OPEN_FILES: u64 = 256;

/// Listening sockets that a supervisor, such as systemd, has opened for this process. They stay open
/// when the process ends, so a restart refuses no connection.
#[derive(Debug, Default)]
pub struct InheritedListeners {
    /// Socket of the API, instead of [`GatewayConfig::listen`](crate::GatewayConfig::listen).
    pub api: Option<std::net::TcpListener>,
    /// Socket of the admin API, instead of
    /// [`GatewayConfig::admin_listen`](crate::GatewayConfig::admin_listen).
    pub admin: Option<std::net::TcpListener>,
}

impl InheritedListeners {
    /// Takes the sockets that the environment passes to this process by systemd's protocol
    /// (`LISTEN_FDS`, `LISTEN_PID`, `LISTEN_FDNAMES`). The names are `api` and `admin`. Sockets without
    /// known names are the API's and the admin API's, in this order. Without sockets in the
    /// environment, the result is empty. Call it before the process starts threads, and once: it
    /// removes the variables.
    ///
    /// # Errors
    /// Fails if there are more than two sockets, two for one listener, or one that is not TCP.
    pub fn from_environment() -> io::Result<Self> {
        let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
        let mut sockets = ListenFd::from_env();
        let mut listeners = Self::default();
        for (index, listener) in listener_order(&names, sockets.len())?
            .into_iter()
            .enumerate()
        {
            let socket = sockets.take_tcp_listener(index)?;
            match listener {
                ListenerName::Api => listeners.api = socket,
                ListenerName::Admin => listeners.admin = socket,
            }
        }
        Ok(listeners)
    }
}

/// The two listeners of a gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ListenerName {
    Api,
    Admin,
}

/// Returns which listener each of `count` inherited sockets is for. `names` are those of
/// `LISTEN_FDNAMES`, separated by colons; they count only if all of them are known. Fails with more
/// than two sockets, or two for one listener.
fn listener_order(names: &str, count: usize) -> io::Result<Vec<ListenerName>> {
    let known = names.split(':').map(|name| match name {
        "api" => Some(ListenerName::Api),
        "admin" => Some(ListenerName::Admin),
        _ => None,
    });
    let known: Option<Vec<ListenerName>> = known.collect();
    let order = match known {
        Some(order) if order.len() == count => order,
        _ => [ListenerName::Api, ListenerName::Admin]
            .into_iter()
            .cycle()
            .take(count)
            .collect(),
    };
    if count > 2 || (count == 2 && order[0] == order[1]) {
        let message = format!(
            "{count} sockets named `{names}`: expected one named `api` and one named `admin`"
        );
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    Ok(order)
}

/// A listening socket.
#[derive(Debug)]
pub(crate) struct Listener {
    pub(crate) socket: TcpListener,
    /// Whether another process keeps the socket open and will accept its connections.
    pub(crate) is_inherited: bool,
}

impl Listener {
    /// Uses an inherited socket, or listens on `address`. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// Fails if the socket cannot be used or the address cannot be bound.
    pub(crate) fn open(
        inherited: Option<std::net::TcpListener>,
        address: SocketAddr,
    ) -> io::Result<Self> {
        let is_inherited = inherited.is_some();
        let socket = match inherited {
            Some(socket) => {
                socket.set_nonblocking(true)?;
                TcpListener::from_std(socket)?
            }
            None => listen(address)?,
        };
        Ok(Self {
            socket,
            is_inherited,
        })
    }
}

/// Listens on `address`. Fails if the address cannot be bound.
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

/// Returns the maximum number of clients' connections for the process's present limit of open files:
/// each of them may need a connection to a worker.
pub(crate) fn default_max_connections() -> usize {
    let open_files = getrlimit(Resource::NOFILE).map_or(1024, |(soft, _)| soft);
    let connections = open_files.saturating_sub(OTHER_OPEN_FILES) / 2;
    usize::try_from(connections).unwrap_or(usize::MAX).max(16)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inherited_sockets_are_matched_by_name_or_order() {
        use ListenerName::{Admin, Api};
        for (names, count, expected) in [
            ("", 0, &[][..]),
            ("", 1, &[Api]),
            ("", 2, &[Api, Admin]),
            ("admin", 1, &[Admin]),
            ("admin:api", 2, &[Admin, Api]),
            // systemd names sockets after their units, if they have no names.
            ("foresee.socket:foresee.socket", 2, &[Api, Admin]),
            ("foresee.socket", 1, &[Api]),
            ("unknown:api", 2, &[Api, Admin]),
        ] {
            let order = listener_order(names, count).unwrap();
            assert_eq!(order, expected, "{names}");
        }
        for (names, count) in [("", 3), ("api:api", 2), ("api:admin:api", 3)] {
            let error = listener_order(names, count).unwrap_err().to_string();
            assert!(error.contains("`admin`"), "{error}");
        }
    }
}
