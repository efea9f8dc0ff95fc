"""Faults in processes that a test starts, and what they leave.

The product knows nothing of this file. A fault comes from outside: a signal to a process, a limit of its resources, a
file damaged on disk, or a sitecustomize.py on its PYTHONPATH that patches a module and notes that the patch was met.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from kd.runs.run import Run
from tests.small import listed, outcome

SITE = '''
import importlib.util, os, sys, time
from pathlib import Path

HERE = Path(__file__).parent


def fired():
    with open(HERE / "fired", "a") as file:
        file.write(f"{os.getpid()} {' '.join(sys.orig_argv)}\\n")


def here():
    """Whether this process is one of those meant: the runs of a sweep share what they were forked from."""
    return ONLY is None or ONLY in sys.orig_argv


def hold():
    """Stay here until the test says go."""
    fired()
    while not (HERE / "go").exists():
        time.sleep(0.01)


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != WHERE:
            return None
        sys.meta_path.remove(Finder)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            patch(module)

        spec.loader.exec_module = exec_module
        return spec


if WHERE in sys.modules:  # of a process that is forked with everything imported
    patch(sys.modules[WHERE])
else:
    sys.meta_path.insert(0, Finder)
'''
# The teacher has six steps, so a student alone comes to step 7; it has saved checkpoints at 3 and 6 by then.
STEP = """
def patch(module):
    real = module.DistillationModule.training_step

    def training_step(self, batch, index):
        if self.global_step == AT and here():
            ACT
        return real(self, batch, index)

    module.DistillationModule.training_step = training_step
"""
MEMORY = """
def patch(module):
    import torch

    real, count = module.CausalLM.hidden_states, 0

    def hidden_states(self, ids):
        nonlocal count
        count += torch.is_grad_enabled()
        if torch.is_grad_enabled() and len(ids) > ROWS and WHEN and here():
            fired()
            raise ERROR
        return real(self, ids)

    module.CausalLM.hidden_states = hidden_states
"""
ONCE = """
def patch(module):
    real = module.DistillationModule.accumulate_gradients

    def accumulate_gradients(self, *args):
        if self.global_step == 4 and self.micro_batch_size == 4 and here():
            fired()
            raise ERROR
        if self.global_step == 7 and here():
            hold()
        return real(self, *args)

    module.DistillationModule.accumulate_gradients = accumulate_gradients
"""
CPU = 'RuntimeError("DefaultCPUAllocator: can\'t allocate memory: you tried to allocate 64000000 bytes. Error code 12")'
GPU = 'torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")'
WRITE = """
def patch(module):
    real, count = module.torch.save, 0

    def save(checkpoint, file):
        nonlocal count
        count += 1
        if count == COUNT and here():
            file.write(b"torn")
            file.flush()
            hold()
            file.seek(0)
        real(checkpoint, file)

    module.torch.save = save
"""
IMPORT = "def patch(module):\n    hold()\n"
BEGIN = """
def patch(module):
    real = module.check_command_line

    def check_command_line(words):
        if here():
            hold()
        return real(words)

    module.check_command_line = check_command_line
"""


class Fault:
    """A patch of a module in the processes that a test starts, all or those with a word in their command."""

    def __init__(self, folder: Path, where: str, patch: str, only: str | None = None, **values: str | int):
        folder.mkdir()
        for name, value in values.items():
            patch = patch.replace(name, str(value))
        (folder / "sitecustomize.py").write_text(f"WHERE, ONLY = {where!r}, {only!r}\n{patch}\n{SITE}")
        path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
        self.folder, self.environment = folder, {"PYTHONPATH": path}

    def fired(self) -> list[int]:
        """The processes that met it, once per time."""
        note = self.folder / "fired"
        return [int(line.split()[0]) for line in note.read_text().splitlines()] if note.exists() else []

    def wait(self, process: subprocess.Popen, count: int = 1) -> list[int]:
        """Wait until the fault was met so many times."""
        until(lambda: len(self.fired()) >= count or process.poll() is not None)
        assert len(self.fired()) >= count, process.communicate()[0]
        return self.fired()

    def go(self) -> None:
        (self.folder / "go").touch()


def until(true: Callable[[], object], seconds: float = 100) -> float:
    """Wait for it; the seconds that it took."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds, "it never came"
        time.sleep(0.01)
    return time.monotonic() - began


def ended(process: subprocess.Popen, code: int, seconds: float = 100) -> str:
    """Wait for a process, and return its output. Asserts that it ends in time, and with this code."""
    output = process.communicate(timeout=seconds)[0]
    assert process.returncode == code, output
    return output


def processes(root: Path) -> list[int]:
    """All that work in a root: train.py and what it started."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if f"root={root}".encode() in path.read_bytes().split(b"\0"):
                pids.append(int(path.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            pass
    return pids


def runs(root: Path) -> dict[str, Path]:
    """The folders of a sweep's runs, by their seeds."""
    manifest = json.loads(listed(root).read_text())
    return {next(w for w in r["overrides"] if w.startswith("seed=")): root / r["run"] for r in manifest["runs"]}


def state(path: Path) -> dict:
    return Run(path.parent, path.name).state()


def states(root: Path) -> dict[str, str]:
    return {seed: state(path)["state"] for seed, path in runs(root).items()}


def table(output: str) -> dict[str, str]:
    """The rows of the table at the end: what it says of each seed."""
    rows = output[output.rindex("sweep multirun") :].splitlines()
    return {line.split()[0]: line.partition(" ")[2].strip() for line in rows if line.startswith("seed=")}


def times(path: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in path.rglob("*")}


def same(root: Path, clean: Path, *seeds: str) -> None:
    """Assert that runs (or all) have the result of those in a root without faults."""
    for seed in seeds or runs(root):
        assert outcome(runs(root)[seed]) == outcome(runs(clean)[seed]), seed


def flip(path: Path) -> None:
    """Damage one bit."""
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)


SOON = 20  # seconds, where what goes wrong takes for ever
THREE = ("-m", "n_jobs=2", "seed=0,1,2")
BAD_FIRST = ("-m", "n_jobs=2", "seed=2,0,1")
PAIR = ("-m", "n_jobs=2", "seed=0,1")


# One bad run of three


def raises(path: Path) -> Fault:
    return Fault(path, "kd.training.module", STEP, only="seed=2", AT=7, ACT='fired(); raise RuntimeError("injected")')
