"""The table of a report: its rows, what stands beside them, and how numbers are written."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from statistics import fmean
from typing import NamedTuple

from kd.identity import model_name
from kd.run import EXACCERR_LENGTH
from sweeps.compare import LOSS, Goal, Group, Interval, baseline, closed, difference, goal, label, subset, varying
from sweeps.finding import by_task, leader

MEASURES = {  # columns of the table: what they are called and what they mean
    "val/rouge_l": ("rouge-l", "Rouge-L F1 of responses to held-out prompts, stemmed; papers print it times 100"),
    "val/exact_match": ("exact", "share of responses that equal the reference but for white space"),
    "val/perplexity": ("perplexity", "of the references: the exponential of the loss"),
    "val/bpb": ("bits per byte", "the loss per byte of text, which can be compared where tokenizers differ"),
    "val/fkl": ("fkl", "KL(teacher || student), nats per token; 0 is a perfect copy of the teacher"),
    "val/rkl": ("rkl", "KL(student || teacher), nats per token"),
    "val/acceptance": ("acceptance", "1 - total variation distance: how often speculative decoding keeps a token"),
    "val/agreement": ("agreement", "share of positions where student and teacher rank the same token first"),
    "val/accuracy": ("accuracy", "share of held-out tokens that the student ranks first"),
    "val/ece": ("ece", "expected calibration error: mean |confidence - accuracy| over 15 bins; 0 is calibrated"),
    "val/exaccerr": ("exaccerr", "excess accumulated error: how much further the student is from the teacher, by fkl "
                     f"over the first {EXACCERR_LENGTH} tokens, after its own text than after the teacher's"),
    "val/on_policy_rkl": ("on-policy rkl", "KL(student || teacher) on text that the student wrote, nats per token"),
    "val/on_policy_tvd": ("on-policy tvd", "total variation distance between the two on that text"),
    "val/on_policy_ece": ("on-policy ece", "calibration error there, with the teacher's distribution as the truth"),
    "val/distinct_4": ("distinct-4", "distinct 4-grams of words in all responses together, as a share of all"),
    "val/response_length": ("length", "tokens of a response, without its end"),
    "val/ended": ("ended", "share of responses that end by themselves, and not because their row is full"),
}  # fmt: skip
COLORS = ("#3b78d8", "#d9772f", "#2a9d78", "#b855a8", "#b0931f", "#cf4a5a", "#4f8fa3", "#8468d0", "#73892f", "#9c664a")
GREY = "#8c929c"


class Row(NamedTuple):
    """A line of the table: a group and what it is compared to."""

    group: Group
    base: Group | None
    change: Interval | None
    closed: Interval | None
    first: Group  # that leads its task
    behind: Interval | None  # difference to that one
    color: str

    @property
    def own_teacher(self) -> bool:
        """Whether its teacher was trained along with it, so that no other row has the same."""
        return self.group.config["logits"] == "cotrained"


class Mark(NamedTuple):
    """What stands beside the students: a teacher, students before training, or the lowest loss there can be."""

    label: str
    dash: str  # of its line in plots; empty for none
    values: dict[str, float]


class Columns(NamedTuple):
    """Which columns the table has, and what is said under it instead."""

    measures: dict[str, tuple[str, str]]  # titles and meanings
    same: dict[str, str]  # titles of measures that are the same in all rows, and their value
    ranked: bool  # whether the difference to the first of a task says more, of some row, than that to the baseline
    gaps: bool
    footnote: bool  # whether some gaps are those to another teacher
    seeds: int | None  # of all rows; None where they differ


def rows(groups: list[Group]) -> list[Row]:
    """The table, best first; colors go to the best."""
    of, colors, found = goal(groups), iter(COLORS), []
    firsts, mixed = {some[0].task: leader(some, of) for some in by_task(groups)}, any(not g.alone for g in groups)
    for group in groups:
        base, first = baseline(group, groups), firsts[group.task]
        color = GREY if group.alone and mixed else next(colors, GREY)
        behind = None if group is first else difference(group, first, of.key)
        found.append(Row(group, base, difference(group, base, of.key), closed(group, base, of), first, behind, color))
    return found


def by_loss(table: list[Row]) -> list[Row]:
    """The same rows, compared by their losses, the lowest first."""
    found = [r._replace(change=difference(r.group, r.base), closed=closed(r.group, r.base)) for r in table]
    return sorted(found, key=lambda row: row.group.mean().mean)


def columns(table: list[Row], of: Goal, beside: list[Mark]) -> Columns:
    """Only those that tell something of these rows."""
    groups, closed_ = [row.group for row in table], [row for row in table if row.closed]
    found = measures(groups, of)
    same = alike(groups, found, beside)
    counts = Counter(group.task for group in groups)
    seeds = {len(group.runs) for group in groups}
    return Columns(
        {k: says for k, says in found.items() if k not in same},
        {found[k][0]: value for k, value in same.items()},
        any(counts[row.group.task] > 2 and row.first is not row.base for row in table),
        bool(closed_),
        0 < sum(row.own_teacher for row in closed_) < len(closed_),
        seeds.pop() if len(seeds) == 1 else None,
    )


def measures(groups: list[Group], of: Goal) -> dict[str, tuple[str, str]]:
    """Those beside the goal that any group has a value for, the loss first.

    Bits per byte, a multiple of the loss where all have one tokenizer, are then in the CSV alone.
    """
    loss = {LOSS.key: (LOSS.title, "mean negative log-likelihood of held-out text, nats per token")}
    tokenizers = {result.get("bytes_per_token") for g in groups for result in g.results}
    told = {of.key} | ({"val/bpb"} if len(tokenizers) == 1 else set())
    return {k: says for k, says in (loss | MEASURES).items() if k not in told and any(g.of(k) for g in groups)}


def alike(groups: list[Group], keys: Iterable[str], beside: list[Mark]) -> dict[str, str]:
    """Measures that are the same, as shown, wherever they were measured, and of what value."""
    shown = {}
    for key in keys if len(groups) > 1 else ():
        values = [mean.mean for g in groups if (mean := g.mean(key))]
        shown[key] = {number(value, 3) for value in (*values, *(m.values[key] for m in beside if key in m.values))}
    return {key: of.pop() for key, of in shown.items() if len(of) == 1}


def marks(groups: list[Group]) -> list[Mark]:
    """Teachers, students before training where that was measured, and, where it is known, the entropy of the data."""
    taught: dict[tuple[str, str], list[Group]] = {}
    for group in groups:
        if group.of("val/teacher_lm"):
            config = group.results[0]["config"]  # a group's own leaves out what its outcome does not depend on
            learns = ", cotrained" if config["logits"] == "cotrained" else ""
            taught.setdefault((subset(config, "teacher", "data"), learns), []).append(group)
    keys, found = varying([json.loads(text) for text, _ in taught]), []
    for (text, learns), members in taught.items():
        said = label(json.loads(text), keys) or str(model_name(members[0].config, "teacher"))
        own = {k: k.replace("val/", "val/teacher_") for k in (LOSS.key, *MEASURES)}
        seen = {k: [v for g in members for v in g.of(name).values()] for k, name in own.items()}
        values = {k: fmean(v) for k, v in seen.items() if v}
        if per_token := members[0].results[0].get("bytes_per_token"):
            values["val/bpb"] = values["val/lm"] / math.log(2) / per_token
        found.append(Mark(f"teacher {said.removeprefix('teacher=')}{learns}", "solid", values))
    found += untrained(groups)
    floors = {result.get("entropy") for g in groups for result in g.results} - {None}
    return found + [Mark("entropy of the data", "dot", {"val/lm": floor}) for floor in sorted(floors)]


def untrained(groups: list[Group]) -> list[Mark]:
    """What students that are not random were before their training, a mark for each of what they start from."""
    starts: dict[str, list[dict[str, float]]] = {}
    for result in (result for group in groups for result in group.results if result.get("initial")):
        starts.setdefault(subset(result["config"], "student", "start", "data"), []).append(result["initial"])
    keys, found = varying([json.loads(text) for text in starts]), []
    for text, initials in starts.items():
        seen = {k: [initial[k] for initial in initials if k in initial] for k in (LOSS.key, *MEASURES)}
        values = {k: fmean(v) for k, v in seen.items() if v}
        found.append(Mark(f"before training {label(json.loads(text), keys)}".rstrip(), "", values))
    return found


def number(value: float | None, digits: int = 4, sign: bool = False) -> str:
    """With a true minus sign; a dash where there is no value."""
    return "–" if value is None else f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")
