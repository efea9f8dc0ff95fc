"""Axes of a sweep: the settings that vary, and their values as numbers and as text."""

from __future__ import annotations

import json
from statistics import fmean

from sweeps.report.groups import Group, varying
from sweeps.report.table import Row
from sweeps.report.wording import format_amount

TITLES = {  # of axes, with their units
    "line": "",
    "temperature.tau": "temperature τ", "alpha.peak": "share of distillation, α", "truncation.k": "k, tokens kept",
    "truncation.p": "p, probability kept", "truncation.draws": "tokens drawn per position",
    "lr.peak": "peak of the learning rate", "trainer.steps": "tokens trained on",
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


def axis_value(group: Group, key: str) -> float | str | None:
    """Return a setting: as a number if it is one, or stands for one, such as a size."""
    setting, result = group.config.get(key), group.results[0]
    if key == "trainer.steps" and "tokens" in result:
        return float(result["tokens"])
    if key in ("student.size", "teacher.size"):
        role = "teacher_" if key == "teacher.size" else ""
        return float(result.get(f"{role}non_embedding") or result.get(f"{role}parameters") or 0) or setting
    if setting is None or type(setting) is str:
        return setting
    return float(setting) if type(setting) in (int, float) else json.dumps(setting)


def axis_number(group: Group, key: str) -> float:
    """Return a setting that is a number."""
    value = axis_value(group, key)
    assert isinstance(value, float), f"{key}={value} of {group.label} is no number"
    return value


def axis_text(group: Group, key: str) -> str:
    """Return a setting as a person writes it: 1m, 0.5, wsd."""
    setting, result = group.config.get(key), group.results[0]
    if key == "trainer.steps" and "tokens" in result:
        return format_amount(result["tokens"])
    return "–" if setting is None else f"{setting:g}" if type(setting) is float else str(setting)


def ordered_texts(rows: list[Row], key: str) -> list[str]:
    """Return the values of a setting: numbers by size, names by mean loss."""
    losses: dict[str, list[float]] = {}
    values = {}
    for row in rows:
        losses.setdefault(axis_text(row.group, key), []).append(row.group.required_mean().mean)
        values[axis_text(row.group, key)] = axis_value(row.group, key)
    sizes = {text: value for text, value in values.items() if isinstance(value, float)}
    if len(sizes) == len(values):
        return sorted(losses, key=sizes.__getitem__)
    return sorted(losses, key=lambda text: fmean(losses[text]))


def short_title(key: str) -> str:
    axis, _, name = key.rpartition(".")
    return "tokens" if key == "trainer.steps" else axis if name == "size" else TITLES.get(key, key)
