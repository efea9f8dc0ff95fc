"""The code that a result was made by."""

import json
import shlex
import shutil

import pytest

from kd.data import packing
from kd.errors import UserError
from kd.experiment.results import read_run
from kd.runs import provenance
from kd.runs.run import Run
from kd.system import checkpoint_files
from tests.runs.sealed import REAL, RUN, flip, result, show
from tests.small import folder, here


def test_what_a_message_says_to_remove_is_quoted(finished, tmp_path):
    root = tmp_path / "a [b] 'c'"
    shutil.copytree(finished, root)
    run, data, wanted = folder(root, "fkl"), next(root.glob("data/*/manifest.json")).parent, []
    with pytest.raises(UserError) as caught:
        flip(run / "metrics.jsonl")
        Run(root, run.name).check(result(root))
    wanted.append((run, str(caught.value)))
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "step-00000001.ckpt").write_text("")
    with pytest.raises(UserError) as caught, pytest.warns(UserWarning):
        checkpoint_files.newest(run / "checkpoints")
    wanted.append((run / "checkpoints", str(caught.value)))
    (run / "result.json").write_text("{")
    with pytest.raises(UserError) as caught:
        Run(root, run.name).result()
    wanted.append((run, str(caught.value)))
    (run / "result.json").write_text("{}")
    entry = read_run(root, {"run": run.name, "overrides": []})
    wanted.append((run, f"  {entry.message.partition('first ')[2]}"))
    for name in ("train.npy", "manifest.json"):
        flip(data / name)
        with pytest.raises(UserError) as caught:
            packing.open_packed(data)
        wanted.append((data, str(caught.value)))
        flip(data / name)
    for path, message in wanted:
        (line,) = [line for line in message.splitlines() if line.startswith("  ")]
        assert shlex.split(line) == ["rm", "-r", str(path)]


def test_a_result_says_which_components_it_was_made_by(finished):
    student, teacher = result(finished), result(finished, "lm")
    assert student["sources"]["loss"].keys() == {"fkl"}
    assert {"loss", "truncation", "target", "alpha", "lr", "optim", "data", "logits"} <= student["sources"].keys()
    assert not {"logger", "plain", "record"} & student["sources"].keys()
    assert not {"loss", "truncation", "alpha"} & teacher["sources"].keys()  # without a meaning there
    assert provenance.changes(student) == provenance.changes(teacher) == []


COSMETIC = {
    "a comment": ("objective.losses", "change of sign", "change of its sign"),
    "a docstring": ("objective.losses", "Forward KL(p || q), nats [N].", "Forward KL(p || q)."),
    "layout": (
        "objective.losses",
        "-(p.exp() * (q - p)).sum(-1)  #",
        "(\n        -(p.exp() * (q - p)).sum(-1)\n    )  #",
    ),
    "another loss": ("objective.losses", "return _reverse(q, p)", "return 2 * _reverse(q, p)"),
    "place": ("objective.losses", "def fkl(", "def first():\n    pass\n\n\ndef fkl("),
}


@pytest.mark.parametrize("kind", COSMETIC)
def test_what_changes_nothing_that_is_computed_makes_no_result_old(finished, code, kind):
    module, *change = COSMETIC[kind]
    code(module, change)
    assert provenance.changes(result(finished)) == []


@pytest.mark.parametrize("kind", REAL)
def test_a_result_of_other_code_is_shown_as_old_with_what_changed(finished, root, code, kind):
    module, old, new, reasons = REAL[kind]
    code(module, (old, new))
    _, shown, before = show(root)
    assert before and provenance.changes(shown) == reasons
    doubt, *others = provenance.doubts(shown)
    assert bool(others) == any("lr=" in component for component in reasons)  # of the teacher
    assert doubt.startswith(f"old: the code of {', '.join(reasons)} has changed") and "force=true" in doubt
    assert doubt.partition(": ")[2].partition(" has")[0] in provenance.doubts_of_many([shown])[0]


def test_another_function_with_the_name_of_a_parameter_makes_no_result_old(finished, code):
    config = result(finished)["config"] | {"data": "instructions", "rollout": "mixed"}
    before = {"config": config, "sources": provenance.sources(config)}
    assert {"mixed"} <= before["sources"]["rollout"].keys()
    code(
        "rollout.strategies",
        ("def student(", "def student(more: int = 1, *,"),
        ("def teacher(", "def teacher(more: int = 1, *,"),
    )
    assert provenance.changes(before) == []


def test_names_that_a_definition_binds_are_not_followed(code):
    path = provenance.PACKAGE / "rollout" / "strategies.py"
    path.write_text("""
LIMIT = 3
def teacher(): return LIMIT
def helper(): return 2
def mixed(student, teacher=None):
    from kd.data import Batches as fixed
    for student in (lambda x: x,):
        def fixed2(): return helper
    return student, fixed
def student(): return teacher()
def fixed(): return 1
class Both:
    LIMIT = 3
    def one(self, student): return student
    def two(self): return fixed
""")
    code("rollout.strategies")
    used = {
        definition: {name for _, name in provenance._used("rollout.strategies", definition)}
        for definition in ("mixed", "student", "Both")
    }
    assert used["mixed"] == {"mixed", "helper"}
    assert used["student"] == {"student", "teacher", "LIMIT"}
    assert used["Both"] >= {"Both", "fixed"} and "student" not in used["Both"]


def test_a_rollout_is_old_where_the_module_of_its_method_has_changed(finished, code):
    config = result(finished)["config"] | {"data": "instructions", "rollout": "mixed"}
    before = {"config": config, "sources": provenance.sources(config)}
    assert {"mixed", "TeacherMixedSampling", "returns", "Rollout", "Samplers"} <= before["sources"]["rollout"].keys()
    code("rollout.replay", ("RISE = 0.1", "RISE = 0.2"))
    assert provenance.changes(before) == []
    code("rollout.mixed", ("r + gamma * total", "r + total"))
    assert provenance.changes(before) == ["rollout=mixed (returns)"]


def test_a_result_is_shown_as_old_where_the_code_of_its_teacher_has_changed(finished, code):
    shown, teacher = result(finished), folder(finished, "lm").name
    assert shown["origins"]["teacher"]["run"] == teacher
    code("training.schedules", ("progress / warmup", "progress / warmup**2"))
    shown["sources"] = {}
    first, remedy = provenance.doubts(shown)
    assert first == f"its teacher {teacher} is old: the code of lr=cosine (_warm) has changed since"
    assert "force=true" in remedy
    (doubt,) = provenance.doubts_of_many([shown])
    assert doubt.startswith("The teacher or start of 1 of 1 runs is old")
    behind = {"config": {}, "digest": "", "origins": {"start": provenance.origin(shown | {"config": {}})}}
    assert provenance.doubts(behind)[0] == first


def test_code_that_is_edited_while_a_run_trains_is_not_taken_for_its_own(finished, root, code, monkeypatch):
    from kd.training.module import DistillationModule

    module, old, new, reasons = REAL["the function"]
    monkeypatch.setattr(DistillationModule, "on_train_end", lambda self: code(module, (old, new)))
    outcome = json.loads((here(root, *RUN, "seed=7") / "result.json").read_text())
    assert outcome["sources"]["loss"] == result(finished)["sources"]["loss"]
    assert provenance.changes(outcome) == reasons


def test_a_function_that_only_moved_to_another_module_is_the_same(finished, code):
    source = (provenance.PACKAGE / "training" / "schedules.py").read_text()
    start = source.index("def _warm(")
    helper = source[start : source.index("\n\n\n", start)]
    (provenance.PACKAGE / "warming.py").write_text(f"# Moved.\n{helper}\n")
    code("training.schedules", (helper, ""), ("from kd.errors", "from kd.warming import _warm\nfrom kd.errors"))
    assert provenance.changes(result(finished)) == []
