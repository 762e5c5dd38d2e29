"""Processes of a run: start and end, free ports, HTTP requests, CPU time and memory."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Ports from here on are tried one after the other. The range lies below the ports that the kernel
#: assigns to outgoing connections, which may wait for a minute after their end.
FIRST_PORT = 20_000
END_OF_PORTS = 32_000

_PR_SET_PDEATHSIG = 1
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_libc = ctypes.CDLL(None)
_next_port = FIRST_PORT


class LeagueError(Exception):
    """A run that cannot be carried out; the message says why."""


def free_port() -> int:
    """Returns a port of 127.0.0.1 that no process listens at and no earlier call returned lately."""
    global _next_port
    for _ in range(FIRST_PORT, END_OF_PORTS):
        port = _next_port
        _next_port = port + 1 if port + 1 < END_OF_PORTS else FIRST_PORT
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise LeagueError(f"no port is free from {FIRST_PORT} to {END_OF_PORTS - 1}")


@dataclass
class Process:
    """A running program whose output goes to a log file."""

    child: subprocess.Popen[bytes]
    log: Path

    @classmethod
    def start(cls, command: list[str], log: Path, cwd: Path | None = None) -> Process:
        """Starts a program in a process group of its own. The kernel kills it if this process dies."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        return cls(child, log)

    @property
    def pid(self) -> int:
        """Process id."""
        return self.child.pid

    def is_running(self) -> bool:
        """Returns whether the process has not ended."""
        return self.child.poll() is None

    def kill(self) -> None:
        """Kills the process group at once. Connections are cut, and nothing is flushed."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.child.wait()

    def last_lines(self, count: int = 5) -> str:
        """Returns the end of the log, for error messages."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-count:])


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@dataclass(frozen=True)
class Usage:
    """Resources that a process and its descendants have used."""

    cpu_seconds: float
    peak_rss_bytes: int

    @classmethod
    def of(cls, pid: int) -> Usage:
        """Reads the usage of the tree of processes below `pid` from /proc.

        The CPU time is user and system time, of reaped children too. The memory is the sum of the
        processes' peak resident sizes, so pages that they share count more than once.
        """
        ticks = 0
        peak_kib = 0
        for member in _tree(pid):
            try:
                stat = Path(f"/proc/{member}/stat").read_text()
                status = Path(f"/proc/{member}/status").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            # The name of the program, in parentheses, may contain spaces.
            fields = stat.rpartition(")")[2].split()
            ticks += sum(int(field) for field in fields[11:15])
            for line in status.splitlines():
                if line.startswith("VmHWM:"):
                    peak_kib += int(line.split()[1])
        return cls(ticks / _TICKS_PER_SECOND, peak_kib * 1024)


def _tree(pid: int) -> Iterator[int]:
    """Yields the process and its descendants."""
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            children = (task / "children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        for child in children:
            yield from _tree(int(child))


def http(method: str, url: str, body: Any = None, seconds: float = 2.0) -> tuple[int, str]:
    """Sends a request, with `body` as JSON. Returns the status, 0 without a response, and the body."""
    data = None if body is None else json.dumps(body).encode()
    headers = {} if data is None else {"content-type": "application/json"}
    request = urllib.request.Request(url, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=seconds) as response:
            return response.status, response.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")
    except (OSError, ValueError) as error:
        return 0, str(error)


def get_json(url: str) -> Any:
    """Returns the parsed body of a successful GET, or `None`."""
    status, body = http("GET", url)
    if not 200 <= status < 300:
        return None
    try:
        return json.loads(body)
    except ValueError:
        return None


def wait_until(
    what: str, is_done: Callable[[], bool], process: Process, seconds: float
) -> None:
    """Polls until `is_done()` is true.

    Raises `LeagueError` if the process ends before, or after the deadline.
    """
    deadline = time.monotonic() + seconds
    while not is_done():
        if not process.is_running():
            raise LeagueError(f"{what}: the process ended\n{process.last_lines()}")
        if time.monotonic() > deadline:
            raise LeagueError(f"{what}: not within {seconds:.0f} s\n{process.last_lines()}")
        time.sleep(0.05)
