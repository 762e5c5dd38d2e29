//! Discovery: workers that names in DNS stand for, with a scripted DNS server.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use foresee_gateway::Gateway;
use parking_lot::Mutex;
use tokio::net::UdpSocket;

use crate::fake_worker::*;

/// Type numbers of records.
const A: u16 = 1;
const SRV: u16 = 33;

/// Codes of responses.
const SERVFAIL: u8 = 2;
const NXDOMAIN: u8 = 3;

/// Records by name and type: the encoded data of each.
type Zone = HashMap<(String, u16), Vec<Vec<u8>>>;

/// DNS server that knows a zone, whose records live for one second.
struct DnsServer {
    address: SocketAddr,
    zone: Arc<Mutex<Zone>>,
    /// Code of all responses, if they have no records.
    failure: Arc<Mutex<Option<u8>>>,
    /// Number of queries of A or SRV records.
    queries: Arc<Mutex<usize>>,
}

impl DnsServer {
    async fn start() -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let server = Self {
            address: socket.local_addr().unwrap(),
            zone: Arc::default(),
            failure: Arc::default(),
            queries: Arc::default(),
        };
        let (zone, failure) = (Arc::clone(&server.zone), Arc::clone(&server.failure));
        let queries = Arc::clone(&server.queries);
        tokio::spawn(async move {
            let mut buffer = [0; 1500];
            loop {
                let (length, client) = socket.recv_from(&mut buffer).await.unwrap();
                let (name, kind, end) = question(&buffer[..length]);
                if [A, SRV].contains(&kind) {
                    *queries.lock() += 1;
                }
                let key = (name.clone(), kind);
                let records = zone.lock().get(&key).cloned().unwrap_or_default();
                let is_known = zone.lock().keys().any(|(known, _)| *known == name);
                let code = failure
                    .lock()
                    .unwrap_or(if is_known { 0 } else { NXDOMAIN });
                let records = if code == 0 { records } else { Vec::new() };
                let response = respond(&buffer[..end], code, kind, &records);
                socket.send_to(&response, client).await.unwrap();
            }
        });
        server
    }

    fn set_addresses(&self, name: &str, addresses: &[Ipv4Addr]) {
        let records = addresses.iter().map(|address| address.octets().to_vec());
        let mut zone = self.zone.lock();
        zone.insert((name.to_owned(), A), records.collect());
    }

    /// Sets SRV records: priority, port and target of each.
    fn set_services(&self, name: &str, services: &[(u16, u16, &str)]) {
        let record = |(priority, port, target): &(u16, u16, &str)| {
            let mut data = Vec::new();
            for number in [*priority, 10, *port] {
                data.extend(number.to_be_bytes());
            }
            for label in target.split('.') {
                data.push(u8::try_from(label.len()).unwrap());
                data.extend(label.as_bytes());
            }
            data.push(0);
            data
        };
        let records = services.iter().map(record).collect();
        let mut zone = self.zone.lock();
        zone.insert((name.to_owned(), SRV), records);
    }
}

/// Returns the name and type of a query, and where its question ends.
fn question(query: &[u8]) -> (String, u16, usize) {
    let (mut labels, mut at) = (Vec::new(), 12);
    while query[at] > 0 {
        let end = at + 1 + usize::from(query[at]);
        let label = std::str::from_utf8(&query[at + 1..end]).unwrap();
        labels.push(label.to_ascii_lowercase());
        at = end;
    }
    let kind = u16::from_be_bytes([query[at + 1], query[at + 2]]);
    (labels.join("."), kind, at + 5)
}

/// Returns the response to a query, which ends with its question.
fn respond(query: &[u8], code: u8, kind: u16, records: &[Vec<u8>]) -> Vec<u8> {
    let mut response = query[..2].to_vec();
    response.extend([0x81, 0x80 | code, 0, 1]);
    response.extend(u16::try_from(records.len()).unwrap().to_be_bytes());
    response.extend([0; 4]);
    response.extend(&query[12..]);
    for data in records {
        response.extend([0xc0, 12]);
        response.extend(kind.to_be_bytes());
        response.extend([0, 1, 0, 0, 0, 1]);
        response.extend(u16::try_from(data.len()).unwrap().to_be_bytes());
        response.extend(data);
    }
    response
}

async fn until_workers(gateway: &Gateway, expected: &[SocketAddr]) {
    let mut expected: Vec<_> = expected.iter().map(SocketAddr::to_string).collect();
    expected.sort();
    let started = Instant::now();
    loop {
        let mut names: Vec<_> = workers(gateway).into_keys().collect();
        names.sort();
        if names == expected {
            return;
        }
        assert!(
            started.elapsed().as_secs() < 30,
            "{names:?}, not {expected:?}"
        );
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

async fn until_queries(server: &DnsServer, more: usize) {
    let target = *server.queries.lock() + more;
    let started = Instant::now();
    while *server.queries.lock() < target {
        assert!(started.elapsed().as_secs() < 30);
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn the_addresses_of_a_name_are_workers_until_the_name_is_gone() {
    let engine = FakeWorker::at("0.0.0.0:0".parse().unwrap(), &[MODEL]).await;
    let port = engine.address.port();
    let [one, two, three] = [1, 2, 3].map(|last| Ipv4Addr::new(127, 80, 0, last));
    let at = |ip: Ipv4Addr| SocketAddr::from((ip, port));
    let server = DnsServer::start().await;
    server.set_addresses("gpu.test", &[one, two]);
    let mut config = config(&[]);
    config.discovery.names = vec![format!("gpu.test:{port}").parse().unwrap()];
    config.discovery.dns_server = Some(server.address);
    let cautious = Gateway::start(config.clone()).unwrap();
    config.discovery.allows_empty = true;
    let gateway = gateway_with(config).await;
    until_workers(&gateway, &[at(one), at(two)]).await;
    server.set_addresses("gpu.test", &[two, three]);
    for gateway in [&gateway, &cautious] {
        until_workers(gateway, &[at(two), at(three)]).await;
    }

    // A server that fails changes nothing, however long.
    *server.failure.lock() = Some(SERVFAIL);
    until_queries(&server, 4).await;
    until_workers(&gateway, &[at(two), at(three)]).await;
    // A name that does not exist is believed after some time, if empty lists are allowed.
    *server.failure.lock() = Some(NXDOMAIN);
    until_queries(&server, 1).await;
    until_workers(&gateway, &[at(two), at(three)]).await;
    until_workers(&gateway, &[]).await;
    until_queries(&server, 2).await;
    until_workers(&cautious, &[at(two), at(three)]).await;
    *server.failure.lock() = None;
    until_workers(&gateway, &[at(two), at(three)]).await;
    let series = format!("foresee_discovery_workers{{source=\"dns:gpu.test:{port}\"}}");
    until_metric(&gateway, &series, 2.0).await;
}

#[tokio::test]
async fn srv_records_name_hosts_and_ports() {
    let engines = [FakeWorker::start().await, FakeWorker::start().await];
    let [first, second] = [engines[0].address, engines[1].address];
    let server = DnsServer::start().await;
    for host in ["a.gpu.test", "b.gpu.test"] {
        server.set_addresses(host, &[Ipv4Addr::LOCALHOST]);
    }
    let name = "_http._tcp.gpu.test";
    // The last one is of another priority: a stand-in.
    let services = [
        (1, first.port(), "a.gpu.test"),
        (1, second.port(), "b.gpu.test"),
        (2, 9, "a.gpu.test"),
    ];
    server.set_services(name, &services);
    let mut config = config(&[]);
    config.discovery.names = vec![name.parse().unwrap()];
    config.discovery.dns_server = Some(server.address);
    let gateway = gateway_with(config).await;
    until_workers(&gateway, &[first, second]).await;
    // A target that has no address any more takes none of the others with it.
    server.set_addresses("b.gpu.test", &[]);
    until_workers(&gateway, &[first]).await;
    server.set_addresses("b.gpu.test", &[Ipv4Addr::LOCALHOST]);
    until_workers(&gateway, &[first, second]).await;
    server.set_services(name, &services[1..2]);
    until_workers(&gateway, &[second]).await;
}
