"""Step whose weights a run ends with, and early stopping: by hand, in whole runs, and after an interruption."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from kd.runs.export import selected_step
from kd.training.callbacks.step_selection import StepSelection
from kd.training.module import DistillationModule
from tests.refusals import refused
from tests.small import here, outcome, result, small_config, train

RUN = ("logits=none", "teacher=none", "lr=constant", "lr.peak=1", "trainer.val_every=2")  # the loss goes up


class Steps:
    """Training of a linear layer whose weight is the number of the step, with validations of given losses."""

    def __init__(self, losses, keep="best", patience=None, first=1):
        self.module = SimpleNamespace(student=torch.nn.Linear(1, 1, bias=False))
        self.trainer = SimpleNamespace(global_step=0, should_stop=False)
        self.validation = SimpleNamespace(step=-1, metrics={})
        self.saved: list[int] = []
        self.selection = StepSelection(self.validation, keep, patience, self.saved.append)
        self.losses, self.first = losses, first

    def run(self) -> float:
        """Run all steps; return the weight that is left. A loss of None is a step without a validation."""
        for step, loss in enumerate(self.losses, self.first):
            self.trainer.global_step = step
            torch.nn.init.constant_(self.module.student.weight, step)
            if loss is not None:
                self.validation.step, self.validation.metrics = step, {"val/lm": loss, "tokens": step}
            self.selection.on_train_batch_end(self.trainer, self.module, None, None, 0)
            if self.trainer.should_stop:
                break
        self.selection.on_train_end(self.trainer, self.module)
        return self.module.student.weight.item()


@pytest.mark.parametrize(
    ("losses", "step"), [([3, 1, 2], 2), ([3, 2, 1], 3), ([1, 1, 1], 1), ([2, None, 1, None, 3], 3), ([None, 2], 2)]
)
def test_the_best_step_is_the_first_of_the_lowest_loss(losses, step):
    steps = Steps(losses)
    assert steps.run() == step
    assert steps.validation.step == step and steps.validation.metrics["tokens"] == step


def test_the_last_step_is_left_as_it_is():
    steps = Steps([1, 2, 3], keep="last")
    assert steps.run() == 3 and steps.validation.step == 3 and not steps.selection.weights and not steps.saved


def test_all_steps_with_a_validation_are_saved():
    steps = Steps([1, None, 3], keep="all")
    assert steps.run() == 3 and steps.saved == [1, 3] and steps.validation.step == 3


@pytest.mark.parametrize(
    ("losses", "patience", "last"),
    [([3, 1, 2, 2, 0], 2, 4), ([3, 2, 1, 2, 0], 2, 5), ([1, 2, None, 0], 1, 2), ([1, 2], None, 2)],
)
def test_training_ends_after_so_many_validations_without_a_better_one(losses, patience, last):
    steps = Steps(losses, keep="last", patience=patience)
    assert steps.run() == last and steps.trainer.should_stop is (last < len(losses))


def test_a_checkpoint_holds_the_best_so_far():
    whole, first = Steps([3, 1, 2, 2], patience=2), Steps([3, 1, 2], patience=2)
    whole.run()
    first.run()
    later = Steps([2], patience=2, first=4)
    later.selection.load_state_dict(first.selection.state_dict())
    assert later.run() == 2 and later.validation.metrics == whole.validation.metrics and later.trainer.should_stop


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("root")
    return {keep: here(root, *RUN, f"trainer.keep={keep}") for keep in ("last", "best", "all")}


def test_student_and_numbers_are_those_of_the_step_that_is_kept(trained):
    lines = [json.loads(line) for line in (trained["best"] / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line for line in lines if "val/lm" in line}
    best = min(losses, key=lambda step: losses[step]["val/lm"])
    content = result(trained["best"])
    assert best < 12 and (content["step"], content["steps"]) == (best, 12)
    assert content["final"] == {k: v for k, v in losses[best].items() if k != "step"}
    assert selected_step(content) == f"The result is of step {best} of 12, the best by val/lm"
    assert selected_step(content) in (trained["best"] / "student" / "README.md").read_text()
    student = load_file(trained["best"] / "student" / "model.safetensors")
    same = load_file(trained["all"] / "students" / f"step-{best:08}" / "model.safetensors")
    assert all(torch.equal(student[name], same[name]) for name in student)


def test_all_is_the_last_and_every_validation(trained):
    assert sorted(path.name for path in (trained["all"] / "students").iterdir()) == [
        f"step-{step:08}" for step in (2, 4, 6, 8, 10, 12)
    ]
    assert outcome(trained["all"]) == outcome(trained["last"])
    content = result(trained["all"])
    assert content["step"] == 12 and selected_step(content) == ""
    assert "students/step-00000002/model.safetensors" in content["files"]


def test_patience_ends_the_run_early(tmp_path):
    run = here(tmp_path, *RUN, "trainer.keep=best", "trainer.patience=1")
    content = result(run)
    assert content["step"] < content["steps"] == content["step"] + 2 < 12
    assert "after 1 validations without a better one" in selected_step(content)


@pytest.mark.parametrize("step", [5, 9, 12])
def test_an_interrupted_run_ends_with_the_same_step(trained, tmp_path, monkeypatch, step):
    real = DistillationModule.training_step

    def interrupted(module, batch, index):
        if module.global_step == step - 1:
            raise KeyboardInterrupt
        return real(module, batch, index)

    monkeypatch.setattr(DistillationModule, "training_step", interrupted)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        here(tmp_path, *RUN, "trainer.keep=best")
    monkeypatch.undo()
    run = here(tmp_path, *RUN, "trainer.keep=best")
    assert outcome(run) == outcome(trained["best"]) and result(run)["final"] == result(trained["best"])["final"]


RECORDED = ("logits=none", "teacher=none", "record=top_k")


@pytest.mark.parametrize(
    ("words", "fields"),
    [(["trainer.keep=best", *RECORDED], {"option": "trainer.keep", "conflict": "record"}),
     (["trainer.patience=2", *RECORDED], {"option": "trainer.patience", "got": "2"}),
     (["trainer.keep=all", "trainer.strategy=fsdp", "trainer.devices=2"], {"conflict": "fsdp", "hint": "ddp"}),
     (["trainer.keep=best", "logits=cotrained"], {"conflict": "logits=cotrained"}),
     (["trainer.keep=all", "root=memory://a"], {"conflict": "root=memory://a", "hint": "root=FOLDER"}),
     (["trainer.keep=all", "adapter=lora", "student=hub", "student.name=x", "teacher=hub", "teacher.name=y"],
      {"conflict": "adapter=lora", "hint": "adapter=none"}),
     (["trainer.keep=first"], {"option": "trainer.keep", "need": "best"}),
     (["trainer.patience=0"], {"option": "trainer.patience"})],
)  # fmt: skip
def test_what_has_no_such_step_is_refused(tmp_path, words, fields):
    with refused(**fields):
        small_config(tmp_path, *words)


@pytest.mark.slow
def test_ranks_return_to_the_same_step(tmp_path, trained):
    """Responses are written by all ranks, so that all need the weights that the first has."""
    train(tmp_path, *RUN, "data.tokens=2000", "trainer.keep=best", "trainer.devices=2", "trainer.accelerator=cpu")
    (run,) = tmp_path.glob("lm-*")
    assert result(run)["step"] == result(trained["best"])["step"]
    assert result(run)["final"]["val/lm"] == pytest.approx(result(trained["best"])["final"]["val/lm"], rel=1e-4)
    student, same = (load_file(path / "student" / "model.safetensors") for path in (run, trained["best"]))
    assert all(torch.allclose(student[name], same[name], atol=1e-3) for name in student)
