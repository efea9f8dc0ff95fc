"""Responses side by side."""

import re

import pytest

from sweeps.report.samples import samples_of
from sweeps.report.table import rows_of


def test_samples_stand_side_by_side_and_are_chosen_by_their_place(sweep):
    sweep.wrote("lm", 0, 0.2, text="x").wrote("fkl", 1, 0.31, text="y").wrote("fkl", 0, 0.3, text="z")
    samples = samples_of(rows_of(sweep.groups()))
    assert [s.number for s in samples] == [1, 2, 3, 5, 6]  # of 7
    assert [(x.author, x.text, x.rouge_l) for x in samples[3].texts] == [
        ("prompt", "p4", None), ("reference", "r4", None), ("teacher 1m", "t4.0", 0.5), ("fkl", "z4.0", 0.3),
        ("SFT", "x4.0", 0.2),
    ]  # fmt: skip
    page = sweep.page()
    assert re.search(r"<pre>\s*z4\.0</pre>", page) and not re.search(r"<pre>\s*z3\.0</pre>", page)
    markdown = sweep.file("md")
    assert "**teacher 1m** (Rouge-L 0.50)\n\n```text\nt4.0\n```" in markdown and "- rouge-l" not in markdown


@pytest.mark.parametrize(
    "fields", [{"prompt": "other"}, {"response": 3}, {"row": "0"}, {"sample": None}, {"prompt": ["p"]}, []]
)
def test_what_was_asked_otherwise_or_is_damaged_is_no_sample(sweep, fields):
    sweep.wrote("lm", 0, 0.3).wrote("fkl", 0, 0.2)
    if fields == []:
        (sweep.root / "run-1" / "responses.jsonl").write_text('{"row": 0')
    else:
        sweep.runs.pop()
        sweep.wrote("fkl", 0, 0.2, fields=fields)
    assert [x.author for x in samples_of(rows_of(sweep.groups()))[0].texts[3:]] == ["SFT"]
    sweep.page()


def test_responses_that_were_drawn_otherwise_are_said_and_not_put_beside(sweep):
    sweep.wrote("lm", 0, 0.3, **{"responses.temperature": 0.0}).wrote("fkl", 0, 0.2, **{"responses.temperature": 1.0})
    assert "with different settings (responses.temperature)" in sweep.page()
    assert [x.author for x in samples_of(rows_of(sweep.groups()))[0].texts[3:]] == ["SFT"]


def test_nothing_in_a_response_is_markup(sweep):
    evil = "</pre><script>alert(1)</script>\n````\n# head\x1b[2J\u202e"
    sweep.wrote("lm", 0, 0.3, fields={"response": evil, "prompt": evil, "teacher": evil, "rouge_l": "<b>"})
    page = sweep.page()
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page
    markdown = sweep.file("md")
    assert "\x1b" not in page + markdown and "\u202e" not in page + markdown
    inside = markdown[markdown.index("`````text\n") :]  # a fence of five, since there is one of four within
    assert inside.index("# head") < inside.index("\n`````\n", 5)
