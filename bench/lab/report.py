#!/usr/bin/env python3
"""Writes the lab's tables into docs/benchmarks.md, and its pictures, from the JSON of the suite.

    foresee replay suite … --json suite.json
    foresee replay suite … --json ablations.json
    bench/lab/report.py suite.json [ablations.json]

A table replaces the text between `<!-- NAME -->` and `<!-- end -->`.
"""

import re
import sys
from pathlib import Path

import pictures
from statistics_of_runs import E2E, E2E_P99, HITS, ITL, TTFT, TTFT_P99, WITHIN_SLO, Measure, Suite

import tables  # of the league

DOCS = Path(__file__).resolve().parents[2] / "docs"

# What `foresee serve` runs without flags.
DEFAULT = "marginal-delay+shortest"
# Policies of this router and references, with their names in pictures.
OWN = {
    "marginal-delay+shortest": "marginal-delay, queue shortest",
    "marginal-delay": "marginal-delay, no queue",
    "oracle": "greedy oracle (reference)",
}
# Policies that other routers have, and simple ones.
OTHERS = [
    "kv", "kv:100", "least-requests", "round-robin", "consistent-hash", "dynamo", "metrics-1s",
    "sglang", "smg", "kv-aware", "llm-d", "llm-d-affinity", "lmetric", "production-stack", "two-tier", "min-ttft",
]  # fmt: skip
# Columns of the tables by workload.
COLUMNS = {
    "marginal-delay+shortest": "default",
    "marginal-delay": "no queue",
    "smg": "smg",
    "lmetric": "lmetric",
    "production-stack": "prod.-stack",
    "dynamo": "dynamo",
    "least-requests": "least-req.",
    "round-robin": "round-robin",
    "oracle": "oracle",
}
WEIGHT = re.compile(r"marginal-delay:ttft=(\d+)\+shortest")


def table(header: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table."""
    return "\n".join(tables.table(header, rows))


def signed(value: float, digits: int) -> str:
    """Returns a number with its sign; 0 without one."""
    text = f"{value:+.{digits}f}".replace("-", "−")
    return "0" if float(f"{value:.{digits}f}") == 0 else text


def seconds(value: float) -> str:
    """Returns a time with three digits, or two decimals from 10 s on."""
    if value >= 100:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def policies(suite: Suite) -> str:
    """Returns the table of all policies, by mean latency."""
    listed = [p for p in suite.policies if not WEIGHT.fullmatch(p)]
    rows = []
    for policy in sorted(listed, key=lambda policy: suite.ratio(policy, E2E)):
        note = {DEFAULT: " (default)", "marginal-delay": " (no queue)", "oracle": " (reference)"}.get(
            policy, ""
        )
        rows.append(
            [f"`{policy}`{note}"]
            + [f"{suite.ratio(policy, m):.2f}" for m in (E2E, E2E_P99, TTFT, TTFT_P99, ITL)]
            + [signed(suite.difference(policy, m), 1) for m in (WITHIN_SLO, HITS)]
        )
    head = ["policy", "E2E mean", "E2E p99", "TTFT mean", "TTFT p99", "ITL mean"]
    return table([*head, "within SLO, points", "prefix hits, points"], rows)


def by_workload(suite: Suite, measure: Measure) -> str:
    """Returns the table of a measure by workload and policy."""
    rows = []
    for row in suite.rows:
        means = {policy: suite.mean(row, policy, measure) for policy in suite.policies}
        best = min(means, key=lambda policy: means[policy])

        def cell(policy: str) -> str:
            text = seconds(means[policy])
            if means[policy] == means[best]:
                return f"**{text}**"
            is_tied = not suite.is_separate(row, policy, best, measure)
            return text + ("≈" if is_tied else "")

        lowest = min(OTHERS, key=lambda policy: means[policy])
        shown = COLUMNS.get(lowest, f"{cell(lowest)} {lowest}")
        rows.append([f"`{row}`", *(cell(policy) for policy in COLUMNS), shown])
    return table(["workload", *COLUMNS.values(), "lowest of all other routers"], rows)


def weights(suite: Suite) -> str:
    """Returns the table of the weights of the time to first token."""
    of_policy = {found[1]: p for p in suite.policies if (found := WEIGHT.fullmatch(p))}
    rows = [["1 (default)", "1.000", "1.000", "1.000", "1.000", "0"]]
    for weight, policy in sorted(of_policy.items()):
        ratios = [f"{suite.ratio(policy, m):.3f}" for m in (E2E, E2E_P99, TTFT, TTFT_P99)]
        rows.append([weight, *ratios, signed(suite.difference(policy, WITHIN_SLO), 1)])
    head = ["`--ttft-weight`", "E2E mean", "E2E p99", "TTFT mean", "TTFT p99"]
    return table([*head, "within SLO, points"], rows)


def ablations(suite: Suite) -> str:
    """Returns the table of the default without one of its parts, by mean latency."""

    def interval(policy: str, measure: Measure) -> str:
        centre, half = suite.change(policy, measure)
        return f"{signed(centre, 1)} [{signed(centre - half, 1)}, {signed(centre + half, 1)}]"

    def worst(policy: str) -> str:
        changes = {
            row: 100 * (suite.mean(row, policy, E2E) / suite.mean(row, suite.default, E2E) - 1)
            for row in suite.rows
        }
        row = max(changes, key=lambda row: changes[row])
        return f"{signed(changes[row], 0)} `{row}`"

    parts = [policy for policy in suite.policies if policy != suite.default]
    rows = [
        [f"`{re.sub('.*:|[+].*', '', policy)}`"]
        + [interval(policy, measure) for measure in (E2E, E2E_P99, TTFT, WITHIN_SLO)]
        + [worst(policy)]
        for policy in sorted(parts, key=lambda policy: -suite.change(policy, E2E)[0])
    ]
    head = ["without", "E2E mean", "E2E p99", "TTFT mean", "within SLO", "worst workload, E2E mean"]
    return table(head, rows)


def main(files: list[str]) -> None:
    suite = Suite(Path(files[0]), DEFAULT)
    parts = {
        "policies": policies(suite),
        "mean end-to-end latency": by_workload(suite, E2E),
        "p99 of the end-to-end latency": by_workload(suite, E2E_P99),
        "p99 of the time to first token": by_workload(suite, TTFT_P99),
        "weights": weights(suite),
    }
    if len(files) > 1:
        parts["ablations"] = ablations(Suite(Path(files[1]), DEFAULT))
    page = DOCS / "benchmarks.md"
    text = page.read_text()
    for name, content in parts.items():
        try:
            text = tables.replace_place(text, name, [content])
        except KeyError as error:
            sys.exit(f"{page}: {error.args[0]}")
    page.write_text(text)
    images = DOCS / "images"
    (images / "latency-by-policy.svg").write_text(pictures.by_policy(suite, OWN, OTHERS))
    shown = ["smg", "lmetric", "dynamo", "round-robin"]
    (images / "latency-by-workload.svg").write_text(pictures.by_workload(suite, shown))


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit(__doc__)
    main(sys.argv[1:])
