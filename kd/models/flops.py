"""Parameters and FLOPs of models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from kd.errors import UserError
from kd.models.adapters import WEIGHTS
from kd.models.causal_lm import from_size
from kd.models.hub import BASE, _FromConfig, adapter_base, config_of, from_hub


class Cost(NamedTuple):
    """Size of a model, and its forward FLOPs per token."""

    parameters: int
    non_embedding: int
    flops_per_token: float
    output: int = 0  # parameters of the output layer
    active_parameters: int | None = None  # that a token uses, fewer in a mixture of experts; None: not known


def cost(model, seq_len: int) -> Cost:
    """Return parameters and forward FLOPs per token: 2 per weight of every matrix, and 4 T D per layer for attention.

    Kaplan et al. 2020, arXiv 2001.08361, section 2.1, with the output layer counted; attention is over T/2 on average.
    An adapter is not counted, since it is merged in the end.
    In a mixture of experts, only the experts that a token is sent to count. The scan of a state-space layer is not
    counted.
    """
    config = model.config.get_text_config()
    output = model.get_output_embeddings().weight
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}  # of tokens and positions
    total = sum(map(_size, _weights(model)))
    inner = total - sum(w.numel() for w in embeddings | {output})
    idle = sum(round(p.numel() * (1 - share)) for module, share in experts(model) for p in _weights(module))
    heads = getattr(config, "num_attention_heads", None) or 0  # none in a state-space model
    head = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    key, value = getattr(config, "qk_head_dim", None) or head, getattr(config, "v_head_dim", None) or head  # DeepSeek
    attention = 2 * attention_layers(config) * heads * (key + value) * seq_len / 2
    return Cost(total, inner, 2 * (inner - idle + output.numel()) + attention, output.numel(), total - idle)


def _size(parameter: torch.Tensor) -> int:
    """Return the number of weights of a parameter; those of 4 bits are two to a number."""
    packed_from = getattr(parameter, "quant_state", None)  # of bitsandbytes
    return parameter.numel() if packed_from is None else packed_from.shape.numel()


def _weights(module: nn.Module) -> list[nn.Parameter]:
    """Return the weights of a module without those of an adapter."""
    return [weight for name, weight in module.named_parameters() if not any(part in name for part in WEIGHTS)]


def step_flops(cost: Cost, trainable: int) -> float:
    """Return the FLOPs per token of a forward and a backward pass. trainable: number of weights that learn.

    Frozen matrices need no gradient, a third less. The weights of an adapter are added to them.
    """
    if trainable == cost.parameters:
        return 3 * cost.flops_per_token
    return 2 * cost.flops_per_token + 6 * trainable


# Names in configs for the number of experts, and for the number of experts per token.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")
EXPERTS_PER_TOKEN = (
    "num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_top_k", "moe_topk", "moe_k", "top_k",
)  # fmt: skip


def experts(model) -> Iterator[tuple[nn.Module, float]]:
    """Yield the modules that hold the routed experts of a layer, and the share of experts that a token is sent to."""
    config = model.config.get_text_config()
    expert_prefixes: tuple[str, ...] = ()
    for name, module in model.named_modules():
        path, _, leaf = name.rpartition(".")
        routed = leaf == "experts" or (type(module).__name__.endswith("Experts") and "shared" not in leaf)
        if not routed or name.startswith(expert_prefixes):
            continue
        expert_prefixes = (*expert_prefixes, f"{name}.")  # modules within belong to it
        parent = model.get_submodule(path)
        places = (module, parent, *parent.children(), config, getattr(config, "ffn_config", None))
        count = _first_number(places, EXPERTS)
        chosen = _first_number((config, getattr(config, "ffn_config", None), *places), EXPERTS_PER_TOKEN)
        if not count or not chosen:
            raise UserError(
                f"{type(model).__name__} has experts in {name}, and its config has none of the names that kd knows for "
                "the number of experts and the number of experts that a token uses",
                hint="choose another model, or add the names to EXPERTS and EXPERTS_PER_TOKEN in kd/models/flops.py",
            )
        yield module, min(1.0, chosen / count)


def _first_number(places: Iterable, names: Iterable[str]) -> float | None:
    for place in places:
        for name in names:
            value = getattr(place, name, None)
            if isinstance(value, list) and value:  # one for each layer
                value = sum(value) / len(value)
            if type(value) is int or type(value) is float:
                return value
    return None


def attention_layers(config) -> int:
    """Return the number of layers with attention over all earlier tokens."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if not kinds:
        return config.num_hidden_layers
    other = ("mamba", "linear", "conv", "recurrent", "moe", "mlp")
    return sum(not any(word in kind for word in other) for kind in kinds)


def cost_of(size: str | None, name: str | None, vocab: int, seq_len: int, option: str) -> Cost:
    """Return the cost of a model of build_model() from its shape alone; no weights are made or read."""
    return cost(shape_of(size, name, vocab, seq_len, option), seq_len)


def shape_of(size: str | None, name: str | None, vocab: int, seq_len: int, option: str) -> nn.Module:
    """Return a model of build_model() on the device meta, which holds no weights."""
    with torch.device("meta"):
        if size:
            return from_size(size, vocab, seq_len)
        assert name, "a model without a size has a name"
        base = adapter_base(name, option)
        config = config_of(base, f"{option}={name} {BASE}") if base else config_of(name, option)
        return from_hub(_FromConfig, name, f"{option}={name}", config=config)
