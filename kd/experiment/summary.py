"""Result of a run as a table in the terminal."""

from __future__ import annotations

from rich.table import Table

from kd.data.counts import in_words
from kd.evaluation import catalog
from kd.experiment.prerequisites import FinishedRun
from kd.runs import provenance
from kd.runs.export import selected_step
from kd.system.console import console, format_duration, styled

NOT_ALL = ("cut", "unlearned", "unused", "special_as_text", "prompts_only")  # counts that a run's table has


def show(outcome: FinishedRun) -> None:
    """Print the result of a run as a table. For a run that was done before, warnings come first."""
    run, result = outcome.run, outcome.result
    notes = [provenance.done_before(result), *provenance.doubts(result)] if outcome.before else []
    for note in notes:
        console.print(f"{note[0].upper()}{note[1:]}.", style="yellow", soft_wrap=True)
    spent = f"{result['tokens']:,} tokens in {format_duration(result['seconds'])}, {result['flops']:.2e} FLOPs"
    console.print(measures(result))
    if selected := selected_step(result):
        console.print(f"{selected}.", soft_wrap=True)
    counts = result.get("data") or {}
    if counts.get("left_out", {}).keys() - {"limit"} or any(counts.get(name) for name in NOT_ALL):
        console.print(f"Data: {in_words(counts)}.", soft_wrap=True)
    console.print(f"{spent}. All of it: {run.location}", highlight=False, soft_wrap=True)


def measures(result: dict) -> Table:
    """Return the metrics of a result with their meaning, and their values before training if these were measured."""
    table, initial = Table(box=None, show_header=False, pad_edge=False), result.get("initial") or {}
    meanings: dict[str, str] = {}
    for metric in catalog.with_parts(result["final"]):
        meanings |= {metric.key: metric.meaning}
        meanings |= {metric.teacher_key: f"{metric.label} of the teacher"} if metric.teacher else {}
    for key, meaning in meanings.items():
        if key in result["final"]:
            meaning += f"; before training {initial[key]:.4f}" if key in initial else ""
            table.add_row(key.removeprefix("val/"), f"{result['final'][key]:.4f}", styled(meaning, "dim"))
    for metric in catalog.benchmarks([result]):
        error = catalog.standard_error(result, metric)
        value = f"{result['final'][metric.key]:.4f}" + (f" ± {error:.4f}" if error is not None else "")
        table.add_row(metric.label, value, styled(f"{metric.meaning}; ± is the standard error over these", "dim"))
    if result["entropy"] is not None:
        table.add_row("entropy", f"{result['entropy']:.4f}", styled("loss of a perfect model of this data", "dim"))
    return table
