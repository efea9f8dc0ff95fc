"""Scaling laws: their formulas, and how coefficients are found from runs.

N: parameters without embeddings. D: tokens trained on. L: loss on held-out text, nats per token. Coefficients are
positive throughout, so that all is computed in logarithms, in float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.stats import f as f_distribution

Coefficients = dict[str, float]
Inputs = tuple[np.ndarray, ...]  # what a law is a function of, each [n]

# Busbridge et al. 2025, arXiv 2502.08606, section 4 and table 6: C4, 143M to 12.6B parameters, 73 and 697 runs.
PUBLISHED = {
    "supervised": {"E": 1.220, "A": 3355.0, "B": 18186.0, "alpha": 0.408, "beta": 0.431, "gamma": 0.452},
    "distillation": {
        "A": 2243.0, "B": 24181.0, "alpha": 0.321, "beta": 0.637, "gamma": 0.764,
        "c0": 2.549, "c1": 522.6, "f1": 0.090, "d1": 1.315,
    },
}  # fmt: skip
DELTA = 1e-4  # of the Huber loss on log L, as published
LOOSE = 10.0  # a coefficient whose interval ends are further apart than this factor is not known
SHARE = 0.2  # of the runs that are held out, the largest ones


def power(c: Coefficients, x):
    """L(x) = E + C / x^kappa, one axis alone."""
    return c["E"] + c["C"] * x ** -c["kappa"]


def supervised(c: Coefficients, n, d):
    """L(N, D) = E + (A / N^alpha + B / D^beta)^gamma of language modelling alone. arXiv 2502.08606, eq. 1.

    With gamma = 1 the law of Hoffmann et al. 2022, arXiv 2203.15556.
    """
    return c["E"] + (c["A"] * n ** -c["alpha"] + c["B"] * d ** -c["beta"]) ** c["gamma"]


def distilled(c: Coefficients, n, d, teacher_loss, alone):
    """Loss of a student with N parameters after D tokens of a teacher of loss L_T. arXiv 2502.08606, eq. 8.

    L_T + L_T^-c0 (1 + (L_T / (L d1))^(1/f1))^(-c1 f1) (A / N^alpha + B / D^beta)^gamma, where L (`alone`) is the
    supervised law at N and D. The teacher enters by its loss alone, and a student is never better than it.
    """
    with np.errstate(over="ignore"):  # a teacher far worse than the student: the factor is 0
        gap = (1 + (teacher_loss / (alone * c["d1"])) ** (1 / c["f1"])) ** (-c["c1"] * c["f1"])
    own = (c["A"] * n ** -c["alpha"] + c["B"] * d ** -c["beta"]) ** c["gamma"]
    return teacher_loss + teacher_loss ** -c["c0"] * gap * own


# The same laws as log L, with its derivatives by the logarithms of the coefficients: theta [K] -> [n] and [K, n].


def log_power(theta: np.ndarray, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    e, c, kappa = theta[0], theta[1], math.exp(theta[2])
    reducible = c - kappa * inputs[0]
    log_loss = np.logaddexp(e, reducible)
    share = np.exp(reducible - log_loss)
    return log_loss, np.stack([1 - share, share, -share * kappa * inputs[0]])


def log_supervised(theta: np.ndarray, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    reducible, slopes = _log_reducible(theta[1:], *inputs)
    log_loss = np.logaddexp(theta[0], reducible)
    share = np.exp(reducible - log_loss)
    return log_loss, np.vstack([1 - share, share * slopes])


def log_distilled(theta: np.ndarray, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """inputs: logarithms of N, D, L_T and of the supervised law, and of the L_T that the coefficients are scaled by."""
    n, d, teacher, alone, unit = inputs
    c0, c1, f1 = np.exp(theta[5:8])
    ratio = (teacher - alone - theta[8]) / f1
    soft = np.logaddexp(0, ratio)
    below = np.exp(ratio - soft)  # derivative of soft
    own, slopes = _log_reducible(theta[:5], n, d)
    reducible = own - c0 * (teacher - unit) - c1 * f1 * soft
    log_loss = np.logaddexp(teacher, reducible)
    share = np.exp(reducible - log_loss)
    more = [-c0 * (teacher - unit), -c1 * f1 * soft, c1 * f1 * (below * ratio - soft), c1 * below]
    return log_loss, share * np.vstack([slopes, *more])


def _log_reducible(theta: np.ndarray, n: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log (A / N^alpha + B / D^beta)^gamma, theta in the order A, B, alpha, beta, gamma."""
    alpha, beta, gamma = np.exp(theta[2:])
    of_n, of_d = theta[0] - alpha * n, theta[1] - beta * d
    both = np.logaddexp(of_n, of_d)
    share = np.exp(of_n - both)
    slopes = [share, 1 - share, -share * alpha * n, -(1 - share) * beta * d, both]
    return gamma * both, gamma * np.stack(slopes)


class Law(NamedTuple):
    """A law to be fitted. Starts and bounds are of its coefficients in units in which N, D and L_T are 1 on average."""

    name: str
    formula: str
    log: Callable[[np.ndarray, Inputs], tuple[np.ndarray, np.ndarray]]
    starts: dict[str, tuple[float, ...]]
    bounds: dict[str, tuple[float, float]]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.starts)


EXPONENT, AMOUNT = (0.01, 5.0), (1e-9, 1e9)
POWER = Law(
    "power", "L(x) = E + C / x^κ", log_power,
    {"E": (0.3, 0.6, 0.9, 0.99), "C": (0.01, 0.1, 0.5), "kappa": (0.1, 0.3, 0.7, 1.5)},
    {"E": (1e-3, 1.0), "C": AMOUNT, "kappa": EXPONENT},
)  # fmt: skip
SUPERVISED = Law(
    "supervised", "L(N, D) = E + (A / N^α + B / D^β)^γ", log_supervised,
    {"E": (0.3, 0.6, 0.9, 0.99), "A": (0.03, 0.3, 1.0), "B": (0.03, 0.3, 1.0), "alpha": (0.2, 0.5, 1.0),
     "beta": (0.2, 0.5, 1.0), "gamma": (0.5, 1.0)},
    {"E": (1e-3, 1.0), "A": AMOUNT, "B": AMOUNT, "alpha": EXPONENT, "beta": EXPONENT, "gamma": EXPONENT},
)  # fmt: skip
DISTILLATION = Law(
    "distillation", "L_S = L_T + L_T^-c₀ (1 + (L_T / (L(N, D) d₁))^(1/f₁))^(-c₁f₁) (A / N^α + B / D^β)^γ",
    log_distilled,
    {"A": (0.03, 0.3, 1.0), "B": (0.03, 0.3, 1.0), "alpha": (0.3, 0.8), "beta": (0.3, 0.8), "gamma": (0.5, 1.0),
     "c0": (0.5, 2.5), "c1": (1.0, 30.0, 500.0), "f1": (0.1, 0.5, 1.0), "d1": (0.7, 1.0, 1.4)},
    {"A": AMOUNT, "B": AMOUNT, "alpha": EXPONENT, "beta": EXPONENT, "gamma": EXPONENT,
     "c0": (1e-3, 30.0), "c1": (1e-3, 1e5), "f1": (1e-2, 10.0), "d1": (0.1, 10.0)},
)  # fmt: skip


class Data(NamedTuple):
    """What a law is fitted to: n runs."""

    n: np.ndarray  # [n]
    d: np.ndarray  # [n]
    loss: np.ndarray  # [n]
    teacher_loss: np.ndarray | None = None  # [n]

    def __getitem__(self, rows) -> Data:
        return Data(*(x if x is None else x[rows] for x in self))


class Problem:
    """A law and its runs in units of their geometric means, so that coefficients are of the order of 1."""

    def __init__(self, law: Law, data: Data, alone: np.ndarray | None = None):
        """alone: the supervised law at the runs of a distillation law [n]."""
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
            self.inputs = (n, d, np.log(data.teacher_loss), np.log(alone), np.array(self.t0))
        self.bounds = [tuple(np.log(b) + (self.e0 if k == "E" else 0)) for k, b in law.bounds.items()]

    @cached_property
    def grid(self) -> np.ndarray:
        """Where to start from [G, K]."""
        found = np.log(np.array(list(itertools.product(*self.law.starts.values()))))
        if "E" in self.law.starts:
            found[:, 0] += self.e0
        return found

    def misfits(self) -> np.ndarray:
        """Huber loss of every start of the grid and run [G, n]."""
        return np.stack([huber(self.law.log(theta, self.inputs)[0] - self.loss)[0] for theta in self.grid])

    def solve(self, theta: np.ndarray, weights: np.ndarray, delta: float = DELTA) -> tuple[float, np.ndarray]:
        """The least Huber loss that L-BFGS finds from theta, and where."""

        def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
            predicted, slopes = self.law.log(theta, self.inputs)
            value, slope = huber(predicted - self.loss, delta)
            return float(weights @ value), slopes @ (weights * slope)

        options = {"maxiter": 500, "maxcor": 20, "ftol": 1e-10, "gtol": 1e-8}
        with np.errstate(over="ignore", invalid="ignore"):
            found = minimize(objective, theta, jac=True, method="L-BFGS-B", bounds=self.bounds, options=options)
        return float(found.fun), found.x

    def optima(
        self, misfits: np.ndarray, weights: np.ndarray | None = None, known: Sequence[np.ndarray] = (), tries: int = 30
    ) -> list[np.ndarray]:
        """Optima, the best first, from `known` starts and from `tries` of the grid that suit the weights of the runs.

        First with a wide Huber loss, which is smooth, then with the real one: that of the published delta is nearly the
        mean absolute error, on whose kinks L-BFGS stops early.
        """
        weights = np.full(len(self.loss), 1 / len(self.loss)) if weights is None else weights
        order = np.argsort(misfits @ weights)
        suited = self.grid[order[:: max(1, len(order) // 300)]][:tries]  # not all from one corner of the grid
        wide = sorted((self.solve(theta, weights, 1e-2) for theta in (*known, *suited)), key=lambda found: found[0])
        kept: list[np.ndarray] = []
        for _, theta in wide:
            if all(np.abs(theta - other).max() > 0.05 for other in kept):
                kept.append(theta)
        final = []
        for theta in kept[:4]:
            for delta in (1e-3, DELTA):
                value, theta = self.solve(theta, weights, delta)
            final.append((value, theta))
        return [theta for _, theta in sorted(final, key=lambda found: found[0])]

    def coefficients(self, theta: np.ndarray) -> Coefficients:
        """In the units of the law as it is written."""
        c = dict(zip(self.law.names, np.exp(theta).tolist()))
        if self.law is POWER:
            return c | {"C": math.exp(theta[1] + c["kappa"] * self.n0)}
        at = theta[self.law.names.index("A")], theta[self.law.names.index("B")]
        teacher = c["c0"] * self.t0 / c["gamma"] if "c0" in c else 0.0
        a, b = at[0] + c["alpha"] * self.n0 + teacher, at[1] + c["beta"] * self.d0 + teacher
        return c | {"A": math.exp(a), "B": math.exp(b)}


def huber(residual: np.ndarray, delta: float = DELTA) -> tuple[np.ndarray, np.ndarray]:
    """Huber loss divided by delta, and its derivative: |r| - delta/2 beyond delta, r^2 / (2 delta) within."""
    size = np.abs(residual)
    value = np.where(size <= delta, residual**2 / (2 * delta), size - delta / 2)
    return value, np.clip(residual / delta, -1, 1)


def resampled(settings: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How often each run is drawn, as weights that add up to 1 [n]; settings: the number of its setting [n].

    Settings are drawn, with replacement, each with all its seeds: what a law misses in a setting all its seeds share,
    so that runs drawn one by one would make intervals too narrow.
    """
    count = settings.max() + 1
    weights = rng.multinomial(count, np.full(count, 1 / count))[settings]
    return weights / weights.sum()


def held_out(compute: np.ndarray, settings: np.ndarray, least: int) -> np.ndarray:
    """Which runs are the largest by compute, a share of at least SHARE; none unless `least` settings are left [n].

    Runs of the same compute, such as seeds of one setting, stand on the same side. settings: the number of each run's
    setting [n].
    """
    rounded = np.array([float(f"{x:.4g}") for x in compute])
    for bound in np.unique(rounded)[::-1]:
        mask = rounded >= bound
        if mask.sum() >= SHARE * len(compute):
            return mask if len(np.unique(settings[~mask])) >= least else np.zeros(len(compute), bool)
    return np.zeros(len(compute), bool)


def straight(inputs: np.ndarray, log_loss: np.ndarray, fitted: np.ndarray) -> np.ndarray:
    """log L by the plainest law, linear in logarithms: what another law has to be better than [n].

    inputs: logarithms [K, n]. fitted: which runs it is fitted to [n].
    """
    terms = np.stack([np.ones(inputs.shape[1]), *inputs], 1)
    return terms @ np.linalg.lstsq(terms[fitted], log_loss[fitted], rcond=None)[0]


class LackOfFit(NamedTuple):
    """The F test of whether a law misses the means of settings by more than the seeds of a setting differ."""

    f: float
    freedom: tuple[int, int]
    p: float  # how often noise alone would give so large an F

    @property
    def noise(self) -> bool:
        return self.p >= 0.05


def lack_of_fit(residuals: np.ndarray, settings: np.ndarray, seeds: np.ndarray, coefficients: int) -> LackOfFit | None:
    """Of the residuals of a fit by least squares [n]; None where no setting has several seeds, or too few settings.

    settings, seeds: their numbers, of each run [n]. A shift that all runs of a seed share is taken out.
    Draper and Smith, Applied Regression Analysis, section 2.1.
    """
    of_settings, of_seeds = (np.eye(x.max() + 1)[x] for x in (settings, seeds))
    terms = np.concatenate([of_settings, of_seeds - of_seeds.mean(0)], 1)
    found, _, rank, _ = np.linalg.lstsq(terms, residuals, rcond=None)
    means = found[: settings.max() + 1]
    pure, lack = ((residuals - terms @ found) ** 2).sum(), (of_settings.sum(0) * means**2).sum()
    freedom = (len(means) - coefficients, len(residuals) - int(rank))
    if min(freedom) < 1 or pure < 1e-12 * lack:
        return None
    f = float(lack / freedom[0] / (pure / freedom[1]))
    return LackOfFit(f, freedom, float(f_distribution.sf(f, *freedom)))
