//! Settings of the admin listener: where it listens, and which requests it accepts.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use super::key::AdminKey;
use crate::keys::key_config::{KeyConfig, Scope};

/// Prefix of the text form of a Unix socket.
const UNIX_PREFIX: &str = "unix:";

/// Where the admin listener listens.
///
/// The text form is `off`, `unix:PATH` or an IP address with a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AdminListen {
    /// Nowhere: there are no metrics, no health checks and no admin API.
    Off,
    /// At a TCP address.
    Tcp(SocketAddr),
    /// At a Unix socket that only the user of the router's process can open.
    Unix(PathBuf),
}

impl FromStr for AdminListen {
    type Err = String;

    /// Parses the text form. Does not resolve host names. The error says what to write instead.
    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix(UNIX_PREFIX) {
            Some("") => Err("the path of the Unix socket is missing; write unix:PATH".to_owned()),
            Some(path) => Ok(Self::Unix(path.into())),
            None if text == "off" => Ok(Self::Off),
            None => text.parse().map(Self::Tcp).map_err(|error| {
                format!("{error}; write off, unix:PATH, or an IP address with a port")
            }),
        }
    }
}

impl fmt::Display for AdminListen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("off"),
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "{UNIX_PREFIX}{}", path.display()),
        }
    }
}

/// Which requests the admin listener accepts.
#[derive(Clone, Debug, PartialEq)]
pub struct AdminConfig {
    /// Values of the `Host` header that are accepted besides IP addresses and `localhost`: names
    /// without a port. Letter case is ignored.
    pub hosts: Vec<String>,
    /// Key that requests need, except for health checks and metrics; `None` to need no key.
    pub key: Option<AdminKey>,
    /// Key that reading the metrics needs; `key` opens them as well. `None` to need no key.
    pub metrics_key: Option<AdminKey>,
    /// Whether the listener may be reachable from other hosts without `key`.
    pub open: bool,
    /// Maximum number of reservations of the selection API.
    pub max_reservations: usize,
    /// Whether there is a dashboard.
    pub dashboard: bool,
}

impl Default for AdminConfig {
    fn default() -> Self {
        Self {
            hosts: Vec::new(),
            key: None,
            metrics_key: None,
            open: false,
            max_reservations: 1 << 16,
            dashboard: true,
        }
    }
}

/// The admin listener would accept requests of other hosts without a key.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the admin API on {0} would accept requests from other hosts without a key: set \
     --admin-key-file or FORESEE_ADMIN_KEY, listen on a loopback address, or accept the risk with \
     --admin-open"
)]
pub struct UnprotectedAdmin(pub SocketAddr);

impl AdminConfig {
    /// Checks that a listener at `listen` needs a key if other hosts can reach it. `keys` are those of
    /// clients, some of which may open the admin API.
    ///
    /// # Errors
    /// Fails for a TCP address that is not a loopback address, unless there is a key or the listener
    /// is [`open`](Self::open).
    pub fn check(
        &self,
        listen: &AdminListen,
        keys: Option<&[KeyConfig]>,
    ) -> Result<(), UnprotectedAdmin> {
        match listen {
            AdminListen::Tcp(address) if self.is_unprotected(listen, keys) && !self.open => {
                Err(UnprotectedAdmin(*address))
            }
            _ => Ok(()),
        }
    }

    /// Returns whether other hosts can send requests to `listen` without a key.
    #[must_use]
    pub fn is_unprotected(&self, listen: &AdminListen, keys: Option<&[KeyConfig]>) -> bool {
        let is_remote = match listen {
            AdminListen::Tcp(address) => !address.ip().to_canonical().is_loopback(),
            AdminListen::Off | AdminListen::Unix(_) => false,
        };
        let opens_admin = |key: &KeyConfig| {
            let mut scopes = key.scopes.iter();
            scopes.any(|scope| matches!(scope, Scope::Admin | Scope::AdminRead))
        };
        let has_key = self.key.is_some() || keys.unwrap_or_default().iter().any(opens_admin);
        is_remote && !has_key
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_form_is_parsed_and_written() {
        for text in ["off", "unix:/run/foresee.sock", "127.0.0.1:8081", "[::1]:1"] {
            let listen: AdminListen = text.parse().unwrap();
            assert_eq!(listen.to_string(), text);
        }
        for text in ["", "unix:", "8081", "localhost:8081"] {
            let error = text.parse::<AdminListen>().unwrap_err();
            assert!(error.contains("unix:PATH"), "{error}");
        }
    }

    #[test]
    fn other_hosts_need_a_key_or_permission() {
        let key = AdminKey::new("secret").unwrap();
        let closed = AdminConfig::default();
        let with_key = AdminConfig {
            key: Some(key.clone()),
            ..AdminConfig::default()
        };
        let with_metrics_key = AdminConfig {
            metrics_key: Some(key),
            ..AdminConfig::default()
        };
        let open = AdminConfig {
            open: true,
            ..AdminConfig::default()
        };
        for text in ["0.0.0.0:1", "[::]:1", "10.0.0.7:1", "[::ffff:10.0.0.7]:1"] {
            let listen = text.parse().unwrap();
            let error = closed.check(&listen, None).unwrap_err().to_string();
            for remedy in ["--admin-key-file", "loopback", "--admin-open"] {
                assert!(error.contains(remedy), "{error}");
            }
            assert!(with_metrics_key.check(&listen, None).is_err());
            assert_eq!(with_key.check(&listen, None), Ok(()));
            assert_eq!(open.check(&listen, None), Ok(()));
            assert!(open.is_unprotected(&listen, None) && !with_key.is_unprotected(&listen, None));
        }
        for text in ["127.0.0.1:1", "127.1.2.3:1", "[::1]:1", "off", "unix:/x"] {
            let listen = text.parse().unwrap();
            assert_eq!(closed.check(&listen, None), Ok(()), "{text}");
        }
    }
}
