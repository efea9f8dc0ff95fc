"""Marginal means: each value of an axis, averaged over the same combinations of the other settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from kd.evaluation.catalog import Metric
from kd.runs.identity import is_under
from sweeps.report.axes import Coordinates, axes_of
from sweeps.report.groups import Group, comparable
from sweeps.report.statistics import Interval, interval
from sweeps.report.wording import join_words

MOST_VALUES = 30  # of an axis
INCOMPARABLE = ("data", "responses")  # axes that change what is measured
TEXT_AMOUNT = "data.tokens"  # for training: the held-out text stays the same

Values = dict[Hashable, dict[tuple, Group]]  # groups by value of an axis and by the other settings


@dataclass(frozen=True)
class MarginalMean:
    """One value of an axis. Numbers are None where it is not compared."""

    text: str
    runs: int  # that are done, at all other settings
    mean: Interval | None = None  # over seeds, each averaged over the combinations
    difference: Interval | None = None  # to the best value, paired over seeds; None for the best itself
    least: float | None = None  # lowest difference to the best value within one combination
    most: float | None = None
    times_best: int = 0  # combinations that the value leads


@dataclass(frozen=True)
class Axis:
    """Marginal means of one axis."""

    key: str
    title: str
    others: list[str]  # keys of the other axes
    means: list[MarginalMean]  # numbers by size, others by mean
    used: int  # combinations that were run with all compared values and seeds
    combinations: int  # of the other settings, run with any value
    seeds: list[int]
    not_compared: str = ""  # reason, if nothing is compared

    @property
    def averaged(self) -> str:
        """Sentence on what the means are over."""
        if self.not_compared:
            return f"Not compared: {self.not_compared}."
        seeds = f"{'seeds' if len(self.seeds) > 1 else 'seed'} {join_words([str(seed) for seed in self.seeds])}"
        share = f"{self.used} combinations" if self.used == self.combinations else self._incomplete()
        return f"Over {share} of {join_words(self.others)}, {seeds}."

    def _incomplete(self) -> str:
        return f"{self.used} of {self.combinations} combinations, those with finished runs of all compared values,"


COLUMNS = {
    "to the best": "difference to the value that leads its axis, seed by seed; that is picked after the fact",
    "in single combinations": "lowest and highest such difference at fixed other settings, means over seeds",
    "best in": "combinations in which the value leads, by means over seeds",
    "runs": "finished runs of the value, at any other settings; a value whose runs failed is compared where none did",
}


def meaning(metric: Metric, several_seeds: bool) -> str:
    """Return what marginal means and their intervals are, in words."""
    seeds = (
        "± is the 95% interval over seeds: each seed's mean over the combinations is one number. So it is about other "
        "seeds, and not about other settings than these."
        if several_seeds
        else "One seed each, so no intervals: nothing here tells a small difference from chance."
    )
    return (
        f"Marginal means: {metric.label} of each value of an axis, averaged over combinations of the other settings. "
        "A combination counts if it was run with all compared values and seeds, so that all are averaged over the "
        f"same. {seeds}"
    )


def marginal_means(groups: list[Group], metric: Metric) -> list[Axis]:
    """Return the marginal means of each axis; nothing if fewer than two axes vary.

    Baselines are left out, since they have no value on most axes.
    """
    groups = [group for group in groups if group.distilled] or groups
    keys = axes_of(groups)
    return [axis(key, keys, groups, metric) for key in keys] if len(keys) > 1 else []


def axis(key: str, keys: list[str], groups: list[Group], metric: Metric) -> Axis:
    """Return the marginal means of one axis over its complete combinations.

    Means of a design with gaps would compare different mixes of the other settings. So a combination counts only if
    it was run with all compared values and seeds. complete_part() chooses these.
    """
    others = [k for k in keys if k != key]
    values: Values = {}
    for group in groups:
        if key in group.config:  # a setting of another option has no value here
            settings = tuple(comparable(group.config.get(k)) for k in others)
            groups_by_settings = values.setdefault(comparable(group.config[key]), {})
            assert settings not in groups_by_settings, f"two groups have the settings of {group.label}"
            groups_by_settings[settings] = group
    combinations = {settings for groups_by_settings in values.values() for settings in groups_by_settings}
    compared: list[Hashable] = []
    seeds: list[int] = []
    used: list[tuple] = []
    if is_under(key, INCOMPARABLE) and key != TEXT_AMOUNT:
        not_compared = "what is measured differs between its values"
    elif len(values) > MOST_VALUES:
        not_compared = f"it has {len(values)} values"
    else:
        compared, seeds, used = complete_part(values, metric.key)
        not_compared = "" if used else "no two of its values were run with the same other settings"
    coordinates = Coordinates(key, [group for some in values.values() for group in some.values()])
    firsts = {value: next(iter(groups_by_settings.values())) for value, groups_by_settings in values.items()}
    means = {value: MarginalMean(coordinates.text(firsts[value]), runs_of(values[value])) for value in values}
    numbers = compared_numbers({value: values[value] for value in compared}, seeds, used, metric)
    means |= {value: replace(means[value], **numbers[value]) for value in numbers}
    ordered = sorted(means, key=lambda value: sort_key(coordinates.value(firsts[value]), means[value], metric))
    shown = [means[value] for value in ordered] if len(means) <= MOST_VALUES else []
    title = ": ".join(filter(None, (key, coordinates.title)))
    return Axis(key, title, others, shown, len(used), len(combinations), seeds, not_compared)


def complete_part(values: Values, metric_key: str) -> tuple[list[Hashable], list[int], list[tuple]]:
    """Return values, seeds and combinations that were all run with each other, with many runs.

    Tried are the seeds with most runs: the first, the first two, and so on. For these, each value is tried as a start,
    and then the value is added that keeps most combinations, again and again. The largest of these parts is returned.
    A larger one may exist. Empty if no two values have a combination in common.
    """
    combinations = sorted({settings for some in values.values() for settings in some}, key=str)
    seeds_of = {
        value: [set(some[settings].values(metric_key)) if settings in some else set() for settings in combinations]
        for value, some in values.items()
    }
    runs = Counter(seed for by_combination in seeds_of.values() for some in by_combination for seed in some)
    by_runs = sorted(runs, key=lambda seed: (-runs[seed], seed))
    best: tuple[int, int, int] = (0, 0, 0)
    part: tuple[list[Hashable], list[int], list[tuple]] = ([], [], [])
    for s in range(1, len(by_runs) + 1):
        seeds = set(by_runs[:s])
        whole = {value: {i for i, some in enumerate(seeds_of[value]) if some >= seeds} for value in values}
        for start in sorted(values, key=str):  # so that no tie is broken by the results
            chosen, used = [start], whole[start]
            while len(chosen) < len(values):
                rest = [value for value in sorted(values, key=str) if value not in chosen]
                value = max(rest, key=lambda value: len(used & whole[value]))
                chosen, used = [*chosen, value], used & whole[value]
                size = (len(chosen) * s * len(used), s, len(chosen))
                if not used:
                    break
                if size > best:
                    best, part = size, (chosen, sorted(seeds), [combinations[i] for i in sorted(used)])
    return part


def compared_numbers(
    values: Values, seeds: list[int], used: list[tuple], metric: Metric
) -> dict[Hashable, dict[str, Any]]:
    """Return the numbers of a MarginalMean for values that have all seeds in all used combinations."""
    losses = {
        value: {settings: some[settings].values(metric.key) for settings in used} for value, some in values.items()
    }  # value -> combination -> seed -> loss
    if not losses:
        return {}
    by_seed = {value: [fmean(some[c][seed] for c in used) for seed in seeds] for value, some in losses.items()}
    by_settings = {value: [fmean(some[c][seed] for seed in seeds) for c in used] for value, some in losses.items()}
    best = min(by_seed, key=lambda value: -metric.sign * fmean(by_seed[value]))
    leaders = [min(losses, key=lambda value: -metric.sign * by_settings[value][i]) for i in range(len(used))]
    numbers: dict[Hashable, dict[str, Any]] = {}
    for value in values:
        numbers[value] = {"mean": interval(by_seed[value]), "times_best": leaders.count(value)}
        if value != best:
            gaps = [a - b for a, b in zip(by_settings[value], by_settings[best])]
            paired = interval(a - b for a, b in zip(by_seed[value], by_seed[best]))
            numbers[value] |= {"difference": paired, "least": min(gaps), "most": max(gaps)}
    return numbers


def runs_of(groups_by_settings: dict[tuple, Group]) -> int:
    return sum(len(group.runs) for group in groups_by_settings.values())


def sort_key(value: float | str | None, mean: MarginalMean, metric: Metric) -> tuple:
    """Return the place of a value: numbers by size, then others by mean, then what is not compared."""
    if isinstance(value, float):
        return (0, value)
    return (2, 0.0) if mean.mean is None else (1, -metric.sign * mean.mean.mean)
