"""Groups of runs and their labels."""

from sweeps.report.groups import SUPERVISED, baseline_name, tasks_of
from sweeps.report.statistics import baseline
from sweeps.report.table import reference_lines
from tests.sweeps.fake import Sweep


def test_other_training_of_a_teacher_or_a_start_is_another_group(sweep):
    stages = {"data": "instructions", "teacher.steps": 300}
    for steps in (300, 1200):
        for seed in (0, 1):
            sweep.done("fkl", seed, 2.0 + seed / 10 + steps / 1e4, **{"teacher.steps": steps})
            sweep.done("lm", seed, 3.0, **{"teacher.steps": steps})  # which learns from none
    sweep.done("fkl", 0, 2.5, **{"start": "pretrained", "start.steps": 7, **stages})
    sweep.done("fkl", 0, 2.6, **{"start": "pretrained", "start.steps": 9, **stages})
    labels = {group.label: sorted(group.runs) for group in sweep.groups()}
    assert len(labels) == 5 and sorted(map(len, labels.values())) == [1, 1, 2, 2, 2]
    assert any("teacher.steps=300" in text for text in labels) and any("start.steps=9" in text for text in labels)


def test_labels_have_what_varies_alone(sweep):
    sweep.done("lm", 0, 2.5)
    for tau in (1.0, 2.0):
        sweep.done("fkl", 0, 2.3, **{"temperature.tau": tau})
    sweep.done("akl", 0, 2.4)
    assert {g.label for g in sweep.groups()} == {SUPERVISED, "fkl tau=1", "fkl tau=2", "akl tau=1"}


def test_labels_of_one_loss_of_sizes_and_of_what_is_no_part_of_a_run(sweep, tmp_path):
    sweep.done("lm", 0, 2.5, root="a").done("lm", 1, 2.5, root="b", **{"alpha.peak": 0.1}).done("akl", 0, 2.4)
    assert [g.label for g in sweep.groups()] == ["akl", SUPERVISED]
    sizes = Sweep(tmp_path / "sizes")
    for size in ("100k", "1m"):
        sizes.done("lm", 0, 2.5, **{"student.size": size}).done("fkl", 0, 2.4, **{"student.size": size})
    assert {g.label for g in sizes.groups()} >= {"student=1m", f"{SUPERVISED} student=100k"}


def test_cotrained_teacher_is_another_teacher(sweep):
    for source in ("online", "cotrained"):
        sweep.done("fkl", 0, 2.4, logits=source, **{"teacher.seed": 0})
    for window in (None, "early", "late"):
        source = "recorded" if window else "offline"
        sweep.done("fkl", 0, 2.3, logits=source, **{"teacher.seed": 0, "logits.window": window})
    sources = {"logits=online", "logits=cotrained", "logits=offline"}
    assert {g.label for g in sweep.groups()} == sources | {
        f"logits=recorded logits.window={w}" for w in ("early", "late")
    }
    assert [line.label for line in reference_lines(sweep.groups())].count("teacher 1m, cotrained") == 1
    assert len(reference_lines(sweep.groups())) == 2


def test_labels_have_tokens_for_steps_but_where_rows_are_not_full(sweep, tmp_path):
    sweep.done("fkl", 0, 2.5, **{"trainer.steps": 300}).done("fkl", 0, 2.4, **{"trainer.steps": 600})
    assert [g.label for g in sweep.groups()] == ["tokens=2.46M", "tokens=1.23M"]  # 600 or 300 times 16 rows of 256
    texts = Sweep(tmp_path / "texts")
    for steps, rouge in ((300, 0.2), (600, 0.3)):
        texts.wrote("fkl", 0, rouge, **{"trainer.steps": steps})
    assert [g.label for g in texts.groups()] == ["trainer.steps=600", "trainer.steps=300"]


def test_a_student_of_text_that_a_teacher_wrote_is_no_baseline(sweep):
    sweep.wrote("lm", 0, 0.2).wrote("lm", 0, 0.4, rollout="teacher").wrote("fkl", 0, 0.3)
    groups = {g.supervised: g for g in sweep.groups()}
    (best, *_), alone = sweep.groups(), groups[True]
    assert [g.label for g in sweep.groups()] == ["SeqKD", "fkl", "SFT"]
    assert not best.supervised and baseline(best, sweep.groups()).label == alone.label == "SFT"
    assert sweep.verdict().baseline == "SFT" == baseline_name(sweep.groups())


def test_students_made_of_the_teacher_are_compared_by_shape(sweep):
    """Rules of choosing layers share a task, other numbers of layers do not; the axis is called by the student."""
    start = {
        "start.stage": "teacher", "start.layers": 1, "start.keep": "uniform", "start.ffn": None,
        "start.kv_heads": None, "start.hidden": None, "start.sample": 64, "student.size": None,
    }  # fmt: skip
    for seed in (0, 1):
        for keep, loss, before in (("uniform", 2.0, 5.0), ("random", 2.5, 6.0)):
            sweep.done("fkl", seed, loss, **start | {"start.keep": keep}).began(**{"val/lm": before + seed})
        sweep.done("lm", seed, 2.7, **start).began(**{"val/lm": 5.0 + seed})
        sweep.done("fkl", seed, 1.5, **start | {"start.layers": [0, 3]}).began(**{"val/lm": 3.0})
    groups = sweep.groups()
    assert {group.label: group.config["student.size"] for group in groups} == {
        "start.keep=uniform student=1m-1l": "1m-1l", "start.keep=random student=1m-1l": "1m-1l",
        SUPERVISED: "1m-1l", "start.keep=uniform student=1m-2l": "1m-2l",
    }  # fmt: skip
    assert len(tasks_of(groups)) == 2
    bases = {group.label: baseline(group, groups) for group in groups}
    assert bases["start.keep=random student=1m-1l"].label == SUPERVISED
    assert bases["start.keep=uniform student=1m-2l"] is None
    lines = {line.label: line.values["val/lm"] for line in reference_lines(groups) if "before" in line.label}
    assert sorted(lines.values()) == [3.0, 5.5, 6.5] and any("start.keep=random" in text for text in lines)
