"""Layers that are computed again in the backward pass: the same gradients, with less in memory."""

import shutil

import pytest
import torch
import transformers

from kd.models import adapters
from kd.models.causal_lm import CausalLM
from kd.rollout import generate
from tests.models.examples import CONFIGS, IDS, T, V
from tests.refusals import refused
from tests.small import here, outcome

every_model = pytest.mark.parametrize("name", CONFIGS)


def model(name: str, checkpointing: bool) -> CausalLM:
    torch.manual_seed(0)
    built = CausalLM(transformers.AutoModelForCausalLM.from_config(CONFIGS[name]), V)
    if checkpointing:
        built.checkpoint_layers()
    return built.train()


def gradients(model: CausalLM) -> dict[str, torch.Tensor]:
    """Gradients of a loss of the hidden states and of the head."""
    logits = model.head(model.hidden_states(IDS))
    logits.log_softmax(-1).gather(-1, IDS[..., None].roll(-1, 1)).mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def saved_bytes(model: CausalLM) -> int:
    """Bytes that the body keeps for its backward pass."""
    sizes: dict[int, int] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        hidden = model.hidden_states(IDS)
    del hidden
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for place, size in sizes.items() if place not in weights)


@every_model
def test_gradients_are_the_same_bit_for_bit(name):
    plain, again = (gradients(model(name, on)) for on in (False, True))
    assert plain.keys() == again.keys() and len(plain) > 5
    for key, gradient in plain.items():
        assert torch.equal(gradient, again[key]), key


def test_weights_behind_frozen_embeddings_get_their_gradients():
    """Freeze all but one matrix of each layer, as an adapter does."""
    by_run = []
    for on in (False, True):
        one = model("llama", on)
        for key, p in one.named_parameters():
            p.requires_grad_("q_proj" in key)
        by_run.append(gradients(one))
    plain, again = by_run
    assert len(plain) == len(again) == 2
    assert all(torch.equal(plain[key], again[key]) and plain[key].any() for key in plain)


def test_an_adapter_gets_the_same_gradients():
    pytest.importorskip("peft")
    outcomes = []
    for on in (False, True):
        one = model("llama", False)
        torch.manual_seed(1)
        adapters.lora(one, rank=2)
        for name, p in one.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(p)  # as after some steps
        if on:
            one.checkpoint_layers()
        outcomes.append(gradients(one))
    plain, again = outcomes
    assert len(plain) == len(again) > 5 and all(torch.equal(plain[key], again[key]) for key in plain)


@every_model
def test_less_is_kept_for_the_backward_pass(name):
    assert saved_bytes(model(name, True)) < 0.5 * saved_bytes(model(name, False))


def test_a_cache_of_earlier_tokens_works_beside_it():
    one = model("llama", True)
    with torch.no_grad(), generate.eval_mode(one):
        generate.check(one, T)  # reads a text in parts, and compares
    assert one.training and one.model.model.layers[0].gradient_checkpointing


def test_a_model_without_such_layers_is_refused(monkeypatch):
    monkeypatch.setattr(transformers.LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with refused(option="trainer.gradient_checkpointing", got=True, why="LlamaForCausalLM", hint="trainer.micro_batch"):
        model("llama", True)


@pytest.mark.parametrize("source", ["online", "cotrained"])
def test_a_run_is_the_same_with_it(trained_root, tmp_path, source):
    runs = []
    for name, words in (("plain", ()), ("again", ("trainer.gradient_checkpointing=true",))):
        root = shutil.copytree(trained_root, tmp_path / name)
        runs.append(here(root, f"logits={source}", "trainer.steps=3", "trainer.val_every=3", *words))
    assert runs[0].name == runs[1].name and outcome(runs[0]) == outcome(runs[1])
