//! The address of the admin listener, as `--admin-listen` takes it.

use std::fmt;
use std::str::FromStr;

use foresee_gateway::{AdminListen, GatewayConfig};

use crate::values::address;

/// Value of `--admin-listen`.
#[derive(Clone, Debug)]
pub(crate) struct AdminAddress {
    /// Where to listen.
    pub(crate) listen: AdminListen,
    /// Host as it was given, if it is a name or an address.
    pub(crate) host: Option<String>,
}

impl Default for AdminAddress {
    fn default() -> Self {
        Self {
            listen: GatewayConfig::default().admin_listen,
            host: None,
        }
    }
}

impl FromStr for AdminAddress {
    type Err = String;

    /// Parses `off`, `unix:PATH`, `HOST:PORT` or `:PORT`. A host name is resolved once, here.
    fn from_str(text: &str) -> Result<Self, String> {
        if text == "off" || text.starts_with("unix:") {
            return Ok(Self {
                listen: text.parse()?,
                host: None,
            });
        }
        let address = address(text).map_err(|error| format!("{error}; or unix:PATH, or off"))?;
        let host = text.rsplit_once(':').map(|(host, _)| host.to_owned());
        Ok(Self {
            listen: AdminListen::Tcp(address),
            host: host.filter(|host| !host.is_empty()),
        })
    }
}

impl fmt::Display for AdminAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.listen.fmt(f)
    }
}
