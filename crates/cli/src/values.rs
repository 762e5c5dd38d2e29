//! Parsers of the values of flags.

use std::ffi::OsStr;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::str::FromStr;

use bytesize::ByteSize;
use clap::builder::{PossibleValue, TypedValueParser};
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, Command, Error};
use foresee_gateway::WorkerConfig;
use foresee_sim::duration;

/// Parses a duration with its unit, such as `250ms`.
pub(crate) fn duration(text: &str) -> Result<humantime::Duration, String> {
    let duration = duration::parse(text).map_err(|error| error.to_string())?;
    Ok(duration.into())
}

/// Parses a duration above zero.
pub(crate) fn positive_duration(text: &str) -> Result<humantime::Duration, String> {
    let duration = duration(text)?;
    if duration.is_zero() {
        return Err("the duration must be longer than 0s".to_owned());
    }
    Ok(duration)
}

/// A number of bytes, which is written with a unit: `32MiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size(pub(crate) usize);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if text.parse::<f64>().is_ok() {
            return Err(format!(
                "`{text}` has no unit: write {text}KiB, {text}MiB or {text}B"
            ));
        }
        let size: ByteSize = text
            .parse()
            .map_err(|error| format!("`{text}` is not a size such as 32MiB: {error}"))?;
        let bytes = usize::try_from(size.as_u64());
        bytes
            .map(Self)
            .map_err(|_| format!("`{text}` is larger than the address space"))
    }
}

impl fmt::Display for Size {
    /// Writes the number exactly, in the largest binary unit that divides it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
        let unit = units
            .into_iter()
            .find(|(shift, _)| self.0 > 0 && self.0.trailing_zeros() >= *shift);
        match unit {
            Some((shift, unit)) => write!(f, "{}{unit}", self.0 >> shift),
            None => write!(f, "{}B", self.0),
        }
    }
}

/// A number from 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Fraction(pub(crate) f64);

impl FromStr for Fraction {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = text.parse().ok();
        number
            .filter(|number| (0.0..=1.0).contains(number))
            .map(Self)
            .ok_or_else(|| "a fraction must be between 0 and 1".to_owned())
    }
}

impl fmt::Display for Fraction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Parses `HOST:PORT`, or `:PORT` for all IPv4 interfaces. A host name is resolved once, here, to
/// its first IPv4 address or else to its first address.
pub(crate) fn address(text: &str) -> Result<SocketAddr, String> {
    if let Some(port) = text.strip_prefix(':') {
        let port = port
            .parse()
            .map_err(|_| format!("`{port}` is not a port from 0 to 65535"))?;
        return Ok(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)));
    }
    let form = "write HOST:PORT, :PORT, or [::1]:PORT for an IPv6 address";
    let addresses = text
        .to_socket_addrs()
        .map_err(|error| format!("{error}; {form}"))?;
    first_address(addresses).ok_or_else(|| format!("the host has no address; {form}"))
}

/// Returns the address of a host, which is a name or an IP address without brackets.
pub(crate) fn host_address(host: &str, port: u16) -> Result<SocketAddr, String> {
    let addresses = (host, port)
        .to_socket_addrs()
        .map_err(|error| format!("cannot resolve `{host}`: {error}"))?;
    first_address(addresses).ok_or_else(|| format!("`{host}` has no address"))
}

/// Returns the first IPv4 address, or the first address if none is IPv4. Most clients resolve
/// `localhost` to IPv4.
fn first_address(addresses: impl Iterator<Item = SocketAddr>) -> Option<SocketAddr> {
    let addresses: Vec<SocketAddr> = addresses.collect();
    let v4 = addresses.iter().find(|address| address.is_ipv4());
    v4.or(addresses.first()).copied()
}

/// The workers that one value of a flag or variable describes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Workers(pub(crate) Vec<WorkerConfig>);

/// Parses workers with options, separated by white space.
pub(crate) fn workers(text: &str) -> Result<Workers, String> {
    let workers = text.split_whitespace().map(WorkerConfig::from_str);
    let workers = workers.collect::<Result<_, _>>();
    workers.map(Workers).map_err(|error| error.to_string())
}

/// Parses URLs of workers, separated by commas or white space. A URL that contains `=` is an error,
/// because it seems to have options.
pub(crate) fn worker_urls(text: &str) -> Result<Workers, String> {
    let urls = text.split(|c: char| c == ',' || c.is_whitespace());
    let urls = urls.filter(|url| !url.is_empty());
    if let Some(option) = urls.clone().find(|url| url.contains('=')) {
        return Err(format!(
            "`{option}` is not a URL: use --worker for a worker with options"
        ));
    }
    let workers = urls.map(WorkerConfig::from_str).collect::<Result<_, _>>();
    workers.map(Workers).map_err(|error| error.to_string())
}

/// A parser for one of several named values. The names come from the library that owns the type. A
/// name may be written with `_` in place of `-`.
#[derive(Clone)]
pub(crate) struct Choice<T> {
    /// The values with their names and help texts.
    choices: Vec<(T, PossibleValue)>,
    /// Names that other projects use, each with the choice to suggest in the error.
    foreign: &'static [(&'static str, &'static str)],
}

impl<T> Choice<T> {
    /// Makes a parser of values with their names and descriptions. An empty description means no
    /// help text.
    pub(crate) fn new(choices: impl IntoIterator<Item = (T, &'static str, &'static str)>) -> Self {
        let choices = choices.into_iter().map(|(value, name, description)| {
            let possible = PossibleValue::new(name);
            let possible = match description {
                "" => possible,
                description => possible.help(description),
            };
            (value, possible)
        });
        Self {
            choices: choices.collect(),
            foreign: &[],
        }
    }

    /// Adds names of other projects, each with the choice to suggest for it.
    pub(crate) fn suggesting(mut self, foreign: &'static [(&'static str, &'static str)]) -> Self {
        self.foreign = foreign;
        self
    }
}

impl<T: Clone + Send + Sync + 'static> TypedValueParser for Choice<T> {
    type Value = T;

    fn parse_ref(&self, cmd: &Command, arg: Option<&Arg>, value: &OsStr) -> Result<T, Error> {
        let text = value.to_string_lossy();
        let hyphenated = text.replace('_', "-");
        let known = self
            .choices
            .iter()
            .find(|(_, name)| name.matches(&hyphenated, false));
        if let Some((value, _)) = known {
            return Ok(value.clone());
        }
        let names = || self.choices.iter().map(|(_, name)| name.get_name());
        let foreign = self.foreign.iter().find(|(name, _)| *name == hyphenated);
        let suggested = foreign
            .map(|(_, ours)| *ours)
            .or_else(|| nearest(&hyphenated, names()));
        let mut error = Error::new(ErrorKind::InvalidValue).with_cmd(cmd);
        let argument = arg.map_or_else(String::new, ToString::to_string);
        error.insert(ContextKind::InvalidArg, ContextValue::String(argument));
        error.insert(
            ContextKind::InvalidValue,
            ContextValue::String(text.clone().into_owned()),
        );
        error.insert(
            ContextKind::ValidValue,
            ContextValue::Strings(names().map(str::to_owned).collect()),
        );
        if let Some(suggested) = suggested {
            error.insert(
                ContextKind::SuggestedValue,
                ContextValue::String(suggested.to_owned()),
            );
        }
        Err(error)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        Some(Box::new(self.choices.iter().map(|(_, name)| name.clone())))
    }
}

/// The lowest Jaro-Winkler similarity at which a name is suggested for an unknown one.
const MIN_SIMILARITY: f64 = 0.75;

/// Returns the name most similar to `given`, if it is similar enough to be suggested.
pub(crate) fn nearest<'a>(given: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let similar = names.map(|name| (strsim::jaro_winkler(given, name), name));
    let best = similar.max_by(|(a, _), (b, _)| a.total_cmp(b));
    best.and_then(|(similarity, name)| (similarity > MIN_SIMILARITY).then_some(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_keep_their_value_and_need_a_unit() {
        for text in ["32MiB", "1GiB", "1500B", "3KiB", "0B"] {
            let size: Size = text.parse().unwrap();
            assert_eq!(size.to_string(), text);
        }
        assert_eq!("2 MB".parse(), Ok(Size(2_000_000)));
        let error = "33554432".parse::<Size>().unwrap_err();
        assert!(error.contains("33554432B"), "{error}");
        assert!("much".parse::<Size>().is_err());
    }

    #[test]
    fn an_address_has_a_port_and_may_omit_the_host() {
        let parsed = |text: &str| address(text).unwrap().to_string();
        assert_eq!(parsed(":80"), "0.0.0.0:80");
        assert_eq!(parsed("127.0.0.1:8080"), "127.0.0.1:8080");
        assert_eq!(parsed("[::1]:8080"), "[::1]:8080");
        assert!(address("localhost:8080").unwrap().ip().is_loopback());
        for text in ["8080", ":http", "127.0.0.1", "::1:x"] {
            let error = address(text).unwrap_err();
            assert!(
                error.contains("HOST:PORT") || error.contains("65535"),
                "{error}"
            );
        }
    }

    #[test]
    fn worker_urls_are_separated_by_commas_or_white_space() {
        let urls = worker_urls("http://a:1, b:2\nc:3").unwrap();
        assert_eq!(urls.0.len(), 3);
        let error = worker_urls("a:1,name=x").unwrap_err();
        assert!(error.contains("--worker"), "{error}");
        assert_eq!(workers("a:1,name=x  b:2\n").unwrap().0.len(), 2);
    }
}
