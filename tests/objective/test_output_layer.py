import pytest
import torch
from torch import nn

from kd.models.causal_lm import Head
from kd.objective.output_layer import LinearOutputLayer, OutputLayer, output_layer

D, V, ROWS = 6, 17, 9


def linear(bias: bool = False, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(D, V, bias, dtype=dtype)


class Adapted(nn.Linear):
    """Adds to its product, as an adapter does."""

    def forward(self, x):
        return super().forward(x) + 1


HEADS = {
    "linear": linear(),
    "bias": linear(bias=True),
    "head": Head(linear(), V),
    "padding": Head(linear(bias=True), V - 4),
    "scale": Head(linear(), V, scale=0.25),
    "softcap": Head(linear(), V - 4, softcap=0.5),
    "softcap and scale": Head(linear(bias=True), V, 0.5, 3.0),
}


@pytest.mark.parametrize("frozen", ["", "weight", "bias", "weight bias"])
@pytest.mark.parametrize("name", HEADS)
def test_sums_are_those_of_autograd_over_all_rows(name, frozen):
    head = HEADS[name]
    for parameter, tensor in head.named_parameters():
        tensor.requires_grad_(parameter.rpartition(".")[2] not in frozen.split())
    hidden, columns = torch.randn(ROWS, D), getattr(head, "vocab", V)
    grad = torch.randn(ROWS, columns)
    whole = hidden.clone().requires_grad_()
    expected_logits = head(whole)
    learned = [p for p in head.parameters() if p.requires_grad]
    expected_hidden, *expected = torch.autograd.grad(expected_logits, [whole, *learned], grad)
    for layer in (output_layer(head, hidden), OutputLayer(head)):
        parts = []
        with torch.no_grad():  # as in the forward pass of an autograd function
            for rows in (slice(0, 4), slice(4, 5), slice(5, ROWS)):
                torch.testing.assert_close(layer.logits(hidden[rows]), expected_logits[rows].detach())
                parts.append(layer.backward(grad[rows]))
        torch.testing.assert_close(torch.cat(parts), expected_hidden)
        assert len(layer.gradients) == len(expected)
        for ours, theirs in zip(layer.gradients, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_a_plain_layer_in_float32_needs_no_product_of_its_own_per_chunk():
    for head in HEADS.values():
        assert type(output_layer(head, torch.randn(ROWS, D))) is LinearOutputLayer


def test_other_layers_compute_as_they_do():
    hidden, hooked = torch.randn(ROWS, D), linear()
    hooked.register_forward_hook(lambda module, inputs, output: output + 1)
    for head in (Adapted(D, V), Head(Adapted(D, V), V), hooked, nn.Sequential(linear(), nn.Tanh())):
        layer = output_layer(head, hidden)
        torch.testing.assert_close(layer.logits(hidden), head(hidden).detach())
        assert type(layer) is OutputLayer


def test_gradients_in_bfloat16_are_summed_in_float32():
    hidden = torch.randn(ROWS, D)
    with torch.autocast("cpu", torch.bfloat16):
        layer = output_layer(linear(), hidden)
        logits = layer.logits(hidden)
        layer.backward(torch.ones_like(logits))
    assert type(layer) is OutputLayer
    assert logits.dtype == torch.bfloat16 and layer.gradients[0].dtype == torch.float32
    assert type(output_layer(linear(dtype=torch.bfloat16), hidden.bfloat16())) is OutputLayer
