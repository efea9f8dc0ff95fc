"""Formulas of scaling laws, also in logarithms with their derivatives.

N: parameters without embeddings. D: training tokens. L: loss on held-out text, nats per token. Coefficients are
positive, so that everything is computed in logarithms, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Coefficients = dict[str, float]
Samples = dict[str, np.ndarray]  # coefficients of B resamples, each [B, 1]
Inputs = tuple[np.ndarray, ...]  # inputs of a law, each [n], or [B, n] if they differ between resamples

# Busbridge et al. 2025, arXiv 2502.08606, section 4 and table 6: C4, 143M to 12.6B parameters, 73 and 697 runs.
PUBLISHED = {
    "supervised": {"E": 1.220, "A": 3355.0, "B": 18186.0, "alpha": 0.408, "beta": 0.431, "gamma": 0.452},
    "distillation": {
        "A": 2243.0, "B": 24181.0, "alpha": 0.321, "beta": 0.637, "gamma": 0.764,
        "c0": 2.549, "c1": 522.6, "f1": 0.090, "d1": 1.315,
    },
}  # fmt: skip


def power(c: Coefficients | Samples, x):
    """Return L(x) = E + C / x^kappa, over one axis alone."""
    return c["E"] + c["C"] * x ** -c["kappa"]


def supervised(c: Coefficients | Samples, n, d):
    """Return L(N, D) = E + (A / N^alpha + B / D^beta)^gamma, for language modelling alone. arXiv 2502.08606, eq. 1.

    gamma = 1 gives the law of Hoffmann et al. 2022, arXiv 2203.15556.
    """
    return c["E"] + (c["A"] * n ** -c["alpha"] + c["B"] * d ** -c["beta"]) ** c["gamma"]


def distilled(c: Coefficients | Samples, n, d, teacher_loss, supervised_loss):
    """Return the loss of a student with N parameters after D tokens of a teacher with loss L_T.

    arXiv 2502.08606, eq. 8: L_T + L_T^-c0 (1 + (L_T / (L d1))^(1/f1))^(-c1 f1) (A / N^alpha + B / D^beta)^gamma, where
    L (`supervised_loss`) is the supervised law at N and D. The teacher enters only by its loss, and a student is never
    better than its teacher.
    """
    with np.errstate(over="ignore"):  # a teacher far worse than the student: the factor is 0
        gap = (1 + (teacher_loss / (supervised_loss * c["d1"])) ** (1 / c["f1"])) ** (-c["c1"] * c["f1"])
    reducible = (c["A"] * n ** -c["alpha"] + c["B"] * d ** -c["beta"]) ** c["gamma"]
    return teacher_loss + teacher_loss ** -c["c0"] * gap * reducible


def stacked_samples(samples: Sequence[Coefficients]) -> Samples:
    """Return the coefficients of resamples as arrays [B, 1], with which a law gives [B, n]."""
    return {name: np.array([sample[name] for sample in samples])[:, None] for name in samples[0]}


# The same laws as log L, with its derivatives by the logarithms of the coefficients: theta [..., K] -> [..., n] and
# [..., K, n]. Each row of theta is a start or a resample.


def log_power(theta: np.ndarray, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    e, c, kappa = columns(theta)
    (x,) = inputs
    slope = -np.exp(kappa) * x
    log_loss, share = log_sum(c + slope, e)
    return log_loss, stacked([(1 - share, 1), (share, 1), (share, slope)])


def log_supervised(theta: np.ndarray, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    reducible, slopes = _log_reducible(theta[..., 1:], *inputs)
    log_loss, share = log_sum(reducible, theta[..., :1])
    return log_loss, stacked([(1 - share, 1), *((share, slope) for slope in slopes)])


def log_distilled(theta: np.ndarray, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """Return the distillation law; its inputs are log N, log D, log L_T, the supervised law and the scale of L_T."""
    n, d, teacher, supervised_loss, unit = inputs
    *_, c0, c1, f1, d1 = columns(theta)
    c0, f1 = np.exp(c0), np.exp(f1)
    exponent = np.exp(c1) * f1
    ratio = (teacher - supervised_loss - d1) / f1
    soft, below = log_sum(ratio, np.zeros(1))  # log(1 + e^ratio) and its derivative
    student, slopes = _log_reducible(theta[..., :5], n, d)
    by_c0, by_c1 = c0 * (unit - teacher), -exponent * soft
    log_loss, share = log_sum(student + by_c0 + by_c1, teacher)
    slopes += [by_c0, by_c1, exponent * (below * ratio - soft), np.exp(c1) * below]
    return log_loss, stacked([(share, slope) for slope in slopes])


def _log_reducible(theta: np.ndarray, n: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return log (A / N^alpha + B / D^beta)^gamma, theta in the order A, B, alpha, beta, gamma."""
    a, b, alpha, beta, gamma = columns(theta)
    by_alpha, by_beta, gamma = -np.exp(alpha) * n, -np.exp(beta) * d, np.exp(gamma)
    both, share = log_sum(a + by_alpha, b + by_beta)
    by_a, value = gamma * share, gamma * both
    by_b = gamma - by_a
    return value, [by_a, by_b, by_a * by_alpha, by_b * by_beta, value]


def log_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return log(e^a + e^b) and its derivative by a. numpy's logaddexp takes several times longer."""
    total = np.maximum(a, b) + np.log1p(np.exp(-np.abs(a - b)))
    return total, np.exp(a - total)


def columns(theta: np.ndarray) -> np.ndarray:
    """Return each coefficient of theta [..., K] as [..., 1], so that it meets the runs [n]."""
    return np.moveaxis(theta, -1, 0)[..., None]


def stacked(products: Sequence[tuple[np.ndarray, np.ndarray | int]]) -> np.ndarray:
    """Return K products of two factors, each [..., n], as [..., K, n]."""
    first = products[0][0]
    result = np.empty((*first.shape[:-1], len(products), first.shape[-1]))
    for k, factors in enumerate(products):
        np.multiply(*factors, out=result[..., k, :])
    return result


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
