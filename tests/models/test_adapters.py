"""Adapters of models: the update is right, nothing else learns, and the merged model computes the same."""

import json
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from kd.models import adapters, causal_lm, flops
from kd.models.optimizers import parameter_groups
from kd.objective.chunked import Objective
from tests.cases import option
from tests.refusals import refused

V, T = 90, 32
SHAPE = dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
             intermediate_size=48, num_key_value_heads=2)  # fmt: skip
CONFIGS = {
    "llama": transformers.LlamaConfig(**SHAPE),
    "llama-tied": transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "gpt2": transformers.GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0,
                                    embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0),
    "gemma2": transformers.Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=0.2),
    "mixtral": transformers.MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
}  # fmt: skip
IDS = torch.arange(2 * T).view(2, T) * 7 % 80
UNTIED = {"llama": True, "mixtral": True}


def model_of(name: str) -> causal_lm.CausalLM:
    torch.manual_seed(0)
    return causal_lm.CausalLM(transformers.AutoModelForCausalLM.from_config(CONFIGS[name]), V)


def logits(model: causal_lm.CausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model.head(model.hidden_states(IDS))


def trained(model: causal_lm.CausalLM) -> causal_lm.CausalLM:
    """The model with other weights in its adapter."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.1)
    return model


@pytest.mark.parametrize(
    ("rank", "rslora", "expected"), [(1, False, [[1.0, 2.0], [0.0, 0.0]]), (4, False, [[0.25, 0.5], [0.0, 0.0]]),
                                     (4, True, [[0.5, 1.0], [0.0, 0.0]])],
)  # fmt: skip
def test_the_update_is_alpha_over_the_rank_times_b_a(rank, rslora, expected):
    """Worked by hand: A = [[0.5, 1]], B = [[1], [0]], alpha = 2; the other rows of A and columns of B are 0."""
    config = transformers.LlamaConfig(**SHAPE | dict(hidden_size=2, num_attention_heads=1, num_key_value_heads=1))
    model = causal_lm.CausalLM(transformers.LlamaForCausalLM(config), V)
    matrix = model.model.model.layers[0].self_attn.q_proj.weight.clone()
    adapters.lora(model, rank=rank, alpha=2, targets="q_proj", rslora=rslora)
    layer = model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        for part, values in ((layer.lora_A, [[0.5, 1.0]]), (layer.lora_B, [[1.0], [0.0]])):
            weight = part["default"].weight.zero_()
            weight[: len(values), : len(values[0])] = torch.tensor(values)
    adapters.merge(model)
    change = model.model.model.layers[0].self_attn.q_proj.weight - matrix
    torch.testing.assert_close(change, torch.tensor(expected))


@pytest.mark.parametrize("name", CONFIGS)
def test_before_the_first_step_nothing_changes_and_afterwards_the_merged_model_computes_the_same(name):
    model = model_of(name)
    before, cost, names = logits(model), flops.cost(model.model, T), dict(model.named_parameters()).keys()
    adapters.lora(model, rank=4, head=name in UNTIED)
    assert torch.equal(logits(model), before)
    assert flops.cost(model.model, T) == cost
    after = logits(trained(model))
    assert (after - before).abs().max() > 1e-3
    adapters.merge(model)
    torch.testing.assert_close(logits(model), after, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.model(IDS).logits, after, rtol=1e-4, atol=1e-5)
    assert dict(model.named_parameters()).keys() == names and not adapters.is_adapted(model)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_model_under_an_adapter_computes_as_ever_on_the_same_weights(name):
    model = model_of(name)
    before = logits(model)
    adapters.lora(model, rank=4, head=name in UNTIED)
    base = adapters.without_adapter(model).eval()
    trained(model)
    assert torch.equal(logits(base), before) and not torch.equal(logits(model), before)
    assert model.model.training and adapters.share_weights(model, base)
    assert not adapters.share_weights(model, model_of(name)) and not adapters.share_weights(model, None)
    ours = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in base.parameters()} <= ours  # in memory once
    assert not [name for name, _ in base.named_parameters() if "lora" in name]


def test_only_the_adapter_learns_also_in_the_output_layer():
    """Compute one micro-batch in chunks, as a step does."""
    model = model_of("llama")
    adapters.lora(model, rank=4, head=True)
    trained(model)  # as B = 0 has no gradient in A
    objective = Objective(*(option(*x) for x in (("loss", "fkl"), ("truncation", "full"), ("target", "renormalise"),
                                                 ("temperature", "fixed"))), chunk=5)  # fmt: skip
    hidden = model.hidden_states(IDS).flatten(0, 1)
    objective.language_modelling(model.head, hidden, IDS.flatten()).backward()
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()} == learned
    assert len(learned) == 2 * (2 * 7 + 1) and sum("lm_head.lora" in name for name in learned) == 2
    assert adapters.trainable(model) == sum(p.numel() for group in parameter_groups(model) for p in group["params"])
    whole = model.model(IDS).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(whole, IDS.flatten(), reduction="sum")
    grads = torch.autograd.grad(expected, [p for p in model.parameters() if p.requires_grad])
    for p, grad in zip((p for p in model.parameters() if p.requires_grad), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("targets", "count"),
    [("all-linear", 14), ("q_proj", 2), (["q_proj", "mlp.up_proj"], 4), (["layers.1.self_attn.q_proj"], 1)],
)
def test_modules_are_chosen_by_name(targets, count):
    model = model_of("llama-tied")
    adapters.lora(model, rank=3, targets=targets)
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == count


@pytest.mark.parametrize(
    ("name", "settings", "fields"),
    [
        ("llama", {"rank": 0}, {"option": "adapter.rank", "need": "at least 1"}),
        ("llama", {"alpha": 0}, {"option": "adapter.alpha", "need": "above 0"}),
        ("llama", {"export": "all"}, {"option": "adapter.export", "need": "merged or both"}),
        ("llama", {"targets": ["q_proj", "qkv"]}, {"option": "adapter.targets", "got": "qkv", "need": "k_proj, o"}),
        ("llama", {"targets": ["lm_head"]}, {"option": "adapter.targets", "hint": "adapter.head=true"}),
        ("llama", {"targets": "embed_tokens"}, {"option": "adapter.targets", "need": "names of matrices"}),
        ("llama", {"targets": []}, {"option": "adapter.targets", "need": "all-linear"}),
        ("llama-tied", {"head": True}, {"option": "adapter.head", "why": "its embedding too"}),
    ],
)
def test_settings_that_a_model_cannot_have_are_refused(name, settings, fields):
    with refused(**fields):
        adapters.lora(model_of(name), **settings)


def test_without_peft_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with refused(option="adapter", got="lora", hint="pip install 'kd[peft]'"):
        adapters.lora(None)


def test_a_merge_that_changes_the_logits_is_refused(monkeypatch):
    model = model_of("llama")
    adapters.lora(model, rank=4)
    trained(model)
    monkeypatch.setattr(type(adapters._layers(model.model)[0][1]), "merge", lambda layer, safe_merge: None)
    with refused(option="adapter", why="changes a logit by"):
        adapters.merge(model)


def test_a_digest_is_of_the_frozen_weights():
    model = model_of("llama")
    assert adapters.frozen_digest(model) is None
    adapters.lora(model, rank=4)
    before = adapters.frozen_digest(model)
    assert adapters.frozen_digest(trained(model)) == before
    with torch.no_grad():
        model.model.model.norm.weight[0] += 1e-6
    assert adapters.frozen_digest(model) != before


def test_flops_of_a_step_are_those_of_the_products_that_are_computed():
    """Count with torch. Attention and the first layer's unneeded gradients are small here, as the sequence is short."""
    model = model_of("llama")
    cost = flops.cost(model.model, 4)
    whole = counted(model)
    assert whole == pytest.approx(flops.step_flops(cost, adapters.trainable(model)), rel=0.03)
    adapters.lora(model, rank=4)
    ours = flops.step_flops(cost, adapters.trainable(model))
    assert counted(model) == pytest.approx(ours, rel=0.08) and ours < 0.95 * whole


def counted(model: causal_lm.CausalLM) -> float:
    ids = IDS[:, :4]
    with FlopCounterMode(display=False) as counter:
        model.model(ids, use_cache=False).logits.sum().backward()
    return counter.get_total_flops() / ids.numel()


def test_the_adapter_alone_is_one_of_peft_and_of_kd(tmp_path):
    from peft import PeftModel

    base = tmp_path / "base"
    model = model_of("llama")
    model.model.save_pretrained(base)
    adapters.lora(model, rank=4, alpha=8, rslora=True, head=True)
    expected = logits(trained(model))
    adapters.save(model, tmp_path / "adapter", str(base))
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == 2 * 15
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))(IDS).logits
    torch.testing.assert_close(loaded, expected, rtol=1e-4, atol=1e-5)
    again = causal_lm.build_model(None, str(tmp_path / "adapter"), V, T, "student.name")
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-5)
