"""Section of a report on benchmarks: means with intervals over seeds, and paired differences to the baseline."""

from __future__ import annotations

from statistics import fmean

from kd.evaluation import catalog
from sweeps.report.sections import Section
from sweeps.report.statistics import Interval, difference
from sweeps.report.table import Row
from sweeps.report.wording import format_number, plus_minus

TEXT = (
    "Values are means over seeds, and differences to the baseline are paired over seeds, each with its 95% interval. "
    "The last column is the standard error of one run over the examples of the benchmark, from lm-eval. It is no "
    "smaller with more seeds."
)


def benchmark_section(rows: list[Row]) -> Section | None:
    """Return the section; None if no run has a benchmark."""
    metrics = catalog.benchmarks(result for row in rows for result in row.group.results)
    cells = []
    for metric in metrics:
        for row in rows:
            if not (mean := row.group.mean(metric.key)):
                continue
            change = difference(row.group, row.baseline, metric.key) if row.baseline is not row.group else None
            errors = [x for result in row.group.results if (x := catalog.standard_error(result, metric)) is not None]
            cells.append(
                (metric.label, row.group.label, _text(mean), _text(change, True), fmean(errors) if errors else None)
            )
    columns = ("benchmark", "run", "value", "difference", "standard error")
    return Section("Benchmarks", TEXT, columns, cells) if cells else None


def _text(value: Interval | None, signed: bool = False) -> str | None:
    return None if value is None else format_number(value.mean, 4, signed) + plus_minus(value.half, 4)
