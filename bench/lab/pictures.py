"""Pictures of the lab's results, as SVG."""

from statistics_of_runs import E2E, Suite

import svg  # of the league

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
    return svg.page(bottom + 32, label, body)


def by_workload(suite: Suite, policies: list[str]) -> str:
    """Returns a row of points for each workload: the mean latency of four policies, relative to the
    default, on a logarithmic axis."""
    rows = []
    for row in suite.rows:
        default = suite.mean(row, suite.default, E2E)
        rows.append((row, [suite.mean(row, policy, E2E) / default for policy in policies]))
    return svg.dots(
        "Mean end-to-end latency on each workload, relative to Foresee's default",
        "Line at 1: marginal-delay with its queue. Right of it is slower. Logarithmic axis.",
        policies,
        rows,
        "Mean end-to-end latency of four policies on each workload, relative to the default",
    )
