"""Means, paired differences and ratios over seeds, with their 95% intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import fmean, stdev
from typing import TYPE_CHECKING, NamedTuple

from scipy.special import stdtrit  # scipy.stats.t.ppf, without the import of scipy.stats

from kd.evaluation.catalog import LOSS, Metric

if TYPE_CHECKING:
    from sweeps.report.groups import Group


class Interval(NamedTuple):
    """Mean over n seeds and half the width of its 95% interval, None if there is one seed."""

    mean: float
    half: float | None
    n: int

    @property
    def within_noise(self) -> bool:
        """True if 0 is inside the interval."""
        return self.half is not None and abs(self.mean) <= self.half

    @property
    def beyond_noise(self) -> bool:
        """True if 0 is outside the interval; False for one seed."""
        return self.half is not None and not self.within_noise


def interval(values: Iterable[float]) -> Interval | None:
    """Return the mean and its 95% t interval; None without values."""
    x = list(values)
    if not x:
        return None
    half = float(stdtrit(len(x) - 1, 0.975)) * stdev(x) / math.sqrt(len(x)) if len(x) > 1 else None
    return Interval(fmean(x), half, len(x))


def difference(group: Group, other: Group | None, key: str = LOSS.key) -> Interval | None:
    """Return a metric of group - other, paired over seeds; None if they share no seed."""
    a, b = group.values(key), other.values(key) if other else {}
    return interval(a[seed] - b[seed] for seed in a if seed in b)


def baseline(group: Group, groups: list[Group]) -> Group | None:
    """Return the best language modelling alone on the same task that shares a seed with group.

    groups: the best first.
    """
    return next(
        (g for g in groups if g.supervised and g.task == group.task and g.runs.keys() & group.runs.keys()), None
    )


def gap_closed(group: Group, base: Group | None, metric: Metric = LOSS) -> Interval | None:
    """Return the share of the gap between baseline and teacher that a group closes, over the seeds of all three.

    A ratio of means, with the interval of a ratio: that of change - share * gap, seed by seed, over the mean gap
    (Cochran, Sampling Techniques, chapter 6).
    """
    if base is None or group is base:
        return None
    student, start, teacher = group.values(metric.key), base.values(metric.key), group.values(metric.teacher_key)
    seeds = student.keys() & start.keys() & teacher.keys()
    changes, gaps = [student[s] - start[s] for s in seeds], [teacher[s] - start[s] for s in seeds]
    if not seeds or metric.sign * fmean(gaps) <= 0:
        return None
    share = fmean(changes) / fmean(gaps)
    spread = interval((change - share * gap) / fmean(gaps) for change, gap in zip(changes, gaps))
    return spread and spread._replace(mean=share)


def best_group(groups: list[Group], metric: Metric) -> Group:
    """Return the group that no other beats on the seeds that both have. Groups with most seeds are compared first.

    A group with fewer seeds has to be ahead beyond noise, since a single seed may be a lucky one.
    """
    best, *others = sorted(groups, key=lambda g: -len(g.runs))
    for group in others:
        change = difference(group, best, metric.key)
        if change and metric.sign * change.mean > 0 and (len(group.runs) == len(best.runs) or change.beyond_noise):
            best = group
    return best


def indistinguishable(best: Group, groups: Iterable[Group], metric: Metric = LOSS) -> list[Group]:
    """Return the other groups whose paired difference to the best is within noise."""
    changes = [(group, difference(group, best, metric.key)) for group in groups if group is not best]
    return [group for group, change in changes if change and change.within_noise]
