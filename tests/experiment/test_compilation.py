import json
import shutil

import pytest

from kd.config.compose import config_of
from kd.config.groups import TrainerConfig
from kd.config.schema import ExperimentConfig
from kd.experiment import compilation
from kd.experiment.compilation import LEAST_FLOPS, Compiled, compiled_parts, training_flops
from kd.experiment.dependencies import Plan
from kd.models import causal_lm
from kd.objective import chunked
from kd.runs.identity import identity_settings
from kd.system.compilation import CACHE
from tests.refusals import refused
from tests.small import here, small_config


def trainer(*words: str) -> TrainerConfig:
    return config_of(words).trainer


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_what_is_typed_is_done(device, compile):
    typed = trainer(f"trainer.compile={compile}".lower())
    for flops in (0.0, 1e30):
        assert compiled_parts(typed, device, flops, sharded=False) == Compiled(compile, compile)


@pytest.mark.parametrize(("device", "loss"), [("cpu", False), ("cuda", None)])
def test_models_are_compiled_by_default_from_some_flops_on(device, loss):
    least = LEAST_FLOPS[device]
    assert compiled_parts(trainer(), device, 0.99 * least, sharded=False) == Compiled(False, loss)
    assert compiled_parts(trainer(), device, least, sharded=False) == Compiled(True, None)
    assert compiled_parts(trainer(), device, 1e30, sharded=True) == Compiled(False, loss)
    assert compiled_parts(trainer(), "mps", 1e30, sharded=False) == Compiled(False, False)


def test_flops_of_a_training():
    typed = trainer("trainer.steps=10", "trainer.batch=2")
    assert training_flops(typed, seq_len=8, student=5.0, teacher=7.0) == 10 * 2 * 8 * (3 * 5 + 7)


def test_names_do_not_depend_on_what_is_compiled_by_default():
    long = ("trainer.steps=1_000_000_000", "data=markov")
    names = {
        word: Plan.from_config(config_of([*long, f"trainer.compile={word}"])).run.name
        for word in ("auto", "false", "true")
    }
    assert names["auto"] == names["false"] != names["true"]
    assert identity_settings(config_of(long).flat())["trainer.compile"] is False


def test_a_config_of_an_earlier_version_has_null():
    config = config_of(["data=markov"])
    node = config.to_dict()
    node["trainer"]["compile"] = None
    assert ExperimentConfig.from_dict(node).flat() == config.flat()


@pytest.mark.parametrize("value", ["null", "yes", "1"])
def test_other_values_are_refused(value):
    with refused(option="trainer.compile"):
        config_of([f"trainer.compile={value}"])


def test_models_in_shards_are_not_compiled_by_default():
    assert config_of(["trainer=fsdp", "trainer.batch=4"]).trainer.compile == "auto"


def test_a_long_run_compiles_its_models_and_its_loss(trained_root, tmp_path, monkeypatch):
    root = shutil.copytree(trained_root, tmp_path / "root")
    compiled = []
    for module in (causal_lm, chunked):
        monkeypatch.setattr(module, "compile_if_possible", lambda function: compiled.append(function) or function)
    monkeypatch.setenv(CACHE, str(tmp_path / "code"))
    short = here(root, "trainer.steps=2")
    assert compiled == []
    monkeypatch.setitem(compilation.LEAST_FLOPS, "cpu", 0.0)
    shutil.rmtree(short)
    long = here(root, "trainer.steps=2")
    names = [type(function.__self__).__name__ for function in compiled]
    assert names.count("LlamaDecoderLayer") == 4 and set(names) == {"LlamaDecoderLayer", "Objective"}
    assert long == short and json.loads((long / "result.json").read_text())["config"]["trainer.compile"] == "auto"
    assert small_config(root, "trainer.steps=2").trainer.compile == "auto"
