"""A sweep in W&B: reports and fits as artefacts, a view and a report over its runs. What goes there is read back."""

import contextlib
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kd.evaluation.catalog import LOSS, ROUGE_L
from kd.experiment.results import Entry, read_run
from kd.runs import loggers
from sweeps import dashboard as command
from sweeps.fit.__main__ import main as fit_main
from sweeps.report import dashboard
from sweeps.report.__main__ import main as report_main
from sweeps.report.artifact import wandb_place
from tests.refusals import refused
from tests.runs.test_wandb_agent import inspect
from tests.small import FORK
from tests.sweeps.fake import Sweep
from tests.wandb_server import serving

LOGGED = {"logger": "wandb", "logger.project": "mine", "logger.entity": None}


@pytest.fixture
def sweep(tmp_path):
    """Two losses and language modelling alone, two seeds each, all of which were logged to W&B."""
    sweep = Sweep(tmp_path)
    for seed in (0, 1):
        for method, loss in (("lm", 2.5), ("fkl", 2.3), ("jsd", 2.4)):
            sweep.done(method, seed, loss + seed / 100, **LOGGED)
            (tmp_path / sweep.runs[-1]["run"] / "wandb-id").write_text(f"{method}-{seed}")
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "s.json").write_text(json.dumps({"name": "s", "runs": sweep.runs}))
    return sweep


def entries(sweep) -> list[Entry]:
    return [read_run(sweep.root, line) for line in sweep.runs]


def _work(root: Path, main, arguments: list[str], environment: dict[str, str]) -> None:
    os.environ |= {"HOME": str(root), "WANDB_MODE": "offline"} | environment
    with open(root / "output", "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        sys.exit(main(arguments))


def typed(root: Path, main, *arguments: str, **environment: str) -> tuple[int, str]:
    """Exit code and output of a command, in a process of its own, since W&B stays in one."""
    process = FORK.Process(target=_work, args=(root, main, [*arguments], environment))
    process.start()
    process.join(100)
    process.kill()
    process.join()
    return process.exitcode, (root / "output").read_text()


def records(root: Path, kind: str) -> list[dict]:
    (path,) = root.glob("wandb/offline-run-*")
    return [record[kind] for record in inspect(path) if record["type"] == kind]


def test_report_is_kept_as_an_artefact_and_as_media(sweep):
    code, output = typed(sweep.root, report_main, "s", "--root", str(sweep.root), "--wandb")
    folder = sweep.root / "sweeps"
    assert code == 0 and f"wandb sync {folder}/wandb/offline-run-" in output, output
    (run,), (artefact,) = records(folder, "run"), records(folder, "artifact")
    sentence = output.partition(": ")[2].partition("\n")[0]
    assert (run["project"], run["job_type"], run["run_group"], run["notes"]) == ("mine", "report", "s", sentence)
    assert (artefact["name"], artefact["type"], artefact["description"]) == ("s.report", "report", sentence)
    paths = {part["path"]: Path(part["local_path"]) for part in artefact["manifest"]["contents"]}
    assert paths.keys() == {"s.html", "s.md", "s.csv"}
    assert all(path.read_bytes() == (folder / name).read_bytes() for name, path in paths.items())
    (page,) = folder.glob("wandb/offline-run-*/files/media/html/*.html")
    assert page.read_bytes() == (folder / "s.html").read_bytes()
    assert records(folder, "history")[0]["item"]["report._type"] == "html-file"


def test_fit_is_kept_as_an_artefact(tmp_path):
    points = ["parameters,tokens,loss", "1e6,1e7,3", "2e6,1e7,2.9", "4e6,1e7,2.85", "8e6,1e7,2.83"]
    (tmp_path / "my points.csv").write_text("\n".join(points))
    code, output = typed(tmp_path, fit_main, "--csv", str(tmp_path / "my points.csv"), "--wandb", "--bootstrap", "0")
    assert code == 0 and "wandb sync" in output, output
    (run,), (artefact,) = records(tmp_path, "run"), records(tmp_path, "artifact")
    assert (run["project"], run["job_type"], artefact["name"], artefact["type"]) == (
        "kd",
        "fit",
        "my-points.fit",
        "fit",
    )
    names = [part["path"] for part in artefact["manifest"]["contents"]]
    assert sorted(names) == ["my points.fit.html", "my points.fit.json", "my points.points.csv"]


def test_what_w_and_b_does_not_take_is_an_error_that_says_where_it_is(sweep, monkeypatch, capsys):
    monkeypatch.setattr(loggers, "wandb_run", lambda **_: (_ for _ in ()).throw(OSError("disk")))
    assert report_main(["s", "--root", str(sweep.root), "--wandb"]) == 2
    assert re.search(r"W&B did not take the report \(disk\)\. See the report in .*/s\.html\.", capsys.readouterr().err)


def test_place_is_that_of_the_runs(sweep, tmp_path):
    assert wandb_place(entries(sweep)) == {"project": "mine", "entity": None}
    (tmp_path / "other").mkdir()
    assert wandb_place(entries(Sweep(tmp_path / "other").done("fkl", 0, 2.3))) == {"project": "kd", "entity": None}


def test_axes_that_are_shown_are_those_that_vary(sweep):
    assert dashboard.varying_axes(entries(sweep)) == ["loss", "alpha_peak", "logits"]  # lm has an alpha_peak of 0
    sweep.done("fkl", 0, 2.2, **{"temperature.tau": 2.0, "student.size": "1m"})
    assert dashboard.varying_axes(entries(sweep)) == ["loss", "alpha_peak", "logits", "temperature_tau"]


def test_view_and_report_are_saved_and_are_of_these_runs(sweep):
    with serving() as (environment, given):
        code, output = typed(sweep.root, command.main, "s", "--root", str(sweep.root), **environment)
    assert code == 0, output
    address = environment["WANDB_BASE_URL"]
    assert re.search(f"^{address}/me/mine\\?nw=\\w+\n{address}/me/mine/reports/kd-s--VIEW$", output, re.M), output
    view, document = given
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("me", "mine", "kd s")
    assert document["description"].startswith("fkl is lowest of 2: ")
    spec, text = json.loads(view["spec"])["section"], json.loads(document["spec"])
    (grid,) = [block["metadata"] for block in text["blocks"] if block["type"] == "panel-grid"]
    (words,) = [block["content"] for block in text["blocks"] if block["type"] == "markdown-block"]
    assert words == (sweep.root / "sweeps" / "s.md").read_text()
    for runs in (spec["runSets"][0], grid["runSets"][0]):
        (condition,) = runs["filters"]["filters"]
        assert condition["key"] == {"section": "run", "name": "name"} and condition["op"] == "IN"  # their ids
        assert set(condition["value"]) == {f"{method}-{seed}" for method in ("lm", "fkl", "jsd") for seed in (0, 1)}
        assert {"config:loss.value", "summary:final/lm", "summary:final/ece"} <= runs["runFeed"]["columnPinned"].keys()
    for panels in (spec["panelBankConfig"]["sections"][0]["panels"], grid["panelBankSectionConfig"]["panels"]):
        parallel, *curves = [panel["config"] for panel in panels]
        axes = ["config:loss.value", "config:alpha_peak.value", "config:logits.value", "summary:final/lm"]
        assert [column["accessor"] for column in parallel["columns"]] == axes
        assert [(c["xAxis"], c["metrics"], c["groupBy"]) for c in curves] == [
            ("tokens", ["val/lm"], "loss.value"), ("flops", ["val/lm"], "loss.value"),
        ]  # fmt: skip


@pytest.mark.parametrize(("metric", "name", "ascending"), [(LOSS, "lm", True), (ROUGE_L, "rouge_l", False)])
def test_view_and_report_go_by_the_metric_of_the_sweep(sweep, metric, name, ascending):
    where = {"entity": "me", "project": "mine"}
    view = dashboard.view("s", ["loss"], ["a"], where, metric)
    document = dashboard.document(replace(sweep.report(), metric=metric), "text", ["loss"], ["a"], where)
    (runs,) = document.blocks[1].runsets
    for order in (view.runset_settings.order[0], runs.order[0]):
        item = getattr(order, "item", None) or order.name
        assert (item.name, order.ascending) == (f"final/{name}", ascending)
    assert view.runset_settings.pinned_columns[1:3] == ["config:loss.value", f"summary:final/{name}"]
    for panels in (view.sections[0].panels, document.blocks[1].panels):
        assert panels[0].columns[-1].metric.name == f"final/{name}"


def test_without_an_account_it_says_what_to_type(sweep):
    code, output = typed(sweep.root, command.main, "s", "--root", str(sweep.root))
    assert code == 2 and "wandb login" in output and "sweeps/s.html" in output, output
    code, output = typed(sweep.root, command.main, "s", "--root", str(sweep.root), WANDB_MODE="online")
    assert code == 2 and "wandb login" in output, output


def test_without_the_package_it_says_what_to_install(sweep, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert command.main(["s", "--root", str(sweep.root)]) == 2
    assert "pip install 'kd[workspaces]'" in capsys.readouterr().err


def test_runs_that_were_not_logged_are_nothing_to_show(sweep):
    for path in sweep.root.glob("*/wandb-id"):
        path.unlink()
    with refused(option="logger", hint="logger=wandb"):
        dashboard.wandb_ids(sweep.root, entries(sweep))
