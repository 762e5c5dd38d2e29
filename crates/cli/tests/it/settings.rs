//! Settings of `serve` from flags, the environment and a file.

#![allow(clippy::unwrap_used, missing_docs)]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::ports::free_port;
use crate::process::{Process, eventually, exchange};

/// A configuration file, removed at the end of a test.
struct ConfigFile(PathBuf);

impl ConfigFile {
    fn new(text: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("foresee-settings-{}-{number}.toml", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, text).unwrap();
        Self(path)
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for ConfigFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Runs `check-config` with these variables only.
fn check(variables: &[(&str, &str)], flags: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_foresee"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("FORESEE_") {
            command.env_remove(name);
        }
    }
    let command = command.arg("check-config").args(flags);
    let command = command.envs(variables.iter().copied());
    command.stdin(Stdio::null()).output().unwrap()
}

/// Returns the effective settings as they are printed.
fn printed(variables: &[(&str, &str)], flags: &[&str]) -> String {
    let output = check(variables, flags);
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{flags:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

/// Returns the effective settings.
fn effective(variables: &[(&str, &str)], flags: &[&str]) -> toml::Table {
    printed(variables, flags).parse().unwrap()
}

/// Returns the error for a file with this text.
fn refused(text: &str) -> String {
    let file = ConfigFile::new(text);
    let output = check(&[], &["--config", file.path()]);
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.contains(file.path()), "the file is named: {error}");
    error
}

/// Returns the URLs of the workers.
fn urls(settings: &toml::Table) -> Vec<&str> {
    let workers = settings.get("worker").and_then(toml::Value::as_array);
    let urls = workers.into_iter().flatten();
    urls.map(|worker| worker["url"].as_str().unwrap()).collect()
}

#[test]
fn a_flag_overrides_the_environment() {
    let variables = [
        ("FORESEE_POLICY", "random"),
        ("FORESEE_WORKER", "http://env:1"),
        ("FORESEE_LISTEN", "127.0.0.1:1"),
    ];
    let flags = ["--policy", "kv", "--worker", "http://flag:1", "--port", "2"];
    let settings = effective(&variables, &flags);
    assert_eq!(settings["policy"].as_str(), Some("kv"));
    assert_eq!(settings["listen"].as_str(), Some("127.0.0.1:2"));
    assert_eq!(urls(&settings), ["http://flag:1"]);
    let settings = effective(&variables, &["--worker-urls", "http://flag:1"]);
    assert_eq!(urls(&settings), ["http://flag:1"]);
}

#[test]
fn the_environment_overrides_the_file() {
    let file = ConfigFile::new(
        "policy = \"kv\"\ntemperature = 0.5\nworker = [\"http://file:1\"]\nlisten = \":3\"\n",
    );
    let variables = [
        ("FORESEE_CONFIG", file.path()),
        ("FORESEE_POLICY", "random"),
        ("FORESEE_WORKER_URLS", "http://env:1,http://env:2"),
        ("FORESEE_LISTEN", "127.0.0.1:1"),
    ];
    let settings = effective(&variables, &[]);
    assert_eq!(settings["policy"].as_str(), Some("random"));
    assert_eq!(settings["listen"].as_str(), Some("127.0.0.1:1"));
    assert_eq!(settings["temperature"].as_float(), Some(0.5));
    assert_eq!(urls(&settings), ["http://env:1", "http://env:2"]);
}

#[test]
fn a_flag_overrides_the_file() {
    let file = ConfigFile::new(
        "policy = \"kv\"\nblock_size = 32\nworker = [\"http://file:1\"]\nlisten = \":3\"\n",
    );
    let flags = [
        "--config",
        file.path(),
        "--policy",
        "random",
        "--host",
        "::1",
    ];
    let settings = effective(
        &[],
        &[&flags[..], &["--worker-urls", "http://flag:1"]].concat(),
    );
    assert_eq!(settings["policy"].as_str(), Some("random"));
    assert_eq!(settings["listen"].as_str(), Some("[::1]:8080"));
    assert_eq!(settings["block-size"].as_integer(), Some(32));
    assert_eq!(urls(&settings), ["http://flag:1"]);
}

#[test]
fn a_file_has_typed_values_and_tables_of_workers() {
    let file = ConfigFile::new(
        r#"
listen = "localhost:8000"
max_body_size = "2MiB"
probe-interval = "250ms"
prefix-caching = false
queue-limit = 7
ttft-weight = 2
log-level = "warn"

[[worker]]
url = "http://a:1"
name = "first"
ranks = 2
blocks = 100
prefix_caching = true
eviction = "radix"
kv_events = "tcp://a:5557"
replay = "tcp://a:5657"
topic = "kv"

[[worker]]
url = "http://b:2"
kv-events = false
"#,
    );
    let settings = effective(&[], &["--config", file.path()]);
    assert_eq!(settings["listen"].as_str(), Some("127.0.0.1:8000"));
    assert_eq!(settings["max-body-size"].as_str(), Some("2MiB"));
    assert_eq!(settings["probe-interval"].as_str(), Some("250ms"));
    assert_eq!(settings["prefix-caching"].as_bool(), Some(false));
    assert_eq!(settings["queue-limit"].as_integer(), Some(7));
    assert_eq!(settings["log-level"].as_str(), Some("warn"));
    let workers = settings["worker"].as_array().unwrap();
    assert_eq!(workers[0]["ranks"].as_integer(), Some(2));
    assert_eq!(workers[0]["topic"].as_str(), Some("kv"));
    assert_eq!(workers[1]["name"].as_str(), Some("b:2"));
    assert_eq!(workers[1]["kv_events"].as_bool(), Some(false));
}

#[test]
fn printed_settings_can_be_read_back() {
    let many_flags = [
        "--policy",
        "kv",
        "--queue-limit",
        "9",
        "--engine-metrics-interval",
        "5s",
        "--record",
        "/tmp/quoted \"name\".jsonl",
        "--worker",
        "http://a:1/base,name=x,ranks=2,prefix-caching=off,kv-events=bind:tcp://*:5557",
        "--worker-urls",
        "http://b:2",
        "http://c:3",
    ];
    for flags in [&many_flags[..], &[]] {
        let first = printed(&[], flags);
        let file = ConfigFile::new(&first);
        assert_eq!(printed(&[], &["--config", file.path()]), first);
    }
    let settings = effective(&[], &many_flags);
    assert_eq!(
        settings["queue"].as_str(),
        Some("off"),
        "the default under kv is no queue"
    );
    assert_eq!(urls(&settings).len(), 3);
    let settings = effective(&[], &[]);
    assert_eq!(settings["queue"].as_str(), Some("shortest"));
}

#[test]
fn mistakes_in_a_file_name_the_file_the_key_and_the_remedy() {
    for (text, parts) in [
        ("polcy = \"random\"", &["`polcy`", "`policy`"][..]),
        ("tempreature = 1", &["`tempreature`", "`temperature`"]),
        (
            "policy = \"cache_aware\"",
            &["--policy", "'marginal-delay'"],
        ),
        ("probe-interval = 1", &["--probe-interval", "1s"]),
        ("policy = [\"kv\", \"random\"]", &["`policy`", "one value"]),
        ("policy = true", &["`policy`", "boolean"]),
        ("block-size = 16\nblock_size = 32", &["twice"]),
        ("worker = [\"http://a:1,colour=red\"]", &["`colour`"]),
        ("[[worker]]\nname = \"x\"", &["worker", "`url`"]),
        (
            "[[worker]]\nurl = \"a:1\"\nevection = \"radix\"",
            &["`eviction`"],
        ),
        ("config = \"other.toml\"", &["`config`"]),
        ("policy = ", &["TOML"]),
    ] {
        let error = refused(text);
        for part in parts {
            assert!(error.contains(part), "{text}: no {part} in {error}");
        }
    }
}

#[test]
fn files_of_tls_can_be_named_by_flag_variable_and_file() {
    let file = ConfigFile::new("tls-certificate = \"/nonexistent/chain.pem\"\n");
    let flags = [
        "--config",
        file.path(),
        "--tls-client-ca",
        "/nonexistent/ca.pem",
    ];
    let variables = [("FORESEE_TLS_KEY", "/nonexistent/key.pem")];
    // All of them are read; the first one does not exist.
    let error = check(&variables, &flags);
    let error = String::from_utf8_lossy(&error.stderr).into_owned();
    assert!(error.contains("cannot use /nonexistent"), "{error}");
    for (variable, missing) in [
        (("FORESEE_TLS_KEY", "key.pem"), "--tls-certificate"),
        (("FORESEE_TLS_CERTIFICATE", "chain.pem"), "--tls-key"),
        (("FORESEE_TLS_CLIENT_CA", "ca.pem"), "--tls-certificate"),
        (
            ("FORESEE_WORKER_TLS_KEY", "key.pem"),
            "--worker-tls-certificate",
        ),
    ] {
        let output = check(&[variable], &[]);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(error.contains(missing), "{error}");
    }
}

#[test]
fn numbers_are_printed_as_toml_has_them() {
    let settings = effective(&[], &["--overlap-weight", ".5", "--ttft-weight", "2."]);
    let text = settings["overlap-weight"].as_str();
    assert_eq!(text, Some(".5"));
    let again = ConfigFile::new(&toml::to_string(&settings).unwrap());
    let settings = effective(&[], &["--config", again.path()]);
    assert_eq!(settings["ttft-weight"].as_str(), Some("2."));
}

#[test]
fn the_listen_address_cannot_be_set_twice() {
    let output = check(&[], &["--listen", ":1", "--port", "2"]);
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.contains("--port"), "{error}");
    let settings = effective(&[], &["--host", "0.0.0.0", "--port", "9000"]);
    assert_eq!(settings["listen"].as_str(), Some("0.0.0.0:9000"));
}

#[test]
fn the_admin_listener_is_off_a_socket_or_an_address() {
    for (given, expected) in [
        ("off", "off"),
        ("unix:/run/admin.sock", "unix:/run/admin.sock"),
        ("127.0.0.1:1", "127.0.0.1:1"),
    ] {
        let settings = effective(&[("FORESEE_ADMIN_LISTEN", given)], &[]);
        assert_eq!(settings["admin-listen"].as_str(), Some(expected));
    }
    let file = ConfigFile::new(
        "admin-listen = \":1\"\nadmin-open = true\nadmin-host = [\"a.example\", \"b\"]\n",
    );
    let settings = effective(&[], &["--config", file.path()]);
    assert_eq!(settings["admin-open"].as_bool(), Some(true));
    let hosts = settings["admin-host"].as_array().unwrap();
    assert_eq!(hosts.len(), 2);
    let settings = effective(&[("FORESEE_ADMIN_HOST", "a,b,c")], &[]);
    assert_eq!(settings["admin-host"].as_array().unwrap().len(), 3);

    for flags in [
        &["--admin-listen", "8081"][..],
        &["--admin-listen", "unix:"],
        &["--admin-host", "http://a"],
        &["--admin-host", "a:8081"],
    ] {
        assert_eq!(check(&[], flags).status.code(), Some(2), "{flags:?}");
    }
}

#[test]
fn an_admin_api_for_other_hosts_needs_a_key_or_permission() {
    let public = ["--admin-listen", ":1"];
    let output = check(&[], &public);
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{error}");
    for remedy in ["--admin-key-file", "loopback", "--admin-open"] {
        assert!(error.contains(remedy), "{error}");
    }
    effective(&[], &[&public[..], &["--admin-open"]].concat());
    effective(&[("FORESEE_ADMIN_OPEN", "on")], &public);
    let key = ConfigFile::new("s3cret\n");
    effective(
        &[],
        &[&public[..], &["--admin-key-file", key.path()]].concat(),
    );
    effective(&[("FORESEE_ADMIN_KEY_FILE", key.path())], &public);
    let from_variable = printed(&[("FORESEE_ADMIN_KEY", "s3cret")], &public);
    assert!(!from_variable.contains("s3cret"), "{from_variable}");

    let two_words = ConfigFile::new("two words\n");
    let both = [
        ("FORESEE_ADMIN_KEY", "s3cret"),
        ("FORESEE_ADMIN_KEY_FILE", key.path()),
    ];
    for (variables, part) in [
        (&both[..], "both set"),
        (&[("FORESEE_ADMIN_KEY", "")], "FORESEE_ADMIN_KEY"),
        (
            &[("FORESEE_ADMIN_KEY_FILE", "/no/such/file")],
            "/no/such/file",
        ),
        (
            &[("FORESEE_METRICS_KEY_FILE", two_words.path())],
            "visible ASCII",
        ),
    ] {
        let output = check(variables, &[]);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(error.contains(part), "{part} in {error}");
        assert!(!error.contains("s3cret"), "{error}");
    }
}

/// Reads the examples of the documentation.
#[test]
fn documented_files_are_valid() {
    let page = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../docs/configuration.in.md"
    );
    let page = std::fs::read_to_string(page).unwrap();
    let examples = page.split("```toml\n").skip(1);
    let examples = examples.map(|rest| rest.split("```").next().unwrap());
    let mut count = 0;
    for example in examples {
        // The tokenizer of the example does not exist on this machine.
        let lines = example
            .lines()
            .filter(|line| !line.starts_with("tokenizer"));
        let file = ConfigFile::new(&lines.collect::<Vec<_>>().join("\n"));
        let settings = effective(&[], &["--config", file.path()]);
        assert!(!urls(&settings).is_empty());
        count += 1;
    }
    assert_eq!(count, 2);
}

#[test]
fn health_checks_and_keys_of_workers_are_settings() {
    let key = ConfigFile::new("sk-secret\n");
    let text = format!(
        "health-path = \"/ping\"\nhealthy_threshold = 3\nhealth-timeout = \"500ms\"\n\
         worker-api-key-file = \"{0}\"\n\n\
         [[worker]]\nurl = \"http://gpu1:8000\"\nhealth_path = \"none\"\nresolve = false\n\
         api_key = \"file:{0}\"\n",
        key.path()
    );
    let file = ConfigFile::new(&text);
    let flags = ["--config", file.path(), "--unhealthy-threshold", "5"];
    let text = printed(&[("FORESEE_WORKER_API_KEY", "sk-other")], &flags);
    assert!(!text.contains("sk-"), "{text}");
    let settings: toml::Table = text.parse().unwrap();
    assert_eq!(settings["health-path"].as_str(), Some("/ping"));
    assert_eq!(settings["healthy-threshold"].as_integer(), Some(3));
    assert_eq!(settings["unhealthy-threshold"].as_integer(), Some(5));
    assert_eq!(settings["health-timeout"].as_str(), Some("500ms"));
    assert_eq!(settings["worker-api-key-file"].as_str(), Some(key.path()));
    let worker = &settings["worker"][0];
    assert_eq!(worker["health_path"].as_str(), Some("none"));
    assert_eq!(worker["resolve"].as_bool(), Some(false));
    let source = format!("file:{}", key.path());
    assert_eq!(worker["api_key"].as_str(), Some(&*source));
}

#[test]
fn a_key_that_cannot_be_used_is_an_invalid_configuration() {
    let flags = ["--worker-api-key-file", "/nonexistent/key"];
    let missing = check(&[], &flags);
    assert_eq!(missing.status.code(), Some(2));
    let error = String::from_utf8(missing.stderr).unwrap();
    assert!(error.contains("/nonexistent/key"), "{error}");

    let invalid = check(&[("FORESEE_WORKER_API_KEY", "sk secret")], &[]);
    assert_eq!(invalid.status.code(), Some(2));
    let error = String::from_utf8(invalid.stderr).unwrap();
    assert!(!error.contains("secret"), "{error}");
}

#[test]
fn check_config_reports_the_health_of_workers() {
    let engine = format!("127.0.0.1:{}", free_port());
    let address: SocketAddr = engine.parse().unwrap();
    let _engine = Process::start(&["mock-engine", "--listen", &engine]);
    eventually(|| exchange(address, "GET /health", "").filter(|(status, _)| *status == 200));
    let check = |workers: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_foresee"));
        command.args(["check-config", "--check-workers", "--worker-urls"]);
        let output = command.args(workers).output().unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    let (code, text) = check(&[&engine]);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("healthy; models: model"), "{text}");
    let (code, text) = check(&[&engine, "127.0.0.1:1"]);
    assert_eq!(code, Some(1), "{text}");
    assert!(
        text.contains("127.0.0.1:1 (http://127.0.0.1:1): not healthy: "),
        "{text}"
    );
}
