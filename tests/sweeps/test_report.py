"""Reports: their files, warnings and damaged runs; nothing in them that a file could inject."""

import json
import math
import re
import shlex
import socket

import pytest

from kd.config import plugins, search_path
from kd.evaluation.catalog import LOSS
from kd.experiment.results import load_sweep
from sweeps import dashboard
from sweeps.fit import __main__ as fit
from sweeps.report.__main__ import main
from sweeps.report.curves import exposure_curve, learning_curve
from sweeps.report.report import build_report
from tests.refusals import refused
from tests.sweeps.fake import cells


def test_learning_curve_is_the_mean_at_the_steps_of_all_seeds(sweep):
    (group,) = sweep.losses(fkl=[2.0, 3.0]).groups()
    assert learning_curve([*group.runs.values()]) == [(s * 4096, s * 1e9, 2.5 + 300 - s) for s in (100, 200, 300)]


def test_failed_missing_unfinished_and_damaged_runs_are_listed_and_not_counted(sweep):
    sweep.losses(lm=[2.5], fkl=[2.3])
    diverged = {"state": "diverged", "reason": "train/loss is not finite at step 7"}
    sweep.add(["loss=rkl"], {"state.json": json.dumps(diverged)})
    gone = json.dumps({"state": "running", "pid": 1, "host": socket.gethostname(), "boot": "an earlier one"})
    sweep.add(["loss=jsd"], {"state.json": gone}).add(["loss=mse", "data.files=my text.txt"])
    sweep.add(["loss=tvd"], {"result.json": '{"state": '}).add(["loss=skl"], {"result.json": '{"state": "done"}'})
    sweep.done("akl", 0, math.nan)
    page = sweep.page()
    states = re.findall(r'<td class="state ([\w ]+)">', page[page.index('<table class="runs">') :])
    assert states == [
        "done", "done", "diverged", "stale", "missing", "damaged", "damaged", "damaged",
    ]  # fmt: skip
    assert "train/loss is not finite at step 7" in page
    assert "python train.py loss=mse &#39;data.files=my text.txt&#39;" in page
    verdict = sweep.report().verdict
    assert verdict.startswith("fkl: 2.300") and verdict.endswith("[6 of 8 runs are not done and not counted]")
    with pytest.raises(AssertionError, match="no row"):
        cells(page, "akl")


def test_warns_of_other_code_and_other_text(sweep):
    sweep.done("lm", 0, 2.5).done("fkl", 0, 2.4, git="def+").done("rkl", 0, 2.4, **{"data.val_rows": 32})
    page = sweep.page()
    assert "Runs differ in git revision" in page and "2 of abc, 1 of def+" in page and "not committed" in page
    assert "Held-out text differs (data.val_rows)" in page


def test_held_out_text_is_stated_by_the_rows_that_were_packed(sweep):
    for number, (kind, rows) in enumerate({"python": 12, "instructions": 1}.items()):
        sweep.done("fkl", 0, 2.4, data=kind)  # with data.val_rows=64
        path = sweep.root / f"run-{number}" / "result.json"
        result = json.loads(path.read_text())
        result["data"]["rows"]["val"] = rows
        path.write_text(json.dumps(result))
    one, twelve = [note for note in sweep.report().caveats if "held-out" in note]
    assert one == "The held-out text has 1 row of at most 256 tokens, at most 256 in all."
    assert twelve == "The held-out text has 12 rows of 256 tokens, 3,072 in all."
    assert twelve in sweep.page() and twelve in sweep.file("md")


@pytest.mark.parametrize("counts", [None, {}])  # of a result of an earlier version, and of a text without counts
def test_rows_of_held_out_text_that_no_result_has_are_not_stated(sweep, counts):
    path = sweep.losses(fkl=[2.4]).root / "run-0" / "result.json"
    result = {key: value for key, value in json.loads(path.read_text()).items() if key != "data"}
    path.write_text(json.dumps(result if counts is None else result | {"data": counts}))
    assert not any("held-out" in note for note in sweep.report().caveats)


def test_nothing_is_loaded_and_nothing_injected(sweep):
    evil = "</script><img src=x onerror=alert(1)>"
    sweep.losses(lm=[2.5, 2.6]).done(evil, 0, 2.4).done(evil, 1, 2.5, git=evil).done(
        "fkl", 0, 2.3, **{"data.name": evil}
    )
    sweep.add([f"loss={evil}"], {"state.json": json.dumps({"state": "failed", "reason": evil})})
    page = sweep.page()
    assert "<img" not in page and "&lt;img src=x onerror=alert(1)&gt;" in page
    assert page.count("<script") == page.count("</script>") == 1 + page.count('class="plotly-graph-div"')
    assert not re.search(r"<(script|img|iframe|source)[^>]+src=|<link|@import|url\(|https?://", page)
    assert "default-src 'none'" in page


def test_unknown_sweep_lists_those_there_are(sweep, capsys):
    sweep.losses(fkl=[2.3]).page()
    assert main(["nope", "--root", str(sweep.root)]) == 2
    error = capsys.readouterr().err
    assert "which has s;" in error and "Type" not in error and "Traceback" not in error


def test_no_finished_run_lists_their_states(sweep):
    sweep.add(["loss=fkl"]).add(["loss=rkl"], {"state.json": '{"state": "failed", "reason": "out of luck"}'})
    with refused(option="sweeps", why="no run that is done yet", hint="type the command of this sweep again") as caught:
        sweep.page()
    assert re.search(r"(?s)missing +loss=fkl.*failed +loss=rkl  out of luck", caught.value.why)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"runs": [{}]}', '{"runs": 3}'])
def test_damaged_manifest_says_what_to_type(tmp_path, text):
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "s.json").write_text(text)
    with refused(option=tmp_path / "sweeps" / "s.json", why="is damaged", hint="the command of this sweep again"):
        build_report(tmp_path, "s")


def test_main_prints_one_line_and_the_root_comes_from_the_environment(sweep, capsys, monkeypatch):
    sweep.losses(lm=[2.5], fkl=[2.3]).page()
    for words in (["s", "--root", str(sweep.root)], [f"root={sweep.root}", "s"]):
        assert main(words) == 0 and f"{sweep.root / 'sweeps'}" in capsys.readouterr().out
    monkeypatch.setenv("KD_ROOT", str(sweep.root))
    assert main(["s"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out.startswith(f"{sweep.root / 'sweeps' / 's.html'}: fkl: 2.300 nats per token")


def test_a_run_without_responses_has_the_sweep_judged_by_loss(sweep):
    sweep.wrote("lm", 0, 0.2, 2.5).wrote("fkl", 0, 0.3, 2.4).done("rkl", 0, 2.3, data="instructions")
    assert sweep.report().metric is LOSS and sweep.verdict().best == "rkl"


def test_rows_that_learned_from_more_tokens_in_the_same_steps_are_warned_of(sweep):
    sweep.wrote("lm", 0, 0.2).wrote("fkl", 0, 0.3)
    page = sweep.page()
    assert "The same in all rows: ece 0.032" not in page and "The same in all rows: exaccerr 0.250." in page
    assert "different numbers of tokens" not in page and "with the same student, data and steps, seed by seed" in page
    path = sweep.root / "run-1" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokens": 3_000_000}))
    page = sweep.page()
    assert "different numbers of tokens in the same steps, 1.23M (SFT) to 3M (fkl): a row that is better may" in page
    assert "student, data and tokens" not in page + sweep.file("md")


def test_excess_error_is_the_mean_as_far_as_all_seeds_have_one(sweep):
    (group,) = sweep.wrote("fkl", 0, 0.3, curve=[0, 0.2, 0.4]).wrote("fkl", 1, 0.3, curve=[0, 0.4]).groups()
    assert exposure_curve([*group.runs.values()]) == pytest.approx([0, 0.3])
    assert 'id="exposure"' in sweep.page()
    (sweep.root / "run-1" / "exaccerr.json").write_text("{")
    assert exposure_curve([*group.runs.values()]) == [] and 'id="exposure"' not in sweep.page()


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """A folder with a sweep file s, outside of the repository."""
    monkeypatch.setattr(plugins, "_typed_folders", [])
    (tmp_path / "their conf" / "sweeps").mkdir(parents=True)
    lines = "# Which loss wins? (2 runs)\n#\n# Answers to: Someone 2020: fkl\nruns:\n- loss=fkl,rkl\n"
    (tmp_path / "their conf" / "sweeps" / "s.yaml").write_text(lines)
    return tmp_path / "their conf"


def test_the_sweep_file_of_a_folder_gives_the_question(sweep, theirs):
    sweep.losses(lm=[2.5], fkl=[2.3])
    assert "Which loss wins?" not in sweep.page()
    assert main(["s", "--root", str(sweep.root), "--config-dir", str(theirs)]) == 0
    text = sweep.file("md")
    assert text.startswith("## Sweep s: Which loss wins?\n") and "Answers to: Someone 2020: fkl" in text
    assert "Which loss wins?" in (sweep.root / "sweeps" / "s.html").read_text()
    words = shlex.split(search_path.sweep_command("s", "my runs"))
    assert words == ["python", "train.py", f'hydra.searchpath=["file://{theirs}"]', "sweeps=s", 'root="my runs"']


@pytest.mark.parametrize(
    ("name", "runs", "hint"),
    [
        ("demo", "", "to run the sweep, type python train.py sweeps=demo root=ROOT"),
        ("demo", "s", "to run the sweep, type python train.py sweeps=demo root=ROOT"),
        ("nosuch", "", "to run one, type e.g. python train.py sweeps=demo root=ROOT"),
        ("nosuch", "s lossy", ""),
        ("looossy", "lossy s", "type lossy in place of looossy"),
    ],
)
def test_a_sweep_that_was_not_run_is_refused_with_what_to_type(tmp_path, monkeypatch, name, runs, hint):
    monkeypatch.delenv("KD_ROOT", raising=False)
    (tmp_path / "sweeps").mkdir()
    for sweep in runs.split():
        (tmp_path / "sweeps" / f"{sweep}.json").write_text('{"runs": []}')
        (tmp_path / "sweeps" / f"{sweep}.fit.json").write_text("{}")
    names = ", ".join(sorted(runs.split())) or "none yet"
    with refused(option="sweeps", got=name, need="a sweep that was run in this root") as caught:
        load_sweep(tmp_path, name)
    assert caught.value.hint == hint.replace("ROOT", str(tmp_path)) and caught.value.why.endswith(f"has {names}")
    monkeypatch.setenv("KD_ROOT", str(tmp_path))
    with refused(option="sweeps", hint=hint.replace(" root=ROOT", "")):
        load_sweep(str(tmp_path), name)


def test_a_sweep_without_a_file_is_not_run_by_its_name(sweep):
    sweep.add(["loss=mse"], {})
    with refused(option="sweeps", got="s", hint="type the command of this sweep again"):
        sweep.page()


@pytest.mark.parametrize("program", [main, fit.main, dashboard.main])
def test_a_folder_without_the_sweep_is_refused(program, sweep, theirs, capsys):
    sweep.name = "other"
    sweep.losses(lm=[2.5], fkl=[2.3]).page()
    assert program(["other", "--root", str(sweep.root), "--config-dir", str(theirs)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"--config-dir={theirs} has no sweep other; need a folder with sweeps/other.yaml.")
    assert "Type one of its sweeps: s." in error


def test_a_folder_that_no_run_accepts_is_refused(sweep, theirs, capsys):
    command = ["s", "--root", str(sweep.root), "--config-dir", str(theirs)]
    (theirs / "sweeps" / "loss.yaml").write_text("runs: []\n")
    assert main(command) == 2 and "would take the place of kd's own sweeps=loss" in capsys.readouterr().err
    assert main([*command[:-1], str(theirs / "gone")]) == 2 and "no such folder" in capsys.readouterr().err
    assert fit.main(["--csv", "x.csv", *command[3:]]) == 2 and "with --csv" in capsys.readouterr().err
