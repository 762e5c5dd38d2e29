"""Routers as processes: command lines, readiness, and workers that join and leave at run time."""

from __future__ import annotations

import math
import re
import signal
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import environments
from engines import MODEL, Engine
from processes import LeagueError, Process, free_port, get_json, http, wait_until
from rows import Evidence, RouterEntry

#: Time that a router has until all of its workers are healthy.
READY_SECONDS = 45.0

#: Default time between two polls of the engines' load by SMG. In real time it would be several times
#: as long for an engine that runs at several times the real speed.
POLL_SECONDS = 10.0

NGINX_CONFIGURATION = """\
worker_processes auto;
daemon off;
pid nginx.pid;
error_log stderr error;
events {{ worker_connections 8192; }}
http {{
    access_log off;
    keepalive_requests 100000000;
    client_max_body_size 64m;
    client_body_buffer_size 1m;
    client_body_temp_path temporary;
    proxy_temp_path temporary;
    fastcgi_temp_path temporary;
    uwsgi_temp_path temporary;
    scgi_temp_path temporary;
    upstream engines {{
{servers}
        keepalive 512;
        keepalive_requests 100000000;
    }}
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    proxy_buffering off;
    proxy_read_timeout 600s;
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{ proxy_pass http://engines; }}
    }}
}}
"""


@dataclass
class Router:
    """A router in front of a fleet."""

    entry: RouterEntry
    port: int
    #: Port of the metrics, and of the admin API if it has its own.
    admin_port: int
    directory: Path
    command: list[str]
    process: Process | None = None
    #: The engines that nginx knows.
    nginx_engines: list[Engine] | None = None

    @classmethod
    def prepare(
        cls,
        entry: RouterEntry,
        engines: list[Engine],
        foresee: Path,
        environment: Path | None,
        speedup: float,
        directory: Path,
    ) -> Router:
        """Assigns ports and fills the placeholders of the command."""
        port, admin_port = free_port(), free_port()
        urls = [engine.url for engine in engines]
        lists = {
            "{worker_urls}": urls,
            # Arguments that occur once for each engine.
            "{workers_with_events}": [
                part
                for engine in engines
                for part in (
                    "--worker",
                    f"{engine.url},kv-events={engine.events},replay={engine.replay}",
                )
            ],
            "{kv_event_sources}": [
                part
                for engine in engines
                for part in (
                    "--kv-event-source",
                    f"{engine.url}={engine.events}",
                    "--kv-event-replay-source",
                    f"{engine.url}={engine.replay}",
                )
            ],
        }
        values = {
            "foresee": str(foresee),
            "python": str(environment / "bin" / "python") if environment else "",
            "bin": str(environment / "bin") if environment else "",
            "port": str(port),
            "admin_port": str(admin_port),
            "model": MODEL,
            "poll_seconds": str(max(1, math.floor(POLL_SECONDS / speedup))),
            "directory": str(directory),
            "nginx": environments.find_nginx() if entry.kind == "nginx" else "",
        }
        command: list[str] = []
        for part in entry.command:
            command += lists.get(part) or [part.format(**values)]
        router = cls(entry, port, admin_port, directory, command)
        if entry.kind == "nginx":
            router.nginx_engines = list(engines)
        return router

    @property
    def url(self) -> str:
        """Base URL for clients."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def admin(self) -> str:
        """Base URL of the metrics."""
        return f"http://127.0.0.1:{self.admin_port}"

    @property
    def pid(self) -> int:
        """Process id."""
        if self.process is None:
            raise LeagueError(f"{self.entry.name} was not started")
        return self.process.pid

    def start(self, worker_count: int) -> None:
        """Starts the process, and waits until it has `worker_count` healthy workers and has received
        from each of them what it waits for."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.nginx_engines is not None:
            self._write_nginx_configuration()
        self.process = Process.start(self.command, self.directory / "router.log")
        self._wait(f"{worker_count} healthy workers", lambda: self.workers() >= worker_count)
        for evidence in self.entry.evidence:
            if evidence.ready:
                ready = lambda: len(self.matches(evidence)) >= worker_count
                self._wait(evidence.what, ready)

    def stop(self) -> None:
        """Kills the router."""
        if self.process is not None:
            self.process.kill()

    def workers(self) -> int:
        """Returns the number of healthy workers that the router reports."""
        match self.entry.kind:
            case "foresee":
                answer = get_json(f"{self.admin}/admin/workers")
                workers = answer.get("workers", []) if isinstance(answer, dict) else []
                return sum(worker.get("state") == "healthy" for worker in workers)
            case "nginx":
                status, _ = http("GET", f"{self.url}/health")
                return len(self.nginx_engines or []) if status == 200 else 0
            case _:
                answer = get_json(f"{self.url}/readiness")
                return answer.get("healthy_workers", 0) if isinstance(answer, dict) else 0

    def add_worker(self, engine: Engine) -> None:
        """Adds a running engine."""
        match self.entry.kind:
            case "foresee":
                url = engine.url
                if "{workers_with_events}" in self.entry.command:
                    url += f",kv-events={engine.events},replay={engine.replay}"
                self._expect("POST", f"{self.admin}/admin/workers", {"url": url})
            case "smg" | "sglang":
                self._expect("POST", f"{self.url}/workers", {"url": engine.url})
            case "vllm":
                query = urllib.parse.urlencode({"url": engine.url})
                self._expect("POST", f"{self.url}/add_worker?{query}")
            case "nginx":
                assert self.nginx_engines is not None
                self.nginx_engines.append(engine)
                self._reload_nginx()
            case kind:
                raise LeagueError(f"workers cannot join a router of kind {kind}")

    def remove_worker(self, engine: Engine) -> None:
        """Takes an engine out. Its running requests continue."""
        match self.entry.kind:
            case "foresee":
                name = urllib.parse.quote(engine.url.removeprefix("http://"), safe="")
                self._expect("DELETE", f"{self.admin}/admin/workers/{name}")
            case "smg" | "sglang":
                self._expect("DELETE", f"{self.url}/workers/{self._worker_id(engine)}")
            case "vllm":
                query = urllib.parse.urlencode({"url": engine.url})
                self._expect("POST", f"{self.url}/remove_worker?{query}")
            case "nginx":
                assert self.nginx_engines is not None
                self.nginx_engines.remove(engine)
                self._reload_nginx()
            case kind:
                raise LeagueError(f"workers cannot leave a router of kind {kind}")

    def matches(self, evidence: Evidence) -> list[str]:
        """Returns the lines of the log or of the metrics that match a pattern."""
        if evidence.source == "log":
            text = (self.directory / "router.log").read_text(errors="replace")
        else:
            status, text = http("GET", f"{self.admin}/metrics")
            if status != 200:
                return []
        plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
        return [line for line in plain.splitlines() if re.search(evidence.pattern, line)]

    def _worker_id(self, engine: Engine) -> str:
        answer = get_json(f"{self.url}/workers")
        workers = answer.get("workers", []) if isinstance(answer, dict) else []
        for worker in workers:
            if worker.get("url", "").rstrip("/") == engine.url:
                return str(worker["id"])
        raise LeagueError(f"{self.entry.name} does not list the worker {engine.url}")

    def _expect(self, method: str, url: str, body: object = None) -> None:
        status, text = http(method, url, body, seconds=10.0)
        if not 200 <= status < 300:
            raise LeagueError(f"{self.entry.name}: {method} {url}: {status} {text[:300]}")

    def _wait(self, what: str, is_done: Callable[[], bool]) -> None:
        assert self.process is not None
        wait_until(f"{self.entry.name}: {what}", is_done, self.process, READY_SECONDS)

    def _write_nginx_configuration(self) -> None:
        assert self.nginx_engines is not None
        names = [engine.url.removeprefix("http://") for engine in self.nginx_engines]
        servers = "\n".join(f"        server {name};" for name in names)
        text = NGINX_CONFIGURATION.format(servers=servers, port=self.port)
        (self.directory / "nginx.conf").write_text(text)

    def _reload_nginx(self) -> None:
        self._write_nginx_configuration()
        assert self.process is not None
        self.process.child.send_signal(signal.SIGHUP)
