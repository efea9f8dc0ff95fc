"""Numbers of a report, for HTML, Markdown, CSV and W&B."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from kd.config import search_path
from kd.errors import UserError
from kd.evaluation.catalog import Metric
from kd.experiment.results import Entry, load_sweep
from sweeps.report import notes
from sweeps.report.benchmarks import benchmark_section
from sweeps.report.groups import Group, describe_task, group_runs, primary_metric
from sweeps.report.marginals import Axis, marginal_means
from sweeps.report.question import papers_answer, question
from sweeps.report.samples import Sample, samples_of
from sweeps.report.sections import Section, plugged_in
from sweeps.report.table import (
    BEST,
    WORST,
    Columns,
    ReferenceLine,
    Row,
    columns_of,
    extremes,
    reference_lines,
    rows_of,
)
from sweeps.report.verdict import Verdict, headline, verdicts_of


@dataclass(frozen=True)
class Report:
    """Finished runs of a sweep, compared."""

    name: str
    question: str
    papers_answer: str
    entries: list[Entry]  # of the manifest, unfinished ones too
    metric: Metric  # that the sweep is judged by
    groups: list[Group]  # the best first, as rows
    rows: list[Row]
    shown: list[Row]  # in plots and in the first table: all, or the best and the worst
    axes: list[Axis]  # marginal means, if not all rows are shown
    columns: Columns
    reference_lines: list[ReferenceLine]
    verdicts: list[Verdict]  # one per task
    facts: dict[str, str]
    warnings: list[str]
    caveats: list[str]
    samples: list[Sample]
    sections: tuple[Section, ...] = ()  # benchmarks, and those of plug-ins

    @property
    def task(self) -> str:
        return describe_task(self.groups)

    @property
    def extract(self) -> str:
        """Sentence on the rows that are shown of a long table; empty if all are."""
        if len(self.shown) == len(self.rows):
            return ""
        return f"Of {len(self.rows)} rows, the best {BEST} and the worst {WORST}, and those to compare with."

    @property
    def several_seeds(self) -> bool:
        return any(len(group.runs) > 1 for group in self.groups)

    @property
    def verdict(self) -> str:
        """Verdict as one line, with the number of runs that it does not count."""
        states = {entry.folder: entry.state for entry in self.entries}
        unfinished = sum(state != "done" for state in states.values())
        note = f" [{unfinished} of {len(states)} runs {'is' if unfinished == 1 else 'are'} not done and not counted]"
        return headline(self.verdicts, self.groups) + (note if unfinished else "")


def build_report(root: str | Path, name: str) -> Report:
    """Return the report of a sweep; raise UserError if none of its runs is done."""
    entries = load_sweep(root, name)
    groups = group_runs(entries)
    if not groups:
        listing = "\n".join(f"  {e.state:<10}  {shlex.join(e.overrides)}  {e.message}".rstrip() for e in entries)
        why, hint = f"has no run that is done yet:\n{listing}", search_path.how_to_run(name, root)
        raise UserError(option="sweeps", got=name, why=why, hint=hint)
    metric, rows, lines = primary_metric(groups), rows_of(groups), reference_lines(groups)
    columns, shown = columns_of(rows, metric, lines), extremes(rows)
    report = Report(
        name=name,
        question=question(name),
        papers_answer=papers_answer(name),
        entries=entries,
        metric=metric,
        groups=groups,
        rows=rows,
        shown=shown,
        axes=marginal_means(groups, metric) if len(shown) < len(rows) else [],
        columns=columns,
        reference_lines=lines,
        verdicts=verdicts_of(groups, [entry for entry in entries if entry.result is None]),
        facts=notes.facts(entries, groups),
        warnings=notes.warnings(groups),
        caveats=notes.caveats(groups, rows, lines, columns.ranked),
        samples=samples_of(shown),
    )
    sections, faults = plugged_in(report)
    benchmarks = benchmark_section(rows)
    own_first = (*([benchmarks] if benchmarks else []), *sections)
    return replace(report, sections=own_first, warnings=[*report.warnings, *faults])
