"""Sizes, parameters and FLOPs are counted right."""

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from kd.config.sizes import SIZES, STUDENTS
from kd.models import causal_lm, flops
from kd.runs import identity
from tests.models.examples import CONFIGS, IDS, MIXTURES, T, V
from tests.refusals import refused

pytestmark = pytest.mark.usefixtures("connections")


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


def test_position_embeddings_are_embeddings():
    model = transformers.GPT2LMHeadModel(CONFIGS["gpt2"])
    assert flops.cost(model, T).non_embedding == sum(p.numel() for p in model.transformer.h.parameters()) + 2 * 32


def test_flops_grow_with_the_row_by_attention_alone():
    model = transformers.LlamaForCausalLM(CONFIGS["llama"])
    short, long = (flops.cost(model, t).flops_per_token for t in (10, 110))
    assert long - short == 2 * 2 * 32 * 100  # layers, products and width; per position, half of it seen
