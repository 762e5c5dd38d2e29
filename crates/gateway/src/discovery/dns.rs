//! Names in DNS as workers: the addresses of a name, or the targets of its SRV records.
//!
//! A name is looked up again when its records expire. Answers are kept over errors; that a name does
//! not exist is believed when several look-ups in a row say so, because a server that restarts says it
//! too. The weights of SRV records have no effect, because the router predicts how fast a worker is.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use hickory_resolver::TokioResolver;
use hickory_resolver::config::{
    ConnectionConfig, LookupIpStrategy, NameServerConfig, ResolverConfig,
};
use hickory_resolver::net::NetError;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::proto::rr::{RData, RecordType};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use super::config::DnsName;
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

/// Number of look-ups in a row after which a name that has no records has no workers.
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

/// Looks a name up whenever its records expire, and makes their engines the workers of the source.
/// Never returns.
pub(super) async fn follow(name: DnsName, server: Option<SocketAddr>, workers: SourceWorkers) {
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
                if absences == MAX_ABSENCES {
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
    let mut targets = BTreeSet::new();
    for (host, port) in hosts {
        let found = resolver.lookup_ip(host.as_str()).await?;
        let until = found.valid_until();
        expires = Some(expires.map_or(until, |expires: Instant| expires.min(until)));
        let addresses: BTreeSet<IpAddr> = found.iter().collect();
        let addresses = of_one_family(addresses, |address| async move {
            let connecting = TcpStream::connect((address, port));
            matches!(timeout(CONNECT_TIMEOUT, connecting).await, Ok(Ok(_)))
        });
        let host = host.trim_end_matches('.').to_owned();
        let addresses = addresses.await;
        targets.extend(
            addresses
                .into_iter()
                .map(|ip| (SocketAddr::new(ip, port), host.clone())),
        );
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
