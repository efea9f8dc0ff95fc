"""Pruning: a smaller model of the same architecture, with some layers, neurons, heads and channels of a trained one.

Depth: DistilBERT (Sanh et al. 2019, arXiv 1910.01108) and ShortGPT (Men et al. 2024, arXiv 2403.03853). Width: Minitron
(Muralidharan et al. 2024, arXiv 2407.14679). What is left keeps its weights; nothing is trained here.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kd.errors import UserError


class Family(NamedTuple):
    """Names of modules of an architecture, and the widths that can be cut in it."""

    layers: str = "model.layers"
    attention_output: str = "self_attn.o_proj"  # its input has the channels of all heads
    ffn_output: str = "mlp.down_proj"  # its input has the neurons
    final_norm: str = "model.norm"
    widths: tuple[str, ...] = ("ffn", "kv_heads", "hidden")
    ffn_size: str = "intermediate_size"  # in the config


LLAMA = Family()
GEMMA = Family(widths=("ffn", "kv_heads"))  # embeddings are multiplied by a root of the width
FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3", "olmo", "olmo2"), LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text"), GEMMA),
    "phi": Family("model.layers", "self_attn.dense", "mlp.fc2", "model.final_layernorm"),
    # Their width of a head is hidden / heads, without an option in the config.
    "gpt2": Family("transformer.h", "attn.c_proj", "mlp.c_proj", "transformer.ln_f", ("ffn",), "n_inner"),
    "gpt_neox": Family(
        "gpt_neox.layers", "attention.dense", "mlp.dense_4h_to_h", "gpt_neox.final_layer_norm", ("ffn",)
    ),
}  # fmt: skip
# Axes of weights by the last names of their module, output first. Axes that are not named stay whole.
AXES: dict[str, tuple[str | None, str | None]] = {
    **dict.fromkeys(("embed_tokens", "lm_head"), (None, "hidden")),
    **dict.fromkeys(("self_attn.o_proj", "self_attn.dense"), ("hidden", "heads")),
    **dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj", "self_attn.k_norm"), ("kv_heads", "hidden")),
    **dict.fromkeys(("self_attn.q_proj", "self_attn.q_norm"), ("heads", "hidden")),
    "self_attn.qkv_proj": ("qkv", "hidden"),
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj", "mlp.fc1"), ("ffn", "hidden")),
    **dict.fromkeys(("mlp.dense_h_to_4h", "mlp.c_fc"), ("ffn", None)),
    **dict.fromkeys(("mlp.down_proj", "mlp.fc2"), ("hidden", "ffn")),
    **dict.fromkeys(("mlp.dense_4h_to_h", "mlp.c_proj"), (None, "ffn")),
    "mlp.gate_up_proj": ("gate_up", "hidden"),
    **dict.fromkeys(
        ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
         "norm", "final_layernorm"), ("hidden", None),
    ),
}  # fmt: skip
PER_LAYER = ("layer_types", "no_rope_layers")  # lists in a config with an entry per layer


class Widths(NamedTuple):
    """Sizes of a smaller model; None for those of the whole one."""

    ffn: int | None = None
    kv_heads: int | None = None
    hidden: int | None = None


class Importance(NamedTuple):
    """Scores of the parts of a model, from activations; the higher, the more a part does (see importance.py)."""

    layers: Tensor  # [L], block influence
    ffn: Tensor  # [L, F], neurons
    kv_heads: Tensor  # [L, G], groups of query heads
    hidden: Tensor  # [D], channels


class Parts(NamedTuple):
    """Indices of what stays; None for all. Neurons and groups are chosen for each of the layers that stay."""

    layers: list[int]
    ffn: list[Tensor] | None = None
    kv_heads: list[Tensor] | None = None
    hidden: Tensor | None = None


def family_of(config) -> Family:
    """Return the names of an architecture's modules; raise UserError for one that kd cannot prune."""
    if config.model_type not in FAMILIES or getattr(config, "scale_attn_by_inverse_layer_idx", False):
        scaled = config.model_type in FAMILIES
        raise UserError(
            option="start",
            got="teacher",
            why=f"the teacher is of the architecture {config.model_type}"
            + (", and divides its attention by the number of the layer" if scaled else ""),
            need=f"one of {', '.join(FAMILIES)}",
            hint="choose another teacher, or a student of its own: start=scratch student=hub student.name=…",
        )
    family = FAMILIES[config.model_type]
    if getattr(config, "qk_layernorm", False):  # of Phi, with hidden / heads as the width of a head
        return family._replace(widths=("ffn",))
    return family


def choose_layers(total: int, count: int, keep: str, influence: Sequence[float] = ()) -> list[int]:
    """Return `count` of the layers 0 … total - 1, in their order.

    uniform: evenly spread, with the first and the last (arXiv 1910.01108); a single one is the last. every: the first
    of each of `count` equal parts. influence: those of the highest influence [total] (arXiv 2403.03853).
    """
    if keep == "influence":
        ranked = sorted(range(total), key=lambda i: (-float(influence[i]), i))
        return sorted(ranked[:count])
    if keep == "every":
        return [i * total // count for i in range(count)]
    return [round(i * (total - 1) / (count - 1)) for i in range(count)] if count > 1 else [total - 1]


def highest(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` highest scores [n], in their order; of equal scores the first ones."""
    return torch.sort(scores, descending=True, stable=True).indices[:count].sort().values


def choose_parts(layers: list[int], widths: Widths, importance: Importance | None) -> Parts:
    """Return the most important neurons, groups and channels of these layers."""
    parts = Parts(layers)
    if importance is None:
        return parts
    if count := widths.ffn:
        parts = parts._replace(ffn=[highest(importance.ffn[i], count) for i in layers])
    if count := widths.kv_heads:
        parts = parts._replace(kv_heads=[highest(importance.kv_heads[i], count) for i in layers])
    if count := widths.hidden:
        parts = parts._replace(hidden=highest(importance.hidden, count))
    return parts


def check_layers(total: int, layers: int | Sequence[int] | None) -> None:
    """Raise UserError for more layers than there are, and for a list that names one twice or out of order."""
    if isinstance(layers, int) and layers > total:
        why, need = f"the teacher has {total} layers", f"at most {total}"
        hint = f"type e.g. start.layers={max(1, total - 1)}"
        raise UserError(option="start.layers", got=layers, why=why, need=need, hint=hint)
    if isinstance(layers, Sequence):
        in_order = all(type(i) is int for i in layers) and list(layers) == sorted(set(layers))
        if not layers or not in_order or not 0 <= layers[0] <= layers[-1] < total:
            need = f"numbers of layers from 0 to {total - 1}, each once and in order"
            hint = f"type e.g. start.layers=[{','.join(map(str, choose_layers(total, min(3, total), 'uniform')))}]"
            raise UserError(option="start.layers", got=list(layers), need=need, hint=hint)


def pruned_config(config, layers: Sequence[int], widths: Widths):
    """Return the config of a model with these layers and widths; raise UserError for a width that it cannot have.

    Entries per layer go with their layers. The width of a head stays.
    """
    family, new = family_of(config), copy.deepcopy(config)
    sizes = {"ffn": ffn_size(config), "kv_heads": kv_heads(config), "hidden": config.hidden_size}
    for name, count in widths._asdict().items():
        if count is None:
            continue
        if count > sizes[name]:
            why, hint = f"the teacher has {sizes[name]}", f"type start.{name}={sizes[name]} or less"
            raise UserError(option=f"start.{name}", got=count, why=why, need=f"at most {sizes[name]}", hint=hint)
        if name not in family.widths and count < sizes[name]:
            able = ", ".join(f"start.{width}" for width in family.widths)
            why = f"kd cannot cut this width of the architecture {config.model_type}"
            raise UserError(option=f"start.{name}", got=count, why=why, need=able, hint=f"leave start.{name} out")
    for name in PER_LAYER:
        if getattr(config, name, None):
            setattr(new, name, [getattr(config, name)[i] for i in layers])
    if getattr(config, "max_window_layers", None) is not None:  # layers from this one on have a window
        new.max_window_layers = sum(i < config.max_window_layers for i in layers)
    new.num_hidden_layers = len(layers)
    heads, groups, hidden = config.num_attention_heads, kv_heads(config), widths.hidden or config.hidden_size
    if widths.kv_heads or widths.hidden:
        new.head_dim = head_dim(config)
        new.num_key_value_heads = widths.kv_heads or groups
        new.num_attention_heads = heads // groups * new.num_key_value_heads
        new.hidden_size = hidden
        if hidden % new.num_attention_heads:  # transformers refuses such a config
            option = "hidden" if widths.hidden else "kv_heads"
            raise UserError(
                option=f"start.{option}",
                got=getattr(widths, option),
                why=f"{hidden} channels are not a multiple of {new.num_attention_heads} heads",
                need="channels that are a multiple of the heads",
                hint="choose another number of channels or of key-value heads",
            )
        if abs(config.initializer_range - config.hidden_size**-0.5) < 1e-9:  # as kd's sizes have it
            new.initializer_range = hidden**-0.5
    if widths.ffn:
        setattr(new, family.ffn_size, widths.ffn)
    return new


def ffn_size(config) -> int:
    """Return the neurons of a feed-forward layer; GPT-2 names them only if they are not four times the width."""
    return getattr(config, family_of(config).ffn_size) or 4 * config.hidden_size


def kv_heads(config) -> int:
    """Return the number of key-value heads, which is that of the groups of query heads."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def head_dim(config) -> int:
    """Return the width of a head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def pruned_model(model, parts: Parts, config):
    """Return a model of `config`, from pruned_config(), with the weights of `parts` of a Hugging Face causal LM."""
    new = type(model)(config).to(next(model.parameters()).dtype)
    family, old = family_of(model.config), model.state_dict()
    weights = {}
    for name in new.state_dict():
        layer, source = None, name
        if name.startswith(f"{family.layers}."):
            number, _, rest = name.removeprefix(f"{family.layers}.").partition(".")
            layer = int(number)
            source = f"{family.layers}.{parts.layers[layer]}.{rest}"
        axes, indices = _axes(name, old[source], model.config), _indices(parts, layer, model.config)
        weights[name] = _selected(old[source].cpu(), axes, indices)
    new.load_state_dict(weights)
    return new


def _axes(name: str, weight: Tensor, config) -> tuple[str | None, ...]:
    """Return the axes of a weight by its name. A norm that all heads share has none of them."""
    names = name.split(".")[:-1]  # without weight or bias
    module = next((m for m in (".".join(names[-2:]), names[-1]) if m in AXES), None)
    if module is None or (module.endswith(("q_norm", "k_norm")) and len(weight) == head_dim(config)):
        return (None,) * weight.ndim
    output, inputs = AXES[module]
    if weight.ndim == 1:
        return (output,)
    return (inputs, output) if config.model_type == "gpt2" else (output, inputs)  # GPT-2 has inputs first


def _indices(parts: Parts, layer: int | None, config) -> dict[str, Tensor]:
    """Return the indices that stay on each axis in a layer, number `layer` of the new model."""
    indices = {} if parts.hidden is None else {"hidden": parts.hidden}
    if layer is None:
        return indices
    if parts.ffn is not None:
        neurons = parts.ffn[layer]
        indices |= {"ffn": neurons, "gate_up": torch.cat([neurons, neurons + ffn_size(config)])}
    if parts.kv_heads is not None:
        width, groups, heads = head_dim(config), kv_heads(config), config.num_attention_heads
        keys = _channels(parts.kv_heads[layer], width)
        queries = _channels(parts.kv_heads[layer], heads // groups * width)
        qkv = torch.cat([queries, keys + heads * width, keys + (heads + groups) * width])
        indices |= {"heads": queries, "kv_heads": keys, "qkv": qkv}
    return indices


def _channels(blocks: Tensor, width: int) -> Tensor:
    """Return the channels of blocks of `width` channels each."""
    return (blocks[:, None] * width + torch.arange(width)).flatten()


def _selected(weight: Tensor, axes: tuple[str | None, ...], indices: dict[str, Tensor]) -> Tensor:
    for dim, axis in enumerate(axes):
        if axis in indices:
            weight = weight.index_select(dim, indices[axis])
    return weight
