"""Output layer of a chunked objective: logits of one chunk after another, and the sums of its gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kd.models.causal_lm import Head


class OutputLayer:
    """Head of any kind. `gradients` has a sum over chunks for each of its parameters that learns.

    dtype: that of autocast; None for the one of the parameters. They are cast once instead of per chunk, as new leaves.
    Their gradients have that dtype, and are summed in float32.
    """

    def __init__(self, head: nn.Module, dtype: torch.dtype | None = None):
        self.head = head
        self.weights = {
            name: p if dtype is None else p.detach().to(dtype).requires_grad_(p.requires_grad)
            for name, p in head.named_parameters()
        }
        self.learned = [w for w in self.weights.values() if w.requires_grad]
        self.gradients = [torch.zeros_like(p) for p in head.parameters() if p.requires_grad]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [n, V] of the hidden states [n, D] of a chunk."""
        with torch.enable_grad():
            self.hidden = hidden.detach().requires_grad_()
            self.output = functional_call(self.head, self.weights, (self.hidden,))
        return self.output.detach()

    def backward(self, logits_grad: Tensor) -> Tensor:
        """Return the gradient of the chunk's hidden states [n, D], and add those of the parameters to `gradients`."""
        hidden_grad, *parts = torch.autograd.grad(self.output, (self.hidden, *self.learned), logits_grad)
        for whole, part in zip(self.gradients, parts, strict=True):
            whole += part
        return hidden_grad


class LinearOutputLayer(OutputLayer):
    """Head of one nn.Linear in float32. A chunk's gradient of the weights is added as it is computed.

    A product and then a sum take about twice as long: the sum reads 2 V D numbers and writes V D, in each chunk.
    """

    def __init__(self, head: Head | nn.Linear, linear: nn.Linear):
        super().__init__(head)
        self.linear = linear
        self.vocab = head.vocab if isinstance(head, Head) else linear.out_features  # rows beyond are padding

    def logits(self, hidden: Tensor) -> Tensor:
        bias = None if self.linear.bias is None else self.linear.bias[: self.vocab]
        self.hidden = hidden.detach()
        self.output = self.products = nn.functional.linear(self.hidden, self.linear.weight[: self.vocab], bias)
        if isinstance(self.head, Head):
            with torch.enable_grad():
                self.output = self.head.adjusted(self.products.requires_grad_())
        return self.output.detach()

    def backward(self, logits_grad: Tensor) -> Tensor:
        if self.output is not self.products:
            (logits_grad,) = torch.autograd.grad(self.output, self.products, logits_grad)
        for parameter, whole in zip(self.learned, self.gradients, strict=True):
            if parameter is self.linear.weight:
                whole[: self.vocab].addmm_(logits_grad.T, self.hidden)
            else:
                whole[: self.vocab] += logits_grad.sum(0)  # of the bias
        return logits_grad @ self.linear.weight[: self.vocab]


def output_layer(head: nn.Module, hidden: Tensor) -> OutputLayer:
    """Return the output layer that a head computes with, in the precision of autocast if that is on."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return OutputLayer(head, torch.get_autocast_dtype(device))
    linear = head.output if type(head) is Head else head
    if type(linear) is nn.Linear and hidden.dtype == linear.weight.dtype == torch.float32 and not _has_hooks(linear):
        return LinearOutputLayer(head, linear)
    return OutputLayer(head)


def _has_hooks(module: nn.Module) -> bool:
    """Return True if something else happens when a module is called: an adapter, or a tool that observes it."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
