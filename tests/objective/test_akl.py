"""The head of AKL, and its weights."""

import math

import pytest
import torch

from kd.objective import losses
from tests.cases import LOSSES, close, dense, gradient, logits, on_logits, option
from tests.objective.numpy_losses import akl, head_share


def peaked_and_flat(columns: int = 200):
    """Positions whose head is one token, and positions whose head is a large part of the vocabulary."""
    scale = torch.tensor([[5.0], [1.0], [0.3], [0.1], [0.0]], dtype=torch.float64)
    return scale * logits(1, 5, columns), logits(2, 5, columns)


HEADS = (losses._top_mass_by_counting, losses._top_mass_by_halving)  # on a CPU, on a GPU


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("mu", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_head_of_akl_is_that_of_a_full_sort(mu, head, monkeypatch):
    monkeypatch.setattr(losses, "_top_mass_by_counting", head)
    teacher, student = peaked_and_flat()
    loss = option("loss", "akl", mu=mu)
    p, q = (x.softmax(-1).numpy() for x in (teacher, student))
    expected = [akl(p[row], q[row], mu) for row in range(4)]  # in the last row all are equal, so the order is free
    close(on_logits(loss, dense(teacher))(student)[:4], expected)
    for row in range(5):  # alone, a flat position is not helped by a peaked one, nor the other way round
        alone = on_logits(loss, dense(teacher[row, None]))(student[row, None])
        close(alone[0], on_logits(loss, dense(teacher))(student)[row])


@pytest.mark.parametrize(
    ("p", "mu", "head"),
    [
        ([0.25] * 4, 0.5, 2),
        ([0.3, 0.2, 0.2, 0.15, 0.15], 0.5, 2),
        ([0.2] * 5, 0.61, 3),
        ([0.02] * 50, 0.5, 25),
        ([0.22, 0.14, 0.06, 0.04, 0.04, *[0.02] * 25], 0.5, 5),  # 0.5 in decimals, above it in float32
        ([0.6, 0.2, 0.2], 0.5, 1),
    ],
)
@pytest.mark.parametrize("find", HEADS)
def test_head_of_akl_takes_equal_tokens_until_mu(find, p, mu, head, monkeypatch):
    monkeypatch.setattr(losses, "_top_mass_by_counting", find)
    p = torch.tensor([p])
    order = torch.randperm(p.shape[-1], generator=torch.Generator().manual_seed(0))
    for probability in (p, p[:, order], torch.nn.functional.pad(p, (0, 2**14))):  # wide ones take finer bins
        assert losses._top_mass_mask(probability.log(), probability, mu).sum() == head


@pytest.mark.parametrize(("columns", "off"), [(5000, 0), (20_000, 3)])  # off: sums of thousands are in float32
@pytest.mark.parametrize("mu", [0.0, 1e-4, 0.5, 0.95])
def test_both_heads_of_akl_are_the_same_columns(mu, columns, off):
    scale = torch.tensor([[6.0], [3.0], [1.0], [0.1], [0.0]])
    logits = (scale * torch.randn(5, columns, generator=torch.Generator().manual_seed(0))).round(decimals=1)
    teacher = logits.log_softmax(-1)  # many are equal
    counted, halved = (head(teacher, teacher.exp(), mu + 1e-6) for head in HEADS)
    assert (counted != halved).sum(-1).max() <= off
    assert halved.sum(-1).min() >= 1 and halved.sum(-1).max() < columns


def test_akl_of_equal_tokens_worked_by_hand():
    # Head: the first two tokens, whose gaps are 0.15 and 0.05 of 0.4 in all, so both directions weigh the same.
    p, q = torch.tensor([[0.25] * 4]), torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    forward = 0.25 * sum(math.log(0.25 / x) for x in (0.1, 0.2, 0.3, 0.4))
    backward = sum(x * math.log(x / 0.25) for x in (0.1, 0.2, 0.3, 0.4))
    close(LOSSES["akl"](q.log(), dense(p.log())), [(forward + backward) / 2])


def test_weights_of_akl_carry_no_gradient():
    teacher, student = peaked_and_flat()
    target = dense(teacher)
    forward, reverse = (gradient(on_logits(LOSSES[name], target), student) for name in ("fkl", "rkl"))
    p, q = (x.softmax(-1).numpy() for x in (teacher, student))
    share = torch.tensor([[head_share(p[row], q[row], 0.5)] for row in range(4)])
    expected = share * forward[:4] + (1 - share) * reverse[:4]
    close(gradient(on_logits(LOSSES["akl"], target), student)[:4], expected)


def test_head_of_akl_is_everything_for_mu_1():
    teacher, student = (logits(seed, 200, 1000, torch.float32) for seed in (1, 2))
    value = on_logits(option("loss", "akl", mu=1.0), dense(teacher))(student)
    close(value, on_logits(LOSSES["fkl"], dense(teacher))(student), rtol=1e-5)
