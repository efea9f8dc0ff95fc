"""Teachers that learn beside the student."""

import os
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch

from kd.experiment.dependencies import Plan
from kd.system.files import read_metrics
from kd.training import module
from tests.refusals import refused
from tests.small import folder, here, outcome, result, small_config
from tests.teachers.killing import STEPS, die

COTRAINED = ("logits=cotrained", "seed=0", "teacher.seed=0", f"trainer.steps={STEPS}", "alpha.peak=0.5")


@pytest.fixture(scope="module")
def cotrained(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A root with a run, and its teacher's weights as they were at the end."""
    root, teacher_weights = tmp_path_factory.mktemp("cotrained"), {}
    real = module.DistillationModule.on_train_batch_end

    def spy(self, *given) -> None:
        teacher_weights.update({k: v.clone() for k, v in self.trainable_teacher.model.state_dict().items()})
        real(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.DistillationModule, "on_train_batch_end", spy)
        here(root, *COTRAINED)
    return root, teacher_weights


def test_cotrained_teacher_learns_as_it_would_alone(cotrained, tmp_path):
    root, teacher_weights = cotrained
    here(tmp_path, "logits=none", "teacher=none", f"trainer.steps={STEPS}")
    alone = safetensors.torch.load_file(folder(tmp_path, "lm") / "student" / "model.safetensors")
    assert alone.keys() <= teacher_weights.keys()
    assert all(torch.equal(alone[name], teacher_weights[name]) for name in alone)
    lm, fkl = result(folder(tmp_path, "lm"))["final"], result(folder(root, "fkl"))["final"]
    assert fkl["val/teacher_lm"] == lm["val/lm"] != fkl["val/lm"]
    assert not list(root.glob("lm*"))  # and is no run of its own


def test_seed_of_a_cotrained_teacher_is_part_of_the_run(cotrained, tmp_path):
    assert settings_run(tmp_path, *COTRAINED) != settings_run(tmp_path, *COTRAINED, "teacher.seed=1")
    assert settings_run(tmp_path, "teacher.lr=0.1") != settings_run(tmp_path)  # of the teacher's own run


def settings_run(root: Path, *words: str):
    config = small_config(root, *words)
    return Plan.from_config(config).run.name


def test_a_pretrained_teacher_does_not_learn_at_the_rates_of_sizes(tmp_path):
    words = ("logits=cotrained", "teacher=hub", "teacher.name=org/model")
    with refused(option="optim", got="mup", conflict="logits=cotrained", hint="type optim=adamw lr.peak=1e-4"):
        small_config(tmp_path, *words)
    assert small_config(tmp_path, *words, "optim=adamw", "lr.peak=1e-4")


def test_cotrained_student_is_exported_without_its_teacher(cotrained, tmp_path):
    root, teacher_weights = cotrained
    saved = safetensors.torch.load_file(folder(root, "fkl") / "student" / "model.safetensors")
    assert saved.keys() <= teacher_weights.keys()
    assert not all(torch.equal(saved[name], teacher_weights[name]) for name in saved)
    assert len(list((folder(root, "fkl") / "student").glob("*.safetensors"))) == 1


def test_cotrained_student_learns_from_what_the_teacher_says_meanwhile(cotrained):
    """The loss starts at what two models of one seed differ by, which is nothing."""
    lines = [x for x in read_metrics(folder(cotrained[0], "fkl") / "metrics.jsonl") if "train/kd" in x]
    assert lines[0]["train/kd"] == pytest.approx(0, abs=1e-6) and lines[-1]["train/kd"] > 1e-4
    assert lines[0]["train/teacher_lm"] == pytest.approx(lines[0]["train/lm"], abs=1e-6)
    assert lines[-1]["train/teacher_lm"] < lines[0]["train/teacher_lm"] - 0.1


def test_killed_cotraining_ends_bit_for_bit_as_if_never_killed(cotrained, tmp_path):
    def at(number: int) -> None:
        real = module.DistillationModule.training_step

        def step(self, batch, index) -> None:
            if self.global_step == number:
                os.kill(os.getpid(), signal.SIGKILL)
            real(self, batch, index)

        module.DistillationModule.training_step = step

    die(tmp_path, COTRAINED, at, 8)
    newest = max((folder(tmp_path, "fkl") / "checkpoints").glob("*.ckpt"))
    held = torch.load(newest, weights_only=True)["state_dict"]
    assert {name.partition(".")[0] for name in held} == {"student", "trainable_teacher"}
    here(tmp_path, *COTRAINED)
    assert outcome(folder(tmp_path, "fkl")) == outcome(folder(cotrained[0], "fkl"))


def test_cotraining_without_distillation_still_teaches_the_teacher(cotrained, tmp_path):
    here(tmp_path, *COTRAINED, "alpha.peak=0")
    final = result(folder(tmp_path, "fkl"))["final"]
    assert final["val/teacher_lm"] == result(folder(cotrained[0], "fkl"))["final"]["val/teacher_lm"]
    assert final["val/lm"] == final["val/teacher_lm"]  # a twin
