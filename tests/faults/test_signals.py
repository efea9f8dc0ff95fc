"""One run that is asked to end."""

import signal
import time

import pytest

from kd.system import files
from kd.system.checkpoint_files import newest
from tests.faults.injection import IMPORT, SOON, STEP, WRITE, Fault, ended, runs, state
from tests.small import folder, outcome, start, train

pytestmark = pytest.mark.fault


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
