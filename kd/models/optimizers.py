"""Optimizers in addition to torch.optim: (groups of parameters) -> optimizer.

A group's `width` is that of its model for inner matrices and an output layer of its own, None for embeddings and
vectors. A group's `scale` multiplies the learning rate of each step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kd.errors import UserError, check
from kd.models.causal_lm import CausalLM


def mup(
    params: list[dict], base_width: int = 64, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
    weight_decay: float = 0.1,
) -> torch.optim.Optimizer:  # fmt: skip
    """AdamW whose learning rate carries over to other widths: times base_width / width in inner matrices.

    muP in its simple form: Wortsman et al. 2023, arXiv 2309.14322, section 3.2; Yang et al. 2022, arXiv 2203.03466. The
    latter also divide the logits of an output layer that is tied to the embedding, which is not done here. The rate
    carried over from a width of 64 to 192 (docs/results.md); widths of thousands are untested. The decay per step does
    not depend on width. Raises UserError for a base_width below 1.
    """
    check("optim.base_width", base_width, base_width >= 1, "a width of at least 1, e.g. 64, that of size 100k")
    groups = []
    for group in params:
        scale = base_width / group["width"] if group["width"] else 1.0
        groups.append({"weight_decay": weight_decay / scale, **group, "scale": scale})
    return torch.optim.AdamW(groups, betas=betas, eps=eps)


def adamw8(
    params: list[dict], betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8, weight_decay: float = 0.1
) -> torch.optim.Optimizer:  # fmt: skip
    """AdamW whose two moments are held in 8 bits, rounded in blocks of 256 by bitsandbytes.

    Dettmers et al. 2022, arXiv 2110.02861. Moments of fewer than 4,096 weights have 32 bits. Raises UserError without
    the package.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        need, hint = "the package bitsandbytes", "type pip install 'kd[bitsandbytes]', or optim=adamw"
        raise UserError(option="optim", got="adamw8", need=need, hint=hint) from error
    return AdamW8bit(params, betas=betas, eps=eps, weight_decay=weight_decay)


def parameter_groups(causal: CausalLM) -> list[dict]:
    """Return the parameters that learn, in groups: inner matrices, embeddings, and vectors, which have no weight decay.

    An untied output layer is an inner matrix. One that is tied to the embedding is not.
    """
    model = causal.model
    outer = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    kinds: dict[str, list[Tensor]] = {"inner": [], "outer": [], "vectors": []}
    for p in filter(lambda p: p.requires_grad, model.parameters()):
        kinds["vectors" if p.ndim <= 1 else "outer" if id(p) in outer else "inner"].append(p)
    groups = [
        {"params": kinds["inner"], "width": model.config.get_text_config().hidden_size},
        {"params": kinds["outer"], "width": None},
        {"params": kinds["vectors"], "width": None, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
