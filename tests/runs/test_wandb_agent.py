"""W&B's own agent, with a server of our own: its runs are the runs that it asked for, whatever became of them here."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args, load_sweep_config

from kd.config import security
from kd.config.components import CONF, SWEEPS
from kd.runs import wandb_agent
from kd.system.files import read_metrics
from tests.config.hostile import typed_in
from tests.small import ENVIRONMENT, FORK, SMALL, TRAIN, folder, result, small_config

FILES = sorted((SWEEPS / "wandb").glob("*.yaml"))
WORDS = [*SMALL, "logger=wandb", "trainer.steps=150", "trainer.val_every=50"]
ASKED = {"loss": "jsd", "seed": 1, "lr.peak": 0.002, "alpha": "wsd"}


def inspect(path: Path, *flags: str) -> list[dict]:
    """Return the content of an offline W&B run, read by W&B's own tool."""
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", *flags, str(path)]
    output = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout
    return [json.loads(output)] if flags else [json.loads(line) for line in output.splitlines()]


def logged(root: Path, name: str) -> tuple[dict, list[int]]:
    """Config, summary, sweep, … of the one offline run with this id, and the steps of its history."""
    (path,) = root.glob(f"*/wandb/offline-run-*-{name}")
    records = inspect(path)
    (run,) = (record["run"] for record in records if record["type"] == "run")
    steps = [int(record["history"]["step"]["num"]) for record in records if record["type"] == "history"]
    return inspect(path, "--summary")[0] | {"sweep": run.get("sweep_id")}, steps


def work(root: Path, command: list[str], report: Path) -> None:
    """`wandb agent`, asked for two runs with the same parameters, of which it is to stop the first."""
    import wandb
    from wandb.apis.public import sweeps
    from wandb.wandb_agent import Agent

    run_ids, stopped = ["first", "second"], False

    def heartbeat(api, name, metrics, running):
        nonlocal stopped
        lines = [line for path in root.glob("jsd*/metrics.jsonl") for line in path.read_text().splitlines()]
        if "first" in running:
            stopped = stopped or len(lines) > 4
            return [{"type": "stop", "run_id": "first"}] if stopped else []
        if running:
            return []
        parameters = {key: {"value": value} for key, value in ASKED.items()}
        run = {"type": "run", "run_id": run_ids.pop(0), "program": str(TRAIN), "args": parameters} if run_ids else None
        return [run or {"type": "exit"}]

    os.chdir(root)
    os.environ |= ENVIRONMENT | {"WANDB_MODE": "offline", "WANDB_PROJECT": "theirs", "WANDB_SWEEP_ID": "abcd1234"}
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    os.environ["HOME"] = str(root)
    sweeps._register_agent = lambda *_, **__: {"id": "agent"}
    sweeps._sweep_with_runs = lambda *_, **__: {"config": yaml.safe_dump({"command": command})}
    sweeps._agent_heartbeat = heartbeat
    wandb.Api = lambda: None
    Agent.POLL_INTERVAL = 0.05
    with open(root / "output", "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        working = Agent(None, FORK.Queue(), sweep_id="abcd1234")
        working.run()
    report.write_text(json.dumps({"finished": working._finished, "failed": working._failed}))


@pytest.fixture(scope="module")
def worked(tmp_path_factory) -> tuple[Path, dict]:
    root = tmp_path_factory.mktemp("agent")
    command = load_sweep_config(SWEEPS / "wandb" / "loss.yaml")["command"]
    command[-1:-1] = [*WORDS, f"root={root}"]
    process = FORK.Process(target=work, args=(root, command, root / "said"))
    process.start()
    process.join(250)
    process.kill()
    return root, json.loads((root / "said").read_text())


@pytest.mark.slow
def test_run_of_an_agent_is_the_agents_run_and_its_teacher_is_not(worked):
    root, report = worked
    assert report == {
        "finished": 2,
        "failed": 0,
    }  # the one that it stopped is no failure, several of which would end it
    first, steps = logged(root, "first")
    assert first["project"] == "theirs" and 1 <= steps[-1] < 150 and "final/lm" not in first["summary"]
    (teacher,) = root.glob("lm*/wandb/offline-run-*")
    shown = inspect(teacher, "--summary")[0]
    assert (
        shown["run_id"].startswith("lm-100k")
        and shown["project"] == "kd"
        and shown["tags"] == ["lm", "teacher", "markov"]
    )
    assert shown["config"]["loss"] == "lm" and "lr.peak" not in shown["config"]


@pytest.mark.slow
def test_stopped_run_goes_on_as_another_run_of_the_agent_which_has_all_of_its_steps(worked):
    root, _ = worked
    second, steps = logged(root, "second")
    measured = [line["step"] for line in read_metrics(folder(root, "jsd") / "metrics.jsonl")]
    assert steps == sorted(set(measured)) and steps[-1] == 150
    assert second["summary"]["val/lm"] == second["summary"]["final/lm"]


@pytest.mark.slow
def test_run_that_is_done_is_told_to_an_agent_that_asks_again(worked, monkeypatch):
    root, _ = worked
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SWEEP_ID", "abcd1234")
    monkeypatch.setenv("WANDB_RUN_ID", "third")
    words = [*WORDS, f"root={root}", "sweep=loss", *(f"{k}={v}" for k, v in ASKED.items())]
    (root / "again").mkdir()
    assert typed_in(root / "again", *words)[0] == 0
    (second, before), (third, steps) = logged(root, "second"), logged(root, "third")
    assert steps == before and third["state"] == "finished" and third["tags"] == second["tags"]
    final = result(folder(root, "jsd"))["final"]
    assert third["summary"]["final/lm"] == third["summary"]["val/lm"] == final["val/lm"]
    parameters = ("lr.peak", "alpha")  # of the agent's file; loss and seed are axes of every run as well
    assert third["config"] == {k: v for k, v in second["config"].items() if k not in parameters}
    assert typed_in(root / "again", *words)[0] == 0
    logged(root, "third")  # once


def test_agent_is_asked_for_no_sweep(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "abcd1234")
    monkeypatch.setenv("WANDB_RUN_ID", "one")
    code, output = typed_in(tmp_path, "-m", *SMALL, f"root={tmp_path}", "seed=0,1")
    assert code == 2 and "one run at a time" in output and not list(tmp_path.glob("fkl*")), output


def test_without_an_agent_nothing_is_asked(monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)
    assert wandb_agent.wandb_run_id() is None
    wandb_agent.check_single()
    wandb_agent.end()
    monkeypatch.setenv("WANDB_SWEEP_ID", "abcd1234")
    with wandb_agent.hidden():
        assert wandb_agent.wandb_run_id() is None and "WANDB_RUN_ID" not in os.environ
    assert wandb_agent.wandb_run_id() == "mine"


def corners(parameters: dict) -> list[dict]:
    """The least and the greatest of all parameters, and each value of each."""
    ends = [{}, {}]
    for name, parameter in parameters.items():
        values = parameter.get(
            "values", [parameter["value"]] if "value" in parameter else [parameter.get("min"), parameter.get("max")]
        )
        for end, value in zip(ends, (values[0], values[-1])):
            end[name] = value
    others = [
        ends[0] | {name: value} for name, parameter in parameters.items() for value in parameter.get("values", ())
    ]
    return [*ends, *others]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_for_agents_composes_and_gets_through(path, tmp_path):
    sweep = load_sweep_config(path)
    assert path.read_text().startswith("# ") and f"wandb sweep sweeps/wandb/{path.name}" in path.read_text()
    assert {"name", "project", "program", "method", "metric", "parameters", "command"} <= sweep.keys()
    assert sweep["method"] == "grid" or sweep["run_cap"]
    assert (
        sweep["program"] == TRAIN.name and sweep["metric"]["name"] == "val/lm" and sweep["metric"]["goal"] == "minimize"
    )
    assert sweep["command"][-1] == "${args_no_hyphens}" and sweep["command"][2] == "${program}"
    fixed = sweep["command"][3:-1]
    for values in corners(sweep["parameters"]):
        words = create_sweep_command_args({"args": {k: {"value": v} for k, v in values.items()}})["args_no_hyphens"]
        security.check_command_line([*fixed, *words])
        flat = small_config(tmp_path, *fixed, *words).flat()
        assert {k: flat[k] for k in values} == values  # numbers, where numbers are meant


def test_agents_try_every_loss():
    from kd.bench.cases import LOSSES

    sweep = load_sweep_config(SWEEPS / "wandb" / "loss.yaml")
    assert sweep["parameters"]["loss"]["values"] == LOSSES  # those that ask for nothing beside


def test_hyperband_looks_before_the_end():
    early_terminate = load_sweep_config(SWEEPS / "wandb" / "alpha_tau.yaml")["early_terminate"]
    trainer = yaml.safe_load((CONF / "trainer" / "default.yaml").read_text())
    assert (
        early_terminate["min_iter"] * early_terminate["eta"] == 4 < trainer["steps"] / trainer["val_every"] == 6
    )  # as its head says
