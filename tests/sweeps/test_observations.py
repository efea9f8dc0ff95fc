"""Observations from sweeps and CSV files."""

import json

import pytest

from kd.experiment.results import read_run
from sweeps.fit.observations import from_csv, from_sweep, to_csv
from tests.refusals import refused
from tests.sweeps.fake import Sweep
from tests.sweeps.planted import finished, planted


@pytest.mark.parametrize(
    "written",
    [
        lambda text: b"\xef\xbb\xbf" + text.encode(),  # as spreadsheets save "CSV UTF-8"
        lambda text: text.encode() + b"\n\n  \n,,,,\n",
        lambda text: text.replace("\n", "\r\n").encode() + b"\r\n",
        lambda text: ("\n" + text.replace("parameters,tokens", " parameters , tokens")).encode(),
    ],
    ids=["mark", "blank-end", "windows", "spaces"],
)
def test_csv_of_a_spreadsheet_is_read(tmp_path, written):
    path = tmp_path / "p.csv"
    path.write_bytes(written("parameters,tokens,loss,seed\n1e6,2e6,2.5,0\n1e6,4e6,2.25,1\n"))
    assert [(p.parameters, p.tokens, p.loss, p.seed) for p in from_csv(path)] == [
        (1e6, 2e6, 2.5, "0"), (1e6, 4e6, 2.25, "1"),
    ]  # fmt: skip
    path.write_bytes(written("parameters,tokens,loss,seed\n\n1e6,2e6,x,0\n"))
    number = 4 if path.read_bytes().startswith(b"\n") else 3
    with refused(option=f"{path}, line {number}"):
        from_csv(path)


def test_csv_with_other_separators_is_refused_with_what_is_needed(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("parameters;tokens;loss\n1e6;2e6;2,5\n")
    with refused(option=path, why="separated by ';'", need="separated by commas"):
        from_csv(path)


def test_points_of_a_sweep_are_its_results(tmp_path):
    some = [planted(0)[0], *(p for p in planted(0) if p.teacher in ("small", "large"))][:30]
    sweep = finished(Sweep(tmp_path), some)
    sweep.add(["loss=jsd"]).done("lm", 1, 2.0)  # one not done, and one of a version that did not count FLOPs
    got, notes = from_sweep([read_run(sweep.root, line) for line in sweep.runs])
    assert len(got) == len(some)
    for p, q in zip(some, got):
        assert q._replace(run=p.run, teacher_tokens=p.teacher_tokens, entropy=None, seed=None) == p and q.seed == "0"
    assert got[1].teacher_tokens == int(some[1].teacher_tokens / 1024) * 4 * 256
    assert "1 of 32 runs is not done" in notes[0] and "1 runs are of an earlier version" in notes[1]


def test_runs_that_no_law_is_of_are_told_of(tmp_path):
    sweep = finished(Sweep(tmp_path), [p for p in planted(0) if p.teacher == "large"][:2])
    for name, change in (("run-0", {"temperature.tau": 2.0}), ("run-1", {"data.seq_len": 1})):
        path = sweep.root / name / "result.json"
        result = json.loads(path.read_text())
        result["config"] |= change
        path.write_text(json.dumps(result | {"train_rows": 10}))
    notes = " ".join(from_sweep([read_run(sweep.root, line) for line in sweep.runs])[1])
    assert "temperature.tau" in notes and "read their text more than once" in notes


def test_csv_gives_the_points_back_and_says_what_is_wrong(tmp_path):
    path = tmp_path / "p.csv"
    to_csv(path, planted(0.001))
    assert from_csv(path) == planted(0.001)
    path.write_text(
        "parameters,tokens,loss,teacher,teacher_loss,teacher_parameters\n1e6,2e6,2.5,,,\n1e6,2e6,2.4,t,2.1,5e6\n"
    )
    a, b = from_csv(path)
    assert (a.run, a.flops_per_token, a.teacher) == ("2", 2e6, None) and b.teacher_flops_per_token == 1e7
    line = f"{path}, line 2"
    for text, option, fields in (
        ("tokens,loss\n1,2\n", path, {"why": "has no columns parameters"}),
        ("parameters,tokens,loss\n1e6,,2\n", line, {"why": "tokens=nothing", "need": "a number above 0"}),
        ("parameters,tokens,loss\n1e6,1e6,nan\n", line, {"why": "loss=nan"}),
        ("parameters,tokens,loss\n1e6,1e6,low\n", line, {"why": "could not convert"}),
        ("parameters,tokens,loss,teacher\n1e6,1e6,2,t\n", line, {"need": "both teacher and teacher_loss"}),
    ):
        path.write_text(text)
        with refused(option=option, **fields):
            from_csv(path)
