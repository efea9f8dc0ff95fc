"""Observations for the fit of laws: the runs of a sweep, or the lines of a CSV file."""

from __future__ import annotations

import csv
import json
import math
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kd.errors import UserError
from kd.experiment.results import Entry
from kd.runs.identity import is_under, model_name
from kd.runs.provenance import doubts_of_many
from kd.system import files, programs
from kd.system.console import counted
from sweeps.fit.solver import Data
from sweeps.report.groups import is_evaluation, label, outcome_settings, subset, varying
from sweeps.report.wording import join_words

# Settings that the laws are about, or that matter too little; a note names any others in which runs differ.
MODELLED = ("student", "teacher", "trainer.steps", "trainer.batch", "trainer.micro_batch", "data.tokens")


class Observation(NamedTuple):
    """Finished run, or line of a CSV file. Fields that begin with teacher are empty for language modelling alone."""

    run: str
    parameters: float  # of the student, without embeddings
    tokens: float  # that the student was trained on
    loss: float  # on held-out text, nats per token
    flops_per_token: float | None = None  # of a forward pass of the student; 2 per parameter where it is not given
    teacher: str | None = None  # its label
    teacher_loss: float | None = None  # on the same text
    teacher_parameters: float | None = None
    teacher_tokens: float | None = None  # that the teacher was trained on
    teacher_flops_per_token: float | None = None
    entropy: float | None = None  # of the data, if it is known
    seed: str | None = None

    @property
    def compute(self) -> float:
        """FLOPs of training the student: forward, and twice that backward."""
        return 3 * self.forward_flops * self.tokens

    @property
    def forward_flops(self) -> float:
        """FLOPs of a forward pass of the student, per token."""
        return 2 * self.parameters if self.flops_per_token is None else self.flops_per_token


REQUIRED = ("parameters", "tokens", "loss")
TEXT = ("run", "teacher", "seed")


def column(runs: Iterable[Observation], name: str) -> np.ndarray:
    return np.array([getattr(run, name) for run in runs], float)


def data_of(runs: list[Observation]) -> Data:
    """Return the data of a law, with the teacher's loss if there are teachers."""
    teacher = column(runs, "teacher_loss") if runs and runs[0].teacher_loss is not None else None
    return Data(column(runs, "parameters"), column(runs, "tokens"), column(runs, "loss"), teacher)


def setting_numbers(runs: list[Observation]) -> np.ndarray:
    """Return the number of each run's setting: N, D and teacher [n]. Runs of one setting differ only in the seed."""
    return numbered((run.parameters, run.tokens, run.teacher) for run in runs)


def numbered(values: Iterable) -> np.ndarray:
    """Return a number for each value, the same for equal values [n]."""
    numbers: dict = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], int)


def from_sweep(entries: list[Entry]) -> tuple[list[Observation], list[str]]:
    """Return the finished runs of a sweep as observations, with notes on them and on the runs left out."""
    entries = list({e.folder: e for e in entries}.values())
    done, notes = [e for e in entries if e.result is not None], []
    if unfinished := len(entries) - len(done):
        notes.append(
            f"{unfinished} of {len(entries)} runs {'is' if unfinished == 1 else 'are'} not done and not counted: "
            f"{programs.command('report')} says why."
        )
    evaluations = [e for e in done if is_evaluation(e.finished["config"])]
    if evaluations:
        notes.append(
            f"{counted(len(evaluations), 'run is an evaluation', 'runs are evaluations')}, which train nothing."
        )
    done = [e for e in done if e not in evaluations]
    usable = [e for e in done if e.finished["config"]["logits"] in ("none", "online", "offline")]
    if learning := len(done) - len(usable):
        notes.append(
            f"{counted(learning, 'run has', 'runs have')} a teacher that still learns (cotrained, recorded): "
            "no law here is of those."
        )
    old = [e for e in usable if not {"non_embedding", "flops_per_token"} <= e.finished.keys()]
    if old:
        removal = shlex.join(["rm", "-r", *(str(e.folder) for e in old)])
        notes.append(
            f"{len(old)} runs are of an earlier version, which did not write FLOPs per token, and are left out. To "
            f"make them anew, type {removal} and the command of the sweep again."
        )
    usable = [e for e in usable if e not in old]
    notes += doubts_of_many(e.finished for e in usable)
    configs = [e.finished["config"] for e in usable]
    distilled = [c for c in configs if c["logits"] != "none"]
    supervised = [c for c in configs if c["logits"] == "none"]
    for some, kind in ((supervised, "by language modelling"), (distilled, "that learn from a teacher")):
        if keys := [k for k in varying([outcome_settings(c) for c in some]) if not is_under(k, MODELLED)]:
            notes.append(f"Runs {kind} also differ in {join_words(keys)}, which no law here models: taken as noise.")
    teachers = [json.loads(text) for text in sorted({subset(c, "teacher") for c in distilled})]
    names = {model_name(teacher, "teacher") for teacher in teachers}
    keys = varying(teachers) if len(names) < len(teachers) else []
    results = [e.finished for e in usable]
    repeated = [r for r in results if r["tokens"] > r["train_rows"] * r["config"]["data.seq_len"]]
    if repeated:
        notes.append(
            f"{counted(len(repeated), 'run reads its', 'runs read their')} text more than once; "
            "the laws take D as if it were all new."
        )
    return [observation(e.folder.name, e.finished, keys) for e in usable], notes


def observation(run: str, result: dict, teacher_keys: list[str]) -> Observation:
    """Return the observation of a result."""
    config = result["config"]
    student = (result["non_embedding"], result["tokens"], result["final"]["val/lm"], result["flops_per_token"])
    rest = {"entropy": result["entropy"], "seed": str(config["seed"])}
    if config["logits"] == "none":
        return Observation(run, *student, **rest)
    name = label(json.loads(subset(config, "teacher")), teacher_keys) or str(model_name(config, "teacher"))
    trained = None
    if config["teacher.size"]:
        trained = config["teacher.steps"] * config["teacher.batch"] * config["data.seq_len"]
    return Observation(
        run, *student, name.removeprefix("teacher=").replace("teacher.", ""), result["final"]["val/teacher_lm"],
        result["teacher_non_embedding"], trained, result["teacher_flops_per_token"], **rest,
    )  # fmt: skip


def from_csv(path: Path) -> list[Observation]:
    """Return the lines of a CSV file with the columns of Observation; raise UserError if it is none."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets begin a file with a mark
            reader = csv.reader(file)
            rows = [(reader.line_num, row) for row in reader if any(map(str.strip, row))]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(option=path, why=f"could not be read: {error}", hint="give a CSV file with --csv") from None
    columns = [name.strip() for name in rows[0][1]] if rows else []
    if missing := set(REQUIRED) - set(columns):
        split = next((mark for mark in ";\t" if any(mark in name for name in columns)), None)
        raise UserError(
            option=path,
            why=f"has no columns {join_words(sorted(missing))}"
            + (f", and its columns are separated by {split!r}" if split else ""),
            need=f"the columns {', '.join(Observation._fields)}, of which run and those after loss may be left out or "
            "empty" + (", separated by commas, with a point in numbers" if split else ""),
        )
    lines = [(number, dict(zip(columns, row))) for number, row in rows[1:]]
    return [from_line(line, number, f"{path}, line {number}") for number, line in lines]


def from_line(line: dict[str, str], number: int, place: str) -> Observation:
    """Return the observation of a line of a CSV file."""
    given = {k: (line.get(k) or "").strip() for k in Observation._fields}
    given["run"] = given["run"] or str(number)
    try:
        values: dict[str, Any] = {k: (v or None) if k in TEXT else float(v) if v else None for k, v in given.items()}
    except ValueError as error:
        raise UserError(option=place, why=error, need="a number") from None
    for name, value in values.items():
        if (value is None and name in REQUIRED) or (type(value) is float and not 0 < value < math.inf):
            raise UserError(option=place, why=f"{name}={given[name] or 'nothing'}", need="a number above 0")
    if (values["teacher"] is None) is not (values["teacher_loss"] is None):
        raise UserError(option=place, need="both teacher and teacher_loss, or neither")
    for role in ("", "teacher_"):
        if values[f"{role}flops_per_token"] is None and values[f"{role}parameters"]:
            values[f"{role}flops_per_token"] = 2 * values[f"{role}parameters"]
    return Observation(**values)


def to_csv(path: Path, runs: list[Observation]) -> None:
    with files.atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Observation._fields)
        writer.writerows(["" if x is None else x for x in run] for run in runs)
