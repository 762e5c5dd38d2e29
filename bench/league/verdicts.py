"""Statistics over seeds, and the verdict on one measure of one row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

#: 97.5th percentiles of Student's t by degrees of freedom, from 1 on.
_T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip

#: The normal distribution's value, which further degrees of freedom approach.
_Z_975 = 1.960


class Verdict(Enum):
    """Foresee's place against the best rival of a row."""

    FIRST = "first"
    TIED = "tied"
    BEHIND = "behind"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Comparison:
    """Foresee against the best rival in one measure of one row."""

    rival: str
    ours: float
    theirs: float
    #: Mean of the paired differences, relative to the rival or to a fixed scale: positive if Foresee
    #: is better.
    advantage: float
    #: Half the width of the 95 % interval of `advantage`; infinite with one seed.
    margin: float
    seeds: int
    verdict: Verdict
    #: Rival ÷ Foresee where low values are better, and its inverse otherwise: above 1 if Foresee is
    #: better.
    ratio: float


def mean(values: list[float]) -> float:
    """Returns the mean; NaN without values."""
    return sum(values) / len(values) if values else math.nan


def half_interval(values: list[float]) -> float:
    """Returns half the width of the 95 % confidence interval of the mean, by Student's t; infinite
    for fewer than two values."""
    count = len(values)
    if count < 2:
        return math.inf
    centre = mean(values)
    variance = sum((value - centre) ** 2 for value in values) / (count - 1)
    t = _T_975[count - 2] if count - 2 < len(_T_975) else _Z_975
    return t * math.sqrt(variance / count)


def geometric_mean(values: list[float]) -> float:
    """Returns the geometric mean of positive values; NaN without values."""
    usable = [value for value in values if value > 0 and math.isfinite(value)]
    return math.exp(mean([math.log(value) for value in usable])) if usable else math.nan


def verdict(advantage: float, margin: float, tolerance: float) -> Verdict:
    """Returns the verdict on a relative advantage.

    Tied: the advantage is at most `tolerance`, and the interval lies inside twice the tolerance.
    First or behind: the advantage is larger, and the interval excludes 0. Undecided: all others.
    """
    low, high = advantage - margin, advantage + margin
    if abs(advantage) <= tolerance:
        inside = low >= -2 * tolerance and high <= 2 * tolerance
        return Verdict.TIED if inside else Verdict.UNDECIDED
    if low > 0:
        return Verdict.FIRST
    if high < 0:
        return Verdict.BEHIND
    return Verdict.UNDECIDED


def compare(
    ours: dict[int, float],
    rivals: dict[str, dict[int, float]],
    *,
    tolerance: float,
    higher_is_better: bool = False,
    scale: float | None = None,
) -> Comparison | None:
    """Compares values by seed with those of the best rival: the one with the best mean over its
    seeds. Returns `None` if no seed is common to both.

    The paired differences are divided by `scale`, or by the rival's mean over the common seeds.
    """
    sign = 1.0 if higher_is_better else -1.0
    candidates = {
        name: common
        for name, values in rivals.items()
        if (common := sorted(ours.keys() & values.keys()))
    }
    if not candidates:
        return None
    # Rivals that lack a seed are compared by the seeds that they have.
    most = max(len(common) for common in candidates.values())
    full = [name for name, common in candidates.items() if len(common) == most]
    means = {name: mean([rivals[name][seed] for seed in candidates[name]]) for name in full}
    best = max(full, key=lambda name: sign * means[name])
    seeds = candidates[best]
    our_mean, their_mean = mean([ours[seed] for seed in seeds]), means[best]
    scale = scale or abs(their_mean) or 1.0
    differences = [sign * (ours[seed] - rivals[best][seed]) / scale for seed in seeds]
    advantage, margin = mean(differences), half_interval(differences)
    better, worse = (our_mean, their_mean) if higher_is_better else (their_mean, our_mean)
    return Comparison(
        rival=best,
        ours=our_mean,
        theirs=their_mean,
        advantage=advantage,
        margin=margin,
        seeds=len(seeds),
        verdict=verdict(advantage, margin, tolerance),
        ratio=better / worse if worse else math.nan,
    )
