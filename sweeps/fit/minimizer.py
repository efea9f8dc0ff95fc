"""Least Huber loss of a law from many starts at once: each row is a start, of the runs or of a resample of them.

Reweighted least squares (Holland and Welsch 1977): at a residual r, the Huber loss lies below a parabola of curvature
1 / max(|r|, delta) that touches it. The sum of these parabolas, with the law linear in its coefficients, is minimised
as by Marquardt 1963. Delta falls in steps to its last value (Madsen and Nielsen 1993), because the loss is nearly the
mean absolute error there, in whose kinks a search can get stuck.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sweeps.fit.laws import Inputs, Law

LONGEST = 2.0  # step of a coefficient's logarithm
ROUGH = 1e-3  # tolerance at all values of delta but the last
PATIENCE = 3  # iterations that gain less than the tolerance, until a row has converged
EXACT = 1e-6  # a loss below it is a law that meets its runs: the tolerance is a share of this then


class Minima(NamedTuple):
    """Result of a search."""

    value: np.ndarray  # Huber loss over delta [B]
    theta: np.ndarray  # [B, K]
    converged: np.ndarray  # mask [B]


def huber(residual: np.ndarray, delta: float | np.ndarray) -> np.ndarray:
    """Return the Huber loss over delta: |r| - delta/2 beyond delta, r^2 / (2 delta) within."""
    size = np.abs(residual)
    within = np.minimum(size, delta)
    return within * (size - within / 2) / delta


def select(inputs: Inputs, rows) -> Inputs:
    """Return the inputs of some rows."""
    return tuple(x[rows] if x.ndim == 2 else x for x in inputs)


def minimize_huber(
    law: Law,
    theta: np.ndarray,
    inputs: Inputs,
    log_loss: np.ndarray,
    weights: np.ndarray,
    bounds: np.ndarray,
    deltas: Sequence[float],
    tolerance: float,
    iterations: int,
) -> Minima:
    """Return the minima that are reached from theta [B, K] within the bounds [K, 2].

    inputs: of the law, each [n], or [B, n] if rows differ. log_loss: measured [n]. weights: of the runs [B, n].
    tolerance: least decrease of the loss in an iteration, as a share of it. iterations: most of them for a row.
    """
    steps, last = np.asarray(deltas, float), len(deltas) - 1
    low, high = bounds.T
    diagonal = np.arange(theta.shape[1])

    def loss(residual: np.ndarray, delta: np.ndarray) -> np.ndarray:
        value = (weights * huber(residual, delta[:, None])).sum(-1)
        return np.where(np.isfinite(value), value, np.inf)

    theta = np.clip(theta, low, high)
    predicted, slopes = law.log(theta, inputs)
    residual = predicted - log_loss
    rows, stage = np.arange(len(theta)), np.zeros(len(theta), int)
    damping, calm = np.full(len(theta), 1e-3), np.zeros(len(theta), int)
    delta = steps[stage]
    value = loss(residual, delta)
    result = Minima(np.empty(len(theta)), np.empty_like(theta), np.zeros(len(theta), bool))
    for _ in range(iterations):
        curvature = weights / np.maximum(np.abs(residual), delta[:, None])
        gradient = (slopes @ (curvature * residual)[..., None])[..., 0]
        hessian = (slopes * curvature[:, None]) @ slopes.swapaxes(1, 2)
        fixed = ((theta <= low) & (gradient > 0)) | ((theta >= high) & (gradient < 0))  # at a bound, and held there
        gradient[fixed] = 0
        hessian[fixed] = 0
        hessian.swapaxes(1, 2)[fixed] = 0
        scale = hessian[:, diagonal, diagonal]
        damped = hessian.copy()
        damped[:, diagonal, diagonal] += damping[:, None] * scale + 1e-12 * scale.max(1, keepdims=True) + 1e-14
        step = -np.linalg.solve(damped, gradient[..., None])[..., 0]
        tried = np.clip(theta + np.clip(step, -LONGEST, LONGEST), low, high)
        step = tried - theta
        expected = -(step * (gradient + (hessian @ step[..., None])[..., 0] / 2)).sum(1)  # decrease, by the parabolas
        predicted, tried_slopes = law.log(tried, inputs)
        tried_residual = predicted - log_loss
        tried_value = loss(tried_residual, delta)
        better = tried_value < value
        gain = np.where(better, value - tried_value, 0.0)
        damping *= np.where(better, np.where(gain > 0.75 * expected, 0.2, np.where(gain > 0.25 * expected, 0.5, 1)), 4)
        damping = np.maximum(damping, 1e-12)
        small = np.where(stage == last, tolerance, ROUGH) * np.maximum(value, EXACT)
        # The limits of a step turn its direction, so that an increase may be expected: the row has not converged then.
        expects_little = (expected >= 0) & (expected <= small)
        calm = np.where(np.where(better, gain <= small, expects_little), calm + 1, 0)
        theta = np.where(better[:, None], tried, theta)
        residual = np.where(better[:, None], tried_residual, residual)
        value = np.where(better, tried_value, value)
        np.copyto(slopes, tried_slopes, where=better[:, None, None])
        ready = calm >= np.where(stage == last, PATIENCE, 1)
        ended = ready & (stage == last)
        if (ready & ~ended).any():
            stage = stage + (ready & ~ended)
            delta, calm = steps[stage], np.where(ready, 0, calm)
            value = loss(residual, delta)
        if ended.any():
            result.value[rows[ended]], result.theta[rows[ended]] = value[ended], theta[ended]
            result.converged[rows[ended]] = True
            rows, theta, residual, slopes, weights, value, delta, stage, damping, calm = (
                x[~ended] for x in (rows, theta, residual, slopes, weights, value, delta, stage, damping, calm)
            )
            inputs = select(inputs, ~ended)
        if not len(rows):
            break
    result.value[rows], result.theta[rows] = loss(residual, np.full(len(rows), steps[-1])), theta
    return result
