"""Results of runs in a root: those of a sweep in the order of its list, or all."""

from __future__ import annotations

import difflib
import json
import math
import shlex
from pathlib import Path
from typing import NamedTuple

from kd import former_names
from kd.config import search_path
from kd.config.components import check_sweep, option_names
from kd.errors import UserError
from kd.evaluation.catalog import LOSS, ROUGE_L
from kd.runs.run import Run
from kd.runs.seal import EXACCERR, RESPONSES, is_sealed
from kd.system import files, programs
from kd.system.remote import Remote, fetch, is_url, local_root

MARKS = ("state.json", "result.json")  # each of which makes a folder that of a run
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
        """Command that makes the run."""
        return f"{programs.command('train')} {shlex.join(self.overrides)}".rstrip()


def load_sweep(root: str | Path, name: str) -> list[Entry]:
    """Return all runs of a sweep; raise UserError if there is no such sweep."""
    return [read_run(root, line) for line in read_manifest(root, name)]


def read_manifest(root: str | Path, name: str) -> list[dict]:
    """Return the runs of a sweep as kd/launch/sweep_list.py wrote them; raise UserError if there is no such sweep."""
    check_sweep(name)
    path = fetch(root, f"sweeps/{name}.json")
    try:
        runs = json.loads(path.read_text())["runs"]
        if not all(files.is_name(line["run"]) for line in runs):
            raise ValueError("a run that is no folder of this root")
        return [line | {"overrides": former_names.current_words(map(str, line["overrides"]))} for line in runs]
    except FileNotFoundError:
        names = sweep_names(root)
        why = f"does not exist in {path.parent.resolve()}, which has {', '.join(names) or 'none yet'}"
        if name in option_names("sweeps"):
            hint = search_path.how_to_run(name, root)
        elif names:
            similar = difflib.get_close_matches(name, names, 1)
            hint = f"type {similar[0]} in place of {name}" if similar else ""
        else:
            hint = f"to run one, type e.g. {search_path.sweep_command('demo', root)}"
        need = "a sweep that was run in this root"
        raise UserError(option="sweeps", got=name, why=why, need=need, hint=hint) from None
    except (ValueError, KeyError, TypeError):
        hint = f"{search_path.how_to_run(name, root)} (finished runs are not run again)"
        raise UserError(option=path, why="is damaged: its content is not what was written", hint=hint) from None


def sweep_names(root: str | Path) -> list[str]:
    """Return the names of the sweeps in a root; the other JSON files beside the lists of sweeps are fits."""
    paths = sorted((local_root(root) / "sweeps").glob("*.json"))
    return [path.stem for path in paths if not path.stem.endswith(".fit")]


def read_run(root: str | Path, line: dict) -> Entry:
    """Return a run of a manifest with its state, whatever its folder holds."""
    folder = local_root(root) / line["run"]
    result, resumable = None, "still running, or stopped: the same command goes on with it"
    try:
        run = Run(root, line["run"])
        result, status = run.result_and_state()
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


def read_runs(root: str | Path) -> list[Entry]:
    """Return all runs of a root, by name; raise UserError if there is no such root."""
    return [read_run(root, {"run": name, "overrides": []}) for name in run_names(root)]


def run_names(root: str | Path) -> list[str]:
    """Return the names of the runs of a root; raise UserError if there is no such root."""
    if is_url(root):
        names = [name.split("/") for name in Remote(str(root), local_root(root)).names()]
        return sorted({parts[0] for parts in names if len(parts) == 2 and parts[1] in MARKS})
    if not Path(root).is_dir():
        hint = "give the folder of your runs, or type a command that makes one"
        raise UserError(option="root", got=root, why="does not exist", hint=hint)
    return sorted({path.parent.name for mark in MARKS for path in Path(root).glob(f"*/{mark}")})
