"""Results as records for a data frame, and trained students, as a notebook has them."""

import json
import shutil
import subprocess
import sys
import warnings

import pytest
import torch

import kd
from kd.errors import UserError
from tests.refusals import refused
from tests.small import ENVIRONMENT, TRAIN, here, result, shared
from tests.sweeps.fake import Sweep


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A root with a teacher and a student."""
    return shared(tmp_path_factory, "notebook", lambda root: here(root, "trainer.steps=2", "teacher.steps=2"))


def records(*arguments, **settings):
    """Records of runs that are all done: a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return kd.load_results(*arguments, **settings)


def test_a_record_has_the_config_and_the_metrics_of_a_run(runs):
    by_loss = {record["loss"] if record["logits"] != "none" else "lm": record for record in records(runs)}
    student, teacher = by_loss["fkl"], by_loss["lm"]
    stored = result(runs / student["run"])
    assert stored["final"].items() <= student.items() and stored["config"].items() <= student.items()
    assert student["state"] == "done" and student["message"] == "" and student["tokens"] == stored["tokens"]
    assert student["git"] == stored["environment"]["git"] and teacher["teacher.size"] is None
    assert not any(isinstance(value, dict) for record in by_loss.values() for value in record.values())


def test_a_sweeps_records_are_in_the_order_of_its_list(tmp_path):
    sweep = Sweep(tmp_path).done("fkl", 1, 2.5).done("lm", 0, 2.75)
    sweep.report()
    first, second = records(tmp_path, sweep="s")
    assert (first["run"], first["loss"], first["val/lm"], first["seed"]) == ("run-0", "fkl", 2.5, 1)
    assert first["command"] == "python train.py loss=fkl seed=1"
    assert (second["run"], second["logits"], second["val/acceptance"]) == ("run-1", "none", 0.65)
    assert [record["run"] for record in records(tmp_path)] == ["run-0", "run-1"]


def test_runs_that_are_not_done_or_damaged_are_said(tmp_path, runs):
    shutil.copytree(runs, tmp_path / "r")
    damaged, stopped = sorted(path.parent for path in (tmp_path / "r").glob("*/result.json"))
    (damaged / "result.json").write_text((damaged / "result.json").read_text().replace('"val/lm": ', '"val/lm": 1'))
    (stopped / "result.json").unlink()
    (stopped / "state.json").write_text(json.dumps({"state": "failed", "reason": "no more patience"}))
    with pytest.warns(UserWarning, match=r"2 of 2 runs in .* are not done \(1 damaged, 1 failed\)"):
        by_run = {record["run"]: record for record in kd.load_results(tmp_path / "r")}
    assert by_run[damaged.name]["state"] == "damaged" and "is damaged" in by_run[damaged.name]["message"]
    assert by_run[stopped.name]["message"] == "no more patience" and "val/lm" not in by_run[stopped.name]
    assert by_run[stopped.name]["trainer.steps"] == 2  # of its config.json


def test_a_root_or_sweep_that_does_not_exist_is_refused(tmp_path, runs):
    with refused(option="root", got=tmp_path / "none", why="does not exist"):
        kd.load_results(tmp_path / "none")
    with refused(option="sweeps", got="none", why="which has none yet"):
        kd.load_results(runs, sweep="none")
    with refused(option="sweep", got="../x"):
        kd.load_results(runs, sweep="../x")


def test_a_student_is_a_model_of_transformers(runs):
    (record,) = (record for record in records(runs) if record["logits"] == "online")
    model, tokenizer = kd.load_student(record["folder"])
    assert not model.training and model.num_parameters() == record["parameters"]
    ids = tokenizer("a b", return_tensors="pt")["input_ids"]
    assert torch.isfinite(model(ids).logits).all()
    again, _ = kd.load_student(f"{record['folder']}/student/")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_student_that_was_changed_or_is_not_done_is_refused(tmp_path, runs):
    shutil.copytree(runs, tmp_path / "r")
    first, second = sorted(path.parent for path in (tmp_path / "r").glob("*/result.json"))
    (first / "student" / "pytorch_model.bin").write_bytes(b"code")
    with refused(option=first / "student/pytorch_model.bin", why="was not written by the run") as caught:
        kd.load_student(first)
    assert isinstance(caught.value, kd.UserError) and kd.UserError is UserError
    (second / "result.json").unlink()
    with refused(option=second, need="a run that is done"):
        kd.load_student(second)
    with refused(option=tmp_path / "none", why="does not exist"):
        kd.load_student(tmp_path / "none")


def test_import_kd_loads_no_library():
    script = (
        "import sys, kd; kd.__version__; dir(kd)\n"
        "print([m for m in ('torch', 'hydra', 'numpy', 'rich', 'transformers') if m in sys.modules])"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=TRAIN.parent, text=True, capture_output=True)
    assert done.stdout == "[]\n", done.stderr
