"""Saved runs: one JSON file each, written at once, and the order in which runs take place."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunKey:
    """Identity of a run."""

    row: str
    router: str
    seed: int

    @property
    def name(self) -> str:
        """Name of the run's files, without a suffix."""
        return f"{self.row}--{self.router}--{self.seed}"


def order(rows: list[str], routers: list[str], seeds: list[int]) -> list[RunKey]:
    """Returns all runs: for each seed and row, every router in turn. The router that begins rotates
    from one group to the next, so that none always meets a cold or a warm machine."""
    keys = []
    group = 0
    for seed in seeds:
        for row in rows:
            shift = group % len(routers) if routers else 0
            for router in routers[shift:] + routers[:shift]:
                keys.append(RunKey(row, router, seed))
            group += 1
    return keys


class Store:
    """The directory of results."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.runs = directory / "runs"

    def path(self, key: RunKey) -> Path:
        """Returns the path of a run's result."""
        return self.runs / f"{key.name}.json"

    def logs(self, key: RunKey) -> Path:
        """Returns the directory of a run's logs."""
        return self.directory / "logs" / key.name

    def missing(self, keys: list[RunKey], *, repeat_invalid: bool = False) -> list[RunKey]:
        """Returns the runs that have no result yet, in the same order. With `repeat_invalid`, void
        and failed runs are among them."""
        missing = []
        for key in keys:
            result = self.load(key)
            is_invalid = result is not None and bool(result.get("void") or result.get("error"))
            if result is None or (repeat_invalid and is_invalid):
                missing.append(key)
        return missing

    def save(self, key: RunKey, result: dict[str, Any]) -> None:
        """Writes a result so that a reader sees all of it or nothing."""
        write_atomically(self.path(key), json.dumps(result, indent=1) + "\n")

    def load(self, key: RunKey) -> dict[str, Any] | None:
        """Returns a result; `None` if there is none or the file is damaged."""
        return _read(self.path(key))

    def all(self) -> list[dict[str, Any]]:
        """Returns all results, sorted by the names of their files."""
        results = (_read(path) for path in sorted(self.runs.glob("*.json")))
        return [result for result in results if result is not None]


def write_atomically(path: Path, text: str) -> None:
    """Writes a file under another name and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(path.suffix + ".part")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        result = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return result if isinstance(result, dict) else None
