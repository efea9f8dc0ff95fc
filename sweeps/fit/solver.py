"""Solver of scaling laws: coefficients from runs, held-out runs, resamples and the test for lack of fit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy.special import fdtrc  # scipy.stats.f.sf, without the import of scipy.stats

from sweeps.fit.laws import DISTILLATION, POWER, Coefficients, Inputs, Law
from sweeps.fit.minimizer import Minima, huber, minimize_huber, select

DELTA = 1e-4  # of the Huber loss on log L, as published
WIDE = (1e-2,)  # the first pass has a wide Huber loss, which is smooth
NARROW = tuple(np.geomspace(*WIDE, DELTA, 6))  # and the second ends with the real one
SHARE = 0.2  # of the runs that are held out, the largest ones


class Data(NamedTuple):
    """Runs that a law is fitted to."""

    n: np.ndarray  # [n]
    d: np.ndarray  # [n]
    loss: np.ndarray  # [n]
    teacher_loss: np.ndarray | None = None  # [n]

    def select(self, rows) -> Data:
        """Return some of the runs."""
        return Data(*(x if x is None else x[rows] for x in self))


class Optimum(NamedTuple):
    """Local minimum of the Huber loss."""

    value: float  # mean of the Huber loss over delta
    theta: np.ndarray  # [K]
    converged: bool


class Search(NamedTuple):
    """Effort of a search. wide, narrow: tolerance and most iterations of the first and the second pass."""

    tries: int  # starts from the grid
    finalists: int  # optima of the first pass that the second refines, at most
    wide: tuple[float, int]
    narrow: tuple[float, int]


FULL = Search(tries=300, finalists=40, wide=(1e-4, 200), narrow=(1e-10, 3000))
# Resamples start from the optima of all runs. A few starts from the grid are needed too: else they hardly leave the
# valley that the fit to all runs ended in, and intervals are too narrow.
WARM = Search(tries=4, finalists=4, wide=(1e-3, 60), narrow=(1e-7, 500))


class Problem:
    """Law and its runs, in units of their geometric means, so that coefficients are of the order of 1."""

    def __init__(self, law: Law, data: Data, supervised_loss: np.ndarray | None = None):
        """supervised_loss: the supervised law at the runs of a distillation law [n], or of each resample [B, n]."""
        self.law, self.loss = law, np.log(data.loss)
        self.n0, self.d0 = np.log(data.n).mean(), np.log(data.d).mean()
        self.t0 = np.log(data.teacher_loss).mean() if data.teacher_loss is not None else 0.0
        # E is at most a loss that was measured, and is counted in units of the least one.
        self.e0 = self.loss.min()
        n, d = np.log(data.n) - self.n0, np.log(data.d) - self.d0
        self.inputs: Inputs = (n, d)
        if law is POWER:
            self.inputs = (n,)
        if law is DISTILLATION:
            self.inputs = (n, d, np.log(data.teacher_loss), np.log(supervised_loss), np.array(self.t0))
        self.bounds = np.array([np.log(b) + (self.e0 if k == "E" else 0) for k, b in law.bounds.items()])  # [K, 2]

    @property
    def equal_weights(self) -> np.ndarray:
        """Weights of the runs in a fit to all of them [1, n]."""
        return np.full((1, len(self.loss)), 1 / len(self.loss))

    @cached_property
    def grid(self) -> np.ndarray:
        """Starts of the search [G, K]."""
        starts = np.log(np.array(list(itertools.product(*self.law.starts.values()))))
        if "E" in self.law.starts:
            starts[:, 0] += self.e0
        return starts

    def misfits(self) -> np.ndarray:
        """Return the Huber loss of every start of the grid and run [G, n]."""
        return huber(self.law.log(self.grid, self.inputs)[0] - self.loss, DELTA)

    def starts(self, misfits: np.ndarray, weights: np.ndarray, tries: int) -> np.ndarray:
        """Return starts of the grid that suit the weights [B, n] of the runs: [B, tries, K]."""
        order = np.argsort(weights @ misfits.T)
        suited = order[:, :: max(1, order.shape[1] // 300)][:, :tries]  # not all from one corner of the grid
        return self.grid[suited]

    def optima(self, starts: np.ndarray, weights: np.ndarray, search: Search) -> list[list[Optimum]]:
        """Return the optima, the best first, for each row of weights [B, n]. starts: [B, S, K].

        A wide pass from all starts is refined where it ended at different optima. With the published delta, the loss is
        nearly the mean absolute error, in whose kinks a search from afar gets stuck.
        """
        count = starts.shape[1]
        row = np.repeat(np.arange(len(starts)), count)
        wide = self.minimize(starts.reshape(len(row), -1), weights, row, WIDE, search.wide)
        best_first = np.argsort(wide.value.reshape(-1, count), axis=1) + count * np.arange(len(starts))[:, None]
        chosen = np.array([i for order in best_first for i in distinct(wide.theta, order)[: search.finalists]])
        final = self.minimize(wide.theta[chosen], weights, row[chosen], NARROW, search.narrow)
        optima: list[list[Optimum]] = [[] for _ in starts]
        for i, value, theta, converged in zip(row[chosen], final.value, final.theta, final.converged):
            optima[i].append(Optimum(float(value), theta, bool(converged)))
        return [sorted(some, key=lambda optimum: optimum.value) for some in optima]

    def full_search(self) -> list[Optimum]:
        """Return the optima of all runs, the best first, from many starts of the grid."""
        weights = self.equal_weights
        (optima,) = self.optima(self.starts(self.misfits(), weights, FULL.tries), weights, FULL)
        return optima

    def least_squares(self, theta: np.ndarray) -> Optimum:
        """Return the optimum of least squares, from theta [K]."""
        minima = self.minimize(theta[None], self.equal_weights, np.zeros(1, int), (1.0,), FULL.narrow)
        return Optimum(float(minima.value[0]), minima.theta[0], bool(minima.converged[0]))

    def minimize(
        self,
        theta: np.ndarray,
        weights: np.ndarray,
        row: np.ndarray,
        deltas: Sequence[float],
        limits: tuple[float, int],
    ) -> Minima:  # fmt: skip
        """Return the minima from theta [R, K] with the weights, and the inputs, of these rows [R]."""
        inputs = select(self.inputs, row)
        return minimize_huber(self.law, theta, inputs, self.loss, weights[row], self.bounds, deltas, *limits)

    def coefficients(self, theta: np.ndarray) -> Coefficients:
        """Return the coefficients in the units of the law's formula."""
        c = dict(zip(self.law.names, np.exp(theta).tolist()))
        if self.law is POWER:
            return c | {"C": math.exp(theta[1] + c["kappa"] * self.n0)}
        a, b = theta[self.law.names.index("A")], theta[self.law.names.index("B")]
        teacher = c["c0"] * self.t0 / c["gamma"] if "c0" in c else 0.0
        a, b = a + c["alpha"] * self.n0 + teacher, b + c["beta"] * self.d0 + teacher
        return c | {"A": math.exp(a), "B": math.exp(b)}


def distinct(theta: np.ndarray, order: np.ndarray) -> list[int]:
    """Return the rows of theta [R, K], in this order, that are not near an earlier one."""
    chosen: list[int] = []
    for i in order:
        if all(np.abs(theta[i] - theta[other]).max() > 0.05 for other in chosen):
            chosen.append(int(i))
    return chosen


def resampled(settings: np.ndarray, least: int, rng: np.random.Generator) -> np.ndarray:
    """Return how often each run is drawn, as weights that add up to 1 [n]. settings: the number of its setting [n].

    Settings are drawn with replacement, each with all its seeds. The error of a law in a setting is common to all its
    seeds, so runs drawn one by one would give too narrow intervals.

    least: number of distinct settings in a resample, at least. A law with K coefficients goes through any K - 1
    settings in endless ways, and the coefficients would depend on where the search began. Of 4 settings, 34% of all
    draws have fewer than 3; they are drawn again. Where that is frequent, by accepted_share, weights vary too little.
    """
    count = settings.max() + 1
    drawn = np.zeros(count)
    while np.count_nonzero(drawn) < least:
        drawn = rng.multinomial(count, np.full(count, 1 / count))
    weights = drawn[settings]
    return weights / weights.sum()


def accepted_share(settings: int, least: int) -> float:
    """Return the probability that as many draws as settings, with replacement, have `least` distinct ones."""
    distinct = np.zeros(settings + 1)  # probability of each number of distinct settings
    distinct[0] = 1
    seen = np.arange(settings + 1) / settings  # probability that the next draw is not new
    for _ in range(settings):
        distinct = distinct * seen + np.concatenate([[0], (distinct * (1 - seen))[:-1]])
    return float(distinct[least:].sum())


def held_out(compute: np.ndarray, settings: np.ndarray, least: int) -> np.ndarray:
    """Return a mask of the largest runs by compute, at least SHARE of them [n].

    The mask is all False unless `least` settings remain. Runs of equal compute, such as seeds of one setting, are on
    the same side. settings: number of each run's setting [n].
    """
    rounded = np.array([float(f"{x:.4g}") for x in compute])
    for bound in np.unique(rounded)[::-1]:
        mask = rounded >= bound
        if mask.sum() >= SHARE * len(compute):
            return mask if len(np.unique(settings[~mask])) >= least else np.zeros(len(compute), bool)
    return np.zeros(len(compute), bool)


def loglinear(inputs: np.ndarray, log_loss: np.ndarray, fitted: np.ndarray) -> np.ndarray:
    """Return log L by the simplest law, linear in logarithms, which another law has to beat [n].

    inputs: logarithms [K, n]. fitted: mask of the runs that it is fitted to [n].
    """
    terms = np.stack([np.ones(inputs.shape[1]), *inputs], 1)
    return terms @ np.linalg.lstsq(terms[fitted], log_loss[fitted], rcond=None)[0]


class LackOfFit(NamedTuple):
    """F test: does a law miss the means of settings by more than the seeds of a setting differ?"""

    f: float
    freedom: tuple[int, int]
    p: float  # how often noise alone would give so large an F

    @property
    def within_noise(self) -> bool:
        return self.p >= 0.05


def lack_of_fit(residuals: np.ndarray, settings: np.ndarray, seeds: np.ndarray, coefficients: int) -> LackOfFit | None:
    """Return the test of the residuals of a least-squares fit [n]; None without repeated seeds or with few settings.

    settings, seeds: their numbers, for each run [n]. A shift that all runs of a seed share is taken out.
    Draper and Smith, Applied Regression Analysis, section 2.1.
    """
    setting_terms, seed_terms = (np.eye(x.max() + 1)[x] for x in (settings, seeds))
    terms = np.concatenate([setting_terms, seed_terms - seed_terms.mean(0)], 1)
    solution, _, rank, _ = np.linalg.lstsq(terms, residuals, rcond=None)
    means = solution[: settings.max() + 1]
    pure, lack = ((residuals - terms @ solution) ** 2).sum(), (setting_terms.sum(0) * means**2).sum()
    freedom = (len(means) - coefficients, len(residuals) - int(rank))
    if min(freedom) < 1 or pure < 1e-12 * lack:
        return None
    f = float(lack / freedom[0] / (pure / freedom[1]))
    return LackOfFit(f, freedom, float(fdtrc(*freedom, f)))
