"""Settings of start=teacher: what they select, and which of them no run can have."""

import pytest

from kd.config.compose import config_of
from tests.refusals import refused


def config(words: str):
    return config_of(["start=teacher", *words.split()])


def test_start_selects_the_student_the_optimizer_and_a_rate():
    chosen = config("start.layers=1")
    assert (chosen.student.size, chosen.student.name, chosen.optim.name) == (None, None, "AdamW")
    assert chosen.lr.args["peak"] == 1e-3 and chosen.is_pretrained
    assert config("start.layers=1 teacher=hub teacher.name=some/model").lr.args["peak"] == 1e-4
    typed = config("start.layers=1 optim=mup lr.peak=2e-3")
    assert (typed.optim.name, typed.lr.args["peak"]) == ("mup", 2e-3)


def test_what_is_measured_by_activations():
    measured = ("start.layers=1 start.keep=influence", "start.ffn=8", "start.hidden=8", "start.layers=[0] start.ffn=8")
    assert all(config(words).start.measures for words in measured)
    shapes = ("start.layers=1", "start.layers=[0]", "start.layers=1 start.keep=random start.ffn=8")
    assert not any(config(words).start.measures for words in shapes)


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        ("", {"option": "start", "hint": "start.layers"}),
        ("start.layers=1 student=200k", {"option": "start", "conflict": "student=200k", "hint": "student=teacher"}),
        ("start.layers=1 student=hub student.name=a/b", {"option": "start", "conflict": "student.name=a/b"}),
        ("start.layers=1 teacher=none logits=none", {"option": "start", "conflict": "teacher=none"}),
        ("start.layers=1 logits=cotrained", {"option": "start", "conflict": "logits=cotrained"}),
        ("start.layers=1 start.keep=random adapter=lora", {"option": "adapter", "conflict": "start.keep=random"}),
        ("start.layers=[0] start.keep=every", {"option": "start.keep", "got": "every"}),
        ("start.ffn=8 start.keep=influence", {"option": "start.keep", "got": "influence"}),
        ("start.layers=1 start.sample=8", {"option": "start.sample", "got": "8"}),
        ("start.layers=1 start.keep=random start.ffn=8 start.sample=8", {"option": "start.sample"}),
        ("start.layers=0", {"option": "start.layers"}), ("start.layers=1.5", {"option": "start.layers"}),
        ("start.layers=1 start.keep=last", {"option": "start.keep", "need": "influence"}),
    ],
)  # fmt: skip
def test_settings_that_no_run_can_have_are_refused(words, fields):
    with refused(**fields):
        config(words)


def test_student_of_the_teacher_needs_that_start():
    with refused(option="student.size", hint="start=teacher"):
        config_of(["student=teacher"])
