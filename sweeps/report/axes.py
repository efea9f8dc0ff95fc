"""Axes of a sweep: the settings that vary, and their values as numbers and as text."""

from __future__ import annotations

import json
from collections import Counter
from functools import cached_property
from statistics import fmean

from sweeps.report.groups import Group, comparable, varying
from sweeps.report.wording import format_amount

TITLES = {  # of axes, with their units
    "line": "",
    "temperature.tau": "temperature τ", "alpha.peak": "share of distillation, α", "truncation.k": "k, tokens kept",
    "truncation.p": "p, probability kept", "truncation.draws": "tokens drawn per position",
    "lr.peak": "peak of the learning rate", "trainer.steps": "steps",
    "student.size": "student, parameters without embeddings", "teacher.size": "teacher, parameters without embeddings",
}  # fmt: skip


def axes_of(groups: list[Group]) -> list[str]:
    """Return the settings that vary, without those that follow from an earlier one."""
    columns: dict[str, list[str]] = {}
    for key in varying([group.config for group in groups]):
        column = [json.dumps(group.config.get(key), sort_keys=True) for group in groups]
        if all(len(set(zip(column, other))) > len(set(other)) for other in columns.values()):
            columns[key] = column
    return list(columns)


class Coordinates:
    """Values of one axis of these groups, as numbers and as text.

    Steps are given as the tokens trained on, if tokens and steps are one to one in all runs. They are not if the batch
    or the length of rows is another axis.
    """

    def __init__(self, key: str, groups: list[Group]):
        self.key, self.groups = key, groups

    @cached_property
    def tokens(self) -> dict[object, float]:
        """Tokens by steps; nothing on other axes, and if steps stand for themselves."""
        if self.key != "trainer.steps":
            return {}
        pairs = {(g.config.get(self.key), result.get("tokens")) for g in self.groups for result in g.results}
        tokens = {steps: float(count) for steps, count in pairs if count is not None}
        texts = {format_amount(count) for count in tokens.values()}
        return tokens if len(pairs) == len(tokens) == len(texts) else {}

    @property
    def title(self) -> str:
        """Meaning of the values, with their unit; empty if the key says it all."""
        return "tokens trained on" if self.tokens else TITLES.get(self.key, "")

    @property
    def short_title(self) -> str:
        axis, _, name = self.key.rpartition(".")
        return "tokens" if self.tokens else axis if name == "size" else TITLES.get(self.key, self.key)

    def value(self, group: Group) -> float | str | None:
        """Return a setting: as a number if it is one, or stands for one, such as a size."""
        setting, result = group.config.get(self.key), group.results[0]
        if self.tokens:
            return self.tokens[setting]
        if self.key in ("student.size", "teacher.size"):
            role = "teacher_" if self.key == "teacher.size" else ""
            return float(result.get(f"{role}non_embedding") or result.get(f"{role}parameters") or 0) or setting
        if setting is None or type(setting) is str:
            return setting
        return float(setting) if type(setting) in (int, float) else json.dumps(setting)

    def number(self, group: Group) -> float:
        """Return a setting that is a number."""
        value = self.value(group)
        assert isinstance(value, float), f"{self.key}={value} of {group.label} is no number"
        return value

    def text(self, group: Group) -> str:
        """Return a setting as a person writes it: 1m, 0.5, wsd."""
        setting = group.config.get(self.key)
        text = format_amount(self.tokens[setting]) if self.tokens else short_text(setting)
        return json.dumps(setting) if text in self._shared_texts else text

    @cached_property
    def _shared_texts(self) -> set[str]:
        """Short texts that several values have, such as floats that are equal to six digits."""
        if self.tokens:  # whose texts differ
            return set()
        settings = {comparable(value): value for value in (group.config.get(self.key) for group in self.groups)}
        counts = Counter(map(short_text, settings.values()))
        return {text for text, count in counts.items() if count > 1}

    def ordered_texts(self) -> list[str]:
        """Return the values as text: numbers by size, names by mean loss."""
        losses: dict[str, list[float]] = {}
        values = {}
        for group in self.groups:
            losses.setdefault(self.text(group), []).append(group.required_mean().mean)
            values[self.text(group)] = self.value(group)
        sizes = {text: value for text, value in values.items() if isinstance(value, float)}
        if len(sizes) == len(values):
            return sorted(losses, key=sizes.__getitem__)
        return sorted(losses, key=lambda text: fmean(losses[text]))


def short_text(setting: object) -> str:
    return "–" if setting is None else f"{setting:g}" if isinstance(setting, float) else str(setting)
