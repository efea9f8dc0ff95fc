"""Faults in runs and sweeps: real processes and signals, and proof that each fault was met.

The product knows nothing of this file. A fault comes from outside: a signal to a process, a limit of its resources, a
file damaged on disk, or a sitecustomize.py on its PYTHONPATH that patches a module and notes that the patch was met.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kd.runs.run import Run
from kd.system import files
from kd.system.checkpoint_files import newest
from tests.small import content, folder, listed, outcome, result, shared, start, train, type_in

pytestmark = pytest.mark.fault

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


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    """A root with three runs and nothing wrong; made once, for all processes of pytest."""
    root = shared(tmp_path_factory, "clean", lambda root: train(root, *THREE))
    assert runs(root).keys() == {f"seed={n}" for n in range(3)}
    return root


@pytest.fixture
def root(clean, tmp_path) -> Path:
    """A root with data and teacher, and no run."""
    shutil.copytree(clean, tmp_path / "root", ignore=shutil.ignore_patterns("fkl*", "sweeps"))
    return tmp_path / "root"


@pytest.fixture
def held(tmp_path) -> Fault:
    """A run that is in its step 7, and stays there."""
    return Fault(tmp_path / "held", "kd.training.module", STEP, only="seed=0", AT=7, ACT="hold()")


# One bad run of three


def raises(path: Path) -> Fault:
    return Fault(path, "kd.training.module", STEP, only="seed=2", AT=7, ACT='fired(); raise RuntimeError("injected")')


def exits(path: Path) -> Fault:
    return Fault(path, "kd.training.module", STEP, only="seed=2", AT=7, ACT="fired(); sys.exit(3)")


def stays(path: Path) -> Fault:
    return Fault(path, "kd.training.module", STEP, only="seed=2", AT=7, ACT="hold()")


def has_no_memory(path: Path) -> Fault:
    return Fault(path, "kd.models.causal_lm", MEMORY, only="seed=2", ROWS=0, WHEN="True", ERROR=CPU)


@pytest.mark.parametrize(
    "make, number, stands, code, reason",
    [
        pytest.param(raises, None, "failed", 1, "RuntimeError: injected", id="raise"),
        pytest.param(exits, None, "failed", 3, "SystemExit: 3", id="exit", marks=pytest.mark.slow),
        pytest.param(stays, signal.SIGKILL, "failed", -9, "killed by SIGKILL", id="SIGKILL", marks=pytest.mark.slow),
        pytest.param(
            stays,
            signal.SIGTERM,
            "preempted",
            143,
            "asked to end at step 7 of 12",
            id="SIGTERM",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            has_no_memory, None, "out of memory", 2, "DefaultCPUAllocator", id="memory", marks=pytest.mark.slow
        ),
    ],
)
def test_one_bad_run_leaves_the_others_and_alone_is_made_again(
    clean, root, tmp_path, make, number, stands, code, reason
):
    fault = make(tmp_path / "fault")
    process = start(root, *BAD_FIRST, **fault.environment)
    if number:
        os.kill(fault.wait(process)[0], number)
        fault.go()
    output = ended(process, 1)
    assert len(set(fault.fired())) == 1

    bad, others = "seed=2", [f"seed={n}" for n in (0, 1)]
    assert states(root) == {seed: "done" for seed in others} | {bad: stands}
    record, log = state(runs(root)[bad]), (runs(root)[bad] / "log.txt").read_text()
    assert record["exit_code"] == code and reason in record["reason"] and record["peak_memory"] > 1e8
    assert record["seconds"] > 0 and record["log"] == str(runs(root)[bad] / "log.txt")
    rows = table(output)
    assert rows[bad].startswith(stands) and record["reason"][:40] in rows[bad]
    assert all(rows[seed].startswith("done") for seed in others)
    if make is raises:
        assert "Traceback" in record["traceback"] and "injected" in record["traceback"] and "injected" in log
    if make is has_no_memory:
        assert "Type trainer.chunk=" in log and "Out of memory with 2 rows at once: going on with 1" in log
        assert "Traceback" not in log
    same(root, clean, *others)

    before = {seed: times(runs(root)[seed]) for seed in others}
    again = train(root, *BAD_FIRST)
    assert again.count("done before") == 2 and again.count("  starts") == 1
    assert {seed: times(runs(root)[seed]) for seed in others} == before
    same(root, clean)


@pytest.mark.slow
def test_stop_at_a_failure_starts_no_more(clean, root, tmp_path):
    words = ("-m", "n_jobs=1", "seed=0,2,1")
    fault = raises(tmp_path / "fault")
    output = train(root, *words, "on_failure=stop", code=1, **fault.environment)
    assert len(fault.fired()) == 1
    assert states(root) == {"seed=0": "done", "seed=2": "failed", "seed=1": "not begun"}
    assert table(output)["seed=1"].startswith("not begun")
    same(root, clean, "seed=0")


@pytest.mark.slow
def test_full_disk_and_then_damaged_checkpoints_stop_one_run_of_a_sweep(clean, root, held):
    process = start(root, *PAIR, **held.environment)
    resource.prlimit(held.wait(process)[0], resource.RLIMIT_FSIZE, (100_000, 100_000))
    held.go()
    output = ended(process, 1)
    assert states(root) == {"seed=0": "failed", "seed=1": "done"}
    bad = runs(root)["seed=0"]
    assert "the disk is full" in state(bad)["reason"] and state(bad)["exit_code"] == 2
    assert "the disk is full" in table(output)["seed=0"] and "Traceback" not in (bad / "log.txt").read_text()
    assert not list(root.rglob("*.tmp"))

    older, newer = sorted(bad.glob("checkpoints/*.ckpt"))
    whole = older.read_bytes()
    flip(newer)
    flip(older)
    output = train(root, *PAIR, code=1)
    assert states(root) == {"seed=0": "failed", "seed=1": "done"}
    assert "every checkpoint of this run is damaged" in state(bad)["reason"] and state(bad)["exit_code"] == 2
    assert "every checkpoint of this run is damaged" in table(output)["seed=0"]
    assert f"  rm -r {bad / 'checkpoints'}" in (bad / "log.txt").read_text()

    older.write_bytes(whole)
    assert train(root, *PAIR).count("done before") == 1
    assert (bad / "log.txt").read_text().rindex(f"{newer} is damaged") > 0
    same(root, clean)


@pytest.mark.slow
def test_disk_too_full_to_say_so_is_recorded_by_the_sweep(root, held):
    process = start(root, "-m", "seed=0", **held.environment)
    resource.prlimit(held.wait(process)[0], resource.RLIMIT_FSIZE, (0, 0))
    held.go()
    output = ended(process, 1)
    record = state(folder(root, "fkl"))
    assert record["state"] == "failed" and record["reason"] and record["exit_code"] not in (0, None), record
    assert f"failed after 0:{record['seconds']:02.0f}" in output


# The sweep itself


def test_killed_sweep_leaves_no_run_behind_and_goes_on_where_it_was(clean, root, held):
    words = ("-m", "n_jobs=1", "seed=0,1")
    process = start(root, *words, **held.environment)
    held.wait(process)
    process.kill()
    process.communicate()
    assert processes(root) == held.fired()
    held.go()
    assert until(lambda: not processes(root)) < SOON
    first, second = runs(root).values()
    assert (state(first)["state"], state(first)["exit_code"]) == ("preempted", 143)
    assert "at step 7 of 12" in state(first)["reason"] and state(second)["state"] == "not begun"
    assert newest(first / "checkpoints").stem == "step-00000007"

    rng = random.Random(0)  # somewhere in the second run, with it or without
    process = start(root, *words)
    until(lambda: (second / "metrics.jsonl").exists())
    before = times(first)
    time.sleep(rng.random())
    for pid in rng.choice([processes(root), [process.pid]]):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert until(lambda: not processes(root)) < SOON
    assert state(first)["state"] == "done" and state(second)["state"] in ("done", "preempted", "stale")

    assert "done before" in train(root, *words) and times(first) == before
    same(root, clean)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_sweep_killed_at_random_moments_makes_nothing_twice(clean, root, seed):
    rng = random.Random(seed)
    process = start(root, *PAIR)
    time.sleep(rng.uniform(3, 12))
    for pid in rng.choice([processes(root), [process.pid]]):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert until(lambda: not processes(root)) < SOON
    folders = list(root.glob("fkl*"))
    assert {state(path)["state"] for path in folders} <= {"done", "preempted", "stale", "not begun"}
    before = {path: times(path) for path in folders if (path / "result.json").exists()}
    assert train(root, *PAIR).count("done before") == len(before)
    assert {path: times(path) for path in before} == before
    same(root, clean)


def test_two_copies_of_a_sweep_make_every_run_once(clean, tmp_path):
    (tmp_path / "root").mkdir()  # and the data, and the teacher
    patch = "def patch(module):\n    module.DistillationModule.on_fit_end = lambda self: fired()\n"
    fault = Fault(tmp_path / "fault", "kd.training.module", patch)
    both = [start(tmp_path / "root", *PAIR, **fault.environment) for _ in range(2)]
    outputs = [ended(process, 0) for process in both]
    assert len(fault.fired()) == 3, outputs  # two, and the teacher
    assert all(row.startswith("done") for output in outputs for row in table(output).values())
    same(tmp_path / "root", clean)


def test_signal_to_a_sweep_has_its_runs_save_and_end(root, tmp_path):
    fault = Fault(tmp_path / "fault", "kd.training.module", STEP, AT=7, ACT="hold()")
    process = start(root, *THREE, **fault.environment)
    fault.wait(process, 2)
    process.terminate()
    message = "the last whole step is saved"
    until(lambda: all(message in (runs(root)[s] / "log.txt").read_text() for s in ("seed=0", "seed=1")))
    fault.go()
    output = ended(process, 143)
    assert "SIGTERM: 2 runs save a checkpoint" in output and not processes(root)
    assert states(root) == {"seed=0": "preempted", "seed=1": "preempted", "seed=2": "not begun"}
    assert [row.split()[0] for row in table(output).values()] == ["preempted", "preempted", "not"]
    assert "The same command goes on where it was." in output
    assert all(newest(runs(root)[s] / "checkpoints").stem == "step-00000007" for s in ("seed=0", "seed=1"))


@pytest.mark.slow
def test_second_signal_to_a_sweep_ends_all_at_once(root, tmp_path):
    fault = Fault(tmp_path / "fault", "kd.training.module", STEP, AT=7, ACT="hold()")
    process = start(root, *THREE, **fault.environment)
    fault.wait(process, 2)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    output = ended(process, 143, seconds=SOON)
    assert not processes(root)
    assert states(root) == {"seed=0": "preempted", "seed=1": "preempted", "seed=2": "not begun"}
    assert [row.split()[0] for row in table(output).values()] == ["preempted", "preempted", "not"]


@pytest.mark.slow
def test_signal_to_a_sweep_whose_runs_only_begin(root, tmp_path):
    fault = Fault(tmp_path / "fault", "kd.config.security", BEGIN, only="seed=0")
    process = start(root, "-m", "n_jobs=1", "seed=0,1", **fault.environment)
    fault.wait(process)
    process.terminate()
    output = ended(process, 143, seconds=SOON)
    assert states(root) == {"seed=0": "preempted", "seed=1": "not begun"} and not processes(root)
    assert table(output)["seed=0"].startswith("preempted")


# One run that is asked to end


@pytest.mark.parametrize(
    "signals",
    [
        [(4, signal.SIGTERM)],
        pytest.param([(4, signal.SIGINT), (9, signal.SIGUSR2)], marks=pytest.mark.slow),
    ],
)
def test_signal_in_training_saves_a_checkpoint_and_the_run_goes_on_bit_for_bit(clean, root, tmp_path, signals):
    for at, number in signals:
        fault = Fault(tmp_path / number.name, "kd.training.module", STEP, AT=at, ACT="hold()")
        process = start(root, "seed=0", **fault.environment)
        fault.wait(process)
        process.send_signal(number)
        time.sleep(0.1)
        fault.go()
        output = ended(process, 143)
        run = folder(root, "fkl")
        assert f"{number.name}: the last whole step is saved" in output and "Traceback" not in output
        assert (state(run)["state"], state(run)["exit_code"]) == ("preempted", 143)
        assert f"asked to end at step {at} of 12" in state(run)["reason"]
        assert newest(run / "checkpoints").stem == f"step-{at:08}"
    train(root, "seed=0")
    assert outcome(run) == outcome(runs(clean)["seed=0"])


@pytest.mark.slow
def test_second_signal_to_a_run_ends_it_at_once(clean, root, tmp_path):
    fault = Fault(tmp_path / "stuck", "kd.training.module", STEP, AT=11, ACT="fired(); time.sleep(600)")
    process = start(root, "seed=0", **fault.environment)
    fault.wait(process)
    process.terminate()
    time.sleep(0.5)
    assert process.poll() is None  # the first waits for the step to end, the second does not
    process.terminate()
    ended(process, 143, seconds=SOON)
    run = folder(root, "fkl")
    assert state(run)["state"] == "preempted" and newest(run / "checkpoints").stem == "step-00000009"
    train(root, "seed=0")
    assert outcome(run) == outcome(runs(clean)["seed=0"])


@pytest.mark.slow
def test_signal_before_training_ends_at_once(clean, tmp_path):
    """Signal while train.py is loaded, while data is packed, and while the teacher learns."""
    root = tmp_path / "root"
    root.mkdir()
    packing = "def patch(module):\n    module.np.save = lambda *_: hold()\n"
    for name, fault in {
        "load": Fault(tmp_path / "load", "hydra", IMPORT),
        "pack": Fault(tmp_path / "pack", "kd.data.packing", packing),
        "teach": Fault(tmp_path / "teach", "kd.training.module", STEP, AT=4, ACT="hold()"),
    }.items():
        process = start(root, "seed=0", cold=name == "load", **fault.environment)
        fault.wait(process)
        process.terminate()
        if name == "teach":
            time.sleep(0.1)
            fault.go()
        assert "Traceback" not in ended(process, 143, seconds=SOON), name
        assert not list(root.glob("fkl*/result.json")) and not list(root.rglob("*.tmp")), name
    assert state(folder(root, "lm"))["state"] == "preempted"
    train(root, "seed=0")
    assert outcome(folder(root, "fkl")) == outcome(runs(clean)["seed=0"])


@pytest.mark.slow
def test_signal_while_a_checkpoint_is_written_leaves_none_that_is_torn(clean, root, tmp_path):
    """One that ends the process, two that ask it to end at once, one that asks it to end."""
    for signals, number, being_written, left in (
        ("KILL", 2, 6, [3]), ("TERM TERM", 2, 9, [3, 6]), ("TERM", 1, 9, [6, 9]),  # step 9 is left unfinished
    ):  # fmt: skip
        fault = Fault(tmp_path / signals, "kd.system.checkpoint_files", WRITE, COUNT=number)
        process = start(root, "seed=0", **fault.environment)
        fault.wait(process)
        run = folder(root, "fkl")
        assert state(run)["state"] == "running" and state(run)["pid"] == process.pid
        assert len(list(run.glob(f"checkpoints/.step-{being_written:08}.ckpt.*.tmp"))) == 1
        for name in signals.split():
            process.send_signal(signal.Signals[f"SIG{name}"])
            time.sleep(0.2)
        fault.go()
        ended(process, -9 if signals == "KILL" else 143, seconds=SOON)
        assert state(run)["state"] == ("stale" if signals == "KILL" else "preempted")
        assert signals != "KILL" or "goes on with it" in state(run)["reason"]
        whole = sorted(run.glob("checkpoints/*.ckpt"))
        assert [int(p.stem.removeprefix("step-")) for p in whole] == left
        assert all(files.digest(p) == p.with_suffix(".xxh3").read_text() for p in whole)
    train(root, "seed=0")
    assert outcome(run) == outcome(runs(clean)["seed=0"]) and not list(root.rglob("*.tmp"))


# Out of memory


def lines(path: Path, kind: str) -> list[dict]:
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line for line in records if any(name.startswith(kind) for name in line)]


def close(ours: list[dict], theirs: list[dict]) -> bool:
    return len(ours) == len(theirs) and all(a == pytest.approx(b, abs=1e-5) for a, b in zip(ours, theirs))


def test_out_of_memory_goes_on_with_fewer_rows_and_the_same_numbers(root, tmp_path):
    train(root, "seed=0", "trainer.micro_batch=1")
    single = folder(root, "fkl")
    for words, error in ((("trainer.micro_batch=4",), CPU), (("trainer.micro_batch=2",), GPU)):
        fault = Fault(tmp_path / f"fault{words}", "kd.models.causal_lm", MEMORY, ROWS=1, WHEN="True", ERROR=error)
        before = set(root.glob("fkl*"))
        output = train(root, "seed=0", *words, **fault.environment)
        (run,) = set(root.glob("fkl*")) - before
        assert "Out of memory with 2 rows at once: going on with 1" in output
        assert len(fault.fired()) == output.count("Out of memory with") == (2 if error is CPU else 1)
        assert result(run)["micro_batch"] == 1 and result(run)["config"]["trainer.micro_batch"] > 1
        assert outcome(run)[1] == outcome(single)[1] and lines(run, "train/") == lines(single, "train/")
        assert close(lines(run, "val/"), lines(single, "val/"))  # validation takes as many rows as it was told


@pytest.mark.slow
def test_rows_at_once_are_kept_in_a_checkpoint(root, tmp_path):
    """Out of memory once, at step 4; one run is held at step 7, ended, and goes on where nothing is the matter."""
    words, other = ("seed=0", "trainer.micro_batch=4"), tmp_path / "other"
    shutil.copytree(root, other)
    whole, cut = (Fault(tmp_path / name, "kd.training.module", ONCE, ERROR=CPU) for name in ("whole", "cut"))
    whole.go()
    train(root, *words, **whole.environment)
    process = start(other, *words, **cut.environment)
    cut.wait(process, 2)
    process.terminate()
    time.sleep(0.1)
    cut.go()
    ended(process, 143)
    train(other, *words)
    one, two = folder(root, "fkl"), folder(other, "fkl")
    assert len(whole.fired()) == 2 and result(one)["micro_batch"] == result(two)["micro_batch"] == 2
    assert outcome(one) == outcome(two)


@pytest.mark.slow
def test_out_of_memory_while_logits_are_recorded_stores_the_same(root, tmp_path):
    """Run out of memory in the second half of a batch, when the first half is recorded already."""
    words = ("logits=none", "teacher=none", "record=top_k", "record.k=5")
    fault = Fault(tmp_path / "fault", "kd.models.causal_lm", MEMORY, ROWS=1, WHEN="count > 1", ERROR=CPU)
    train(root, *words, f"record.path={tmp_path / 'halved'}", **fault.environment)
    train(root, *words, f"record.path={tmp_path / 'single'}", "trainer.micro_batch=1")
    assert len(fault.fired()) == 1
    halved, single = (
        {name: data for name, data in content(tmp_path / which).items() if name.endswith(".safetensors")}
        for which in ("halved", "single")
    )
    assert halved == single and len(halved) > 2


def test_memory_that_is_limited_in_earnest_ends_the_run_with_a_reason(root, tmp_path):
    fault = Fault(tmp_path / "fault", "kd.training.module", STEP, AT=0, ACT="hold()")
    process = start(root, "-m", "seed=0", "student=10m", **fault.environment)
    (pid,) = fault.wait(process)
    size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (size + 2**21, size + 2**21))
    fault.go()
    output = ended(process, 1)
    record = state(folder(root, "fkl"))
    assert record["state"] in ("out of memory", "failed") and record["reason"] and record["exit_code"] != 0, record
    assert f"{record['state']} after" in output


# Files that are damaged, and commands that change


@pytest.mark.slow
def test_changed_override_makes_new_runs_and_touches_no_old_file(clean, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(clean, root)
    before = {k: v for k, v in times(root).items() if k.is_file() and k.parent.name != "sweeps"}
    old = set(runs(root).values())
    train(root, "-m", "seed=0", "temperature.tau=2")
    assert len(runs(root)) == 1 and not set(runs(root).values()) & old and set(states(root).values()) == {"done"}
    assert times(root).items() >= before.items()


@pytest.mark.slow
def test_data_that_is_damaged_in_the_middle_of_a_sweep(clean, root, tmp_path):
    words = ("-m", "n_jobs=1", "seed=1,0")
    fault = Fault(tmp_path / "fault", "kd.config.security", BEGIN, only="seed=0")
    process = start(root, *words, **fault.environment)
    fault.wait(process)
    (data,) = root.glob("data/*/train.npy")
    flip(data)
    fault.go()
    output = ended(process, 1)
    assert states(root) == {"seed=1": "done", "seed=0": "failed"}
    record = state(runs(root)["seed=0"])
    assert (
        f"{data} is damaged" in record["reason"] and record["exit_code"] == 2 and "damaged" in table(output)["seed=0"]
    )
    again = train(root, *words, code=2)
    assert f"{data} is damaged" in again and "starts" not in again
    type_in(again)
    assert train(root, *words).count("done before") == 1
    same(root, clean)
