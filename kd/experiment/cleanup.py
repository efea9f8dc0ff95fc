"""Leftovers in a root: files and folders that can be removed, and the reasons to keep others."""

from __future__ import annotations

import difflib
import re
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import filelock

from kd.config.schema import ExperimentConfig
from kd.data import packing
from kd.errors import UserError
from kd.experiment.dependencies import Plan, corpus, plain_corpus
from kd.experiment.disk import PLACES, RunUse, all_runs, disk_use, sweeps_of
from kd.runs.outcome import RunState
from kd.system import files, programs
from kd.system.console import counted
from kd.system.files import read_json

KINDS = {  # what `clean` removes by default comes first
    "temporary": "half-written files of processes that were killed, older than a day",
    "checkpoints": "checkpoints of runs that are done",
    "unfinished": "runs that are not done, in no sweep, with their checkpoints",
    "data": "packed data that no run of this root uses",
    "stores": "stores of teacher logits that no run of this root uses",
    "starts": "students made of teachers, before training, that no run of this root uses",
    "rollouts": "responses that teachers wrote, to train on",
    "responses": "teachers' responses to validation prompts",
    "cache": "digests of large files and compiled code, in $KD_CACHE",
}
DEFAULT = ("temporary", "checkpoints")
TEMPORARY = re.compile(r"\..+\.([0-9a-f]{12}|old)\.tmp")  # names of kd.system.files.atomic
DAY = 24 * 3600  # seconds


class Leftover(NamedTuple):
    """File or folder that can be removed."""

    kind: str
    path: Path
    size: int
    why: str
    needed: str = ""  # for what; "" where nothing needs it


class Needs(NamedTuple):
    """Names of the runs, data, stores and first weights that a run is made from."""

    runs: frozenset[str] = frozenset()
    data: frozenset[str] = frozenset()
    stores: frozenset[Path] = frozenset()
    starts: frozenset[str] = frozenset()
    teacher_text: bool = False  # reads responses that a teacher wrote


class Root:
    """Runs of a root, the sweeps that list them, and what they need."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.runs = {use.run.name: use for use in all_runs(folder)}
        self.sweeps = sweeps_of(folder)

    def find(self, name: str) -> RunUse:
        """Return a run by its name, or by its folder; raise UserError for one that does not exist."""
        name = Path(name).name
        if name not in self.runs:
            close = difflib.get_close_matches(name, self.runs, 1, 0.3)
            listing = f"{programs.command('runs')} list root={self.folder}"
            hint = f"type {close[0]}" if close else f"see all runs by {listing}"
            raise UserError(option=name, why=f"is no run in {self.folder}", hint=hint)
        return self.runs[name]

    def sweeps_with(self, name: str) -> list[str]:
        """Return the sweeps that list a run."""
        return [sweep for sweep, runs in self.sweeps.items() if name in runs]

    def users_of(self, name: str) -> list[str]:
        """Return the runs that learn from a run, or start from it."""
        return [other for other, needs in self.needs.items() if name in needs.runs]

    @cached_property
    def needs(self) -> dict[str, Needs]:
        """Needs of each run, if they are known."""
        return {name: needs for name, use in self.runs.items() if (needs := self._needs_of(use))}

    @property
    def unknown(self) -> list[str]:
        """Reasons why `needs` may be incomplete."""
        unclear = "config, data or models are not what they were"
        reasons = [f"what {name} needs is unknown: its {unclear}" for name in self.runs if name not in self.needs]
        for sweep, runs in self.sweeps.items():
            if missing := [name for name in runs if name not in self.runs]:
                reasons.append(f"sweep {sweep} has {counted(len(missing), 'run that has', 'runs that have')} not begun")
        return reasons

    def _needs_of(self, use: RunUse) -> Needs | None:
        """Return the needs of a run; None if its config, with today's data and models, gives another run's name."""
        try:
            node = read_json(use.run / "config.json") or {}
            config = ExperimentConfig.from_dict(node).derive(root=str(self.folder))
            return needs_of(config, self.folder) if Plan.from_config(config).run.name == use.run.name else None
        except (UserError, OSError, KeyError, TypeError, AttributeError):
            return None


def needs_of(config: ExperimentConfig, root: Path) -> Needs:
    """Return what a config needs of its root; raise UserError if its data or models no longer exist."""
    planned = Plan.from_config(config)
    runs = {Plan.from_config(model).run.name for model in (planned.teacher, planned.start) if model}
    for name in (config.teacher.name, config.student.name, config.data.tokenizer):
        if name and root.resolve() in Path(name).resolve().parents:  # another run's student, by its folder
            runs.add(Path(name).resolve().relative_to(root.resolve()).parts[0])
    texts = [corpus(config)]
    if config.data.is_instructions or config.lm == "plain":
        texts.append(plain_corpus(config))
    data = {packing.folder_name(source, **settings) for source, settings in texts}
    stores = {planned.store.folder.resolve()} if planned.store else set()
    starts = frozenset([planned.pruned.name] if planned.pruned else [])
    return Needs(frozenset(runs), frozenset(data), frozenset(stores), starts, config.data.is_instructions)


def leftovers(root: Root, kinds: tuple[str, ...]) -> list[Leftover]:
    """Return the leftovers of these kinds in a root. `needed` of each has the reason to keep it."""
    return [leftover for kind in kinds for leftover in _FINDERS[kind](root)]


def named_runs(root: Root, names: list[str]) -> list[Leftover]:
    """Return runs by their names, to be removed; raise UserError for one that does not exist or is at work."""
    runs = []
    for name in names:
        use = root.find(name)
        if use.state == RunState.RUNNING:
            raise UserError(
                option=name, why=f"is at work, as {use.run / 'state.json'} says", hint="end its process first"
            )
        runs.append(Leftover("run", use.run.folder, use.size, str(use.state), _needed(root, use.run.name)))
    return runs


def remove(leftover: Leftover) -> bool:
    """Remove a leftover. If a process works on it, return False and keep it."""
    lock = _lock(leftover)
    try:
        with filelock.FileLock(lock, timeout=0) if lock else nullcontext():
            files.remove(leftover.path)
    except filelock.Timeout:
        return False
    return True


def _lock(leftover: Leftover) -> Path | None:
    """Return the lock that processes hold while they write to a leftover; None if it has none."""
    path = leftover.path
    if leftover.kind in ("data", "starts", "rollouts"):
        return path.with_name(f"{path.name}.lock")
    if leftover.kind in ("run", "unfinished", "stores"):
        return path / ".lock"
    return path.parent / ".lock" if leftover.kind == "checkpoints" else None


def _needed(root: Root, name: str) -> str:
    """Return the reasons why a run is needed, as text."""
    reasons = [f"sweep {sweep}" for sweep in root.sweeps_with(name)]
    if users := root.users_of(name):
        reasons.append(f"{users[0]}{f' and {len(users) - 1} more' if users[1:] else ''} learn from it")
    return "; ".join(reasons)


def _temporary(root: Root) -> Iterator[Leftover]:
    folders = [root.folder / name for name in (*root.runs, *PLACES)]
    for path in (p for folder in folders for p in folder.rglob(".*.tmp")):
        if TEMPORARY.fullmatch(path.name) and _age(path) > DAY:
            yield Leftover("temporary", path, disk_use(path), "half-written")


def _age(path: Path) -> float:
    """Return the seconds since a file, or anything in a folder, was written last."""
    times = [time.time()]
    with suppress(FileNotFoundError):
        times = [p.lstat().st_mtime for p in (path, *path.rglob("*"))]
    return time.time() - max(times)


def _checkpoints(root: Root) -> Iterator[Leftover]:
    for use in root.runs.values():
        if use.is_done and use.checkpoints:
            yield Leftover("checkpoints", use.run / "checkpoints", use.checkpoints, "the run is done")


def _unfinished(root: Root) -> Iterator[Leftover]:
    for name, use in root.runs.items():
        if use.state not in (RunState.DONE, RunState.RUNNING, RunState.UNKNOWN) and not root.sweeps_with(name):
            needed = _needed(root, name)
            yield Leftover("unfinished", use.run.folder, use.size, f"{use.state}; it could go on", needed)


def _folders(root: Root, place: str) -> list[Path]:
    """Return the folders in a place such as data/ that are not hidden."""
    return sorted(path for path in (root.folder / place).glob("[!.]*") if path.is_dir())


def _unused(root: Root, kind: str) -> Iterator[Leftover]:
    """Yield the folders in data/ or starts/ that no run uses."""
    used = {key for needs in root.needs.values() for key in (needs.data if kind == "data" else needs.starts)}
    for path in _folders(root, kind):
        if path.name not in used:
            yield Leftover(kind, path, disk_use(path), "no run uses it", _may_be_needed(root))


def _stores(root: Root) -> Iterator[Leftover]:
    used = {path for needs in root.needs.values() for path in needs.stores}
    for path in _folders(root, "stores"):
        if path.resolve() not in used and _age(path) > (0 if (path / "manifest.json").exists() else DAY):
            yield Leftover("stores", path, disk_use(path), "no run uses it", _may_be_needed(root))


def _may_be_needed(root: Root) -> str:
    return f"perhaps, as {'; '.join(root.unknown)}" if root.unknown else ""


def _teacher_text(root: Root, kind: str) -> Iterator[Leftover]:
    waiting = [n for n, use in root.runs.items() if not use.is_done and n in root.needs and root.needs[n].teacher_text]
    needed = f"perhaps for {waiting[0]}, which is not done" if waiting else _may_be_needed(root)
    for path in sorted((root.folder / kind).glob("[!.]*")):
        if path.suffix != ".lock":
            yield Leftover(kind, path, disk_use(path), "a teacher would write it again", needed)


def _cache(root: Root) -> Iterator[Leftover]:
    for name, why in (("digests", "digests are computed again"), ("compiled", "code is compiled again")):
        if (path := files.cache() / name).is_dir():
            yield Leftover("cache", path, disk_use(path), why)


_FINDERS = {
    "temporary": _temporary, "checkpoints": _checkpoints, "unfinished": _unfinished,
    "data": lambda root: _unused(root, "data"), "stores": _stores, "starts": lambda root: _unused(root, "starts"),
    "rollouts": lambda root: _teacher_text(root, "rollouts"),
    "responses": lambda root: _teacher_text(root, "responses"), "cache": _cache,
}  # fmt: skip
