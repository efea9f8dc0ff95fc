"""Rows, columns and reference lines of a report's table."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import fmean

from kd.evaluation import catalog
from kd.evaluation.catalog import BY_NAME, LOSS, Metric
from kd.runs.identity import model_name
from sweeps.report.groups import Group, label, primary_metric, subset, tasks_of, varying, with_student
from sweeps.report.statistics import Interval, baseline, best_group, difference, gap_closed
from sweeps.report.wording import format_number

COLORS = ("#3b78d8", "#d9772f", "#2a9d78", "#b855a8", "#b0931f", "#cf4a5a", "#4f8fa3", "#8468d0", "#73892f", "#9c664a")
GREY = "#8c929c"
MOST_ROWS = 30  # of a table and of plots; of more, the best and the worst are shown
BEST, WORST = len(COLORS), 5
MOST_TASKS = 4  # tasks whose best row and baseline are shown too


@dataclass(frozen=True)
class Row:
    """Group with the groups that it is compared to."""

    group: Group
    baseline: Group | None
    difference: Interval | None  # to the baseline
    gap_closed: Interval | None
    best: Group  # of its task
    vs_best: Interval | None  # difference to that
    color: str

    @property
    def cotrained(self) -> bool:
        """True if its teacher was trained along with it, so that no other row has the same teacher."""
        return self.group.config["logits"] == "cotrained"


@dataclass(frozen=True)
class ReferenceLine:
    """Values beside the students: of a teacher, of students before training, or the lowest possible loss."""

    label: str
    dash: str  # of its line in plots; empty for none
    values: dict[str, float]  # by key


@dataclass(frozen=True)
class Columns:
    """Columns of a table that are useful for its rows."""

    metrics: list[Metric]
    constant: dict[str, str]  # labels of metrics that are the same in all rows, with their value
    ranked: bool  # whether some row has another difference to the best of its task than to its baseline
    gaps: bool
    footnote: bool  # True if some gaps are to another teacher
    seeds: int | None  # of all rows; None if they differ


def rows_of(groups: list[Group]) -> list[Row]:
    """Return the rows, best first; colors go to the best."""
    metric, colors, rows = primary_metric(groups), iter(COLORS), []
    best = {task[0].task: best_group(task, metric) for task in tasks_of(groups)}
    alone = [group for group in groups if group.supervised]
    mixed = len(alone) < len(groups)
    for group in groups:
        base, first = baseline(group, alone), best[group.task]
        color = GREY if group.supervised and mixed else next(colors, GREY)
        change = difference(group, base, metric.key)
        vs_best = None if group is first else difference(group, first, metric.key)
        rows.append(Row(group, base, change, gap_closed(group, base, metric), first, vs_best, color))
    return rows


def extremes(rows: list[Row]) -> list[Row]:
    """Return the best and the worst rows of a long table, with best row and baseline of each task; else all rows."""
    if len(rows) <= MOST_ROWS:
        return rows
    tasks = tasks_of([row.group for row in rows])
    firsts = [row.best.label for row in rows] if len(tasks) <= MOST_TASKS else []
    bases = [task[0].label for groups in tasks[:MOST_TASKS] if (task := [g for g in groups if g.supervised])]
    labels = {row.group.label for row in rows[:BEST] + rows[-WORST:]} | {*firsts, *bases}
    return [row for row in rows if row.group.label in labels]


def by_loss(rows: list[Row]) -> list[Row]:
    """Return the same rows, compared by their losses, the lowest first."""
    compared = [
        replace(r, difference=difference(r.group, r.baseline), gap_closed=gap_closed(r.group, r.baseline)) for r in rows
    ]
    return sorted(compared, key=lambda row: row.group.required_mean().mean)


def columns_of(rows: list[Row], metric: Metric, lines: list[ReferenceLine]) -> Columns:
    """Return the columns for a table that is judged by `metric`."""
    groups, with_gap = [row.group for row in rows], [row for row in rows if row.gap_closed]
    metrics = measured(groups, metric)
    constant = constant_values(groups, metrics, lines)
    counts = Counter(group.task for group in groups)
    seeds = {len(group.runs) for group in groups}
    return Columns(
        metrics=[m for m in metrics if m not in constant],
        constant={m.label: value for m, value in constant.items()},
        ranked=any(counts[row.group.task] > 2 and row.best is not row.baseline for row in rows),
        gaps=bool(with_gap),
        footnote=0 < sum(row.cotrained for row in with_gap) < len(with_gap),
        seeds=seeds.pop() if len(seeds) == 1 else None,
    )


def measured(groups: list[Group], metric: Metric) -> list[Metric]:
    """Return the metrics beside `metric` that some group has a value for.

    Bits per byte are left to the CSV if all groups have one tokenizer, since they are then a multiple of the loss.
    """
    tokenizers = {result.get("bytes_per_token") for g in groups for result in g.results}
    left_out = {metric} | ({BY_NAME["bpb"]} if len(tokenizers) == 1 else set())
    return [m for m in metrics_of(groups) if m.column and m not in left_out and any(g.values(m.key) for g in groups)]


def metrics_of(groups: list[Group]) -> tuple[Metric, ...]:
    """Return all metrics, with those of the parts of a mixture."""
    return catalog.with_parts(key for group in groups for result in group.results for key in result["final"])


def constant_values(groups: list[Group], metrics: Iterable[Metric], lines: list[ReferenceLine]) -> dict[Metric, str]:
    """Return the metrics with one displayed value in all groups and lines that have them."""
    shown = {}
    for metric in metrics if len(groups) > 1 else ():
        values = [mean.mean for g in groups if (mean := g.mean(metric.key))]
        values += [line.values[metric.key] for line in lines if metric.key in line.values]
        shown[metric] = {format_number(value, 3) for value in values}
    return {metric: values.pop() for metric, values in shown.items() if len(values) == 1}


def reference_lines(groups: list[Group]) -> list[ReferenceLine]:
    """Return teachers, students before training if that was measured, and the entropy of the data if it is known."""
    students: dict[tuple[str, str], list[Group]] = {}
    for group in groups:
        if group.values(LOSS.teacher_key):
            config = group.results[0]["config"]  # a group's own leaves out what its outcome does not depend on
            note = ", cotrained" if config["logits"] == "cotrained" else ""
            students.setdefault((subset(config, "teacher", "data"), note), []).append(group)
    keys, lines = varying([json.loads(text) for text, _ in students]), []
    for (text, note), members in students.items():
        name = label(json.loads(text), keys) or str(model_name(members[0].config, "teacher"))
        seen = {
            m.key: [v for g in members for v in g.values(m.teacher_key).values()]
            for m in metrics_of(members)
            if m.column
        }
        values = {k: fmean(v) for k, v in seen.items() if v}
        if per_token := members[0].results[0].get("bytes_per_token"):
            values["val/bpb"] = values[LOSS.key] / math.log(2) / per_token
        lines.append(ReferenceLine(f"teacher {name.removeprefix('teacher=')}{note}", "solid", values))
    lines += before_training(groups)
    entropies = (result.get("entropy") for g in groups for result in g.results)
    floors = {entropy for entropy in entropies if entropy is not None}
    return lines + [ReferenceLine("entropy of the data", "dot", {LOSS.key: floor}) for floor in sorted(floors)]


def before_training(groups: list[Group]) -> list[ReferenceLine]:
    """Return the values of pretrained students before training, a line for each start."""
    starts: dict[str, list[dict[str, float]]] = {}
    for result in (result for group in groups for result in group.results if result.get("initial")):
        config = with_student(result["config"])
        starts.setdefault(subset(config, "student", "start", "data"), []).append(result["initial"])
    keys, lines = varying([json.loads(text) for text in starts]), []
    for text, initials in starts.items():
        seen = {
            m.key: [initial[m.key] for initial in initials if m.key in initial] for m in metrics_of(groups) if m.column
        }
        values = {k: fmean(v) for k, v in seen.items() if v}
        lines.append(ReferenceLine(f"before training {label(json.loads(text), keys)}".rstrip(), "", values))
    return lines
