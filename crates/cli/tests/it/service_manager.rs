//! Messages to the service manager, over a real socket of the protocol of `sd_notify`.

#![allow(clippy::unwrap_used, missing_docs)]

use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::time::Duration;

use crate::ports::free_port;
use crate::process::{Process, exchange};

/// The end of the protocol that systemd has.
struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Manager {
    /// Opens the socket.
    fn start(name: &str) -> Self {
        let path = format!("foresee-notify-{name}-{}", std::process::id());
        let path = std::env::temp_dir().join(path);
        let _ = std::fs::remove_file(&path);
        let socket = UnixDatagram::bind(&path).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        Self { socket, path }
    }

    /// Waits for a message and returns its lines.
    fn receive(&self) -> Vec<String> {
        let mut buffer = [0; 4096];
        let length = self.socket.recv(&mut buffer).unwrap();
        let text = String::from_utf8(buffer[..length].to_vec()).unwrap();
        text.lines().map(str::to_owned).collect()
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[test]
fn the_service_manager_learns_that_the_router_serves_reloads_and_stops() {
    let manager = Manager::start("phases");
    let file = manager.path.with_extension("toml");
    std::fs::write(&file, "queue-limit = 5\n").unwrap();
    let [api, admin] = [free_port(), free_port()].map(|port| format!("127.0.0.1:{port}"));
    let arguments = [
        "serve",
        "--config",
        file.to_str().unwrap(),
        "--listen",
        &api,
        "--admin-listen",
        &admin,
        "--shutdown-delay",
        "1ms",
    ];
    let variables = [("NOTIFY_SOCKET", manager.path.to_str().unwrap())];
    let mut router = Process::start_with(&variables, &arguments);

    assert_eq!(manager.receive(), ["READY=1"]);
    // The router accepts connections by then, so the request is not repeated.
    let (status, _) = exchange(admin.parse().unwrap(), "GET /health/live", "").unwrap();
    assert_eq!(status, 200);

    // The router is ready again after a reload that applies, and after one that does not.
    for text in ["queue-limit = 6\n", "nonsense"] {
        std::fs::write(&file, text).unwrap();
        router.signal("-HUP");
        let reloading = manager.receive();
        assert_eq!(reloading[0], "RELOADING=1");
        let time = reloading[1].strip_prefix("MONOTONIC_USEC=").unwrap();
        assert!(time.parse::<u64>().unwrap() > 0, "{reloading:?}");
        assert_eq!(manager.receive(), ["READY=1"]);
    }

    router.signal("-TERM");
    assert_eq!(manager.receive(), ["STOPPING=1"]);
    assert!(router.wait().success());
    std::fs::remove_file(&file).unwrap();
}

#[test]
fn a_service_manager_that_is_gone_does_not_stop_the_router() {
    let admin = format!("127.0.0.1:{}", free_port());
    let arguments = [
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--admin-listen",
        &admin,
        "--shutdown-delay",
        "1ms",
    ];
    let variables = [("NOTIFY_SOCKET", "/nonexistent/notify")];
    let mut router = Process::start_with(&variables, &arguments);
    let address = admin.parse().unwrap();
    crate::process::eventually(|| exchange(address, "GET /health/live", ""));
    router.signal("-TERM");
    assert!(router.wait().success());
}
