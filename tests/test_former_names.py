"""Renamed settings and metrics: older files are read, and commands are refused with the name of today."""

import json
from pathlib import Path

import pytest

import kd
import train  # noqa: F401, registers the sizes
from kd import former_names
from kd.config import overrides
from kd.config.argument_types import check_types
from kd.config.components import option_files
from kd.config.compose import config_of
from kd.config.schema import ExperimentConfig
from kd.evaluation.catalog import METRICS
from kd.launch import sweep_list
from kd.rollout import strategies
from kd.runs import identity
from kd.runs.run import Run
from kd.runs.seal import SEALED, digest_of_result, digests
from kd.system.files import read_metrics
from tests.refusals import refused
from tests.sweeps.fake import Sweep

ROLLOUT = {"data": "instructions", "rollout": "mixed"}
MINILLM = ("method=minillm", "data=instructions", "student=200k", "teacher=1m")


@pytest.mark.parametrize("word", ["rollout.from_next=false", "++rollout.from_next=false", "+rollout.from_next=false"])
@pytest.mark.parametrize("choice", ["rollout=mixed", "rollout=mixed_code", "method=minillm", "rollout=student"])
def test_a_former_name_is_refused_with_todays(choice, word):
    with refused(option=word.partition("=")[0], got="false", hint="type rollout.exclude_own_reward=false"):
        overrides.check_groups([choice, word])


def test_a_former_name_in_a_file_of_options_is_refused_with_todays():
    with refused(option="rollout.from_next", got=True, hint="type rollout.exclude_own_reward"):
        check_types(strategies.mixed, {"from_next": True}, "rollout")


def test_every_name_of_today_is_a_setting_or_a_metric():
    for setting in former_names.SETTINGS:
        files = {file.stem: file.read_text() for file in option_files(setting.group)}
        for option in setting.options:
            assert f"\n{setting.current}:" in files[option] and f"\n{setting.former}:" not in files[option]
    names = {metric.key for metric in METRICS} | {metric.teacher_key for metric in METRICS}
    for former, current in former_names.METRICS.items():
        assert former not in names and (current in names or current.startswith("train/"))


def test_a_config_of_an_older_version_is_that_of_today_and_has_its_name():
    config = config_of([*MINILLM, "rollout.exclude_own_reward=false", "loss.single_step=false"])
    node = config.to_dict()
    node["rollout"]["from_next"] = node["rollout"].pop("exclude_own_reward")
    assert ExperimentConfig.from_dict(node).flat() == config.flat()
    assert config.flat()["rollout.exclude_own_reward"] is False
    old = {k.replace("exclude_own_reward", "from_next"): v for k, v in config.flat().items()}
    assert former_names.former_options(config.flat()) == old
    assert former_names.current_options(old) == config.flat()
    assert identity.identity(old) == identity.identity(config.flat())


def test_a_plug_ins_option_keeps_its_settings():
    node = {"rollout": {"_target_": "mypkg.rollouts.mine", "from_next": 1}}
    flat = {"rollout": "mine", "rollout.from_next": 1}
    assert former_names.current_config(node) == node
    same_name = {"rollout": {"_target_": "mypkg.rollouts.mixed_code", "from_next": 1}}
    assert former_names.current_config(same_name) == same_name
    assert former_names.current_options(flat) == flat == former_names.former_options(flat)


@pytest.mark.parametrize("choice", ["rollout=mine", "method=mine", "method=minillm rollout=mine"])
def test_words_that_choose_a_plug_ins_option_are_left(choice):
    words = [*choice.split(), "rollout.from_next=1"]
    assert former_names.current_words(words) == words


def test_methods_that_choose_an_option_are_listed():
    for setting in former_names.SETTINGS:
        lines = {f"- override /{setting.group}: {option}" for option in setting.options}
        methods = [
            file.stem for file in option_files("method") if lines & {x.strip() for x in file.read_text().split("\n")}
        ]
        assert sorted(setting.methods) == methods
        for method in methods:
            word = f"{setting.group}.{setting.former}=1"
            assert former_names.current_words([f"method={method}", word]) == [
                f"method={method}", f"{setting.group}.{setting.current}=1",
            ]  # fmt: skip


def old_sweep(root: Path) -> Sweep:
    """A sweep of one run of an older version, sealed."""
    sweep = Sweep(root).done("minillm", 0, 2.5, **ROLLOUT, **{"rollout.from_next": True})
    folder = root / "run-0"
    result = json.loads((folder / "result.json").read_text())
    result["final"] |= {"val/ended": 0.75, "val/teacher_ended": 0.5}
    (folder / "metrics.jsonl").write_text('{"step": 1, "train/by_student": 1.0}\n{"step": 1, "val/ended": 0.75}\n')
    result |= {"initial": {"val/lm": 3.0, "val/ended": 0.25}, "files": digests(folder, SEALED), "sources": {}}
    (folder / "result.json").write_text(json.dumps(result | {"digest": digest_of_result(result)}))
    sweep.runs[0]["overrides"] = ["rollout=mixed", "rollout.from_next=true"]
    return sweep


def test_a_result_of_an_older_version_has_todays_names(tmp_path):
    sweep = old_sweep(tmp_path)
    sweep.report()
    result = Run(tmp_path, "run-0").result()
    assert result["config"]["rollout.exclude_own_reward"] is True and "rollout.from_next" not in result["config"]
    assert result["final"]["val/eos_rate"] == 0.75 and result["final"]["val/teacher_eos_rate"] == 0.5
    assert result["initial"] == {"val/lm": 3.0, "val/eos_rate": 0.25}
    (record,) = kd.load_results(tmp_path, sweep="s")
    assert record["state"] == "done" and record["val/eos_rate"] == 0.75 and record["initial/val/eos_rate"] == 0.25
    assert not [name for name in record if "from_next" in name or "ended" in name]
    assert record["command"] == "python train.py rollout=mixed rollout.exclude_own_reward=true"
    lines = read_metrics(tmp_path / "run-0" / "metrics.jsonl")
    assert lines == [{"step": 1, "train/student_token_share": 1.0}, {"step": 1, "val/eos_rate": 0.75}]


def test_a_report_has_todays_column_for_an_older_result(tmp_path):
    page = old_sweep(tmp_path).page()
    assert "eos rate" in page and "0.750" in page


def test_the_list_of_a_finished_sweep_is_not_written_again_for_a_former_name(tmp_path):
    old_sweep(tmp_path).report()
    path = tmp_path / "sweeps" / "s.json"
    before = path.read_text()
    words = ["rollout=mixed", "rollout.exclude_own_reward=true"]
    sweep_list.update(str(tmp_path), "s", [{"run": "run-0", "overrides": words}], further=False)
    assert path.read_text() == before
