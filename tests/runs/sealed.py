"""A short run, shown again after an edit or damage."""

import json
from pathlib import Path

import train as product
from kd.experiment import prerequisites
from tests.small import folder, small_config

RUN = ("trainer.steps=2", "teacher.steps=2")
UNSEALED = ("state.json", "performance.jsonl")  # no number of a report or fit is read from them


def show(root: Path, *words: str) -> prerequisites.FinishedRun:
    """Run a command on the run in this process, up to where its table is printed."""
    given = small_config(root, *RUN, *words)
    outcome = product.train(given)
    outcome.check_files()
    return outcome


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def unseal(run: Path) -> None:
    """Make a result one of a version that kept digests of weights alone."""
    path = run / "result.json"
    result = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("digest", "files", "sources", "date")}
    path.write_text(json.dumps(result))


def names(root: Path) -> list[str]:
    run = folder(root, "fkl")
    return [p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file() and p.name not in (*UNSEALED, ".lock")]


def result(root: Path, name: str = "fkl") -> dict:
    return json.loads((folder(root, name) / "result.json").read_text())


REAL = {
    "the function": ("objective.losses", "-(p.exp() * (q - p))", "-2 * (p.exp() * (q - p))", ["loss=fkl (fkl)"]),
    "a constant": (
        "training.schedules",
        "return 1.0 if progress",
        "return 1.5 if progress",
        ["alpha=constant (_warm)", "lr=cosine (_warm)"],
    ),
    "a helper": (
        "training.schedules",
        "progress / warmup",
        "progress / warmup**2",
        ["alpha=constant (_warm)", "lr=cosine (_warm)"],
    ),
    "its name": ("objective.losses", "def fkl(", "def other(", ["loss=fkl (fkl)"]),
}
