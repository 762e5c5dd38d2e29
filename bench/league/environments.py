"""Virtual environments of the rivals, and the versions of all programs."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from processes import LeagueError
from rows import RouterEntry

#: Time that an installation may take.
INSTALL_SECONDS = 600


def prepare(directory: Path, package: str) -> Path:
    """Creates an environment for a package, or returns an existing one. A file marks a complete
    environment, so that an interrupted installation is repeated."""
    environment = directory / package.replace("==", "-")
    mark = environment / "complete"
    if mark.exists():
        return environment
    shutil.rmtree(environment, ignore_errors=True)
    print(f"installing {package}", file=sys.stderr)
    _run([sys.executable, "-m", "venv", str(environment)])
    pip = [str(environment / "bin" / "python"), "-m", "pip"]
    _run([*pip, "install", "--quiet", "--disable-pip-version-check", package])
    mark.touch()
    return environment


def version(entry: RouterEntry, foresee: Path) -> str:
    """Returns the version of a router's program."""
    if entry.package:
        return entry.package
    if entry.kind == "nginx":
        program = find_nginx()
        result = subprocess.run([program, "-v"], capture_output=True, text=True, timeout=10)
        return result.stderr.strip().removeprefix("nginx version: ")
    result = subprocess.run([foresee, "--version"], capture_output=True, text=True, timeout=10)
    # Builds of one version differ.
    digest = hashlib.sha256(foresee.read_bytes()).hexdigest()[:12]
    return f"{result.stdout.strip()} (sha256 {digest})"


def find_nginx() -> str:
    """Returns the path of nginx."""
    program = shutil.which("nginx")
    if program is None:
        raise LeagueError("nginx is not installed: install it, or leave it out with --routers")
    return program


def _run(command: list[str]) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise LeagueError(f"{' '.join(command)}: not within {INSTALL_SECONDS} s") from error
    if result.returncode != 0:
        raise LeagueError(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
