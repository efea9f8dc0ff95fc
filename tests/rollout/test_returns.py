"""Returns of rewards, and whitening."""

import threading

import numpy as np
import pytest
import torch

from kd.parallel import collectives
from kd.rollout.mixed import returns, whiten
from tests.cases import close


def earned(reward: list[float], mask: list[int], gamma: float, length_norm: bool, exclude: bool) -> list[float]:
    reward, mask = torch.tensor([reward], dtype=torch.float64), torch.tensor([mask]).bool()
    return returns(reward, mask, gamma, length_norm, exclude)[0].tolist()


@pytest.mark.parametrize(
    ("reward", "mask", "gamma", "length_norm", "exclude_own_reward", "expected"),
    [
        ([1, 2, 4], [1, 1, 1], 1.0, False, False, [7, 6, 4]),
        ([1, 2, 4], [1, 1, 1], 1.0, False, True, [6, 4, 0]),
        ([1, 2, 4], [1, 1, 1], 0.5, False, False, [3, 4, 4]),
        ([1, 2, 4], [1, 1, 1], 0.5, False, True, [4, 4, 0]),
        ([1, 2, 4], [1, 1, 1], 0.5, True, False, [1, 2, 4]),
        ([1, 2, 4], [1, 1, 1], 0.5, True, True, [2, 4, 0]),
        ([1, 2, 4], [1, 1, 1], 0.0, False, False, [1, 2, 4]),
        ([1, 2, 4], [1, 1, 1], 0.0, False, True, [2, 4, 0]),
        ([9, 9, 1, 2, 4, 9, 9], [0, 0, 1, 1, 1, 0, 0], 0.5, True, False, [0, 0, 1, 2, 4, 0, 0]),
        ([9, 9, 1, 2, 4, 9, 9], [0, 0, 1, 1, 1, 0, 0], 0.5, True, True, [0, 0, 2, 4, 0, 0, 0]),
        # A gap counts as time that passes, and not as a reward: the first is told 1 + 4 / 4.
        ([1, 9, 4, 9, 8], [1, 0, 1, 0, 1], 0.5, False, False, [2.5, 0, 6, 0, 8]),
        ([1, 9, 4, 9, 8], [1, 0, 1, 0, 1], 0.5, True, False, [2.5 / 3, 0, 3, 0, 8]),
        ([1, 9, 4, 9, 8], [1, 0, 1, 0, 1], 0.5, False, True, [3, 0, 4, 0, 0]),
        ([1, 9, 4, 9, 8], [1, 0, 1, 0, 1], 0.5, True, True, [1.5, 0, 4, 0, 0]),
        ([9, -3, 9], [0, 1, 0], 0.9, True, False, [0, -3, 0]),  # a response of one token
        ([9, -3, 9], [0, 1, 0], 0.9, True, True, [0, 0, 0]),
        ([9, 9, 9], [0, 0, 0], 0.9, True, False, [0, 0, 0]),
    ],
)
def test_returns_worked_by_hand(reward, mask, gamma, length_norm, exclude_own_reward, expected):
    assert earned(reward, mask, gamma, length_norm, exclude_own_reward) == pytest.approx(expected)


@pytest.mark.parametrize("gamma", [1.0, 0.95, 0.3])
@pytest.mark.parametrize("length_norm", [False, True])
@pytest.mark.parametrize("exclude_own_reward", [False, True])
def test_returns_are_what_their_sum_says(gamma, length_norm, exclude_own_reward):
    rng = np.random.default_rng(0)
    reward, mask = rng.normal(size=(20, 11)), rng.random((20, 11)) < 0.7
    expected = np.zeros_like(reward)
    for row, t in zip(*mask.nonzero()):
        later = [s for s in range(t + exclude_own_reward, 11) if mask[row, s]]
        expected[row, t] = sum(gamma ** (s - t - exclude_own_reward) * reward[row, s] for s in later)
        expected[row, t] /= max(1, len(later)) if length_norm else 1
    actual = returns(torch.from_numpy(reward), torch.from_numpy(mask), gamma, length_norm, exclude_own_reward)
    close(actual, expected)


def test_returns_of_the_next_are_those_that_begin_here_one_further_on():
    reward = torch.randn(3, 8, dtype=torch.float64)
    every = torch.ones(3, 8).bool()
    here, after = (returns(reward, every, 0.9, True, exclude_own_reward) for exclude_own_reward in (False, True))
    close(after[:, :-1], here[:, 1:])
    assert not after[:, -1].any()


def test_rewards_that_do_not_count_change_no_return():
    mask = torch.tensor([[False, True, True, False, True, False]])
    reward = torch.randn(1, 6)
    for other in (0.0, 1e6, -1e6):
        changed = torch.where(mask, reward, other)
        assert torch.equal(returns(changed, mask, 0.9, True, True), returns(reward, mask, 0.9, True, True))


def test_returns_and_whitening_carry_no_gradient():
    reward = torch.randn(2, 3, requires_grad=True)
    mask = torch.ones(2, 3).bool()
    assert not whiten(returns(reward, mask, 1.0, True, False), mask).requires_grad


def test_whitening_worked_by_hand():
    x = torch.tensor([[1.0, 3.0, 100.0], [1.0, -50.0, 3.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]]).bool()
    close(whiten(x, mask), torch.tensor([[-1.0, 1.0, 0.0], [-1.0, 0.0, 1.0]]), rtol=1e-6)
    x = torch.tensor([[0.0, 0.0, 6.0]])  # mean 2, variance 8
    close(whiten(x, torch.ones(1, 3)), [[-(0.5**0.5), -(0.5**0.5), 2**0.5]], rtol=1e-6)


def test_whitening_of_what_does_not_vary_is_nothing():
    assert not whiten(torch.full((2, 3), 5.0), torch.ones(2, 3)).any()
    assert not whiten(torch.randn(2, 3), torch.zeros(2, 3)).any()
    one = torch.tensor([[0, 1, 0]])
    assert not whiten(torch.randn(1, 3), one).any()


def test_whitening_is_over_all_ranks(monkeypatch):
    x, mask = torch.randn(5, 4) + 3, torch.rand(5, 4) < 0.7
    expected = whiten(x, mask)
    here, sums, whitened = threading.local(), {}, {}
    barrier = threading.Barrier(2)

    def total(value: torch.Tensor) -> torch.Tensor:
        here.count = getattr(here, "count", 0) + 1
        sums.setdefault(here.count, []).append(value)
        barrier.wait()
        return sum(sums[here.count])

    def work(rows: slice) -> None:
        whitened[rows.start] = whiten(x[rows], mask[rows])

    monkeypatch.setattr(collectives, "all_reduce_sum", total)
    threads = [threading.Thread(target=work, args=[rows]) for rows in (slice(0, 3), slice(3, 5))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    close(torch.cat([whitened[0], whitened[3]]), expected, rtol=1e-6)
