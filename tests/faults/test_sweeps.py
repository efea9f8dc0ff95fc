"""Faults in sweeps: real processes and signals, and proof that each fault was met."""

import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest

from kd.system.checkpoint_files import newest
from tests.faults.injection import (
    BAD_FIRST,
    BEGIN,
    CPU,
    MEMORY,
    PAIR,
    SOON,
    STEP,
    THREE,
    Fault,
    ended,
    flip,
    processes,
    raises,
    runs,
    same,
    state,
    states,
    table,
    times,
    until,
)
from tests.small import folder, start, train, type_in

pytestmark = pytest.mark.fault


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
