"""Reader of a sweep's manifest, and of the results and curves of its runs."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from kd.config.components import check_sweep
from kd.errors import UserError
from kd.evaluation.catalog import LOSS, ROUGE_L
from kd.runs.run import Run
from kd.runs.seal import EXACCERR, RESPONSES, is_sealed
from kd.system import files
from kd.system.files import read_json, read_metrics
from kd.system.remote import fetch, local_root
from sweeps.report.wording import join_words

REQUIRED = {  # keys of a result; others may be missing
    "config": ("seed", "logits", "data", "student.size", "student.name", "teacher.size", "teacher.name"),
    "final": (LOSS.key,),
    "environment": ("git",),
}


class Entry(NamedTuple):
    """Line of a sweep's manifest, with the state and the result of its run."""

    folder: Path
    overrides: list[str]
    state: str  # of Run.state, or missing, or damaged
    message: str  # reason of the state
    result: dict | None
    name: str | None = None  # of the line of the sweep file

    @property
    def finished(self) -> dict:
        """Result of a run that is done."""
        assert self.result is not None, f"{self.folder} is {self.state}"
        return self.result

    @property
    def command(self) -> str:
        return shlex.join(["python", "train.py", *self.overrides])


def load_sweep(root: str | Path, name: str) -> list[Entry]:
    """Return all runs of a sweep; raise UserError if there is no such sweep."""
    return [read_run(root, line) for line in read_manifest(root, name)]


def read_manifest(root: str | Path, name: str) -> list[dict]:
    """Return the runs of a sweep as kd/launch/sweep_list.py wrote them; raise UserError if there is no such sweep."""
    check_sweep(name)
    path, hint = fetch(root, f"sweeps/{name}.json"), f"to run the sweep, type python train.py sweeps={name}"
    try:
        runs = json.loads(path.read_text())["runs"]
        if not all(files.is_name(line["run"]) for line in runs):
            raise ValueError("a run that is no folder of this root")
        return [line | {"overrides": [str(word) for word in line["overrides"]]} for line in runs]
    except FileNotFoundError:
        names = join_words(sorted(p.stem for p in path.parent.glob("*.json"))) or "none yet"
        why = f"does not exist in {path.parent.resolve()}, which has {names}"
        raise UserError(option="sweeps", got=name, why=why, hint=hint) from None
    except (ValueError, KeyError, TypeError):
        hint = f"{hint} (finished runs are not run again)"
        raise UserError(option=path, why="is damaged: its content is not what was written", hint=hint) from None


def read_run(root: str | Path, line: dict) -> Entry:
    """Return a run of a manifest with its state, whatever its folder holds."""
    folder = local_root(root) / line["run"]
    result, resumable = None, "still running, or stopped: the same command goes on with it"
    try:
        run = Run(root, line["run"])
        result, status = run.result(), run.state()
        if result is not None:
            state, message, result = "done", "", checked_result(result)
            names = ("metrics.jsonl", *((RESPONSES, EXACCERR) if ROUGE_L.key in result["final"] else ()))
            for name in names:
                run.copy(name)
            if is_sealed(result):
                run.check(result, *names)
        elif status["state"] == "not begun":
            state, message = "missing", "not started yet"
        else:
            state, message = str(status["state"]), str(status["reason"]) or resumable
    except UserError as error:
        state, message, result = "damaged", str(error), None
    except (KeyError, TypeError, AttributeError):
        message = f"not what a run writes; to run it anew, first {run.removal_command()}"
        state, result = "damaged", None
    return Entry(folder, line["overrides"], state, message, result, line.get("name"))


def checked_result(result: dict) -> dict:
    """Return a result with its finite metrics and the acceptance rate; raise KeyError if a required key is missing."""
    final = {k: v for k, v in result["final"].items() if isinstance(v, int | float) and math.isfinite(v)}
    if "val/tvd" in final:
        final["val/acceptance"] = 1 - final["val/tvd"]
    # A setting that is no part of a run's name, and that earlier versions did not have.
    result = result | {"final": final, "config": {"teacher.sft": False} | result["config"]}
    for part, keys in REQUIRED.items():
        if missing := set(keys) - set(result[part]):
            raise KeyError(*missing)
    return result


def learning_curve(entries: list[Entry]) -> list[tuple[float, ...]]:
    """Return tokens, FLOPs and mean validation loss at the steps that all of these runs have."""
    axes, curves = ("tokens", "flops", LOSS.key), []
    for entry in entries:
        lines = read_metrics(entry.folder / "metrics.jsonl")
        curves += [{x["step"]: [x[axis] for axis in axes] for x in lines if LOSS.key in x}]
    common = sorted(set.intersection(*map(set, curves))) if curves else []
    return [tuple(map(fmean, zip(*(steps[s] for steps in curves)))) for s in common]


def exposure_curve(entries: list[Entry]) -> list[float]:
    """Return the mean ExAccErr over length, up to the shortest; empty if a file is missing or damaged."""
    curves = []
    for entry in entries:
        try:
            curves.append([float(x) for x in (read_json(entry.folder / EXACCERR) or {})["exaccerr"]])
        except (UserError, KeyError, TypeError, ValueError):
            return []
    return [mean for mean in map(fmean, zip(*curves)) if math.isfinite(mean)]
