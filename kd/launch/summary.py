"""Summary of a sweep's runs for people: labels, reasons of refusal, and outcomes."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from rich.table import Table

from kd.errors import UserError
from kd.evaluation.catalog import LOSS, ROUGE_L, with_parts
from kd.launch.job import Job
from kd.runs.outcome import RunState
from kd.runs.provenance import doubts
from kd.runs.run import Run
from kd.system import files
from kd.system.console import format_duration, styled


def varying(jobs: Sequence[Sequence[str]], names: Sequence[str]) -> list[str]:
    """Return the words of each run, without those that all have in common.

    A name stands for the words that all of its runs share.
    """
    alike = {
        name: set.intersection(*(set(j) for j, other in zip(jobs, names) if other == name)) for name in names if name
    }
    alike[""] = set.intersection(*map(set, jobs)) if len(jobs) > 1 else set()
    return [" ".join([*filter(None, [name]), *(w for w in j if w not in alike[name])]) for j, name in zip(jobs, names)]


def refused(jobs: Sequence[Sequence[str]], labels: Sequence[str], wrong: Mapping[int, str]) -> str:
    """Return why some of the jobs cannot be done, and words for the others. wrong: number of a job -> reason.

    Only commands to type are indented, as in every error.
    """
    by_reason: dict[str, list[int]] = {}
    for number, reason in wrong.items():
        by_reason.setdefault(reason, []).append(number)
    lines = [f"{len(wrong)} of {len(jobs)} runs cannot be made, so none is started:"]
    for reason, numbers in by_reason.items():
        others = f" and {len(numbers) - 1} more" if numbers[1:] else ""
        lines.append(f"- {labels[numbers[0]] or shlex.join(jobs[numbers[0]])}{others}: {reason}")
    for key in dict.fromkeys(word.partition("=")[0] for job in jobs for word in job):
        values = [next((w.partition("=")[2] for w in job if w.startswith(f"{key}=")), None) for job in jobs]
        bad = {value for number, value in enumerate(values) if number in wrong}
        good = dict.fromkeys(value for number, value in enumerate(values) if number not in wrong)
        typed = [value for value in good if value is not None]
        if good and len(typed) == len(good) and bad.isdisjoint(good):
            lines.append(f"To leave them out, type {key}={','.join(typed)}.")
            break
    return "\n".join(lines)


def outcome(job: Job) -> tuple[dict | None, dict]:
    """Return the result and the state of a run, as far as its URL answers."""
    try:
        return job.run.result_and_state(wait=0)
    except UserError as error:
        return None, job.state or {"state": RunState.UNKNOWN, "reason": str(error)}


def summary(name: str, jobs: Sequence[Job]) -> Table:
    """Return a table of the runs of a sweep: state, losses (and Rouge-L), time, memory, and why a run is not done."""
    table = Table(title=f"sweep {name}", title_justify="left", pad_edge=False, box=None)
    results, states = zip(*map(outcome, jobs), strict=True) if jobs else ((), ())
    shown = with_parts(key for result in results if result for key in result["final"])
    measures = {m.label: m.key for m in shown if m in (LOSS, ROUGE_L) or m.key.startswith(f"{LOSS.key}/")}
    measures = {k: v for k, v in measures.items() if v == LOSS.key or any(v in r["final"] for r in results if r)}
    for column in ("run", "state", *measures, "time", "memory", ""):
        table.add_column(column, justify="left" if column in ("run", "state", "") else "right")
    for job, result, state in zip(jobs, results, states, strict=True):
        ended, why = RunState(state["state"]), state["reason"]
        failed = ended.is_failure
        if result is not None:
            why = "; ".join(doubts(result))
        elif ended == RunState.NOT_BEGUN:
            why = "the same command starts it"
        elif failed:
            why = f"{_short(why, job.run)}  {job.log}"
        table.add_row(
            job.label, styled(ended, "green" if ended == RunState.DONE else "red" if failed else "yellow"),
            *(f"{result['final'][key]:.4f}" if result and key in result["final"] else "" for key in measures.values()),
            format_duration(state["seconds"]) if "seconds" in state else "",
            files.format_bytes(state["peak_memory"]) if "peak_memory" in state else "", styled(why, "dim"),
        )  # fmt: skip
    return table


def _short(reason: str, run: Run) -> str:
    """Return the start of a reason, with paths relative to the run or the root, since long ones would displace it."""
    for place in (run.location, run.folder, run.root, run.folder.parent):
        reason = reason.replace(f"{place}/", "")
    return reason[:100]
