"""Reads the routers of routers.toml, and the settings and rows of rows.toml or of another file."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

HERE = Path(__file__).resolve().parent

#: Actions of an event.
ACTIONS = ("join", "leave", "fail", "slow", "recover")


_Entry = TypeVar("_Entry", "RouterEntry", "Row")


class RowsError(Exception):
    """An invalid file; the message names the entry and the remedy."""


@dataclass(frozen=True)
class Settings:
    """Settings that apply to all rows."""

    engines: int
    seeds: int
    max_seeds: int
    max_client_delay_ms: float
    #: `max_tokens` of each request, so that no router can read the length of its output; 0 to send
    #: that length.
    max_tokens: int


@dataclass(frozen=True)
class Evidence:
    """A line that shows that an input of a router arrived: a regular expression and where to search."""

    what: str
    source: str
    pattern: str
    #: Whether the line must occur before the load is sent, once for each engine.
    ready: bool


@dataclass(frozen=True)
class RouterEntry:
    """A router with its settings."""

    name: str
    kind: str
    #: Requirement of pip, such as `smg==1.13.0`; empty for programs that are on this machine.
    package: str
    command: tuple[str, ...]
    evidence: tuple[Evidence, ...]
    #: Whether it runs unless `--routers` says otherwise.
    default: bool


@dataclass(frozen=True)
class Event:
    """A change of the fleet while the load is sent."""

    #: Seconds of real time after the start of the load.
    at: float
    action: str
    engine: int
    slowdown: float


@dataclass(frozen=True)
class Row:
    """A workload, the engines that serve it, and what happens meanwhile."""

    name: str
    description: str
    engine: tuple[str, ...]
    speedup: float
    load: tuple[str, ...]
    trace: str
    speeds: tuple[tuple[int, float], ...]
    events: tuple[Event, ...]
    #: The load with `--quick`; empty if the row is not one of the quick ones.
    quick: tuple[str, ...]
    #: Overrides the league's limit; 0 if it does not.
    max_client_delay_ms: float

    def shortened(self) -> Row:
        """Returns the row with its quick load."""
        return replace(self, load=self.quick)

    @property
    def late(self) -> frozenset[int]:
        """Engines that join while the load is sent."""
        return frozenset(event.engine for event in self.events if event.action == "join")

    def engine_speedups(self, count: int) -> list[float]:
        """Returns the speed-up of each engine."""
        speeds = dict(self.speeds)
        return [self.speedup * speeds.get(index, 1.0) for index in range(count)]


@dataclass(frozen=True)
class League:
    """Settings, routers and rows."""

    settings: Settings
    routers: tuple[RouterEntry, ...]
    rows: tuple[Row, ...]

    def router(self, name: str) -> RouterEntry:
        """Returns the router with this name."""
        return _named(self.routers, name, "router")

    def shortened(self) -> League:
        """Returns the league with only the quick rows and their quick loads."""
        return replace(self, rows=tuple(row.shortened() for row in self.rows if row.quick))

    def fingerprint(self, row: str, router: str) -> str:
        """Returns a hash of everything that is set for a row and a router."""
        settings = (self.settings.engines, self.settings.max_tokens)
        text = repr((settings, self.row(row), self.router(router)))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def row(self, name: str) -> Row:
        """Returns the row with this name."""
        return _named(self.rows, name, "row")


def read(path: Path, routers: Path = HERE / "routers.toml") -> League:
    """Reads a file with rows and one with routers. Raises `RowsError` if one is invalid."""
    return parse(path.read_text(), routers.read_text())


def parse(text: str, routers_text: str) -> League:
    """Parses the texts of a file with rows and of one with routers. Raises `RowsError` if one is
    invalid."""
    document, routers_document = _toml(text), _toml(routers_text)
    settings = Settings(**_fields("league", document.get("league", {}), _SETTINGS, {"max_tokens": 0}))
    routers = tuple(_router(entry) for entry in routers_document.get("router", []))
    rows = tuple(_row(entry, settings.engines) for entry in document.get("row", []))
    for what, entries in (("router", routers), ("row", rows)):
        names = [entry.name for entry in entries]
        for name in names:
            if names.count(name) > 1:
                raise RowsError(f"{what} {name} occurs twice: give each a name of its own")
    return League(settings, routers, rows)


def _toml(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RowsError(f"not TOML: {error}") from error


_SETTINGS = {
    "engines": int,
    "seeds": int,
    "max_seeds": int,
    "max_client_delay_ms": float,
}


def _router(entry: dict[str, Any]) -> RouterEntry:
    where = f"router {entry.get('name', '?')}"
    required = {"name": str, "kind": str, "command": list}
    optional = {"package": "", "evidence": [], "default": True}
    fields = _fields(where, entry, required, optional)
    evidence = []
    for line in fields["evidence"]:
        needed = {"what": str, "source": str, "pattern": str}
        values = _fields(f"evidence of {where}", line, needed, {"ready": False})
        if values["source"] not in ("log", "metrics"):
            raise RowsError(f"evidence of {where}: source must be log or metrics")
        evidence.append(Evidence(**values))
    return RouterEntry(
        name=fields["name"],
        kind=fields["kind"],
        package=fields["package"],
        command=tuple(str(part) for part in fields["command"]),
        evidence=tuple(evidence),
        default=bool(fields["default"]),
    )


def _row(entry: dict[str, Any], engines: int) -> Row:
    where = f"row {entry.get('name', '?')}"
    required = {"name": str, "description": str, "engine": list, "speedup": float, "load": list}
    optional = {"trace": "", "speeds": {}, "event": [], "quick": [], "max_client_delay_ms": 0}
    fields = _fields(where, entry, required, optional)
    events = []
    for event in fields["event"]:
        needed = {"at": float, "action": str, "engine": int}
        values = _fields(f"event of {where}", event, needed, {"slowdown": 1.0})
        if values["action"] not in ACTIONS:
            raise RowsError(f"event of {where}: action must be one of {', '.join(ACTIONS)}")
        events.append(Event(**values))
    speeds = tuple((int(index), float(speed)) for index, speed in fields["speeds"].items())
    indices = [event.engine for event in events] + [index for index, _ in speeds]
    if any(not 0 <= index < engines for index in indices):
        raise RowsError(f"{where}: engines are numbered from 0 to {engines - 1}")
    return Row(
        name=fields["name"],
        description=fields["description"],
        engine=tuple(str(part) for part in fields["engine"]),
        speedup=float(fields["speedup"]),
        load=tuple(str(part) for part in fields["load"]),
        trace=fields["trace"],
        speeds=speeds,
        events=tuple(sorted(events, key=lambda event: event.at)),
        quick=tuple(str(part) for part in fields["quick"]),
        max_client_delay_ms=float(fields["max_client_delay_ms"]),
    )


def _fields(
    where: str, entry: dict[str, Any], required: Mapping[str, type], optional: dict[str, Any]
) -> dict[str, Any]:
    """Returns the fields of a table with its defaults. Raises `RowsError` for a missing, unknown or
    mistyped field."""
    for name in entry:
        if name not in required and name not in optional:
            known = ", ".join([*required, *optional])
            raise RowsError(f"{where}: unknown field {name}; known fields: {known}")
    fields = dict(optional)
    for name, kind in required.items():
        if name not in entry:
            raise RowsError(f"{where}: field {name} is missing")
        value = entry[name]
        if kind is float and isinstance(value, int):
            value = float(value)
        if not isinstance(value, kind):
            raise RowsError(f"{where}: {name} must be a {kind.__name__}, not {value!r}")
        fields[name] = value
    for name in optional:
        fields[name] = entry.get(name, optional[name])
    return fields


def _named(entries: tuple[_Entry, ...], name: str, what: str) -> _Entry:
    for entry in entries:
        if entry.name == name:
            return entry
    known = ", ".join(entry.name for entry in entries)
    raise RowsError(f"no {what} is named {name}; known: {known}")
