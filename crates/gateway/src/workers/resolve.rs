//! Look-ups of host names: the resolver, and the addresses that stand for one engine.

use std::collections::BTreeSet;
use std::fmt;
use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::timeout;

/// Delay after the first failed look-up of a name that has no address yet. Each further failure
/// doubles it, up to [`DnsConfig::refresh`].
const FIRST_RETRY_DELAY: Duration = Duration::from_millis(500);

/// Maximum number of addresses of one name that become workers.
pub(crate) const MAX_ADDRESSES: usize = 64;

/// How host names of workers are resolved.
#[derive(Clone, Debug)]
pub struct DnsConfig {
    /// Time between two look-ups of a name.
    pub refresh: Duration,
    /// Maximum time of a look-up.
    pub timeout: Duration,
    /// Resolver of the names.
    pub resolver: Resolver,
}

impl Default for DnsConfig {
    fn default() -> Self {
        Self {
            refresh: Duration::from_secs(30),
            timeout: Duration::from_secs(5),
            resolver: Resolver::system(),
        }
    }
}

/// Result of a look-up: all addresses of the name.
type Addresses = io::Result<Vec<IpAddr>>;

/// Future of a look-up.
type LookUp = Pin<Box<dyn Future<Output = Addresses> + Send>>;

/// Resolver of host names.
#[derive(Clone)]
pub struct Resolver(Arc<dyn Fn(String) -> LookUp + Send + Sync>);

impl Resolver {
    /// Returns the resolver of the operating system, which reads `/etc/hosts` and `/etc/resolv.conf`.
    #[must_use]
    pub fn system() -> Self {
        Self::from_fn(|host| async move {
            let found = tokio::net::lookup_host((host.as_str(), 0)).await?;
            Ok(found.map(|address| address.ip()).collect())
        })
    }

    /// Returns a resolver that calls `look_up` with the name. No time limit applies inside.
    pub fn from_fn<F>(look_up: impl Fn(String) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = io::Result<Vec<IpAddr>>> + Send + 'static,
    {
        Self(Arc::new(move |host| Box::pin(look_up(host))))
    }
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Resolver")
    }
}

/// Look-ups of one host name, of which at most one runs at a time.
#[derive(Debug)]
pub(crate) struct NameLookUp {
    host: String,
    config: DnsConfig,
    /// A look-up that exceeded the time limit and still runs. The operating system's cannot be
    /// cancelled and occupies a thread, so no other is started meanwhile.
    running: Option<JoinHandle<Addresses>>,
    /// Failed look-ups in a row.
    failures: u32,
}

impl NameLookUp {
    /// Prepares look-ups of `host`.
    pub(crate) fn new(host: &str, config: &DnsConfig) -> Self {
        Self {
            host: host.to_owned(),
            config: config.clone(),
            running: None,
            failures: 0,
        }
    }

    /// Looks the name up and returns its addresses, at least one. Fails with the cause as text, also
    /// if the look-up takes longer than [`DnsConfig::timeout`]. Must be called inside a tokio runtime.
    pub(crate) async fn look_up(&mut self) -> Result<BTreeSet<IpAddr>, String> {
        let mut running = self.running.take().unwrap_or_else(|| {
            let look_up = (self.config.resolver.0)(self.host.clone());
            tokio::spawn(look_up)
        });
        let found = match timeout(self.config.timeout, &mut running).await {
            Ok(Ok(Ok(addresses))) if addresses.is_empty() => Err("no address".to_owned()),
            Ok(Ok(Ok(addresses))) => Ok(addresses.into_iter().collect()),
            Ok(Ok(Err(error))) => Err(error.to_string()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => {
                self.running = Some(running);
                Err(format!("no response within {:?}", self.config.timeout))
            }
        };
        self.failures = match found {
            Ok(_) => 0,
            Err(_) => self.failures.saturating_add(1),
        };
        found
    }

    /// Returns the number of look-ups in a row that failed.
    pub(crate) fn failures(&self) -> u32 {
        self.failures
    }

    /// Returns the time until the next look-up. `is_urgent` says that the engine has no address that
    /// works; then a failed look-up is repeated soon, with growing delays.
    pub(crate) fn next_delay(&self, is_urgent: bool) -> Duration {
        if !is_urgent {
            return self.config.refresh;
        }
        let doublings = self.failures.saturating_sub(1).min(16);
        let delay = FIRST_RETRY_DELAY.saturating_mul(1 << doublings);
        delay.min(self.config.refresh)
    }
}

/// Returns the addresses of the preferred family: a machine often has an IPv4 and an IPv6 address,
/// which are not two engines. `connects` says whether a connection to an address is accepted; it is
/// called only if there are addresses of both families. IPv4 is preferred unless only IPv6 connects.
pub(crate) async fn of_one_family<F>(
    addresses: BTreeSet<IpAddr>,
    connects: impl Fn(IpAddr) -> F,
) -> BTreeSet<IpAddr>
where
    F: Future<Output = bool>,
{
    let (v4, v6): (BTreeSet<_>, BTreeSet<_>) = addresses.into_iter().partition(IpAddr::is_ipv4);
    let (Some(first_v4), Some(first_v6)) = (v4.first(), v6.first()) else {
        return if v4.is_empty() { v6 } else { v4 };
    };
    if !connects(*first_v4).await && connects(*first_v6).await {
        v6
    } else {
        v4
    }
}

/// The addresses that have a worker, of one engine.
#[derive(Debug, Default)]
pub(crate) struct Members {
    addresses: BTreeSet<IpAddr>,
    /// Address of the worker that has the engine's own name; `None` before the first look-up, and
    /// after that worker has left.
    named: Option<IpAddr>,
    has_started: bool,
}

/// A change of the workers of an engine, after a look-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MemberChange {
    /// The worker with the engine's name has its first address.
    First(IpAddr),
    /// The worker with the engine's name has another address: the only address was replaced.
    Moved(IpAddr),
    /// A further address, for a new worker.
    Joined(IpAddr),
    /// The name no longer has this address.
    Left(IpAddr),
}

impl Members {
    /// Returns how the workers change to those of the addresses `found`. Additions come before
    /// removals. Returns nothing if `found` is empty, because a name without an address does not say
    /// that the engines are gone.
    pub(crate) fn update(&mut self, found: &BTreeSet<IpAddr>) -> Vec<MemberChange> {
        let Some(&first) = found.first() else {
            return Vec::new();
        };
        if !std::mem::replace(&mut self.has_started, true) {
            self.named = Some(first);
            self.addresses.clone_from(found);
            let further = found.iter().skip(1);
            return std::iter::once(MemberChange::First(first))
                .chain(further.map(|&address| MemberChange::Joined(address)))
                .collect();
        }
        let is_replaced = found.len() == 1 && self.addresses.len() == 1 && self.named.is_some();
        if is_replaced && !self.addresses.contains(&first) {
            self.named = Some(first);
            self.addresses.clone_from(found);
            return vec![MemberChange::Moved(first)];
        }
        let joined = found.difference(&self.addresses);
        let left = self.addresses.difference(found);
        let changes = joined
            .map(|&address| MemberChange::Joined(address))
            .chain(left.map(|&address| MemberChange::Left(address)))
            .collect();
        self.named = self.named.filter(|named| found.contains(named));
        self.addresses.clone_from(found);
        changes
    }

    /// Forgets an address whose worker could not be added, so that the next look-up adds it again.
    pub(crate) fn forget(&mut self, address: IpAddr) {
        self.addresses.remove(&address);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::future::ready;

    use proptest::prelude::*;

    use super::*;

    fn ip(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    fn set(addresses: &[u8]) -> BTreeSet<IpAddr> {
        addresses.iter().map(|&last| ip(last)).collect()
    }

    #[test]
    fn the_first_address_has_the_engines_name_and_others_join_and_leave() {
        use MemberChange::{First, Joined, Left, Moved};
        let mut members = Members::default();
        assert_eq!(members.update(&set(&[])), []);
        assert_eq!(members.update(&set(&[2, 1])), [First(ip(1)), Joined(ip(2))]);
        assert_eq!(members.update(&set(&[1, 2])), []);
        assert_eq!(members.update(&set(&[1, 3])), [Joined(ip(3)), Left(ip(2))]);
        assert_eq!(members.update(&set(&[1])), [Left(ip(3))]);
        assert_eq!(members.update(&set(&[9])), [Moved(ip(9))]);
        assert_eq!(members.update(&set(&[])), []);
        assert_eq!(members.update(&set(&[9, 4])), [Joined(ip(4))]);
        assert_eq!(members.update(&set(&[4])), [Left(ip(9))]);
        // No worker has the engine's name any more, so none can move.
        assert_eq!(members.update(&set(&[5])), [Joined(ip(5)), Left(ip(4))]);
    }

    proptest! {
        /// Compares with a model that applies the changes to a list of named workers.
        #[test]
        fn the_workers_are_those_of_the_last_addresses_found(
            look_ups in prop::collection::vec(prop::collection::btree_set(1_u8..6, 0..5), 1..12)
        ) {
            let mut members = Members::default();
            let mut workers = BTreeMap::new();
            let mut expected = BTreeSet::new();
            for found in look_ups {
                let found: BTreeSet<IpAddr> = found.into_iter().map(ip).collect();
                let before = workers.clone();
                for change in members.update(&found) {
                    match change {
                        MemberChange::First(address) => {
                            prop_assert_eq!(workers.insert("named".to_owned(), address), None);
                        }
                        MemberChange::Moved(address) => {
                            prop_assert!(workers.insert("named".to_owned(), address).is_some());
                        }
                        MemberChange::Joined(address) => {
                            prop_assert_eq!(workers.insert(address.to_string(), address), None);
                        }
                        MemberChange::Left(address) => {
                            let held = workers.len();
                            workers.retain(|_, held| *held != address);
                            prop_assert_eq!(workers.len() + 1, held);
                        }
                    }
                }
                if !found.is_empty() {
                    expected.clone_from(&found);
                }
                let held: Vec<IpAddr> = workers.values().copied().collect();
                prop_assert_eq!(held.len(), expected.len(), "one worker for each address");
                prop_assert_eq!(held.into_iter().collect::<BTreeSet<_>>(), expected.clone());
                for (name, address) in before {
                    if expected.contains(&address) {
                        prop_assert_eq!(workers.get(&name), Some(&address), "identity is kept");
                    }
                }
            }
        }
    }

    #[tokio::test]
    async fn one_family_is_used_and_ipv4_is_preferred() {
        let v6 = IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]);
        let both = || BTreeSet::from([ip(1), v6]);
        let v4 = set(&[1]);
        assert_eq!(of_one_family(both(), |_| ready(true)).await, v4);
        assert_eq!(of_one_family(both(), |_| ready(false)).await, v4);
        let only_v6 = |address: IpAddr| ready(address.is_ipv6());
        assert_eq!(of_one_family(both(), only_v6).await, BTreeSet::from([v6]));
        let unused = |_: IpAddr| -> std::future::Ready<bool> { panic!("there is no choice") };
        assert_eq!(of_one_family(set(&[1, 2]), unused).await, set(&[1, 2]));
    }

    #[tokio::test]
    async fn a_look_up_has_a_deadline_and_failures_back_off() {
        let resolver = Resolver::from_fn(|_| std::future::pending());
        let config = DnsConfig {
            refresh: Duration::from_secs(30),
            timeout: Duration::from_millis(1),
            resolver,
        };
        let mut name = NameLookUp::new("gpu1", &config);
        assert_eq!(name.next_delay(false), config.refresh);
        let mut delays = Vec::new();
        for _ in 0..8 {
            let error = name.look_up().await.unwrap_err();
            assert!(error.contains("1ms"), "{error}");
            delays.push(name.next_delay(true).as_millis());
        }
        assert_eq!(
            delays,
            [500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000]
        );
    }
}
