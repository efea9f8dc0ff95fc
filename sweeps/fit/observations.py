"""The runs of a sweep, or the lines of a CSV file, as points that laws are fitted to."""

from __future__ import annotations

import csv
import json
import math
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kd import files
from kd.errors import UserError
from kd.identity import below, model_name
from kd.progress import counted
from kd.provenance import doubts_of_many
from sweeps.compare import Entry, label, listed, settings, subset, varying
from sweeps.laws import Data

# What the laws are about, or too small to say; runs that differ in anything else are told of.
KNOWN = ("student", "teacher", "trainer.steps", "trainer.batch", "trainer.micro_batch", "data.tokens")


class Point(NamedTuple):
    """One finished run, and one line of a CSV file. What begins with teacher is empty for language modelling alone."""

    run: str
    parameters: float  # of the student, without embeddings
    tokens: float  # that the student was trained on
    loss: float  # on held-out text, nats per token
    flops_per_token: float | None = None  # of a forward pass of the student; 2 per parameter where it is not given
    teacher: str | None = None  # what to call it
    teacher_loss: float | None = None  # on the same text
    teacher_parameters: float | None = None
    teacher_tokens: float | None = None  # that the teacher was trained on
    teacher_flops_per_token: float | None = None
    entropy: float | None = None  # the lowest loss there can be, where it is known
    seed: str | None = None

    @property
    def compute(self) -> float:
        """FLOPs of training the student: forward and twice that backward."""
        return 3 * self.flops_per_token * self.tokens


NEEDED = ("parameters", "tokens", "loss")
TEXT = ("run", "teacher", "seed")


def column(points: Iterable[Point], name: str) -> np.ndarray:
    return np.array([getattr(p, name) for p in points], float)


def data(points: list[Point]) -> Data:
    """What a law is fitted to; with the teacher's loss if there are teachers."""
    teacher = column(points, "teacher_loss") if points and points[0].teacher_loss is not None else None
    return Data(column(points, "parameters"), column(points, "tokens"), column(points, "loss"), teacher)


def settings_of(points: list[Point]) -> np.ndarray:
    """The number of each run's setting, N, D and teacher: runs that share it differ in the seed alone [n]."""
    return numbered((p.parameters, p.tokens, p.teacher) for p in points)


def numbered(values: Iterable) -> np.ndarray:
    """A number for each value, the same for those that are alike [n]."""
    numbers: dict = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], int)


def of_sweep(entries: list[Entry]) -> tuple[list[Point], list[str]]:
    """The finished runs of a sweep as points, and what there is to say of those that are none."""
    entries = list({e.folder: e for e in entries}.values())
    done, notes = [e for e in entries if e.result is not None], []
    if left := len(entries) - len(done):
        notes.append(
            f"{left} of {len(entries)} runs {'is' if left == 1 else 'are'} not done and not counted: python -m "
            "sweeps.report says why."
        )
    usable = [e for e in done if e.result["config"]["logits"] in ("none", "online", "offline")]
    if learning := len(done) - len(usable):
        notes.append(
            f"{counted(learning, 'run has', 'runs have')} a teacher that still learns (cotrained, recorded): "
            "no law here is of those."
        )
    old = [e for e in usable if not {"non_embedding", "flops_per_token"} <= e.result.keys()]
    if old:
        removal = shlex.join(["rm", "-r", *(str(e.folder) for e in old)])
        notes.append(
            f"{len(old)} runs are of an earlier version, which did not write FLOPs per token, and are left out. To "
            f"make them anew, type {removal} and the command of the sweep again."
        )
    usable = [e for e in usable if e not in old]
    notes += doubts_of_many(e.result for e in usable)
    configs = [e.result["config"] for e in usable]
    taught = [c for c in configs if c["logits"] != "none"]
    alone = [c for c in configs if c["logits"] == "none"]
    for some, kind in ((alone, "by language modelling"), (taught, "that learn from a teacher")):
        if keys := [k for k in varying([settings(c) for c in some]) if not below(k, KNOWN)]:
            notes.append(f"Runs {kind} also differ in {listed(keys)}, of which no law here knows: taken as noise.")
    teachers = [json.loads(text) for text in sorted({subset(c, "teacher") for c in taught})]
    names = {model_name(teacher, "teacher") for teacher in teachers}
    keys = varying(teachers) if len(names) < len(teachers) else []
    again = [e for e in usable if e.result["tokens"] > e.result["train_rows"] * e.result["config"]["data.seq_len"]]
    if again:
        notes.append(
            f"{counted(len(again), 'run reads its', 'runs read their')} text more than once; "
            "the laws take D as if it were all new."
        )
    return [point(e.folder.name, e.result, keys) for e in usable], notes


def point(run: str, result: dict, teacher_keys: list[str]) -> Point:
    """What the laws are fitted to, of a result."""
    config = result["config"]
    of = (result["non_embedding"], result["tokens"], result["final"]["val/lm"], result["flops_per_token"])
    own = {"entropy": result["entropy"], "seed": str(config["seed"])}
    if config["logits"] == "none":
        return Point(run, *of, **own)
    said = label(json.loads(subset(config, "teacher")), teacher_keys) or str(model_name(config, "teacher"))
    trained = None
    if config["teacher.size"]:
        trained = config["teacher.steps"] * config["teacher.batch"] * config["data.seq_len"]
    return Point(
        run, *of, said.removeprefix("teacher=").replace("teacher.", ""), result["final"]["val/teacher_lm"],
        result["teacher_non_embedding"], trained, result["teacher_flops_per_token"], **own,
    )  # fmt: skip


def from_csv(path: Path) -> list[Point]:
    """Points from a CSV file with the columns of Point; raises UserError for one that is none."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets begin a file with a mark
            reader = csv.reader(file)
            rows = [(reader.line_num, row) for row in reader if any(map(str.strip, row))]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--csv {path}: cannot be read: {error}") from None
    columns = [name.strip() for name in rows[0][1]] if rows else []
    if missing := set(NEEDED) - set(columns):
        split = next((mark for mark in ";\t" if any(mark in name for name in columns)), None)
        raise UserError(
            f"--csv {path}: lacks {listed(sorted(missing))}. Its columns are to be {', '.join(Point._fields)}; run and "
            "those after loss may be left out or empty."
            + (f" They are separated by {split!r} here; needed are commas, and a point in numbers." if split else "")
        )
    lines = [(number, dict(zip(columns, row))) for number, row in rows[1:]]
    return [from_line(line, number, f"--csv {path}, line {number}") for number, line in lines]


def from_line(line: dict[str, str], number: int, where: str) -> Point:
    """One line of a CSV file."""
    given = {k: (line.get(k) or "").strip() for k in Point._fields}
    given["run"] = given["run"] or str(number)
    try:
        values = {k: (v or None) if k in TEXT else float(v) if v else None for k, v in given.items()}
    except ValueError as error:
        raise UserError(f"{where}: {error}.") from None
    for name, value in values.items():
        if (value is None and name in NEEDED) or (type(value) is float and not 0 < value < math.inf):
            raise UserError(f"{where}: {name}={given[name] or 'nothing'}: need a number above 0.")
    if (values["teacher"] is None) is not (values["teacher_loss"] is None):
        raise UserError(f"{where}: need teacher and teacher_loss both, or neither.")
    for role in ("", "teacher_"):
        if values[f"{role}flops_per_token"] is None and values[f"{role}parameters"]:
            values[f"{role}flops_per_token"] = 2 * values[f"{role}parameters"]
    return Point(**values)


def to_csv(path: Path, points: list[Point]) -> None:
    with files.atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Point._fields)
        writer.writerows(["" if x is None else x for x in p] for p in points)
