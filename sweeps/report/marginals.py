"""Marginal means: each value of an axis, averaged over the same combinations of the other settings."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from statistics import fmean

from kd.evaluation.catalog import Metric
from kd.runs.identity import is_under
from sweeps.report.axes import TITLES, axes_of, axis_text, axis_value
from sweeps.report.groups import Group, comparable
from sweeps.report.statistics import Interval, interval
from sweeps.report.wording import join_words

MOST_VALUES = 30  # of an axis
INCOMPARABLE = ("data", "responses")  # axes that change what is measured
LIMITS_TEXT = "data.tokens"  # amount of text for training: the held-out text stays the same

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
    best_in: int = 0  # combinations


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
    why_not: str = ""  # reason if nothing is compared

    @property
    def averaged(self) -> str:
        """Sentence on what the means are over."""
        if self.why_not:
            return f"Not compared: {self.why_not}."
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
    it was run with all compared values and seeds. Values and seeds are chosen so that most runs count.
    """
    others = [k for k in keys if k != key]
    values: Values = {}
    for group in groups:
        if key in group.config:  # a setting of another option has no value here
            settings = tuple(comparable(group.config.get(k)) for k in others)
            at = values.setdefault(comparable(group.config[key]), {})
            assert settings not in at, f"two groups have the settings of {group.label}"
            at[settings] = group
    combinations = {settings for at in values.values() for settings in at}
    compared: list[Hashable] = []
    seeds: list[int] = []
    used: list[tuple] = []
    if is_under(key, INCOMPARABLE) and key != LIMITS_TEXT:
        why_not = "what is measured differs between its values"
    elif len(values) > MOST_VALUES:
        why_not = f"it has {len(values)} values"
    else:
        compared, seeds, used = complete_part(values, metric.key)
        why_not = "" if used else "no two of its values were run with the same other settings"
    means = [MarginalMean(text_of(at, key), runs_of(at)) for value, at in values.items() if value not in compared]
    means += compared_means({value: values[value] for value in compared}, key, seeds, used, metric)
    order = {text_of(at, key): axis_value(next(iter(at.values())), key) for at in values.values()}
    means.sort(key=lambda m: sort_key(order[m.text], m, metric))
    means = means if len(means) <= MOST_VALUES else []
    title = ": ".join(filter(None, (key, TITLES.get(key))))
    return Axis(key, title, others, means, len(used), len(combinations), seeds, why_not)


def complete_part(values: Values, metric_key: str) -> tuple[list[Hashable], list[int], list[tuple]]:
    """Return values, seeds and combinations that were all run with each other, so that most runs count.

    Tried are the values that were run most and the seeds that were run most. Empty if there are no two such values.
    """
    seeds_of = {
        value: {settings: set(group.values(metric_key)) for settings, group in at.items()}
        for value, at in values.items()
    }
    seeds = {seed for at in seeds_of.values() for some in at.values() for seed in some}
    runs = {seed: sum(seed in some for at in seeds_of.values() for some in at.values()) for seed in seeds}
    by_runs = sorted(seeds, key=lambda seed: (-runs[seed], seed))
    by_size = sorted(values, key=lambda value: -len(values[value]))
    best: tuple[int, int, int] = (0, 0, 0)
    block: tuple[list[Hashable], list[int], list[tuple]] = ([], [], [])
    for s in range(1, len(by_runs) + 1):
        used: set[tuple] | None = None
        for v, value in enumerate(by_size, start=1):
            whole = {settings for settings, some in seeds_of[value].items() if some >= set(by_runs[:s])}
            used = whole if used is None else used & whole
            size = (v * s * len(used), s, v)
            if v > 1 and used and size > best:
                best, block = size, (by_size[:v], sorted(by_runs[:s]), sorted(used, key=str))
    return block


def compared_means(values: Values, key: str, seeds: list[int], used: list[tuple], metric: Metric) -> list[MarginalMean]:
    """Return the means of values that have all seeds in all used combinations."""
    losses = {
        value: {settings: at[settings].values(metric.key) for settings in used} for value, at in values.items()
    }  # value -> combination -> seed -> loss
    if not losses:
        return []
    by_seed = {value: [fmean(at[c][seed] for c in used) for seed in seeds] for value, at in losses.items()}
    by_settings = {value: [fmean(at[c][seed] for seed in seeds) for c in used] for value, at in losses.items()}
    best = min(by_seed, key=lambda value: -metric.sign * fmean(by_seed[value]))
    firsts = [min(losses, key=lambda value: -metric.sign * by_settings[value][i]) for i in range(len(used))]
    means = []
    for value, at in values.items():
        gaps = [a - b for a, b in zip(by_settings[value], by_settings[best])]
        paired = None if value == best else interval(a - b for a, b in zip(by_seed[value], by_seed[best]))
        least, most = (None, None) if value == best else (min(gaps), max(gaps))
        mean = interval(by_seed[value])
        means.append(MarginalMean(text_of(at, key), runs_of(at), mean, paired, least, most, firsts.count(value)))
    return means


def text_of(at: dict[tuple, Group], key: str) -> str:
    return axis_text(next(iter(at.values())), key)


def runs_of(at: dict[tuple, Group]) -> int:
    return sum(len(group.runs) for group in at.values())


def sort_key(value: float | str | None, mean: MarginalMean, metric: Metric) -> tuple:
    """Return the place of a value: numbers by size, then others by mean, then what is not compared."""
    if isinstance(value, float):
        return (0, value)
    return (2, 0.0) if mean.mean is None else (1, -metric.sign * mean.mean.mean)
