"""One run: fresh engines, a router, the load, and what was measured."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines import MODEL, Engine, Fleet
from processes import LeagueError, Process, Usage
from routers import Router
from rows import Event, League, RouterEntry, Row
from store import RunKey, Store

#: Pause between the readiness of the router and the load.
SETTLE_SECONDS = 0.5

#: Longest load, after which it is stopped and the run is recorded as failed.
LOAD_SECONDS = 180.0

#: Time that an engine which leaves has to complete its requests.
DRAIN_SECONDS = 30.0


@dataclass
class Bench:
    """Everything that the runs have in common."""

    league: League
    store: Store
    foresee: Path
    #: Directory of the trace files; `None` without them.
    traces: Path | None
    #: Base URLs of engines that run already; empty to start mock engines.
    engine_urls: tuple[str, ...]
    #: Environments by package.
    environments: dict[str, Path]

    def has_trace(self, row: Row) -> bool:
        """Returns whether the row needs no trace or its trace is there."""
        return not row.trace or (
            self.traces is not None and (self.traces / row.trace).is_file()
        )

    def run(self, key: RunKey) -> dict[str, Any]:
        """Carries out a run. A run whose client was late is repeated once, then recorded as void.

        An error of the router is a result too: the run is recorded with it.
        """
        result = self._attempt(key)
        if result["void"]:
            result = self._attempt(key)
            result["attempts"] = 2
        self.store.save(key, result)
        return result

    def _attempt(self, key: RunKey) -> dict[str, Any]:
        entry, row = self.league.router(key.router), self.league.row(key.row)
        logs = self.store.logs(key)
        shutil.rmtree(logs, ignore_errors=True)
        logs.mkdir(parents=True)
        result: dict[str, Any] = {
            "row": key.row,
            "router": key.router,
            "seed": key.seed,
            "fingerprint": self.league.fingerprint(key.row, key.router),
            "speedup": row.speedup,
            "attempts": 1,
            "void": False,
            "error": None,
        }
        began = time.monotonic()
        try:
            result |= self._measure(entry, row, key.seed, logs)
        except LeagueError as error:
            result["error"] = str(error)
        result["wall_seconds"] = round(time.monotonic() - began, 2)
        result["finished_at"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return result

    def _measure(self, entry: RouterEntry, row: Row, seed: int, logs: Path) -> dict[str, Any]:
        settings = self.league.settings
        fleet = self._fleet(row, seed, logs)
        environment = self.environments.get(entry.package)
        router = Router.prepare(
            entry, fleet.initial, self.foresee, environment, row.speedup, logs
        )
        try:
            fleet.start()
            router.start(len(fleet.initial))
            time.sleep(SETTLE_SECONDS)
            before = Usage.of(router.pid)
            report = self._load(row, seed, router, fleet, logs)
            after = Usage.of(router.pid)
            computed_tokens = [engine.computed_tokens() for engine in fleet.engines]
            evidence = [
                {"what": evidence.what, "seen": bool(lines), "line": (lines or [""])[-1][:400]}
                for evidence in entry.evidence
                for lines in [router.matches(evidence)]
            ]
        finally:
            router.stop()
            fleet.stop()
        outcome = report["outcome"]
        limit = row.max_client_delay_ms or settings.max_client_delay_ms
        delay = outcome["client_delay"]["p99"] / row.speedup * 1000.0
        cpu = after.cpu_seconds - before.cpu_seconds
        return {
            "command": router.command,
            "load": _load_flags(row, self.traces),
            "outcome": outcome,
            "lost": sum(failures["count"] for failures in outcome["failed"].values()),
            "client_delay_p99_ms": delay,
            "void": delay > limit,
            "cpu_ms_per_request": cpu * 1000.0 / max(outcome["sent"], 1),
            "peak_rss_mib": after.peak_rss_bytes / 2**20,
            "computed_tokens_by_engine": computed_tokens,
            "evidence": evidence,
        }

    def _fleet(self, row: Row, seed: int, logs: Path) -> Fleet:
        """Returns the engines of a run."""
        if self.engine_urls:
            return Fleet.running(self.engine_urls, logs)
        count = self.league.settings.engines
        return Fleet.prepare(
            self.foresee,
            count,
            list(row.engine),
            row.engine_speedups(count),
            row.late,
            seed,
            logs,
        )

    def _load(
        self, row: Row, seed: int, router: Router, fleet: Fleet, logs: Path
    ) -> dict[str, Any]:
        """Sends the load and carries out the row's events. Returns the report."""
        report = logs / "load.json"
        max_tokens = self.league.settings.max_tokens
        command = [str(self.foresee), "load", router.url, "--model", MODEL]
        command += ["--seed", str(seed), "--speedup", str(row.speedup), "--timeout", "2m"]
        command += ["--max-tokens", str(max_tokens)] if max_tokens else []
        command += ["--json", str(report), *_load_flags(row, self.traces)]
        load = Process.start(command, logs / "load.log")
        began = time.monotonic()
        events = list(row.events)
        leaving: list[tuple[Engine, float]] = []
        try:
            while load.is_running():
                elapsed = time.monotonic() - began
                if elapsed > LOAD_SECONDS:
                    raise LeagueError(f"the load did not end within {LOAD_SECONDS:.0f} s")
                while events and events[0].at <= elapsed:
                    _carry_out(events.pop(0), router, fleet, leaving)
                for leaver in list(leaving):
                    engine, removed_at = leaver
                    is_over = elapsed - removed_at > DRAIN_SECONDS
                    # The router may take a moment to forget the engine.
                    if is_over or (elapsed - removed_at > 2.0 and engine.is_idle()):
                        leaving.remove(leaver)
                        if engine.process is not None:
                            engine.process.kill()
                time.sleep(0.05)
        finally:
            load.kill()
        if not report.is_file():
            raise LeagueError(f"the load could not be sent:\n{load.last_lines()}")
        document: dict[str, Any] = json.loads(report.read_text())
        return document


def _carry_out(
    event: Event, router: Router, fleet: Fleet, leaving: list[tuple[Engine, float]]
) -> None:
    engine = fleet.engines[event.engine]
    match event.action:
        case "join":
            engine.start()
            engine.wait_until_healthy()
            router.add_worker(engine)
        case "leave":
            router.remove_worker(engine)
            leaving.append((engine, event.at))
        case "fail":
            engine.set_fault(failing=True)
        case "slow":
            engine.set_fault(slowdown=event.slowdown)
        case "recover":
            engine.set_fault()


def _load_flags(row: Row, traces: Path | None) -> list[str]:
    """Returns the flags of the workload."""
    if not row.trace:
        return list(row.load)
    if traces is None:
        raise LeagueError(f"row {row.name} needs --trace-dir with {row.trace}")
    return ["--trace", str(traces / row.trace), *row.load]
