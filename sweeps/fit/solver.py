"""Solver of scaling laws: coefficients from runs, held-out runs, resamples and the test for lack of fit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import fdtrc  # scipy.stats.f.sf, without the import of scipy.stats

from sweeps.fit.laws import DISTILLATION, POWER, Coefficients, Inputs, Law

DELTA = 1e-4  # of the Huber loss on log L, as published
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


class Problem:
    """Law and its runs, in units of their geometric means, so that coefficients are of the order of 1."""

    def __init__(self, law: Law, data: Data, supervised_loss: np.ndarray | None = None):
        """supervised_loss: the supervised law at the runs of a distillation law [n]."""
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
        self.bounds = [tuple(np.log(b) + (self.e0 if k == "E" else 0)) for k, b in law.bounds.items()]

    @cached_property
    def grid(self) -> np.ndarray:
        """Starts of the search [G, K]."""
        starts = np.log(np.array(list(itertools.product(*self.law.starts.values()))))
        if "E" in self.law.starts:
            starts[:, 0] += self.e0
        return starts

    def misfits(self) -> np.ndarray:
        """Return the Huber loss of every start of the grid and run [G, n]."""
        return np.stack([huber(self.law.log(theta, self.inputs)[0] - self.loss)[0] for theta in self.grid])

    def solve(self, theta: np.ndarray, weights: np.ndarray, delta: float = DELTA) -> tuple[float, np.ndarray]:
        """Return the least Huber loss that L-BFGS finds from theta, and its theta."""

        def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
            predicted, slopes = self.law.log(theta, self.inputs)
            value, slope = huber(predicted - self.loss, delta)
            return float(weights @ value), slopes @ (weights * slope)

        options = {"maxiter": 500, "maxcor": 20, "ftol": 1e-10, "gtol": 1e-8}
        with np.errstate(over="ignore", invalid="ignore"):
            optimum = minimize(objective, theta, jac=True, method="L-BFGS-B", bounds=self.bounds, options=options)
        return float(optimum.fun), optimum.x

    def optima(
        self, misfits: np.ndarray, weights: np.ndarray | None = None, starts: Sequence[np.ndarray] = (), tries: int = 30
    ) -> list[np.ndarray]:
        """Return optima, the best first, from `starts` and from `tries` starts of the grid that suit the weights.

        The first pass has a wide Huber loss, which is smooth, and the second the real one. With the published delta
        that is nearly the mean absolute error, and L-BFGS stops early at its kinks.
        """
        weights = np.full(len(self.loss), 1 / len(self.loss)) if weights is None else weights
        order = np.argsort(misfits @ weights)
        suited = self.grid[order[:: max(1, len(order) // 300)]][:tries]  # not all from one corner of the grid
        solved = (self.solve(theta, weights, 1e-2) for theta in (*starts, *suited))
        wide = sorted(solved, key=lambda optimum: optimum[0])
        distinct: list[np.ndarray] = []
        for _, theta in wide:
            if all(np.abs(theta - other).max() > 0.05 for other in distinct):
                distinct.append(theta)
        final = []
        for theta in distinct[:4]:
            for delta in (1e-3, DELTA):
                value, theta = self.solve(theta, weights, delta)
            final.append((value, theta))
        return [theta for _, theta in sorted(final, key=lambda optimum: optimum[0])]

    def coefficients(self, theta: np.ndarray) -> Coefficients:
        """Return the coefficients in the units of the law's formula."""
        c = dict(zip(self.law.names, np.exp(theta).tolist()))
        if self.law is POWER:
            return c | {"C": math.exp(theta[1] + c["kappa"] * self.n0)}
        a, b = theta[self.law.names.index("A")], theta[self.law.names.index("B")]
        teacher = c["c0"] * self.t0 / c["gamma"] if "c0" in c else 0.0
        a, b = a + c["alpha"] * self.n0 + teacher, b + c["beta"] * self.d0 + teacher
        return c | {"A": math.exp(a), "B": math.exp(b)}


def huber(residual: np.ndarray, delta: float = DELTA) -> tuple[np.ndarray, np.ndarray]:
    """Return the Huber loss over delta, and its derivative: |r| - delta/2 beyond delta, r^2 / (2 delta) within."""
    size = np.abs(residual)
    value = np.where(size <= delta, residual**2 / (2 * delta), size - delta / 2)
    return value, np.clip(residual / delta, -1, 1)


def resampled(settings: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return how often each run is drawn, as weights that add up to 1 [n]. settings: the number of its setting [n].

    Settings are drawn with replacement, each with all its seeds. The error of a law in a setting is common to all its
    seeds, so runs drawn one by one would give too narrow intervals.
    """
    count = settings.max() + 1
    weights = rng.multinomial(count, np.full(count, 1 / count))[settings]
    return weights / weights.sum()


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
