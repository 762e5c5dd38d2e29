//! Names in DNS as workers: the addresses of a name, or the targets of its SRV records.
//!
//! A name is looked up again when its records expire. Its workers are kept over errors. If empty lists
//! are allowed, a name without records loses its workers after several look-ups in a row, because a name
//! server that restarts has no records either. The weights of SRV records have no effect, because the
//! router predicts how fast a worker is.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use hickory_resolver::TokioResolver;
use hickory_resolver::config::{
    ConnectionConfig, LookupIpStrategy, NameServerConfig, ResolverConfig,
};
use hickory_resolver::net::NetError;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::proto::rr::{RData, RecordType};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use super::config::{DiscoveryConfig, DnsName};
use super::jitter::Jitter;
use super::source_workers::SourceWorkers;
use super::targets::{Trust, describe};
use crate::workers::resolve::of_one_family;
use crate::workers::worker_config::WorkerConfig;

/// Bounds of the time between two look-ups; the records' time to live decides within them.
const REFRESH: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(30)];

/// Time until the next look-up after a failed one.
const RETRY_DELAY: Duration = Duration::from_secs(2);

/// Maximum time of a look-up, with those of the targets of SRV records.
const LOOK_UP_TIMEOUT: Duration = Duration::from_secs(10);

/// Maximum time of a connection that tests whether an address family works.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// Number of look-ups in a row after which a name that has no records has no workers, if empty lists are
/// allowed.
const MAX_ABSENCES: u32 = 3;

/// Largest number of workers of a name.
const MAX_ENGINES: usize = 1024;

/// Result of a look-up.
#[derive(Debug)]
enum Answer {
    /// The engines, and when their records expire.
    Engines(Vec<WorkerConfig>, Instant),
    /// The name has no such records.
    Absent,
}

/// Looks a name up whenever its records expire, and makes their engines the workers of the source. A
/// name without records keeps the workers of the last ones, unless `config` allows empty lists. Never
/// returns.
pub(super) fn follow(
    name: DnsName,
    config: &DiscoveryConfig,
    workers: SourceWorkers,
) -> impl Future<Output = ()> + use<> {
    let (server, allows_empty) = (config.dns_server, config.allows_empty);
    follow_name(name, server, allows_empty, workers)
}

async fn follow_name(
    name: DnsName,
    server: Option<SocketAddr>,
    allows_empty: bool,
    workers: SourceWorkers,
) {
    let mut jitter = Jitter::new(name.to_string());
    let mut absences: u32 = 0;
    loop {
        let answer = timeout(LOOK_UP_TIMEOUT, look_up(&name, server)).await;
        let answer = answer.unwrap_or_else(|_| Err(format!("no answer in {LOOK_UP_TIMEOUT:?}")));
        let delay = match answer {
            Ok(Answer::Engines(engines, expires)) => {
                absences = 0;
                workers.apply(engines);
                let [shortest, longest] = REFRESH;
                let lifetime = expires.saturating_duration_since(Instant::now());
                lifetime.clamp(shortest, longest)
            }
            Ok(Answer::Absent) => {
                absences = absences.saturating_add(1);
                workers.fail(&format!("{} has no records", name.name));
                if absences == MAX_ABSENCES && allows_empty {
                    workers.apply(Vec::new());
                }
                RETRY_DELAY
            }
            Err(error) => {
                workers.fail(&error);
                RETRY_DELAY
            }
        };
        sleep(jitter.vary(delay)).await;
    }
}

/// Looks a name up. Fails with the cause as text.
async fn look_up(name: &DnsName, server: Option<SocketAddr>) -> Result<Answer, String> {
    let resolver = resolver(server)?;
    match engines(name, &resolver).await {
        Ok((engines, expires)) => Ok(Answer::Engines(engines?, expires)),
        // True of a name that does not exist, and of one without records of the type.
        Err(error) if error.is_no_records_found() => Ok(Answer::Absent),
        Err(error) => Err(error.to_string()),
    }
}

/// Returns a resolver that asks `server`, or else the servers of the operating system, without a cache.
/// It reads `/etc/resolv.conf` anew.
fn resolver(server: Option<SocketAddr>) -> Result<TokioResolver, String> {
    let mut builder = match server {
        Some(server) => {
            let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()];
            let connections = connections.map(|mut connection| {
                connection.port = server.port();
                connection
            });
            let server = NameServerConfig::new(server.ip(), true, connections.to_vec());
            let config = ResolverConfig::from_parts(None, Vec::new(), vec![server]);
            TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
        }
        None => TokioResolver::builder_tokio().map_err(|error| error.to_string())?,
    };
    let options = builder.options_mut();
    options.cache_size = 0;
    options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
    builder.build().map_err(|error| error.to_string())
}

/// Returns the engines of a name, and when their records expire. Fails if the name cannot be looked up;
/// the inner error says which engine is invalid.
async fn engines(
    name: &DnsName,
    resolver: &TokioResolver,
) -> Result<(Result<Vec<WorkerConfig>, String>, Instant), NetError> {
    let mut expires;
    // Hosts, with their ports.
    let mut hosts = BTreeSet::new();
    if let Some(port) = name.port {
        expires = None;
        hosts.insert((name.name.clone(), port));
    } else {
        let found = resolver.lookup(name.name.as_str(), RecordType::SRV).await?;
        expires = Some(found.valid_until());
        let records = found.answers().iter();
        let records: Vec<_> = records
            .filter_map(|record| match &record.data {
                RData::SRV(record) => Some(record),
                _ => None,
            })
            .collect();
        let first = records.iter().map(|record| record.priority).min();
        let preferred = records
            .iter()
            .filter(|record| Some(record.priority) == first);
        for record in preferred.take(MAX_ENGINES) {
            hosts.insert((record.target.to_utf8(), record.port));
        }
    }
    // At the same time, because a look-up and its connections can take seconds.
    let found = hosts
        .iter()
        .map(|(host, port)| addresses_of(host, *port, resolver));
    let mut targets = BTreeSet::new();
    let mut absent = None;
    for (found, (host, port)) in join_all(found).await.into_iter().zip(&hosts) {
        let (addresses, until) = match found {
            Ok(found) => found,
            // The target of an SRV record can be gone before its record.
            Err(error) if error.is_no_records_found() => {
                absent = Some(error);
                continue;
            }
            Err(error) => return Err(error),
        };
        expires = Some(expires.map_or(until, |expires: Instant| expires.min(until)));
        let host = host.trim_end_matches('.');
        let addresses = addresses.into_iter();
        targets.extend(addresses.map(|ip| (SocketAddr::new(ip, *port), host.to_owned())));
    }
    if let Some(error) = absent.filter(|_| targets.is_empty()) {
        return Err(error);
    }
    let mut engines = Vec::new();
    let mut seen = BTreeSet::new();
    for (address, host) in targets.into_iter().take(MAX_ENGINES) {
        // Several hosts of SRV records can have one address.
        if seen.insert(address) {
            engines.push(engine(name, address, &host));
        }
    }
    Ok((
        engines.into_iter().collect(),
        expires.unwrap_or_else(Instant::now),
    ))
}

/// Returns the addresses of a host, of one family, and when they expire.
async fn addresses_of(
    host: &str,
    port: u16,
    resolver: &TokioResolver,
) -> Result<(BTreeSet<IpAddr>, Instant), NetError> {
    let found = resolver.lookup_ip(host).await?;
    let until = found.valid_until();
    let addresses = of_one_family(found.iter().collect(), |address| async move {
        let connecting = TcpStream::connect((address, port));
        matches!(timeout(CONNECT_TIMEOUT, connecting).await, Ok(Ok(_)))
    });
    Ok((addresses.await, until))
}

/// Returns the engine at an address, named after it. Its certificate, if it has one, is that of `host`.
fn engine(name: &DnsName, address: SocketAddr, host: &str) -> Result<WorkerConfig, String> {
    let (scheme, options) = match name.is_https {
        true => (
            "https",
            vec![("tls-server-name".to_owned(), host.to_owned())],
        ),
        false => ("http", Vec::new()),
    };
    describe(&format!("{scheme}://{address}"), &options, Trust::Remote)
}
