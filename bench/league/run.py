#!/usr/bin/env python3
"""Compares Foresee with other routers: the same traffic, before the same mock engines, one router at
a time. README.md describes the method."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path

import environments
import report
import rows
from measure import Bench
from processes import LeagueError
from rows import League, RowsError
from store import RunKey, Store, order, write_atomically

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TARGET = ROOT / "target"


def arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--foresee", type=Path, default=TARGET / "release" / "foresee", help="program to measure")
    add("--rows", type=Path, default=HERE / "rows.toml", help="rows and their settings")
    add("--engines", metavar="URL,…", help="running vLLM engines, in place of mock engines")
    add("--venvs", type=Path, default=TARGET / "league" / "venvs", help="environments of the rivals")
    add("--out", type=Path, help="results and logs [default: target/league/results, or …/quick]")
    add("--trace-dir", type=Path, help="directory of the trace files")
    add("--only", metavar="ROW,…", help="rows to run")
    add("--routers", metavar="ROUTER,…", help="routers to run, variants included")
    add("--seeds", type=int, metavar="N", help="number of seeds")
    add("--quick", action="store_true", help="four short rows and one seed")
    add("--until-decided", action="store_true", help="add seeds to rows that are undecided")
    add("--repeat-invalid", action="store_true", help="repeat runs that were void or failed")
    add("--report", action="store_true", help="only print the report of saved results")
    return parser.parse_args()


def main() -> int:
    """Runs the league and returns the exit code."""
    # Stops the processes of a run when the league is terminated.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = arguments()
    try:
        league = rows.read(options.rows)
        if options.quick:
            league = league.shortened()
        out = options.out or TARGET / "league" / ("quick" if options.quick else "results")
        store = Store(out.resolve())
        if not options.report:
            _run(options, league, store)
        _report(options, league, store)
    except (LeagueError, RowsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


def _run(options: argparse.Namespace, league: League, store: Store) -> None:
    foresee = options.foresee.resolve()
    if not foresee.is_file():
        raise LeagueError(f"{foresee} does not exist: run `cargo build --release`, or set --foresee")
    routers = [router for router in league.routers if router.default]
    if options.routers:
        routers = [league.router(name) for name in options.routers.split(",")]
    chosen = list(league.rows)
    if options.only:
        chosen = [league.row(name) for name in options.only.split(",")]
    packages = {router.package for router in routers if router.package}
    venvs = options.venvs.resolve()
    urls = tuple(options.engines.split(",")) if options.engines else ()
    if urls and len(urls) != league.settings.engines:
        raise LeagueError(f"the rows need {league.settings.engines} engines, not {len(urls)}")
    bench = Bench(
        league=league,
        engine_urls=urls,
        store=store,
        foresee=foresee,
        traces=options.trace_dir.resolve() if options.trace_dir else None,
        environments={name: environments.prepare(venvs, name) for name in sorted(packages)},
    )
    for row in [row for row in chosen if not bench.has_trace(row)]:
        print(f"skipping {row.name}: --trace-dir has no {row.trace}", file=sys.stderr)
        chosen.remove(row)
    _check_fingerprints(league, store)
    _save_versions(store, {router.name: environments.version(router, foresee) for router in routers})

    names = [router.name for router in routers]
    seeds = options.seeds or (1 if options.quick else league.settings.seeds)
    keys = order([row.name for row in chosen], names, list(range(1, seeds + 1)))
    _run_all(bench, bench.store.missing(keys, repeat_invalid=options.repeat_invalid))
    while options.until_decided and seeds < league.settings.max_seeds:
        undecided = report.Results(league, store.all()).undecided_rows()
        undecided = [row.name for row in chosen if row.name in undecided]
        if not undecided:
            break
        seeds += 1
        print(f"seed {seeds} for {', '.join(undecided)}", file=sys.stderr)
        _run_all(bench, bench.store.missing(order(undecided, names, [seeds])))


def _run_all(bench: Bench, missing: list[RunKey]) -> None:
    print(f"{len(missing)} runs are missing", file=sys.stderr)
    began = time.monotonic()
    for number, key in enumerate(missing):
        result = bench.run(key)
        left = (time.monotonic() - began) / (number + 1) * (len(missing) - number - 1)
        print(f"[{number + 1}/{len(missing)}] {_summary(result)}, {left / 60:.0f} min left", flush=True)


def _summary(result: report.Result) -> str:
    name = f"{result['row']} {result['router']} seed {result['seed']}"
    if result["error"] is not None:
        return f"{name}: {result['error'].splitlines()[0]}"
    outcome = result["outcome"]
    text = (
        f"{name}: E2E {outcome['end_to_end']['mean']:.2f} / {outcome['end_to_end']['p99']:.2f} s, "
        f"TTFT p99 {outcome['time_to_first_token']['p99']:.2f} s, lost {result['lost']}, "
        f"client {result['client_delay_p99_ms']:.1f} ms, {result['wall_seconds']:.0f} s"
    )
    return text + (" VOID" if result["void"] else "")


def _check_fingerprints(league: League, store: Store) -> None:
    """Raises `LeagueError` if a saved run had other settings."""
    routers, names = {r.name for r in league.routers}, {row.name for row in league.rows}
    for result in store.all():
        row, router = result["row"], result["router"]
        is_known = router in routers and row in names
        if is_known and result["fingerprint"] != league.fingerprint(row, router):
            raise LeagueError(
                f"{store.directory} has a run of {row} and {router} with other settings: choose "
                "another --out"
            )


def _versions(store: Store) -> dict[str, str]:
    try:
        known: dict[str, str] = json.loads((store.directory / "versions.json").read_text())
        return known
    except (FileNotFoundError, ValueError):
        return {}


def _save_versions(store: Store, versions: dict[str, str]) -> None:
    known = _versions(store)
    changed = [name for name, text in versions.items() if known.get(name, text) != text]
    if changed:
        raise LeagueError(
            f"{store.directory} has results of another version of {', '.join(changed)}: "
            "choose another --out"
        )
    text = json.dumps(known | versions, indent=1)
    write_atomically(store.directory / "versions.json", text + "\n")


def _report(options: argparse.Namespace, league: League, store: Store) -> None:
    results = store.all()
    if not results:
        raise LeagueError(f"{store.directory} has no results")
    versions = dict.fromkeys(_versions(store).values())
    named = {text: text for text in versions}
    text = report.markdown(league, results, named)
    write_atomically(store.directory / "results.md", text)
    document = report.merged(league, results, _versions(store))
    write_atomically(store.directory / "results.json", json.dumps(document, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    sys.exit(main())
