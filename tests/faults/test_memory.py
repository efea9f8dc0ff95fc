"""Runs that are out of memory."""

import json
import resource
import shutil
import time
from pathlib import Path

import pytest

from tests.faults.injection import CPU, GPU, MEMORY, ONCE, STEP, Fault, ended, state
from tests.small import content, folder, outcome, result, start, train

pytestmark = pytest.mark.fault


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
