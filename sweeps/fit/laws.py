"""Formulas of scaling laws, also in logarithms with their derivatives.

N: parameters without embeddings. D: training tokens. L: loss on held-out text, nats per token. Coefficients are
positive, so that everything is computed in logarithms, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Coefficients = dict[str, float]
Inputs = tuple[np.ndarray, ...]  # inputs of a law, each [n]

# Busbridge et al. 2025, arXiv 2502.08606, section 4 and table 6: C4, 143M to 12.6B parameters, 73 and 697 runs.
PUBLISHED = {
    "supervised": {"E": 1.220, "A": 3355.0, "B": 18186.0, "alpha": 0.408, "beta": 0.431, "gamma": 0.452},
    "distillation": {
        "A": 2243.0, "B": 24181.0, "alpha": 0.321, "beta": 0.637, "gamma": 0.764,
        "c0": 2.549, "c1": 522.6, "f1": 0.090, "d1": 1.315,
    },
}  # fmt: skip


def power(c: Coefficients, x):
    """Return L(x) = E + C / x^kappa, over one axis alone."""
    return c["E"] + c["C"] * x ** -c["kappa"]


def supervised(c: Coefficients, n, d):
    """Return L(N, D) = E + (A / N^alpha + B / D^beta)^gamma, for language modelling alone. arXiv 2502.08606, eq. 1.

    gamma = 1 gives the law of Hoffmann et al. 2022, arXiv 2203.15556.
    """
    return c["E"] + (c["A"] * n ** -c["alpha"] + c["B"] * d ** -c["beta"]) ** c["gamma"]


def distilled(c: Coefficients, n, d, teacher_loss, supervised_loss):
    """Return the loss of a student with N parameters after D tokens of a teacher with loss L_T.

    arXiv 2502.08606, eq. 8: L_T + L_T^-c0 (1 + (L_T / (L d1))^(1/f1))^(-c1 f1) (A / N^alpha + B / D^beta)^gamma, where
    L (`supervised_loss`) is the supervised law at N and D. The teacher enters only by its loss, and a student is never
    better than its teacher.
    """
    with np.errstate(over="ignore"):  # a teacher far worse than the student: the factor is 0
        gap = (1 + (teacher_loss / (supervised_loss * c["d1"])) ** (1 / c["f1"])) ** (-c["c1"] * c["f1"])
    reducible = (c["A"] * n ** -c["alpha"] + c["B"] * d ** -c["beta"]) ** c["gamma"]
    return teacher_loss + teacher_loss ** -c["c0"] * gap * reducible


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
    """Return the distillation law; its inputs are log N, log D, log L_T, the supervised law and the scale of L_T."""
    n, d, teacher, supervised_loss, unit = inputs
    c0, c1, f1 = np.exp(theta[5:8])
    ratio = (teacher - supervised_loss - theta[8]) / f1
    soft = np.logaddexp(0, ratio)
    below = np.exp(ratio - soft)  # derivative of soft
    student, slopes = _log_reducible(theta[:5], n, d)
    reducible = student - c0 * (teacher - unit) - c1 * f1 * soft
    log_loss = np.logaddexp(teacher, reducible)
    share = np.exp(reducible - log_loss)
    more = [-c0 * (teacher - unit), -c1 * f1 * soft, c1 * f1 * (below * ratio - soft), c1 * below]
    return log_loss, share * np.vstack([slopes, *more])


def _log_reducible(theta: np.ndarray, n: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return log (A / N^alpha + B / D^beta)^gamma, theta in the order A, B, alpha, beta, gamma."""
    alpha, beta, gamma = np.exp(theta[2:])
    of_n, of_d = theta[0] - alpha * n, theta[1] - beta * d
    both = np.logaddexp(of_n, of_d)
    share = np.exp(of_n - both)
    slopes = [share, 1 - share, -share * alpha * n, -(1 - share) * beta * d, both]
    return gamma * both, gamma * np.stack(slopes)


class Law(NamedTuple):
    """Law to fit. Starts and bounds are those of its coefficients, in units that make N, D and L_T 1 on average."""

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
