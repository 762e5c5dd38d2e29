"""Pictures of the lab's results, as SVG."""

import math

from statistics_of_runs import E2E, Suite

STYLE = """  <style>
    text { font: 13px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #24292f; }
    .title { font-size: 15px; font-weight: 600; }
    .soft { fill: #57606a; font-size: 12px; }
    .end { text-anchor: end; }
    .middle { text-anchor: middle; }
    .grid { stroke: #d0d7de; }
    .unit { stroke: #24292f; stroke-width: 1.5; }
    .value { stroke: #ffffff; stroke-width: 4; paint-order: stroke; }
    .ours { fill: #0969da; }
    .other { fill: #8c959f; }
    .reference { fill: #bf8700; }
    .p0 { fill: #0969da; fill-opacity: .85; }
    .p1 { fill: #1a7f37; fill-opacity: .85; }
    .p2 { fill: #bf8700; fill-opacity: .85; }
    .p3 { fill: #cf222e; fill-opacity: .85; }
  </style>"""


def _page(height: int, label: str, body: list[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height}" role="img" '
        f'aria-label="{label}">'
    )
    frame = f'  <rect width="760" height="{height}" rx="8" fill="#ffffff" stroke="#d0d7de"/>'
    return "\n".join([head, STYLE, frame, *(f"  {line}" for line in body), "</svg>", ""])


def by_policy(suite: Suite, names: dict[str, str], others: list[str]) -> str:
    """Returns bars of the mean latency of each policy, relative to the default. `names` are those of
    the router's own policies and references; `others` are the policies of other routers."""
    shown = [*names, *others]
    ratios = sorted((suite.ratio(policy, E2E), policy) for policy in shown)
    bottom = 60 + 24 * len(ratios)
    left, per_unit = 236.0, 270.0
    seeds = len(next(iter(next(iter(suite.rows.values())).values())))
    body = [
        '<text class="title" x="20" y="28">Mean end-to-end latency, relative to Foresee\'s default '
        "(lower is better)</text>",
        '<text class="soft" x="20" y="47">Geometric mean of the ratios over '
        f"{len(suite.rows)} simulated workloads, {seeds} seeds each</text>",
    ]
    for tick in (0.5, 1.0, 1.5):
        x = left + per_unit * tick
        body.append(f'<line class="grid" x1="{x:.0f}" y1="60" x2="{x:.0f}" y2="{bottom}"/>')
        body.append(f'<text class="soft middle" x="{x:.0f}" y="{bottom + 18}">{tick:g}</text>')
    for index, (ratio, policy) in enumerate(ratios):
        y = 66 + 24 * index
        name = names.get(policy, policy)
        kind = "other"
        if policy in names:
            kind = "reference" if "reference" in name else "ours"
        width = per_unit * ratio
        body += [
            f'<text class="end" x="226" y="{y + 12}">{name}</text>',
            f'<rect class="{kind}" x="236" y="{y}" width="{width:.1f}" height="16"/>',
            f'<text class="value" x="{left + width + 6:.1f}" y="{y + 13}">{ratio:.2f}</text>',
        ]
    label = "Mean end-to-end latency by policy, geometric mean over all workloads"
    return _page(bottom + 32, label, body)


def by_workload(suite: Suite, policies: list[str]) -> str:
    """Returns a row of points for each workload: the mean latency of four policies, relative to the
    default, on a logarithmic axis."""
    bottom = 96 + 23 * len(suite.rows)
    left, per_unit = 181.4, 298.1

    def x_of(ratio: float) -> float:
        return left + per_unit * math.log(min(ratio, 6.5))

    body = [
        '<text class="title" x="20" y="28">Mean end-to-end latency on each workload, relative to '
        "Foresee's default</text>",
        '<text class="soft" x="20" y="47">Line at 1: marginal-delay with its queue. Right of it is '
        "slower. Logarithmic axis.</text>",
    ]
    for index, policy in enumerate(policies):
        key = 26 + 150 * index
        body.append(f'<circle class="p{index}" cx="{key}" cy="65" r="5"/>')
        body.append(f'<text x="{key + 10}" y="69">{policy}</text>')
    for tick in (1, 1.5, 2, 3, 4, 6):
        kind = "unit" if tick == 1 else "grid"
        x = x_of(tick)
        body.append(f'<line class="{kind}" x1="{x:.1f}" y1="80" x2="{x:.1f}" y2="{bottom}"/>')
        body.append(f'<text class="soft middle" x="{x:.1f}" y="{bottom + 20}">{tick:g}</text>')
    for number, row in enumerate(suite.rows):
        y = 98 + 23 * number
        body.append(f'<text class="end" x="138" y="{y}">{row}</text>')
        default = suite.mean(row, suite.default, E2E)
        for index in reversed(range(len(policies))):
            x = x_of(suite.mean(row, policies[index], E2E) / default)
            point = f'cx="{x:.1f}" cy="{y - 8.5 + 3 * index}" r="4"'
            body.append(f'<circle class="p{index}" {point}/>')
    label = "Mean end-to-end latency of four policies on each workload, relative to the default"
    return _page(bottom + 36, label, body)
