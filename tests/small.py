"""A run so small that it trains in seconds, started as a user would: python train.py …"""

import functools
import json
import multiprocessing
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import filelock
import pytest

import train as product
from kd.config.compose import composed
from kd.config.schema import ExperimentConfig
from kd.store import __main__ as store_program
from kd.store import reader
from kd.system import files
from tests.zygote import Forked, start_zygote

TRAIN = Path(__file__).parent.parent / "train.py"
SMALL = """data=markov data.tokens=20000 data.states=16 data.branching=4 data.seq_len=32 data.val_rows=8
student=100k teacher=100k teacher.steps=6 trainer.steps=12 trainer.batch=4 trainer.micro_batch=2
trainer.val_every=5 trainer.checkpoint_every=3 trainer.log_every=1 logger=none""".split()  # noqa: SIM905
# Data of 60 rows, and a store of them in eight shards: for what is done in the process of the test.
TINY = [*SMALL, "data.tokens=2000"]
FORK = multiprocessing.get_context("fork")
TOP = ("truncation=top_k", "truncation.k=5")
# One thread: tests run side by side.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


@functools.cache
def popen() -> type[subprocess.Popen]:
    """Return what starts commands: from the zygote, or cold where that cannot be."""
    server = start_zygote(ENVIRONMENT) if sys.platform == "linux" else None
    if server is None:
        return subprocess.Popen
    Forked.server = server
    return Forked


def python(command: list[str], folder: Path, cold: bool = False, **environment: str) -> subprocess.Popen:
    """Start a command of this Python in a folder, with a pipe for all that it prints.

    It is forked from the zygote, unless it is to start cold or has an environment that the zygote has not.
    """
    options = {"env": ENVIRONMENT | environment, "cwd": folder, "text": True}
    start = subprocess.Popen if cold else popen()
    return start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


def shared(factory: pytest.TempPathFactory, name: str, fill: Callable[[Path], object]) -> Path:
    """Return a root that is filled once, for all processes of pytest: to be copied, or read alone."""
    base = factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"shared-{name}"
    whole = root.with_suffix(".whole")
    with filelock.FileLock(root.with_suffix(".lock")):
        if not whole.exists():
            shutil.rmtree(root, ignore_errors=True)  # of a process that failed, or was killed, meanwhile
            root.mkdir()
            fill(root)
            whole.touch()
    return root


def small_words(small: Iterable[str], words: tuple[str, ...]) -> list[str]:
    """Return the words of a small run that have an effect beside `words`: not each teacher is trained by a run."""
    pretrained = any(word.startswith("teacher.name=") for word in words) and "teacher.sft=true" not in words
    untrained = pretrained or {"teacher=none", "logits=cotrained"} & {*words}
    return [word for word in small if not (untrained and word.startswith("teacher.steps="))]


def start(root: Path, *words: str, cold: bool = False, **environment: str) -> subprocess.Popen:
    """train.py with the small settings, and `words`, in `root`; forked from the zygote unless cold."""
    flags = [w for w in words if w.startswith("-")]
    rest = [w for w in words if w not in flags]
    command = [sys.executable, str(TRAIN), *flags, *small_words(SMALL, words), f"root={root}", *rest]
    return python(command, root, cold, **environment)


def train(root: Path, *words: str, code: int = 0, cold: bool = False, **environment: str) -> str:
    """Run train.py to its end, and return its output. Asserts that it ends with `code`."""
    process = start(root, *words, cold=cold, **environment)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == code, output
    return output


def folder(root: Path, start: str) -> Path:
    """The one run folder whose name begins so."""
    (run,) = root.glob(f"{start}*")
    return run


def listed(root: Path) -> Path:
    """The list of the sweep without a name that was started last in a root."""
    return max((root / "sweeps").glob("multirun-*.json"), key=lambda path: path.stat().st_mtime_ns)


def result(path: Path) -> dict:
    return json.loads((path / "result.json").read_text())


def put_result(path: Path, result: dict) -> None:
    """Write the result of a run with a digest that is right."""
    result["digest"] = files.digest_of({k: v for k, v in result.items() if k != "digest"})
    (path / "result.json").write_text(json.dumps(result))


def outcome(path: Path) -> tuple[bytes, bytes]:
    """Return metrics and weights of a run, which must be the same bit by bit however often it was killed."""
    return (path / "metrics.jsonl").read_bytes(), (path / "student" / "model.safetensors").read_bytes()


def small_config(root: Path, *words: str) -> ExperimentConfig:
    """Return the config of the tiny run with `words`, in `root`."""
    own_data = any(word.startswith("data=") for word in words)
    small = (word for word in small_words(TINY, words) if not (own_data and word.startswith("data")))
    typed = [*small, f"root={root}", *words]
    return ExperimentConfig.from_hydra(composed(*typed), typed)


def here(root: Path, *words: str) -> Path:
    """The folder of the tiny run, done in this process; UserError is raised, not shown."""
    return product.train(small_config(root, *words))[0].folder


def write(root: Path, *words: str) -> reader.Store:
    """Do the work of `python -m kd.store write` in this process."""
    return store_program.write_store([*small_words(TINY, words), f"root={root}", *words])


def type_in(message: str) -> None:
    """Do what a message says to type: its indented lines."""
    lines = [line.strip() for line in message.splitlines() if line.startswith("  ")]
    assert lines, message
    for line in lines:
        words = shlex.split(line)
        if words[:3] != ["python", "-m", "kd.store"]:
            assert words[0] == "rm"
            subprocess.run(words, check=True)
            continue
        assert words[3] == "write"
        store_program.write_store(words[4:])


def content(folder: Path) -> dict[str, bytes]:
    """All files of a store that others read."""
    return {
        p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".json", ".safetensors") and p.name[0] != "."
    }
