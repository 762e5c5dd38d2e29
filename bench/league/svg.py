"""Pictures as SVG."""

import math

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

#: Largest ratio of a picture's axis. Larger ones are drawn at its end.
MAX_RATIO = 6.5


def page(height: int, label: str, body: list[str]) -> str:
    """Returns a picture of this height with these elements."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height}" role="img" '
        f'aria-label="{label}">'
    )
    frame = f'  <rect width="760" height="{height}" rx="8" fill="#ffffff" stroke="#d0d7de"/>'
    return "\n".join([head, STYLE, frame, *(f"  {line}" for line in body), "</svg>", ""])


def dots(
    title: str, note: str, names: list[str], rows: list[tuple[str, list[float]]], label: str
) -> str:
    """Returns a row of points for each of `rows`, on a logarithmic axis: one for each of `names`, at
    most four. A point that is not a number is left out."""
    bottom = 96 + 23 * len(rows)
    left, per_unit = 181.4, 298.1

    def x_of(ratio: float) -> float:
        return left + per_unit * math.log(min(ratio, MAX_RATIO))

    body = [
        f'<text class="title" x="20" y="28">{title}</text>',
        f'<text class="soft" x="20" y="47">{note}</text>',
    ]
    for index, name in enumerate(names):
        key = 26 + 150 * index
        body.append(f'<circle class="p{index}" cx="{key}" cy="65" r="5"/>')
        body.append(f'<text x="{key + 10}" y="69">{name}</text>')
    for tick in (1, 1.5, 2, 3, 4, 6):
        kind = "unit" if tick == 1 else "grid"
        x = x_of(tick)
        body.append(f'<line class="{kind}" x1="{x:.1f}" y1="80" x2="{x:.1f}" y2="{bottom}"/>')
        body.append(f'<text class="soft middle" x="{x:.1f}" y="{bottom + 20}">{tick:g}</text>')
    for number, (row, ratios) in enumerate(rows):
        y = 98 + 23 * number
        body.append(f'<text class="end" x="138" y="{y}">{row}</text>')
        for index, ratio in reversed(list(enumerate(ratios))):
            if math.isnan(ratio):
                continue
            point = f'cx="{x_of(ratio):.1f}" cy="{y - 8.5 + 3 * index}" r="4"'
            body.append(f'<circle class="p{index}" {point}/>')
    return page(bottom + 36, label, body)
