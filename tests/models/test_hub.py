"""Checkpoints that are no plain models: quantised weights, adapters, tokenizers that need more."""

import importlib.util
import json
import os
import shlex
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from kd.data.tokenizer import load_tokenizer
from kd.errors import UserError
from kd.models import causal_lm, flops
from kd.system import files
from tests.models.examples import IDS, T, V, build, text_and_tokenizer, words_as_tokens
from tests.refusals import refused

pytestmark = pytest.mark.usefixtures("connections")

QUANTISED = {
    "gptq": {"bits": 4, "group_size": 128},
    "awq": {"bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "bitsandbytes": {"load_in_4bit": True},
    "bitsandbytes, not named": {"load_in_8bit": True},
    "compressed-tensors": {"format": "pack-quantized", "config_groups": {}},
    "fp8": {"weight_block_size": [16, 16]},
    "mxfp4": {},
    "a-new-one": {},
}


@pytest.mark.parametrize("method", QUANTISED)
@pytest.mark.parametrize("make", [causal_lm.build_model, flops.cost_of])
def test_quantised_weights_are_refused_by_name(llama, method, make):
    config = json.loads((llama / "config.json").read_text())
    named, _, unnamed = method.partition(",")
    config["quantization_config"] = QUANTISED[method] | ({} if unnamed else {"quant_method": named})
    (llama / "config.json").write_text(json.dumps(config))
    why, hint = f"its weights are quantised ({named})", "which its model card names"
    with refused(option="teacher.name", got=llama, why=why, need="floating point", hint=hint) as caught:
        make(None, str(llama), V, T, "teacher.name")
    assert [line[:9] for line in caught.value.commands] == ["python -c"] * (named == "bitsandbytes")


class Odd(Exception):
    """Error of a library."""


@pytest.mark.parametrize("error", [ImportError("needs x"), AttributeError("no y"), KeyError("z"), Odd("strange\nmore")])
def test_whatever_a_library_raises_while_it_loads_is_one_screen(saved, tmp_path, monkeypatch, error):
    def fail(*args, **more):
        raise error

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    why = ("could not be loaded", type(error).__name__)
    with refused(option="teacher.name", got=saved / "llama", why=why) as caught:
        build(saved / "llama")
    assert len(str(caught.value).splitlines()) == 1
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    (tmp_path / "tokenizer.json").write_text("{}")
    with refused(option="The tokenizer", why=why):
        load_tokenizer(str(tmp_path), "The tokenizer")
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", fail)
    with refused(option="teacher.name", got=saved / "llama", why=why):
        flops.cost_of(None, str(saved / "llama"), V, T, "teacher.name")


def test_a_reason_that_goes_on_in_the_next_line_is_whole(saved, monkeypatch):
    def fail(*args, **more):
        raise ImportError("\nThis model needs packages:\n  x, y\nSee the web.")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(UserError, match=r": ImportError: This model needs packages: x, y\. Check"):
        build(saved / "llama")


# Adapters


@pytest.fixture
def adapter(saved, tmp_path) -> Path:
    """A folder as PEFT writes it, of the model llama."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(saved / "llama"), "r": 2,
             "lora_alpha": 4, "target_modules": ["q_proj"]}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(about))
    generator = torch.Generator().manual_seed(0)
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    shapes = {"A": (2, 32), "B": (32, 2)}
    weights = {name.format(n, k): torch.randn(shapes[k], generator=generator) for n in range(2) for k in shapes}
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def test_an_adapter_without_peft_says_what_to_install(adapter, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with refused(option="teacher.name", got=adapter, need="the package PEFT", hint="pip install 'kd[peft]'"):
        build(adapter)


def test_an_adapter_is_merged_into_its_model(saved, adapter, monkeypatch):
    """Merge with PEFT, or with a stand-in that merges this one adapter."""
    weights = load_file(adapter / "adapter_model.safetensors")
    expected = build(saved / "llama")
    with torch.no_grad():
        for n, layer in enumerate(expected.model.model.layers):
            name = f"base_model.model.model.layers.{n}.self_attn.q_proj.lora_"
            layer.self_attn.q_proj.weight += 2 * weights[f"{name}B.weight"] @ weights[f"{name}A.weight"]  # alpha / r

    class Merged:
        base_model = property(lambda self: self)

        def merge_and_unload(self, safe_merge):
            return expected.model

    if not importlib.util.find_spec("peft"):
        fake = types.SimpleNamespace(PeftModel=types.SimpleNamespace(from_pretrained=lambda model, name: Merged()))
        monkeypatch.setitem(sys.modules, "peft", fake)
    merged = build(adapter)
    with torch.no_grad():
        torch.testing.assert_close(merged.model(IDS).logits, expected.model(IDS).logits, rtol=1e-4, atol=1e-5)
    assert all(p.requires_grad for p in merged.parameters())
    assert flops.cost_of(None, str(adapter), V, T, "teacher.name") == flops.cost(expected.model, T)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda f: shutil.copy(f.parent / "llama" / "config.json", f), ("holds a whole model", "and an adapter")),
        (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "an adapter without its weights"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "does not name the model"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "does not name the model"),
        (
            lambda f: (f / "adapter_config.json").write_text('{"base_model_name_or_path": "/no/folder"}'),
            "could not be loaded",
        ),
    ],
    ids=["beside", "pickle", "nameless", "damaged", "gone"],
)
def test_an_adapter_that_cannot_be_merged_is_refused(adapter, llama, change, why):
    change(adapter)
    with refused(option="teacher.name", why=why) as caught:
        build(adapter)
    base = " base_model_name_or_path=/no/folder" if why == "could not be loaded" else ""
    assert caught.value.got == f"{adapter}{base}"


def test_an_adapter_is_another_one_when_its_model_changes(adapter, llama):
    def stamp(base: str) -> str:
        path, before = adapter / "adapter_config.json", os.stat(adapter / "adapter_config.json")
        path.write_text(json.dumps({"base_model_name_or_path": base}))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        return files.folder_fingerprint(str(adapter))

    first = stamp(str(llama))
    assert stamp(str(llama)) == first
    (llama / "model.safetensors").touch()
    assert stamp(str(llama)) == first
    (llama / "generation_config.json").write_text("{}")
    assert stamp(str(llama)) != first
    (adapter / "adapter_config.json").write_text("{")
    assert files.folder_fingerprint(str(adapter))


def test_an_adapter_without_a_tokenizer_has_that_of_its_model(adapter, tmp_path):
    _, name = text_and_tokenizer(tmp_path)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(name)}))
    assert load_tokenizer(str(adapter), "teacher").get_vocab()["w3"] == 5
    _, new_tokenizer = text_and_tokenizer(tmp_path / "more", {"new": 42})
    shutil.copytree(new_tokenizer, adapter, dirs_exist_ok=True)
    assert load_tokenizer(str(adapter), "teacher").get_vocab()["new"] == 42


# Tokenizers


def test_a_tokenizer_model_alone_says_what_to_install(llama, monkeypatch):
    (llama / "tokenizer.model").write_bytes(b"a model of SentencePiece")
    with refused(why="no tokenizer.json", hint="pip install sentencepiece protobuf"):
        load_tokenizer(str(llama), "The tokenizer")


def test_a_tokenizer_larger_than_its_model_says_which_tokens_and_how_to_give_them_rows(llama, monkeypatch):
    fast = words_as_tokens(*(f"w{n}" for n in range(V)), special=("<pad>", "<image>"))
    fast.save_pretrained(llama)
    why = ("2 tokens beyond the 90", "<pad> (90), <image> (91)")
    with refused(option="student.name", got=llama, why=why, hint="student.name=NEW_FOLDER") as caught:
        causal_lm.check_rows(fast, str(llama), "student.name")
    (line,) = caught.value.commands
    words = shlex.split(line.replace("NEW_FOLDER", str(llama.parent / "new")))
    assert words[:2] == ["python", "-c"]
    monkeypatch.setattr(sys, "argv", words[1:2] + words[3:])
    exec(words[2], {})
    causal_lm.check_rows(fast, str(llama.parent / "new"), "student.name")
    assert build(llama.parent / "new", vocab=92).head.output.weight.shape[0] == 92
