import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

from kd.bench import __main__ as command
from kd.bench import growth
from kd.bench.cases import CASES, CUDA_CASES, NEEDS
from kd.bench.work import SHAPES, Shape, measure
from tests.refusals import refused
from tests.small import ENVIRONMENT

TINY = SHAPES["tiny"]
# Compiling takes a minute, and what it compiles is tested in test_objective.py; the breakdown leaves its clock behind.
# Each case that reads a store starts a process to write it: one is enough.
SLOW = ("online_fkl_compiled", "breakdown", "offline_top_50", "offline_full", "read_top_12", "read_top_50")
QUICK = [name for name in CASES if name not in SLOW and find_spec(NEEDS.get(name, "kd"))]


def bench(folder, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "kd.bench", *words, f"root={folder}"]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_prints_a_table_and_writes_the_numbers(tmp_path):
    done = bench(tmp_path, "only=lm,online_fkl,breakdown", "shape=tiny", "steps=2")
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / "bench" / "speed.json").read_text())
    assert list(numbers) == ["lm", "online_fkl", "breakdown"]
    for result in numbers.values():
        assert len(result["seconds"]) == 2
        assert 0 < result["tokens_per_second"] < result["limit"]
        assert result["peak_memory"] > 2**27
    assert sum(numbers["breakdown"]["parts"].values()) <= 1.05 * max(numbers["breakdown"]["seconds"])
    for word in ("tokens/s", "online_fkl", f"{numbers['lm']['tokens_per_second']:,.0f}", "teacher's body"):
        assert word in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_every_case_trains_as_many_steps_as_asked(name):
    result = measure(name, TINY, 2)
    assert len(result["seconds"]) == 2
    assert all(seconds > 0 for seconds in result["seconds"])


@pytest.mark.parametrize(
    ("word", "fields"),
    [
        ("only=nothing", {"got": "nothing", "need": "one of the cases lm"}),
        ("steps=0", {"got": "0", "need": "at least 1"}),
        ("shape=huge", {"got": "huge", "need": "one of "}),
        ("x=1", {"why": "no such word here"}),
        ("precision=fp8", {"got": "fp8", "need": "one of "}),
    ],
)
def test_a_word_without_meaning_is_refused_by_name(word, fields, tmp_path):
    with refused(option=word.partition("=")[0], **fields):
        command.main([word, f"root={tmp_path}"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("by", ["word", "environment"])
def test_results_are_in_the_home_folder_where_its_sign_is_typed(by, tmp_path, monkeypatch):
    (tmp_path / "at").mkdir()
    monkeypatch.chdir(tmp_path / "at")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KD_ROOT", "~/x")
    monkeypatch.setattr(command, "compare", lambda folder, *_: (folder / "speed.json").write_text("{}"))
    command.main(["only=lm", *(["root=~/x"] if by == "word" else [])])
    assert (tmp_path / "x" / "bench" / "speed.json").exists() and not list((tmp_path / "at").iterdir())


def test_a_url_is_no_place_for_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with refused(option="root", got="s3://bucket/kd", hint="type root=FOLDER"):
        command.main(["only=lm", "root=s3://bucket/kd"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NEEDS)
def test_a_missing_package_is_named_with_what_installs_it(name, monkeypatch):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda package: None)
    with refused(option="only", got=name, need="the package ", hint="pip install 'kd[bench]'"):
        command.check([name])


def test_a_case_that_fails_is_a_line_of_the_table():
    numbers = {"lm": {"case": "lm", "error": "out of memory"}}
    assert command.table(numbers).row_count == 1


def test_what_a_student_writes_is_timed_beside_trl_on_such_text():
    speeds = {"trl": 100.0, "trl_on_policy": 20.0, "online_fkl": 250.0, "on_policy_jsd": 60.0}
    table = command.table({name: {"tokens_per_second": x, "peak_memory": 2**30 * x} for name, x in speeds.items()})
    assert [*table.columns[3].cells] == ["1.00", "1.00", "2.50", "3.00"] == [*table.columns[6].cells]
    assert set(NEEDS) <= set(CASES | CUDA_CASES)


def test_growth_is_measured_around_a_shape_and_drawn(tmp_path, monkeypatch):
    def measured(cases: list[tuple[str, Shape, int]], on_gpu: bool):
        for case, shape, _ in cases:
            yield {"case": case, "peak_memory": shape.tokens * shape.vocab, "seconds": [1.0, 2.0, 4.0]}

    planned = {10: {"case": "plan", "peak_memory": 2**30, "seconds": [3.0]}, 20: {"case": "plan", "error": "no room"}}
    monkeypatch.setattr(growth, "measured", measured)
    monkeypatch.setattr(growth, "plan", planned.__getitem__)
    monkeypatch.setattr(growth, "SWEEPS", (10, 20))
    monkeypatch.setattr(growth, "available", lambda: 48 * TINY.tokens * TINY.vocab)
    growth.write(tmp_path, TINY, False)
    results = json.loads((tmp_path / "growth.json").read_text())
    tried = {case: sum(r["case"] == case and "error" not in r for r in results) for case in ("online_fkl", "full")}
    assert tried["online_fkl"] > tried["full"] > 0 and planned[10] in results and planned[20] in results
    text = (tmp_path / "growth.html").read_text()
    assert all(axis.title in text for axis in growth.axes_around(TINY)) and "peak memory, GiB" in text


def test_an_axis_of_growth_changes_one_size_alone():
    for axis in growth.axes_around(TINY):
        for x, point in axis.points.items():
            if isinstance(point, Shape):
                assert sum(getattr(point, field) != getattr(TINY, field) for field in vars(TINY)) <= 1
                assert x in (point.batch, point.seq_len, point.vocab, point.teacher.hidden, point.batch * point.rounds)


@pytest.mark.slow
def test_a_sweep_is_planned_in_a_process_that_is_timed():
    result = growth.plan(3)
    assert result["runs"] == 3 and 0.5 < result["seconds"][0] < 120 and 2**27 < result["peak_memory"] < 2**32
