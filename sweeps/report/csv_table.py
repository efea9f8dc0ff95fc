"""Report as CSV, a line per run. Marginal means as CSV, a line per value of an axis."""

from __future__ import annotations

import csv
import io

from kd.evaluation.catalog import BENCHMARK, LOSS
from kd.experiment.results import Entry
from kd.system.console import strip_control_characters
from sweeps.report.groups import Group, name_without_loss, outcome_settings, varying
from sweeps.report.report import Report
from sweeps.report.table import Row

NOTHING = (None, None, None)  # in place of an interval


def csv_table(report: Report) -> str:
    """Return a line per run: state, settings that vary, seed, final metrics, tokens, FLOPs, seconds, command.

    difference and to_the_first are those of the report's metric to the run of the same seed of the baseline and of the
    best row of its task. Settings of an unfinished run are those that were typed.
    """
    runs = list({entry.folder: entry for entry in report.entries}.values())
    keys = settings_that_vary(report.rows)
    metrics = sorted({k for e in runs if e.result for k in e.result["final"] if k.startswith(("val/", BENCHMARK))})
    metrics.sort(key=lambda key: (key != LOSS.key, key.startswith(BENCHMARK)))
    rows = {e.folder: row for row in report.rows for e in row.group.runs.values()}
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "state", "reason", "label", *keys, "seed", *metrics, "difference", "to_the_first",
                     "step", "tokens", "flops", "seconds", "command"])  # fmt: skip
    for entry in runs:
        row, result = rows.get(entry.folder), entry.result
        cells: list
        if result is None:
            typed = typed_settings(entry)
            cells = ["", *(typed.get(k, "") for k in keys), typed.get("seed", ""), *[""] * (len(metrics) + 6)]
        else:
            config = row.group.config if row else outcome_settings(result["config"])
            final, seed = result["final"], result["config"]["seed"]
            cells = [row.group.label if row else "", *(config.get(k) for k in keys), seed]
            cells += [final.get(k) for k in metrics]
            for other in (row.baseline, row.best) if row else (None, None):
                cells.append(seed_difference(row.group, other, seed, report.metric.key) if row and other else None)
            cells += [result.get(k) for k in ("step", "tokens", "flops", "seconds")]
        writer.writerow(map(safe_cell, [entry.folder.name, entry.state, entry.message, *cells, entry.command]))
    return out.getvalue()


def axes_table(report: Report) -> str:
    """Return the marginal means, a line per value of an axis; numbers are empty where a value is not compared."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["axis", "value", "mean", "half_interval", "seeds", "to_the_best", "to_the_best_half_interval",
                     "least", "most", "best_in", "used", "combinations", "runs"])  # fmt: skip
    for axis in report.axes:
        for value in axis.means:
            mean, change = value.mean or NOTHING, value.difference or NOTHING
            numbers = (
                [*mean, *change[:2], value.least, value.most, value.times_best, axis.used] if value.mean else [""] * 9
            )
            cells = [axis.key, value.text, *numbers, axis.combinations, value.runs]
            writer.writerow(map(safe_cell, cells))
    return out.getvalue()


def settings_that_vary(rows: list[Row]) -> list[str]:
    """Return the settings that vary among the rows of one kind; logits if some rows are distilled and some not."""
    keys = dict.fromkeys(["logits"] if len({row.group.distilled for row in rows}) > 1 else [])
    configs = [row.group.config for row in rows]
    for kind in sorted({name_without_loss(config) for config in configs}, key=str):
        keys |= dict.fromkeys(varying([config for config in configs if name_without_loss(config) == kind]))
    return list(keys)


def typed_settings(entry: Entry) -> dict[str, str]:
    """Return the settings of a command by their words: student=1m is student.size."""
    words = dict(word.lstrip("+").partition("=")[::2] for word in entry.overrides)
    return words | {f"{role}.size": words[role] for role in ("student", "teacher") if role in words}


def seed_difference(group: Group, other: Group, seed: int, key: str) -> float | None:
    """Return a metric of one run minus that of the other group's run with its seed."""
    if other is group or seed not in other.runs:
        return None
    return group.values(key)[seed] - other.values(key)[seed]


def safe_cell(cell: object) -> object:
    """Return a cell that no spreadsheet takes for a formula."""
    if type(cell) is not str:
        return cell
    cell = strip_control_characters(cell)
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell
