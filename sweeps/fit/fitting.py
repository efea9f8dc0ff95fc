"""Fits of all laws that a set of runs allows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kd.system.console import console, counted, track
from sweeps.fit import laws, solver
from sweeps.fit.fits import Fit, ScalingFits
from sweeps.fit.laws import DISTILLATION, POWER, SUPERVISED, Coefficients, Law, Samples
from sweeps.fit.observations import Observation, column, data_of, numbered, setting_numbers
from sweeps.fit.solver import WARM, Optimum, Problem
from sweeps.report.wording import format_amount

AT_ONCE = 100  # resamples that are fitted together: more of them would not fit the cache


def fit_law(
    law: Law,
    subset: str,
    runs: list[Observation],
    draws: int,
    seed: int,
    supervised: Fit | None = None,
    axis: str = "parameters",
) -> Fit:
    """Fit a law to runs: to all runs, to all but the largest, and to `draws` resamples.

    supervised: the supervised law, for the distillation law. axis: that of a power law.
    """
    console.print(
        f"fitting the {law.name} law{subset and f' {subset}'} to {counted(len(runs), 'run', 'runs')}", soft_wrap=True
    )
    data, settings, seeds = data_of(runs), setting_numbers(runs), numbered(run.seed for run in runs)
    if law is POWER:
        data = data._replace(n=column(runs, axis))

    def problem(rows, base: Coefficients | Samples | None) -> Problem:
        some = data.select(rows)
        return Problem(law, some, None if base is None else laws.supervised(base, some.n, some.d))

    def log_errors(c: Coefficients, base: Coefficients | None) -> np.ndarray:
        if law is POWER:
            return np.log(laws.power(c, data.n)) - np.log(data.loss)
        loss = laws.supervised(base or c, data.n, data.d)
        if supervised:
            loss = laws.distilled(c, data.n, data.d, data.teacher_loss, loss)
        return np.log(loss) - np.log(data.loss)

    def resamples(minima: list[np.ndarray]) -> Iterator[Optimum]:
        """Yield the best optimum of each resample, from minima of all runs and a few starts of the grid."""
        rng, misfits = np.random.default_rng(seed), whole.misfits()
        for begin in range(0, draws, AT_ONCE):
            count = min(AT_ONCE, draws - begin)
            weights = np.stack([solver.resampled(settings, len(law.names), rng) for _ in range(count)])
            some = whole
            if supervised:
                some = problem(slice(None), laws.stacked_samples(supervised.bootstrap[begin : begin + AT_ONCE]))
            warm = np.broadcast_to(minima, (len(weights), *np.shape(minima)))
            starts = np.concatenate([warm, whole.starts(misfits, weights, WARM.tries)], axis=1)
            yield from (optima[0] for optima in some.optima(starts, weights, WARM))

    given = supervised.coefficients if supervised else None
    whole = problem(slice(None), given)
    optima = whole.full_search()
    best = whole.coefficients(optima[0].theta)
    errors = log_errors(best, given)
    held_out = solver.held_out(column(runs, "compute"), settings, len(law.names) + 1)
    fit_coefficients, rest_converged = None, True
    if held_out.any():
        base = (supervised.fit_coefficients or given) if supervised else None
        rest = problem(~held_out, base)
        rest_optimum = rest.full_search()[0]
        fit_coefficients, rest_converged = rest.coefficients(rest_optimum.theta), rest_optimum.converged
        errors[held_out] = log_errors(fit_coefficients, base)[held_out]
    title = f"bootstrap of the {law.name} law{subset and f' {subset}'}"
    drawn = [optimum for _, optimum in zip(track(range(draws), title), resamples([o.theta for o in optima[:2]]))]
    axes = [data.n] if law is POWER else [data.n, data.d, *([data.teacher_loss] if supervised else [])]
    off = solver.loglinear(np.log(axes), np.log(data.loss), ~held_out) - np.log(data.loss)
    squares = whole.least_squares(optima[0].theta)
    residuals = law.log(squares.theta, whole.inputs)[0] - whole.loss
    return Fit(
        law=law,
        subset=subset,
        runs=runs,
        coefficients=best,
        bootstrap=[whole.coefficients(optimum.theta) for optimum in drawn],
        converged=optima[0].converged and rest_converged and squares.converged,
        unconverged=sum(not optimum.converged for optimum in drawn),
        held_out=held_out,
        fit_coefficients=fit_coefficients,
        errors=errors,
        loglinear_error=float(np.abs(np.expm1(off[held_out])).mean()) if held_out.any() else None,
        lack_of_fit=solver.lack_of_fit(residuals, settings, seeds, len(law.names)),
        settings=len(np.unique(data.n if law is POWER else settings)),
        # A, B and C are searched in other units, which depend on the exponents, and far from their bounds.
        bounds={k: tuple(np.exp(ends).tolist()) for k, ends in zip(law.names, whole.bounds) if k not in "ABC"},
    )


def fit_all(name: str, runs: list[Observation], notes: list[str], draws: int, seed: int) -> ScalingFits:
    """Fit all laws that these runs allow."""
    fits = ScalingFits(name, runs, list(notes))
    supervised, distilled, reasons = fits.supervised_runs, fits.distilled_runs, fits.not_fitted
    if reason := too_few(supervised, SUPERVISED):
        reasons.append(f"The supervised law cannot be fitted to the runs by language modelling alone: {reason}.")
    else:
        fits.supervised = fit_law(SUPERVISED, "", supervised, draws, seed)
    if not distilled:
        reasons.append("The distillation law cannot be fitted: no run learns from a teacher.")
    elif fits.supervised is None:
        reasons.append("The distillation law cannot be fitted, since it is built on the supervised law.")
    elif reason := too_few(distilled, DISTILLATION):
        reasons.append(f"The distillation law cannot be fitted: {reason}.")
    elif len({run.teacher_loss for run in distilled}) < 2:
        reasons.append("The distillation law cannot be fitted: it needs at least 2 teachers of different losses.")
    else:
        fits.distillation = fit_law(DISTILLATION, "", distilled, draws, seed, fits.supervised)
    for axis, (constraint, some) in along_axes(supervised).items():
        if len(np.unique(column(some, axis))) < 4:
            reasons.append(
                f"A power law over {axis} needs at least 4 values of it{constraint and f' for {constraint}'}."
            )
        else:
            subset = f"over {axis}{constraint and f', {constraint}'}"
            fits.powers[axis] = fit_law(POWER, subset, some, draws, seed, axis=axis)
    return fits


def too_few(runs: list[Observation], law: Law) -> str:
    """Return the reason why a law of N and D cannot be fitted to these runs; empty if it can."""
    sizes, amounts = (len(np.unique(column(runs, k))) for k in ("parameters", "tokens"))
    settings = len(np.unique(setting_numbers(runs)))
    if settings > len(law.names) and sizes > 1 and amounts > 1:
        return ""
    return (
        f"{len(law.names)} coefficients need at least {len(law.names) + 1} settings of at least 2 student sizes and 2 "
        f"numbers of tokens; here: {counted(settings, 'setting', 'settings')} in "
        f"{counted(len(runs), 'run', 'runs')}, {counted(sizes, 'size', 'sizes')} and "
        f"{counted(amounts, 'number', 'numbers')} of tokens"
    )


def along_axes(runs: list[Observation]) -> dict[str, tuple[str, list[Observation]]]:
    """Return the runs along one axis: those of the largest student, those with most tokens, the best per compute."""
    if not runs:
        return {}
    size, most = max(run.parameters for run in runs), max(run.tokens for run in runs)
    front = [run for run in runs if not any(other.loss < run.loss and other.compute <= run.compute for other in runs)]
    return {
        "tokens": (f"N = {format_amount(size)}", [run for run in runs if run.parameters == size]),
        "parameters": (f"D = {format_amount(most)}", [run for run in runs if run.tokens == most]),
        "compute": ("the best runs", front),
    }
