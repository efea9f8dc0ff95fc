"""Measure a trained model, without training: a run of kd, a folder, or a name on the Hub.

python -m kd.evaluate student=MODEL data=… [teacher=MODEL]      all measures of a run, in a folder of its own
python -m kd.evaluate -m sweep=NAME student=MODEL,MODEL data=…  of several models, for a report
python -m kd.evaluate runs=SWEEP benchmarks=[TASK,TASK]         benchmarks of finished runs, added to their results
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from kd.config.components import option_names
from kd.config.grammar import check_switches
from kd.errors import MISTAKES, UserError, for_people
from kd.runs.run import Run
from kd.system import files, programs
from kd.system.console import console, counted, exit_with_error
from kd.system.remote import default_root

ROLES = ("student", "teacher")
RUN_WORDS = ("runs", "benchmarks", "root", "force")


def evaluation_words(words: list[str]) -> list[str]:
    """Return the words of train.py that evaluate what these words name.

    student=MODEL is student=hub student.name=MODEL, unless MODEL is an option of the group. A run of kd, by folder or
    by name, stands for its student. Without a teacher there is none. Raises UserError for a run that is not done.
    """
    words = files.expanded_words(words)
    typed = dict(word.partition("=")[::2] for word in words if "=" in word)
    root, out = typed.get("root") or default_root(), []
    for word in words:
        name, equals, value = word.partition("=")
        models = value.split(",")
        if name in ROLES and equals and not set(models) <= set(option_names(name)):
            out.append(f"{name}=hub")
            name += ".name"
        if name in (f"{role}.name" for role in ROLES):
            word = f"{name}={','.join(model_of(model, root) for model in models)}"
        out.append(word)
    absent = [] if "teacher" in typed else ["teacher=none"]
    return [*out, *absent, "logits=none", "trainer.steps=0"]


def model_of(name: str, root: str) -> str:
    """Return the folder of the student of a run, given by folder or name; any other name as it is."""
    folder = Path(name)
    for run in (Run(folder.parent, folder.name), Run(root, name) if files.is_name(name) else None):
        if run is None or not (run.copy("config.json").exists() and (run.result() or run.copy("state.json").exists())):
            continue
        result = run.result()
        if result is None:
            raise UserError(option=name, why="is a run that is not done", hint="type its command again first")
        if result["config"]["trainer.steps"] == 0:
            why, hint = "is an evaluation, which has no student", f"type {result['config']['student.name']}"
            raise UserError(option=name, why=why, hint=hint)
        run.check(result, "student")
        return str(run / "student")
    return name


def add_benchmarks(words: list[str]) -> None:
    """Add benchmarks to the finished runs of a sweep, or to one run; what a run has already is not made again."""
    from kd.config.schema import ExperimentConfig
    from kd.experiment import benchmarking
    from kd.experiment.results import load_sweep, read_run
    from kd.system.files import read_json

    check_switches(words, (), RUN_WORDS)
    settings = dict(word.partition("=")[::2] for word in files.expanded_words(words))
    for name, value in settings.items():
        if name not in RUN_WORDS:
            need, hint = " or ".join(f"{word}=" for word in RUN_WORDS), f"leave {name} out"
            raise UserError(option=name, got=value, why="is no setting beside runs", need=need, hint=hint)
    root, force = settings.get("root") or default_root(), settings.get("force", "false") == "true"
    names = [name for name in settings.get("benchmarks", "").strip("[]").split(",") if name]
    if not names:
        raise UserError(option="benchmarks", need="names of tasks", hint="type e.g. benchmarks=[arc_easy,piqa]")
    name = settings["runs"]
    is_run = files.is_name(name) and Run(root, name).copy("config.json").exists()
    try:
        entries = [read_run(root, {"run": name, "overrides": []})] if is_run else load_sweep(root, name)
    except UserError as error:
        raise error.replace(option="runs" if error.option == "sweeps" else error.option) from None
    entries = list({entry.folder: entry for entry in entries}.values())
    done = [entry.folder.name for entry in entries if entry.result]
    for number, run in enumerate(Run(root, name) for name in done):
        config = ExperimentConfig.from_dict(read_json(run.copy("config.json")) or {})
        config = config.derive(root=root, benchmarks=names, force=force)
        result = run.result()
        assert result is not None, "it is done"
        if number == 0:
            benchmarking.check(config, None)
        benchmarking.add(run, config, result)
    state = f"{counted(len(done), 'run has', 'runs have')} {', '.join(names)}"
    rest = [f"{entry.folder.name} {entry.state}" for entry in entries if not entry.result]
    console.print(f"{state}; left out: {', '.join(rest)}." if rest else f"{state}.", soft_wrap=True)


def main() -> None:
    """Run the command line."""
    words = sys.argv[1:]
    if {"-h", "--help"} & {*words}:
        print(f"{(__doc__ or '').strip()}\n\nThe other words are those of {programs.command('train')} --help.")
        return
    try:
        if any(word.startswith("runs=") for word in words):
            return add_benchmarks(words)
        words = evaluation_words(words)
    except MISTAKES as error:
        exit_with_error(for_people(error))
    sys.argv = [str(programs.TRAIN), *words]
    runpy.run_path(str(programs.TRAIN), run_name="__main__")


if __name__ == "__main__":
    main()
