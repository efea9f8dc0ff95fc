"""Tests of the example: python -m pytest examples/kd-example/tests"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from kd_example.data import sums
from kd_example.losses import alpha_divergence
from kd_example.metrics import entropy_gap
from kd_example.sections import best_alpha

from kd import testing
from kd.errors import UserError
from kd.objective import losses


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
def test_loss_has_what_every_loss_has(alpha):
    testing.check_loss(partial(alpha_divergence, alpha=alpha))


def test_ends_of_the_family():
    student, target = testing.logits(2).log_softmax(-1), testing.dense(testing.logits(1))
    testing.close(alpha_divergence(student, target, 1e-6), losses.rkl(student, target), rtol=1e-4)
    testing.close(alpha_divergence(student, target, 1 - 1e-6), losses.fkl(student, target), rtol=1e-4)


def test_alpha_outside_is_refused():
    with pytest.raises(UserError, match=r"loss\.alpha"):
        alpha_divergence(torch.zeros(1, 2), testing.dense(torch.zeros(1, 2)), alpha=2.0)


def test_sums_are_right_and_the_same_again():
    documents = sums(count=100).load()
    assert all(eval(text.replace("=", "==")) for text in documents)
    assert documents == sums(count=100).load() != sums(count=100, seed=1).load()


def test_entropy_gap_by_hand():
    uniform, sure = torch.zeros(1, 4).log_softmax(-1), torch.tensor([[0.0, *[-torch.inf] * 3]])
    testing.close(entropy_gap(uniform, testing.dense(sure)), torch.tensor([4.0]).log())


def group(loss: str, value: float, **settings: float):
    """A group of a report with one run."""
    return SimpleNamespace(
        config={"loss": loss} | settings, runs={0: None}, required_mean=lambda: SimpleNamespace(mean=value)
    )


def test_section_has_a_row_for_each_alpha():
    groups = [
        group("fkl", 2.1),
        *(group("alpha_divergence", loss, **{"loss.alpha": a}) for a, loss in ((0.5, 2.2), (0.0, 2.4))),
    ]
    section = best_alpha(SimpleNamespace(groups=groups))
    assert section.rows == ((0.0, 2.4, 1), (0.5, 2.2, 1)) and "alpha=0.5" in section.text
    assert best_alpha(SimpleNamespace(groups=groups[:1])) is None
