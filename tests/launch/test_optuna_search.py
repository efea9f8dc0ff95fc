"""hydra/sweeper=optuna: trials by Optuna, a process each, resumed with the same trials, hopeless ones ended early."""

import json
import os
import shutil
import signal
import sys
import time

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from kd.launch import optuna_search
from kd.launch.optuna_search import Watched, alternatives, axis
from kd.launch.sweeper import unused_everywhere, without
from kd.runs.run import Run
from tests.refusals import refused
from tests.small import listed, result, start, train

optuna = pytest.importorskip("optuna")
AXES = ("lr.peak=tag(log,interval(1e-4,1e-2))", "loss=fkl,rkl")
WORDS = ("-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "trainer.steps=4", *AXES)


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    root = tmp_path_factory.mktemp("searched")
    return root, train(root, *WORDS)


def trials(root) -> dict[str, tuple[tuple[str, ...], float]]:
    """Return the options and the validation loss of each trial."""
    lines = json.loads(listed(root).read_text())["runs"]
    words = {line["run"]: tuple(w for w in line["overrides"] if w[:3] in ("lr.", "los")) for line in lines}
    return {run: (axes, result(root / run)["final"]["val/lm"]) for run, axes in words.items()}


def test_trials_are_runs_within_the_axes_and_the_best_is_said(searched):
    root, output = searched
    by_run = trials(root)
    assert len(by_run) == 3
    for words, _ in by_run.values():
        axes = dict(word.split("=") for word in words)
        assert 1e-4 <= float(axes["lr.peak"]) <= 1e-2 and axes["loss"] in ("fkl", "rkl")
    assert f"best of 3 trials: val/lm {min(value for _, value in by_run.values()):.4f}" in output


def test_again_is_nothing_to_do(searched):
    root, _ = searched
    before = {p: p.stat().st_mtime_ns for p in root.glob("fkl*/**/*")}
    began = time.monotonic()
    assert "best of 3 trials" in train(root, *WORDS)
    assert time.monotonic() - began < 10 and before == {p: p.stat().st_mtime_ns for p in root.glob("fkl*/**/*")}


@pytest.mark.slow
def test_killed_goes_on_with_the_same_trials(searched, tmp_path):
    root, _ = searched
    process = start(tmp_path, *WORDS)
    while not list(tmp_path.glob("[fr]kl*/state.json")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    train(tmp_path, *WORDS)
    assert trials(tmp_path) == trials(root)


@pytest.mark.slow
def test_a_run_killed_in_a_search_is_made_by_the_same_command(searched, tmp_path):
    """Not replaced by another trial; the others go on."""
    root, _ = searched
    process = start(tmp_path, *WORDS)
    while not (states := list(tmp_path.glob("[fr]kl*/state.json"))):
        time.sleep(0.01)
    os.kill(json.loads(states[0].read_text())["pid"], signal.SIGKILL)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 1 and "1 trial was interrupted" in output, output
    train(tmp_path, *WORDS)
    assert len(trials(tmp_path)) == 3 and set(trials(tmp_path)) & set(trials(root))


def test_changed_axes_are_another_search_and_n_jobs_is_not():
    words = ["trainer.steps=4", *AXES]
    assert optuna_search.asked_for(words) == optuna_search.asked_for([*reversed(words), "n_jobs=4", "logger=none"])
    assert optuna_search.asked_for(words) != optuna_search.asked_for(["trainer.steps=4", AXES[0], "loss=fkl,jsd"])


def test_a_sweep_file_is_no_search(tmp_path):
    assert "Leave sweeps= out" in train(tmp_path, "-m", "hydra/sweeper=optuna", "sweeps=demo", AXES[0], code=2)


@pytest.mark.slow
def test_more_trials_are_added_to_those_there_are(searched, tmp_path):
    root = tmp_path / "more"
    shutil.copytree(searched[0], root)
    train(root, *(w.replace("n_trials=3", "n_trials=4") for w in WORDS))
    assert len(trials(root)) == 4 and trials(searched[0]).items() <= trials(root).items()


def test_a_search_without_an_axis_says_what_one_is(tmp_path):
    assert "need an axis" in train(tmp_path, "-m", "hydra/sweeper=optuna", "loss=fkl", code=2)


def test_a_root_that_is_no_folder_is_said(tmp_path):
    (tmp_path / "file").touch()
    output = train(tmp_path, *WORDS, f"root={tmp_path / 'file'}", code=2)
    assert "cannot be created: File exists" in output and "Traceback" not in output


def test_what_to_type_without_optuna(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with refused(option="hydra/sweeper", got="optuna", need="the package Optuna", hint="pip install 'kd[optuna]'"):
        optuna_search._optuna()


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("x=interval(0,1)", optuna.distributions.FloatDistribution(0, 1)),
        ("x=tag(log,interval(1e-4,1))", optuna.distributions.FloatDistribution(1e-4, 1, log=True)),
        ("x=tag(int,interval(1,8))", optuna.distributions.IntDistribution(1, 8)),
        ("x=range(1,10,3)", optuna.distributions.IntDistribution(1, 7, step=3)),
        ("x=a,b", optuna.distributions.CategoricalDistribution(["a", "b"])),
    ],
)
def test_axes_are_those_of_hydra(typed, expected):
    assert axis(optuna, OverridesParser.create().parse_override(typed)) == expected


@pytest.mark.parametrize("typed", ["x=tag(log,interval(0,1e-2))", "x=interval(1,0)", "x=tag(int,log,interval(0,8))"])
def test_an_interval_that_is_none_is_named(typed):
    need = "the smaller number first, and with log a number above 0"
    with refused(option="x", got=typed.removeprefix("x="), need=need):
        axis(optuna, OverridesParser.create().parse_override(typed))


def test_a_run_behind_the_median_of_the_others_is_ended(tmp_path):
    study = optuna.create_study()
    for value in (2.0, 2.1, 2.2, 2.3, 2.4):
        trial = study.ask()
        trial.report(value, 10)
        study.tell(trial, value)
    watched = Watched(optuna, [study.ask(), study.ask()])
    for number, loss, ended in ((0, 2.1, False), (1, 2.5, True)):
        lines = [{"step": 5, "train/loss": 9.0}, {"step": 10, "val/lm": loss}]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        reason = watched(number, tmp_path)
        assert bool(reason) == ended and (not ended or "pruned: val/lm 2.5000 at step 10" in reason)
    assert watched.pruned == {watched.trials[1].number}


def test_trial_that_goes_on_reports_no_step_twice(tmp_path, recwarn):
    """Optuna warns of each that it knows."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    trial = study.ask()
    run = Run(tmp_path, "run")
    run.folder.mkdir()
    for steps in ((5, 10), (5, 10, 15)):  # before it was interrupted, and after
        lines = [json.dumps({"step": step, "val/lm": 2.0}) + "\n" for step in steps]
        (run / "metrics.jsonl").write_text("".join(lines))
        Watched(optuna, [trial])(0, run)
    assert study.trials[0].intermediate_values.keys() == {5, 10, 15} and not recwarn.list


def test_settings_without_an_effect_in_a_trial_are_left_out_unless_no_trial_uses_them():
    space = {"teacher": optuna.distributions.CategoricalDistribution(["1m", "none"]),
             "lr.peak": optuna.distributions.FloatDistribution(1e-4, 1e-2)}  # fmt: skip
    fixed = ["logits=none", "teacher.steps=5", "loss=akl"]
    trials = alternatives(fixed, space)
    assert trials == [[*fixed, f"teacher={teacher}", "lr.peak=0.0001"] for teacher in ("1m", "none")]
    refused = unused_everywhere(trials, fixed)
    assert refused == {"loss"}
    assert without([*fixed, "teacher=none"], refused) == ["logits=none", "loss=akl", "teacher=none"]
    assert without([*fixed, "teacher=1m"], refused) == [*fixed, "teacher=1m"]
