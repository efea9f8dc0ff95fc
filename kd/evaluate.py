"""Measure a trained model, without training: a run of kd, a folder, or a name on the Hub.

python -m kd.evaluate student=MODEL data=… [teacher=MODEL]      all measures of a run, in a folder of its own
python -m kd.evaluate -m sweep=NAME student=MODEL,MODEL data=…  of several models, for a report
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from kd.config.components import option_names
from kd.errors import MISTAKES, UserError, for_people
from kd.runs.run import Run
from kd.system import files, programs
from kd.system.console import exit_with_error
from kd.system.remote import default_root

ROLES = ("student", "teacher")


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


def main() -> None:
    """Run the command line."""
    words = sys.argv[1:]
    if {"-h", "--help"} & {*words}:
        print(f"{(__doc__ or '').strip()}\n\nThe other words are those of {programs.command('train')} --help.")
        return
    try:
        words = evaluation_words(words)
    except MISTAKES as error:
        exit_with_error(for_people(error))
    sys.argv = [str(programs.TRAIN), *words]
    runpy.run_path(str(programs.TRAIN), run_name="__main__")


if __name__ == "__main__":
    main()
