"""Hydra sweepers that pass their jobs to a launcher, and the one that reads lines of overrides from a sweep file."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from omegaconf import OmegaConf

from kd.config import grammar, teacher_rules
from kd.config.components import option_files
from kd.config.declarations import Declaration, of_group
from kd.config.groups import LogitsSource
from kd.config.options import defaults, option_of, setting_of
from kd.config.overrides import undeferred
from kd.config.rules import group_of, name_of
from kd.config.schema import NO_EFFECT, NO_SIGNAL
from kd.config.security import check_words
from kd.errors import UserError
from kd.runs.identity import is_under, written_by_teacher
from kd.system import files
from kd.system.console import exit_with_error


class LaunchingSweeper(Sweeper):
    """Sweeper that passes its jobs to the launcher."""

    def setup(self, *, hydra_context, task_function, config) -> None:
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def name_from(self, arguments: Sequence[str]) -> None:
        """Name an unnamed sweep after its words, so that no other sweep has the same list."""
        if self.config.sweep is None:
            self.config.sweep = f"multirun-{files.digest_of(asked_for(arguments))[:8]}"


def asked_for(arguments: Sequence[str]) -> str:
    """Return all words of a command except those that change no result."""
    words = map(undeferred, arguments)
    return str(sorted(word for word in words if not is_under(name_of(word), NO_EFFECT)))


class SweepFileSweeper(LaunchingSweeper):
    """Hydra's basic sweeper over several lines. A sweep is the union of the sweeps that its `runs` would be after -m.

    Words beside sweeps=NAME are added to every line. A line may have a name for its runs in tables: `- MiniLLM:
    method=minillm`. Without one they have the name of their method, if any. Without a sweep file there is one line: the
    words of the command. A file may have `scales`, each with a `base` and further `runs`; scale=NAME takes one.
    Settings that treat a signal are left out of runs that have none, and those of a teacher's training of runs that
    train no teacher. Runs that are then the same are one run.
    """

    def sweep(self, arguments: list[str]) -> list[JobReturn]:
        # Hydra loads this module anew when it looks for plugins, so it is not to be imported before.
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

        self.name_from(arguments)
        more = [a for a in arguments if not a.startswith(("sweeps=", "scale="))]
        # Lines as they stand: what they refer to is said by the config of each run.
        sweep = OmegaConf.to_container(self.config)["sweep"]
        base, lines = at_scale(sweep if isinstance(sweep, dict) else {"runs": [""]}, self.config.scale)
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        typed_overrides = parser.parse_overrides(more)
        labelled: list[tuple[str, list[str]]] = []
        for name, line in lines:
            try:
                words = files.expanded_words(shlex.split(base) + shlex.split(line))
                grammar.check(words)
                line_overrides = parser.parse_overrides(words)
            except (HydraException, ValueError) as error:
                refused = _refused(sweep, f"its words {f'{base} {line}'.strip()!r} are wrong")
                if isinstance(error, UserError):
                    wrong = str(error.replace(need="", hint="")).rstrip(".")
                    why = f"{refused.why}: {wrong}"
                    exit_with_error(refused.replace(why=why, need=error.need, hint=error.hint))
                exit_with_error(refused.replace(why=f"{refused.why}: {error}".partition("\nSee ")[0]))
            for job in BasicSweeper.split_arguments(line_overrides + typed_overrides, None)[0]:
                labelled.append((name or option_of("method", job) or "", job))
        jobs: list[list[str]] = []
        names: list[str] = []
        effective = without_unused([job for _, job in labelled], more)
        for (name, _), job in zip(labelled, effective, strict=True):
            if job not in jobs:
                jobs.append(job)
                names.append(name)
        try:
            for job in jobs:
                check_words(job)
        except UserError as error:
            exit_with_error(error)
        returns = self.launcher.launch(jobs, initial_job_idx=0, names=names)
        if any(r.status != JobStatus.COMPLETED for r in returns):
            sys.exit(1)
        return returns


def without_unused(jobs: Sequence[list[str]], typed: Iterable[str]) -> list[list[str]]:
    """Return the words of each run, without settings that have no effect in it.

    A setting that was typed and has an effect in no run of the sweep is kept, so that it is refused.
    """
    refused = unused_everywhere(jobs, typed)
    return [without(job, refused) for job in jobs]


def unused_everywhere(jobs: Sequence[list[str]], typed: Iterable[str]) -> set[str]:
    """Return the names of typed settings that have an effect in no run."""
    used = {name_of(word) for job in jobs for word in without(job)}
    return {*map(name_of, typed)} - used


def without(job: list[str], refused: Collection[str] = ()) -> list[str]:
    """Return the words of a run, without settings that have no effect in it, except those that are to be refused.

    They treat a signal, or belong to the training of a teacher, and this run has none.
    """
    logits = option_of("logits", job) or defaults()["logits"] or ""
    source = LogitsSource(logits, of_group("logits", "traits").get(logits, Declaration()).names)
    rollout = {"rollout": option_of("rollout", job)}
    unused = teacher_rules.unused_settings(
        _given(setting_of("teacher.size", job)), _given(setting_of("teacher.name", job)),
        str(setting_of("teacher.sft", job)).lower() == "true", source.trains_teacher, written_by_teacher(rollout),
    )  # fmt: skip
    return [
        word
        for word in job
        if name_of(word) in refused
        or not ((not source.distils and group_of(word) in NO_SIGNAL) or name_of(word) in unused)
    ]


def _given(value: object) -> bool:
    """Return True for a value other than null."""
    return value not in (None, "null")


def at_scale(sweep: Mapping, scale: str) -> tuple[str, list[tuple[str, str]]]:
    """Return the words that all lines begin with, and name and words of each line.

    Ends with an error if there is no such scale, and for a file of another form.
    """
    try:
        _check_form(sweep)
    except UserError as error:
        exit_with_error(error)
    scales = sweep.get("scales") or {"cpu": {}}
    if scale not in scales:
        exit_with_error(UserError(option="scale", got=scale, need=f"a scale of this sweep, {' or '.join(scales)}"))
    scale_part = scales[scale]
    lines = [
        line if isinstance(line, Mapping) else {"": line}
        for part in (sweep, scale_part)
        for line in part.get("runs", [])
    ]
    return f"{sweep.get('base', '')} {scale_part.get('base', '')}", [pair for line in lines for pair in line.items()]


def _check_form(sweep: Mapping) -> None:
    """Raise UserError for an unknown key, a value of another type, and a sweep or scale without runs."""
    scales = sweep.get("scales") or {}
    if not isinstance(scales, Mapping) or not all(isinstance(part, Mapping) for part in scales.values()):
        raise _refused(sweep, "its scales are no settings by name")
    for part, keys in (
        (sweep, ("name", "base", "runs", "scales")),
        *((part, ("base", "runs")) for part in scales.values()),
    ):
        for key in part.keys() - {*keys}:
            raise _refused(sweep, f"has a key {key}, which no sweep has")
        if not isinstance(part.get("base", ""), str):
            raise _refused(sweep, f"its base is no text: {part['base']}")
        lines = part.get("runs", [])
        if isinstance(lines, str) or not isinstance(lines, Sequence):
            raise _refused(sweep, f"its runs are no list: {lines}")
        for line in lines:
            texts = line.values() if isinstance(line, Mapping) else [line]
            if not all(isinstance(text, str) for text in texts):
                raise _refused(sweep, f"its line {line} is no text")
    if not all(sweep.get("runs") or part.get("runs") for part in scales.values() or [sweep]):
        raise _refused(sweep, "has no runs")


def _refused(sweep: object, why: str) -> UserError:
    """Return the error for the file of a sweep."""
    name = sweep.get("name") if isinstance(sweep, Mapping) else None
    file = next((file for file in option_files("sweeps") if file.stem == name), "this sweep")
    need = "the keys base (a text), runs (a list of lines) and scales (base and runs by name)"
    return UserError(
        option=file, why=why, need=need, hint="write each line as - loss=fkl seed=0,1, or - NAME: loss=fkl"
    )
