//! `foresee serve` reloads its configuration file: on request, by SIGHUP and with `--watch-config`.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use serde_json::Value;

use crate::ports::free_port;
use crate::process::{Process, eventually, exchange};

/// A running router with a configuration file.
struct Router {
    process: Process,
    api: SocketAddr,
    admin: SocketAddr,
    file: PathBuf,
}

impl Router {
    /// Starts the router with this text in its file, besides the addresses.
    fn start(name: &str, text: &str, options: &[&str]) -> Self {
        let file = format!("foresee-reload-{name}-{}.toml", std::process::id());
        let file = std::env::temp_dir().join(file);
        std::fs::write(&file, text).unwrap();
        let [api, admin] = [free_port(), free_port()].map(|port| format!("127.0.0.1:{port}"));
        let mut arguments = vec!["serve", "--config", file.to_str().unwrap()];
        arguments.extend(["--listen", &api, "--admin-listen", &admin]);
        arguments.extend(options);
        let process = Process::start(&arguments);
        let [api, admin] = [api, admin].map(|address| address.parse().unwrap());
        eventually(|| exchange(admin, "GET /health/live", "").filter(|(status, _)| *status == 200));
        Self {
            process,
            api,
            admin,
            file,
        }
    }

    /// Replaces the file as a whole.
    fn write(&self, text: &str) {
        let new = self.file.with_extension("new");
        std::fs::write(&new, text).unwrap();
        std::fs::rename(&new, &self.file).unwrap();
    }

    /// Reloads the configuration by a request.
    fn reload(&self) -> (u16, Value) {
        let (status, body) = exchange(self.admin, "POST /admin/reload", "").unwrap();
        (status, serde_json::from_str(&body).unwrap())
    }

    /// Reloads the configuration by a signal.
    fn hang_up(&self) {
        self.process.signal("-HUP");
    }

    /// Returns the names of the workers, sorted.
    fn workers(&self) -> Vec<String> {
        let (_, body) = exchange(self.admin, "GET /admin/workers", "").unwrap();
        let list: Value = serde_json::from_str(&body).unwrap();
        let workers = list["workers"].as_array().unwrap().iter();
        let names = workers.map(|worker| worker["name"].as_str().unwrap().to_owned());
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    }

    /// Returns the value of a metric without labels.
    fn metric(&self, name: &str) -> f64 {
        let (_, text) = exchange(self.admin, "GET /metrics", "").unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap().trim().parse().unwrap()
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.file);
    }
}

/// Returns a `[[worker]]` table of a worker at a port.
fn worker(name: &str, port: u16) -> String {
    format!("[[worker]]\nname = \"{name}\"\nurl = \"http://127.0.0.1:{port}\"\n")
}

#[test]
fn a_reload_applies_the_file_and_names_what_needs_a_restart() {
    let before = format!("queue-limit = 5\n{}{}", worker("a", 1), worker("b", 1));
    let router = Router::start("apply", &before, &[]);
    let unchanged = serde_json::json!({
        "changed": [], "needs_restart": [],
        "workers_added": [], "workers_replaced": [], "workers_removed": [],
    });
    assert_eq!(router.reload(), (200, unchanged));

    let after = format!(
        "queue-limit = 7\nmax-body-size = \"1MiB\"\n{}{}",
        worker("a", 2),
        worker("c", 1)
    );
    router.write(&after);
    let expected = serde_json::json!({
        "changed": ["queue-limit"], "needs_restart": ["max-body-size"],
        "workers_added": ["c"], "workers_replaced": ["a"], "workers_removed": ["b"],
    });
    assert_eq!(router.reload(), (200, expected));
    eventually(|| (router.workers() == ["a", "c"]).then_some(()));

    // A worker that was added over HTTP stays.
    let body = "{\"url\": \"http://127.0.0.1:3,name=d\"}";
    let added = exchange(router.admin, "POST /admin/workers", body).unwrap();
    assert_eq!(added.0, 202);
    router.write(&worker("a", 2));
    router.hang_up();
    eventually(|| (router.workers() == ["a", "d"]).then_some(()));
}

#[test]
fn an_invalid_file_changes_nothing_and_is_named_with_line_and_key() {
    let valid = worker("a", 1);
    let router = Router::start("invalid", &valid, &[]);
    for (text, parts) in [
        ("queue-limit = \n", &["line 1"][..]),
        (
            "seed = 1\nqueue-limit = \"x\"\n",
            &["line 2", "queue-limit"],
        ),
        (
            "seed = 1\n\nquue-limit = 3\n",
            &["line 3", "did you mean `queue-limit`"],
        ),
        (
            "[[worker]]\nurl = \"a:1\"\n[[worker]]\nurl = \"a:x\"\n",
            &["line 3", "a:x"],
        ),
        ("overlap-weight = -1\n", &["overlap-weight", "0 to 1000000"]),
        (
            "worker-api-key-file = \"/nonexistent\"\n",
            &["/nonexistent"],
        ),
    ] {
        router.write(text);
        let (status, body) = router.reload();
        let message = body["error"]["message"].as_str().unwrap();
        assert_eq!(status, 400, "{text}: {message}");
        for part in parts {
            assert!(message.contains(part), "{text}: {message}");
        }
        assert_eq!(router.metric("foresee_config_last_reload_successful"), 0.0);
        assert_eq!(router.workers(), ["a"]);
    }
    // The name is taken by a worker that was added over HTTP.
    let body = "{\"url\": \"http://127.0.0.1:3,name=d\"}";
    exchange(router.admin, "POST /admin/workers", body).unwrap();
    router.write(&format!("{}{}", worker("c", 1), worker("d", 4)));
    let (status, body) = router.reload();
    assert_eq!(
        (status, body["error"]["code"].as_str()),
        (409, Some("worker_conflict"))
    );
    assert_eq!(router.workers(), ["a", "d"]);

    router.write(&valid);
    assert_eq!(router.reload().0, 200);
    assert_eq!(router.metric("foresee_config_last_reload_successful"), 1.0);
}

#[test]
fn a_watched_file_is_reloaded_when_it_changes() {
    let router = Router::start("watch", &worker("a", 1), &["--watch-config"]);
    router.write(&worker("b", 1));
    eventually(|| (router.workers() == ["b"]).then_some(()));
    router.write("nonsense");
    eventually(|| (router.metric("foresee_config_last_reload_successful") == 0.0).then_some(()));
    assert_eq!(router.workers(), ["b"]);
    router.write(&worker("c", 1));
    eventually(|| (router.workers() == ["c"]).then_some(()));
}

/// Settings with a value other than the default, besides the workers.
const CHANGED: &str = r#"
admin-host = ["router.example"]
admin-open = true
max-reservations = 7
worker-api-key-for-clients = true
dns-refresh = "7s"
health-path = "/other"
health-method = "HEAD"
healthy-threshold = 7
unhealthy-threshold = 7
health-timeout = "7s"
tokenizer = "/nonexistent"
prefix-caching = false
dashboard = false
policy = "kv"
overlap-weight = 7
ttft-weight = 7
temperature = 7
block-size = 32
seed = 7
queue = "fcfs"
dry-run = true
ejection-consecutive-failures = 7
ejection-failure-rate = 0.7
ejection-time = "7s"
max-ejection-time = "7s"
max-ejected-fraction = 0.7
trial-interval = "7s"
failure-charge-decay = "7s"
warm-up-requests = 7
queue-limit = 7
tenant-header = "x-tenant"
pass-through = ["/other"]
model-alias = ["public=a:9,b:1"]
trusted-proxies = ["10.0.0.0/8"]
trust-client-headers = true
expose-worker-header = true
max-body-size = "7MiB"
probe-interval = "7s"
connect-timeout = "7s"
first-byte-timeout = "7s"
min-first-byte-timeout = "7s"
stream-idle-timeout = "7s"
shutdown-timeout = "7s"
io-threads = 7
max-connections = 7
client-head-timeout = "7s"
client-idle-timeout = "7s"
client-write-timeout = "7s"
body-idle-timeout = "7s"
max-body-bytes-in-flight = "7MiB"
shutdown-delay = "7s"
engine-metrics-interval = "7s"
record = "/nonexistent"
access-log = "/nonexistent"
access-log-sample-ratio = 0.7
discovery-file = ["/nonexistent"]
discovery-url = ["http://127.0.0.1:1"]
discovery-refresh = "7s"
discovery-allow-empty = true
discovery-ca = "/nonexistent"
discovery-dns = ["localhost:1"]
discovery-dns-server = "127.0.0.1:1"
kubernetes-namespace = "other"
kubernetes-ports = [7]
kubernetes-resync = "7s"
kubernetes-config = "/nonexistent"
state = "/nonexistent"
otlp-endpoint = "http://127.0.0.1:1"
trace-sample-ratio = 0.7
metrics-compat = "llm-d"
slo-ttft = "7s"
slo-itl = "7s"
scale-horizon = "7s"
"#;

#[test]
fn a_reload_names_every_setting_that_changed() {
    let router = Router::start("names", "", &[]);
    let key = router.file.with_extension("key");
    std::fs::write(&key, "secret").unwrap();
    let keys = router.file.with_extension("keys");
    let hash = "0".repeat(64);
    std::fs::write(
        &keys,
        format!("[[key]]\nid = \"a\"\nhash = \"sha256:{hash}\"\n"),
    )
    .unwrap();
    let mut text = format!("{CHANGED}key-file = {keys:?}\n");
    // Others are refused by a program that cannot follow pods.
    let pods = ["kubernetes-selector", "kubernetes-pool"];
    if cfg!(feature = "kubernetes") {
        text.push_str("kubernetes-selector = \"app=x\"\nkubernetes-pool = [\"pool\"]\n");
    }
    // Each file is named by its own key, and those of TLS by one for all.
    let tls = TlsFiles::new(&router.file);
    text.push_str(&tls.settings());
    for name in ["admin-key-file", "metrics-key-file", "worker-api-key-file"] {
        text.push_str(&format!("{name} = {key:?}\n"));
    }
    router.write(&text);
    let (status, report) = router.reload();
    std::fs::remove_file(&key).unwrap();
    std::fs::remove_file(&keys).unwrap();
    assert_eq!(status, 200, "{report}");
    let lists = [&report["changed"], &report["needs_restart"]];
    let named = lists.iter().flat_map(|list| list.as_array().unwrap());
    let named: BTreeSet<_> = named
        .map(|name| name.as_str().unwrap().to_owned())
        .collect();
    // The flags of the test set the addresses, and the log has no reload.
    let other = ["listen", "admin-listen", "log-level", "log-format"];
    let mut expected = all_keys();
    expected.retain(|key| !other.contains(&key.as_str()));
    if !cfg!(feature = "kubernetes") {
        expected.retain(|key| !pods.contains(&key.as_str()));
    }
    // Keys come from this file and from tables of the configuration file.
    for (key, reported) in [
        ("key-file", "key"),
        ("tls-certificate", "tls"),
        ("tls-key", "tls"),
        ("tls-client-ca", "tls"),
        ("tls-client-auth", "tls"),
        ("worker-tls-key", "worker-tls-certificate"),
    ] {
        assert!(expected.remove(key), "{key}");
        expected.insert(reported.to_owned());
    }
    assert_eq!(named, expected);
}

/// A certificate and its key, which are removed at the end of the test.
struct TlsFiles([PathBuf; 2]);

impl TlsFiles {
    fn new(path: &Path) -> Self {
        let signed = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let files = ["certificate", "private"].map(|end| path.with_extension(end));
        std::fs::write(&files[0], signed.cert.pem()).unwrap();
        std::fs::write(&files[1], signed.signing_key.serialize_pem()).unwrap();
        Self(files)
    }

    /// Returns all settings of TLS as lines of a configuration file.
    fn settings(&self) -> String {
        let [certificate, key] = &self.0;
        format!(
            "tls-certificate = {certificate:?}\ntls-key = {key:?}\ntls-client-ca = {certificate:?}\n\
             tls-client-auth = \"optional\"\nadmin-tls = true\nworker-tls-ca = {certificate:?}\n\
             worker-tls-certificate = {certificate:?}\nworker-tls-key = {key:?}\n"
        )
    }
}

impl Drop for TlsFiles {
    fn drop(&mut self) {
        for path in &self.0 {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Returns all keys of a configuration file, apart from the workers.
fn all_keys() -> BTreeSet<String> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_foresee"));
    let output = command.arg("check-config").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let keys = text.lines().filter_map(|line| {
        let unset = line
            .strip_prefix("# ")
            .and_then(|line| line.strip_suffix(" is not set"));
        unset.or_else(|| Some(line.split_once(" = ")?.0))
    });
    keys.map(str::to_owned).collect()
}

#[test]
fn reloads_under_load_lose_no_request() {
    let ports = [free_port(), free_port(), free_port()];
    let _engines = ports.map(|port| {
        let address = format!("127.0.0.1:{port}");
        Process::start(&["mock-engine", "--listen", &address, "--speedup", "200"])
    });
    for port in ports {
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        eventually(|| exchange(address, "GET /health", "").filter(|(status, _)| *status == 200));
    }
    let names = ["a", "b", "c"];
    let fleet = |members: [usize; 2]| {
        members
            .map(|index| worker(names[index], ports[index]))
            .concat()
    };
    let router = Router::start("load", &fleet([0, 1]), &["--probe-interval", "20ms"]);
    eventually(|| {
        let ready = exchange(router.admin, "GET /health/ready", "");
        ready.filter(|(status, _)| *status == 200)
    });
    let is_over = Arc::new(AtomicBool::new(false));
    let completed = Arc::new(AtomicUsize::new(0));
    let clients: Vec<_> = (0..4)
        .map(|client| {
            let (is_over, completed) = (Arc::clone(&is_over), Arc::clone(&completed));
            let api = router.api;
            std::thread::spawn(move || {
                let body = format!(
                    "{{\"model\": \"model\", \"prompt\": \"client {client}\", \"max_tokens\": 20, \
                     \"stream\": true}}"
                );
                while !is_over.load(Ordering::Relaxed) {
                    let (status, text) = exchange(api, "POST /v1/completions", &body).unwrap();
                    assert_eq!(status, 200, "{text}");
                    assert!(text.contains("[DONE]"), "{text}");
                    completed.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    let until_more = |requests: usize| {
        let target = completed.load(Ordering::Relaxed) + requests;
        eventually(|| (completed.load(Ordering::Relaxed) >= target).then_some(()));
    };
    // One of two workers changes each time.
    for members in [[1, 2], [2, 0], [0, 1]].iter().cycle().take(30) {
        router.write(&fleet(*members));
        assert_eq!(router.reload().0, 200);
        // A new worker gets requests after its first health check.
        eventually(|| {
            let (_, body) = exchange(router.admin, "GET /admin/workers", "")?;
            let list: Value = serde_json::from_str(&body).ok()?;
            let workers = list["workers"].as_array()?;
            let healthy = workers.iter().filter(|worker| worker["state"] == "healthy");
            (healthy.count() == 2).then_some(())
        });
        until_more(3);
    }
    is_over.store(true, Ordering::Relaxed);
    for client in clients {
        client.join().expect("a client failed");
    }
}
