"""Folders that hold no model, or a damaged one, are refused by name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from kd.data.tokenizer import load_tokenizer
from kd.models import flops
from tests.models.examples import T, V, build
from tests.refusals import refused

pytestmark = pytest.mark.usefixtures("connections")


def test_pickled_weights_are_refused(llama):
    weights = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    torch.save(weights, llama / "pytorch_model.bin")
    hint = "save the weights of pytorch_model.bin as safetensors"
    with refused(option="teacher.name", got=llama, why="has neither model.safetensors", need="may run code", hint=hint):
        build(llama)


def test_code_of_a_model_is_not_run(llama):
    config = json.loads((llama / "config.json").read_text())
    config |= {"model_type": "odd", "auto_map": {"AutoConfig": "odd.Odd", "AutoModelForCausalLM": "odd.Odd"}}
    (llama / "config.json").write_text(json.dumps(config))
    (llama / "odd.py").write_text(f"open({str(llama / 'canary')!r}, 'w')")
    with refused(option="teacher.name", got=llama, why="could not be loaded"):
        build(llama)
    assert not (llama / "canary").exists()


@pytest.mark.parametrize("cut", [slice(0), slice(4), slice(100), slice(-1), slice(1, None), slice(8, None)])
def test_damaged_weights_are_refused(llama, cut):
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[cut])
    with refused(option="teacher.name", got=llama, why="could not be loaded"):
        build(llama)


@pytest.mark.parametrize("config", ["", '{"a":', "{}", '{"model_type": "nope"}', '{"model_type": "t5"}'])
def test_folder_of_something_else_is_refused(llama, config):
    (llama / "config.json").write_text(config)
    with refused(option="teacher.name", got=llama, why="could not be loaded"):
        build(llama)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_weights_that_are_not_there_are_refused(llama, name):
    weights = load_file(llama / "model.safetensors")
    del weights[name]
    save_file(weights, llama / "model.safetensors", {"format": "pt"})
    with refused(option="teacher.name", got=llama, why=name):
        build(llama)


def test_weights_of_another_shape_are_refused(llama):
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with refused(option="teacher.name", got=llama, why="could not be loaded"):
        build(llama)


def test_folder_without_weights_is_refused_by_the_names_of_files(llama):
    (llama / "model.safetensors").unlink()
    why = f"{llama} has neither model.safetensors nor model.safetensors.index.json; it has config.json, generation_con"
    with refused(option="teacher.name", got=llama, why=why, need="weights as safetensors", hint="download the model"):
        build(llama)


@pytest.mark.parametrize("load", [build, lambda folder: flops.cost_of(None, str(folder), V, T, "teacher.name")])
def test_folder_without_a_config_is_refused_with_what_is_below(llama, load):
    (llama / "config.json").unlink()
    why = f"could not be loaded: {llama} has no config.json; it has generation_config.json, model.safetensors"
    hint = "give the folder of a downloaded model, or the name of one of the Hub"
    with refused(option="teacher.name", got=llama, why=why, need="config.json and model.safetensors", hint=hint):
        load(llama)
    (llama / "checkpoint-3").mkdir()
    (llama / "checkpoint-3" / "config.json").write_text("{}")
    with refused(option="teacher.name", got=llama, hint=f"type {llama / 'checkpoint-3'} in its place"):
        load(llama)


def test_folder_without_a_tokenizer_is_refused_by_the_names_of_files(llama):
    (llama / "tokenizer_config.json").write_text("{}")  # which holds no vocabulary
    why, hint = f"{llama} has no tokenizer.json, no tokenizer.model", "copy the tokenizer that this model was trained"
    with refused(option="The tokenizer of x", why=why, hint=hint):
        load_tokenizer(str(llama), "The tokenizer of x")


def test_path_without_a_folder_is_refused_with_the_part_that_is_missing(connections, llama, monkeypatch):
    nested = shutil.copytree(llama, llama.parent / "models" / "small")
    for name, part, meant in (
        (llama.parent / "lama", "lama", llama), (llama.parent / "model" / "small", "model", nested),
        (nested.parent / "smal", "smal", nested), (nested.parent / "smal" / "deeper", "smal", nested),
    ):  # fmt: skip
        with refused(option="teacher.name", got=name, why=f"has no folder '{part}'", hint=f"type {meant}, if that"):
            build(name)
        with refused(option="The tokenizer", why=f"has no folder '{part}'", hint=f"type {meant}, if that"):
            load_tokenizer(str(name), "The tokenizer")
    with refused(option="teacher.name", why=f"{llama.parent} has no folder 'xyz'; it has llama/, models/") as caught:
        build(llama.parent / "xyz")
    assert not caught.value.hint
    with refused(option="teacher.name", why="could not be loaded: it is a file", hint=f"type {llama}, the folder of"):
        build(llama / "config.json")
    assert not connections


def test_home_folder_that_nothing_replaced_is_refused_with_its_path(connections, llama, monkeypatch):
    monkeypatch.setenv("HOME", str(llama.parent))
    why = "could not be loaded: ~ is not replaced here"
    with refused(option="teacher.name", got="~/llama", why=why, hint=f"type {llama}") as caught:
        build("~/llama")
    assert "has no folder" not in str(caught.value)
    with refused(option="teacher.name", got="~/lama", why="has no folder 'lama'", hint=f"type {llama}, if that"):
        build("~/lama")
    with refused(option="teacher.name", got="~nosuchuser/x", why="has no folder '~nosuchuser'"):
        build("~nosuchuser/x")
    assert not connections


def test_name_that_is_nowhere_is_refused_with_a_similar_folder_and_the_network(connections, llama, monkeypatch):
    monkeypatch.chdir(llama.parent)
    why = f"no folder {llama.parent / 'lama'}, and the Hub did not give it"
    hint = (f"type {llama}, if that is meant; else check the name and the network", "a downloaded model")
    with refused(option="teacher.name", got="lama", why=why, hint=hint):
        build("lama")


def test_folder_that_holds_no_model_is_not_offered(connections, llama, monkeypatch):
    monkeypatch.chdir(llama.parent)
    (llama.parent / "tests").mkdir()
    (llama.parent / "notes").write_text("")
    for name in ("test/tiny", "test", "notes"):
        with refused(option="teacher.name", got=name, hint="check the name and the network") as caught:
            build(name)
        assert "type" not in caught.value.hint
    with refused(option="teacher.name", why="has no folder 'test'") as caught:
        build(llama.parent / "test" / "small" / "tiny")
    assert not caught.value.hint


def test_path_is_refused_without_the_network(connections):
    for name in ("no such//name", "/no/folder"):
        with refused(option="teacher.name", got=name, why="could not be loaded: /", need="the folder of a model"):
            build(name)
    assert not connections


@pytest.mark.parametrize("name", ["no-such/model", "no-such-model"])
def test_name_that_is_nowhere_is_refused_at_once_and_says_what_to_do(connections, name):
    with refused(option="teacher.name", got=name, why="could not be loaded", hint="check the name and the network"):
        build(name)
    assert connections == [("huggingface.co", 443)]  # asked once, then never again


def test_folder_needs_no_network(connections, saved):
    build(saved / "llama")
    assert not connections
