//! Values of settings as text, for the admin API. Secrets are shown as `set`.

use std::net::SocketAddr;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;
use std::time::Duration;

use foresee_core::policy::NamedPolicy;
use foresee_core::queue::QueueOrder;
use http::Uri;
use http::header::HeaderName;
use ipnet::IpNet;

use crate::admin::key::AdminKey;
use crate::admin::settings::AdminListen;
use crate::discovery::config::{DnsName, PoolName, shown_url};
use crate::keys::key_config::KeyConfig;
use crate::metrics::MetricsCompat;
use crate::model_alias::ModelAlias;
use crate::pass_through::PassThroughPath;
use crate::tls::TlsConfig;
use crate::workers::api_key::ApiKeySource;
use crate::workers::health_config::{HealthMethod, HealthPath};

/// Text of a setting without a value.
const NOT_SET: &str = "not set";

/// Text of a secret.
const SECRET: &str = "set";

/// Value of a setting.
pub(super) trait ShownSetting {
    /// Returns the value as text, without secrets.
    fn shown(&self) -> String;
}

/// Implements [`ShownSetting`] for types whose text form is that of [`Display`](std::fmt::Display).
macro_rules! shown_as_displayed {
    ($($type:ty),* $(,)?) => {
        $(impl ShownSetting for $type {
            fn shown(&self) -> String {
                self.to_string()
            }
        })*
    };
}

shown_as_displayed! {
    f64, u16, u32, u64, usize, NonZeroU32, NonZeroUsize, SocketAddr, AdminListen, NamedPolicy, QueueOrder,
    HeaderName, IpNet, PassThroughPath, HealthPath, HealthMethod, ModelAlias, DnsName, PoolName,
    String,
}

impl ShownSetting for bool {
    fn shown(&self) -> String {
        (if *self { "on" } else { "off" }).to_owned()
    }
}

impl ShownSetting for Duration {
    fn shown(&self) -> String {
        humantime::format_duration(*self).to_string()
    }
}

impl ShownSetting for PathBuf {
    fn shown(&self) -> String {
        self.display().to_string()
    }
}

impl ShownSetting for Uri {
    fn shown(&self) -> String {
        shown_url(self)
    }
}

impl ShownSetting for AdminKey {
    fn shown(&self) -> String {
        SECRET.to_owned()
    }
}

impl ShownSetting for KeyConfig {
    fn shown(&self) -> String {
        self.id.clone()
    }
}

impl ShownSetting for ApiKeySource {
    fn shown(&self) -> String {
        match self {
            Self::File(path) => path.shown(),
            Self::Variable(name) => format!("variable {name}"),
            Self::Value(_) => SECRET.to_owned(),
        }
    }
}

impl ShownSetting for MetricsCompat {
    fn shown(&self) -> String {
        match self {
            Self::LlmD => "llm-d".to_owned(),
        }
    }
}

impl ShownSetting for TlsConfig {
    fn shown(&self) -> String {
        self.certificate.shown()
    }
}

/// A certificate chain and its key.
impl ShownSetting for (PathBuf, PathBuf) {
    fn shown(&self) -> String {
        self.0.shown()
    }
}

impl<T: ShownSetting> ShownSetting for Option<T> {
    fn shown(&self) -> String {
        self.as_ref().map_or_else(|| NOT_SET.to_owned(), T::shown)
    }
}

impl<T: ShownSetting> ShownSetting for Vec<T> {
    fn shown(&self) -> String {
        match self.as_slice() {
            [] => "none".to_owned(),
            values => values.iter().map(T::shown).collect::<Vec<_>>().join(", "),
        }
    }
}
