"""Importance of the layers, neurons, heads and channels of a model, from its activations on some rows of text.

One forward pass measures all of them, by hooks. Padding does not count.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from kd.models.prune import Importance, family_of, kv_heads


class ActivationScores:
    """Scores of channels: square root of the sum over sequences of (mean over tokens of |a|)².

    Minitron, arXiv 2407.14679, section 2.2.
    """

    def __init__(self) -> None:
        self.squares: Tensor | float = 0.0

    def add(self, activations: Tensor, mask: Tensor) -> None:
        """Add sequences [B, T, n] with the tokens of a mask [B, T]."""
        weights = mask / mask.sum(1, keepdim=True).clamp(min=1)  # [B, T]
        means = torch.einsum("bt,btn->bn", weights, activations.float().abs())
        self.squares = self.squares + means.double().square().sum(0).cpu()

    def result(self) -> Tensor:
        """Return the scores [n]."""
        assert isinstance(self.squares, Tensor), "no activations were added"
        return self.squares.sqrt()


class BlockInfluence:
    """Influence of a layer: 1 - the mean over tokens of the cosine of its input and output.

    ShortGPT, arXiv 2403.03853, equation 1; padding is left out, which their code counts.
    """

    def __init__(self) -> None:
        self.total, self.tokens = 0.0, 0

    def add(self, before: Tensor, after: Tensor, mask: Tensor) -> None:
        """Add the input and the output of a layer [B, T, D] at the tokens of a mask [B, T]."""
        cosine = functional.cosine_similarity(before.float(), after.float(), dim=-1)
        self.total += cosine[mask].double().sum().item()
        self.tokens += int(mask.sum())

    def result(self) -> float:
        return 1 - self.total / max(1, self.tokens)


class Rows(NamedTuple):
    """Rows of text, some of them with padding at their end."""

    ids: Tensor  # [B, T]
    mask: Tensor  # [B, T], False at padding
    positions: Tensor | None = None  # [B, T], places of tokens in their documents; None for one document per row


def measure(model, batches: Iterable[Rows]) -> Importance:
    """Return the importance of the parts of a Hugging Face causal LM on some rows."""
    family, config = family_of(model.config), model.config
    layers = list(model.get_submodule(family.layers))
    influence = [BlockInfluence() for _ in layers]
    neurons, heads = ([ActivationScores() for _ in layers] for _ in range(2))
    norms: list[ActivationScores] = []
    mask = torch.empty(0)
    handles = []

    def input_hook(scores: ActivationScores):
        return lambda module, inputs: scores.add(inputs[0], mask)

    def influence_hook(one: BlockInfluence):
        def hook(module, inputs, given, output) -> None:
            before = inputs[0] if inputs else given["hidden_states"]
            one.add(before, output[0] if isinstance(output, tuple) else output, mask)

        return hook

    def output_hook(module: nn.Module):
        norms.append(ActivationScores())
        scores = norms[-1]
        return module.register_forward_hook(lambda module, inputs, output: scores.add(output, mask))

    for i, layer in enumerate(layers):
        handles += [
            layer.register_forward_hook(influence_hook(influence[i]), with_kwargs=True),
            layer.get_submodule(family.ffn_output).register_forward_pre_hook(input_hook(neurons[i])),
            layer.get_submodule(family.attention_output).register_forward_pre_hook(input_hook(heads[i])),
            *(output_hook(child) for name, child in layer.named_children() if "norm" in name or name.startswith("ln_")),
        ]
    handles.append(output_hook(model.get_submodule(family.final_norm)))
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for rows in batches:
                mask = rows.mask
                places = {} if rows.positions is None else {"position_ids": rows.positions}
                model.base_model(input_ids=rows.ids, use_cache=False, **places)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    per_head = torch.stack([scores.result() for scores in heads]).unflatten(1, (kv_heads(config), -1))  # [L, G, ·]
    return Importance(
        torch.tensor([one.result() for one in influence], dtype=torch.float64),
        torch.stack([scores.result() for scores in neurons]),
        per_head.square().sum(-1).sqrt(),
        torch.stack([scores.result() for scores in norms]).sum(0),
    )
