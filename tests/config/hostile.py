"""Hostile words and files, typed in a process that is forked from that of the test.

What is hostile would, if it were obeyed, make a file, the canary. Words go through train.py as it is started by people,
since some of them would end the process.
"""

import os
import pickle
import runpy
import sys
from pathlib import Path

from tests.small import FORK, TRAIN


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


def with_evil(home: Path) -> Path:
    """Return the canary of a folder with a module `evil` that makes it, and knows no limits of Hydra's."""
    path = home / "canary"
    (home / "evil.py").write_text(f"open({str(path)!r}, 'w')\nclass Boom:\n    def __init__(self, *a, **k): pass\n")
    return path


def _main(words: list[str], program: Path | str) -> None:
    sys.argv = [str(program), *words]
    sys.modules.pop("evil", None)
    if isinstance(program, Path):
        sys.modules.pop("train", None)
        runpy.run_path(str(program), run_name="__main__")
    else:
        sys.modules.pop(program, None)
        runpy.run_module(program, run_name="__main__")


def _mains(commands: list[tuple[Path, list[str]]], program: Path | str) -> None:
    """Run a command in each folder, up to the first that ends otherwise than by sys.exit()."""
    for home, words in commands:
        sys.stdout = sys.stderr = open(home / "output", "w", buffering=1)
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stdout.fileno(), 2)
        os.chdir(home)
        sys.path.insert(0, str(home))
        code: object = None
        try:
            _main(words, program)
        except SystemExit as error:
            code = error.code
        sys.path.remove(str(home))
        (home / "code").write_text(str(1 if isinstance(code, str) else code or 0))


def typed(commands: dict[Path, list[str]], program: Path | str = TRAIN) -> dict[Path, tuple[int | None, str]]:
    """Exit code and output of a command in each folder, in one process; FILE in its words is the folder.

    A command that ended the process, and those after it, have no exit code.
    """
    listed = [(home, [word.replace("FILE", str(home)) for word in words]) for home, words in commands.items()]
    process = FORK.Process(target=_mains, args=(listed, program))
    process.start()
    process.join(200)
    process.kill()
    process.join()
    ends = {}
    for home in commands:
        code, output = ((home / name).read_text(errors="replace") if (home / name).exists() else None
                        for name in ("code", "output"))  # fmt: skip
        ends[home] = int(code) if code else None, output or ""
        (home / "code").unlink(missing_ok=True)
    return ends


def typed_in(home: Path, *words: str, program: Path | str = TRAIN) -> tuple[int | None, str]:
    """Exit code and output of one command."""
    return typed({home: list(words)}, program)[home]


BOOM = "{_target_:evil.Boom}"
GLOBAL = "# @package _global_\nhydra:\n  callbacks:\n    x:\n      _target_: evil.Boom\n"
UP = "../" * 40
WORDS = {  # what is typed after `python train.py`
    "target": ["loss._target_=evil.Boom"],
    "target that hydra blocks": ["loss._target_=os.system", "+loss.command='touch FILE/canary'"],
    "target by interpolation": ["loss._target_=${evil}", "+evil=evil.Boom"],
    "target far down": [f"+trainer.hooks=[{{a:[{BOOM}]}}]"],
    "target that is partial": ["loss._target_=evil.Boom", "loss._partial_=false"],
    "target with positional arguments": ["loss._target_=functools.partial", "+loss._args_=[evil.Boom]"],
    "target of an argument": [f"+loss.student={BOOM}"],
    "target of the student": ["+student._target_=evil.Boom"],
    "target of the optimizer": ["optim._target_=evil.Boom"],
    "target of a truncation to record": ["logits=offline", "record=top_k", "record._target_=evil.Boom"],
    "trust_remote_code": ["+student.trust_remote_code=true"],
    "trust_remote_code, nested": ["+data.builder={trust_remote_code:true}"],
    "callback": [f"+hydra.callbacks.x={BOOM}"],
    "callback, added for sure": [f"++hydra.callbacks.x={BOOM}"],
    "callback by interpolation": ["+hydra.callbacks.x=${evil}", f"+evil={BOOM}"],
    "callback in a package": ["+loss@hydra.callbacks.x=fkl"],
    "all of hydra": [f"+hydra={{callbacks:{{x:{BOOM}}}}}"],
    "launcher": ["-m", "hydra.launcher._target_=evil.Boom"],
    "launcher's argument": ["-m", f"+hydra.launcher.x={BOOM}"],
    "launcher's argument by interpolation": ["-m", "+hydra.launcher.x=${evil}", f"+evil={BOOM}"],
    "launcher from a file": ["-m", f"hydra/launcher={UP}FILE/evil"],
    "sweeper": ["-m", "hydra.sweeper._target_=evil.Boom"],
    "sweeper's argument": ["-m", f"+hydra.sweeper.x={BOOM}"],
    "logging": ["+hydra.job_logging={version:1,root:{},handlers:{x:{class:evil.Boom}}}"],
    "logging, piece by piece": ["++hydra.job_logging.root={level: INFO}",
                                "++hydra.job_logging.handlers.x.class=evil.Boom"],
    "environment": ["+hydra.job.env_set.PYTHONPATH=FILE"],
    "folder": ["hydra.run.dir=FILE/canary"],
    "search path": ["hydra.searchpath=[file://FILE/conf]", "loss=evil"],
    "config folder": ["loss=evil", "--config-dir", "FILE/conf"],
    "config folder, abbreviated": ["loss=evil", "--config-d=FILE/conf"],
    "config folder, short": ["loss=evil", "-cd", "FILE/conf"],
    "config path": ["--config-path=FILE/conf", "--config-name=evil"],
    "rerun of a pickle": ["--experimental-rerun=FILE/evil.pickle"],
    "option by a path": [f"loss={UP}FILE/conf/loss/evil"],
    "option by a path among others": ["-m", f"loss=fkl,{UP}FILE/conf/loss/evil"],
    "option by a path in a choice": ["-m", f"loss=choice(fkl,'{UP}FILE/conf/loss/evil')"],
    "option by an absolute path": ["loss=FILE/conf/loss/evil"],
    "sweep by a path": [f"sweeps={UP}FILE/conf/loss/evil"],
    "name of a sweep": ["-m", "sweep=../../canary"],
    "environment in a setting": ["sweep=${oc.env:HOME}"],
    "environment in a setting, hidden": ["+a=oc.env", "sweep=${${a}:HOME}"],
    "pickle of the path in a setting": ["data=text", "data.files=FILE/evil.pickle"],
}  # fmt: skip


def filled(home: Path) -> Path:
    """Return a folder with what the words above name."""
    (home / "conf" / "loss").mkdir(parents=True)
    for path in (home / "conf" / "loss" / "evil.yaml", home / "evil.yaml", home / "conf" / "evil.yaml"):
        path.write_text(GLOBAL)
    for name in ("evil.pickle", "config.pickle"):
        (home / name).write_bytes(pickle.dumps(Payload(home / "canary")))
    return home


# Secrets.

SECRET = "sesame0123456789sesame0123456789sesame01"
