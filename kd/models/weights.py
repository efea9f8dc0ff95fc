"""Weights of a frozen model in memory: float32, bfloat16, or 8 or 4 bits for the matrices of its layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from kd.errors import UserError
from kd.models.causal_lm import CausalLM
from kd.models.flops import Cost
from kd.system.hardware import cast_parameters

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "nf4": 0.52}  # of a weight, with its share of the scales
QUANTISED = ("int8", "nf4")
MOST_LEFT = 0.1  # share of the weights inside the layers that may stay as they are


class Int8Linear(nn.Module):
    """Linear layer with weights from -127 to 127, times a scale per output. Inputs and products are not rounded to it.

    The largest weight of an output is 127: symmetric rounding to the nearest, per channel. There is no `weight`, so a
    model that reads it, in place of calling the layer, fails.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()  # [out, in]
        scale = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127  # [out]
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.rounded = nn.Parameter((weight / scale[:, None]).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        out = functional.linear(x, self.rounded.to(x.dtype))  # [..., out]
        out = (out * self.scale).to(out.dtype)
        return out if self.bias is None else out + self.bias.to(out.dtype)


def hold(model: CausalLM, dtype: str | None, precision: str, device: torch.device) -> None:
    """Keep the weights of a frozen model in `dtype`. None: in bf16 if training computes in it, else as they are.

    int8 and nf4 are for the matrices of the layers; embeddings, vectors and output layer have the dtype of None. nf4:
    4-bit NormalFloat with double quantisation, Dettmers et al. 2023, arXiv 2305.14314. Matrices are rounded on `device`
    and stay there. A model that was given a dtype before keeps it. Raises UserError for a model with other matrices.
    """
    if model.held_in:
        return
    model.held_in = dtype
    floating = precision if dtype in (None, *QUANTISED) else dtype
    if floating == "bf16":
        cast_parameters(DTYPES["bf16"], model)
    if dtype in QUANTISED:
        _quantise(model, dtype, device)


def held_bytes(cost: Cost, dtype: str | None, precision: str) -> int:
    """Return the bytes of the weights of a frozen model."""
    inner = BYTES[dtype or precision]
    outer = BYTES[precision] if dtype in QUANTISED else inner
    return round(cost.non_embedding * inner + (cost.parameters - cost.non_embedding) * outer)


def _quantise(model: CausalLM, dtype: str, device: torch.device) -> None:
    make = Int8Linear if dtype == "int8" else _nf4()
    output = model.model.get_output_embeddings()
    outer = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} | {id(output.weight)}
    inner = {name: p.numel() for name, p in model.model.named_parameters() if p.ndim > 1 and id(p) not in outer}
    linear = [
        (parent, name) for parent in model.modules() for name, child in parent.named_children()
        if type(child) is nn.Linear and id(child.weight) not in outer
    ]  # fmt: skip
    total, done = sum(inner.values()), 0
    for parent, name in linear:  # nothing else refers to a layer, so that its weights are freed as it is replaced
        layer = make(parent.get_submodule(name).to(device))
        done += layer.in_features * layer.out_features
        setattr(parent, name, layer)
    for p in model.parameters():
        if p.is_floating_point():
            p.data = p.data.clone()  # out of the file of the model, which else stays in memory as long as a part of it
    if total - done > MOST_LEFT * total:
        others = [name for name in inner if name in dict(model.model.named_parameters())]
        raise UserError(
            option="teacher.dtype",
            got=dtype,
            why=f"{type(model.model).__name__} has matrices that are no linear layers of torch, such as {others[0]}, "
            f"which would stay as they are: {1 - done / total:.0%} of the weights of its layers",
            hint="type teacher.dtype=bf16, or choose another teacher",
        )


def _nf4() -> Callable[[nn.Linear], nn.Module]:
    """Return the function that makes a linear layer one of 4 bits. Raises UserError without bitsandbytes."""
    try:
        import bitsandbytes
    except ImportError as error:
        need, hint = "the package bitsandbytes", "type pip install 'kd[bitsandbytes]', or teacher.dtype=int8"
        raise UserError(option="teacher.dtype", got="nf4", need=need, hint=hint) from error

    def make(linear: nn.Linear) -> nn.Module:
        layer = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=linear.bias is not None, quant_type="nf4", device="meta"
        )
        weight = bitsandbytes.nn.Params4bit(linear.weight.data.cpu(), requires_grad=False, quant_type="nf4")
        layer.weight, layer.bias = weight.to(linear.weight.device), linear.bias  # rounded as it moves
        return layer

    return make
