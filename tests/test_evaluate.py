"""Evaluation of finished models: a run of no steps, with the numbers of the run that made the student."""

import json
import shutil
import sys
from pathlib import Path

import pytest

import train as product
from kd.config.compose import config_of
from kd.evaluate import evaluation_words, main
from kd.evaluation.validation import Validation
from kd.experiment import planner
from kd.experiment.results import read_run
from sweeps.fit.observations import from_sweep
from sweeps.report.groups import group_runs
from sweeps.report.verdict import verdicts_of
from tests.refusals import refused
from tests.small import TINY, folder, here, result, shared

DATA = [word for word in TINY if word.startswith("data")]
SAME = ["trainer.micro_batch=2", "logger=none"]  # as the run has it, for the same sums in the same order
SENTENCES = [f"The {a} {b} has number {n}." for n in range(60) for a in ("red", "old") for b in ("box", "cup")]
TEXT = ["data=text", "data.files=text.jsonl", "data.field=text", "data.seq_len=32", "data.val_rows=8", "data.vocab=300"]
PAIRS = ["data=instructions", "data.files=pairs.jsonl", "data.seq_len=32", "data.val_rows=8", "data.template=plain"]
RUN = ["trainer.steps=3", "trainer.val_every=2", "teacher.steps=2"]
ALONE = ["trainer.steps=3", "logits=none", "teacher=none"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A root with a student and its teacher."""
    return shared(tmp_path_factory, "evaluated", lambda root: here(root, *RUN))


@pytest.fixture
def root(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "root"))


def evaluate(root: Path, *words: str, data: list[str] = DATA):
    """Do the work of `python -m kd.evaluate WORDS` in this process."""
    typed = evaluation_words([*data, *SAME, f"root={root}", *words])
    return product.train(config_of(typed))


def models(root: Path) -> list[str]:
    return [f"student={folder(root, 'fkl').name}", f"teacher={folder(root, 'lm').name}"]


def test_numbers_are_those_of_the_run_that_made_the_student(root):
    outcome = evaluate(root, *models(root))
    trained = result(folder(root, "fkl"))
    assert {k: v for k, v in outcome.result["final"].items() if k.startswith("val/")} == {
        k: v for k, v in trained["final"].items() if k.startswith("val/")
    }
    assert outcome.result["tokens"] == 0 and outcome.result["flops"] == 0 and outcome.result["initial"] is None
    assert outcome.run.name.startswith(f"eval-{folder(root, 'fkl').name}-")
    assert not (outcome.run / "student").exists() and not (outcome.run / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("data", [TEXT, PAIRS], ids=["text", "instructions"])
def test_numbers_are_the_same_with_a_tokenizer_of_the_run(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    rows = "".join(json.dumps({"text": " ".join(SENTENCES[n : n + 9])}) + "\n" for n in range(200))
    Path("text.jsonl").write_text(rows)
    pairs = [{"prompt": f"{n} + 1?", "response": f"It is {n + 1}."} for n in range(200)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    plain = ["plain=text", "plain.files=text.jsonl", "plain.field=text", "data.vocab=300"] if data is PAIRS else []
    trained = here(tmp_path, *ALONE, *data, *plain)
    outcome = evaluate(tmp_path, f"student={trained}", data=[word for word in data if "vocab" not in word])
    before = result(trained)["final"]
    assert {k: before[k] for k in before if k.startswith("val/")} == {
        k: v for k, v in outcome.result["final"].items() if k.startswith("val/")
    }


def test_it_is_done_once_and_again_with_force(root, monkeypatch):
    first = evaluate(root, *models(root))
    calls, real = [], Validation.validate
    monkeypatch.setattr(Validation, "validate", lambda *given: (calls.append(1), real(*given)))
    again = evaluate(root, *models(root))
    assert again.before and again.result == first.result and not calls
    assert not evaluate(root, *models(root), "force=true").before and len(calls) == 1


def test_without_a_teacher_only_the_text_is_measured(root):
    final = evaluate(root, models(root)[0]).result["final"]
    assert "val/lm" in final and "val/accuracy" in final and "val/fkl" not in final and "val/teacher_lm" not in final


def test_reports_compare_evaluations_and_fits_leave_them_out(root):
    names = [evaluate(root, f"student={folder(root, kind).name}").run.name for kind in ("fkl", "lm")]
    entries = [read_run(root, {"run": name, "overrides": []}) for name in names]
    groups = group_runs(entries)
    assert [group.label.partition(" ")[0] for group in groups] == ["evaluation", "evaluation"]
    (verdict,) = verdicts_of(groups)
    assert verdict.rivals == 2 and verdict.baseline is None and not verdict.missing_baseline
    assert groups[0].required_mean().mean <= groups[1].required_mean().mean
    runs, notes = from_sweep(entries)
    assert runs == [] and "2 runs are evaluations" in notes[0]


def test_words_of_an_evaluation(root, monkeypatch):
    name = folder(root, "fkl").name
    monkeypatch.setenv("KD_ROOT", str(root))
    expected = ["student=hub", f"student.name={root}/{name}/student", "teacher=none", "logits=none", "trainer.steps=0"]
    assert evaluation_words([f"student={name}"]) == expected
    assert evaluation_words([f"student={root}/{name}"]) == expected
    assert evaluation_words(["student=a/b,c"])[:2] == ["student=hub", "student.name=a/b,c"]
    assert evaluation_words(["student=hub", f"student.name={name}", "teacher=none"])[:3] == [
        *expected[:2],
        "teacher=none",
    ]


def test_a_run_without_a_student_is_refused(root):
    outcome = evaluate(root, models(root)[0])
    with refused(option=outcome.run.name, why="is an evaluation", hint="/student"):
        evaluation_words([f"student={outcome.run.name}", f"root={root}"])
    (folder(root, "fkl") / "result.json").unlink()
    with refused(option=folder(root, "fkl").name, why="not done", hint="command"):
        evaluation_words([models(root)[0], f"root={root}"])


@pytest.mark.parametrize(
    ("words", "fields"),
    [(["loss=akl"], {"option": "loss", "conflict": "logits=none"}),
     (["lr.peak=1"], {"option": "lr.peak", "conflict": "trainer.steps=0", "hint": "leave lr.peak out"}),
     (["seed=1"], {"option": "seed"}), (["trainer.batch=8"], {"option": "trainer.batch"}),
     (["trainer.val_every=8"], {"option": "trainer.val_every"}), (["record=top_k"], {"option": "record"}),
     (["teacher=100k"], {"option": "trainer.steps", "conflict": "teacher=100k", "hint": "teacher=hub"}),
     (["start=pretrained"], {"option": "trainer.steps", "conflict": "start=pretrained"}),
     (["student=100k"], {"option": "trainer.steps", "conflict": "student=100k", "hint": "student.name"})],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_what_only_training_reads_is_refused(root, words, fields):
    student = [] if words[0].startswith("student") else models(root)[:1]
    with refused(**fields):
        evaluate(root, *student, *words)


def test_training_of_no_steps_is_refused():
    with refused(option="trainer.steps", got=0, hint="student=hub"):
        config_of(["trainer.steps=0"])


def test_help_is_its_own(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kd-evaluate", "--help"])
    main()
    assert "python -m kd.evaluate student=MODEL" in capsys.readouterr().out


def test_a_plan_of_an_evaluation_counts_no_training(root):
    typed = evaluation_words([*DATA, *SAME, f"root={root}", *models(root)])
    ((name, estimate),) = planner.estimate(config_of(typed)).items()
    assert name.startswith("eval-") and estimate.tokens == 0 and estimate.flops == 0 and estimate.seconds > 0
