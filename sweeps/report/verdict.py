"""Verdict on a sweep: the best group, its difference to the baseline, and the groups within noise of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kd.config.options import option_of
from kd.evaluation.catalog import Metric
from kd.experiment.results import Entry
from kd.runs.identity import is_under
from sweeps.report.groups import (
    TASK,
    Group,
    baseline_name,
    describe_task,
    is_evaluation,
    label,
    name_without_loss,
    primary_metric,
    tasks_of,
    varying,
)
from sweeps.report.statistics import Interval, baseline, best_group, difference, gap_closed, indistinguishable, interval
from sweeps.report.wording import format_number, join_words, plus_minus

MOST_NAMED, MOST_TASKS = 3, 4  # groups and tasks that are named one by one


@dataclass(frozen=True)
class Verdict:
    """Best group of a task, in numbers."""

    task: str  # label of the task; empty if the sweep has one
    best: str
    rivals: int  # number of groups that it was picked from, itself included
    metric: Metric
    value: Interval  # of the best, over the seeds that its baseline has too
    baseline: str | None  # None: there is none, or the best is language modelling alone itself
    missing_baseline: str  # what is missing and what to type; empty if nothing is
    difference: Interval | None  # to the baseline, paired over seeds
    gap_closed: Interval | None
    tied: list[str]  # within noise of the best
    surely_better: list[str]  # than the baseline, if the best is not
    ahead_on_one_seed: list[str]  # of the best

    @property
    def improves(self) -> bool:
        return self.difference is not None and self.metric.sign * self.difference.mean > 0

    @property
    def digits(self) -> int:
        return 4 if self.difference and abs(self.difference.mean) < 0.005 else 3

    def line(self) -> str:
        """Return the whole verdict as one line."""
        change, n = self.difference, (self.difference or self.value).n
        rank = f" is {extreme(self.metric)} of {self.rivals}" if self.rivals > 1 else ""
        half = "" if change else plus_minus(self.value.half, self.digits)
        parts = [f"{self.best}{rank}: {format_number(self.value.mean, self.digits)}{half} {self.metric.unit}"]
        if change:
            parts.append(f"{self._change(change)} against {self.baseline}")
            parts += ["within noise"] if change.within_noise else []
            if not self.improves:
                parts.append("which is no improvement")
            elif self.gap_closed and not change.within_noise:
                parts.append(f"{percent(self.gap_closed)} of the gap to the teacher closed")
        seeds = f"{n} seeds, {'paired, ' if change else ''}95% interval" if n > 1 else "1 seed: no interval"
        text = f"{', '.join(parts)} ({seeds})"
        for caveat, names in (
            ("cannot be told apart from it", self.tied),
            ("better beyond noise", self.surely_better),
            ("ahead of it on 1 seed, which may be chance", self.ahead_on_one_seed),
        ):
            text += f"; {caveat}: {shortened(names)}" if names else ""
        return text + (f"; {self.missing_baseline}" if self.missing_baseline else "")

    def short(self) -> str:
        """Return task, best group and its difference."""
        change = f" ({self._change(self.difference)})" if self.difference else ""
        tied = f", like {shortened([self._within_task(name) for name in self.tied])}" if self.tied else ""
        value = format_number(self.value.mean, self.digits)
        return f"{self.task}: {self._within_task(self.best)} {value}{change}{tied}"

    def _within_task(self, label: str) -> str:
        return " ".join(word for word in label.split(" ") if word not in self.task.split(" "))

    def _change(self, change: Interval) -> str:
        return format_number(change.mean, self.digits, True) + plus_minus(change.half, self.digits)


def verdicts_of(groups: list[Group], unfinished: Sequence[Entry] = ()) -> list[Verdict]:
    """Return a verdict for each task that has groups to compare. groups: the best first; unfinished: other runs."""
    tasks = [task for task in tasks_of(groups) if not all(g.supervised for g in task)] or tasks_of(groups)
    keys = [k for k in varying([g.config for g in groups]) if is_under(k, TASK)] if len(tasks) > 1 else []
    metric = primary_metric(groups)
    return [judge(task, metric, label(task[0].config, keys), unfinished) for task in tasks]


def judge(task: list[Group], metric: Metric, name: str, unfinished: Sequence[Entry]) -> Verdict:
    """Return the verdict on the groups of one task, the best first."""
    rivals, alone = [g for g in task if not g.supervised] or task, [g for g in task if g.supervised]
    best = best_group(rivals, metric)
    base = None if best.supervised else baseline(best, alone)
    change = difference(best, base, metric.key) if base else None
    changes = [(g, difference(g, baseline(g, alone), metric.key)) for g in rivals if not g.supervised]
    sure = [g for g, c in changes if c and metric.sign * c.mean > 0 and c.beyond_noise]
    leads = [(g, difference(g, best, metric.key)) for g in rivals if g is not best]
    value = interval(x for seed, x in best.values(metric.key).items() if base is None or seed in base.runs)
    assert value is not None, "the best group has runs, and shares seeds with its baseline"
    return Verdict(
        task=name,
        best=best.label,
        rivals=len(rivals),
        metric=metric,
        value=value,
        baseline=base.label if base else None,
        missing_baseline=""
        if best.supervised or base or is_evaluation(best.config)
        else missing_baseline(best, rivals, unfinished),
        difference=change,
        gap_closed=gap_closed(best, base, metric),
        tied=[g.label for g in indistinguishable(best, rivals, metric)],
        surely_better=[] if best in sure else [g.label for g in sure],
        ahead_on_one_seed=[g.label for g, lead in leads if lead and lead.half is None and metric.sign * lead.mean > 0],
    )


def missing_baseline(best: Group, rivals: list[Group], unfinished: Sequence[Entry]) -> str:
    """Return the missing baseline and the words to type for it."""
    baseline = name_without_loss(best.config | {"logits": "none", "rollout": "none"})
    seeds = join_words([str(seed) for seed in sorted(best.runs)])
    text = (
        f"not compared with training without a teacher, since no finished run of {baseline} has the same "
        f"{describe_task([best])} and {'one of the seeds' if len(best.runs) > 1 else 'seed'} {seeds}"
    )
    return f"{text} (to get it, {how_to_get_baseline(best, rivals, unfinished)})"


def how_to_get_baseline(best: Group, rivals: list[Group], unfinished: Sequence[Entry]) -> str:
    """Return what to do for a baseline: an override of the whole command only if it leaves each line as it is."""
    tasks = [task_words(entry) for entry in best.runs.values()]
    if any(trains_without_teacher(entry) and task_words(entry) in tasks for entry in unfinished):
        return "run the sweep again, since its run is not done"
    if any(group.config.get("rollout", "none") != "none" for group in rivals):
        return "add runs with logits=none rollout=none to the sweep"
    source, *others = {group.config["logits"] for group in rivals}
    words = [word for group in rivals for entry in group.runs.values() for word in entry.overrides]
    if others or any(word.lstrip("+").startswith("logits.") for word in words):  # which logits=none lacks
        return "add runs with logits=none to the sweep"
    return f"type the command of the sweep again with logits=none,{source}"


def trains_without_teacher(entry: Entry) -> bool:
    """Return True if a run's words choose neither a teacher's distributions nor its text."""
    logits, rollout = (option_of(group, entry.overrides) for group in ("logits", "rollout"))
    return logits == "none" and rollout in (None, "none")


def task_words(entry: Entry) -> set[str]:
    """Return the words of a run that choose its task and its seed."""
    keys = (*TASK, "experiment", "seed")
    return {word for word in entry.overrides if is_under(word.partition("=")[0], keys)}


def headline(verdicts: list[Verdict], groups: list[Group]) -> str:
    """Return the verdict on a sweep as one line: in full for one task, else the best of each task."""
    if len(verdicts) == 1:
        return verdicts[0].line()
    changes, metric = [(v, v.difference) for v in verdicts if v.difference], verdicts[0].metric
    best, settings = f"{extreme(metric)} {metric.label}", f"settings of {describe_task(groups)}"
    summary = f"{best} in {len(verdicts)} {settings}"
    if changes:
        sure = sum(v.improves and change.beyond_noise for v, change in changes)
        better = f"better than {baseline_name(groups)}, beyond noise in {sure}"
        summary = f"in {sum(v.improves for v, _ in changes)} of {len(changes)} {settings} the {best} is {better}"
    parts = [summary, *(verdict.short() for verdict in verdicts[:MOST_TASKS])]
    more = len(verdicts) - MOST_TASKS
    return "; ".join([*parts, f"{more} more in the table"] if more > 0 else parts)


def extreme(metric: Metric) -> str:
    return "highest" if metric.better == "higher" else "lowest"


def percent(share: Interval) -> str:
    return f"{share.mean:.0%}" + (f" ± {share.half:.0%}" if share.half is not None else "")


def shortened(names: list[str]) -> str:
    """Join names; only the first ones if they are many."""
    shown = MOST_NAMED - 1
    return join_words(names if len(names) <= MOST_NAMED else [*names[:shown], f"{len(names) - shown} more"])
