"""Models of a size or a name: counted right, their heads are their own, and what does not fit is refused by name."""

import importlib.util
import json
import math
import os
import random
import shlex
import shutil
import socket
import sys
import types
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerFast

from kd.config.sizes import SIZES, STUDENTS
from kd.data import packing
from kd.data.tokenizer import load_tokenizer
from kd.errors import UserError
from kd.experiment.dependencies import Plan
from kd.models import causal_lm, flops
from kd.rollout import generate
from kd.runs import identity
from kd.system import files, network
from tests.refusals import refused
from tests.small import here, small_config

V, T = 90, 32
SHAPE = dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
GATED = SHAPE | dict(intermediate_size=48, num_key_value_heads=2)
GPT2 = dict(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
# The caps and scales are so strong that leaving one out shows.
CONFIGS = {
    "gpt2": transformers.GPT2Config(**GPT2),
    "llama": transformers.LlamaConfig(**GATED),
    "llama-tied": transformers.LlamaConfig(**GATED, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**GATED),
    "qwen3": transformers.Qwen3Config(**GATED, head_dim=16),
    "gemma2": transformers.Gemma2Config(**GATED, head_dim=8, final_logit_softcapping=0.2),
    "cohere": transformers.CohereConfig(**GATED, logit_scale=0.25, eos_token_id=0),
    "granite": transformers.GraniteConfig(**GATED, logits_scaling=4.0),
    "opt": transformers.OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=16),
    "pythia": transformers.GPTNeoXConfig(**SHAPE, intermediate_size=48),
    "phi": transformers.PhiConfig(**SHAPE, intermediate_size=48),
}
SPARSE = SHAPE | dict(num_key_value_heads=4)
FEW = dict(num_experts_per_tok=2, moe_intermediate_size=24)
MIXTURES = {  # each names its experts in another way; total and active are of 8 experts of which a token uses 2
    "mixtral": transformers.MixtralConfig(**GATED, num_local_experts=8, num_experts_per_tok=2),
    "qwen2_moe": transformers.Qwen2MoeConfig(**GATED, num_experts=8, **FEW, shared_expert_intermediate_size=16),
    "granite": transformers.GraniteMoeSharedConfig(
        **GATED, num_local_experts=8, num_experts_per_tok=2, shared_intermediate_size=16
    ),
    "deepseek_v3": transformers.DeepseekV3Config(
        **SPARSE, n_routed_experts=8, **FEW, n_group=2, topk_group=1, n_shared_experts=1, first_k_dense_replace=1,
        q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, intermediate_size=48,
    ),
    "ernie": transformers.Ernie4_5_MoeConfig(**GATED, moe_num_experts=8, moe_k=2, moe_intermediate_size=24),
    "hunyuan": transformers.HunYuanMoEV1Config(**GATED, num_experts=8, moe_topk=[2, 2], head_dim=8),
    "jetmoe": transformers.JetMoeConfig(
        vocab_size=V, hidden_size=32, num_hidden_layers=2, num_key_value_heads=2, kv_channels=8, intermediate_size=48,
        num_local_experts=8, num_experts_per_tok=2,
    ),
}  # fmt: skip
NO_ATTENTION = {
    "mamba": transformers.MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=4),
    "mamba2": transformers.Mamba2Config(
        vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=4, num_heads=8, head_dim=8, n_groups=1
    ),
    "rwkv": transformers.RwkvConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, rescale_every=1),
}
every_model = pytest.mark.parametrize("name", CONFIGS)
IDS = torch.arange(2 * T).view(2, T) * 7 % 80


@pytest.fixture(autouse=True)
def calls(monkeypatch) -> list:
    """No network: connecting fails at once and is noted here. What kd finds out then is put back."""
    addresses = []

    def refuse(address, *args, **more):
        addresses.append(address)
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    network.offline_unless_reachable.cache_clear()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield addresses
    network.offline_unless_reachable.cache_clear()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with a folder per model."""
    folder = tmp_path_factory.mktemp("models")
    transformers.logging.disable_progress_bar()
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    return folder


def test_pretrained_models_have_no_dropout(saved):
    """Compare logits: train mode and evaluation mode give the same."""
    assert CONFIGS["gpt2"].resid_pdrop == CONFIGS["opt"].dropout == 0.1
    for name in ("gpt2", "opt"):
        model = causal_lm.build_model(None, str(saved / name), V, T, "student.name").model
        outputs = [mode().forward(IDS).logits for mode in (model.train, model.eval, model.train)]
        assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.fixture
def llama(saved, tmp_path) -> Path:
    """A copy of one, to be damaged."""
    return Path(shutil.copytree(saved / "llama", tmp_path / "llama"))


def build(folder: Path | str, vocab: int = V, seq_len: int = T) -> causal_lm.CausalLM:
    return causal_lm.build_model(None, str(folder), vocab, seq_len, "teacher.name")


# Sizes and costs


def embeddings(size: str, vocab: int) -> int:
    """Weights of embedding and output layer."""
    return vocab * SIZES[size].hidden * (1 if SIZES[size].tied else 2)


@pytest.mark.parametrize("size", SIZES)
def test_size_has_the_parameters_its_row_and_name_say(size):
    with torch.device("meta"):
        model = causal_lm.from_size(size, vocab=1000, seq_len=64)
    cost = flops.cost(model, 64)
    assert cost.non_embedding == SIZES[size].parameters
    assert cost.non_embedding == sum(
        p.numel() for n, p in model.named_parameters() if "embed" not in n and "lm_head" not in n
    )
    assert cost.parameters == cost.non_embedding + embeddings(size, 1000)
    named = float(size[:-1]) * {"k": 1e3, "m": 1e6, "b": 1e9}[size[-1]]
    if size in STUDENTS:  # named with the embeddings of GLM-4's vocabulary
        assert cost.non_embedding + embeddings(size, 151_552) == pytest.approx(named, rel=0.02)
    else:
        assert cost.non_embedding == pytest.approx(named, rel=0.2)


def test_model_of_a_size_is_fresh_and_seeded():
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        model = causal_lm.build_model("100k", None, 50, 8, "student.name").model
        assert model.dtype == torch.float32 and model.training
        return torch.cat([p.flatten() for p in model.parameters()])

    assert torch.equal(weights(0), weights(0)) and not torch.equal(weights(0), weights(1))


@pytest.mark.parametrize("config", [CONFIGS["llama"], CONFIGS["llama-tied"]], ids=["untied", "tied"])
def test_parameters_are_counted_once_and_without_embeddings(config):
    cost = flops.cost(transformers.LlamaForCausalLM(config), T)
    attention, ffn, norms = 32 * 32 * 2 + 32 * 16 * 2, 3 * 32 * 48, 2 * 32
    assert cost.non_embedding == 2 * (attention + ffn + norms) + 32
    assert cost.parameters == cost.non_embedding + V * 32 * (1 if config.tie_word_embeddings else 2)


# Counted by running the model. The counter takes attention over all T positions, kd over the T / 2 that a causal model
# sees on average; kd counts norms and biases, the counter matrix products alone.


@pytest.mark.parametrize(
    "name",
    list(CONFIGS),
)
def test_flops_are_those_of_a_forward_pass(name):
    config = CONFIGS[name]
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(IDS[:1], use_cache=False)
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or 8)
    unseen = 4 * config.num_hidden_layers * width * T / 2
    assert flops.cost(model, T).flops_per_token == pytest.approx(counter.get_total_flops() / T - unseen, rel=0.05)


@pytest.mark.parametrize("name", MIXTURES)
def test_flops_and_active_parameters_of_a_mixture_are_of_the_experts_that_a_token_uses(name):
    config = MIXTURES[name]
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(IDS[:1], use_cache=False)
    cost, unseen = flops.cost(model, T), flops.cost(model, T).flops_per_token - flops.cost(model, 0).flops_per_token
    assert cost.flops_per_token == pytest.approx(counter.get_total_flops() / T - unseen, rel=0.05)
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    parts = [p for n, p in model.named_parameters() if ".experts." in n]
    if name != "jetmoe":  # where some of the attention is experts too
        assert cost.active_parameters == cost.parameters - sum(p.numel() * 6 // 8 for p in parts)
    assert cost.active_parameters < cost.parameters
    dense = transformers.LlamaForCausalLM(CONFIGS["llama"])
    assert flops.cost(dense, T).active_parameters == flops.cost(dense, T).parameters


def test_a_mixture_of_the_shape_of_mixtral_costs_what_its_paper_says():
    """47 billion parameters, of which a token uses 13. Jiang et al. 2024, arXiv 2401.04088, table 1."""
    with torch.device("meta"):
        cost = flops.cost(transformers.MixtralForCausalLM(transformers.MixtralConfig()), 256)
    assert (cost.parameters, cost.active_parameters) == (46_702_792_704, 12_879_925_248)
    assert cost.flops_per_token == pytest.approx(2.6e10, rel=0.03)


def test_a_mixture_whose_experts_are_not_known_is_refused(monkeypatch):
    model = transformers.MixtralForCausalLM(MIXTURES["mixtral"])
    monkeypatch.setattr(flops, "EXPERTS_PER_TOKEN", ("another_name",))
    with refused(why="MixtralForCausalLM has experts in model.layers.0.mlp.experts, and", hint="EXPERTS_PER_TOKEN"):
        flops.cost(model, T)


def test_a_size_in_words_names_the_active_part_of_a_mixture_alone():
    assert identity.size_text(1000, 1000) == identity.size_text(1000, None) == "1,000 parameters"
    assert identity.size_text(1000, 100) == "1,000 parameters, 100 of them active"


@pytest.mark.parametrize("name", NO_ATTENTION)
def test_models_without_attention_are_read_and_counted(tmp_path, name):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(NO_ATTENTION[name]).train()  # none has dropout
    model.save_pretrained(tmp_path)
    causal = build(tmp_path).eval()
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=False).logits
        torch.testing.assert_close(causal.head(causal.hidden_states(IDS)), expected, rtol=1e-4, atol=1e-5)
    saved = load_file(tmp_path / "model.safetensors")  # reading changes no weights, as RWKV's own code does
    assert all(torch.equal(value, saved[key]) for key, value in causal.model.state_dict().items() if key in saved)
    cost = flops.cost(causal.model, T)
    assert cost.flops_per_token == flops.cost(causal.model, 10 * T).flops_per_token
    assert cost.flops_per_token == pytest.approx(2 * (cost.non_embedding + V * 32))
    with refused(why="cannot read a text piece by piece"):
        generate.check_cache(causal)


def test_position_embeddings_are_embeddings():
    model = transformers.GPT2LMHeadModel(CONFIGS["gpt2"])
    assert flops.cost(model, T).non_embedding == sum(p.numel() for p in model.transformer.h.parameters()) + 2 * 32


def test_flops_grow_with_the_row_by_attention_alone():
    model = transformers.LlamaForCausalLM(CONFIGS["llama"])
    short, long = (flops.cost(model, t).flops_per_token for t in (10, 110))
    assert long - short == 2 * 2 * 32 * 100  # layers, products and width; per position, half of it seen


# Heads


@every_model
def test_head_of_hidden_states_is_what_the_model_says(saved, name):
    causal = build(saved / name).eval()
    with torch.no_grad():
        expected = causal.model(input_ids=IDS).logits
        actual = causal.head(causal.hidden_states(IDS))
    assert expected.abs().max() > 0.02
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "part"), [("gemma2", "softcap"), ("cohere", "scale"), ("granite", "scale")])
def test_head_without_its_cap_or_scale_is_refused(saved, name, part):
    causal = build(saved / name)
    setattr(causal.head, part, {"softcap": None, "scale": 1}[part])
    with refused(option="teacher.name", why=("the output layer of ", "is off", "%")):
        causal.check("teacher.name")


@pytest.mark.parametrize(
    "odd", [lambda x: 1.01 * x, lambda x: x + 0.01, lambda x: 0.2 * torch.tanh(x / 0.2), lambda x: x.flip(-1)]
)
def test_head_that_does_something_unknown_is_refused(saved, odd):
    causal = build(saved / "llama")
    forward = causal.model.forward

    def strange(**inputs):
        out = forward(**inputs)
        out.logits = odd(out.logits)
        return out

    causal.model.forward = strange
    with refused(option="teacher.name", why=("LlamaForCausalLM", "does something there that kd does not know")):
        causal.check("teacher.name")


@pytest.mark.parametrize(("size", "name"), [("100k", None), (None, "llama")])
def test_every_model_is_checked_when_it_is_built(saved, monkeypatch, size, name):
    monkeypatch.setattr(causal_lm.Head, "forward", lambda self, hidden: 2 * self.output(hidden)[..., : self.vocab])
    with refused(option="student.name", why="is off"):
        causal_lm.build_model(size, name and str(saved / name), V, T, "student.name")


@pytest.mark.parametrize("training", [True, False])
def test_check_leaves_the_model_as_it_is(saved, training):
    causal = build(saved / "gpt2").train(training)  # it has dropout
    before = torch.get_rng_state()
    causal.check("teacher.name")
    assert causal.model.training == training and torch.equal(torch.get_rng_state(), before)


def test_head_is_no_second_copy_of_the_weights(saved):
    causal = build(saved / "llama")
    assert sum(p.numel() for p in causal.parameters()) == sum(p.numel() for p in causal.model.parameters())
    assert len(causal.state_dict()) == len(causal.model.state_dict())
    assert causal.head.output.weight is causal.model.lm_head.weight


@every_model
def test_padded_vocabulary_is_cut_and_renormalised(saved, name):
    causal = build(saved / name, vocab=80).eval()
    with torch.no_grad():
        p = causal.head(causal.hidden_states(IDS)).softmax(-1)
        whole = causal.model(input_ids=IDS).logits.softmax(-1)[..., :80]
    assert p.shape == (2, T, 80) and (whole.sum(-1) < 0.95).all()
    torch.testing.assert_close(p, whole / whole.sum(-1, keepdim=True), rtol=1e-4, atol=1e-6)


# What does not fit


def test_tokenizer_larger_than_the_head_is_refused(saved):
    with refused(option="teacher.name", why="the model knows 90 tokens and the tokenizer 91", hint="data.tokenizer"):
        build(saved / "llama", vocab=91)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "pythia"])
def test_rows_longer_than_the_model_reads_are_refused(saved, name):
    build(saved / name, seq_len=64)
    with refused(option="teacher.name", why="reads at most 64 tokens", hint="data.seq_len=64"):
        build(saved / name, seq_len=65)


class Vocabulary(dict):
    get_vocab = dict.copy


def test_same_vocabulary_is_token_for_token():
    ours = Vocabulary(a=0, b=1, c=2)
    causal_lm.check_same_vocabulary(ours, Vocabulary(c=2, b=1, a=0), "teacher.name=x")
    for theirs, differing in (({"a": 1, "b": 0, "c": 2}, 2), ({"a": 0, "b": 1}, 1), ({"a": 0, "b": 1, "d": 2}, 2)):
        why = (f"its tokenizer has {len(theirs)} tokens and the data's 3", f" {differing} of them differ")
        with refused(option="teacher.name", got="x", why=why):
            causal_lm.check_same_vocabulary(ours, Vocabulary(theirs), "teacher.name=x")
    with refused(option="teacher.name", got="x", why="has 1,500 tokens and the data's 3"):
        causal_lm.check_same_vocabulary(ours, Vocabulary({str(i): i for i in range(1500)}), "teacher.name=x")


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


def test_path_without_a_folder_is_refused_with_the_part_that_is_missing(calls, llama, monkeypatch):
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
    assert not calls


def test_home_folder_that_nothing_replaced_is_refused_with_its_path(calls, llama, monkeypatch):
    monkeypatch.setenv("HOME", str(llama.parent))
    why = "could not be loaded: ~ is not replaced here"
    with refused(option="teacher.name", got="~/llama", why=why, hint=f"type {llama}") as caught:
        build("~/llama")
    assert "has no folder" not in str(caught.value)
    with refused(option="teacher.name", got="~/lama", why="has no folder 'lama'", hint=f"type {llama}, if that"):
        build("~/lama")
    with refused(option="teacher.name", got="~nosuchuser/x", why="has no folder '~nosuchuser'"):
        build("~nosuchuser/x")
    assert not calls


def test_name_that_is_nowhere_is_refused_with_a_similar_folder_and_the_network(calls, llama, monkeypatch):
    monkeypatch.chdir(llama.parent)
    why = f"no folder {llama.parent / 'lama'}, and the Hub did not give it"
    hint = (f"type {llama}, if that is meant; else check the name and the network", "a downloaded model")
    with refused(option="teacher.name", got="lama", why=why, hint=hint):
        build("lama")


def test_folder_that_holds_no_model_is_not_offered(calls, llama, monkeypatch):
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


def test_path_is_refused_without_the_network(calls):
    for name in ("no such//name", "/no/folder"):
        with refused(option="teacher.name", got=name, why="could not be loaded: /", need="the folder of a model"):
            build(name)
    assert not calls


@pytest.mark.parametrize("name", ["no-such/model", "no-such-model"])
def test_name_that_is_nowhere_is_refused_at_once_and_says_what_to_do(calls, name):
    with refused(option="teacher.name", got=name, why="could not be loaded", hint="check the name and the network"):
        build(name)
    assert calls == [("huggingface.co", 443)]  # asked once, then never again


def test_folder_needs_no_network(calls, saved):
    build(saved / "llama")
    assert not calls


def text_and_tokenizer(folder: Path, vocab: dict[str, int] | None = None) -> tuple[Path, Path]:
    """A file of text, and a folder with a tokenizer of its words; vocab: more tokens."""
    words = [f"w{n}" for n in range(40)]
    ids = {word: n for n, word in enumerate(["<unk>", "</s>", *words])} | (vocab or {})
    fast = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    fast.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>", unk_token="<unk>").save_pretrained(folder / "tok")
    lines = (" ".join(random.Random(n).choices(words, k=40)) for n in range(200))
    folder.mkdir(exist_ok=True)
    (folder / "text.txt").write_text("\n\n".join(lines))
    return folder / "text.txt", folder / "tok"


def test_ids_with_holes_are_trained(tmp_path):
    text, name = text_and_tokenizer(tmp_path, {"w39": 500, "far": 777})
    words = f"data=text data.files={text} data.seq_len=32 data.val_rows=4 data.tokenizer={name} data.field=text"
    folder = here(tmp_path / "runs", *words.split(), "logits=none", "teacher=none", "trainer.steps=2")
    assert json.loads((folder / "student" / "config.json").read_text())["vocab_size"] == 778


def test_a_student_without_attention_learns_from_a_mixture_with_a_bos(tmp_path):
    text, name = text_and_tokenizer(tmp_path, {"<s>": 42})
    fast = PreTrainedTokenizerFast.from_pretrained(name, bos_token="<s>")
    fast.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 42)])
    for role, config in (("student", NO_ATTENTION["mamba"]), ("teacher", MIXTURES["mixtral"])):
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / role)
        fast.save_pretrained(tmp_path / role)
    words = f"data=text data.files={text} data.seq_len=32 data.val_rows=4 trainer.steps=2 optim=adamw"
    words += f" student=hub student.name={tmp_path / 'student'} teacher=hub teacher.name={tmp_path / 'teacher'}"
    folder = here(tmp_path / "runs", *words.split())
    result = json.loads((folder / "result.json").read_text())
    assert result["active_parameters"] == result["parameters"]
    assert result["teacher_active_parameters"] < result["teacher_parameters"]
    (data,) = (packing.open_packed(path) for path in (tmp_path / "runs" / "data").iterdir() if path.is_dir())
    assert (data.val[:, 0] == 42).all() and (data.val[:, 1:] == 42).any() and data.boundary == (1, 42)
    # The loss of plain transformers, on all labels but those in front of a text.
    rows, student = torch.from_numpy(data.val.astype(int)), folder / "student"
    model = transformers.AutoModelForCausalLM.from_pretrained(student).eval()
    labels = rows[:, 1:].masked_fill(rows[:, 1:] == 42, -100)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(rows[:, :-1]).logits[..., :43].flatten(0, 1), labels.flatten())
    assert result["final"]["val/lm"] == pytest.approx(loss.item(), rel=1e-4)
    bpb = loss.item() / math.log(2) / result["bytes_per_token"]
    assert result["final"]["val/bpb"] == pytest.approx(bpb, rel=1e-4)
    # A store of it holds the positions that count.
    offline = here(tmp_path / "runs", *words.split(), "logits=offline", "truncation=top_k", "truncation.k=5")
    assert json.loads((offline / "result.json").read_text())["final"]["val/lm"] > 0


# The end in what is exported

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<turn>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def ends(folder: Path) -> tuple:
    """Return the end tokens that config.json and generation_config.json name, and that plain transformers loads."""
    files = [json.loads((folder / "student" / f"{name}.json").read_text()) for name in ("config", "generation_config")]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder / "student")
    values = [*(file.get("eos_token_id") for file in files), loaded.generation_config.eos_token_id]
    assert values[0] == values[1] == values[2]
    return values[0]


@pytest.mark.parametrize(("data", "expected"), [("chat", 43), ("plain", [43, 1]), ("alpaca", 1), ("text", 1)])
def test_exported_student_ends_as_rows_did_in_training(tmp_path, data, expected):
    """A base model whose config names another end than its rows have."""
    text, name = text_and_tokenizer(tmp_path, {"<user>": 42, "<turn>": 43, "<assistant>": 44})
    fast = PreTrainedTokenizerFast.from_pretrained(name, chat_template=CHAT)
    fast.add_special_tokens({"additional_special_tokens": ["<user>", "<turn>", "<assistant>"]})
    fast.save_pretrained(tmp_path / "base")
    config = transformers.LlamaConfig(**GATED | {"vocab_size": 45}, eos_token_id=7, bos_token_id=3)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"w{n % 40} w{n // 40}", "response": f"w{n % 7}"} for n in range(80)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    base = tmp_path / "base"
    words = f"data.tokenizer={base} data.seq_len=64 data.val_rows=2 trainer.steps=1 optim=adamw "
    if data == "text":  # of a size, whose fresh config names 0
        words += f"data=text data.files={text} student=100k"
    else:
        words += f"data=instructions data.files={tmp_path / 'a.jsonl'} student=hub student.name={base}"
        words += " data.template=alpaca data.prompt_len=50" if data == "alpaca" else " data.template=chat"
    if data == "plain":
        words += f" lm=plain plain=text plain.files={text} alpha.peak=0.5 teacher=hub teacher.name={base}"
    else:
        words += " logits=none teacher=none"
    folder = here(tmp_path / "runs", *words.split())
    assert ends(folder) == expected


def test_rows_without_an_end_name_none(tmp_path):
    assert ends(here(tmp_path, "logits=none", "teacher=none", "trainer.steps=1")) is None


# Checkpoints that are no plain models

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


def test_a_model_that_is_not_run_as_others_are_is_refused(saved, monkeypatch):
    monkeypatch.setattr(causal_lm.CausalLM, "hidden_states", lambda self, ids: ids.no_such_thing)
    with refused(option="teacher.name", why=("LlamaForCausalLM could not be run", "AttributeError")):
        build(saved / "llama")


def test_a_model_without_a_cache_is_refused_before_it_trains_on_instructions(tmp_path):
    _, name = text_and_tokenizer(tmp_path)
    torch.manual_seed(0)
    transformers.MambaForCausalLM(NO_ATTENTION["mamba"]).save_pretrained(name)
    rows = [{"prompt": f"w{n % 40} w{n // 40}", "response": f"w{n % 7}"} for n in range(80)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = f"data=instructions data.files={tmp_path / 'a.jsonl'} data.template=plain student=hub student.name={name}"
    words += " data.seq_len=16 data.val_rows=2 logits=none teacher=none optim=adamw trainer.steps=3"
    with refused(why="MambaForCausalLM cannot read a text piece by piece"):
        here(tmp_path / "runs", *words.split())
    assert not list((tmp_path / "runs").glob("*/metrics.jsonl"))


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


def words_as_tokens(*names: str, special: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({name: n for n, name in enumerate(names)})))
    fast.add_special_tokens({"additional_special_tokens": list(special)})
    return fast


def test_renamed_special_tokens_are_named_and_accepted_where_that_is_typed():
    ours, theirs = words_as_tokens("a", "b", special=("<end>",)), words_as_tokens("a", "b", special=("<turn>",))
    why, hint = "id 2 is '<end>' in the data's and '<turn>' in its", ("ids are the same", "token_names=any")
    with refused(option="teacher.name", got="x", why=why, hint=hint):
        causal_lm.check_same_vocabulary(ours, theirs, "teacher.name=x")
    causal_lm.check_same_vocabulary(ours, theirs, "teacher.name=x", by_ids=True)


@pytest.mark.parametrize("theirs", [("a", "c"), ("b", "a"), ("a",), ("a", "b", "c")])
def test_other_tokens_and_other_ids_are_refused_whatever_is_typed(theirs):
    ours, other = words_as_tokens("a", "b", special=("<end>",)), words_as_tokens(*theirs, special=("<end>",))
    for by_ids in (False, True):
        with refused(why=(" is ", "in the data's and "), hint="choose a teacher and a student of one family"):
            causal_lm.check_same_vocabulary(ours, other, "teacher.name=x", by_ids)


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


def test_token_names_are_compared_as_typed(tmp_path):
    """A student whose special token has another name than the data's; the run has the same name either way."""
    text, name = text_and_tokenizer(tmp_path)
    shutil.copytree(name, tmp_path / "own")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        path = tmp_path / "own" / file
        path.write_text(path.read_text().replace("</s>", "<end>"))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**GATED | {"vocab_size": 42})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "own")
    words = (
        f"data=text data.files={text} data.seq_len=32 data.val_rows=2 data.tokenizer={name} logits=none teacher=none"
    )
    words += f" student=hub student.name={tmp_path / 'own'} optim=adamw trainer.steps=1"
    with refused(why="id 1 is '</s>' in the data's and '<end>' in its", hint="token_names=any"):
        here(tmp_path / "runs", *words.split())
    folder = here(tmp_path / "runs", *words.split(), "token_names=any")
    assert (folder / "result.json").exists()
    assert Plan.from_config(small_config(tmp_path / "runs", *words.split())).run.folder == folder
