//! Signals and socket activation: `foresee serve` stops, and the next process takes over its socket.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::ports::ANY_PORT;

/// Time limit for expected conditions.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Calls `attempt` until it returns a value. Panics after a time limit.
fn eventually<T>(mut attempt: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(value) = attempt() {
            return value;
        }
        assert!(started.elapsed() < TIMEOUT, "the condition never held");
        std::thread::park_timeout(Duration::from_millis(2));
    }
}

/// A running `foresee serve` on inherited sockets.
struct Router(Child);

impl Router {
    /// Starts the program with the sockets of the API and the admin API, as a supervisor does.
    fn start(api: &TcpListener, admin: &TcpListener, options: &[&str]) -> Self {
        // The shell knows the process id that the program will have, and moves the sockets to the
        // file descriptors of the protocol.
        let script = "LISTEN_PID=$$ exec \"$0\" \"$@\" 3<&0 4<&1 </dev/null >/dev/null";
        let mut command = Command::new("sh");
        command
            .args(["-c", script, env!("CARGO_BIN_EXE_foresee"), "serve"])
            .args(options)
            .env("LISTEN_FDS", "2")
            .env("LISTEN_FDNAMES", "admin:api")
            .stdin(OwnedFd::from(admin.try_clone().unwrap()))
            .stdout(OwnedFd::from(api.try_clone().unwrap()))
            .stderr(Stdio::null());
        Self(command.spawn().unwrap())
    }

    /// Sends SIGTERM.
    fn terminate(&self) {
        let mut kill = Command::new("kill");
        assert!(
            kill.arg(self.0.id().to_string())
                .status()
                .unwrap()
                .success()
        );
    }

    /// Waits until the program has ended.
    fn wait(&mut self) -> ExitStatus {
        eventually(|| self.0.try_wait().unwrap())
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Sends a request on an open connection and returns the status and whether the response closes the
/// connection. Fails if the connection breaks off.
fn exchange(stream: &mut TcpStream, path: &str) -> std::io::Result<(u16, bool)> {
    write!(stream, "GET {path} HTTP/1.1\r\nhost: x\r\n\r\n")?;
    let mut reader = BufReader::new(stream);
    let mut status = String::new();
    if reader.read_line(&mut status)? == 0 {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    let (mut length, mut closes) = (0, false);
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let line = line.trim().to_lowercase();
        if let Some(value) = line.strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        closes |= line == "connection: close";
        if line.is_empty() {
            break;
        }
    }
    reader.read_exact(&mut vec![0; length])?;
    Ok((status.split(' ').nth(1).unwrap().parse().unwrap(), closes))
}

/// Opens a connection.
fn connect(address: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    Ok(stream)
}

/// Sends one request on a connection of its own and returns the status.
fn get(address: SocketAddr, path: &str) -> Option<u16> {
    let (status, _) = exchange(&mut connect(address).ok()?, path).ok()?;
    Some(status)
}

#[test]
fn a_restart_on_an_inherited_socket_loses_no_request() {
    let (api, admin) = (
        TcpListener::bind(ANY_PORT).unwrap(),
        TcpListener::bind(ANY_PORT).unwrap(),
    );
    let address = api.local_addr().unwrap();
    let admin_address = admin.local_addr().unwrap();
    let options = ["--shutdown-delay", "100ms", "--shutdown-timeout", "10s"];
    let mut router = Router::start(&api, &admin, &options);
    eventually(|| get(admin_address, "/health/live").filter(|status| *status == 200));
    let is_over = Arc::new(AtomicBool::new(false));
    let completed = Arc::new(AtomicUsize::new(0));
    // Half of the clients keep their connection until the router closes it.
    let clients: Vec<_> = [true, true, false, false]
        .into_iter()
        .map(|keeps_alive| {
            let (is_over, completed) = (Arc::clone(&is_over), Arc::clone(&completed));
            std::thread::spawn(move || {
                let mut open = None;
                while !is_over.load(Ordering::Relaxed) {
                    let mut stream = match open.take() {
                        Some(stream) => stream,
                        None => connect(address).expect("a connection was refused"),
                    };
                    let (status, closes) =
                        exchange(&mut stream, "/v1/models").expect("a connection was reset");
                    assert_eq!(status, 200);
                    completed.fetch_add(1, Ordering::Relaxed);
                    open = (keeps_alive && !closes).then_some(stream);
                }
            })
        })
        .collect();
    let until_more = |requests: usize| {
        let target = completed.load(Ordering::Relaxed) + requests;
        eventually(|| (completed.load(Ordering::Relaxed) >= target).then_some(()));
    };
    until_more(100);
    for _ in 0..2 {
        router.terminate();
        assert!(router.wait().success());
        router = Router::start(&api, &admin, &options);
        until_more(100);
    }
    is_over.store(true, Ordering::Relaxed);
    for client in clients {
        client.join().expect("a client failed");
    }
}

#[test]
fn a_second_signal_ends_the_program_at_once() {
    let (api, admin) = (
        TcpListener::bind(ANY_PORT).unwrap(),
        TcpListener::bind(ANY_PORT).unwrap(),
    );
    let admin_address = admin.local_addr().unwrap();
    let options = ["--shutdown-delay", "1h", "--shutdown-timeout", "1h"];
    let mut router = Router::start(&api, &admin, &options);
    eventually(|| get(admin_address, "/health/live").filter(|status| *status == 200));
    router.terminate();
    // Before the first signal, readiness fails as well, because there is no worker.
    eventually(|| {
        let mut stream = connect(admin_address).ok()?;
        let request = "GET /health/ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        stream.write_all(request.as_bytes()).ok()?;
        let mut response = String::new();
        stream.read_to_string(&mut response).ok()?;
        response.contains("shutting_down").then_some(())
    });
    assert_eq!(router.0.try_wait().unwrap(), None);
    router.terminate();
    assert!(router.wait().success());
}
