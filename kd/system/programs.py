"""kd's programs: console scripts that start them from any folder, and the commands that a person types."""

from __future__ import annotations

import runpy
from collections.abc import Iterable
from functools import partial
from pathlib import Path

PACKAGE = Path(__file__).parent.parent
TRAIN = PACKAGE.parent / "train.py"
MODULES = {
    "evaluate": "kd.evaluate", "store": "kd.store", "data": "kd.data", "runs": "kd.runs",
    "report": "sweeps.report", "fit": "sweeps.fit", "dashboard": "sweeps.dashboard",
}  # fmt: skip

_by_script = False  # True if a console script started this process


def command(name: str) -> str:
    """Return the words that a person types to start a program.

    This is the console script (kd-train) if one was typed, or if kd is installed without its repository, which has
    train.py. In a checkout it is `python train.py` or `python -m kd.store`.
    """
    if _by_script or (PACKAGE / "conf").is_dir():
        return f"kd-{name}"
    return "python train.py" if name == "train" else f"python -m {MODULES[name]}"


def root_as_switch(words: Iterable[str]) -> list[str]:
    """Return the words of a program that takes --root DIR, of a user who may have typed root=DIR."""
    return [f"--{word}" if word.startswith("root=") else word for word in words]


def root_as_word(words: Iterable[str]) -> list[str]:
    """Return the words of a program that takes root=DIR, of a user who may have typed --root DIR or --root=DIR."""
    out, rest = [], iter(words)
    for word in rest:
        folder = next(rest, None) if word == "--root" else None
        if folder is not None:
            out.append(f"root={folder}")
        else:
            out.append(word.removeprefix("--") if word.startswith("--root=") else word)
    return out


def start(name: str) -> None:
    """Run a program from its first line, as `python train.py` or `python -m MODULE` does."""
    global _by_script
    _by_script = True
    if name == "train":
        runpy.run_path(str(TRAIN), run_name="__main__")
    else:
        runpy.run_module(MODULES[name], run_name="__main__", alter_sys=True)


# Entry points of pyproject.toml.
train, evaluate, store = (partial(start, name) for name in ("train", "evaluate", "store"))
data, runs = (partial(start, name) for name in ("data", "runs"))
report, fit, dashboard = (partial(start, name) for name in ("report", "fit", "dashboard"))
