"""Finished runs that are shown again, or made again by force=true."""

import json

import pytest

from kd.experiment import planner
from kd.runs import provenance
from tests.refusals import refused
from tests.runs.sealed import RUN, flip, result, show
from tests.small import folder, here, small_config, train, type_in


def test_a_run_that_was_there_says_when_and_by_which_revision(root):
    run, shown, before = show(root)
    assert before
    words = provenance.done_before(shown)
    assert words == f"done before, on {shown['date']}, git revision {shown['environment']['git'] or 'unknown'}"
    new_run = here(root, *RUN, "seed=5")
    assert new_run != run.folder and not provenance.doubts(json.loads((new_run / "result.json").read_text()))


def test_force_makes_a_run_anew(root):
    run = folder(root, "fkl")
    (run / "wandb-id").write_text("old")
    before, number = result(root), (run / "result.json").stat().st_ino
    outcome = show(root, "force=true")
    assert not outcome.before and outcome.run.folder == run
    assert outcome.result["final"] == before["final"] and not (run / "wandb-id").exists()
    assert (run / "result.json").stat().st_ino != number
    outcome.run.check(outcome.result)
    for name in ("result.json", "student/config.json"):  # whatever was wrong with it
        flip(run / name)
        show(root, "force=true")
        show(root)


def test_force_removes_nothing_before_all_is_checked(root, monkeypatch):
    run, teacher = folder(root, "fkl"), folder(root, "lm")
    before = (run / "result.json").read_bytes()
    monkeypatch.setenv("WANDB_BASE_URL", "nonsense")
    with refused(option="logger", got="wandb", why="WANDB_BASE_URL=nonsense"):
        show(root, "force=true", "logger=wandb")
    (packed,) = root.glob("data/*/train.npy")
    for path, named in ((packed, packed), (teacher / "student" / "config.json", teacher / "student")):
        flip(path)
        with refused(option=named, why="is damaged"):
            show(root, "force=true")
        flip(path)
    assert (run / "result.json").read_bytes() == before and (run / "student" / "model.safetensors").exists()
    show(root)


def test_force_plans_a_run_with_a_damaged_result(root, capsys):
    flip(folder(root, "fkl") / "result.json")
    given = small_config(root, *RUN, "plan=true", "force=true")
    planner.show_plan([given], ["this run"], 1)
    assert "this run" in capsys.readouterr().err


def test_force_leaves_what_a_killed_run_had_done(root, monkeypatch):
    """Use force=true once: it removes the earlier results, and a run that is then interrupted continues."""
    from kd.training.module import DistillationModule

    class Killed(BaseException):
        pass

    real, steps = DistillationModule.training_step, []

    def step(self, *args):
        steps.append(self.global_step)
        if steps.count(4) == 1 and self.global_step == 4:
            raise Killed
        return real(self, *args)

    words = ("trainer.steps=6", "trainer.checkpoint_every=1")
    run = here(root, *RUN, *words)
    monkeypatch.setattr(DistillationModule, "training_step", step)
    with pytest.raises(Killed):
        here(root, *RUN, *words, "force=true")
    assert not (run / "result.json").exists()
    here(root, *RUN, *words, "force=true")
    assert steps == [0, 1, 2, 3, 4, 4, 5]


def test_data_of_other_code_stays_old_until_it_is_packed_anew(finished, root, code):
    code("data.corpora", ("rng = np.random.default_rng(", "rng = np.random.default_rng(1 + "))
    (packed,) = root.glob("data/*/train.npy")
    before = packed.stat().st_ino
    outcome = show(root, "seed=9").result  # on data that was packed before
    assert [change.partition(" ")[0] for change in provenance.changes(outcome)] == ["data=markov"]
    assert packed.stat().st_ino == before
    outcome = show(root, "seed=9", "force=true").result
    assert packed.stat().st_ino != before
    assert provenance.changes(outcome) == [] and packed.exists()


def test_a_run_does_not_go_on_under_other_code(root, code, monkeypatch):
    from kd.training.module import DistillationModule

    class Killed(BaseException):
        pass

    real, words = DistillationModule.training_step, ("seed=8", "trainer.steps=4", "trainer.checkpoint_every=1")

    def step(self, *args):
        if self.global_step == 2:
            raise Killed
        return real(self, *args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(DistillationModule, "training_step", step)
        here(root, *RUN, *words)
    (checkpoints,) = root.glob("*/checkpoints")
    code("objective.losses", ("-(p.exp() * (q - p))", "-2 * (p.exp() * (q - p))"))
    with refused(why="that of loss=fkl (fkl) has changed") as caught:
        here(root, *RUN, *words)
    code("objective.losses", ("-2 * (p.exp() * (q - p))", "-(p.exp() * (q - p))"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(DistillationModule, "training_step", step)
        here(root, *RUN, *words)  # goes on with it
    code("objective.losses", ("-(p.exp() * (q - p))", "-2 * (p.exp() * (q - p))"))
    type_in(str(caught.value))
    assert not checkpoints.exists()
    outcome = json.loads((here(root, *RUN, *words) / "result.json").read_text())
    assert provenance.changes(outcome) == []


@pytest.mark.slow
def test_a_sweep_says_what_was_done_before_and_makes_it_anew_on_request(root):
    words = ("-m", *RUN, "data.tokens=2000", "seed=0,1")
    assert train(root, *words).count("done before, on ") == 1
    again = train(root, *words)
    assert again.count("done before, on ") == again.count(", git revision ") == 2 and "starts" not in again
    forced = train(root, *words, "force=true")
    assert "done before" not in forced and forced.count("starts") == 2
    assert "force" not in json.loads(next((root / "sweeps").glob("*.json")).read_text())["runs"][0]["overrides"]
